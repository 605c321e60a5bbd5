"""The flags of `train.py`, and which of them exclude each other."""

import argparse

from support.command_line import OneLineParser, comma_separated, real_number, some_path, whole_number

# Defaults of the flags that --finetune_encoder brings.
FINETUNING = {
    "tower_epochs": 2,
    "encoder_lr": 5e-5,
    "warmup": 0.1,
    "max_grad_norm": 1.0,
    "batch_tokens": 2048,
    "accumulate": 1,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; with --demo, a path that is not given is None."""
    parser = OneLineParser("Train RankRouter on battles; keep the checkpoint with the best validation AUC.")
    seed, dim = whole_number(0, 2**32 - 1), whole_number(1, 8192)
    positive = real_number("above 0", lambda x: x > 0)
    not_negative = real_number("of at least 0", lambda x: x >= 0)
    share = real_number("from 0 to below 1", lambda x: 0 <= x < 1)

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_path",
        default="../data/chatbot_arena/data/train-00000-of-00001-cced8514c7ed782a.parquet",
        help="battles or score table: parquet, CSV or JSON; a file, a folder, or a glob of shards",
    )
    data.add_argument(
        "--score_columns",
        metavar="A,B,...",
        type=comma_separated,
        help="the models' columns of a wide score table; without it, its numeric columns",
    )
    data.add_argument("--ties", choices=["drop", "half"], default="drop", help="in training: left out, or half a win")
    data.add_argument(
        "--split_by",
        choices=["query", "battle"],
        default="query",
        help="what the 80/10/10 split draws; battle lets test queries stand in training, as published code does, and "
        "leaves the rows of a score table unjudged",
    )
    data.add_argument(
        "--pairs_per_query",
        metavar="N",
        type=whole_number(1),
        help="at most N training battles of a query, drawn by --split_seed; without it, all pairs of a score table",
    )
    data.add_argument("--limit", metavar="N", type=whole_number(1), help="only N queries: a quick look")
    data.add_argument("--demo", action="store_true", help="synthetic battles, tiny Qwen2; a path given still holds")
    data.add_argument("--demo_dir", metavar="DIR", help="where the demo is kept, else the user's cache folder")
    data.add_argument("--output_dir", default="./outputs", help="for the history and checkpoints; one run at a time")

    encoder = parser.add_argument_group("encoder")
    encoder.add_argument("--model_path", default="../model/Qwen2-0.5B", help="Hugging Face encoder: a folder or hub id")
    encoder.add_argument("--pooling", choices=["mean", "last"], default="mean", help="of a query's token states")
    encoder.add_argument("--max_length", type=whole_number(1, 2**20), default=512, help="tokens read of a query")
    encoder.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or mps; auto: cuda, else mps, else cpu")
    encoder.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the encoder; auto: bfloat16 where that is faster, else float32",
    )
    encoder.add_argument(
        "--encode_tokens",
        metavar="N",
        type=whole_number(1),
        help="tokens per batch of queries; without it 2048 on cpu, 32768 on cuda, 8192 on mps",
    )
    encoder.add_argument("--cache_dir", metavar="DIR", help="where embeddings are kept, else the user's cache folder")
    encoder.add_argument("--no_cache", action="store_true", help="neither read nor keep embeddings")

    tuned = parser.add_argument_group("encoder, trained", "only with --finetune_encoder")
    tuned.add_argument("--finetune_encoder", action="store_true", help="train the encoder with the towers")
    tuned.add_argument(
        "--finetune_layers", metavar="N", type=whole_number(1), help="only its last N layers; without it, all of it"
    )
    tuned.add_argument(
        "--lora_rank",
        metavar="R",
        type=whole_number(1, 8192),
        help="only adapters of rank R, at the linear maps of its layers",
    )
    tuned.add_argument(
        "--tower_epochs",
        metavar="N",
        type=whole_number(0),
        help="epochs of the towers alone before, in batches of --batch_size; without it 2",
    )
    tuned.add_argument(
        "--encoder_lr", metavar="LR", type=positive, help="learning rate of the encoder; without it 5e-5"
    )
    tuned.add_argument(
        "--warmup", metavar="SHARE", type=share, help="of all steps, in which learning rates rise; without it 0.1"
    )
    tuned.add_argument(
        "--max_grad_norm", metavar="X", type=positive, help="gradients are clipped to this norm; without it 1"
    )
    tuned.add_argument(
        "--batch_tokens",
        metavar="N",
        type=whole_number(1, 2**31 - 1),
        help="tokens per step, in place of --batch_size battles; without it 2048",
    )
    tuned.add_argument(
        "--accumulate",
        metavar="N",
        type=whole_number(1, 4096),
        help="parts a step is computed in, for less memory",
    )
    tuned.add_argument(
        "--gradient_checkpointing", action="store_true", help="compute hidden states again instead of keeping them"
    )

    towers = parser.add_argument_group("towers")
    towers.add_argument("--embedding_dim", type=dim, default=512, help="width of the shared space and the ID embedding")
    towers.add_argument(
        "--num_clusters", type=whole_number(0), default=50, help="K-means clusters; 0: no cluster features"
    )
    towers.add_argument("--cluster_dim", type=dim, default=32, help="width of a cluster's learned embedding")
    towers.add_argument("--capability_dim", type=dim, default=64, help="width of a random capability vector")
    towers.add_argument(
        "--capability_init",
        choices=["random", "win_rate"],
        default="random",
        help="what capability vectors begin with; win_rate: log-odds of winning per cluster of training queries",
    )
    towers.add_argument(
        "--capability_file",
        metavar="FILE",
        type=some_path,
        help="begin with benchmark scores instead: one row per model, one column per benchmark",
    )
    towers.add_argument(
        "--allow_missing_profiles", action="store_true", help="models without a row in the file get the mean"
    )
    towers.add_argument(
        "--freeze_capabilities", action="store_true", help="capability vectors stay what they began with"
    )
    towers.add_argument(
        "--id_dropout", type=share, default=0.1, help="how often training takes a model for unknown, without its ID"
    )
    towers.add_argument("--no_model_id", action="store_true", help="ablation: model tower without ID embedding")
    towers.add_argument("--no_capability", action="store_true", help="ablation: model tower without capability vector")
    towers.add_argument("--similarity_metric", choices=["dot", "cosine"], default="dot", help="cosine learns a scale")
    towers.add_argument("--unscaled", action="store_true", help="ablation: dot product not divided by sqrt(its width)")
    towers.add_argument(
        "--random_start", action="store_true", help="ablation: the query tower's last layer does not begin at 0"
    )
    towers.add_argument("--dropout", type=share, default=0.5, help="in both towers' MLPs")

    training = parser.add_argument_group("training")
    training.add_argument("--loss_type", choices=["bpr", "bce", "hinge"], default="bpr", help="of a battle's scores")
    training.add_argument("--margin", type=not_negative, default=1.0, help="lead that bpr and hinge ask of a winner")
    training.add_argument("--batch_size", type=whole_number(1, 2**31 - 1), default=32, help="battles per step")
    training.add_argument("--epochs", type=whole_number(1), default=10, help="passes over the training battles")
    training.add_argument("--lr", type=positive, default=1e-4, help="learning rate of AdamW")
    training.add_argument(
        "--eval_every",
        metavar="N",
        type=whole_number(0),
        default=100,
        help="validate after every N steps of an epoch too; 0: only after epochs",
    )
    training.add_argument(
        "--patience", metavar="N", type=whole_number(1), help="stop after N validations that were not the best so far"
    )
    training.add_argument(
        "--ema_decay",
        type=share,
        default=0.999,
        help="per step, of the running mean of weights that is kept, until an encoder learns; 0: no mean",
    )
    training.add_argument("--weight_decay", type=not_negative, default=0.01, help="of AdamW, decoupled")
    training.add_argument("--seed", type=seed, default=42, help="of clusters, initial weights and batches")
    training.add_argument("--split_seed", type=seed, help="of the split and of --limit; without it, --seed")
    training.add_argument(
        "--deterministic", action="store_true", help="on a GPU too: only algorithms that give the same bits each time"
    )
    training.add_argument(
        "--resume", action="store_true", help="go on where a run in --output_dir was stopped; else from the beginning"
    )
    training.add_argument(
        "--checkpoint_minutes",
        metavar="N",
        type=not_negative,
        default=1.0,
        help="between two checkpoints to go on from, in an epoch that is longer; 0: after each step",
    )
    training.add_argument(
        "--baselines",
        choices=["all", "fast", "none"],
        default="fast",
        help="what the test compares with; all: also a linear head and a factorisation, which take longer",
    )
    training.add_argument(
        "--hold_out_model",
        metavar="NAME",
        help="train without this model's battles; then test it as one that was not there, from few battles",
    )

    args = parser.parse_args(argv)
    # Parsed again, so that what is given explicitly shows.
    if args.demo:
        parser.set_defaults(data_path=None, model_path=None)
    if args.capability_file is not None or args.capability_init != "random":
        parser.set_defaults(capability_dim=None)
    args = parser.parse_args(argv)
    if args.split_seed is None:
        args.split_seed = args.seed
    if args.finetune_encoder:
        if args.dtype == "float16":
            parser.error("--dtype float16 does not train; give bfloat16 or float32 with --finetune_encoder")
        for name, default in FINETUNING.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
    else:
        given = [name for name in ("finetune_layers", "lora_rank", *FINETUNING) if getattr(args, name) is not None]
        given += ["gradient_checkpointing"] * args.gradient_checkpointing
        if given:
            parser.error(f"--{given[0]} is for --finetune_encoder; give that too")
    profiled = args.capability_file is not None or args.capability_init == "win_rate"
    if args.no_model_id and args.no_capability:
        parser.error("--no_model_id and --no_capability together leave the model tower without input")
    if args.no_capability and (profiled or args.freeze_capabilities or args.hold_out_model is not None):
        parser.error(
            "--no_capability leaves no capability vectors, to begin with anything, freeze, or give a new model"
        )
    if args.unscaled and args.similarity_metric == "cosine":
        parser.error("--unscaled is of the dot product; a cosine has a scale of its own")
    if args.capability_file is not None and args.capability_init == "win_rate":
        parser.error("--capability_file and --capability_init win_rate exclude each other")
    if profiled and args.capability_dim is not None:
        parser.error("--capability_dim is for random vectors; others are as wide as there are clusters or benchmarks")
    if args.capability_init == "win_rate" and not args.num_clusters:
        parser.error("--capability_init win_rate is per cluster; give --num_clusters at least 1")
    if args.allow_missing_profiles and args.capability_file is None:
        parser.error("--allow_missing_profiles is for --capability_file")
    return args
