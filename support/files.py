"""Files that survive a crash, locks that do not, content hashes, and the error that a user can act on."""

import fcntl
import glob
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

SECONDS_TO_DIE = 5  # that a process which was killed may take to give its memory back, and then its lock


class UserError(Exception):
    """Something the user can mend: one line that says what was found, what was expected, what to do."""


def one_line(text: object) -> str:
    """A text as one line for a terminal, which no newline breaks and no control character reaches."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())


def reason(error: BaseException) -> str:
    """What an error says, in one line of some words; its type where it says nothing."""
    return one_line(error)[:200] or type(error).__name__


def valid_unicode(text: str) -> str:
    """The text, with U+FFFD for each lone surrogate, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory, of the machine or of a device, is used up."""
    told = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")  # what has no type for it
    is_known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_known or (isinstance(error, RuntimeError) and any(words in str(error) for words in told))


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
        remove_leftovers(place.parent, place.name)
        file = _lock_anew(lambda: place.with_name(f".{place.name}.{os.getpid()}.{os.urandom(4).hex()}.partial"), "xb")
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if place.is_file():
                    shutil.copymode(place, file.name)
                os.replace(file.name, place)
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete what writers of a file, or of any, left beside it when they were killed; those that live hold a lock."""
    pattern = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.partial", re.DOTALL)
    for path in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.partial"):
        if pattern.fullmatch(path.name):
            with suppress(OSError), open(path, "rb+") as file:  # locked, gone meanwhile, or not ours to delete
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Hold a folder, named by `flag`, for this process alone; the lock ends with the process, however that ends.

    Raises `UserError` where another process holds it.
    """
    path, since = folder / ".rankrouter.lock", time.monotonic()
    while True:
        try:
            file = _lock_anew(lambda: path, "a+")
            break
        except BlockingIOError as error:
            if time.monotonic() - since >= SECONDS_TO_DIE:
                told = f"{folder} is in use by another run{_holder(path)}"
                raise UserError(f"{told}; wait for its end, or choose another folder with {flag}") from error
            time.sleep(0.1)
        except OSError as error:
            raise UserError(f"cannot lock {folder}: {error.strerror or error}; choose another with {flag}") from error
    with file:
        with suppress(OSError):  # the disk may be full: it is only told to whom the folder belongs
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            with suppress(OSError):  # the folder may be read-only by now; the lock ends all the same
                path.unlink()


def _holder(lock: Path) -> str:
    try:
        return f", {lock.read_text()}"
    except (OSError, ValueError):  # it has just ended
        return ""


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _lock_anew(name: Callable[[], Path], mode: str) -> IO:
    """An opened file under a lock of this process alone. Raises `BlockingIOError` where another process holds it."""
    while True:
        file = open(path := name(), mode, opener=_no_link)  # noqa: SIM115, the caller closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            if mode == "xb":  # a new file, which somebody takes for a leftover and deletes
                continue
            raise
        except OSError:  # a file system without locks
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
        file.close()  # another process deleted it between opening and locking


def atomic_write(path: str | Path, data: bytes) -> None:
    """Replace the file `path` by `data` as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def make_folder(path: str | Path, flag: str) -> Path:
    """Create the folder that `flag` names, with its parents, and make sure that it can be written to."""
    if not str(path):
        raise UserError(f"{flag} is empty; expected a folder")
    folder = Path(os.path.expanduser(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
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
