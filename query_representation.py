"""Query tower: a Hugging Face encoder's embeddings, K-means clusters of them, and an MLP over both."""

import sys
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from support import processes
from support.encoder import hidden_states, longest_input, plan_batches, tokenize, vocabulary_size
from support.files import UserError, is_out_of_memory, reason

# Tokens per batch: enough to keep the device busy, few enough that long queries still fit.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768, "mps": 8192}
ROWS_AT_ONCE = 8192  # embeddings standardised, assigned or scored at a time, for the sake of memory
LLOYD_QUERIES = 100_000  # with more of them, K-means goes by mini-batches


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector per query, in float32, from hidden states (B, T, H) and a right-padded mask (B, T).

    `pooling` is "mean" over the tokens that are no padding, or "last" for the last of them.
    """
    hidden = hidden.float()
    lengths = mask.sum(1)  # (B,)
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]  # (B, H)
    return (hidden * mask[:, :, None]).sum(1) / lengths[:, None]  # (B, H)


def embed_padded(ids: list[torch.Tensor], network, pooling: str) -> torch.Tensor:
    """Embeddings (B, H) of queries' token ids, in one pass of the network and on its device."""
    # Padding is masked, so any token does; a pad token may lie outside the encoder's vocabulary.
    padded = pad_sequence(ids, batch_first=True).to(network.device)  # (B, T)
    ends = torch.tensor([len(query_ids) for query_ids in ids], device=network.device)  # (B,)
    mask = (torch.arange(padded.shape[1], device=network.device) < ends[:, None]).long()  # (B, T)
    return pool(hidden_states(network, padded, mask), mask, pooling)  # (B, H)


