"""Queries: surface features of their texts beside their embeddings, K-means clusters, and the query tower."""

import warnings

import numpy as np
import torch
from torch import nn

ROWS_AT_ONCE = 8192  # queries standardized, assigned or scored at a time, to save memory
TEXTS_AT_ONCE = 1024  # of which surface features are computed
CHARACTERS_READ = 2**16  # of a text, for its surface features
MOST_DEVIATIONS = 5.0  # a surface feature is clipped to so many standard deviations from its training mean
LLOYD_QUERIES = 100_000  # above, K-means uses mini-batches


def surface_features(queries: list[str]) -> dict[str, np.ndarray]:
    """What texts look like, in any language: (Q,) of each feature, by name.

    A new feature is one more entry: the logarithm of 1 + a count, a share of the characters, or a yes or no. Routers
    that were trained without it continue without it. Patterns are those of RE2, which take linear time.
    """
    import pyarrow as pa
    from pyarrow import compute

    def to_arrow(texts: list[str]) -> pa.LargeStringArray:  # `pa.array` would import pandas
        encoded = [text.encode() for text in texts]
        ends = pa.py_buffer(np.cumsum([0, *map(len, encoded)], dtype=np.int64))
        return pa.LargeStringArray.from_buffers(len(texts), ends, pa.py_buffer(b"".join(encoded)))

    text, end = to_arrow([query[:CHARACTERS_READ] for query in queries]), to_arrow([query[-1:] for query in queries])
    length = np.array([max(1, min(len(query), CHARACTERS_READ)) for query in queries], np.float64)  # (Q,)

    def count(pattern: str) -> np.ndarray:
        return np.array(compute.count_substring_regex(text, pattern).to_pylist(), np.float64)  # (Q,)

    question, colon = r"[?\x{FF1F}\x{61F}]", r"[:\x{FF1A}]"  # full-width ones, and the Arabic one, too

    def matches(texts: pa.Array, pattern: str) -> np.ndarray:
        return np.array(compute.match_substring_regex(texts, pattern).to_pylist(), np.float64)  # (Q,)

    return {
        "characters": np.log1p([len(query) for query in queries]),
        "line_breaks": np.log1p(count("\n")),
        "question_marks": np.log1p(count(question)),
        "words": count(r"\S+") / length,  # fewer where they are long, and in scripts without spaces
        "digits": count(r"\p{Nd}") / length,
        "non_ascii_letters": (count(r"\p{L}") - count("[A-Za-z]")) / length,
        "brackets": count(r"[{}\[\]();=<>]") / length,  # of code
        "operators": count(r"[-+*/^\\$]") / length,  # of formulas, also in LaTeX
        "has_code": matches(text, r"(?m)^\s*(def|class|import|from|function|public|#include|SELECT)\b"),
        "has_choices": count(r"(?m)^\s*\(?[A-H][.):\x{FF1A}\x{3001}]") > 1,  # lines A., B., ...
        "starts_upper_case": matches(text, r"^\P{L}*\p{Lu}"),  # its first letter
        "ends_in_question_mark": matches(end, question),
        "ends_in_colon": matches(end, colon),
        "ends_in_period": matches(end, r"[.\x{3002}\x{964}]"),
        "ends_in_letter_or_digit": matches(end, r"[\p{L}\p{N}]"),
    }


