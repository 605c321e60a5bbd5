"""A running mean of the weights, which is what training validates and keeps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class RunningMean:
    """The exponential moving average of weights over the steps of a training, which goes on with the weights.

    Its decay is `decay`, and (1 + t) / (10 + t) at step t where that is less, so that it forgets the beginning.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM 1992; the decay of the
    first steps is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, weights: list[torch.Tensor], decay: float):
        self.weights, self.decay, self.steps = weights, decay, 0
        self.means = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as a step has left them."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        if self.means:
            get_ema_multi_avg_fn(decay)(self.means, self.weights, None)

    @torch.no_grad()
    def restore(self, means: list[torch.Tensor], steps: int) -> None:
        """Go on from the means after so many steps."""
        self.steps = steps
        for mean, kept in zip(self.means, means, strict=True):
            mean.copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the weights are their means."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for weight, mean in zip(self.weights, self.means, strict=True):
            weight.data, mean.data = mean.data, weight.data
