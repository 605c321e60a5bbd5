"""Model tower: a learnable capability vector and an ID embedding per model, mapped into the shared space."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from support.data.battles import Battles, WinCounts
from support.data.benchmarks import Profiles, standardize

SMOOTHING = 20.0  # weight, in battles, of the prior that a model's strength in a cluster is its overall strength
WIDE_VARIANCE, MIN_VARIANCE = 100.0, 0.01  # prior variance of overall strengths: without known models; at least


class ModelTower(nn.Module):
    """Maps every routed model to a vector of the shared space.

    A model's capability vector (`capability_dim` wide) and its ID embedding (`embedding_dim` wide) are concatenated
    and combined by an MLP. Either part can be switched off (`use_capability`, `use_model_id`), but not both: that
    raises `ValueError`. With both parts, each training step replaces a model's ID embedding, with probability
    `id_dropout`, by a learned embedding that stands for any unknown model, so that the tower learns to represent a
    new model by its capability vector alone.
    """

    def __init__(
        self,
        num_models: int,
        embedding_dim: int = 512,
        capability_dim: int = 64,
        use_capability: bool = True,
        use_model_id: bool = True,
        dropout: float = 0.5,
        id_dropout: float = 0.0,
    ):
        super().__init__()
        if not (use_capability or use_model_id):
            raise ValueError("a model tower needs capability vectors, ID embeddings, or both")
        self.id_dropout = id_dropout if use_capability and use_model_id else 0.0
        self.capability = nn.Embedding(num_models, capability_dim) if use_capability else None
        self.model_id = nn.Embedding(num_models, embedding_dim) if use_model_id else None
        width = use_capability * capability_dim + use_model_id * embedding_dim
        self.mlp = nn.Sequential(
            nn.Linear(width, embedding_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(embedding_dim, embedding_dim)
        )
        if use_capability:  # 0 where a model has no value: its vector stays 0 there
            self.register_buffer("capability_mask", torch.ones(num_models, capability_dim))
        self.unknown_id = nn.Parameter(torch.zeros(embedding_dim)) if self.id_dropout else None

    @torch.no_grad()
    def set_capabilities(self, vectors: torch.Tensor) -> None:
        """Set the capability vectors (M, C), with NaN where a value is missing."""
        self.capability_mask.copy_(~vectors.isnan())
        self.capability.weight.copy_(vectors.nan_to_num(0.0))

    @torch.no_grad()
    def add_model(self, vector: torch.Tensor) -> None:
        """Append a model with a capability vector (C,), NaN where a value is missing, and the ID of unknown models."""
        self.capability_mask = torch.cat([self.capability_mask, (~vector.isnan()).float()[None]])  # (M + 1, C)
        self.capability = _with_row(self.capability, vector.nan_to_num(0.0))
        if self.model_id is not None:
            self.model_id = _with_row(self.model_id, self.unknown())

    def unknown(self) -> torch.Tensor:
        """The ID embedding (E,) of a model not seen in training: a learned one, or the mean of the known models'."""
        return self.model_id.weight.mean(0) if self.unknown_id is None else self.unknown_id  # (E,)

    def features(self) -> torch.Tensor:
        """The inputs of the MLP: capability vectors and ID embeddings, float (M, C + E)."""
        parts = []
        if self.capability is not None:
            parts.append(self.capability.weight * self.capability_mask)  # (M, C)
        if self.model_id is not None:
            ids = self.model_id.weight  # (M, E)
            if self.training and self.id_dropout:
                dropped = torch.rand(len(ids), 1, device=ids.device) < self.id_dropout  # (M, 1)
                ids = torch.where(dropped, self.unknown_id, ids)  # (M, E)
            parts.append(ids)
        return torch.cat(parts, dim=1)  # (M, C + E)

    def unknown_features(self, vectors: torch.Tensor) -> torch.Tensor:
        """`features` (m, C + E) of models not seen in training, from their capability vectors (m, C)."""
        if self.model_id is None:
            return vectors
        return torch.cat([vectors, self.unknown().expand(len(vectors), -1)], dim=1)  # (m, C + E)

    def forward(self) -> torch.Tensor:
        """All models in the shared space: float (M, D)."""
        return self.mlp(self.features())  # (M, D)


