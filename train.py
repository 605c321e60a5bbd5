"""Train RankRouter on battles between models and keep the checkpoint with the best validation AUC."""

import argparse
import hashlib
from functools import partial
from pathlib import Path

from support import runs
from support.command_line import run_command
from support.files import UserError, cache_folder, content_hash, make_folder, one_line
from support.train_flags import parse_args

# torch, scikit-learn and the files that need them are imported inside the functions below, after the flags have
# been checked: --help and a typo answer at once.


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


def capability_profiles(args: argparse.Namespace, split, cluster_idx, profiles) -> tuple:
    """What capability vectors begin with, (M, C) with NaN where a value is missing, or None where they are random.

    Returns also what a checkpoint must know to give a new model a vector of that kind.
    """
    import torch

    from model_profiling import win_rate_profiles
    from support.profiles import standardise

    names = split.train.model_names
    if profiles is not None:
        facts = profiles.facts(names)
        return torch.from_numpy(standardise(profiles.of(names, args.allow_missing_profiles), facts)), facts
    if args.capability_init == "random":
        return None, {"kind": "random"}
    query, models, outcome = to_tensors(split.train, "cpu")
    known = win_rate_profiles(cluster_idx.cpu()[query], models, outcome, len(names), args.num_clusters)  # (M, K)
    return known, {"kind": "win_rate", "known": known}


def fit(args: argparse.Namespace, split, embeddings, encoder: dict, profiles, device, history: dict, keep) -> tuple:
    """Train a router on the embeddings (Q, H) of the split's queries; the epoch of the best validation AUC counts.

    Fills `history`, and calls `keep(router, improved)` after each epoch. Returns the router with its facts, the
    standardised embeddings (Q, H) and clusters (Q,).
    """
    import numpy as np
    import torch

    import metrics
    from data_loader import query_ids
    from loss import bce_loss, bpr_loss, hinge_loss
    from rankrouter import RankRouter
    from support import baselines

    # Towers; standardisation, clusters and profiles see training queries only
    timing = history["timing"]
    torch.manual_seed(args.seed)
    router = RankRouter(split.train.model_names, encoder["width"], vars(args))
    train_queries = torch.from_numpy(split.train.fought[0])  # (Qt,)
    with runs.timed(timing, "cluster"):
        router.query_tower.fit(embeddings[train_queries], args.seed)
        points = router.query_tower.standardise(embeddings.to(device))  # (Q, H)
        cluster_idx = router.query_tower.to(device).assign(points)  # (Q,)
        vectors, profile_facts = capability_profiles(args, split, cluster_idx, profiles)  # (M, C)
    if vectors is not None:
        router.model_tower.set_capabilities(vectors)
    if args.freeze_capabilities:
        router.model_tower.capability.weight.requires_grad_(False)
    router.to(device)
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
    seen = query_ids([split.train.queries[i] for i in np.union1d(split.train.query_idx, split.val.query_idx)])  # (Q,)
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
        improved = val["auc"] > best_auc
        if improved:
            best_auc, history["best_epoch"] = val["auc"], epoch
            best_state = {name: tensor.clone() for name, tensor in router.state_dict().items()}
            router.facts = {
                "args": vars(args),
                "encoder": encoder,
                "content_hash": history["data"]["content_hash"],
                "seen_queries": torch.from_numpy(seen),
                "profiles": profile_facts,
                "epoch": epoch,
                "val_metrics": val,
                "temperature": metrics.fit_temperature(d, split.val.outcome, margin),
                "best_single_model": best_single,
            }
        keep(router, improved)
        print(
            f"epoch {epoch:<3}  loss {mean_loss:.4f}   val  auc {val['auc']:.4f}  accuracy {val['accuracy']:.4f}  "
            f"log loss {val['log_loss']:.4f}{'  best' if improved else ''}"
        )
    router.load_state_dict(best_state)
    return router, points, cluster_idx


