"""Batches of a training: of battles or rows on frozen embeddings, or of queries from which an encoder is trained."""

from typing import NamedTuple

import numpy as np
import torch

from query_representation import query_features, surface_features
from rankrouter import RankRouter
from support.data.battles import Battles
from support.encoding.batching import plan_batches
from support.encoding.encoder import QueryEncoder
from support.system import distributed
from support.system.errors import UserError
from support.training.items import Items

WINDOW = 16  # batches' worth of randomly drawn queries, among which those of similar length share a batch
MEMORY = 50  # a centroid is the running mean of about this many of its queries, those seen last
# An encoder is trained through a dimension only if its standard deviation is at least this share of the median one:
# some encoders have dimensions with 1e-32, and standardization divides gradients by it.
MIN_RELATIVE_SCALE = 1e-3


class Part(NamedTuple):
    """A part of a batch that is computed at once: b queries, and the B battles of them from which it learns.

    With a pointwise loss these are B single scores instead.
    """

    queries: torch.Tensor  # int64 (b,)
    row: torch.Tensor  # int64 (B,), the row of each battle's query among the b
    models: torch.Tensor  # int64 (B, 2), a and b; (B, 1) with a pointwise loss
    outcome: torch.Tensor  # float (B,), P(a is better); with a pointwise loss the score, scaled to [0, 1]


