"""Train RankRouter on battles between models and keep the checkpoint with the best validation AUC."""

import argparse
import hashlib
from functools import partial
from pathlib import Path

from support import runs
from support.command_line import OneLineParser, comma_separated, real_number, run_command, whole_number
from support.files import UserError, make_folder, user_cache_folder

# torch, scikit-learn and the files that need them are imported inside the functions below, after the flags have
# been checked: --help and a typo answer at once.


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
    data.add_argument("--output_dir", default="./outputs", help="for training_history.json and best_model.pt")

    encoder = parser.add_argument_group("encoder, frozen")
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

    towers = parser.add_argument_group("towers")
    towers.add_argument("--embedding_dim", type=dim, default=512, help="width of the shared space and the ID embedding")
    towers.add_argument(
        "--num_clusters", type=whole_number(0), default=50, help="K-means clusters; 0: no cluster features"
    )
    towers.add_argument("--cluster_dim", type=dim, default=32, help="width of a cluster's learned embedding")
    towers.add_argument("--capability_dim", type=dim, default=64, help="width of a model's capability vector")
    towers.add_argument("--no_model_id", action="store_true", help="ablation: model tower without ID embedding")
    towers.add_argument("--no_capability", action="store_true", help="ablation: model tower without capability vector")
    towers.add_argument("--similarity_metric", choices=["dot", "cosine"], default="dot", help="cosine learns a scale")
    towers.add_argument("--dropout", type=share, default=0.1, help="in both towers' MLPs")

    training = parser.add_argument_group("training")
    training.add_argument("--loss_type", choices=["bpr", "bce", "hinge"], default="bpr", help="of a battle's scores")
    training.add_argument("--margin", type=not_negative, default=1.0, help="lead that bpr and hinge ask of a winner")
    training.add_argument("--batch_size", type=whole_number(1, 2**31 - 1), default=32, help="battles per step")
    training.add_argument("--epochs", type=whole_number(1), default=10, help="passes over the training battles")
    training.add_argument("--lr", type=positive, default=1e-4, help="learning rate of AdamW")
    training.add_argument("--weight_decay", type=not_negative, default=0.01, help="of AdamW, decoupled")
    training.add_argument("--seed", type=seed, default=42, help="of clusters, initial weights and batches")
    training.add_argument("--split_seed", type=seed, help="of the split and of --limit; without it, --seed")
    training.add_argument(
        "--baselines",
        choices=["all", "fast", "none"],
        default="fast",
        help="what the test compares with; all: also a linear head and a factorisation, which take longer",
    )

    args = parser.parse_args(argv)
    if args.demo:  # parsed again, so that a path given explicitly still holds
        parser.set_defaults(data_path=None, model_path=None)
        args = parser.parse_args(argv)
    if args.split_seed is None:
        args.split_seed = args.seed
    if args.no_model_id and args.no_capability:
        parser.error("--no_model_id and --no_capability together leave the model tower without input")
    return args


def to_tensors(battles, device) -> tuple:
    """Battles as tensors: query (N,), models a and b (N, 2), outcome (N,)."""
    import numpy as np
    import torch

    columns = (battles.query_idx, np.column_stack([battles.model_a_idx, battles.model_b_idx]), battles.outcome)
    return tuple(torch.from_numpy(column).to(device) for column in columns)


