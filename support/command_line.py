"""What the commands share: flags that explain themselves, one-line errors, exit codes."""

import argparse
import csv
import math
import os
import signal
import sys
from collections.abc import Callable

from support import processes, signals
from support.files import UserError, is_out_of_memory, one_line, reason


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        # "(default: None)" and "(default: False)" tell nothing that the help text does not.
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line; argparse alone prints the whole usage before them."""

    def __init__(self, description: str):
        # No abbreviations: a user's shell loop must not change its meaning when a flag is added.
        super().__init__(description=description, formatter_class=_Defaults, allow_abbrev=False)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < low or (high is not None and number > high):
            wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"expected a whole number {wanted}, got {text!r}")
        return number

    return parse


def real_number(interval: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type: a finite number that lies in `interval`, as `holds` tells."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and holds(number)):
            raise argparse.ArgumentTypeError(f"expected a number {interval}, got {text!r}")
        return number

    return parse


def comma_separated(text: str) -> list[str]:
    """An argparse type: distinct names with commas between; one that holds a comma is quoted as in CSV."""
    try:
        found = list(dict.fromkeys(name.strip() for name in next(csv.reader([text], skipinitialspace=True), [""])))
    except csv.Error:  # a newline outside of quotes
        found = [""]
    if not found or "" in found:
        raise argparse.ArgumentTypeError(f"expected names with commas between, got {text!r}")
    return found


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


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`: a `UserError` is a line on stderr and exit code 2, a signal to stop 128 + its number."""
    if hasattr(sys.stdout, "reconfigure"):  # a log file shows each epoch as it ends, and takes any model's name
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        with signals.heard():
            main()
            print(end="", flush=True)
    except UserError as error:
        print(f"{processes.name()}error:", one_line(error), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, signals.Stopped) else signals.Stopped(signal.SIGINT)
        print(f"{processes.name()}{stopped.told}", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory ({reason(error)}); smaller batches, or fewer queries, need less", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if sys.stdout is not None:  # it may be gone or full, and Python's own last flush of it would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `... | head` has seen enough
            sys.exit(1)
        print("error:", error, file=sys.stderr)
        sys.exit(2)
