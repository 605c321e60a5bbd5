"""Folders as the Hugging Face hub keeps models: `config.json`, `model.safetensors` and a card; nothing is executed."""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

import torch

from support.system.errors import UserError, one_line, reason, valid_unicode

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
LARGEST_CONFIG = 2**26  # bytes
IN_METADATA = "metadata/"  # how the names of tensors start that are not weights


def is_hub_id(name: str) -> bool:
    """Whether a name is not a local path and has the form of a hub id, `owner/name`."""
    return not os.path.exists(os.path.expanduser(name)) and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name))


def download(hub_id: str, **options) -> Path:
    """The local copy of a hub repository; the options are those of `snapshot_download`.

    Raises `UserError` where there is none.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, **options))
    except Exception as error:  # the hub's client raises errors without a common base class
        problem = f"{hub_id} is not a local folder and could not be downloaded as a hub id: {reason(error)}"
        problem += "; name a folder, or see that the hub can be reached and that you may read it"
        raise UserError(problem) from error


def write_folder(folder: str | Path, weights: dict, metadata: dict, card: str | None) -> None:
    """Write a new folder, completely or not at all, from weights by name and nested metadata of values and tensors.

    Raises `UserError` where it cannot be written, or holds something already.
    """
    from safetensors.torch import save

    folder = Path(os.path.expanduser(folder))
    plain, tensors = _without_tensors(metadata, IN_METADATA)
    content = save({name: weight.contiguous() for name, weight in (weights | tensors).items()})
    plain |= {"weights_sha256": hashlib.sha256(content).hexdigest()}
    files = {WEIGHTS: content, CONFIG: json.dumps(plain, indent=1).encode()}
    files |= {} if card is None else {CARD: valid_unicode(card).encode()}
    try:
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder; move it away, or choose another")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
            complete = Path(beside) / "complete"
            complete.mkdir()
            for name, data in files.items():
                with open(complete / name, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(complete, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error


def read_folder(folder: Path, library: str, version: int) -> tuple[dict, dict]:
    """The weights and the metadata of a folder that `write_folder` wrote for this library and format version.

    Tensors are on the CPU. Raises `UserError` where it is another folder, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not os.path.isdir(folder):
        problem = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
        raise UserError(f"{folder} {problem}; expected a folder that `save_pretrained` wrote, or a hub id (owner/name)")
    if missing := [name for name in (CONFIG, WEIGHTS) if not os.path.isfile(folder / name)]:
        raise UserError(f"{folder} lacks {' and '.join(missing)}; expected a folder that `save_pretrained` wrote")
    try:
        with open(folder / CONFIG, "rb") as file:
            plain = json.loads(file.read(LARGEST_CONFIG))
        content = (folder / WEIGHTS).read_bytes()
        if plain["library_name"] != library:
            raise UserError(f"{folder} is a model of {one_line(plain['library_name'])[:40]}, expected one of {library}")
        written = plain.pop("format_version")
        if written != version:
            raise UserError(f"{folder} has format {one_line(written)[:40]}, expected {version}; write it again")
        if plain.pop("weights_sha256") != hashlib.sha256(content).hexdigest():
            raise UserError(f"{folder / WEIGHTS} is damaged, or not the file of {CONFIG}; get both again")
        tensors = load(content)
        weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(IN_METADATA)}
        for name in tensors.keys() - weights.keys():
            *parents, last = name.removeprefix(IN_METADATA).split("/")
            place = plain
            for parent in parents:
                place = place[parent]
            place[last] = tensors[name]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror or error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{folder} is not a folder of {library} ({type(error).__name__}: {reason(error)})") from error
    return weights, plain


def push_folder(folder: Path, hub_id: str, *, private: bool, token: str | None, **options) -> str:
    """Upload a folder to a hub repository, created where there is none; returns its URL.

    The options are those of `HfApi.upload_folder`. Raises `UserError` where the upload fails.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        url = api.create_repo(hub_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, **options)
    except Exception as error:  # the hub's client raises errors without a common base class
        advice = "log in with `hf auth login`, or pass a token that may write"
        raise UserError(f"{hub_id} could not be uploaded: {reason(error)}; {advice}") from error
    return str(url)


def _without_tensors(tree: dict, path: str) -> tuple[dict, dict]:
    """A nested dict without its tensors, and these by their path."""
    plain, tensors = {}, {}
    for name, value in tree.items():
        if isinstance(value, torch.Tensor):
            tensors[path + name] = value
        elif isinstance(value, dict):
            plain[name], inner = _without_tensors(value, f"{path}{name}/")
            tensors |= inner
        else:
            plain[name] = value
    return plain, tensors
