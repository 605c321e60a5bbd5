"""The flags of `train.py`, and which of them exclude each other."""

import argparse
import csv
import io

from support.system.command_line import (
    OneLineParser,
    comma_separated,
    layer_numbers,
    real_number,
    some_path,
    some_text,
    unicode_text,
    whole_number,
)
from support.system.errors import UserError

# Flags that do not define an experiment: places, seeds, speed. Data and encoder count by content.
NO_EXPERIMENT = {
    *("output_dir", "data_path", "model_path", "demo", "demo_dir", "cache_dir", "no_cache", "seed", "split_seed"),
    *("device", "dtype", "encode_tokens", "baselines", "deterministic", "accumulate", "gradient_checkpointing"),
    *("resume", "overwrite", "prices", "tokens_per_query", "embeddings"),
    *("threads", "cache_layers"),
    *("checkpoint_minutes", "pairs_per_query"),  # of histories of earlier versions
}

# Defaults of --recipe original; it also leaves the dot product unscaled and the query tower's last layer random.
ORIGINAL_RECIPE = {"dropout": 0.1, "id_dropout": 0.0, "ema_decay": 0.0, "eval_every": 0}

# Defaults of the flags that need --finetune_encoder.
FINETUNING = {
    "tower_epochs": 2,
    "encoder_lr": 5e-5,
    "warmup": 0.1,
    "max_grad_norm": 1.0,
    "batch_tokens": 2048,
    "accumulate": 1,
}


def with_defaults(args: dict) -> dict:
    """The flags of an earlier run, with what every flag that did not exist then would have been."""
    return {name: value for name, value in vars(parse_args([])).items() if name not in NO_EXPERIMENT} | args


def parse_flags(**flags) -> argparse.Namespace:
    """The flags given by name, `parse_flags(epochs=3, score_columns=["a", "b"])`, and the defaults of the others.

    None and False leave a flag out. Raises `UserError` as `parse_args` does.
    """
    argv, known = [], vars(parse_args([]))
    if unknown := [name for name in flags if name not in known]:
        raise UserError(f"{', '.join(unknown)}: no flag of that name; expected some of {', '.join(known)}")
    for name, value in flags.items():
        value = value.tolist() if hasattr(value, "tolist") else value  # of numpy
        if value is not None and value is not False:
            argv.append(f"--{name}" if value is True else f"--{name}={as_word(value)}")
    return parse_args(argv)


