"""What a run reads: battles, their split, and benchmark scores, checked before anything slow."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_loader import Split, battles_in_memory, data_files, load_battles, split_battles
from support.data.battles import Battles
from support.data.benchmarks import Profiles, read_profiles
from support.data.demo import demo_folder
from support.data.rows import read_and_dropped
from support.encoding.encoder import QueryEncoder
from support.encoding.huggingface import find_encoder
from support.encoding.precomputed import PrecomputedEmbeddings
from support.system.errors import UserError
from support.system.files import cache_folder, content_hash
from support.system.hub import is_hub_id

Encoder = QueryEncoder | PrecomputedEmbeddings
DOWNLOAD = (
    "; for Chatbot Arena 33K accept its terms at https://huggingface.co/datasets/lmsys/chatbot_arena_conversations, "
    "log in with `hf auth login`, and run `hf download lmsys/chatbot_arena_conversations --repo-type dataset "
    "--local-dir ../data/chatbot_arena`; or use --demo, which needs neither data nor weights"
)


@dataclass(frozen=True)
class Data:
    """What a run trains on."""

    split: Split
    full_split: Split  # with the model of --hold_out_model, which `split` leaves out; else the same
    profiles: Profiles | None  # of --capability_file
    counts: dict  # the `data` of the history


def find_inputs(args: argparse.Namespace, battles: Battles | None) -> Path | None:
    """Fill in the demo's paths that `args` leaves open, and check that data and encoder exist, before anything slow.

    `battles` are those in memory, if the data are not files.

    Returns the demo's folder if the battles are the demo's. Raises `UserError` where something is missing.
    """
    if battles is not None:
        _refuse_flags_of_files(args)
        args.data_path = "memory"
    is_demo, needs_encoder, folder = args.data_path is None, args.embeddings is None, None
    if not is_demo and battles is None:
        data_files(args.data_path, DOWNLOAD)
    if is_demo or (needs_encoder and args.model_path is None):
        folder = demo_folder(args.demo_dir)
        args.data_path = str(folder / "battles.parquet") if is_demo else args.data_path
        args.model_path = str(folder / "encoder") if args.model_path is None else args.model_path
    if not needs_encoder:
        args.model_path = None
    elif not is_hub_id(args.model_path):
        find_encoder(args.model_path)  # a download can wait until the data are read
    return folder if is_demo else None


def make_encoder(args: argparse.Namespace, prompt: str | None, device: torch.device, queries: list[str]) -> Encoder:
    """The encoder of the flags, which then have its pooling, layers and prefix; or the file of --embeddings.

    Raises `UserError` where there is no such encoder, or the file lacks one of the queries.
    """
    if args.embeddings is not None:
        args.pooling, args.query_prefix = None, ""
        embeddings = PrecomputedEmbeddings.read(args.embeddings, device)
        embeddings.rows(queries)  # raises now, before an earlier run in the folder is replaced
        return embeddings
    encoder = QueryEncoder(
        args.model_path,
        device,
        dtype=args.dtype,
        pooling=args.pooling,
        layers=args.layers,
        cache_layers=args.cache_layers,
        max_length=args.max_length,
        prefix=args.query_prefix,
        prompt=prompt,
        tokens_per_batch=args.encode_tokens,
        cache_dir=cache_folder(args.cache_dir, args.no_cache),
    )
    args.pooling, args.layers, args.query_prefix = encoder.pooling, encoder.layers, encoder.prefix
    return encoder


def _refuse_flags_of_files(args: argparse.Namespace) -> None:
    of_files = ("score_columns", "query_column", "split_column", "group_column")
    if given := [name for name in of_files if getattr(args, name) is not None]:
        raise UserError(f"{', '.join(given)}: columns of files; leave them out with battles in memory")


def load_data(args: argparse.Namespace, battles: Battles | None) -> Data:
    """Read and split the battles, read the benchmarks, and set `args.capability_dim` and `args.eval_every`.

    `battles` are those in memory, if the data are not files.
    Raises `UserError` where a file cannot be read or does not fit the flags.
    """
    columns = {"query_column": args.query_column, "split_column": args.split_column}
    columns |= {"group_column": args.group_column}
    columns["groups_apart"] = args.split_by == "task" or args.group_column is not None
    if battles is None:
        battles, counts = load_battles(args.data_path, args.score_columns, args.limit, args.split_seed, **columns)
    else:
        battles, counts = battles_in_memory(battles, args.limit, args.split_seed)
    is_pointwise = args.loss_type == "pointwise"
    if is_pointwise and (battles.table is None or len(battles.outcome)):
        raise UserError(f"--loss_type pointwise learns from the scores of a score table; {args.data_path} has battles")
    options = {"by": args.split_by, "ties": args.ties, "equal_rows": is_pointwise}
    options |= {"test_groups": args.test_groups, "shuffle": args.shuffle_outcomes}
    try:
        split, split_counts = split_battles(battles, args.split_seed, **options, hold_out=args.hold_out_model)
    except UserError as error:
        raise UserError(f"{error}; {read_and_dropped(counts)}") from error
    full_split = split if args.hold_out_model is None else split_battles(battles, args.split_seed, **options)[0]
    counts |= split_counts
    train_queries = counts["split"]["train"]["queries"]
    if args.num_clusters > train_queries:
        raise UserError(
            f"--num_clusters {args.num_clusters} is more than the {train_queries} distinct training queries; "
            f"choose at most {train_queries}, or 0 for no cluster features"
        )
    profiles = None
    if args.capability_file is not None:
        profiles = read_profiles(args.capability_file)
        counts["capability_file_hash"] = content_hash([profiles.path])
        profiles.of(full_split.train.model_names, args.allow_missing_profiles)  # raises where a row is missing
    if args.capability_dim is None:
        args.capability_dim = args.num_clusters if profiles is None else len(profiles.columns)
    if args.eval_every is None:
        args.eval_every = validation_interval(full_split.train, args.batch_size)
    counts["prices_hash"] = None if args.prices is None else content_hash([Path(args.prices)])
    counts["label_range"] = label_range(split.train.table.scores) if is_pointwise else None
    return Data(split, full_split, profiles, counts)


def validation_interval(train: Battles, batch_size: int) -> int:
    """Steps between validations: 100, or a tenth of an epoch's, in hundreds, so that their cost grows with the data."""
    steps = sum(map(len, train.query_columns())) / batch_size
    return max(100, round(steps / 1000) * 100)


def label_range(scores: np.ndarray) -> list[float]:
    """The scores that are 0 and 1 as labels: those, or the least and the largest where some are outside of them."""
    low, high = float(np.nanmin(scores)), float(np.nanmax(scores))
    return [0.0, 1.0] if low >= 0 and high <= 1 else [low, high]
