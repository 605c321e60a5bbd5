"""The flags of `route.py`, and which of them fit together."""

import argparse
import os

from support.data.cells import READ
from support.system.command_line import (
    OneLineParser,
    comma_separated,
    real_number,
    some_path,
    some_text,
    whole_number,
)
from support.system.errors import valid_unicode

CHECKPOINT = "./outputs/best_model.pt"
PRICE_FLAGS = {"tokens_per_query", "cost_weight", "budget"}
GUARD = {"fallback", "confidence"}
FLAGS_OF_TASK = {
    "queries": {"top_k", "models", "output", "prices", *PRICE_FLAGS, *GUARD},
    "input": {"top_k", "models", "output", "strict", "query_column", "read", "prices", *PRICE_FLAGS, *GUARD},
    "curve": {"models", "output", "prices", "tokens_per_query", "query_column"},
    "add_model": {"battles", "profile", "save", "query_column"},
    "export": set(),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises `UserError` where they do not fit together."""
    parser = _parser()
    args = parser.parse_args(argv)

    given = {name for name, value in vars(args).items() if not (value is None or value is False or value == [])}
    tasks = [name for name in FLAGS_OF_TASK if name in given]
    if len(tasks) != 1:
        found = " and ".join(map(_shown, tasks)) or "none"
        parser.error(f"expected one of {', '.join(map(_shown, FLAGS_OF_TASK))}, got {found}")
    (task,) = tasks
    besides = given.intersection(set().union(*FLAGS_OF_TASK.values()) - FLAGS_OF_TASK[task])
    if besides:
        parser.error(f"{', '.join(map(_shown, sorted(besides)))}: no effect with {_shown(task)}")
    if task == "add_model" and ((args.battles is None) == (args.profile is None) or args.save is None):
        parser.error("--add_model needs --save, and one of --battles and --profile")
    if args.prices is None and given.intersection(PRICE_FLAGS):
        parser.error("--cost_weight, --budget and --tokens_per_query need --prices")
    if args.cost_weight is not None and args.budget is not None:
        parser.error("--cost_weight and --budget exclude each other")
    if args.confidence is not None and args.fallback is None:
        parser.error("--confidence needs --fallback")
    if args.embeddings is not None and args.model_path is not None:
        parser.error("--embeddings and --model_path exclude each other")
    inside = [os.path.join(args.checkpoint, name) for name in ("best_model.pt", "config.json", "model.safetensors")]
    inputs = [
        args.checkpoint,
        *inside,
        args.embeddings,
        args.input,
        args.prices,
        args.curve,
        args.battles,
        args.profile,
    ]
    for flag, output in (("--output", args.output), ("--save", args.save)):
        if output is not None and os.path.realpath(output) in [os.path.realpath(path) for path in inputs if path]:
            parser.error(f"{flag} {output} would replace an input; expected another file")
        if output is not None and not os.path.isdir(os.path.dirname(os.path.realpath(output))):
            parser.error(f"{flag} {output}: its folder does not exist; expected an existing folder")
    return args


def _parser() -> OneLineParser:
    parser = OneLineParser("Rank the models for queries with a trained router, or add a model without retraining.")
    positive, not_negative = real_number("above 0", lambda x: x > 0), real_number("of at least 0", lambda x: x >= 0)
    weight, count = real_number("from 0 to 1e15", lambda x: 0 <= x <= 1e15), whole_number(1)
    file, switch = {"metavar": "FILE", "type": some_path}, {"action": "store_true"}

    add = parser.add_argument
    add("queries", nargs="*", type=valid_unicode, help="texts to rank the models for")
    trained = "best_model.pt of a run of train.py, or a folder of --export, or a hub id"
    add("--checkpoint", type=some_path, default=CHECKPOINT, help=trained)
    add("--top_k", metavar="K", type=count, help="only the K best models")
    add("--models", metavar="A,B,...", type=comma_separated, help="rank only these")

    add = parser.add_argument_group("batches").add_argument
    queries = "queries: a text per line, JSON lines, or a table with a column such as `prompt`; - is standard input"
    add("--input", **file, help=queries)
    add("--query_column", metavar="NAME", help="the column of the query; default: a usual name, such as prompt")
    turns = "of chat messages, the user's turn or turns that the router reads; default: first, as in training"
    add("--read", choices=READ, help=turns)
    add("--output", **file, help="JSON lines of query, ranking, scores, or of the curve; default: standard output")
    add("--strict", **switch, help="stop at the first malformed line")

    add = parser.add_argument_group("prices").add_argument
    add("--prices", **file, help="table of `model` and `price_per_query` or `price_per_million_tokens`")
    tokens = "of query and answer, for prices per million tokens"
    add("--tokens_per_query", metavar="N", type=positive, help=tokens)
    add("--cost_weight", metavar="W", type=weight, help="rank by score - W * price per query")
    add("--budget", metavar="PRICE", type=not_negative, help="mean price per query, met by the best W")
    curve = "quality by cost on battles or a score table, by --prices or the table's costs, without queries of training"
    add("--curve", metavar="DATA", type=some_path, help=curve)

    add = parser.add_argument_group("a guard").add_argument
    fixed = "rank others above this model only where they beat it with --confidence; best: the best single one"
    add("--fallback", metavar="MODEL", type=some_text, help=fixed)
    sure = (
        "probability from 0.5 to 1 that must be exceeded; at 1 none does; default with the best single model: the one "
    )
    sure += "chosen in training"
    add("--confidence", metavar="P", type=real_number("from 0.5 to 1", lambda x: 0.5 <= x <= 1), help=sure)

    add = parser.add_argument_group("a new model").add_argument
    added = "write a checkpoint with this model, without retraining"
    add("--add_model", metavar="NAME", type=some_text, help=added)
    battles = "its battles against known models, a few dozen are enough"
    add("--battles", metavar="DATA", type=some_path, help=battles)
    add("--profile", **file, help="or its benchmark scores, as in --capability_file of training")
    add("--save", **file, help="the new checkpoint")

    add = parser.add_argument_group("sharing").add_argument
    add("--export", metavar="FOLDER", type=some_path, help="write router and model card as a new folder for the hub")

    add = parser.add_argument_group("encoder").add_argument
    add("--model_path", help="folder or hub id; default: that of training")
    add("--embeddings", **file, help="precomputed ones of the queries, for a router that was trained with --embeddings")
    add("--device", default="auto", help="cpu, cuda, cuda:N or mps; auto: cuda, else mps, else cpu")
    add("--encode_tokens", metavar="N", type=count, help="tokens per batch of queries")
    add("--cache_dir", metavar="DIR", help="folder of cached embeddings; default: the user's cache folder")
    add("--no_cache", **switch, help="neither read nor write cached embeddings")
    return parser


def _shown(name: str) -> str:
    return name if name == "queries" else f"--{name}"
