"""What the commands share: flag types, one-line errors, exit codes."""

import argparse
import csv
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress

from support.system import distributed, signals
from support.system.errors import UserError, is_out_of_memory, one_line, reason, valid_unicode


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        # "(default: None)" and "(default: False)" add nothing to the help text.
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line; argparse alone prints the whole usage before them."""

    def __init__(self, description: str):
        # No abbreviations: a shell loop must not change its meaning when a flag is added.
        super().__init__(description=description, formatter_class=_Defaults, allow_abbrev=False)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""
    wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
    return _number(int, f"a whole number {wanted}", lambda number: low <= number and (high is None or number <= high))


def real_number(interval: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type: a finite number in `interval`, for which `holds` is true."""
    return _number(float, f"a number {interval}", lambda number: math.isfinite(number) and holds(number))


def _number(convert: Callable, wanted: str, holds: Callable) -> Callable:
    def parse(text: str) -> float:
        with suppress(ValueError):
            number = convert(text)
            if holds(number):
                return number
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")

    return parse


def comma_separated(text: str) -> list[str]:
    """An argparse type: distinct names, separated by commas; a name with a comma is quoted as in CSV."""
    try:
        found = list(dict.fromkeys(name.strip() for name in next(csv.reader([text], skipinitialspace=True), [""])))
    except csv.Error:  # a newline outside of quotes
        found = [""]
    if not found or "" in found:
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return found


def layer_numbers(text: str) -> list[int]:
    """An argparse type: distinct whole numbers of at least 1, separated by commas, in ascending order."""
    return sorted({whole_number(1)(number) for number in comma_separated(text)})


def some_path(text: str) -> str:
    """An argparse type: the path of a file or folder, ~ being the home folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return os.path.expanduser(text)


def some_text(text: str) -> str:
    """An argparse type: a name that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a name, got {text!r}")
    return text


def unicode_text(text: str) -> str:
    """An argparse type: a text in valid Unicode, which may be empty."""
    if text != valid_unicode(text):
        raise argparse.ArgumentTypeError(f"expected text in valid Unicode, got {text!r}")
    return text


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`: a `UserError` is a line on stderr and exit code 2, a signal to stop 128 + its number."""
    # Threads that wait for each other sleep: beside other runs, spinning would take the cores that these are on.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported
    if hasattr(sys.stdout, "reconfigure"):  # a log file shows each epoch as it ends, and accepts any model's name
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        with signals.handled(), warnings.catch_warnings():
            if not sys.warnoptions:  # those of libraries; what a user must know, a command says itself
                warnings.simplefilter("ignore")
            main()
            print(end="", flush=True)
    except UserError as error:
        print(f"{distributed.name()}error:", one_line(error), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, signals.Stopped) else signals.Stopped(signal.SIGINT)
        print(f"{distributed.name()}{stopped.message}", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory ({reason(error)}); smaller batches, or fewer queries, need less", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if sys.stdout is not None:  # it may be closed or full, and Python's own last flush would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `... | head` has ended
            sys.exit(1)
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(2)