def as_word(value: object) -> str:
    """The value of a flag as a word of the command line."""
    if not isinstance(value, (list, tuple)):
        return str(value)
    text = io.StringIO()  # as CSV has it, since a name may hold a comma
    csv.writer(text, lineterminator="").writerow(value)
    return text.getvalue()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; with --demo, paths that are not given are None. Raises `UserError` where they exclude each other."""
    parser = _parser()
    args = parser.parse_args(argv)
    # Parsed again with other defaults: a flag that is given explicitly wins.
    if args.demo:
        parser.set_defaults(data_path=None, model_path=None)
    if args.capability_file is not None or args.capability_init != "random":
        parser.set_defaults(capability_dim=None)
    if args.recipe == "original":
        parser.set_defaults(**ORIGINAL_RECIPE)
    args = parser.parse_args(argv)
    if args.split_seed is None:
        args.split_seed = args.seed
    if args.finetune_encoder:
        for name, default in FINETUNING.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
    _check(parser, args)
    return args


def router_options(args: argparse.Namespace) -> dict:
    """The flags as arguments of `RouterConfig`, without the names of surface features."""
    same = ("embedding_dim", "num_clusters", "cluster_dim", "capability_dim", "dropout", "id_dropout")
    return {name: getattr(args, name) for name in (*same, "similarity_metric")} | {
        "use_capability": not args.no_capability,
        "use_model_id": not args.no_model_id,
        "scale_dot": args.recipe != "original",
        "zero_init": args.recipe != "original",
    }


def _check(parser: OneLineParser, args: argparse.Namespace) -> None:
    if args.finetune_encoder and args.dtype == "float16":
        parser.error("--dtype float16 does not train; give bfloat16 or float32 with --finetune_encoder")
    if not args.finetune_encoder:
        given = [name for name in ("finetune_layers", "lora_rank", *FINETUNING) if getattr(args, name) is not None]
        given += ["gradient_checkpointing"] * args.gradient_checkpointing
        if given:
            parser.error(f"--{given[0]} needs --finetune_encoder")
    if args.query_prefix is not None and args.query_prompt is not None:
        parser.error("--query_prefix and --query_prompt exclude each other")
    if args.layers is not None and (args.finetune_layers or 0) > max(args.layers):
        parser.error(f"--finetune_layers {args.finetune_layers}: of --layers only {max(args.layers)} are computed")
    if args.embeddings is not None:
        of_encoder = (
            "finetune_encoder",
            "layers",
            "cache_layers",
            "query_prefix",
            "query_prompt",
            "cache_dir",
            "no_cache",
        )
        given = [name for name in of_encoder if getattr(args, name) not in (None, False, "")]
        given += [name for name in ("model_path", "pooling") if getattr(args, name) != parser.get_default(name)]
        if given:
            parser.error(f"--embeddings and --{given[0]} exclude each other: there is no encoder")
    if args.cache_layers is not None and args.no_cache:
        parser.error("--cache_layers and --no_cache exclude each other")
    if args.split_by == "task" and args.split_column is not None:
        parser.error("--split_by task and --split_column exclude each other")
    if args.test_groups is not None and args.split_by != "task":
        parser.error("--test_groups needs --split_by task")
    if args.tokens_per_query is not None and args.prices is None:
        parser.error("--tokens_per_query needs --prices")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    profiled = args.capability_file is not None or args.capability_init == "win_rate"
    if args.no_model_id and args.no_capability:
        parser.error("--no_model_id and --no_capability together leave the model tower without input")
    if args.no_capability and (profiled or args.freeze_capabilities or args.hold_out_model is not None):
        parser.error("--no_capability leaves no capability vectors to initialize, freeze, or give to a new model")
    if args.capability_file is not None and args.capability_init == "win_rate":
        parser.error("--capability_file and --capability_init win_rate exclude each other")
    if profiled and args.capability_dim is not None:
        parser.error("--capability_dim is for random vectors; others have one value per cluster or benchmark")
    if args.capability_init == "win_rate" and not args.num_clusters:
        parser.error("--capability_init win_rate is per cluster; it needs --num_clusters of at least 1")
    if args.allow_missing_profiles and args.capability_file is None:
        parser.error("--allow_missing_profiles needs --capability_file")


def _parser() -> OneLineParser:
    parser = OneLineParser("Train RankRouter on battles; keep the checkpoint with the best validation AUC.")
    seed, dim, count = whole_number(0, 2**32 - 1), whole_number(1, 8192), whole_number(1)
    positive = real_number("above 0", lambda x: x > 0)
    not_negative = real_number("of at least 0", lambda x: x >= 0)
    share = real_number("from 0 to below 1", lambda x: 0 <= x < 1)
    switch = {"action": "store_true"}

    add = parser.add_argument_group("data").add_argument
    arena = "../data/chatbot_arena/data/train-00000-of-00001-cced8514c7ed782a.parquet"
    add("--data_path", default=arena, help="battles or score table: parquet, CSV or JSON; a file, a folder, or a glob")
    models = "the models' columns of a wide score table; default: its numeric columns that look like models"
    add("--score_columns", metavar="A,B,...", type=comma_separated, help=models)
    add("--query_column", metavar="NAME", help="the column of the query; default: a usual name, such as prompt")
    official = "the column of an official split into train, val (drawn from train where it lacks) and test"
    add("--split_column", metavar="NAME", help=official)
    add("--ties", choices=["drop", "half"], default="drop", help="in training: left out, or half a win for each model")
    split = "what is split 80/10/10; battle: battles or rows, whose queries may then be in training and in test; task: "
    split += "groups of queries, so that the tasks of the test are unseen"
    add("--split_by", choices=["query", "battle", "task"], default="query", help=split)
    group = "the column of a row's group, for --split_by task and for means over groups; default: a usual name, such "
    group += "as task or eval_name, or the file where several files have different columns"
    add("--group_column", metavar="NAME", help=group)
    tested = "test on these groups; default with --split_by task: drawn, until they have a tenth of the queries"
    add("--test_groups", metavar="A,B,...", type=comma_separated, help=tested)
    permuted = "a control: train on outcomes permuted among queries, within pairs of models or by rows of a table"
    add("--shuffle_outcomes", **switch, help=permuted)
    add("--limit", metavar="N", type=count, help="only N queries: a quick look")
    add("--demo", **switch, help="synthetic battles, tiny Qwen2; paths that are given are used")
    add("--demo_dir", metavar="DIR", help="folder of the demo; default: the user's cache folder")
    place = "folder of history and checkpoints; one run at a time; a finished run there is replaced"
    add("--output_dir", default="./outputs", help=place)

    add = parser.add_argument_group("encoder").add_argument
    add("--model_path", default="../model/Qwen2-0.5B", help="Hugging Face encoder: a folder or hub id")
    states = "how a query's token states are pooled; mean+last: both, concatenated; auto: as a sentence-transformers "
    states += "folder says, else mean"
    add("--pooling", choices=["auto", "mean", "cls", "last", "max", "mean+last"], default="auto", help=states)
    outputs = "pool the outputs of these layers, counted from 1, and concatenate them; default: the last; layers above "
    outputs += "the highest are not computed"
    add("--layers", metavar="N,N,...", type=layer_numbers, help=outputs)
    also = "cache mean and last token of these layers in the same pass, too, for later runs with other --layers"
    add("--cache_layers", metavar="N,N,...", type=layer_numbers, help=also)
    before = "put before each query; default: the default prompt of a sentence-transformers folder"
    add("--query_prefix", metavar="TEXT", type=unicode_text, help=before)
    add("--query_prompt", metavar="NAME", type=some_text, help="the folder's prompt of this name instead")
    add("--max_length", type=whole_number(1, 2**20), default=512, help="tokens read of a query")
    add("--device", default="auto", help="cpu, cuda, cuda:N or mps; auto: cuda, else mps, else cpu")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 where that is faster, else float32")
    budgets = "tokens per batch of queries; default: 2048 on cpu, 32768 on cuda, 8192 on mps"
    limit = (
        "threads on a CPU; default: OMP_NUM_THREADS, else all cores for the encoder and one for towers and baselines"
    )
    add("--threads", metavar="N", type=whole_number(1, 1024), help=limit)
    add("--encode_tokens", metavar="N", type=count, help=budgets)
    add("--cache_dir", metavar="DIR", help="folder of cached embeddings; default: the user's cache folder")
    add("--no_cache", **switch, help="neither read nor write cached embeddings")

    precomputed = (
        "precomputed embeddings instead of an encoder: parquet with columns such as `prompt` and `embedding`, "
    )
    precomputed += "or .npy beside a table of the queries"
    add("--embeddings", metavar="FILE", type=some_path, help=precomputed)

    add = parser.add_argument_group("finetuning", "only with --finetune_encoder").add_argument
    add("--finetune_encoder", **switch, help="train the encoder with the towers")
    add("--finetune_layers", metavar="N", type=count, help="only its last N layers; default: all of it")
    add("--lora_rank", metavar="R", type=dim, help="only LoRA adapters of rank R, at the linear maps of its layers")
    add("--tower_epochs", metavar="N", type=whole_number(0), help="epochs of the towers alone before that; default: 2")
    add("--encoder_lr", metavar="LR", type=positive, help="learning rate of the encoder; default: 5e-5")
    add(
        "--warmup", metavar="SHARE", type=share, help="fraction of the steps in which learning rates rise; default: 0.1"
    )
    add("--max_grad_norm", metavar="X", type=positive, help="gradients are clipped to this norm; default: 1")
    tokens = "tokens per step, instead of --batch_size battles; default: 2048"
    add("--batch_tokens", metavar="N", type=whole_number(1, 2**31 - 1), help=tokens)
    add("--accumulate", metavar="N", type=whole_number(1, 4096), help="parts of a step, to save memory; default: 1")
    add("--gradient_checkpointing", **switch, help="recompute hidden states instead of keeping them")

    add = parser.add_argument_group("towers").add_argument
    add("--embedding_dim", type=dim, default=512, help="width of the shared space and the ID embedding")
    looks = "what a query's text looks like, beside its embedding; better on tasks of training, worse on other ones"
    add("--surface_features", **switch, help=looks)
    add(
        "--no_surface_features",
        dest="surface_features",
        action="store_false",
        default=argparse.SUPPRESS,
        help="without them: the default",
    )
    add("--num_clusters", type=whole_number(0), default=50, help="K-means clusters; 0: no cluster features")
    add("--cluster_dim", type=dim, default=32, help="width of a cluster's learned embedding")
    add("--capability_dim", type=dim, default=64, help="width of a random capability vector")
    initial = "initial capability vectors; win_rate: log-odds of winning per cluster of training queries"
    add("--capability_init", choices=["random", "win_rate"], default="random", help=initial)
    scores = "initial capability vectors from benchmark scores: one row per model, one column per benchmark"
    add("--capability_file", metavar="FILE", type=some_path, help=scores)
    add("--allow_missing_profiles", **switch, help="models without a row in that file get the mean")
    add("--freeze_capabilities", **switch, help="do not train the capability vectors")
    unknown = "probability that a training step treats a model as unknown, without its ID"
    add("--id_dropout", type=share, default=0.1, help=unknown)
    add("--no_model_id", **switch, help="ablation: model tower without ID embedding")
    add("--no_capability", **switch, help="ablation: model tower without capability vector")
    add("--similarity_metric", choices=["dot", "cosine"], default="dot", help="cosine learns a scale")
    add("--dropout", type=share, default=0.5, help="in both towers' MLPs")

    add = parser.add_argument_group("training").add_argument
    recipe = "original: unscaled dot product, default initialization, --dropout 0.1 --id_dropout 0 --ema_decay 0 "
    recipe += "--eval_every 0, each unless it is given"
    add("--recipe", choices=["default", "original"], default="default", help=recipe)
    add(
        "--loss_type",
        metavar="LOSS",
        default="bpr",
        help="bpr, bce, hinge, or a new one of loss.py; pointwise: learn the scores of a score table themselves",
    )
    add("--margin", type=not_negative, default=1.0, help="lead in score that bpr and hinge demand of a winner")
    add("--batch_size", type=whole_number(1, 2**31 - 1), default=32, help="battles, or rows of a score table, per step")
    add("--epochs", type=count, default=10, help="passes over the training battles or rows")
    add("--lr", type=positive, default=1e-4, help="learning rate of AdamW")
    within = "validate also after every N steps within an epoch; 0: only after epochs; default: 100, or where an epoch "
    within += "has more than 1,000 steps, a tenth of them"
    add("--eval_every", metavar="N", type=whole_number(0), help=within)
    add("--patience", metavar="N", type=count, help="stop after N validations without a new best")
    average = (
        "decay of the moving average of weights that is validated and kept; 0: none, as while the encoder is trained"
    )
    add("--ema_decay", type=share, default=0.999, help=average)
    add("--weight_decay", type=not_negative, default=0.01, help="decoupled weight decay of AdamW")
    add("--seed", type=seed, default=42, help="seed of clusters, weights, batches, bootstrap")
    add("--split_seed", type=seed, help="seed of the split and of --limit; default: --seed")
    add("--deterministic", **switch, help="only algorithms that give the same bits each time, on a GPU too")
    add("--resume", **switch, help="continue the run in --output_dir where it was stopped; else start it")
    add("--overwrite", **switch, help="replace an unfinished run in --output_dir")
    compared = "methods compared on the test set; all: also a linear head and a factorization, which take longer"
    add("--baselines", choices=["all", "fast", "none"], default="fast", help=compared)
    costs = "table of `model` and `price_per_query` or `price_per_million_tokens`: the test on a score table then "
    costs += "evaluates cost, too; default: the table's own columns of costs, if any"
    add("--prices", metavar="FILE", type=some_path, help=costs)
    tokens = "of query and answer, for prices per million tokens"
    add("--tokens_per_query", metavar="N", type=positive, help=tokens)
    held = "train without this model's battles, then evaluate adding it from a few of them"
    add("--hold_out_model", metavar="NAME", help=held)
    return parser