def train_epoch(router, optimiser, loss_of, points, cluster_idx, battles: tuple, batch_size: int) -> float:
    """One pass over the training battles in random order; returns the mean loss of a battle."""
    import torch

    router.train()
    order = torch.randperm(len(battles[0])).to(points.device)  # (N,)
    batches = zip(*(column[order].split(batch_size) for column in battles), strict=True)
    losses = torch.empty(-(-len(order) // batch_size), device=points.device)  # (steps,)
    for step, (query, models, outcome) in enumerate(batches):  # (B,), (B, 2), (B,)
        scores = router(points[query], cluster_idx[query])  # (B, M)
        score_a, score_b = scores.gather(1, models).unbind(1)  # (B,) each
        loss = loss_of(score_a, score_b, outcome)
        router.zero_grad()
        loss.backward()
        optimiser.step()
        losses[step] = loss.detach() * len(outcome)
    losses = losses.cpu()  # looked at here and not at each step, for which a GPU would wait
    bad = (~losses.isfinite()).nonzero()[:, 0]  # (steps that failed,)
    if len(bad):
        raise UserError(f"the loss is {losses[bad[0]]} at step {bad[0]}; try a lower --lr or --margin")
    return losses.double().sum().item() / len(order)


def evaluate(router, points, cluster_idx, battles, margin: float) -> tuple:
    """The router's margins d (N,) on decisive battles, from the matrix of scores, and their metrics."""
    import metrics

    d = battles.margins(router.score(points, cluster_idx, battles.fought[0]))  # (N,)
    return d, metrics.evaluate(d, battles.outcome, battles.model_a_idx, battles.model_b_idx, margin)


def run(args: argparse.Namespace, split, device, history: dict) -> None:
    """Encode, cluster, train, and test once; fills `history`, and writes it and the checkpoint as it goes."""
    import torch

    import metrics
    from loss import bce_loss, bpr_loss, hinge_loss
    from query_representation import embed
    from rankrouter import RankRouter
    from support import baselines
    from support.comparison import Judge, describe_clusters

    runs.tune_cpu()
    checkpoint, timing = Path(args.output_dir) / "best_model.pt", history["timing"]
    earlier = checkpoint.with_name("best_model.earlier.pt")  # of another run, and so of another history
    if checkpoint.is_file():
        checkpoint.replace(earlier)
    runs.write_history(args.output_dir, history)

    queries, cache_dir = split.train.queries, None if args.no_cache else args.cache_dir
    if not args.no_cache and cache_dir is None:
        cache_dir = user_cache_folder()
    with runs.timed(timing, "encode"):
        embeddings, encoder, num_encoded = embed(
            queries,
            args.model_path,
            device,
            dtype=args.dtype,
            pooling=args.pooling,
            max_length=args.max_length,
            tokens_per_batch=args.encode_tokens,
            cache_dir=cache_dir,
        )  # (Q, H)
    timing |= {"queries_encoded": num_encoded, "queries_from_cache": len(queries) - num_encoded}
    history["encoder"], history["environment"] = encoder, runs.environment(device, encoder["dtype"])
    history["data"]["embeddings_hash"] = hashlib.sha256(embeddings.numpy()).hexdigest()
    runs.print_encoding(encoder, timing, args.max_length)

    # Towers; standardisation and clusters see training queries only
    torch.manual_seed(args.seed)
    router = RankRouter(split.train.model_names, encoder["width"], vars(args))
    train_queries = torch.from_numpy(split.train.fought[0])  # (Qt,)
    with runs.timed(timing, "cluster"):
        router.query_tower.fit(embeddings[train_queries], args.seed)
        router.to(device)
        points = router.query_tower.standardise(embeddings.to(device))  # (Q, H)
        cluster_idx = router.query_tower.assign(points)  # (Q,)
    if args.num_clusters:
        sizes = torch.bincount(cluster_idx.cpu()[train_queries], minlength=args.num_clusters).tolist()  # (K,)
        history["clusters"] = [{"size": size} for size in sizes]
        print(f"cluster  {args.num_clusters} clusters of {min(sizes)} to {max(sizes)} training queries")

    # Training; the best validation AUC is kept, the earlier epoch where two are equal
    margin = args.margin if args.loss_type == "bpr" else 0.0  # of the link from scores to probabilities
    loss_of = {
        "bpr": partial(bpr_loss, margin=args.margin),
        "bce": bce_loss,
        "hinge": partial(hinge_loss, margin=args.margin),
    }[args.loss_type]
    battles, best_single = to_tensors(split.train, device), baselines.best_single_model(split)
    optimiser = torch.optim.AdamW(router.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    best_auc, best_state = -1.0, None
    for epoch in range(args.epochs):
        try:
            with runs.timed(timing, "train"):
                mean_loss = train_epoch(router, optimiser, loss_of, points, cluster_idx, battles, args.batch_size)
            with runs.timed(timing, "evaluate"):
                d, val = evaluate(router, points, cluster_idx, split.val, margin)  # (N,)
        except UserError as error:
            saved = f"; the checkpoint of epoch {history['best_epoch']} is kept" if epoch else ""
            raise UserError(f"epoch {epoch}: {error}{saved}") from error
        history["train_losses"].append(mean_loss)
        history["val_metrics"].append(val)
        if val["auc"] > best_auc:
            best_auc, history["best_epoch"] = val["auc"], epoch
            best_state = {name: tensor.clone() for name, tensor in router.state_dict().items()}
            temperature = metrics.fit_temperature(d, split.val.outcome, margin)
            facts = {"args": vars(args), "encoder": encoder, "epoch": epoch, "val_metrics": val}
            router.save(checkpoint, **facts, temperature=temperature, best_single_model=best_single)
            earlier.unlink(missing_ok=True)
        runs.write_history(args.output_dir, history)
        print(
            f"epoch {epoch:<3}  loss {mean_loss:.4f}   val  auc {val['auc']:.4f}  accuracy {val['accuracy']:.4f}  "
            f"log loss {val['log_loss']:.4f}{'  best' if history['best_epoch'] == epoch else ''}"
        )

    # Test, once, with the weights that were kept: from memory, as another run may share the folder
    router.load_state_dict(best_state)
    with runs.timed(timing, "evaluate"):
        test_scores = router.score(points, cluster_idx, split.test.fought[0])  # (Q, M)
        judge = Judge(split, test_scores, margin, temperature, args.seed)
        history |= judge.results()
        if args.num_clusters:
            history["clusters"] = describe_clusters(router, points, cluster_idx, split.train, margin, temperature)
    if args.baselines != "none":
        with runs.timed(timing, "baselines"):
            arrays = points.cpu().numpy(), cluster_idx.cpu().numpy()
            fitted = baselines.fit(split, *arrays, args.num_clusters, args.baselines == "all", args.seed)
            history["baselines"] = judge.compare(fitted)


def main(argv: list[str] | None = None) -> None:
    """Train as the flags say. Raises `UserError` on anything the user can mend."""
    args = parse_args(argv)
    args.output_dir = str(make_folder(args.output_dir, "--output_dir"))

    from data_loader import data_files, load_battles, split_battles

    if args.data_path is not None:
        data_files(args.data_path)  # missing data is told before anything slow
    device = runs.pick_device(args.device)
    demo, truth_known = None, args.data_path is None
    if None in (args.data_path, args.model_path):
        from support.demo import demo_folder

        demo = demo_folder(args.demo_dir)
        args.data_path = str(demo / "battles.parquet") if args.data_path is None else args.data_path
        args.model_path = str(demo / "encoder") if args.model_path is None else args.model_path

    from support.encoder import find_encoder, is_hub_id

    if not is_hub_id(args.model_path):
        find_encoder(args.model_path)  # as is a missing model; a download can wait until the data are read
    timing = {}
    with runs.timed(timing, "load"):
        battles, counts = load_battles(args.data_path, args.score_columns, args.limit, args.split_seed)
        split, split_counts = split_battles(battles, args.split_seed, args.split_by, args.ties, args.pairs_per_query)
    data = counts | split_counts
    runs.print_data(data, args.split_by)
    train_queries = data["split"]["train"]["queries"]
    if args.num_clusters > train_queries:
        raise UserError(
            f"--num_clusters {args.num_clusters} is more than the {train_queries} distinct training queries; "
            f"choose at most {train_queries}, or 0 for no cluster features"
        )

    history = {
        "status": "running",
        "args": vars(args),
        "train_losses": [],
        "val_metrics": [],
        "best_epoch": None,
        "test_metrics": None,
        "test_intervals": None,
        "baselines": {},
        "data": data,
        "timing": timing,
    }
    try:
        run(args, split, device, history)
        if truth_known:
            from support.comparison import compare_with_truth
            from support.demo import true_skills

            truth = true_skills(demo, split.test.queries, split.test.model_names)  # (Q, M), (M,)
            history["demo"] = compare_with_truth(split.test, *truth, history["test_metrics"]["auc"])
    except BaseException:
        history["status"] = "failed"
        runs.write_history(args.output_dir, history)
        raise
    history["status"] = "finished"
    runs.write_history(args.output_dir, history)
    runs.print_test(history)


if __name__ == "__main__":
    run_command(main)
