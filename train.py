"""Train RankRouter on battles between models and keep the checkpoint with the best validation AUC."""

from support.system.command_line import run_command
from support.training.options import parse_args, parse_flags, router_options

if __name__ == "__main__":
    run_command(parse_args)  # --help and mistyped flags are answered before torch is imported

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import metrics
from data_loader import Split, query_ids
from loss import LOSSES, link_margin
from model_profiling import initial_capabilities
from query_representation import SURFACE_FEATURES, query_features
from rankrouter import Metadata, RankRouter, RouterConfig
from support.data.battles import Battles
from support.data.demo import true_skills
from support.evaluation import baselines
from support.evaluation.cold_start import cold_start, held_out_battles
from support.evaluation.comparison import TestEvaluation, compare_with_truth, describe_clusters
from support.evaluation.cost import find_prices
from support.evaluation.guard import GuardedRows
from support.reporting import console
from support.system import device, distributed, signals
from support.system.errors import UserError
from support.system.files import cache_folder, locked, make_folder
from support.training.batches import BattleBatches, QueryBatches
from support.training.checkpoint import Checkpoint, TrainingState, check_outputs, experiment
from support.training.history import Best, History
from support.training.inputs import Data, Encoder, find_inputs, load_data, make_encoder
from support.training.items import make_items
from support.training.optimization import EMA, make_optimizer, set_learning_rates, warmup_then_decay


@dataclass(frozen=True)
class Run:
    """The parts of a run that all its steps share."""

    args: argparse.Namespace
    data: Data
    encoder: Encoder
    history: History
    checkpoint: Checkpoint
    tower_threads: int  # of frozen training and baselines; the encoder's are torch's
    prices: dict[str, float] | None = None  # of each model per query


def main(argv: list[str] | None = None) -> None:
    """Train as the flags say. Raises `UserError` on anything the user can fix, `Stopped` on a signal."""
    run_training(parse_args(argv))


def train_router(
    battles: Battles | str | Path,
    model_path: str | Path | None = None,
    output_dir: str | Path = "./outputs",
    *,
    loss_type: str = "bpr",
    epochs: int = 10,
    seed: int = 42,
    **flags,
) -> RankRouter:
    """Train a router as the command does, with its output in `output_dir`, and return it, ready to rank.

    The result of the test is in `training_history.json` there; `resume=True` continues a run that was stopped. As with
    the command, the global random state of torch is seeded, and denormal numbers are flushed to zero: one training at a
    time in a process.

    Args:
        battles: in memory, such as `Battles.from_tuples` makes them, or the path of a file, a folder, or a glob.
        model_path: the encoder, a Hugging Face folder or hub id; None with `embeddings`, a file of them.
        output_dir: folder of history and checkpoints; a finished run there is replaced.
        loss_type: a name of `loss.LOSSES`.
        epochs: passes over the training battles.
        seed: of the split, clusters, weights, batches and bootstrap.
        flags: all other flags of docs/options.md by name, such as `num_clusters=8` or `baselines="all"`.

    Raises `UserError` on anything the user can fix.
    """
    if not isinstance(battles, (Battles, str, Path)):
        raise UserError(f"battles are {type(battles).__name__}; expected a path, or Battles, as of Battles.from_tuples")
    in_memory = isinstance(battles, Battles)
    flags |= {"loss_type": loss_type, "epochs": epochs, "seed": seed, "model_path": model_path}
    args = parse_flags(**flags, output_dir=output_dir, data_path=None if in_memory else battles)
    run_training(args, battles if in_memory else None)
    router = RankRouter.load(args.output_dir)
    if args.embeddings is not None:
        router.open_embeddings(args.embeddings)
    else:
        cache_dir = cache_folder(args.cache_dir, args.no_cache)
        router.open_encoder(args.model_path, device.pick_device(args.device), cache_dir=cache_dir)
    return router


def run_training(args: argparse.Namespace, battles: Battles | None = None) -> None:
    """Train as the flags say, on battles in memory if there are any; one process writes to the output folder."""
    if args.loss_type not in LOSSES:
        raise UserError(f"--loss_type {args.loss_type!r} is unknown; expected one of {', '.join(LOSSES)}")
    with device.deterministic(args.deterministic), distributed.init():
        if distributed.rank():
            train(args, battles)
            return
        args.output_dir = str(make_folder(args.output_dir, "--output_dir"))
        with locked(Path(args.output_dir), "--output_dir"):
            train(args, battles)


