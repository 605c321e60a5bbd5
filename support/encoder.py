"""Encoders as Hugging Face folders: found, fingerprinted, loaded whole or refused, and fed with batches of tokens."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import torch

from support.files import UserError, content_hash, is_out_of_memory, reason


def is_hub_id(model_path: str) -> bool:
    """Whether `model_path` is no folder here and has the form of a hub id, `owner/name`."""
    return not os.path.exists(os.path.expanduser(model_path)) and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", model_path))


def find_encoder(model_path: str, download: bool = True) -> Path:
    """The folder of an encoder, given as a folder or as a hub id, which with `download` is fetched on first use.

    Raises `UserError` where there is no such folder, or no model in it.
    """
    folder = _from_hub(model_path, download) if is_hub_id(model_path) else Path(os.path.expanduser(model_path))
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


def _from_hub(hub_id: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download

    elsewhere = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf"]  # formats we do not read
    try:
        return Path(snapshot_download(hub_id, ignore_patterns=elsewhere, local_files_only=not download))
    except Exception as error:  # the hub's client has no common base for what it raises
        if not download:
            told = f"the encoder {hub_id} has not been downloaded here; --model_path {hub_id} does it"
            raise UserError(told) from error
        raise UserError(
            f"{hub_id} is no folder here and could not be downloaded as a hub id: {reason(error)}"
        ) from error


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
        raise UserError(f"{folder} could not be loaded as a Hugging Face encoder: {reason(error)}") from error
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


def pick_dtype(name: str, device: torch.device) -> str:
    """What `--dtype` names; "auto" is bfloat16 where the device multiplies it faster than float32."""
    if name != "auto":
        return name
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return "bfloat16" if has.get("amx_bf16") or has.get("avx512_bf16") else "float32"
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"


def vocabulary_size(network) -> int:
    """How many tokens an encoder knows; a very large number where it states none."""
    try:
        return network.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):  # an encoder without a table of tokens, of characters say
        return sys.maxsize


def tokenize(queries: list[str], tokenizer, max_length: int) -> list[torch.Tensor]:
    """Token ids of each query, cut to `max_length` tokens, without padding: Q int64 tensors (T,), T >= 1.

    Raises `UserError` where the tokenizer cannot take them, or `max_length` leaves no room for a word.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:  # the tokenizer would then not cut at all
        raise UserError(f"--max_length {max_length} leaves no room beside {special} special tokens; give more")
    try:
        ids = tokenizer(queries, truncation=True, max_length=max_length)["input_ids"]
        # A text may leave no token at all (control characters, say); the pad token stands for it.
        return [torch.tensor(query_ids or [tokenizer.pad_token_id]) for query_ids in ids]
    except Exception as error:  # whatever a damaged one makes of a text
        if is_out_of_memory(error):
            raise
        raise UserError(f"the tokenizer cannot take the queries: {reason(error)}; get its files again") from error


def plan_batches(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Batches of indices into `lengths` (Q,), longest first, each of at most `tokens_per_batch` tokens once padded.

    Queries of like length share a batch, so that little of it is padding; the longest first shows at once
    whether they fit. A query longer than the budget has a batch of its own.
    """
    order = np.argsort(-lengths, kind="stable")  # (Q,)
    batches, start = [], 0
    while start < len(order):
        rows = max(1, tokens_per_batch // int(lengths[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def hidden_states(network, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, T, H) of token ids (B, T). Raises `UserError` where the encoder cannot take them."""
    try:
        return network(input_ids=ids, attention_mask=mask).last_hidden_state
    except Exception as error:  # whatever a model for images makes of it
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{type(network).__name__} cannot encode {ids.shape[0]} texts of {ids.shape[1]} tokens "
            f"({type(error).__name__}: {reason(error)}); expected a text encoder"
        ) from error
