"""Torch files of plain tensors and Python types only: complete or refused, and nothing in them is executed."""

import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from support.system.errors import UserError, is_out_of_memory, one_line, reason
from support.system.files import atomic_write

FOLDER = 0x10  # the attribute of a zip archive's record that is a folder


def write_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Replace the file `path` by a checkpoint. Raises `UserError` where it cannot be written."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    atomic_write(path, buffer.getvalue())


def read_checkpoint(path: str | Path, version: int) -> dict:
    """A checkpoint of that `format_version`, its tensors on the CPU.

    Every record's checksum is verified, which torch's own reader does not do, and records must not unpack to more than
    the file. Raises `UserError` where it is not our checkpoint, is damaged, or would execute something.
    """
    return parse_checkpoint(path, read_content(path), version)


def read_content(path: str | Path) -> bytes:
    """The bytes of a checkpoint. Raises `UserError` where they cannot be read."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a device, for example, never ends
            raise UserError(f"{path} is not a file; expected a checkpoint")
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error


def parse_checkpoint(path: str | Path, content: bytes, version: int) -> dict:
    """The checkpoint in the content of the file at `path`; see `read_checkpoint`."""
    try:
        problem = _damage(content)
        if problem is None:
            with warnings.catch_warnings(action="ignore"):  # of torch's unpickler, about a damaged file
                checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            found = checkpoint.pop("format_version")
    except Exception as error:  # a foreign or damaged file raises anything
        raise not_ours(path, error) from error
    if problem is not None:
        raise UserError(f"{path} is not a RankRouter checkpoint: {problem}")
    if type(found) is not int or found != version:
        raise UserError(f"{path} has checkpoint format {one_line(found)[:40]}, expected {version}; train it again")
    return checkpoint


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is dense, contiguous and on the CPU, so that it takes no more memory than its file."""
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.is_contiguous()


def not_ours(path: str | Path, error: Exception) -> UserError:
    """The message for a file that failed with `error` where a checkpoint was expected; raises it if memory ran out."""
    if is_out_of_memory(error):  # which says nothing about the file
        raise error
    if isinstance(error, pickle.UnpicklingError):  # torch's own message advises opening it anyway
        return UserError(f"{path} is not a RankRouter checkpoint: it is damaged, or holds objects other than tensors")
    return UserError(f"{path} is not a RankRouter checkpoint ({type(error).__name__}: {reason(error)})")


def _damage(content: bytes) -> str | None:
    """What is damaged in the zip archive that torch writes; None where nothing is."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > len(content):
            return "its records unpack to more than the file, which training does not write"
        if any(record.filename.startswith("/") or ".." in record.filename.split("/") for record in records):
            return "a record's name leads out of the archive"
        if any(record.external_attr & FOLDER for record in records):  # torch would read nothing and leave memory as is
            return "a record is marked as a folder"
        damaged = archive.testzip()
    return None if damaged is None else f"it is damaged, in {one_line(damaged)}"
