"""Encoders as Hugging Face folders: found, fingerprinted and loaded whole, or refused in one line."""

import os
import re
import sys
from pathlib import Path

import torch

from support.files import UserError, content_hash


def is_hub_id(model_path: str) -> bool:
    """Whether `model_path` is no folder here and has the form of a hub id, `owner/name`."""
    return not os.path.exists(os.path.expanduser(model_path)) and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", model_path))


def find_encoder(model_path: str) -> Path:
    """The folder of an encoder, given as a folder or as a hub id, which is downloaded on first use.

    Raises `UserError` where there is no such folder, or no model in it.
    """
    folder = _download(model_path) if is_hub_id(model_path) else Path(os.path.expanduser(model_path))
    if not model_path or not os.path.isdir(folder):
        raise UserError(
            f"no model folder at {model_path}; get Qwen2-0.5B with `hf download Qwen/Qwen2-0.5B --local-dir "
            "../model/Qwen2-0.5B`, or name another folder or hub id (owner/name) with --model_path, or use --demo"
        )
    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json")
    if not any([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        missing.append("weights (*.safetensors)")
    if not any([*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("*.model")]):
        missing.append("a tokenizer")
    if missing:
        raise UserError(
            f"{model_path} is not a Hugging Face model: it lacks {', '.join(missing)}; expected what "
            "`hf download OWNER/NAME --local-dir FOLDER` or `save_pretrained(FOLDER)` leaves there"
        )
    return folder


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    elsewhere = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf"]  # formats we do not read
    try:
        return Path(snapshot_download(hub_id, ignore_patterns=elsewhere))
    except Exception as error:  # the hub's client has no common base for what it raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{hub_id} is no folder here and could not be downloaded as a hub id: {reason}") from error


def encoder_fingerprint(folder: Path) -> str:
    """SHA-256 (hex) over an encoder's weights, configuration and tokenizer, wherever its folder lies."""
    kinds = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")
    return content_hash(sorted(file for kind in kinds for file in folder.glob(kind)))


def load_encoder(folder: Path, device: torch.device, dtype: torch.dtype):
    """An encoder's tokenizer and network, frozen, on `device`. Raises `UserError` where they do not load whole."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        local = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        network, info = transformers.AutoModel.from_pretrained(folder, dtype=dtype, output_loading_info=True, **local)
    except Exception as error:  # a broken folder raises whatever its parsers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder} could not be loaded as a Hugging Face encoder: {reason}") from error
    # A pooler's output is never used, so a checkpoint may lack it; anything else would stay random.
    lacking = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if lacking or info["mismatched_keys"]:
        raise UserError(
            f"the weights in {folder} do not fill the encoder of its config.json: {len(lacking)} missing "
            f"({', '.join(lacking[:3]) or 'none'}), {len(info['mismatched_keys'])} of another shape"
        )
    if network.config.is_encoder_decoder:
        network = network.get_encoder()
    network.config.use_cache = False  # no text is generated, so keys and values need not be kept
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no pad, eos or unk token; expected at least one of them")
    return tokenizer, network.to(device).eval().requires_grad_(False)


def longest_input(tokenizer, network) -> int:
    """The most tokens that an encoder takes; a very large number where it states no limit."""
    positions = getattr(network.config, "max_position_embeddings", None) or 0
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # RoBERTa and its kin number positions from there
    stated = [limit for limit in (tokenizer.model_max_length, positions) if isinstance(limit, int) and limit > 0]
    return min(stated, default=sys.maxsize)
