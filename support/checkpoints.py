"""Checkpoints as files: plain tensors and Python types, whole or refused, and nothing in them is run."""

import io
import os
import pickle
import zipfile
from pathlib import Path

from support.files import UserError, atomic_write, is_out_of_memory, one_line, reason


def write_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Replace the file `path` by a checkpoint. Raises `UserError` where it cannot be written."""
    import torch

    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    atomic_write(path, buffer.getvalue())


def read_checkpoint(path: str | Path, version: int) -> dict:
    """A checkpoint of that `format_version`, its tensors on the CPU.

    Every record's checksum is looked at, which torch's own reader leaves to others, and no record may be more than
    is in the file. Raises `UserError` where it is no checkpoint of ours, is damaged, or would run something.
    """
    return parse_checkpoint(path, read_content(path), version)


def read_content(path: str | Path) -> bytes:
    """The bytes of a checkpoint. Raises `UserError` where they cannot be read."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a device, say, that never ends
            raise UserError(f"{path} is no file; expected a checkpoint")
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error


def parse_checkpoint(path: str | Path, content: bytes, version: int) -> dict:
    """What `read_checkpoint` makes of the content of the file at `path`."""
    import torch

    try:
        problem = _damage(content)
        if problem is None:
            checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            found = checkpoint.pop("format_version")
    except Exception as error:  # whatever a foreign or damaged file raises in the readers, or lacks
        raise not_ours(path, error) from error
    if problem is not None:
        raise UserError(f"{path} is no RankRouter checkpoint: {problem}")
    if type(found) is not int or found != version:
        raise UserError(f"{path} has checkpoint format {one_line(found)[:40]}, expected {version}; train it again")
    return checkpoint


def is_plain(tensor) -> bool:
    """Whether a tensor on the CPU is all there, number by number, and takes no more memory than its file."""
    import torch

    return tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.is_contiguous()


def not_ours(path: str | Path, error: Exception) -> UserError:
    """What to tell of a file that failed with `error` where a checkpoint was expected; raises it if memory ended."""
    if is_out_of_memory(error):  # which says nothing of the file
        raise error
    if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to open it all the same
        return UserError(f"{path} is no RankRouter checkpoint: it is damaged, or holds objects that are no tensors")
    return UserError(f"{path} is no RankRouter checkpoint ({type(error).__name__}: {reason(error)})")


def _damage(content: bytes) -> str | None:
    """What is wrong with the zip archive that torch writes a checkpoint as; None where nothing is."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > len(content):
            return "its records unpack to more than the file, which training does not write"
        if any(record.filename.startswith("/") or ".." in record.filename.split("/") for record in records):
            return "a record's name leads out of it"
        damaged = archive.testzip()
    return None if damaged is None else f"it is damaged, in {one_line(damaged)}"
