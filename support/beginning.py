"""What training begins with: a router, its batches, its optimiser."""

import argparse
from collections.abc import Callable

import torch

from model_profiling import win_rate_profiles
from rankrouter import RankRouter
from support import printing, processes
from support.batches import BattleBatches, QueryBatches, to_tensors
from support.profiles import standardise


def capability_profiles(args: argparse.Namespace, split, cluster_idx: torch.Tensor, profiles) -> tuple:
    """What capability vectors begin with, (M, C) with NaN where a value is missing, or None where they are random.

    Returns also what a checkpoint must know to give a new model a vector of that kind.
    """
    names = split.train.model_names
    if profiles is not None:
        facts = profiles.facts(names)
        return torch.from_numpy(standardise(profiles.of(names, args.allow_missing_profiles), facts)), facts
    if args.capability_init == "random":
        return None, {"kind": "random"}
    query, models, outcome = to_tensors(split.train, "cpu")
    known = win_rate_profiles(cluster_idx.cpu()[query], models, outcome, len(names), args.num_clusters)  # (M, K)
    return known, {"kind": "win_rate", "known": known}


def begin_router(
    args: argparse.Namespace, split, embeddings: torch.Tensor, profiles, device, last, towers: RankRouter | None = None
) -> tuple:
    """A router for the split's models, the same in all processes, from embeddings (Q, H) of its queries.

    Statistics, clusters and vectors see training queries only. Where `last` has them of a run that goes on, statistics
    and clusters are those; else it is told of them. It begins with the weights of `towers`, where there are such.
    Returns also the standardised embeddings (Q, H), their clusters (Q,), and the facts of the vectors.
    """
    torch.manual_seed(args.seed)
    router = RankRouter(split.train.model_names, embeddings.shape[1], vars(args))
    tower, trained_on = router.query_tower, torch.from_numpy(split.train.fought[0])  # (Qt,)
    if last.saved:
        last.begin_again(tower)
    elif towers:
        router.load_state_dict(towers.state_dict())
    elif processes.rank() == 0:
        tower.fit(embeddings[trained_on], args.seed)
    processes.broadcast(list(router.state_dict().values()))
    last.beginning = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    points = tower.standardise(embeddings.to(device))  # (Q, H)
    cluster_idx = tower.to(device).assign(points)  # (Q,)
    vectors, facts = capability_profiles(args, split, cluster_idx, profiles)  # (M, C)
    if vectors is not None and not towers:
        router.model_tower.set_capabilities(vectors)
    if args.freeze_capabilities:
        router.model_tower.capability.weight.requires_grad_(False)
    router.to(device)
    if processes.rank():  # dropout of its own; the first goes on as if it were alone
        torch.manual_seed(args.seed + processes.rank())
    processes.broadcast(list(router.state_dict().values()))
    return router, points, cluster_idx, facts


def begin_batches(args: argparse.Namespace, split, router, points, cluster_idx, encoder, timing: dict):
    """Batches of battles; or of queries, where the encoder is to be trained, of which the cost is told then."""
    if not args.finetune_encoder:
        return BattleBatches(points, cluster_idx, to_tensors(split.train, points.device), args.batch_size)
    learner = encoder.learner(args.finetune_layers, args.lora_rank, args.gradient_checkpointing)
    how = args.pooling, args.max_length, args.batch_tokens, args.accumulate
    batches = QueryBatches(split, router.query_tower, cluster_idx, learner, *how)
    timing["tokens_per_epoch"], timing["tokens_per_second"] = int(batches.lengths.sum()), batches.tokens_per_second()
    printing.print_cost(batches.learned, timing["tokens_per_epoch"], timing["tokens_per_second"], args.epochs)
    return batches


def begin_optimiser(args: argparse.Namespace, router, batches, progress: Callable[[], float]):
    """AdamW on the towers and on what learns of the encoder, if anything does.

    Then, gradients are clipped together, and learning rates rise to theirs and fall to 0, by the `progress` of the
    training from 0 to 1.
    """
    groups = [{"params": list(router.parameters()), "lr": args.lr}]
    if batches.learned:
        groups.append({"params": list(batches.learned.values()), "lr": args.encoder_lr})
    optimiser = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
    if batches.learned:
        weights = [weight for group in groups for weight in group["params"]]

        def before_step(optimiser, *_) -> None:
            torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
            factor = min(progress() / args.warmup if args.warmup else 1.0, (1 - progress()) / (1 - args.warmup))
            for group, lr in zip(optimiser.param_groups, (args.lr, args.encoder_lr), strict=True):
                group["lr"] = lr * factor

        optimiser.register_step_pre_hook(before_step)
    return optimiser