def query_features(queries: list[str], embeddings: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
    """Features (Q, F) of queries: their embeddings (Q, H), and after them the surface features of these names."""
    columns = [embeddings.new_empty(0, len(names))]  # (q, S) each
    for start in range(0, len(queries) if names else 0, TEXTS_AT_ONCE):
        computed = surface_features(queries[start : start + TEXTS_AT_ONCE])
        columns.append(torch.from_numpy(np.column_stack([computed[name] for name in names])).to(embeddings))
    return torch.cat([embeddings, torch.cat(columns)], dim=1) if names else embeddings  # (Q, F)


def fit_centroids(x: torch.Tensor, num_clusters: int, seed: int) -> torch.Tensor:
    """K-means centroids (K, F) of standardized features (Q, F), Q >= K, from one k-means++ initialization."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():  # with more threads the same seed can give different results
        warnings.simplefilter("ignore", ConvergenceWarning)  # with fewer than K distinct points, clusters stay empty
        method = KMeans if len(x) <= LLOYD_QUERIES else MiniBatchKMeans
        kmeans = method(num_clusters, n_init=1, random_state=seed).fit(x.numpy())
    return torch.from_numpy(kmeans.cluster_centers_)  # (K, F)


class QueryTower(nn.Module):
    """Maps queries into the shared space: projected features and cluster embedding, concatenated, through an MLP.

    A query's F features are its embedding and, where there are any, its surface features: see `query_features`. They
    are standardized with training statistics, as decoder states have a few very wide dimensions that would dominate
    every distance, and few surface features weigh as much as many dimensions of an embedding. The cluster of a query
    is the nearest K-means centroid of its standardized features. Statistics and centroids are buffers, so a checkpoint
    holds them.

    Args:
        encoder_width: H, the width of the encoder's embeddings.
        num_surface: S, the number of surface features; F = H + S.
        embedding_dim: D, the width of the shared space.
        num_clusters: K; 0 leaves the cluster embedding out.
        cluster_dim: width of a cluster's learned embedding.
        dropout: within the MLP, from 0 to below 1.
        zero_init: whether the last layer's weights start at 0: every query has the same vector before training.
    """

    def __init__(
        self,
        encoder_width: int,
        num_surface: int = 0,
        embedding_dim: int = 512,
        num_clusters: int = 50,
        cluster_dim: int = 32,
        dropout: float = 0.5,
        zero_init: bool = True,
    ):
        super().__init__()
        self.encoder_width, width = encoder_width, encoder_width + num_surface  # H, F
        # The factor by which a surface feature is wider than a dimension of the embedding: both blocks then add as
        # much to the squared distance of two queries.
        self.surface_scale = (encoder_width / num_surface) ** 0.5 if num_surface else 1.0
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("centroids", torch.zeros(num_clusters, width))
        self.semantic = nn.Linear(width, embedding_dim)
        self.cluster = nn.Embedding(num_clusters, cluster_dim) if num_clusters else None
        self.mlp = nn.Sequential(
            nn.Linear(embedding_dim + (cluster_dim if num_clusters else 0), embedding_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(embedding_dim, embedding_dim),
        )
        if zero_init:
            nn.init.zeros_(self.mlp[-1].weight)

    def fit(self, features: torch.Tensor, seed: int) -> None:
        """Compute statistics and centroids from the features (Q, F) of the distinct training queries."""
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler()  # gives constant features the scale 1
        for chunk in features.split(ROWS_AT_ONCE):
            scaler.partial_fit(chunk.double().numpy())
        self.mean.copy_(torch.from_numpy(scaler.mean_))
        self.scale.copy_(torch.from_numpy(scaler.scale_))
        self.scale[self.encoder_width :] /= self.surface_scale
        if len(self.centroids):
            self.centroids.copy_(fit_centroids(self.standardize(features), len(self.centroids), seed))

    def standardize(self, features: torch.Tensor) -> torch.Tensor:
        """Standardized features (Q, F), the space of the centroids and the input of `forward`, from features (Q, F)."""
        x = (features - self.mean).div_(self.scale)  # (Q, F), without a third array of that size
        bound = MOST_DEVIATIONS * self.surface_scale
        x[:, self.encoder_width :].clamp_(-bound, bound)  # a text may be like no training query
        return x

    def assign(self, x: torch.Tensor) -> torch.Tensor:
        """Index of the nearest centroid of each query's standardized features (Q, F): int64 (Q,), zeros if K is 0."""
        if not len(self.centroids):
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        # |x - c|² without |x|², which is the same for every centroid
        offset = self.centroids.square().sum(1)  # (K,)
        return torch.cat([(offset - 2 * chunk @ self.centroids.T).argmin(1) for chunk in x.split(ROWS_AT_ONCE)])  # (Q,)

    def inputs(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs of `forward`, standardized features (Q, F) and clusters (Q,), from features (Q, F)."""
        x = self.standardize(features)  # (Q, F)
        return x, self.assign(x)

    def forward(self, x: torch.Tensor, cluster_idx: torch.Tensor) -> torch.Tensor:
        """Queries in the shared space, float (B, D), from standardized features (B, F) and clusters int64 (B,)."""
        projected = self.semantic(x)  # (B, D)
        if self.cluster is not None:
            projected = torch.cat([projected, self.cluster(cluster_idx)], dim=1)  # (B, D + cluster_dim)
        return self.mlp(projected)  # (B, D)