def run(args: argparse.Namespace, split, whole, profiles, device, history: dict) -> None:
    """Encode, train, and test once; fills `history`, and writes it and the checkpoint as it goes.

    `whole` is the split with the model that `split` holds out, or is `split`.
    """
    from query_representation import Encoder
    from support import baselines
    from support.comparison import Judge, describe_clusters

    runs.tune_cpu()
    checkpoint, timing = Path(args.output_dir) / "best_model.pt", history["timing"]
    earlier = checkpoint.with_name("best_model.earlier.pt")  # of another run, and so of another history
    if checkpoint.is_file():
        checkpoint.replace(earlier)
    runs.write_history(args.output_dir, history)

    queries = whole.train.queries
    with runs.timed(timing, "encode"):
        encoder = Encoder(
            args.model_path,
            device,
            dtype=args.dtype,
            pooling=args.pooling,
            max_length=args.max_length,
            tokens_per_batch=args.encode_tokens,
            cache_dir=cache_folder(args.cache_dir, args.no_cache),
        )
        embeddings, num_encoded = encoder.embed(queries)  # (Q, H)
        facts = encoder.facts
        del encoder  # its network takes memory that training may need
    timing |= {"queries_encoded": num_encoded, "queries_from_cache": len(queries) - num_encoded}
    history["encoder"], history["environment"] = facts, runs.environment(device, facts["dtype"])
    history["data"]["embeddings_hash"] = hashlib.sha256(embeddings.numpy()).hexdigest()
    runs.print_encoding(facts, timing, args.max_length)

    def keep(router, improved: bool) -> None:
        if improved:
            router.save(checkpoint, **router.facts)
            earlier.unlink(missing_ok=True)
        runs.write_history(args.output_dir, history)

    place = {query: i for i, query in enumerate(queries)}
    trained = embeddings if whole is split else embeddings[[place[query] for query in split.train.queries]]  # (Q, H)
    router, points, cluster_idx = fit(args, split, trained, facts, profiles, device, history, keep)

    # Test, once, with the weights that were kept: from memory, as another run may share the folder
    margin, temperature = router.link
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

    if args.hold_out_model is not None:
        from support.cold_start import cold_start

        print(f"\nceiling  the same with the battles of {one_line(args.hold_out_model)}")
        beside = {"train_losses": [], "val_metrics": [], "timing": {}, "data": history["data"]}
        with runs.timed(timing, "cold_start"):
            ceiling = fit(args, whole, embeddings, facts, profiles, device, beside, lambda *_: None)
            points = router.query_tower.standardise(embeddings.to(device))  # (Q, H)
            trained = router, points, router.query_tower.assign(points)
            history["cold_start"] = cold_start(args.hold_out_model, split, whole, trained, ceiling, profiles, args.seed)


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
        how = args.split_seed, args.split_by, args.ties, args.pairs_per_query
        split, split_counts = split_battles(battles, *how, args.hold_out_model)
        whole = split if args.hold_out_model is None else split_battles(battles, *how)[0]
    data = counts | split_counts
    runs.print_data(data, args.split_by)
    if args.hold_out_model is not None:
        from support.cold_start import held_out_battles

        held_out_battles(args.hold_out_model, split, whole)  # that there are any is known before encoding
    train_queries = data["split"]["train"]["queries"]
    if args.num_clusters > train_queries:
        raise UserError(
            f"--num_clusters {args.num_clusters} is more than the {train_queries} distinct training queries; "
            f"choose at most {train_queries}, or 0 for no cluster features"
        )

    profiles = None
    if args.capability_file is not None:
        from support.profiles import read_profiles

        profiles = read_profiles(args.capability_file)
        profiles.of(whole.train.model_names, args.allow_missing_profiles)  # a missing row is told before encoding
        data["capability_file_hash"] = content_hash([profiles.path])
        runs.print_profiles(profiles, whole.train.model_names)
    if args.capability_dim is None:
        args.capability_dim = args.num_clusters if profiles is None else len(profiles.columns)

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
        run(args, split, whole, profiles, device, history)
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
