"""Progress bars on stderr: on a terminal, and as lines in a log."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress


@contextmanager
def above_progress_bars() -> Iterator[None]:
    """Within the block, print lines that do not mix with a bar on a terminal."""
    from tqdm import tqdm

    with tqdm.external_write_mode() if sys.stderr is not None and sys.stderr.isatty() else nullcontext():
        yield


class _LogFile:
    """A bar in a log: lines that end. A stream that fails must not end a run."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self.stream.write(f"{text.strip()}\n" if text.strip() else "")

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()


def progress_bar(description: str, disable: bool = False, **options):
    """A tqdm bar on stderr that appears after a second; without a terminal a line every 30 seconds.

    The time that is left follows from the mean speed so far: that of the last steps, tqdm's default, jumps.
    """
    from tqdm import tqdm

    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    file, seconds = (sys.stderr, 0.1) if is_terminal else (_LogFile(sys.stderr), 30)
    disable = disable or sys.stderr is None
    options |= {"delay": 1, "mininterval": seconds, "smoothing": 0}
    return tqdm(desc=description, file=file, disable=disable, **options)
