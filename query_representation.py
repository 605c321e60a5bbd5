"""Queries: a Hugging Face encoder's embeddings, their K-means clusters, and the query tower over both."""

import sys
import warnings
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from support.encoding.batching import pad, plan_batches, tokenize
from support.encoding.cache import EmbeddingCache, query_keys
from support.encoding.huggingface import (
    encoder_fingerprint,
    find_encoder,
    hidden_states,
    load_encoder,
    longest_input,
    own_code,
    pick_dtype,
    vocabulary_size,
)
from support.encoding.lora import load_weights, make_trainable, weights_hash
from support.encoding.sentence_transformers import (
    choose_pooling,
    choose_prefix,
    describe,
    load_dense,
    lowercase,
    read_settings,
)
from support.system import distributed
from support.system.command_line import progress_bar
from support.system.errors import UserError, is_out_of_memory, reason

# Tokens per batch: enough to keep the device busy, few enough that long queries still fit.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768, "mps": 8192}
ROWS_AT_ONCE = 8192  # embeddings standardized, assigned or scored at a time, to save memory
LLOYD_QUERIES = 100_000  # above, K-means uses mini-batches


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str, skipped: int = 0) -> torch.Tensor:
    """One vector per query, in float32, from hidden states (B, T, H) and a right-padded mask (B, T).

    `pooling` is "mean" or "max" over the tokens that are not padding, "cls" for the first or "last" for the last of
    them. The first `skipped` tokens of a query, those of a prompt, are left out where it has others.
    """
    hidden, lengths = hidden.float(), mask.sum(1)  # (B, T, H), (B,)
    rows, first = torch.arange(len(hidden), device=hidden.device), skipped * (lengths > skipped)  # (B,) each
    if pooling == "cls":
        return hidden[rows, first]  # (B, H)
    if pooling == "last":
        return hidden[rows, lengths - 1]  # (B, H)
    if skipped:
        mask = mask * (torch.arange(mask.shape[1], device=mask.device) >= first[:, None])  # (B, T)
    if pooling == "max":
        return hidden.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(1)  # (B, H)
    return (hidden * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]  # (B, H)


