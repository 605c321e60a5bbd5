"""The encoder of a trained router: what a checkpoint says of it is checked, and it is opened again."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from support.encoding.encoder import QueryEncoder
from support.encoding.sentence_transformers import POOLINGS
from support.system.errors import UserError, valid_unicode
from support.system.hub import is_hub_id
from support.system.safe_torch import is_plain


def open_again(
    metadata: dict,
    args: dict,
    finetuned: dict | None,
    model_path: str | Path | None,
    device: str | torch.device,
    **options,
) -> QueryEncoder:
    """The encoder that a router was trained with, at its path in training or at `model_path`.

    Args:
        metadata: of the encoder, as it was in training.
        args: the flags of training.
        finetuned: as of `QueryEncoder`, as are the options.

    Raises `UserError` where there is no encoder, or another one.
    """
    if metadata.get("precomputed"):
        advice = "give those of these queries by --embeddings, in Python by open_embeddings"
        raise UserError(f"the router was trained on precomputed embeddings; {advice}")
    path = metadata["path"] if model_path is None else model_path
    if model_path is None and not (os.path.isdir(os.path.expanduser(path)) or is_hub_id(path)):
        problem = f"the router's encoder {path!r} was not found here"
        raise UserError(f"{problem}; name its folder or hub id by --model_path, in Python by open_encoder")
    encoder = QueryEncoder(
        path,
        torch.device(device),
        dtype=metadata["dtype"],
        pooling=args["pooling"],
        layers=args.get("layers"),  # without it in checkpoints of earlier versions
        max_length=args["max_length"],
        prefix=args.get("query_prefix", ""),  # without one in checkpoints of earlier versions
        include_prompt=metadata.get("include_prompt", True),
        download=model_path is not None,  # a file must not make us download anything
        finetuned=finetuned,
        **options,
    )
    opened, expected = encoder.usage["fingerprint"], metadata["fingerprint"]
    if opened != expected:
        raise UserError(
            f"the encoder at {encoder.path} is not the one that the router was trained with: its fingerprint is "
            f"{opened[:12]}, expected {expected[:12]}; name the right folder with --model_path"
        )
    return encoder


def checks(metadata: dict, args: dict, finetuned: dict | None) -> Iterator[tuple[str, bool]]:
    """Types and ranges of what `open_again` takes from a checkpoint; raises anything where a part is missing."""
    yield "the encoder", all(type(metadata.get(name, False)) is bool for name in ("precomputed", "from_hub"))
    texts = metadata["path"], metadata["fingerprint"], metadata.get("pooling", "")
    yield "the encoder", all(isinstance(text, str) and text == valid_unicode(text) for text in texts)
    yield "the encoder's dtype", metadata["dtype"] in ("float32", "bfloat16", "float16")
    yield "the encoder's include_prompt", type(metadata.get("include_prompt", True)) is bool
    yield "--pooling", args["pooling"] in POOLINGS or metadata.get("precomputed", False)
    layers = args.get("layers")
    yield "--layers", layers is None or (type(layers) is list and layers == sorted(set(layers)) != [])
    yield "--layers", all(type(layer) is int and layer >= 1 for layer in layers or ())
    prefix = args.get("query_prefix", "")
    yield "--query_prefix", isinstance(prefix, str) and prefix == valid_unicode(prefix)
    yield "--max_length", type(args["max_length"]) is int and 1 <= args["max_length"] <= 2**20
    yield "the finetuned encoder", (finetuned is not None) == args["finetune_encoder"]
    if finetuned is not None:
        sizes = finetuned["layers"], finetuned["lora_rank"]
        yield "the finetuned encoder", sizes == (args["finetune_layers"], args["lora_rank"])
        yield "the finetuned encoder", all(size is None or 1 <= size <= 8192 for size in sizes)
        for name, weight in finetuned["weights"].items():
            yield "a weight of the encoder", type(name) is str and is_plain(weight)
            yield "a weight of the encoder", weight.dtype == torch.float32 and bool(weight.isfinite().all())
