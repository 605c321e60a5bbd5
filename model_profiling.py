"""Model tower: a learnable capability vector and an ID embedding per model, mapped into the shared space."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

SMOOTHING = 20.0  # battles' worth of prior that a model is in a cluster what it is overall
WIDE, NARROW = 100.0, 0.01  # prior variance of overall strengths: where no model tells how far they spread; at least


class ModelTower(nn.Module):
    """Maps every routed model to a vector of the shared space.

    A model's capability vector (`capability_dim` wide) and its ID embedding (`embedding_dim` wide) are concatenated
    and combined by an MLP. Either part can be left out (`use_capability`, `use_model_id`), not both: raises
    `ValueError` then. Where both are there, a model's ID embedding is replaced in a training step, with probability
    `id_dropout`, by one that all unknown models share: so the capability vector alone must carry a model that
    training has not seen.
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
            nn.Linear(width, embedding_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(embedding_dim, embedding_dim),
        )
        if use_capability:  # 0 where a benchmark says nothing of a model: there its vector stays 0
            self.register_buffer("capability_mask", torch.ones(num_models, capability_dim))
        self.unknown_id = nn.Parameter(torch.zeros(embedding_dim)) if self.id_dropout else None

    @torch.no_grad()
    def set_capabilities(self, vectors: torch.Tensor) -> None:
        """Begin with these capability vectors (M, C), NaN where one has no value."""
        self.capability_mask.copy_(~vectors.isnan())
        self.capability.weight.copy_(vectors.nan_to_num(0.0))

    @torch.no_grad()
    def add_model(self, vector: torch.Tensor) -> None:
        """A model more, of this capability vector (C,), NaN where it has no value, and the unknown models' ID."""
        self.capability_mask = torch.cat([self.capability_mask, (~vector.isnan()).float()[None]])  # (M + 1, C)
        self.capability = _with_row(self.capability, vector.nan_to_num(0.0))
        if self.model_id is not None:
            self.model_id = _with_row(self.model_id, self.unknown())

    def unknown(self) -> torch.Tensor:
        """The ID embedding (E,) of a model that training did not see: its own, or the mean where none was learned."""
        return self.model_id.weight.mean(0) if self.unknown_id is None else self.unknown_id  # (E,)

    def features(self) -> torch.Tensor:
        """What the MLP combines of each model: float (M, C + E)."""
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
        """`features` (m, C + E) of models of these capability vectors (m, C) that training has not seen."""
        if self.model_id is None:
            return vectors
        return torch.cat([vectors, self.unknown().expand(len(vectors), -1)], dim=1)  # (m, C + E)

    def forward(self) -> torch.Tensor:
        """All models in the shared space: float (M, D)."""
        return self.mlp(self.features())  # (M, D)


def _with_row(embedding: nn.Embedding, row: torch.Tensor) -> nn.Embedding:
    return nn.Embedding.from_pretrained(torch.cat([embedding.weight, row[None]]))


def win_rate_profiles(
    cluster_idx: torch.Tensor,
    models: torch.Tensor,
    outcome: torch.Tensor,
    num_models: int,
    num_clusters: int,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Smoothed log-odds of each model of beating an average one, per cluster of queries: float64 (M, K).

    A win counts by who was beaten: these are Bradley-Terry strengths, a model's overall strength and its deviation in
    each cluster, which is drawn to 0 as by `SMOOTHING` battles. A tie is half a win of each side.

    Args:
        cluster_idx: int64 (N,), of each battle's query.
        models: int64 (N, 2), a and b of each battle.
        outcome: float (N,), P(a is better).
        known: profiles (L, K) of the first L models, which stay as they are; the rest are drawn to their mean, within
            the spread of theirs. Without battles, a model's profile is that mean.

    Source: Bradley and Terry, "Rank analysis of incomplete block designs", Biometrika 1952.
    """
    numbers = (cluster_idx * num_models + models[:, 0]) * num_models + models[:, 1]  # (N,)
    cells, cell = numbers.unique(return_inverse=True)  # (C,), (N,): battles of a cell differ in the outcome alone
    cluster, a, b = cells // num_models**2, cells // num_models % num_models, cells % num_models  # (C,) each
    fought, won = cell.bincount().double(), cell.bincount(outcome.double())  # (C,) each
    known = torch.zeros(0, num_clusters) if known is None else known  # (L, K)
    centre = known.double().mean(0) if len(known) else torch.zeros(num_clusters)  # (K,)
    variance = max(known.double().mean(1).var().item(), NARROW) if len(known) > 1 else WIDE

    def profiles(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([known.double(), centre + x[:, :1] + x[:, 1:]])  # (M, K)

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        strength = profiles(x)  # (M, K)
        d = strength[a, cluster] - strength[b, cluster]  # (C,)
        prior = x[:, 0].square().sum() / variance + x[:, 1:].square().sum() * SMOOTHING / 4  # p (1 - p) of a battle
        return (won * F.softplus(-d) + (fought - won) * F.softplus(d)).sum() + prior / 2

    return profiles(_minimise(loss_of, (num_models - len(known), 1 + num_clusters)))


def fitted_vector(
    vectors: torch.Tensor, spread: float, loss_of: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The capability vector, float64 (C,), of least loss, a priori one more of the kind of `vectors` (M, C).

    `loss_of` takes a vector and returns the sum of battles' -log p. The prior is the Gaussian of the vectors' mean and
    covariance, the deviations times `spread`: few battles leave a vector near the mean, and in the space of the others.
    """
    centre = vectors.double().mean(0)  # (C,)
    deviations = (vectors.double() - centre) * spread / max(1, len(vectors) - 1) ** 0.5  # (M, C)
    best = _minimise(lambda z: loss_of(centre + z @ deviations) + z.square().sum() / 2, (len(vectors),))  # (M,)
    return centre + best @ deviations  # (C,)


def _minimise(loss_of: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Where a smooth loss is least, float64 of that shape, by L-BFGS from 0."""
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [x], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = loss_of(x)
        loss.backward()
        return loss

    optimiser.step(closure)
    return x.detach()
