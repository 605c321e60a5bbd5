"""Batches of training: of battles on embeddings that stand, or of queries that an encoder is learning from."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from query_representation import embed_padded, encode
from support import processes
from support.encoder import longest_input, plan_batches, tokenize
from support.files import UserError

WINDOW = 16  # batches' worth of queries, drawn by chance, among which those of like length find each other
MEMORY = 50  # of its queries that a centroid is the mean of, those last seen
# Of the median dimension's standard deviation, that one must have to be learned through. Some encoders have dimensions
# with 1e-32, and standardisation divides gradients by it.
LEAST_SCALE = 1e-3
SECONDS_TO_MEASURE = 5  # at least one pass, at most four


def to_tensors(battles, device) -> tuple:
    """Battles as tensors: query (N,), models a and b (N, 2), outcome (N,)."""
    columns = (battles.query_idx, np.column_stack([battles.model_a_idx, battles.model_b_idx]), battles.outcome)
    return tuple(torch.from_numpy(column).to(device) for column in columns)


@dataclass
class Epoch:
    """One pass over the training battles: its order, its steps, and the summed losses (steps,) of those taken."""

    order: torch.Tensor
    steps: list
    losses: torch.Tensor
    taken: int

    @property
    def begun(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What `begin` goes on from."""
        return self.order, self.losses[: self.taken]


def begin(batches, begun: tuple | None = None) -> Epoch:
    """A pass in random order, the same in all processes; or the one that was `begun`."""
    order, losses = begun or (torch.randperm(batches.count), torch.empty(0))  # (count,), (n,)
    processes.broadcast([order])
    steps = batches.plan(order)
    found = torch.zeros(len(steps), device=batches.device)  # (steps,)
    found[: len(losses)] = losses
    return Epoch(order, steps, found, len(losses))


