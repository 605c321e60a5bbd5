"""What a run trains on: battles, their split, capability profiles; read and checked before anything slow."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from data_loader import Split, data_files, load_battles, split_battles
from support import printing, runs
from support.files import UserError, content_hash
from support.profiles import Profiles, read_profiles


@dataclass(frozen=True)
class Inputs:
    """The data of a run."""

    split: Split
    whole: Split  # with the model that `split` holds out, or `split` itself
    profiles: Profiles | None  # of --capability_file
    counts: dict  # the `data` of a history


def find_inputs(args: argparse.Namespace) -> Path | None:
    """Fill in the demo's paths where `args` leaves them open, and see that data and encoder are there.

    Returns the demo's folder where the truth behind the battles is known. Raises `UserError` where something lacks.
    """
    if args.data_path is not None:
        data_files(args.data_path)  # missing data is told before anything slow
    demo, truth_known = None, args.data_path is None
    if None in (args.data_path, args.model_path):
        from support.demo import demo_folder

        demo = demo_folder(args.demo_dir)
        args.data_path = str(demo / "battles.parquet") if args.data_path is None else args.data_path
        args.model_path = str(demo / "encoder") if args.model_path is None else args.model_path

    from support.encoder import find_encoder, is_hub_id

    if not is_hub_id(args.model_path):
        find_encoder(args.model_path)  # as is a missing model; a download can wait until the data are read
    return demo if truth_known else None


def read_inputs(args: argparse.Namespace, timing: dict) -> Inputs:
    """Read and split the battles, read the profiles, print what was found, and settle `args.capability_dim`.

    Raises `UserError` where a file cannot be read or does not fit the flags.
    """
    with runs.timed(timing, "load"):
        battles, counts = load_battles(args.data_path, args.score_columns, args.limit, args.split_seed)
        how = args.split_seed, args.split_by, args.ties, args.pairs_per_query
        split, split_counts = split_battles(battles, *how, args.hold_out_model)
        whole = split if args.hold_out_model is None else split_battles(battles, *how)[0]
    counts |= split_counts
    printing.print_data(counts, args.split_by)
    if args.hold_out_model is not None:
        from support.cold_start import held_out_battles

        held_out_battles(args.hold_out_model, split, whole)  # that there are any is known before encoding
    train_queries = counts["split"]["train"]["queries"]
    if args.num_clusters > train_queries:
        raise UserError(
            f"--num_clusters {args.num_clusters} is more than the {train_queries} distinct training queries; "
            f"choose at most {train_queries}, or 0 for no cluster features"
        )

    profiles = None
    if args.capability_file is not None:
        profiles = read_profiles(args.capability_file)
        profiles.of(whole.train.model_names, args.allow_missing_profiles)  # a missing row is told before encoding
        counts["capability_file_hash"] = content_hash([profiles.path])
        printing.print_profiles(profiles, whole.train.model_names)
    if args.capability_dim is None:
        args.capability_dim = args.num_clusters if profiles is None else len(profiles.columns)
    return Inputs(split, whole, profiles, counts)