def train(args: argparse.Namespace, battles: Battles | None) -> None:
    """Load data and encoder, start or resume the run, and print its test; the history records the outcome."""
    resume, overwrite = vars(args).pop("resume"), vars(args).pop("overwrite")  # not part of the experiment
    prompt = vars(args).pop("query_prompt")  # resolved below
    check_outputs(args.output_dir, resume, overwrite)
    demo = find_inputs(args, battles)
    timing, chosen_device = device.Timing(), device.pick_device(args.device)
    with timing("load"):
        data = load_data(args, battles)
    console.print_data(data.counts)
    prices = None if args.prices is None else find_prices(args.prices, args.tokens_per_query, data.full_split)
    if data.profiles is not None:
        console.print_profiles(data.profiles, data.full_split.train.model_names)
    if args.hold_out_model is not None:
        held_out_battles(args.hold_out_model, data.split, data.full_split)  # raises where there are none
    encoder = make_encoder(args, prompt, chosen_device, data.full_split.train.queries)
    console.print_encoder(encoder.description)
    data.counts["surface_features"] = list(SURFACE_FEATURES) if args.surface_features else []
    history = History(args.output_dir, vars(args), data.counts, timing)
    checkpoint = Checkpoint(history, experiment(vars(args), data.counts, encoder.usage), resume=resume)
    if resume and console.print_resume(checkpoint.message, checkpoint.finished_auc(), args.output_dir):
        return
    device.tune_cpu()
    tower_threads = device.tower_threads(args.threads)
    with history.recorded(), device.threads(args.threads or torch.get_num_threads()):
        run_method(Run(args, data, encoder, history, checkpoint, tower_threads, prices), demo)
    if distributed.rank() == 0:
        console.print_test(history.as_dict())


def run_method(run: Run, demo: Path | None) -> None:
    """Encode the queries, train the router, test it once; with a held-out model, train once more and compare."""
    args, data, encoder, history = run.args, run.data, run.encoder, run.history
    queries, split = data.full_split.train.queries, data.split
    surface_names = tuple(data.counts["surface_features"])
    config = RouterConfig(surface_features=surface_names, **router_options(args))
    features = encode(run, queries, surface_names)  # (Q, F)
    run.checkpoint.start()  # an earlier run's checkpoints are kept until here
    row_of_query = {query: i for i, query in enumerate(queries)}
    split_features = features[[row_of_query[query] for query in split.train.queries]]  # (Q, F)
    router, *pretrained = train_towers_and_encoder(run, config, split, split_features)
    with history.timing("encode"):
        inputs = represent(router, encoder, split.train.queries, split_features)  # (Q, F), (Q,)
    if distributed.rank() == 0:
        test(run, router, inputs, pretrained)
        if demo is not None:
            skills = true_skills(demo, split.test.queries, split.test.model_names)  # (Q, M), (M,)
            auc = history.results["test_metrics"]["auc"]
            history.results["demo"] = compare_with_truth(split.test, *skills, auc)

    if args.hold_out_model is not None:  # compared with an upper bound: a router trained with that model's battles
        console.print_ceiling(args.hold_out_model)
        with history.timing("cold_start"):
            ceiling, *_ = train_towers_and_encoder(run, config, data.full_split, features, is_ceiling=True)
            both = [(each, *represent(each, encoder, queries, features)) for each in (router, ceiling)]
            if distributed.rank() == 0:
                history.results["cold_start"] = cold_start(
                    args.hold_out_model, split, data.full_split, *both, data.profiles, args.seed
                )


def encode(run: Run, queries: list[str], surface_names: tuple[str, ...]) -> torch.Tensor:
    """Features (Q, F) of distinct queries: their embeddings, and after them the surface features of these names."""
    encoder, history = run.encoder, run.history
    with history.timing("encode"):
        embeddings, num_encoded = encoder.embed(queries)  # (Q, H)
        encoder.release()  # training may need its network's memory
        features = query_features(queries, embeddings, surface_names)  # (Q, F)
    history.add_encoding(encoder, num_encoded, embeddings, run.tower_threads)
    console.print_encoding(encoder.metadata, history.as_dict()["timing"], run.args.max_length)
    return features


