"""The optimizer, its learning rates, and the exponential moving average of the weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

STEPS_PER_UPDATE = 10  # of the average of the weights


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

    Its decay at step t is min(decay, (1 + t) / (10 + t)), so that the initial weights fade. To save time, the weights
    are included after every `STEPS_PER_UPDATE` steps, with the product of these steps' decays, and before they are
    validated. Without weights it does nothing.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM 1992; the decay of the
    first steps is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, weights: list[torch.Tensor], decay: float):
        self.weights, self.decay, self.steps = weights, decay, 0
        self.pending = 1.0  # the product of the decays of the steps that are not included yet
        self.averages = [weight.detach().clone() for weight in weights]

    def update(self) -> None:
        """Count a step."""
        self.steps += 1
        self.pending *= min(self.decay, (1 + self.steps) / (10 + self.steps))
        if self.steps % STEPS_PER_UPDATE == 0:
            self._include()

    @torch.no_grad()
    def _include(self) -> None:
        if self.averages and self.pending < 1:
            get_ema_multi_avg_fn(self.pending)(self.averages, self.weights, None)
        self.pending = 1.0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the weights are their averages."""
        self._include()
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for weight, average in zip(self.weights, self.averages, strict=True):
            weight.data, average.data = average.data, weight.data

    def state_dict(self) -> dict:
        """The averages, the number of steps, and what is pending."""
        return {"averages": self.averages, "steps": self.steps, "pending": self.pending}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`. Raises `ValueError` where the number of weights differs."""
        self.steps, self.pending = state["steps"], state.get("pending", 1.0)  # always 1 in earlier versions
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)