class BattleBatches:
    """Batches of battles, on queries whose embeddings are known: standardised (Q, H), with their clusters (Q,).

    A step takes `batch_size` battles, of which each process takes a part.
    """

    learned, moved = {}, ()  # of an encoder, nothing

    def __init__(self, points: torch.Tensor, cluster_idx: torch.Tensor, battles: tuple, batch_size: int):
        self.points, self.cluster_idx, self.battles, self.batch_size = points, cluster_idx, battles, batch_size
        self.count, self.device = len(battles[0]), points.device

    def plan(self, order: torch.Tensor) -> list[tuple]:
        """The steps of a pass over the battles in this order (N,)."""
        order = order.to(self.device)  # (N,)
        return list(zip(*(column[order].split(self.batch_size) for column in self.battles), strict=True))

    def size_of(self, step: tuple) -> int:
        """How many battles a step has, in all processes."""
        return len(step[0])

    def parts(self, step: tuple) -> list[tuple]:
        """What this process takes of a step: queries, the row of each battle among these, models, outcomes."""
        if processes.size() > 1:
            step = [column.tensor_split(processes.size())[processes.rank()] for column in step]  # (b, ...)
        query, models, outcome = step  # (b,), (b, 2), (b,)
        return [(query, slice(None), models, outcome)] if len(query) else []

    def embed(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardised embeddings (b, H) and clusters (b,) of queries (b,)."""
        return self.points[queries], self.cluster_idx[queries]

    def points_of(self, queries: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, for an evaluation."""
        return self.embed(torch.from_numpy(queries).to(self.device))

    def follow(self) -> None:
        """Nothing has moved."""


class QueryBatches:
    """Batches of queries of like length, each encoded once a pass as the encoder stands, with all its battles.

    A step takes queries of at most `tokens` tokens once padded; each process takes its part, in `pieces` of which only
    one at a time is in memory. Neither changes what is learned: the encoder's own dropout stays off.

    Standardisation stays that of the pretrained encoder, so there is one space throughout. In it a centroid follows the
    training queries that K-means gave it, so that a cluster keeps its meaning while the encoder moves: it is a running
    mean of their embeddings, of the last `MEMORY` seen, or of as many as there are.

    Args:
        split: of which all queries may be asked for, and the training battles are trained on.
        tower: the query tower, with its statistics and centroids.
        cluster_idx: int64 (Q,), of the split's queries, as K-means found them.
        learner: tokenizer, network and its parameters that learn, by name.
    """

    def __init__(
        self,
        split,
        tower,
        cluster_idx: torch.Tensor,
        learner: tuple,
        pooling: str,
        max_length: int,
        tokens: int,
        pieces: int,
    ):
        battles = split.train
        self.queries, self.tower, self.pieces, self.tokens = battles.queries, tower, pieces, tokens
        self.tokenizer, self.network, self.learned = learner
        self.pooling, self.max_length = pooling, max_length
        self.device = self.network.device
        trained_on, row = battles.fought  # (Qt,), (N,)
        length = min(max_length, longest_input(self.tokenizer, self.network))
        self.ids = tokenize([battles.queries[i] for i in trained_on], self.tokenizer, length)  # Qt of (T,)
        self.lengths = np.array([len(ids) for ids in self.ids])  # (Qt,)
        self.count = len(self.ids)
        by_query = np.argsort(row, kind="stable")  # (N,)
        self.battles = [
            column[torch.from_numpy(by_query).to(self.device)] for column in to_tensors(battles, self.device)
        ]
        self.fought = torch.from_numpy(np.bincount(row, minlength=self.count))  # (Qt,), battles of each query
        self.starts = self.fought.cumsum(0) - self.fought  # (Qt,)
        self.members = cluster_idx.cpu()[torch.from_numpy(trained_on)]  # (Qt,)
        sizes = self.members.bincount(minlength=len(tower.centroids))  # (K,)
        self.stays = (1 - 1 / sizes.clamp(1, MEMORY)).to(self.device)  # (K,), of a centroid when a member is seen
        self.varies = tower.scale > LEAST_SCALE * tower.scale.median()  # (H,)
        seen = torch.zeros(len(tower.centroids), 1 + tower.centroids.shape[1], device=self.device)  # (K, 1 + H)
        self.moved = [seen]  # how many members of each cluster a step saw, and the sum of their embeddings

    def plan(self, order: torch.Tensor) -> list[np.ndarray]:
        """The steps of a pass over the queries in this order (Qt,): queries (b,) of each.

        Among `WINDOW` batches' worth of queries in that order, those of like length share a batch; the batches come in
        an order by chance, which follows from the other.
        """
        order = order.numpy()
        size = max(1, int(WINDOW * self.tokens / self.lengths.mean()))
        steps = []
        for window in np.split(order, range(size, len(order), size)):
            steps += [window[batch] for batch in plan_batches(self.lengths[window], self.tokens)]
        shuffled = np.random.default_rng(order[:8]).permutation(len(steps))
        return [steps[i] for i in shuffled]

    def size_of(self, step: np.ndarray) -> int:
        """How many battles a step has, in all processes."""
        return int(self.fought[step].sum())

    def parts(self, step: np.ndarray) -> list[tuple]:
        """What this process takes of a step: queries, the row of each battle among these, models, outcomes."""
        pieces = np.array_split(step, processes.size() * self.pieces)
        mine = pieces[processes.rank() * self.pieces : (processes.rank() + 1) * self.pieces]
        return [self._with_battles(torch.from_numpy(piece)) for piece in mine if len(piece)]

    def _with_battles(self, queries: torch.Tensor) -> tuple:
        counts = self.fought[queries]  # (b,)
        rows = torch.arange(len(queries)).repeat_interleave(counts)  # (B,)
        first = counts.cumsum(0) - counts  # (b,), each query's place in the piece
        battles = torch.arange(len(rows)) + (self.starts[queries] - first)[rows]  # (B,)
        _, models, outcome = (column[battles.to(self.device)] for column in self.battles)
        return queries, rows.to(self.device), models, outcome

    def embed(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardised embeddings (b, H), which can be differentiated, and clusters (b,) of training queries (b,)."""
        embeddings = embed_padded([self.ids[i] for i in queries], self.network, self.pooling)  # (b, H)
        points = self.tower.standardise(embeddings)  # (b, H)
        points = torch.where(self.varies, points, points.detach())  # (b, H)
        seen = torch.cat([torch.ones_like(points[:, :1]), points.detach()], dim=1)  # (b, 1 + H)
        if len(self.stays):
            self.moved[0].index_add_(0, self.members[queries].to(self.device), seen)  # (K, 1 + H)
        return points, self.tower.assign(points.detach())

    @torch.no_grad()
    def follow(self) -> None:
        """Move each centroid to the members that a step has seen, in all processes."""
        count, total = self.moved[0].split([1, self.moved[0].shape[1] - 1], dim=1)  # (K, 1), (K, H)
        weight = 1 - self.stays[:, None] ** count  # (K, 1)
        self.tower.centroids.lerp_(total / count.clamp(min=1), weight)  # (K, H)
        self.moved[0].zero_()

    def points_of(self, queries: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardised embeddings (q, H) and clusters (q,) of any queries (q,), as the encoder stands."""
        if not all(parameter.isfinite().all() for parameter in self.learned.values()):
            raise UserError("the encoder's weights are no longer finite; try a lower --encoder_lr")
        how = self.max_length, self.pooling, None, False
        texts = [self.queries[i] for i in queries]
        embeddings = encode(texts, self.tokenizer, self.network, *how).to(self.device)  # (q, H)
        points = self.tower.standardise(embeddings)  # (q, H)
        return points, self.tower.assign(points)

    def tokens_per_second(self) -> float:
        """Of all processes, in passes forward and back on a batch of middle length; nothing is learned by it."""
        step = np.argsort(self.lengths, kind="stable")[len(self.lengths) // 2 :]  # (b,)
        step = step[: max(1, self.tokens // self.lengths[step[0]] // processes.size() // self.pieces)]
        seconds, queries = [], torch.from_numpy(step)  # (b,)
        with torch.random.fork_rng():
            while len(seconds) < 4 and sum(seconds) < SECONDS_TO_MEASURE:
                since = time.perf_counter()
                self.embed(queries)[0].sum().backward()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - since)
        for parameter in self.learned.values():
            parameter.grad = None
        self.moved[0].zero_()
        return float(
            processes.size() * self.lengths[step].sum() / min(seconds)
        )  # the first is slower than all that follow