def train_towers_and_encoder(
    run: Run, config: RouterConfig, split: Split, features: torch.Tensor, is_ceiling: bool = False
) -> tuple:
    """Build a router and fit its towers on frozen features (Q, F); with --finetune_encoder then its encoder, too.

    Returns the router, and the standardized features (Q, F) and clusters (Q,) on which the towers were fitted.
    """
    args, history = run.args, run.history
    towers, finetuning = ("ceiling", "ceiling_encoder") if is_ceiling else ("towers", "encoder")
    router, x, cluster_idx = build(run, config, split, features, towers)
    items = make_items(split.train, x.device, run.data.counts["label_range"])
    batches = BattleBatches(x, cluster_idx, items, args.batch_size)
    if not args.finetune_encoder:
        with history.curves[towers].timing("train"), device.threads(run.tower_threads):
            fit(run, router, batches, split, phase=towers, epochs=args.epochs, patience=args.patience)
        return router, x, cluster_idx
    # Train the towers first; otherwise the encoder adapts to random towers.
    console.print_towers(args.tower_epochs)
    cuda = [run.encoder.device] if run.encoder.device.type == "cuda" else []
    # What follows has the same random numbers after any number of tower epochs.
    with torch.random.fork_rng(cuda), history.curves[towers].timing("train"), device.threads(run.tower_threads):
        fit(run, router, batches, split, phase=towers, epochs=args.tower_epochs, patience=None)
    trainable = run.encoder.trainable(args.finetune_layers, args.lora_rank, args.gradient_checkpointing)
    batches = QueryBatches(
        split.train,
        items,
        router,
        cluster_idx,
        trainable,
        tokens=args.batch_tokens,
        accumulate=args.accumulate,
    )
    tokens = int(batches.lengths.sum())
    history.counts.setdefault("tokens_per_epoch", tokens)
    console.print_finetuning(batches.parameters, tokens)
    with history.curves[finetuning].timing("train"):
        fit(run, router, batches, split, phase=finetuning, epochs=args.epochs, patience=args.patience)
    return router, x, cluster_idx


def build(run: Run, config: RouterConfig, split: Split, features: torch.Tensor, phase: str) -> tuple:
    """A router for the split's models, the same in all processes.

    Statistics, clusters and initial capability vectors are computed from training queries only.

    Returns also the standardized features (Q, F) of the split's queries, and their clusters (Q,).
    """
    args, names = run.args, split.train.model_names  # (M,)
    train_queries = torch.from_numpy(split.train.unique_queries)  # (Qt,)
    torch.manual_seed(args.seed)
    router = RankRouter(names, run.encoder.metadata["width"], config)
    with run.history.curves[phase].timing("cluster"):
        is_resumed = run.checkpoint.load_router(router, phase)  # with its statistics and centroids
        if not is_resumed and distributed.rank() == 0:
            router.query_tower.fit(features[train_queries], args.seed)
    distributed.broadcast(list(router.state_dict().values()))
    router.to(run.encoder.device)
    x, cluster_idx = router.query_tower.inputs(features.to(run.encoder.device))  # (Q, F), (Q,)
    vectors, profile_metadata = initial_capabilities(
        split.train,
        profiles=run.data.profiles,
        allow_missing=args.allow_missing_profiles,
        num_clusters=args.num_clusters if args.capability_init == "win_rate" else None,
        cluster_idx=cluster_idx.cpu(),
    )
    if vectors is not None and not is_resumed:
        router.model_tower.set_capabilities(vectors)  # (M, C)
    if args.freeze_capabilities:
        router.model_tower.capability.weight.requires_grad_(False)
    distributed.broadcast(list(router.state_dict().values()))
    if distributed.rank():  # each process draws its own dropout; rank 0 draws that of a run with one process
        torch.manual_seed(args.seed + distributed.rank())
    seen = np.union1d(split.train.unique_queries, split.val.unique_queries)  # (Qs,)
    router.metadata = Metadata(
        args=vars(args),
        encoder=run.encoder.metadata,
        content_hash=run.data.counts["content_hash"],
        seen_queries=torch.from_numpy(query_ids([split.train.queries[i] for i in seen])),  # (Qs,)
        profiles=profile_metadata,
        best_single_model=baselines.best_single_model(split),
        label_range=run.data.counts["label_range"],
    )
    if args.num_clusters:
        sizes = cluster_idx.cpu()[train_queries].bincount(minlength=args.num_clusters).tolist()  # (K,)
        run.history.add_clusters(sizes)
        console.print_clusters(sizes)
    return router, x, cluster_idx


