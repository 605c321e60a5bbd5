"""Train RankRouter on battles between models and keep the checkpoint with the best validation AUC."""

import argparse
import hashlib
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from support import printing, processes, runs, signals
from support.command_line import run_command
from support.files import UserError, cache_folder, locked, make_folder, one_line, reason
from support.selection import best_moment, waited
from support.train_flags import parse_args

# torch, scikit-learn and the files that need them are imported inside the functions below, after the flags have
# been checked: --help and a typo answer at once.

WRITE, STOP = 1, 2  # what a process may ask for after a step; that of rank 0 alone asks for the first


def train_epoch(router, optimiser, loss_of, batches, epoch) -> Iterator[None]:
    """Take the steps of an epoch that are left, all processes together; yields after each, and fills `epoch.losses`."""
    import torch

    weights = [weight for group in optimiser.param_groups for weight in group["params"] if weight.requires_grad]
    while epoch.taken < len(epoch.steps):
        if not router.training:
            router.train()
        optimiser.zero_grad()
        step, mean = epoch.steps[epoch.taken], torch.zeros((), device=batches.device)
        size = batches.size_of(step)
        for queries, row, models, outcome in batches.parts(step):  # (b,), (B,), (B, 2), (B,)
            scores = router(*batches.embed(queries))[row]  # (B, M)
            score_a, score_b = scores.gather(1, models).unbind(1)  # (B,) each
            loss = loss_of(score_a, score_b, outcome) * (len(outcome) / size)
            loss.backward()
            mean += loss.detach()
        if processes.size() > 1:
            for weight in weights:  # a process may have no part in a step
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            processes.add_up([*(weight.grad for weight in weights), mean, *batches.moved])
        optimiser.step()
        batches.follow()
        epoch.losses[epoch.taken] = mean * size
        epoch.taken += 1
        yield


def copied(weights) -> dict:
    """A copy of named weights."""
    return {name: weight.detach().clone() for name, weight in weights.items()}


def mean_loss(epoch, batches) -> float:
    """Of a battle in the steps taken; losses are looked at here and not at each step, for which a GPU would wait."""
    losses = epoch.losses[: epoch.taken].cpu()
    bad = (~losses.isfinite()).nonzero()[:, 0]  # (steps that failed,)
    if len(bad):
        lower = "--encoder_lr, --lr" if batches.learned else "--lr"
        raise UserError(f"the loss is {losses[bad[0]]} at step {bad[0]}; try a lower {lower} or --margin")
    return losses.double().sum().item() / sum(map(batches.size_of, epoch.steps[: epoch.taken]))


def evaluate(router, points, cluster_idx, battles, margin: float) -> tuple:
    """The router's margins d (N,) on decisive battles, and their metrics, from the points of the queries fought."""
    import metrics

    d = battles.margins(router.score(points, cluster_idx))  # (N,)
    return d, metrics.evaluate(d, battles.outcome, battles.model_a_idx, battles.model_b_idx, margin)


