"""Batches of a training: of battles on frozen embeddings, or of queries from which an encoder is trained."""

from typing import NamedTuple

import numpy as np
import torch

from data_loader import Battles
from query_representation import QueryEncoder, QueryTower
from support.encoding.batching import plan_batches
from support.system import distributed
from support.system.errors import UserError

WINDOW = 16  # batches' worth of randomly drawn queries, among which those of similar length share a batch
MEMORY = 50  # a centroid is the running mean of about this many of its queries, those seen last
# An encoder is trained through a dimension only if its standard deviation is at least this share of the median one:
# some encoders have dimensions with 1e-32, and standardization divides gradients by it.
MIN_RELATIVE_SCALE = 1e-3


class Part(NamedTuple):
    """A part of a batch that is computed at once: b queries with their B battles."""

    queries: torch.Tensor  # int64 (b,)
    row: torch.Tensor | slice  # int64 (B,), the row of each battle's query among the b
    models: torch.Tensor  # int64 (B, 2), a and b
    outcome: torch.Tensor  # float (B,), P(a is better)


def to_tensors(battles: Battles, device: str | torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Battles as tensors: query (N,), models a and b (N, 2), outcome (N,)."""
    columns = (battles.query_idx, np.column_stack([battles.model_a_idx, battles.model_b_idx]), battles.outcome)
    return tuple(torch.from_numpy(column).to(device) for column in columns)


class BattleBatches:
    """Batches of `batch_size` battles, split among the processes, on queries whose embeddings are frozen.

    Args:
        x: standardized embeddings, float (Q, H).
        cluster_idx: their clusters, int64 (Q,).
        battles: the training battles.
        batch_size: battles per step.
    """

    def __init__(self, x: torch.Tensor, cluster_idx: torch.Tensor, battles: Battles, batch_size: int):
        self.x, self.cluster_idx, self.batch_size = x, cluster_idx, batch_size
        self.trains_encoder, self.parameters, self.cluster_sums = False, {}, []
        self.battles, self.device = to_tensors(battles, x.device), x.device
        self.count = len(battles)  # items that an epoch shuffles

    def plan(self, order: torch.Tensor) -> list[tuple]:
        """The batches of an epoch with the battles in this order (N,)."""
        order = order.to(self.device)  # (N,)
        return list(zip(*(column[order].split(self.batch_size) for column in self.battles), strict=True))

    def num_battles(self, batch: tuple) -> int:
        """The number of battles of a batch, in all processes."""
        return len(batch[0])

    def parts(self, batch: tuple) -> list[Part]:
        """This process's parts of a batch."""
        if distributed.size() > 1:
            batch = [column.tensor_split(distributed.size())[distributed.rank()] for column in batch]  # (b, ...)
        query, models, outcome = batch  # (b,), (b, 2), (b,)
        return [Part(query, slice(None), models, outcome)] if len(query) else []

    def embed(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardized embeddings (b, H) and clusters (b,) of queries (b,)."""
        return self.x[queries], self.cluster_idx[queries]

    def embed_for_evaluation(self, queries: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of any queries of the split (q,)."""
        return self.embed(torch.from_numpy(queries).to(self.device))

    def update_centroids(self) -> None:
        """Nothing to do: frozen embeddings stay where they are."""

    def finetuned_weights(self, layers: int | None, lora_rank: int | None) -> None:
        """None: the encoder is frozen."""


class QueryBatches:
    """Batches of queries of similar length, each encoded once per epoch by the encoder as it is, with all its battles.

    A step takes queries of at most `tokens` tokens once padded, split among the processes, and in each into
    `accumulate` parts, to save memory. Neither changes what is learned: the encoder's own dropout stays off.

    Standardization stays that of the pretrained encoder, so there is one space throughout. In it a centroid follows
    the training queries that K-means assigned to it, so that a cluster keeps its meaning while the encoder changes: it
    is a running mean of their embeddings, over the last `MEMORY` seen, or over as many as there are.

    Args:
        battles: the training battles; `queries` are all of the split.
        tower: the query tower, with its statistics and centroids.
        cluster_idx: clusters of the split's queries, int64 (Q,), as K-means assigned them.
        encoder: a trainable encoder.
        tokens: per batch.
        accumulate: parts per batch and process.
    """

    def __init__(
        self,
        battles: Battles,
        tower: QueryTower,
        cluster_idx: torch.Tensor,
        encoder: QueryEncoder,
        *,
        tokens: int,
        accumulate: int,
    ):
        self.trains_encoder, self.parameters = True, encoder.parameters
        self.queries, self.tower, self.encoder = battles.queries, tower, encoder
        self.tokens, self.accumulate, self.device = tokens, accumulate, encoder.device
        train_queries, row = battles.unique_queries, battles.query_rows  # (Qt,), (N,)
        self.ids = encoder.tokenize([battles.queries[i] for i in train_queries])  # Qt of (T,)
        self.lengths = np.array([len(ids) for ids in self.ids])  # (Qt,)
        self.count = len(self.ids)  # items that an epoch shuffles
        by_query = torch.from_numpy(np.argsort(row, kind="stable")).to(self.device)  # (N,)
        self.battles = [column[by_query] for column in to_tensors(battles, self.device)]
        self.battles_of_query = torch.from_numpy(np.bincount(row, minlength=self.count))  # (Qt,), counts
        self.first_battle = self.battles_of_query.cumsum(0) - self.battles_of_query  # (Qt,)
        self.cluster_of_query = cluster_idx.cpu()[torch.from_numpy(train_queries)]  # (Qt,)
        sizes = self.cluster_of_query.bincount(minlength=len(tower.centroids))  # (K,)
        self.decay = (1 - 1 / sizes.clamp(1, MEMORY)).to(self.device)  # (K,), of a centroid per query seen
        self.varies = tower.scale > MIN_RELATIVE_SCALE * tower.scale.median()  # (H,)
        width = 1 + tower.centroids.shape[1]
        # Of the queries of each cluster that the current step has seen: their number and the sum of their embeddings.
        self.cluster_sums = [torch.zeros(len(tower.centroids), width, device=self.device)]  # (K, 1 + H)

    def plan(self, order: torch.Tensor) -> list[np.ndarray]:
        """The batches of an epoch with the queries in this order (Qt,): queries (b,) of each.

        Among `WINDOW` batches' worth of queries in that order, those of similar length share a batch. The batches are
        shuffled, by a seed that follows from the order.
        """
        order = order.numpy()
        size = max(1, int(WINDOW * self.tokens / self.lengths.mean()))
        batches = []
        for window in np.split(order, range(size, len(order), size)):
            batches += [window[batch] for batch in plan_batches(self.lengths[window], self.tokens)]
        shuffled = np.random.default_rng(order[:8]).permutation(len(batches))
        return [batches[i] for i in shuffled]

    def num_battles(self, batch: np.ndarray) -> int:
        """The number of battles of a batch, in all processes."""
        return int(self.battles_of_query[batch].sum())

    def parts(self, batch: np.ndarray) -> list[Part]:
        """This process's parts of a batch."""
        parts = np.array_split(batch, distributed.size() * self.accumulate)
        own = parts[distributed.rank() * self.accumulate : (distributed.rank() + 1) * self.accumulate]
        return [self._with_battles(torch.from_numpy(part)) for part in own if len(part)]

    def _with_battles(self, queries: torch.Tensor) -> Part:
        counts = self.battles_of_query[queries]  # (b,)
        row = torch.arange(len(queries)).repeat_interleave(counts)  # (B,)
        first = counts.cumsum(0) - counts  # (b,), of each query within the part
        battles = torch.arange(len(row)) + (self.first_battle[queries] - first)[row]  # (B,)
        _, models, outcome = (column[battles.to(self.device)] for column in self.battles)
        return Part(queries, row.to(self.device), models, outcome)

    def embed(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardized embeddings (b, H), differentiable, and clusters (b,) of training queries (b,)."""
        x = self.tower.standardize(self.encoder.embed_tokens([self.ids[i] for i in queries]))  # (b, H)
        x = torch.where(self.varies, x, x.detach())  # (b, H)
        counted = torch.cat([torch.ones_like(x[:, :1]), x.detach()], dim=1)  # (b, 1 + H)
        if len(self.decay):
            self.cluster_sums[0].index_add_(0, self.cluster_of_query[queries].to(self.device), counted)  # (K, 1 + H)
        return x, self.tower.assign(x.detach())

    def embed_for_evaluation(self, queries: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardized embeddings (q, H) and clusters (q,) of any queries of the split (q,)."""
        if not all(parameter.isfinite().all() for parameter in self.parameters.values()):
            raise UserError("the encoder's weights are no longer finite; try a lower --encoder_lr")
        embeddings, _ = self.encoder.embed([self.queries[i] for i in queries])  # (q, H)
        return self.tower.inputs(embeddings.to(self.device))  # (q, H), (q,)

    @torch.no_grad()
    def update_centroids(self) -> None:
        """Move each centroid towards its queries that the step has seen, in all processes."""
        (sums,) = self.cluster_sums
        count, total = sums.split([1, sums.shape[1] - 1], dim=1)  # (K, 1), (K, H)
        weight = 1 - self.decay[:, None] ** count  # (K, 1)
        self.tower.centroids.lerp_(total / count.clamp(min=1), weight)  # (K, H)
        sums.zero_()

    def finetuned_weights(self, layers: int | None, lora_rank: int | None) -> dict:
        """A copy of the trained weights, with what `make_trainable` chose them by, for a checkpoint."""
        weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        return {"layers": layers, "lora_rank": lora_rank, "weights": weights}