def embed_batch(ids: list[torch.Tensor], network, pooling: str, budget: int) -> tuple[torch.Tensor, int]:
    """Embeddings (B, H), on the CPU, of queries' token ids, in one batch; in smaller ones where memory runs out.

    Returns also the tokens per batch that fit: `budget`, or less. Raises `UserError` where not even one query fits.
    """
    lengths = np.array([len(query_ids) for query_ids in ids])  # (B,)
    first = budget
    while True:
        pieces, found = plan_batches(lengths, budget), []  # (b,) each
        try:
            for piece in pieces:
                found.append(embed_padded([ids[i] for i in piece], network, pooling).cpu())  # (b, H)
            break
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(pieces) == len(ids):
                raise UserError(
                    f"out of memory with one query of {lengths.max()} tokens ({reason(error)}); a lower "
                    "--max_length needs less, or --device cpu"
                ) from error
        if network.device.type == "cuda":
            torch.cuda.empty_cache()
        budget = max(1, min(budget, len(ids) * int(lengths.max())) // 2)
    if budget < first:
        print(
            f"warning: out of memory with {first} tokens per batch; going on with --encode_tokens {budget}",
            file=sys.stderr,
        )
    embeddings = torch.empty(len(ids), found[0].shape[1])  # (B, H)
    embeddings[np.concatenate(pieces)] = torch.cat(found)
    return embeddings, budget


@torch.inference_mode()
def encode_batches(
    queries: list[str],
    tokenizer,
    network,
    max_length: int,
    pooling: str,
    tokens_per_batch: int | None,
    stored: np.ndarray,
    progress: bool = True,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Encode distinct queries batch by batch: indices into them (B,) and their embeddings, float32 (B, H) on the CPU.

    The batches follow from the set of queries alone, not from their order or from what is stored: the same set
    gives the same bits, however often it was interrupted, unless memory ran out. Of several processes each encodes a
    share, by tokens, of what the same `stored` leaves to all of them. `stored` (Q,), bool, is looked at
    before each batch: one whose queries are all stored is passed over. Queries longer than `max_length` tokens, or
    than the encoder takes, are cut. With `progress`, a bar on stderr counts tokens. Raises `UserError` where an
    embedding is not finite, or not one query fits into memory.
    """
    from tqdm import tqdm

    order = np.array(sorted(range(len(queries)), key=queries.__getitem__))  # (Q,)
    ids = tokenize([queries[i] for i in order], tokenizer, min(max_length, longest_input(tokenizer, network)))
    lengths = np.array([len(query_ids) for query_ids in ids])  # (Q,)
    vocabulary = vocabulary_size(network)
    highest = max(int(query_ids.max()) for query_ids in ids)
    if highest >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {highest}, the encoder knows {vocabulary}: they are not of one model"
        )
    budget = tokens_per_batch or TOKENS_PER_BATCH[network.device.type]
    batches = plan_batches(lengths, budget)  # (B,) each
    batches = [batch for batch in batches if not stored[order[batch]].all()]
    batches = [batches[i] for i in processes.share(np.array([lengths[batch].sum() for batch in batches]))]
    # The longest first, which shows at once whether they fit. The rest in any order: the time left is then right from
    # the start, and runs side by side work on different batches.
    rest = batches[1:]
    batches[1:] = [rest[i] for i in np.random.default_rng().permutation(len(rest))]
    total = int(sum(lengths[batch].sum() for batch in batches))
    every = 0.1 if sys.stderr and sys.stderr.isatty() else 30  # seconds; a log file need not hold every step
    look = {"unit": "tok", "unit_scale": True, "delay": 1, "mininterval": every}
    with tqdm(total=total, desc="encode", disable=not (progress and sys.stderr), **look) as bar:
        for batch in batches:
            if not stored[order[batch]].all():
                embeddings, budget = embed_batch([ids[i] for i in batch], network, pooling, budget)  # (B, H)
                if not embeddings.isfinite().all():
                    one = queries[order[batch[0]]][:40]
                    raise UserError(
                        f"embeddings of {len(batch)} queries, such as {one!r}, are not finite in {network.dtype}; "
                        "try --dtype float32, and if it is that already, get the encoder's weights again"
                    )
                yield order[batch], embeddings
            bar.update(int(lengths[batch].sum()))


def encode(
    queries: list[str],
    tokenizer,
    network,
    max_length: int = 512,
    pooling: str = "mean",
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """Embeddings of distinct queries in their order: float32 (Q, H), on the CPU, as `encode_batches` makes them."""
    embeddings, own = torch.empty(len(queries), 0), [np.empty(0, np.int64)]  # (Q, 0)
    how = max_length, pooling, tokens_per_batch, np.zeros(len(queries), bool), progress
    for batch, vectors in encode_batches(queries, tokenizer, network, *how):
        if not embeddings.shape[1]:
            embeddings = torch.empty(len(queries), vectors.shape[1])  # (Q, H)
        embeddings[batch] = vectors
        own.append(batch)
    return exchange(embeddings, np.concatenate(own))


def exchange(embeddings: torch.Tensor, own: np.ndarray) -> torch.Tensor:
    """Embeddings (Q, H), of which each process has the rows `own` (q,), with those of all others too.

    A process that has none may give any (Q, 0).
    """
    if processes.size() == 1:
        return embeddings
    row = torch.cat(processes.gathered(torch.from_numpy(own)))  # (n,)
    vectors = torch.cat(processes.gathered(embeddings[own].reshape(-1))).view(len(row), -1)  # (n, H)
    if not embeddings.shape[1]:
        embeddings = torch.empty(len(embeddings), vectors.shape[1])  # (Q, H)
    embeddings[row] = vectors
    return embeddings


def fit_centroids(points: torch.Tensor, num_clusters: int, seed: int) -> torch.Tensor:
    """K-means centroids (K, H) of points (Q, H), Q >= K, by one k-means++ start; of many points by mini-batches."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():  # with more threads one seed gives several results
        warnings.simplefilter("ignore", ConvergenceWarning)  # where fewer than K points differ, clusters stay empty
        method = KMeans if len(points) <= LLOYD_QUERIES else MiniBatchKMeans
        kmeans = method(num_clusters, n_init=1, random_state=seed).fit(points.numpy())
    return torch.from_numpy(kmeans.cluster_centers_)  # (K, H)


class QueryTower(nn.Module):
    """Maps queries into the shared space.

    Embeddings are standardised with training statistics: decoder states have a few huge dimensions that would
    own every distance. The standardised embedding, projected, and the learned embedding of its nearest K-means
    centroid are concatenated and go through an MLP. Statistics and centroids are buffers, so a checkpoint holds
    them. With `num_clusters` 0 there are no cluster features. The MLP's last layer begins with weights of 0, so that
    no query is told from another before training; with `random_start` it begins as the other layers do.
    """

    def __init__(
        self,
        encoder_width: int,
        embedding_dim: int = 512,
        num_clusters: int = 50,
        cluster_dim: int = 32,
        dropout: float = 0.5,
        random_start: bool = False,
    ):
        super().__init__()
        self.register_buffer("mean", torch.zeros(encoder_width))
        self.register_buffer("scale", torch.ones(encoder_width))
        self.register_buffer("centroids", torch.zeros(num_clusters, encoder_width))
        self.semantic = nn.Linear(encoder_width, embedding_dim)
        self.cluster = nn.Embedding(num_clusters, cluster_dim) if num_clusters else None
        self.mlp = nn.Sequential(
            nn.Linear(embedding_dim + (cluster_dim if num_clusters else 0), embedding_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(embedding_dim, embedding_dim),
        )
        if not random_start:
            nn.init.zeros_(self.mlp[-1].weight)

    def fit(self, embeddings: torch.Tensor, seed: int) -> None:
        """Take statistics and centroids from the embeddings (Q, H) of the distinct training queries."""
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler()  # gives constant dimensions the scale 1
        for chunk in embeddings.split(ROWS_AT_ONCE):
            scaler.partial_fit(chunk.double().numpy())
        self.mean.copy_(torch.from_numpy(scaler.mean_))
        self.scale.copy_(torch.from_numpy(scaler.scale_))
        if len(self.centroids):
            self.centroids.copy_(fit_centroids(self.standardise(embeddings), len(self.centroids), seed))

    def standardise(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Encoder embeddings (Q, H) in the space of the centroids and of `forward` (Q, H)."""
        return (embeddings - self.mean).div_(self.scale)  # (Q, H), without a third array of that size

    def assign(self, points: torch.Tensor) -> torch.Tensor:
        """Index of the nearest centroid of each standardised embedding (Q, H): int64 (Q,), zeros if K is 0."""
        if not len(self.centroids):
            return torch.zeros(len(points), dtype=torch.int64, device=points.device)
        # |x - c|² without |x|², which is the same for every centroid
        offset = self.centroids.square().sum(1)  # (K,)
        chunks = points.split(ROWS_AT_ONCE)
        return torch.cat([(offset - 2 * chunk @ self.centroids.T).argmin(1) for chunk in chunks])  # (Q,)

    def forward(self, points: torch.Tensor, cluster_idx: torch.Tensor) -> torch.Tensor:
        """Standardised embeddings (B, H) and their clusters (B,), as `standardise` and `assign` give them: (B, D)."""
        features = self.semantic(points)  # (B, D)
        if self.cluster is not None:
            features = torch.cat([features, self.cluster(cluster_idx)], dim=1)  # (B, D + cluster_dim)
        return self.mlp(features)  # (B, D)