def fit(args: argparse.Namespace, split, embeddings, encoder, profiles, device, history: dict, last, keep):
    """Train a router on the embeddings (Q, H) of the split's queries; the moment of the best validation AUC counts.

    Fills `history`, calls `keep(router, improved)` after each validation, and goes on from `last.saved`, where there is
    such. An encoder that is trained waits for its towers, which learn alone first: it would follow their random
    beginnings. Returns the router with its facts, and the points (Q, H) and clusters (Q,) that it began with.
    """
    import numpy as np
    import torch

    import metrics
    from data_loader import query_ids
    from loss import bce_loss, bpr_loss, hinge_loss
    from support import baselines
    from support.averaging import RunningMean
    from support.batches import begin
    from support.beginning import begin_batches, begin_optimiser, begin_router
    from support.comparison import link_margin

    timing, saved, towers = history["timing"], last.saved, None
    if last.towers:
        towers = fit_towers(args, split, embeddings, encoder, profiles, device, history, last.towers, keep)
    with runs.timed(timing, "cluster"):
        router, points, cluster_idx, profile_facts = begin_router(
            args, split, embeddings, profiles, device, last, towers
        )
    if args.num_clusters:
        train_queries = torch.from_numpy(split.train.fought[0])  # (Qt,)
        sizes = torch.bincount(cluster_idx.cpu()[train_queries], minlength=args.num_clusters).tolist()  # (K,)
        history["clusters"] = [{"size": size} for size in sizes]
        if not towers:
            print(f"cluster  {args.num_clusters} clusters of {min(sizes)} to {max(sizes)} training queries")

    margin = link_margin(args)
    loss_of = {
        "bpr": partial(bpr_loss, margin=args.margin),
        "bce": bce_loss,
        "hinge": partial(hinge_loss, margin=args.margin),
    }[args.loss_type]
    batches = begin_batches(args, split, router, points, cluster_idx, encoder, timing)
    best_single = baselines.best_single_model(split)
    seen = query_ids([split.train.queries[i] for i in np.union1d(split.train.query_idx, split.val.query_idx)])  # (Q,)

    def progress() -> float:  # at the middle of the next step
        return (len(history["train_losses"]) + (now.taken + 0.5) / len(now.steps)) / args.epochs

    optimiser = begin_optimiser(args, router, batches, progress)
    # Where an encoder learns there is no mean: rates fall to 0 instead, and centroids follow the weights as they are.
    averaged = RunningMean([] if batches.learned else list(router.parameters()), args.ema_decay)
    best, begun = {"weights": None, "facts": None}, None
    if saved:
        last.verify(router, batches, history["data"]["embeddings_hash"])
        last.restore(router, batches, optimiser, averaged, timing)
        best, begun = saved["best"], saved["begun"]
        if best["weights"]:  # the file may be of the epoch after it, or lost
            router.load_state_dict(best["weights"])
            router.facts = best["facts"] = best["facts"] | {"args": vars(args), "encoder": encoder.facts}
            keep(router, True)
            router.load_state_dict(saved["router"])

    def validate(epoch, step: int | None) -> None:
        nonlocal best
        loss, points = mean_loss(epoch, batches), batches.points_of(split.val.fought[0])  # (q, H), (q,)
        d, val = evaluate(router, *points, split.val, margin)  # (N,)
        val, before = processes.from_main(val), best_moment(history)
        improved = before is None or val["auc"] > before[2]["auc"]
        if step is None:
            history["train_losses"].append(loss)
            history["val_metrics"].append(val)
        else:
            history["validations"].append({"epoch": number, "step": step} | val)
        if improved:
            router.facts = {
                "args": vars(args),
                "encoder": encoder.facts,
                "content_hash": history["data"]["content_hash"],
                "seen_queries": torch.from_numpy(seen),
                "profiles": profile_facts,
                "epoch": number,
                "step": step,
                "val_metrics": val,
                "temperature": metrics.fit_temperature(d, split.val.outcome),
                "best_single_model": best_single,
            }
            if batches.learned:
                router.facts["trained"] = {"layers": args.finetune_layers, "lora_rank": args.lora_rank}
                router.facts["trained"]["weights"] = copied(batches.learned)
            best = {"weights": copied(router.state_dict()), "facts": router.facts}
        keep(router, improved)
        if improved or step is None or batches.learned:
            printing.print_validation(number, step, len(epoch.steps), loss, val, improved)

    def is_over() -> bool:
        return args.patience is not None and waited(history) >= args.patience

    with signals.between_steps() as asked:
        for number in range(len(history["train_losses"]), args.epochs):
            if is_over():
                break
            now, begun = begin(batches, begun), None
            try:
                with runs.timed(timing, "train") as lap:
                    for _ in train_epoch(router, optimiser, loss_of, batches, now):
                        averaged.update()
                        if args.eval_every and now.taken % args.eval_every == 0 and now.taken < len(now.steps):
                            lap()
                            with averaged.in_place():
                                validate(now, now.taken)
                            lap("evaluate")
                            if is_over():
                                break
                        is_due = processes.rank() == 0 and last.is_due()
                        said = processes.total(STOP * (asked() is not None) + WRITE * is_due)
                        if said and now.losses.isfinite().all():  # else the epoch fails, and is not gone on with
                            lap()
                            last.write(router, batches, optimiser, averaged, history, best, now.begun)
                        if said >= STOP:
                            raise signals.Stopped(asked() or signal.SIGTERM)
                if now.taken < len(now.steps):  # patience is over, and the epoch ends here
                    history["train_losses"].append(mean_loss(now, batches))
                    _, _, *metrics_then = history["validations"][-1].items()  # but for the epoch and the step
                    history["val_metrics"].append(dict(metrics_then))
                else:
                    with runs.timed(timing, "evaluate"), averaged.in_place():
                        validate(now, None)
            except UserError as error:
                raise UserError(f"epoch {number}: {error}") from error
            last.write(router, batches, optimiser, averaged, history, best)
    if is_over():
        print(f"patience {args.patience} validations since the best one: stopped")
    router.load_state_dict(best["weights"])
    return router, points, cluster_idx


def fit_towers(args: argparse.Namespace, split, embeddings, encoder, profiles, device, history: dict, last, keep):
    """A router on embeddings (Q, H) that stand, from which an encoder is trained; fills `history`.

    `last` has no towers before it, so that `fit` trains once; `best_model.pt` is not of this part.
    """
    alone = vars(args) | {"finetune_encoder": False, "epochs": args.tower_epochs, "patience": None}
    found = last.history | {"timing": {}, "data": history["data"]}
    history["towers_alone"] = {name: found[name] for name in ("train_losses", "val_metrics", "validations")}
    print(f"towers   alone first, epochs: {args.tower_epochs}")
    how = encoder, profiles, device, found, last, lambda *_: keep(None, False)
    router, *_ = fit(argparse.Namespace(**alone), split, embeddings, *how)
    history["timing"]["towers_alone"] = sum(found["timing"].values())
    return router