def _with_row(embedding: nn.Embedding, row: torch.Tensor) -> nn.Embedding:
    return nn.Embedding.from_pretrained(torch.cat([embedding.weight, row[None]]))


def win_rate_profiles(
    wins: WinCounts, num_models: int, num_clusters: int, known: torch.Tensor | None = None
) -> torch.Tensor:
    """Smoothed log-odds of each model of beating an average one, per cluster of queries: float64 (M, K).

    These are Bradley-Terry strengths, P(a beats b in cluster k) = sigmoid(s_ak - s_bk), so a win counts by the strength
    of the beaten model. s_mk is the overall strength of m plus its deviation in k, with Gaussian priors on both; the
    deviation shrinks to 0 as with `SMOOTHING` more battles. A tie is half a win of each side.

    Args:
        wins: of the battles, per cluster.
        known: profiles (L, K) of the first L models, which are kept. The prior of the others has their mean and the
            variance of their overall strengths. Without battles, a model's profile is that mean.

    Source: Bradley and Terry, "Rank analysis of incomplete block designs", Biometrika 1952.
    """
    cluster, a, b, won, lost = (torch.from_numpy(column) for column in wins)  # (C,) each
    known = torch.zeros(0, num_clusters) if known is None else known  # (L, K)
    center = known.double().mean(0) if len(known) else torch.zeros(num_clusters)  # (K,)
    variance = max(known.double().mean(1).var().item(), MIN_VARIANCE) if len(known) > 1 else WIDE_VARIANCE

    def profiles(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([known.double(), center + x[:, :1] + x[:, 1:]])  # (M, K)

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        strength = profiles(x)  # (M, K)
        d = strength[a, cluster] - strength[b, cluster]  # (C,)
        prior = x[:, 0].square().sum() / variance + x[:, 1:].square().sum() * SMOOTHING / 4  # p (1 - p) = 1/4
        return (won * F.softplus(-d) + lost * F.softplus(d)).sum() + prior / 2

    return profiles(_minimize(loss_of, (num_models - len(known), 1 + num_clusters)))


def fitted_vector(
    vectors: torch.Tensor, spread: float, loss_of: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The most probable capability vector of a new model, float64 (C,), under a Gaussian prior.

    The prior has the mean of the known `vectors` (M, C) and `spread`² times their covariance, so with few battles the
    new vector stays near the mean, and always in the span of the known ones. `loss_of` takes a vector (C,) and returns
    the sum of -log p over the new model's battles.
    """
    center = vectors.double().mean(0)  # (C,)
    deviations = (vectors.double() - center) * spread / max(1, len(vectors) - 1) ** 0.5  # (M, C)
    best = _minimize(lambda z: loss_of(center + z @ deviations) + z.square().sum() / 2, (len(vectors),))  # (M,)
    return center + best @ deviations  # (C,)


def _minimize(loss_of: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The minimum of a smooth loss by L-BFGS from 0: float64 of that shape."""
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [x], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return x.detach()


def initial_capabilities(
    battles: Battles,
    profiles: Profiles | None,
    allow_missing: bool,
    cluster_idx: torch.Tensor,
    num_clusters: int | None,
) -> tuple[torch.Tensor | None, dict]:
    """Initial capability vectors, float64 (M, C), NaN where a value is missing; None for random ones.

    Returns also what a checkpoint needs to compute a new model's vector.

    Args:
        battles: the training battles.
        profiles: benchmark scores, from which vectors are standardized.
        allow_missing: whether `profiles` may lack a model.
        cluster_idx: cluster of each query, int64 (Q,).
        num_clusters: without `profiles`, vectors are the `win_rate_profiles` of these clusters; None: random.
    """
    names = battles.model_names
    if profiles is not None:
        statistics = profiles.statistics(names)
        return torch.from_numpy(standardize(profiles.of(names, allow_missing), statistics)), statistics  # (M, C)
    if num_clusters is None:
        return None, {"kind": "random"}
    known = win_rate_profiles(battles.win_counts(cluster_idx.numpy()), len(names), num_clusters)  # (M, K)
    return known, {"kind": "win_rate", "known": known}
