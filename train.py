"""Train RankRouter on battles between models and keep the checkpoint with the best validation AUC."""

import argparse
import hashlib
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

from support import printing, runs, signals
from support.command_line import run_command
from support.files import UserError, cache_folder, locked, make_folder, one_line, reason
from support.train_flags import parse_args

# torch, scikit-learn and the files that need them are imported inside the functions below, after the flags have
# been checked: --help and a typo answer at once.


def to_tensors(battles, device) -> tuple:
    """Battles as tensors: query (N,), models a and b (N, 2), outcome (N,)."""
    import numpy as np
    import torch

    columns = (battles.query_idx, np.column_stack([battles.model_a_idx, battles.model_b_idx]), battles.outcome)
    return tuple(torch.from_numpy(column).to(device) for column in columns)


def train_epoch(
    router, optimiser, loss_of, points, cluster_idx, battles: tuple, batch_size: int, begun=None, after_step=None
) -> float:
    """One pass over the training battles in random order; returns the mean loss of a battle.

    `begun`, of a pass that was cut short, is its order (N,) and the summed losses of each step taken (n,); both are
    what `after_step` is called with.
    """
    import torch

    router.train()
    order, taken = begun or (torch.randperm(len(battles[0])), torch.empty(0))  # (N,), (n,)
    batches = zip(*(column[order.to(points.device)].split(batch_size) for column in battles), strict=True)
    losses = torch.empty(-(-len(order) // batch_size), device=points.device)  # (steps,)
    losses[: len(taken)] = taken
    for step, (query, models, outcome) in islice(enumerate(batches), len(taken), None):  # (B,), (B, 2), (B,)
        scores = router(points[query], cluster_idx[query])  # (B, M)
        score_a, score_b = scores.gather(1, models).unbind(1)  # (B,) each
        loss = loss_of(score_a, score_b, outcome)
        router.zero_grad()
        loss.backward()
        optimiser.step()
        losses[step] = loss.detach() * len(outcome)
        if after_step:
            after_step(order, losses[: step + 1])
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


def fit(args: argparse.Namespace, split, embeddings, encoder: dict, profiles, device, history: dict, last, keep):
    """Train a router on the embeddings (Q, H) of the split's queries; the epoch of the best validation AUC counts.

    Fills `history`, calls `keep(router, improved)` after each epoch, and goes on from `last.saved`, where there is
    such. Returns the router with its facts, the standardised embeddings (Q, H) and clusters (Q,).
    """
    import numpy as np
    import torch

    import metrics
    from data_loader import query_ids
    from loss import bce_loss, bpr_loss, hinge_loss
    from rankrouter import RankRouter
    from support import baselines

    # Towers; standardisation, clusters and profiles see training queries only
    timing, saved = history["timing"], last.saved
    torch.manual_seed(args.seed)
    router = RankRouter(split.train.model_names, encoder["width"], vars(args))
    train_queries = torch.from_numpy(split.train.fought[0])  # (Qt,)
    with runs.timed(timing, "cluster"):
        if saved:
            last.verify(router, -(-len(split.train) // args.batch_size), history["data"]["embeddings_hash"])
            router.load_state_dict(saved["router"])  # statistics and clusters are in it
        else:
            router.query_tower.fit(embeddings[train_queries], args.seed)
        points = router.query_tower.standardise(embeddings.to(device))  # (Q, H)
        cluster_idx = router.query_tower.to(device).assign(points)  # (Q,)
        vectors, profile_facts = capability_profiles(args, split, cluster_idx, profiles)  # (M, C)
    if vectors is not None and not saved:
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
    best, begun = {"weights": None, "facts": None}, None
    if saved:
        best, begun = saved["best"], saved["begun"]
        last.restore(optimiser, timing)
        if best["weights"]:  # the file may be of the epoch after it, or lost
            router.load_state_dict(best["weights"])
            router.facts = best["facts"] = best["facts"] | {"args": vars(args), "encoder": encoder}
            keep(router, True)
            router.load_state_dict(saved["router"])
    best_auc = best["facts"]["val_metrics"]["auc"] if best["facts"] else -1.0
    with signals.between_steps() as asked:
        for epoch in range(len(history["train_losses"]), args.epochs):

            def after_step(order, losses, best=best) -> None:
                signal = asked()
                if (
                    signal or last.is_due()
                ) and losses.isfinite().all():  # else the epoch fails, and is not gone on with
                    lap()
                    last.write(router, optimiser, history, best, (order, losses))
                if signal:
                    raise signals.Stopped(signal)

            try:
                with runs.timed(timing, "train") as lap:
                    data = points, cluster_idx, battles, args.batch_size
                    mean_loss = train_epoch(router, optimiser, loss_of, *data, begun, after_step)
                with runs.timed(timing, "evaluate"):
                    d, val = evaluate(router, points, cluster_idx, split.val, margin)  # (N,)
            except UserError as error:
                raise UserError(f"epoch {epoch}: {error}") from error
            history["train_losses"].append(mean_loss)
            history["val_metrics"].append(val)
            begun, improved = None, val["auc"] > best_auc
            if improved:
                best_auc = val["auc"]
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
                weights = {name: tensor.clone() for name, tensor in router.state_dict().items()}
                best = {"weights": weights, "facts": router.facts}
            keep(router, improved)
            last.write(router, optimiser, history, best)
            print(
                f"epoch {epoch:<3}  loss {mean_loss:.4f}   val  auc {val['auc']:.4f}  accuracy {val['accuracy']:.4f}  "
                f"log loss {val['log_loss']:.4f}{'  best' if improved else ''}"
            )
    router.load_state_dict(best["weights"])
    return router, points, cluster_idx


def run(args: argparse.Namespace, inputs, encoder, device, last, history: dict) -> None:
    """Encode, train, and test once; fills `history`, and writes it and the checkpoints as it goes."""
    from support import baselines
    from support.comparison import Judge, describe_clusters

    runs.tune_cpu()
    split, whole, profiles, timing = inputs.split, inputs.whole, inputs.profiles, history["timing"]
    checkpoint = Path(args.output_dir) / "best_model.pt"
    if last.saved is None:
        runs.set_aside(checkpoint)
        last.make_room()
    runs.write_history(args.output_dir, history)

    queries = whole.train.queries
    with runs.timed(timing, "encode"):
        embeddings, num_encoded = encoder.embed(queries)  # (Q, H)
        encoder.release()  # its network takes memory that training may need
    timing |= {"queries_encoded": num_encoded, "queries_from_cache": len(queries) - num_encoded}
    history["encoder"], history["environment"] = encoder.facts, runs.environment(device, encoder.facts["dtype"])
    history["data"]["embeddings_hash"] = hashlib.sha256(embeddings.numpy()).hexdigest()
    printing.print_encoding(encoder.facts, timing, args.max_length)

    def keep(router, improved: bool) -> None:
        if improved:
            router.save(checkpoint, **router.facts)
            checkpoint.with_name("best_model.earlier.pt").unlink(missing_ok=True)
            history["best_epoch"] = router.facts["epoch"]
        runs.write_history(args.output_dir, history)

    place = {query: i for i, query in enumerate(queries)}
    own = embeddings if whole is split else embeddings[[place[query] for query in split.train.queries]]  # (Q, H)
    router, points, cluster_idx = fit(args, split, own, encoder.facts, profiles, device, history, last, keep)

    # Test, once, with the weights that were kept
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
        with runs.timed(timing, "cold_start"):
            last = last.of("ceiling")
            beside = last.history | {"timing": {}, "data": history["data"]}
            ceiling = fit(args, whole, embeddings, encoder.facts, profiles, device, beside, last, lambda *_: None)
            points = router.query_tower.standardise(embeddings.to(device))  # (Q, H)
            trained = router, points, router.query_tower.assign(points)
            history["cold_start"] = cold_start(args.hold_out_model, split, whole, trained, ceiling, profiles, args.seed)


def train(args: argparse.Namespace) -> None:
    """Train in an output folder that is this process's alone, and go on there where a run was stopped."""
    from support.inputs import find_inputs, read_inputs

    if args.deterministic:
        runs.make_deterministic()
    runs.check_outputs(args.output_dir)
    truth, resume = find_inputs(args), vars(args).pop("resume")  # `args` are as if it had never stopped
    device, timing = runs.pick_device(args.device), {}
    inputs = read_inputs(args, timing)

    from query_representation import Encoder
    from support.resume import LastCheckpoint, experiment

    how = args.dtype, args.pooling, args.max_length, args.encode_tokens, cache_folder(args.cache_dir, args.no_cache)
    encoder = Encoder(args.model_path, device, *how)
    path, what = Path(args.output_dir) / "last_checkpoint.pt", experiment(vars(args), inputs.counts, encoder.usage)
    last = LastCheckpoint(path, what, args.epochs, args.checkpoint_minutes, resume)
    history = {"status": "running", "args": vars(args)} | last.history
    history |= {"test_metrics": None, "test_intervals": None, "baselines": {}, "data": inputs.counts, "timing": timing}
    earlier = runs.read_history(args.output_dir)
    if resume:
        print(f"resume   {last.told}")
        if last.is_finished(earlier, vars(args)):
            print(f"finished already, with a test AUC of {earlier['test_metrics']['auc']:.4f}: {args.output_dir}")
            return
    elif path.is_file() and earlier.get("status") != "finished":
        print("aside    an unfinished run, until this one writes its first checkpoint; --resume would go on with it")
    try:
        run(args, inputs, encoder, device, last, history)
        if truth is not None:
            from support.comparison import compare_with_truth
            from support.demo import true_skills

            test = inputs.split.test
            skills = true_skills(truth, test.queries, test.model_names)  # (Q, M), (M,)
            history["demo"] = compare_with_truth(test, *skills, history["test_metrics"]["auc"])
        history["status"] = "finished"
        runs.write_history(args.output_dir, history)
    except BaseException as error:
        history["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(UserError):  # the disk may be full, which is told already
            runs.write_history(args.output_dir, history)
        if isinstance(error, signals.Stopped):
            told = f"interrupted after {len(history['train_losses'])} of {args.epochs} epochs"
            raise signals.Stopped(error.number, f"{told}; the same command with --resume goes on from there") from error
        if args.deterministic and isinstance(error, RuntimeError) and "deterministic" in str(error):
            raise UserError(f"--deterministic cannot be kept: {reason(error)}; leave it out") from error
        if isinstance(error, UserError) and history["best_epoch"] is not None:
            raise UserError(f"{error}; the checkpoint of epoch {history['best_epoch']} is kept") from error
        raise
    printing.print_test(history)


def main(argv: list[str] | None = None) -> None:
    """Train as the flags say. Raises `UserError` on anything the user can mend, `Stopped` on a signal."""
    args = parse_args(argv)
    args.output_dir = str(make_folder(args.output_dir, "--output_dir"))
    with locked(Path(args.output_dir), "--output_dir"):
        train(args)


if __name__ == "__main__":
    run_command(main)