@signals.deferred()  # a first signal waits for the end of the step
def fit(
    run: Run,
    router: RankRouter,
    batches: BattleBatches | QueryBatches,
    split: Split,
    *,
    phase: str,
    epochs: int,
    patience: int | None,
) -> None:
    """Train until epochs or patience run out; the router then has the weights of the best validation AUC."""
    args, history, checkpoint, curves = run.args, run.history, run.checkpoint, run.history.curves[phase]
    optimizer = make_optimizer(
        towers=router.parameters(),
        encoder=batches.parameters.values(),
        lr=args.lr,
        encoder_lr=args.encoder_lr,
        weight_decay=args.weight_decay,
    )
    # While an encoder is trained, weights are not averaged: learning rates decay to 0 instead.
    ema = EMA([] if batches.trains_encoder else list(router.parameters()), args.ema_decay)
    state = TrainingState(router, batches, optimizer, ema, curves, epochs)
    checkpoint.restore(state, phase)
    while state.epoch < epochs and not curves.out_of_patience(patience):
        for batch in console.with_progress(state.remaining_batches(), state):  # after a resume, inside an epoch
            loss = train_step(args, state, batch)
            ema.update()
            state.record(loss)
            if args.eval_every and state.step_in_epoch % args.eval_every == 0 and not state.epoch_is_over:
                validate(args, state, split, history)
                if curves.out_of_patience(patience):
                    break
            checkpoint.after_step(state)  # saves when it is time; raises `Stopped` after a signal
        if state.epoch_is_over:
            validate(args, state, split, history)
        else:  # patience ran out
            curves.end_epoch_early(state.mean_loss())
        state.next_epoch()
        checkpoint.save(state)
    if curves.out_of_patience(patience):
        print(f"stopped  no new best in {patience} validations")
    if curves.best is not None:
        router.load_state_dict(curves.best.weights)
        router.metadata = curves.best.metadata


def train_step(args: argparse.Namespace, state: TrainingState, batch: object) -> torch.Tensor:
    """One step of the optimizer on a batch; returns the mean loss of its battles, a scalar tensor."""
    router, batches, optimizer = state.router, state.batches, state.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not router.training:
        router.train()
    optimizer.zero_grad()
    mean_loss, num_battles = torch.zeros((), device=batches.device), batches.num_battles(batch)
    # This process's share: (b,), (B,), (B, 2) or with a pointwise loss (B, 1), (B,).
    for queries, row, models, outcome in batches.parts(batch):
        # Forward: the scores of all models for each query, then those of the two models of each battle.
        x, cluster_idx = batches.inputs(queries)  # (b, F), (b,)
        scores = router(x, cluster_idx)  # (b, M)
        compared = [scores[row, model] for model in models.unbind(1)]  # (B,) each
        # Loss: the mean over the battles of the whole batch, of which these are a part.
        losses = LOSSES[args.loss_type](*compared, outcome, args.margin)  # (B,)
        loss = losses.sum() / num_battles
        # Backward: the gradients of all parts add up.
        loss.backward()
        mean_loss += loss.detach()
    # All-reduce: the gradients of all processes add up, and what the centroids follow.
    distributed.all_reduce_gradients(parameters, mean_loss, *batches.cluster_sums)
    # With a trained encoder: clip the gradients of towers and encoder together; learning rates rise, then fall to 0.
    if batches.trains_encoder:
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        set_learning_rates(optimizer, warmup_then_decay(state.progress, args.warmup))
    # Step of AdamW, after which the centroids follow the encoder.
    optimizer.step()
    batches.update_centroids()
    return mean_loss