class QueryEncoder:
    """Text to embedding: a frozen or finetuned encoder with its cache; loaded only if some query is not cached.

    Args:
        model_path: a Hugging Face folder or a hub id.
        device: where the network runs.
        dtype: "auto", "float32", "bfloat16" or "float16"; see `pick_dtype`.
        pooling: "mean", "cls", "last" or "max", see `pool`; "auto": what the folder says, else "mean".
        max_length: longer queries are cut to this number of tokens.
        prefix: put before each query; None: the prompt of the folder that `prompt` names, else its default prompt.
        include_prompt: whether the prefix is pooled, too; None: what the folder says.
        tokens_per_batch: default `TOKENS_PER_BATCH` of the device.
        cache_dir: where embeddings are kept; None reads and keeps none.
        progress: whether a bar on stderr counts the tokens.
        download: whether a hub id may be downloaded.
        finetuned: trained weights: `layers` and `lora_rank` (see `make_trainable`) and `weights` by name.

    Raises `UserError` where there is no encoder at `model_path`, it asks for something that is not applied here, or the
    cache cannot be written.
    """

    def __init__(
        self,
        model_path: str,
        device: torch.device,
        *,
        dtype: str = "auto",
        pooling: str = "auto",
        max_length: int = 512,
        prefix: str | None = None,
        prompt: str | None = None,
        include_prompt: bool | None = None,
        tokens_per_batch: int | None = None,
        cache_dir: str | Path | None = None,
        progress: bool = True,
        download: bool = True,
        finetuned: dict | None = None,
    ):
        self.path, self.folder, self.device = str(model_path), find_encoder(model_path, download), device
        settings = read_settings(self.folder)
        if include_prompt is not None:
            settings = replace(settings, include_prompt=include_prompt)
        chosen_pooling = choose_pooling(settings, pooling, self.folder)
        chosen_prefix = choose_prefix(settings, prefix, prompt, self.folder)
        self.description = describe(settings, chosen_pooling, chosen_prefix, max_length)
        if code := own_code(self.folder):
            self.description += f"; its own code, {', '.join(code)}, is not run, but that of transformers"
        self.settings, self.max_length = settings, max_length
        (self.pooling, _), (self.prefix, _) = chosen_pooling, chosen_prefix
        self.dtype = pick_dtype(dtype, device)
        self.tokens_per_batch, self.progress = tokens_per_batch, progress
        self.usage = {
            "fingerprint": encoder_fingerprint(self.folder, settings.dense_files),
            "pooling": self.pooling,
            "max_length": max_length,
            "dtype": self.dtype,
        }
        if self.prefix:
            self.usage |= {"prefix": self.prefix, "include_prompt": settings.include_prompt}
        if settings.lower_case:
            self.usage |= {"lower_case": True}
        self.cache_dir, self.finetuned = cache_dir, finetuned
        separate = {} if finetuned is None else {"trained": weights_hash(finetuned["weights"])}
        self.cache = None if cache_dir is None else EmbeddingCache(cache_dir, self.usage | separate)
        self.parameters = {}  # trainable ones by name, see `trainable`
        self.metadata = None  # what a checkpoint must know of the encoder, once there are embeddings

    @cached_property
    def loaded(self) -> tuple:
        """Tokenizer and network."""
        if self.finetuned is None:
            return self._load(getattr(torch, self.dtype))
        tokenizer, network, parameters = self._load_trainable(self.finetuned["layers"], self.finetuned["lora_rank"])
        load_weights(parameters, self.finetuned["weights"])
        return tokenizer, network.requires_grad_(False)

    @cached_property
    def dense(self) -> nn.Sequential:
        """The layers after pooling that a sentence-transformers folder has, frozen; most folders have none."""
        return load_dense(self.settings.dense, self.device)

    def release(self) -> None:
        """Free the network's memory; `loaded` loads it again."""
        self.__dict__.pop("loaded", None)

    def _copy(self, finetuned: dict | None, cache_dir: str | Path | None, progress: bool) -> "QueryEncoder":
        return QueryEncoder(
            self.path,
            self.device,
            dtype=self.dtype,
            pooling=self.pooling,
            max_length=self.max_length,
            prefix=self.prefix,
            include_prompt=self.settings.include_prompt,
            tokens_per_batch=self.tokens_per_batch,
            cache_dir=cache_dir,
            progress=progress,
            download=False,
            finetuned=finetuned,
        )

    def with_finetuned(self, finetuned: dict) -> "QueryEncoder":
        """This encoder with trained weights; their embeddings have a part of their own in the cache."""
        return self._copy(finetuned, self.cache_dir, self.progress)

    def trainable(
        self, layers: int | None, lora_rank: int | None, gradient_checkpointing: bool = False
    ) -> "QueryEncoder":
        """A copy without a cache, whose `parameters` can be trained: those that `make_trainable` chooses.

        Its weights are float32; the encoder's dtype is that of its matrix products. Raises as `make_trainable` does.
        """
        encoder = self._copy(finetuned=None, cache_dir=None, progress=False)
        tokenizer, network, encoder.parameters = encoder._load_trainable(layers, lora_rank, gradient_checkpointing)
        encoder.loaded = tokenizer, network
        distributed.broadcast([parameter.data for parameter in encoder.parameters.values()])  # adapters start random
        return encoder

    def _load(self, dtype: torch.dtype) -> tuple:
        tokenizer, network = load_encoder(self.folder, self.device, dtype)
        if self.settings.lower_case:
            lowercase(tokenizer)
        return tokenizer, network

    def _load_trainable(self, layers: int | None, lora_rank: int | None, gradient_checkpointing: bool = False) -> tuple:
        tokenizer, network = self._load(torch.float32)
        if self.dtype != "float32":
            autocast = torch.autocast(self.device.type, getattr(torch, self.dtype))
            network.forward = autocast(network.forward)
        if gradient_checkpointing:
            network.activation_checkpointing_enable({"use_reentrant": False})
            for module in network.modules():
                if getattr(module, "gradient_checkpointing", False):  # needs training mode; dropout inside stays off
                    module.training = True
        return tokenizer, network, make_trainable(network, layers, lora_rank)

    @cached_property
    def tokens_read(self) -> int:
        """How many tokens of a query are read: `max_length`, or fewer where the encoder takes fewer."""
        return min(self.max_length, longest_input(*self.loaded))

    @cached_property
    def prompt_tokens(self) -> int:
        """How many tokens at the start of a query are those of the prefix, with a special one before it.

        Raises `UserError` where they leave no room for a query.
        """
        if not self.prefix:
            return 0
        tokenizer, _ = self.loaded
        (ids,) = tokenize([self.prefix], tokenizer, self.tokens_read)  # (T,)
        if len(ids) >= self.tokens_read:
            raise UserError(f"--max_length {self.tokens_read} leaves no room after the prefix {self.prefix[:80]!r}")
        return len(ids) - (int(ids[-1]) in tokenizer.all_special_ids)  # one at the end comes after the query

    def tokenize(self, queries: list[str]) -> list[torch.Tensor]:
        """Token ids of each query, with the prefix before it: Q int64 tensors (T,).

        Raises `UserError` where the encoder cannot take them, or the prefix leaves no room for them.
        """
        tokenizer, network = self.loaded
        self.prompt_tokens  # noqa: B018, raises where there is no room
        ids = tokenize([self.prefix + query for query in queries], tokenizer, self.tokens_read)
        highest, vocabulary = max(int(query_ids.max()) for query_ids in ids), vocabulary_size(network)
        if highest >= vocabulary:
            raise UserError(
                f"the tokenizer gives token {highest}, the encoder's vocabulary has {vocabulary}: they do not belong "
                "together; get the model's files again"
            )
        return ids

    def embed_tokens(self, ids: list[torch.Tensor]) -> torch.Tensor:
        """Embeddings (B, H) of queries' token ids, in one pass of the network, on its device, differentiable."""
        _, network = self.loaded
        padded, mask = pad(ids, network.device)  # (B, T) each
        skipped = 0 if self.settings.include_prompt else self.prompt_tokens
        embeddings = pool(hidden_states(network, padded, mask), mask, self.pooling, skipped)  # (B, width of a state)
        if len(self.dense) and self.dense[0].in_features != embeddings.shape[1]:
            raise UserError(
                f"{self.settings.dense[0]} takes vectors of width {self.dense[0].in_features}, {self.pooling} pooling "
                f"gives {embeddings.shape[1]}; choose another encoder"
            )
        return self.dense(embeddings)  # (B, H)

    def embed(self, queries: list[str]) -> tuple[torch.Tensor, int]:
        """Embeddings of distinct queries, float32 (Q, H) on the CPU, and the number of them that this call encoded.

        Where all are cached, neither encoder nor tokenizer is loaded. All processes of a run must call it. Raises
        `UserError` where the encoder cannot encode them, or the cache cannot be written.
        """
        cache = self.cache or EmbeddingCache(None, self.usage)
        keys = query_keys(queries)
        cache.refresh()
        stored = self._stored_at_rank0(cache, keys)  # (Q,)
        tokens_read, num_encoded = distributed.broadcast_from_rank0((cache.metadata or {}).get("tokens_read")), 0
        if tokens_read is None or not stored.all():
            tokens_read = self.tokens_read
            cache.describe({"path": str(self.folder.absolute()), "tokens_read": tokens_read})
            if not stored.all():
                (num_encoded,) = distributed.totals(self._encode(queries, keys, stored, cache))
        cache.refresh()
        embeddings = self._read(cache, keys)  # (Q, H)
        self.metadata = {"prefix": "", "include_prompt": True} | self.usage
        self.metadata |= {"path": self.path, "max_length": tokens_read, "width": embeddings.shape[1]}
        return embeddings, num_encoded

    @torch.inference_mode()
    def _encode(self, queries: list[str], keys: list[bytes], stored: np.ndarray, cache: EmbeddingCache) -> int:
        """Encode the queries that are not `stored` (Q,) into the cache; returns how many this process encoded.

        The batches follow from the set of queries alone, not from their order or from what is stored: the same set
        gives the same bits, however often it was interrupted, unless memory ran out. A batch that is stored
        completely is skipped. Several processes share the batches, by tokens.
        """
        order = np.array(sorted(range(len(queries)), key=queries.__getitem__))  # (Q,)
        ids = self.tokenize([queries[i] for i in order])
        lengths = np.array([len(query_ids) for query_ids in ids])  # (Q,)
        budget = self.tokens_per_batch or TOKENS_PER_BATCH[self.device.type]
        batches = [batch for batch in plan_batches(lengths, budget) if not stored[order[batch]].all()]  # (B,) each
        batches = [batches[i] for i in distributed.assign(np.array([lengths[batch].sum() for batch in batches]))]
        # The longest first, which shows at once whether it fits. The rest in random order: the progress bar's estimate
        # is then right from the start, and runs side by side work on different batches.
        batches[1:] = [batches[1 + i] for i in np.random.default_rng().permutation(len(batches[1:]))]
        total, num_encoded = int(sum(lengths[batch].sum() for batch in batches)), 0
        with progress_bar("encode", total=total, unit="tok", unit_scale=True, disable=not self.progress) as bar:
            try:
                for batch in batches:
                    batch_keys = [keys[i] for i in order[batch]]
                    missing = ~cache.has(batch_keys)  # (B,): another run may have stored some
                    if missing.any():
                        embeddings, budget = self._embed_in_memory([ids[i] for i in batch], budget)  # (B, H)
                        self._refuse_not_finite(embeddings, queries[order[batch[0]]])
                        cache.add(batch_keys, embeddings)
                        num_encoded += int(missing.sum())
                    bar.update(int(lengths[batch].sum()))
            finally:  # what was encoded before an error or Ctrl-C is kept too
                cache.flush()
        return num_encoded

    def _embed_in_memory(self, ids: list[torch.Tensor], budget: int) -> tuple[torch.Tensor, int]:
        """Embeddings (B, H) of a batch, on the CPU; in smaller batches where memory runs out.

        Returns also the tokens per batch that fit: `budget`, or fewer. Raises `UserError` where one query does not.
        """
        lengths = np.array([len(query_ids) for query_ids in ids])  # (B,)
        first = budget
        while True:
            pieces, parts = plan_batches(lengths, budget), []  # (b,) each
            try:
                for piece in pieces:
                    parts.append(self.embed_tokens([ids[i] for i in piece]).cpu())  # (b, H)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(pieces) == len(ids):
                    raise UserError(
                        f"out of memory with one query of {lengths.max()} tokens ({reason(error)}); a lower "
                        "--max_length needs less, or --device cpu"
                    ) from error
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            budget = max(1, min(budget, len(ids) * int(lengths.max())) // 2)
        if budget < first:
            message = f"out of memory with {first} tokens per batch; continuing with --encode_tokens {budget}"
            print(f"warning: {message}", file=sys.stderr)
        embeddings = torch.empty(len(ids), parts[0].shape[1])  # (B, H)
        embeddings[np.concatenate(pieces)] = torch.cat(parts)
        return embeddings, budget

    def _refuse_not_finite(self, embeddings: torch.Tensor, query: str) -> None:
        if not embeddings.isfinite().all():
            raise UserError(
                f"embeddings of {len(embeddings)} queries, such as {query[:40]!r}, are not finite in {self.dtype}; "
                "try --dtype float32, and if it is that already, get the encoder's weights again"
            )

    def _stored_at_rank0(self, cache: EmbeddingCache, keys: list[bytes]) -> np.ndarray:
        """Which queries the cache of rank 0 holds (Q,): the caches of other machines may hold others."""
        stored = torch.from_numpy(cache.has(keys))  # (Q,)
        distributed.broadcast([stored])
        return stored.numpy()

    def _read(self, cache: EmbeddingCache, keys: list[bytes]) -> torch.Tensor:
        """Embeddings (Q, H) of queries each of which is in the cache of some process, the same for all of them."""
        if distributed.size() == 1:
            return cache.read(keys)
        has = cache.has(keys)  # (Q,)
        known = cache.read([keys[i] for i in np.flatnonzero(has)]) if has.any() else torch.empty(0, 0)  # (q, H)
        width = max(int(width) for width in distributed.all_gather(torch.tensor([known.shape[1]])))
        embeddings = torch.empty(len(keys), width)  # (Q, H)
        embeddings[has] = known.view(-1, width)
        missing = np.flatnonzero(~self._stored_at_rank0(cache, keys))  # (n,)
        if len(missing):  # the machines have no common folder
            own = missing[has[missing]]  # (m,)
            rows = torch.cat(distributed.all_gather(torch.from_numpy(own)))  # (n,)
            embeddings[rows] = torch.cat(distributed.all_gather(embeddings[own]))  # (n, H)
            if distributed.rank() == 0:
                cache.store([keys[i] for i in missing], embeddings[missing])
        distributed.broadcast([embeddings])
        return embeddings


def fit_centroids(x: torch.Tensor, num_clusters: int, seed: int) -> torch.Tensor:
    """K-means centroids (K, H) of standardized embeddings (Q, H), Q >= K, from one k-means++ initialization."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():  # with more threads the same seed can give different results
        warnings.simplefilter("ignore", ConvergenceWarning)  # with fewer than K distinct points, clusters stay empty
        method = KMeans if len(x) <= LLOYD_QUERIES else MiniBatchKMeans
        kmeans = method(num_clusters, n_init=1, random_state=seed).fit(x.numpy())
    return torch.from_numpy(kmeans.cluster_centers_)  # (K, H)


class QueryTower(nn.Module):
    """Maps queries into the shared space: projected embedding and cluster embedding, concatenated, through an MLP.

    Embeddings are standardized with training statistics: decoder states have a few very wide dimensions that would
    dominate every distance. The cluster of a query is the nearest K-means centroid of its standardized embedding.
    Statistics and centroids are buffers, so a checkpoint holds them. A new feature of the query is one
    more output of `inputs`, and one more part of `forward`'s concatenation.

    Args:
        encoder_width: H, the width of the encoder's embeddings.
        embedding_dim: D, the width of the shared space.
        num_clusters: K; 0 leaves the cluster embedding out.
        cluster_dim: width of a cluster's learned embedding.
        dropout: within the MLP, from 0 to below 1.
        zero_init: whether the last layer's weights start at 0: every query has the same vector before training.
    """

    def __init__(
        self,
        encoder_width: int,
        embedding_dim: int = 512,
        num_clusters: int = 50,
        cluster_dim: int = 32,
        dropout: float = 0.5,
        zero_init: bool = True,
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
        if zero_init:
            nn.init.zeros_(self.mlp[-1].weight)

    def fit(self, embeddings: torch.Tensor, seed: int) -> None:
        """Compute statistics and centroids from the embeddings (Q, H) of the distinct training queries."""
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler()  # gives constant dimensions the scale 1
        for chunk in embeddings.split(ROWS_AT_ONCE):
            scaler.partial_fit(chunk.double().numpy())
        self.mean.copy_(torch.from_numpy(scaler.mean_))
        self.scale.copy_(torch.from_numpy(scaler.scale_))
        if len(self.centroids):
            self.centroids.copy_(fit_centroids(self.standardize(embeddings), len(self.centroids), seed))

    def standardize(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Standardized embeddings (Q, H), the space of the centroids and the input of `forward`, from the encoder's."""
        return (embeddings - self.mean).div_(self.scale)  # (Q, H), without a third array of that size

    def assign(self, x: torch.Tensor) -> torch.Tensor:
        """Index of the nearest centroid of each standardized embedding (Q, H): int64 (Q,), zeros if K is 0."""
        if not len(self.centroids):
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        # |x - c|² without |x|², which is the same for every centroid
        offset = self.centroids.square().sum(1)  # (K,)
        return torch.cat([(offset - 2 * chunk @ self.centroids.T).argmin(1) for chunk in x.split(ROWS_AT_ONCE)])  # (Q,)

    def inputs(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs of `forward`, standardized embeddings (Q, H) and clusters (Q,), from the encoder's embeddings."""
        x = self.standardize(embeddings)  # (Q, H)
        return x, self.assign(x)

    def forward(self, x: torch.Tensor, cluster_idx: torch.Tensor) -> torch.Tensor:
        """Queries in the shared space, float (B, D), from standardized embeddings (B, H) and clusters int64 (B,)."""
        features = self.semantic(x)  # (B, D)
        if self.cluster is not None:
            features = torch.cat([features, self.cluster(cluster_idx)], dim=1)  # (B, D + cluster_dim)
        return self.mlp(features)  # (B, D)