class BattleBatches:
    """Batches of `batch_size` items, split among the processes, on queries whose embeddings are frozen.

    Args:
        x: standardized features, float (Q, F).
        cluster_idx: their clusters, int64 (Q,).
        items: single battles, or rows of a score table.
        batch_size: items per step.
    """

    def __init__(self, x: torch.Tensor, cluster_idx: torch.Tensor, items: Items, batch_size: int):
        self.x, self.cluster_idx, self.items, self.batch_size = x, cluster_idx, items, batch_size
        self.trains_encoder, self.parameters, self.cluster_sums = False, {}, []
        self.device, self.query_idx = x.device, torch.from_numpy(items.query_idx).to(x.device)
        self.count = len(items.query_idx)  # items that an epoch shuffles

    def plan(self, order: torch.Tensor) -> list[torch.Tensor]:
        """The batches of an epoch with the items in this order (I,)."""
        return list(order.split(self.batch_size))

    def num_battles(self, batch: torch.Tensor) -> int:
        """The number of battles of a batch, in all processes."""
        return int(self.items.counts[batch].sum())

    def parts(self, batch: torch.Tensor) -> list[Part]:
        """This process's parts of a batch."""
        own = batch.tensor_split(distributed.size())[distributed.rank()].to(self.device, non_blocking=True)  # (b,)
        parts = own.split(self.items.at_once) if len(own) else ()  # one, unless a large table has too many pairs
        return [Part(self.query_idx[part], *self.items.targets(part)) for part in parts]

    def inputs(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardized features (b, F) and clusters (b,) of queries (b,)."""
        return self.x[queries], self.cluster_idx[queries]

    def inputs_for_evaluation(self, queries: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of any queries of the split (q,)."""
        return self.inputs(torch.from_numpy(queries).to(self.device))

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
    is a running mean of their standardized features, over the last `MEMORY` seen, or over as many as there are.

    Args:
        battles: the training battles; `queries` are all of the split.
        items: what a step learns from, by `make_items` of the same battles.
        router: its query tower has statistics and centroids.
        cluster_idx: clusters of the split's queries, int64 (Q,), as K-means assigned them.
        encoder: a trainable encoder.
        tokens: per batch.
        accumulate: parts per batch and process.
    """

    def __init__(
        self,
        battles: Battles,
        items: Items,
        router: RankRouter,
        cluster_idx: torch.Tensor,
        encoder: QueryEncoder,
        *,
        tokens: int,
        accumulate: int,
    ):
        self.trains_encoder, self.parameters = True, encoder.parameters
        self.queries, self.items, self.encoder = battles.queries, items, encoder
        self.tower, self.surface_names = router.query_tower, router.config.surface_features
        self.tokens, self.accumulate, self.device = tokens, accumulate, encoder.device
        train_queries = battles.unique_queries  # (Qt,)
        texts = [battles.queries[i] for i in train_queries]
        self.ids = encoder.tokenize(texts)  # Qt of (T,)
        self.surface = surface_features(texts, self.surface_names).to(self.device)  # (Qt, S)
        self.lengths = np.array([len(ids) for ids in self.ids])  # (Qt,)
        self.count = len(self.ids)  # queries that an epoch shuffles
        row = np.searchsorted(train_queries, items.query_idx)  # (I,)
        self.by_query = torch.from_numpy(np.argsort(row, kind="stable"))  # (I,), items
        self.items_of_query = torch.from_numpy(np.bincount(row, minlength=self.count))  # (Qt,), counts
        self.first_item = self.items_of_query.cumsum(0) - self.items_of_query  # (Qt,)
        self.battles_of_query = torch.zeros(self.count, dtype=torch.int64)  # (Qt,), counts
        self.battles_of_query.index_add_(0, torch.from_numpy(row), items.counts)
        self.cluster_of_query = cluster_idx.cpu()[torch.from_numpy(train_queries)]  # (Qt,)
        sizes = self.cluster_of_query.bincount(minlength=len(self.tower.centroids))  # (K,)
        self.decay = (1 - 1 / sizes.clamp(1, MEMORY)).to(self.device)  # (K,), of a centroid per query seen
        median = self.tower.scale[: self.tower.encoder_width].median()
        self.varies = self.tower.scale > MIN_RELATIVE_SCALE * median  # (F,)
        width = 1 + len(self.tower.scale)
        # Of the queries of each cluster that the current step has seen: their number and the sum of their features.
        self.cluster_sums = [torch.zeros(len(self.tower.centroids), width, device=self.device)]  # (K, 1 + F)

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
        counts = self.items_of_query[queries]  # (b,)
        row = torch.arange(len(queries)).repeat_interleave(counts)  # (n,), of each item's query
        first = counts.cumsum(0) - counts  # (b,), of each query within the part
        places = torch.arange(len(row)) + (self.first_item[queries] - first)[row]  # (n,)
        item, models, outcome = self.items.targets(self.by_query[places].to(self.device))
        return Part(queries, row.to(self.device)[item], models, outcome)

    def inputs(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardized features (b, F), differentiable, and clusters (b,) of training queries (b,)."""
        embeddings = self.encoder.embed_tokens([self.ids[i] for i in queries])  # (b, H)
        x = self.tower.standardize(torch.cat([embeddings, self.surface[queries]], dim=1))  # (b, F)
        x = torch.where(self.varies, x, x.detach())  # (b, F)
        counted = torch.cat([torch.ones_like(x[:, :1]), x.detach()], dim=1)  # (b, 1 + F)
        if len(self.tower.centroids):
            self.cluster_sums[0].index_add_(0, self.cluster_of_query[queries].to(self.device), counted)  # (K, 1 + F)
        return x, self.tower.assign(x.detach())

    def inputs_for_evaluation(self, queries: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardized features (q, F) and clusters (q,) of any queries of the split (q,)."""
        if not all(parameter.isfinite().all() for parameter in self.parameters.values()):
            raise UserError("the encoder's weights are no longer finite; try a lower --encoder_lr")
        queries = [self.queries[i] for i in queries]
        embeddings, _ = self.encoder.embed(queries)  # (q, H)
        features = query_features(queries, embeddings, self.surface_names)  # (q, F)
        return self.tower.inputs(features.to(self.device))  # (q, F), (q,)

    @torch.no_grad()
    def update_centroids(self) -> None:
        """Move each centroid towards its queries that the step has seen, in all processes."""
        (sums,) = self.cluster_sums
        count, total = sums.split([1, sums.shape[1] - 1], dim=1)  # (K, 1), (K, F)
        weight = 1 - self.decay[:, None] ** count  # (K, 1)
        self.tower.centroids.lerp_(total / count.clamp(min=1), weight)  # (K, F)
        sums.zero_()

    def finetuned_weights(self, layers: int | None, lora_rank: int | None) -> dict:
        """A copy of the trained weights, with what `make_trainable` chose them by, for a checkpoint."""
        weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        return {"layers": layers, "lora_rank": lora_rank, "weights": weights}
