"""SIGINT, SIGTERM and SIGHUP as an exception: at once, or when a step has ended."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_asked = None  # the number of the signal that came
_waits = False  # whether a first signal waits for the end of `between_steps`


class Stopped(KeyboardInterrupt):
    """A process was asked to stop by the signal `number`; `told` is what to tell the user, in one line."""

    def __init__(self, number: int, told: str = "interrupted"):
        super().__init__(number, told)
        self.number, self.told = number, told


def _take(number: int, _) -> None:
    global _asked
    is_first, _asked = _asked is None, number
    if not (is_first and _waits):
        raise Stopped(number)


@contextmanager
def heard() -> Iterator[None]:
    """Within the block, each signal raises `Stopped`; one that is ignored, as under `nohup`, still is."""
    global _asked
    before = {}
    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, _take)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = None


@contextmanager
def between_steps() -> Iterator[Callable[[], int | None]]:
    """Within the block, a first signal waits for its end; a second does not. Gives what tells the one that waits."""
    global _waits
    _waits = True
    try:
        yield lambda: _asked
        if _asked is not None:
            raise Stopped(_asked)
    finally:
        _waits = False
