"""What battles say of a model that training did not see: its capability vector, all else frozen."""

import copy

import numpy as np
import torch
import torch.nn.functional as F

from model_profiling import fitted_vector, win_rate_profiles


def battles_of(battles, name: str, known: list[str]):
    """The battles of a model against those of `known`; none where it has no battle."""
    number = battles.model_names.index(name) if name in battles.model_names else -1
    others = set(known) - {name}
    opponents = [place for place, other in enumerate(battles.model_names) if other in others]
    a, b = battles.model_a_idx, battles.model_b_idx  # (N,) each
    return battles.select((a == number) & np.isin(b, opponents) | (b == number) & np.isin(a, opponents))


def in_view_of(name: str, battles, router) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, opponents and P(it is better) of a model's battles, (n,) each: for `vector_from_battles`."""
    is_a = battles.model_a_idx == battles.model_names.index(name)  # (n,)
    opponent_idx = np.where(is_a, battles.model_b_idx, battles.model_a_idx)  # (n,)
    opponents = router.indices([battles.model_names[i] for i in opponent_idx])  # (n,)
    outcome = np.where(is_a, battles.outcome, 1 - battles.outcome)  # (n,)
    return tuple(torch.from_numpy(column) for column in (battles.query_idx, opponents, outcome.astype(np.float64)))


def vector_from_battles(
    router, points: torch.Tensor, cluster_idx: torch.Tensor, opponents: torch.Tensor, outcome: torch.Tensor
) -> torch.Tensor:
    """The capability vector (C,) of a new model from n battles, float64; the router stays as it is.

    A win-rate profile is computed as in training, with the other models' as they began there. Any other vector is
    fitted: the likeliest, by the router's probabilities, of those that are like the known ones.

    Args:
        points, cluster_idx: of the battles' queries, (n, H) and (n,).
        opponents: int64 (n,), into the router's models.
        outcome: float (n,), P(the new model is better).
    """
    clusters, opponents = cluster_idx.cpu(), opponents.cpu()  # (n,) each; some devices know no float64
    if router.facts["profiles"]["kind"] == "win_rate":
        known = router.facts["profiles"]["known"]  # (M, K)
        models = torch.stack([torch.full_like(opponents, len(known)), opponents], dim=1)  # (n, 2)
        return win_rate_profiles(clusters, models, outcome, len(known) + 1, known.shape[1], known)[-1]  # (K,)
    if not len(outcome):
        return router.model_tower.capability.weight.mean(0).cpu().double()  # (C,)
    without_encoder = {id(router.encoder): None}  # a deep copy takes None for it
    router = copy.deepcopy(router, without_encoder).eval().requires_grad_(False).cpu().double()
    q, tower = router.query_tower(points.cpu().double(), clusters), router.model_tower  # (n, D)
    theirs = router.similarity(q, tower()).gather(1, opponents[:, None])[:, 0]  # (n,)

    def loss_of(vector: torch.Tensor) -> torch.Tensor:
        ours = router.similarity(q, tower.mlp(tower.unknown_features(vector[None])))[:, 0]  # (n,)
        d = (ours - theirs) / router.temperature  # (n,)
        return F.binary_cross_entropy_with_logits(d, outcome, reduction="sum")

    return fitted_vector(tower.capability.weight, _spread(router), loss_of)  # (C,)


def _spread(router) -> float:
    """How much further known models lie apart than they would if they were as unknown as a new one: 0.01 to 100.

    A new model's ID tells nothing of it, so its vector must be allowed to say what theirs leave to their IDs. Measured
    in mean scores at the centroids, or at the mean query where there are none.
    """
    points, tower = router.query_tower.centroids, router.model_tower  # (K, H)
    if not len(points):
        points = torch.zeros_like(router.query_tower.mean)[None]  # (1, H)
    q = router.query_tower(points, torch.arange(len(points)))  # (K, D)
    known = router.similarity(q, tower())  # (K, M)
    unknown = router.similarity(q, tower.mlp(tower.unknown_features(tower.capability.weight)))  # (K, M)
    ratio = known.mean(0).std() / unknown.mean(0).std()
    return float(ratio.nan_to_num(1.0).clamp(0.01, 100.0))
