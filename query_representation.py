"""Queries: surface features of their texts beside their embeddings, K-means clusters, and the query tower."""

import warnings
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import nn

ROWS_AT_ONCE = 8192  # queries standardized, assigned or scored at a time, to save memory
TEXTS_AT_ONCE = 1024  # texts whose surface features are computed at a time, to save memory
CHARACTERS_READ = 2**16  # of a text, for its surface features
MAX_DEVIATIONS = 5.0  # a surface feature is clipped to so many standard deviations from its training mean
LLOYD_QUERIES = 100_000  # above, K-means uses mini-batches


class Texts:
    """Texts, and what is counted in them: (Q,) each. Patterns are those of RE2, which take linear time."""

    def __init__(self, texts: list[str]):
        self.num_characters = np.array([len(text) for text in texts])  # (Q,)
        self.starts, self.ends = [text[:CHARACTERS_READ] for text in texts], [text[-1:] for text in texts]
        self.arrow = _to_arrow(self.starts)

    @cached_property
    def length(self) -> np.ndarray:
        """The number of characters in which is counted."""
        return self.num_characters.clip(1, CHARACTERS_READ)  # (Q,)

    def count(self, pattern: str) -> np.ndarray:
        """How often the pattern matches."""
        from pyarrow import compute

        return np.array(compute.count_substring_regex(self.arrow, pattern).to_pylist(), np.float64)  # (Q,)

    def share(self, pattern: str) -> np.ndarray:
        """The same, per character."""
        return self.count(pattern) / self.length  # (Q,)

    def ends_in(self, marks: tuple[str, ...]) -> np.ndarray:
        """Whether the text ends in one of the marks."""
        return np.array([end.endswith(marks) for end in self.ends], np.float64)  # (Q,)


def _to_arrow(texts: list[str]):
    import pyarrow as pa

    encoded = [text.encode() for text in texts]
    ends = pa.py_buffer(np.cumsum([0, *map(len, encoded)], dtype=np.int64))
    # Without `pa.array`, which would import pandas.
    return pa.LargeStringArray.from_buffers(len(texts), ends, pa.py_buffer(b"".join(encoded)))


# The patterns of all letters take a millisecond to compile, so that a single English query is faster without them.
def _non_ascii_letters(text: Texts) -> np.ndarray:
    if all(map(str.isascii, text.starts)):
        return np.zeros(len(text.starts))  # (Q,)
    return text.share(r"\p{L}") - text.share("[A-Za-z]")  # (Q,)


def _starts_upper_case(text: Texts) -> np.ndarray:
    firsts = (next(filter(str.isalpha, start), "") for start in text.starts)
    return np.array([first.isupper() for first in firsts], np.float64)  # (Q,)


# What a text looks like: a new feature is one more line, and so is a changed one, as checkpoints refer to them by name.
# Letters, digits and final marks count in any script.
SURFACE_FEATURES: dict[str, Callable[[Texts], np.ndarray]] = {
    "characters": lambda text: np.log1p(text.num_characters),
    "line_breaks": lambda text: np.log1p(text.count("\n")),
    "question_marks": lambda text: np.log1p(text.count(r"[?\x{FF1F}\x{61F}]")),
    "words": lambda text: text.share(r"\S+"),  # per character: fewer where they are long, or without spaces
    "digits": lambda text: text.share(r"\p{Nd}"),
    "non_ascii_letters": _non_ascii_letters,
    "brackets": lambda text: text.share(r"[{}\[\]();=<>]"),  # of code
    "operators": lambda text: text.share(r"[-+*/^\\$]"),  # of formulas, also in LaTeX
    "has_code": lambda text: text.count(r"(?m)^\s*(def|class|import|from|function|public|#include|SELECT)\b") > 0,
    "has_choices": lambda text: text.count(r"(?m)^\s*\(?[A-H][.):\x{FF1A}\x{3001}].*$") > 1,  # lines A. ..., B. ...
    "starts_upper_case": _starts_upper_case,  # its first letter
    "ends_in_question_mark": lambda text: text.ends_in(("?", "\uff1f", "\u061f")),
    "ends_in_colon": lambda text: text.ends_in((":", "\uff1a")),
    "ends_in_period": lambda text: text.ends_in((".", "\u3002", "\u0964")),
    "ends_in_letter_or_digit": lambda text: np.array([end.isalnum() for end in text.ends], np.float64),
}


def surface_features(queries: list[str], names: tuple[str, ...]) -> torch.Tensor:
    """The surface features (Q, S) of queries, float32, in the order of their names."""
    parts = [torch.empty(0, len(names))]  # (q, S) each
    for start in range(0, len(queries) if names else 0, TEXTS_AT_ONCE):
        text = Texts(queries[start : start + TEXTS_AT_ONCE])
        columns = np.column_stack([SURFACE_FEATURES[name](text) for name in names])  # (q, S)
        parts.append(torch.from_numpy(columns.astype(np.float32)))
    return torch.cat(parts) if names else torch.empty(len(queries), 0)  # (Q, S)


def query_features(queries: list[str], embeddings: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
    """Features (Q, F) of queries: their embeddings (Q, H), and after them the surface features of these names."""
    return torch.cat([embeddings, surface_features(queries, names)], dim=1) if names else embeddings  # (Q, F)


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
        """Standardized features (Q, F), the space of the centroids and the input of `forward`, from features (Q, F).

        They are (features - mean) / scale. A surface feature has the variance H / S instead of 1, and is clipped at 5
        standard deviations.
        """
        x = (features - self.mean).div_(self.scale)  # (Q, F), without a third array of that size
        bound = MAX_DEVIATIONS * self.surface_scale
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