def points_of(router, encoder, queries: list[str], embeddings, device) -> tuple:
    """Standardised embeddings (Q, H) and clusters (Q,) of queries, as the router sees them.

    `embeddings` (Q, H) are the encoder's, which stand where it was not trained with the router.
    """
    if trained := router.facts.get("trained"):
        embeddings, _ = encoder.trained_further(trained).embed(queries)  # (Q, H)
    points = router.query_tower.standardise(embeddings.to(device))  # (Q, H)
    return points, router.query_tower.assign(points)


def run(args: argparse.Namespace, inputs, encoder, device, last, history: dict) -> None:
    """Encode, train, and test once; fills `history`, and writes it and the checkpoints as it goes."""
    runs.tune_cpu()
    split, whole, profiles, timing = inputs.split, inputs.whole, inputs.profiles, history["timing"]
    checkpoint, is_main = Path(args.output_dir) / "best_model.pt", processes.rank() == 0
    if last.saved is None and is_main:
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
        if improved and is_main:
            router.save(checkpoint, **router.facts)
            checkpoint.with_name("best_model.earlier.pt").unlink(missing_ok=True)
        if improved:
            history["best_epoch"], history["best_step"] = router.facts["epoch"], router.facts["step"]
        runs.write_history(args.output_dir, history)

    place = {query: i for i, query in enumerate(queries)}
    own = embeddings if whole is split else embeddings[[place[query] for query in split.train.queries]]  # (Q, H)
    router, *pretrained = fit(args, split, own, encoder, profiles, device, history, last, keep)
    trained = pretrained
    if args.finetune_encoder:  # from here on its encoder stands, as a frozen one does
        with runs.timed(timing, "encode"):
            trained = points_of(router, encoder, split.train.queries, own, device)  # (Q, H), (Q,)
    if is_main:
        from support.comparison import test

        test(args, split, router, trained, pretrained, history)
    if args.hold_out_model is not None:
        from support.cold_start import cold_start

        print(f"\nceiling  the same with the battles of {one_line(args.hold_out_model)}")
        with runs.timed(timing, "cold_start"):
            last = last.of("ceiling")
            beside = last.history | {"timing": {}, "data": history["data"]}
            ceiling, *_ = fit(args, whole, embeddings, encoder, profiles, device, beside, last, lambda *_: None)
            both = [(each, *points_of(each, encoder, queries, embeddings, device)) for each in (router, ceiling)]
            if is_main:
                history["cold_start"] = cold_start(args.hold_out_model, split, whole, *both, profiles, args.seed)


def train(args: argparse.Namespace) -> None:
    """Train in an output folder that is this process's alone, and go on there where a run was stopped."""
    from support.inputs import find_inputs, read_inputs

    if args.deterministic:
        runs.make_deterministic()
    runs.check_outputs(args.output_dir)
    truth, resume = find_inputs(args), vars(args).pop("resume")  # `args` are as if it had never stopped
    device, timing = runs.pick_device(args.device), {}
    inputs = read_inputs(args, timing)

    from support.cached_encoder import Encoder
    from support.resume import LastCheckpoint, experiment

    how = args.dtype, args.pooling, args.max_length, args.encode_tokens, cache_folder(args.cache_dir, args.no_cache)
    encoder = Encoder(args.model_path, device, *how)
    path, what = Path(args.output_dir) / "last_checkpoint.pt", experiment(vars(args), inputs.counts, encoder.usage)
    last = LastCheckpoint(path, what, args.epochs, args.checkpoint_minutes, resume, tower_epochs=args.tower_epochs or 0)
    history = {"status": "running", "args": vars(args)} | last.history
    history |= {"test_metrics": None, "test_intervals": None, "baselines": {}, "data": inputs.counts, "timing": timing}
    earlier = runs.read_history(args.output_dir)
    if resume:
        print(f"resume   {last.told}")
        if processes.from_main(processes.rank() == 0 and last.is_finished(earlier, vars(args))):
            print(f"finished already, with a test AUC of {earlier['test_metrics']['auc']:.4f}: {args.output_dir}")
            return
    elif earlier.get("status") != "finished" and any(each.is_file() for each in (path, path.with_suffix(".towers.pt"))):
        print("aside    an unfinished run, until this one writes its first checkpoint; --resume would go on with it")
    try:
        run(args, inputs, encoder, device, last, history)
        if truth is not None and processes.rank() == 0:
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
    if processes.rank() == 0:
        printing.print_test(history)


def main(argv: list[str] | None = None) -> None:
    """Train as the flags say. Raises `UserError` on anything the user can mend, `Stopped` on a signal."""
    args = parse_args(argv)
    with processes.joined():
        if processes.rank():
            train(args)
            return
        args.output_dir = str(make_folder(args.output_dir, "--output_dir"))
        with locked(Path(args.output_dir), "--output_dir"):
            train(args)


if __name__ == "__main__":
    run_command(main)