def validate(args: argparse.Namespace, state: TrainingState, split: Split, history: History) -> None:
    """Evaluate on the validation battles; the weights with the highest AUC are kept, the earliest of equals.

    They are the averaged weights where there is an average.
    """
    router, curves, val = state.router, state.curves, split.val_pairs
    step = None if state.epoch_is_over else state.step_in_epoch
    loss = state.mean_loss()
    with curves.timing("evaluate"), state.ema.applied():
        scores = state.scores(split.val.unique_queries)  # (Q, M)
        d = val.margins(scores)  # (N,)
        margin = link_margin(args.loss_type, args.margin)
        val_metrics = metrics.evaluate(d, val.outcome, val.model_a_idx, val.model_b_idx, margin)
        val_metrics = distributed.broadcast_from_rank0(val_metrics)
        is_best = curves.add(state.epoch, step, loss, val_metrics)
        if is_best:
            temperature = metrics.fit_temperature(d, val.outcome)
            fallback_idx = router.model_names.index(router.metadata.best_single_model)
            guard = GuardedRows(split.val, scores, fallback_idx, temperature)
            label_temperature, label_range = None, router.metadata.label_range
            if label_range is not None:  # with a pointwise loss scores are logits of the table's
                labels = split.val.table.labels(label_range)  # (R, M)
                label_temperature = metrics.fit_label_temperature(scores[split.val.table_query_rows], labels)
            router.metadata = replace(
                router.metadata,
                epoch=state.epoch,
                step=step,
                val_metrics=val_metrics,
                temperature=temperature,
                confidence=guard.choose_confidence(),
                label_temperature=label_temperature,
                trained=state.batches.finetuned_weights(args.finetune_layers, args.lora_rank),
            )
            weights = {name: weight.detach().clone() for name, weight in router.state_dict().items()}
            # Only the main training writes best_model.pt: not the towers before an encoder, nor the upper bound.
            if curves is history.main and distributed.rank() == 0:
                router.save(history.best_path)  # before `curves.best` changes: if it fails, the previous best remains
            curves.best = Best(weights, router.metadata)
    history.write()
    if is_best or step is None or state.batches.trains_encoder:
        console.print_validation(state.epoch, step, len(state.planned), loss, val_metrics, is_best)


def represent(router: RankRouter, encoder: Encoder, queries: list[str], features: torch.Tensor) -> tuple:
    """Standardized features (Q, F) and clusters (Q,) of queries as a trained router sees them.

    `features` (Q, F) are those with the pretrained encoder, for a router whose encoder was not finetuned.
    """
    if router.metadata.trained is not None:
        embeddings, _ = encoder.with_finetuned(router.metadata.trained).embed(queries)  # (Q, H)
        features = query_features(queries, embeddings, router.config.surface_features)  # (Q, F)
    return router.query_tower.inputs(features.to(encoder.device))  # (Q, F), (Q,)


def test(run: Run, router: RankRouter, inputs: tuple, pretrained: tuple) -> None:
    """Test the router once, and the baselines beside it.

    `inputs` are the standardized features (Q, F) and clusters (Q,) that the router sees, `pretrained` those that the
    baselines get: of the encoder before any finetuning.
    """
    args, split, history = run.args, run.data.split, run.history
    with history.timing("evaluate"):
        scores = router.score(*(column[split.test.unique_queries] for column in inputs))  # (Q, M)
        val_scores = router.score(*(column[split.val.unique_queries] for column in inputs))  # (Qv, M)
        evaluation = TestEvaluation(
            split,
            scores,
            val_scores,
            margin=link_margin(args.loss_type, args.margin),
            temperature=router.temperature,
            confidence=router.metadata.confidence,
            single_model=router.metadata.best_single_model,
            seed=args.seed,
            prices=run.prices,
        )
        history.results |= evaluation.results()
        if args.num_clusters:
            history.results["clusters"] = describe_clusters(router, *inputs, split.train)
    if args.baselines != "none":
        with history.timing("baselines"), device.threads(run.tower_threads):
            x, cluster_idx = (column.cpu().numpy() for column in pretrained)  # (Q, F), (Q,)
            fitted = baselines.fit(split, x, cluster_idx, args.num_clusters, args.baselines == "all", args.seed)
            history.results["baselines"] = evaluation.compare(fitted)


if __name__ == "__main__":
    run_command(main)
