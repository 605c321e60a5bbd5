"""The optimizer, its learning rates, and the exponential moving average of the weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


def make_optimizer(
    towers: Iterable[torch.nn.Parameter],
    encoder: Iterable[torch.nn.Parameter],
    *,
    lr: float,
    encoder_lr: float | None,
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW on the towers' parameters at `lr` and on the trainable ones of the encoder, if any, at `encoder_lr`."""
    groups = [{"params": list(towers), "lr": lr, "peak_lr": lr}]
    if encoder := list(encoder):
        groups.append({"params": encoder, "lr": encoder_lr, "peak_lr": encoder_lr})
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


def warmup_then_decay(progress: float, warmup: float) -> float:
    """Factor of the learning rates: linear from 0 to 1 while `progress` is below `warmup`, then linear to 0 at 1."""
    rising = progress / warmup if warmup else 1.0
    return min(rising, (1 - progress) / (1 - warmup))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every parameter group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


class EMA:
    """The exponential moving average of weights over the steps of a training.

    Its decay at step t is min(decay, (1 + t) / (10 + t)), so that the initial weights fade.
    Without weights it does nothing.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM 1992; the decay of the
    first steps is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, weights: list[torch.Tensor], decay: float):
        self.weights, self.decay, self.steps = weights, decay, 0
        self.averages = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self) -> None:
        """Include the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        if self.averages:
            get_ema_multi_avg_fn(decay)(self.averages, self.weights, None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the weights are their averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for weight, average in zip(self.weights, self.averages, strict=True):
            weight.data, average.data = average.data, weight.data

    def state_dict(self) -> dict:
        """The averages and the number of steps."""
        return {"averages": self.averages, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`. Raises `ValueError` where the number of weights differs."""
        self.steps = state["steps"]
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)
