"""Adding a model without retraining: its capability vector from battles, with all weights frozen."""

import copy
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from data_loader import query_ids
from model_profiling import fitted_vector, win_rate_profiles
from rankrouter import RankRouter
from support.data.battles import COLUMNS, Battles, count_wins, outcomes
from support.data.layouts import listed
from support.system.errors import UserError, one_line


def add_from_battles(router: RankRouter, name: str, battles: Battles, source: dict | None = None) -> Battles:
    """Add a model to a trained router from its battles against models that it knows; nothing is retrained.

    Their queries count as seen by the router. `source` is recorded of them, beside their number. Returns those battles,
    all as single ones. Raises `UserError` where there are none, or the name cannot be new.
    """
    router.check_new_name(name)
    own = battles_of(battles, name, router.model_names)
    if not len(own):
        problem = f"no battle of {one_line(name)} against a model of the router"
        raise UserError(f"there is {problem}; models in the battles: {listed(map(one_line, battles.model_names))}")
    queries = [own.queries[i] for i in own.unique_queries]  # (Q,)
    x, cluster_idx = router.embed(queries)  # (Q, F), (Q,)
    _, opponents, outcome = in_view_of(name, own, router)  # (n,) each
    row = own.query_rows  # (n,)
    vector = vector_from_battles(router, x[row], cluster_idx[row], opponents, outcome)  # (C,)
    router.add_model(name, vector, {"from": "battles", "battles": len(own)} | (source or {}))
    seen = torch.cat([router.metadata.seen_queries, torch.from_numpy(query_ids(queries))]).unique()  # (Qs,)
    router.metadata = replace(router.metadata, seen_queries=seen)
    return own


def battles_of(battles: Battles, name: str, known: list[str]) -> Battles:
    """The battles of a model against the models of `known`, all as single ones; none where it has no battle."""
    is_model = np.array([other == name for other in battles.model_names])  # (M,)
    is_other = np.array([other in known for other in battles.model_names]) & ~is_model  # (M,)
    a, b = battles.model_a_idx, battles.model_b_idx  # (N,) each
    single = battles.select(is_model[a] & is_other[b] | is_other[a] & is_model[b], None)
    if battles.table is None or not is_model.any():
        return single
    model, others = np.flatnonzero(is_model), np.flatnonzero(is_other)  # (1,), (m,)
    outcome = outcomes(battles.table.scores[:, model], battles.table.scores[:, others], battles.ties)  # (R, m)
    row, which = (~np.isnan(outcome)).nonzero()  # (n,) each
    won = outcome[row, which].astype(np.float32)  # (n,)
    columns = battles.table.query_idx[row], model.repeat(len(row)), others[which], won  # (n,) each
    return single.concatenate(replace(single, **dict(zip(COLUMNS, columns, strict=True))))


def in_view_of(name: str, battles: Battles, router) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, opponents and P(the model is better) of a model's battles, (n,) each, for `vector_from_battles`."""
    is_a = battles.model_a_idx == battles.model_names.index(name)  # (n,)
    opponent_idx = np.where(is_a, battles.model_b_idx, battles.model_a_idx)  # (n,)
    opponents = router.indices([battles.model_names[i] for i in opponent_idx])  # (n,)
    outcome = np.where(is_a, battles.outcome, 1 - battles.outcome)  # (n,)
    return tuple(torch.from_numpy(column) for column in (battles.query_idx, opponents, outcome.astype(np.float64)))


def vector_from_battles(
    router, x: torch.Tensor, cluster_idx: torch.Tensor, opponents: torch.Tensor, outcome: torch.Tensor
) -> torch.Tensor:
    """The capability vector (C,) of a new model from n battles, float64; the router is unchanged.

    For a router whose capability vectors started as win rates it is the new model's win-rate profile, computed as in
    training. Otherwise it is the vector most probable under the router's win probabilities and a prior that it
    resembles those of the known models.

    Args:
        x: standardized features of the battles' queries (n, F).
        cluster_idx: their clusters, int64 (n,).
        opponents: int64 (n,), into the router's models.
        outcome: float (n,), P(the new model is better).
    """
    clusters, opponents = cluster_idx.cpu(), opponents.cpu()  # (n,) each; some devices have no float64
    profiles = router.metadata.profiles
    if profiles["kind"] == "win_rate":
        known = profiles["known"]  # (M, K)
        new = np.full(len(outcome), len(known))  # (n,)
        wins = count_wins(clusters.numpy(), new, opponents.numpy(), outcome.numpy(), len(known) + 1)
        return win_rate_profiles(wins, len(known) + 1, known.shape[1], known)[-1]  # (K,)
    if not len(outcome):
        return router.model_tower.capability.weight.mean(0).cpu().double()  # (C,)
    without_encoder = {id(router.encoder): None}  # deepcopy takes None for its copy
    router = copy.deepcopy(router, without_encoder).eval().requires_grad_(False).cpu().double()
    q, tower = router.query_tower(x.cpu().double(), clusters), router.model_tower  # (n, D)
    opponent_scores = router.similarity(q, tower()).gather(1, opponents[:, None])[:, 0]  # (n,)

    def loss_of(vector: torch.Tensor) -> torch.Tensor:
        scores = router.similarity(q, tower.mlp(tower.unknown_features(vector[None])))[:, 0]  # (n,)
        d = (scores - opponent_scores) / router.temperature  # (n,)
        return F.binary_cross_entropy_with_logits(d, outcome, reduction="sum")

    return fitted_vector(tower.capability.weight, _spread(router), loss_of)  # (C,)


def _spread(router) -> float:
    """Standard deviation of the known models' scores, relative to theirs with the ID of unknown models: 0.01 to 100.

    A new model has no ID embedding of its own, so its vector must also express what known models express by their IDs.
    The scores are means over the centroids, or are taken at the mean query where there are no centroids.
    """
    x, tower = router.query_tower.centroids, router.model_tower  # (K, F)
    if not len(x):
        x = torch.zeros_like(router.query_tower.mean)[None]  # (1, F)
    q = router.query_tower(x, torch.arange(len(x)))  # (K, D)
    known = router.similarity(q, tower())  # (K, M)
    unknown = router.similarity(q, tower.mlp(tower.unknown_features(tower.capability.weight)))  # (K, M)
    ratio = known.mean(0).std() / unknown.mean(0).std()
    return float(ratio.nan_to_num(1.0).clamp(0.01, 100.0))
