"""SIGINT, SIGTERM and SIGHUP as an exception: at once, or after the current training step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_received = None  # the number of the last signal
_deferring = False  # whether a first signal waits


class Stopped(KeyboardInterrupt):
    """The process was asked to stop by the signal `number`; `message` is the one line for the user."""

    def __init__(self, number: int, message: str = "interrupted"):
        super().__init__(number, message)
        self.number, self.message = number, message


def _handle(number: int, _) -> None:
    global _received
    is_first, _received = _received is None, number
    if not (is_first and _deferring):
        raise Stopped(number)


def received() -> int | None:
    """The number of the signal that came and is deferred, or None."""
    return _received


@contextmanager
def handled() -> Iterator[None]:
    """Within the block, each signal raises `Stopped`; one that is ignored, as under `nohup`, still is."""
    global _received
    heeded = [number for number in NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _handle) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received = None


@contextmanager
def deferred() -> Iterator[None]:
    """Within the block a first signal is only noted, for `received`, and raised at its end; a second raises at once."""
    global _deferring
    _deferring = True
    try:
        yield
        if _received is not None:
            raise Stopped(_received)
    finally:
        _deferring = False
