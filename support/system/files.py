"""Files: atomic writes, locks that end with their process, folders, and content hashes."""

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

from support.system.errors import UserError, valid_unicode

LOCK = ".rankrouter.lock"  # within a folder that one process holds
LFS_POINTER = b"version https://git-lfs"  # how the file that git-LFS leaves in the place of another one starts

SECONDS_TO_DIE = 5  # a killed process may take this long to free its memory, and then its lock


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` in one step when the block ends without an error.

    A reader or a crash sees the old file or the new one. A device or pipe is written directly, and a link stays a link.
    Raises `UserError` where the file cannot be written; the old one is then untouched.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as file:
                yield file
            return
        target = Path(os.path.realpath(path))
        remove_leftovers(target.parent, target.name)
        prefix = f".{target.name}.{os.getpid()}"
        file = _open_locked(lambda: target.with_name(f"{prefix}.{os.urandom(4).hex()}.partial"), "xb")
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if target.is_file():
                    shutil.copymode(target, file.name)
                os.replace(file.name, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete the partial files of writers that were killed, of one file or of all; living writers hold a lock."""
    pattern = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.partial", re.DOTALL)
    for path in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.partial"):
        if pattern.fullmatch(path.name):
            with suppress(OSError), open(path, "rb+") as file:  # locked, deleted meanwhile, or not ours to delete
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def is_locked(folder: Path) -> bool:
    """Whether a living process holds a folder, by `locked`."""
    try:
        with open(folder / LOCK, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file: nobody holds it
        return False
    return False


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Hold a folder, named by `flag`, for this process alone; the lock ends with the process, however it ends.

    Raises `UserError` where another process holds it.
    """
    path, start = folder / LOCK, time.monotonic()
    while True:
        try:
            file = _open_locked(lambda: path, "a+")
            break
        except BlockingIOError as error:
            if time.monotonic() - start >= SECONDS_TO_DIE:
                holder = ""
                with suppress(OSError, ValueError):  # it has just ended
                    holder = f", {path.read_text()}"
                message = f"{folder} is in use by another run{holder}"
                raise UserError(f"{message}; wait until it ends, or choose another folder with {flag}") from error
            time.sleep(0.1)
        except OSError as error:
            raise UserError(f"cannot lock {folder}: {error.strerror or error}; choose another with {flag}") from error
    with file:
        with suppress(OSError):  # the disk may be full: this is only for the message to others
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            with suppress(OSError):  # the folder may be read-only by now; the lock ends anyway
                path.unlink()


def _refuse_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _open_locked(name: Callable[[], Path], mode: str) -> IO:
    """Open a file with an exclusive lock. Raises `BlockingIOError` where another process holds it."""
    while True:
        file = open(path := name(), mode, opener=_refuse_link)  # noqa: SIM115, the caller closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            if mode == "xb":  # a new file, which another writer takes for a leftover and deletes
                continue
            raise
        except OSError:  # a file system without locks
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
        file.close()  # another process deleted it between opening and locking


def atomic_write(path: str | Path, data: bytes) -> None:
    """Replace the file `path` by `data`, atomically; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


def folder_path(path: str | Path, flag: str) -> Path:
    """The path of the folder that `flag` names. Raises `UserError` where it is empty or not valid UTF-8."""
    if not str(path) or str(path) != valid_unicode(str(path)):  # libraries refuse the latter with errors of their own
        raise UserError(f"{flag} is {'not valid UTF-8' if str(path) else 'empty'}; expected a folder")
    return Path(os.path.expanduser(path))


def make_folder(path: str | Path, flag: str) -> Path:
    """Create the folder that `flag` names, with its parents, and check that it is writable."""
    folder = folder_path(path, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to the folder {path}: {reason}; choose another with {flag}") from error
    return folder


def user_cache_folder() -> Path:
    """The user's cache folder: `$XDG_CACHE_HOME/rankrouter`, or `~/.cache/rankrouter`."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankrouter"
    except RuntimeError as error:
        raise UserError(f"{error} Set HOME or XDG_CACHE_HOME, or give --cache_dir and --demo_dir") from error


def cache_folder(cache_dir: str | None, no_cache: bool) -> str | Path | None:
    """The folder of cached embeddings that the flags name; None with --no_cache."""
    if no_cache:
        return None
    return user_cache_folder() if cache_dir is None else cache_dir


def content_hash(files: Iterable[str | Path]) -> str:
    """SHA-256 (hex) of the files' contents in the order given; their names and places do not count."""
    digest = hashlib.sha256()
    for path in files:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device would never end
            raise UserError(f"{path} is not a file; replace it by one")
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()
