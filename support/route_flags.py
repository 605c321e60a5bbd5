"""The flags of `route.py`, and which of them go together."""

import argparse
import os

from support.command_line import (
    OneLineParser,
    comma_separated,
    real_number,
    some_path,
    some_text,
    whole_number,
)
from support.files import valid_unicode

CHECKPOINT = "./outputs/best_model.pt"
MONEY = {"tokens_per_query", "cost_weight", "budget"}
FLAGS_OF_TASK = {
    "queries": {"top_k", "models", "output", "prices", *MONEY},
    "input": {"top_k", "models", "output", "strict", "prices", *MONEY},
    "curve": {"models", "output", "prices", "tokens_per_query"},
    "add_model": {"battles", "profile", "save"},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises `UserError` where they do not go together."""
    parser = OneLineParser("Rank the models for queries with a trained router, or bring in a new model.")
    positive, not_negative = real_number("above 0", lambda x: x > 0), real_number("of at least 0", lambda x: x >= 0)
    weight = real_number("from 0 to 1e15", lambda x: 0 <= x <= 1e15)
    parser.add_argument("queries", nargs="*", type=valid_unicode, help="rank the models for these")
    parser.add_argument("--checkpoint", type=some_path, default=CHECKPOINT, help="best_model.pt of a run of train.py")
    parser.add_argument("--top_k", metavar="K", type=whole_number(1), help="only the K best models")
    parser.add_argument("--models", metavar="A,B,...", type=comma_separated, help="rank only these")

    batch = parser.add_argument_group("batches")
    batch.add_argument(
        "--input",
        metavar="FILE",
        type=some_path,
        help="queries: a text per line, JSON lines, parquet or CSV with `query` or `prompt`; - is standard input",
    )
    batch.add_argument(
        "--output",
        metavar="FILE",
        type=some_path,
        help="JSON lines of query, ranking, scores, or of the curve; without it, standard output",
    )
    batch.add_argument("--strict", action="store_true", help="stop at the first malformed line")

    money = parser.add_argument_group("prices")
    money.add_argument(
        "--prices",
        metavar="FILE",
        type=some_path,
        help="table of `model` and `price_per_query` or `price_per_million_tokens`",
    )
    money.add_argument(
        "--tokens_per_query", metavar="N", type=positive, help="of query and answer, for prices per million tokens"
    )
    money.add_argument("--cost_weight", metavar="W", type=weight, help="rank by score - W * price per query")
    money.add_argument("--budget", metavar="PRICE", type=not_negative, help="mean price per query, met by the best W")
    money.add_argument(
        "--curve",
        metavar="DATA",
        type=some_path,
        help="quality by cost, on battles or a score table, without the queries that the router was trained on",
    )

    new = parser.add_argument_group("a new model")
    new.add_argument(
        "--add_model", metavar="NAME", type=some_text, help="write a checkpoint that knows it too; no retraining"
    )
    new.add_argument("--battles", metavar="DATA", type=some_path, help="its battles against known models, a few dozen")
    new.add_argument(
        "--profile",
        metavar="FILE",
        type=some_path,
        help="or its row of benchmarks, as in --capability_file of training",
    )
    new.add_argument("--save", metavar="FILE", type=some_path, help="the new checkpoint")

    encoder = parser.add_argument_group("encoder")
    encoder.add_argument("--model_path", help="where it is now; without it, where it was in training")
    encoder.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or mps; auto: cuda, else mps, else cpu")
    encoder.add_argument("--encode_tokens", metavar="N", type=whole_number(1), help="tokens per batch of queries")
    encoder.add_argument("--cache_dir", metavar="DIR", help="where embeddings are kept, else the user's cache folder")
    encoder.add_argument("--no_cache", action="store_true", help="neither read nor keep embeddings")
    args = parser.parse_args(argv)

    given = {name for name, value in vars(args).items() if not (value is None or value is False or value == [])}
    tasks = [name for name in FLAGS_OF_TASK if name in given]
    if len(tasks) != 1:
        found = " and ".join(map(_shown, tasks)) or "none"
        parser.error(f"expected one of {', '.join(map(_shown, FLAGS_OF_TASK))}, got {found}")
    (task,) = tasks
    besides = given.intersection(set().union(*FLAGS_OF_TASK.values()) - FLAGS_OF_TASK[task])
    if besides:
        parser.error(f"{', '.join(map(_shown, sorted(besides)))}: without meaning beside {_shown(task)}")
    if task == "add_model" and ((args.battles is None) == (args.profile is None) or args.save is None):
        parser.error("--add_model needs --save, and one of --battles and --profile")
    if args.prices is None and (task == "curve" or given.intersection(MONEY)):
        parser.error("--cost_weight, --budget, --tokens_per_query and --curve need --prices")
    if args.cost_weight is not None and args.budget is not None:
        parser.error("--cost_weight and --budget exclude each other")
    inputs = [args.checkpoint, args.input, args.prices, args.curve, args.battles, args.profile]
    for flag, output in (("--output", args.output), ("--save", args.save)):
        if output is not None and os.path.realpath(output) in [os.path.realpath(path) for path in inputs if path]:
            parser.error(f"{flag} {output} would replace what is read; expected another file")
        if output is not None and not os.path.isdir(os.path.dirname(os.path.realpath(output))):
            parser.error(f"{flag} {output}: there is no such folder; expected a file in one that is there")
    return args


def _shown(name: str) -> str:
    return name if name == "queries" else f"--{name}"
