"""Files that survive a crash, content hashes, and the error that a user can act on."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class UserError(Exception):
    """Something the user can mend: one line that says what was found, what was expected, what to do."""


def one_line(text: object) -> str:
    """A text as one line for a terminal, which no newline breaks and no control character reaches."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())


def valid_unicode(text: str) -> str:
    """The text, with U+FFFD for each lone surrogate, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` in one step when the block ends without an error.

    A reader or a crash sees the old file or the new one. What is no file (a device, a pipe) is written as it goes, and
    a link stays one. Raises `UserError` where the file cannot be written; what stood there before is then untouched.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as file:
                yield file
            return
        place = Path(os.path.realpath(path))
        beside = place.with_name(f".{place.name}.{os.getpid()}.{os.urandom(4).hex()}")  # two containers may share a pid
        try:
            with open(beside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if place.is_file():
                shutil.copymode(place, beside)
            os.replace(beside, place)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def atomic_write(path: str | Path, data: bytes) -> None:
    """Replace the file `path` by `data` as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def make_folder(path: str | Path, flag: str) -> Path:
    """Create the folder that `flag` names, with its parents, and make sure that it can be written to."""
    if not str(path):
        raise UserError(f"{flag} is empty; expected a folder")
    folder = Path(os.path.expanduser(path))
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to the folder {path}: {reason}; choose another with {flag}") from error
    return folder


def user_cache_folder() -> Path:
    """Where this user keeps what can be made again: `$XDG_CACHE_HOME/rankrouter`, or `~/.cache/rankrouter`."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankrouter"
    except RuntimeError as error:
        raise UserError(f"{error} Set HOME or XDG_CACHE_HOME, or give --cache_dir and --demo_dir") from error


def cache_folder(cache_dir: str | None, no_cache: bool) -> str | Path | None:
    """Where embeddings are kept, as the flags say; None where they are not."""
    if no_cache:
        return None
    return user_cache_folder() if cache_dir is None else cache_dir


def content_hash(files: Iterable[str | Path]) -> str:
    """SHA-256 (hex) of the files' contents in the order given; their names and places do not enter it."""
    whole = hashlib.sha256()
    for path in files:
        try:
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return whole.hexdigest()
