"""Text to embedding: pooled hidden states of a Hugging Face encoder, each query encoded once and then cached.

Axes in comments: W is the width of a hidden state, H that of an embedding, which combines one or several of them.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from support.encoding.batching import pad, tokenize
from support.encoding.cache import CombinedCache, EmbeddingCache, query_keys
from support.encoding.encode import encode_missing, read_everywhere, stored_at_rank0
from support.encoding.huggingface import (
    count_layers,
    encoder_fingerprint,
    find_encoder,
    hidden_states,
    load_encoder,
    longest_input,
    own_code,
    pack_weights,
    pick_dtype,
    truncate,
    vocabulary_size,
)
from support.encoding.lora import checkpoint_activations, load_weights, make_trainable, weights_hash
from support.encoding.sentence_transformers import (
    choose_pooling,
    choose_prefix,
    describe,
    load_dense,
    lowercase,
    read_settings,
)
from support.system import distributed
from support.system.errors import UserError
from support.system.hub import is_hub_id


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str, skipped: int = 0) -> torch.Tensor:
    """One vector per query, in float32, from hidden states (B, T, W) and a right-padded mask (B, T).

    `pooling` is "mean" or "max" over the tokens that are not padding, "cls" for the first or "last" for the last of
    them. The first `skipped` tokens of a query, those of a prompt, are left out where it has others.
    """
    hidden, lengths = hidden.float(), mask.sum(1)  # (B, T, W), (B,)
    rows, first = torch.arange(len(hidden), device=hidden.device), skipped * (lengths > skipped)  # (B,) each
    if pooling == "cls":
        return hidden[rows, first]  # (B, W)
    if pooling == "last":
        return hidden[rows, lengths - 1]  # (B, W)
    if skipped:
        mask = mask * (torch.arange(mask.shape[1], device=mask.device) >= first[:, None])  # (B, T)
    if pooling == "mean":
        return (hidden * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]  # (B, W)
    if pooling == "max":
        return hidden.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(1)  # (B, W)
    raise ValueError(f"pooling is {pooling!r}, expected mean, cls, last or max")


def combine(pooled: list[torch.Tensor]) -> torch.Tensor:
    """The embedding (B, H) of each query from its pooled states, (B, W) each: one after the other."""
    return torch.cat(pooled, dim=1)  # (B, H)


def count_for(folder: Path, layers: list[int]) -> int | None:
    """The number of layers of an encoder where some are requested, else None.

    Raises `UserError` where it has fewer, or its folder does not state their number.
    """
    if not layers:
        return None
    count = count_layers(folder)
    if count is None:
        raise UserError(f"--layers: {folder / 'config.json'} does not state how many layers there are; leave it out")
    if not all(1 <= layer <= count for layer in layers):
        raise UserError(f"--layers, --cache_layers: the encoder has the layers 1 to {count}, not {max(layers)}")
    return count


class PooledState(NamedTuple):
    """One of the vectors that an embedding concatenates."""

    layer: int | None  # whose output is pooled, counted from 1; None: the network's own output
    pooling: str  # see `pool`


def pooled_states(layers: list[int | None], pooling: str, num_layers: int | None) -> list[PooledState]:
    """The pooled states of layers; the last of them is the network's own output, with one part of the cache."""
    numbers = [None if layer == num_layers else layer for layer in layers]
    return [PooledState(layer, mode) for layer in numbers for mode in pooling.split("+")]


class QueryEncoder:
    """Text to embedding: a frozen or finetuned encoder with its cache; loaded only if some query is not cached.

    An embedding concatenates the pooled hidden states of one layer or of several, each pooled in one way or in two.

    Args:
        model_path: a Hugging Face folder or a hub id.
        device: where the network runs.
        dtype: "auto", "float32", "bfloat16" or "float16"; see `pick_dtype`.
        pooling: "mean", "cls", "last" or "max", see `pool`, or "mean+last"; "auto": what the folder says, else "mean".
        layers: whose outputs are pooled, counted from 1; None: the network's own output. Layers above are not computed.
        cache_layers: whose outputs are cached in the same pass, their mean and last token, for later encoders.
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
        layers: list[int] | None = None,
        cache_layers: list[int] | None = None,
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
        layers = layers and sorted(set(layers))
        self.num_layers = count_for(self.folder, [*(layers or []), *(cache_layers or [])])
        self.layers = None if layers == [self.num_layers] else layers  # the last layer is the default
        if settings.dense and (self.layers or cache_layers or "+" in chosen_pooling[0]):
            problem = f"{self.folder} has Dense layers, which take one pooled vector of its last layer"
            raise UserError(f"{problem}; leave out --layers, --cache_layers and --pooling, or choose another encoder")
        self.description = describe(settings, chosen_pooling, chosen_prefix, max_length)
        if self.layers:
            self.description = f"layers {', '.join(map(str, layers))} of {self.num_layers}, {self.description}"
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
        if self.layers:
            self.usage |= {"layers": layers}
        if self.prefix:
            self.usage |= {"prefix": self.prefix, "include_prompt": settings.include_prompt}
        if settings.lower_case:
            self.usage |= {"lower_case": True}
        self.cache_dir, self.finetuned = cache_dir, finetuned
        self.states = pooled_states(layers or [self.num_layers], self.pooling, self.num_layers)
        candidates = pooled_states(cache_layers or [], "mean+last", self.num_layers)
        self.extra_states = [state for state in candidates if state not in self.states]
        self.cache = None if cache_dir is None else self._cache()
        self.parameters = {}  # trainable ones by name, see `trainable`
        self.metadata = None  # what a checkpoint must know of the encoder, once there are embeddings

    def _cache(self) -> CombinedCache:
        """One part of the cache for each pooled state, so that embeddings with a state in common share it."""
        trained = {} if self.finetuned is None else {"trained": weights_hash(self.finetuned["weights"])}
        shared = {name: value for name, value in self.usage.items() if name != "layers"} | trained
        caches = [
            EmbeddingCache(self.cache_dir, shared | {"pooling": pooling} | ({} if layer is None else {"layer": layer}))
            for layer, pooling in self.states + self.extra_states
        ]
        return CombinedCache(caches)

    @cached_property
    def loaded(self) -> tuple:
        """Tokenizer and network."""
        if self.finetuned is None:
            tokenizer, network = self._load(getattr(torch, self.dtype))
        else:
            layers, lora_rank = self.finetuned["layers"], self.finetuned["lora_rank"]
            tokenizer, network, parameters = self._load_trainable(layers, lora_rank)
            load_weights(parameters, self.finetuned["weights"])
            network.requires_grad_(False)
        if self.finetuned is None or self.dtype == "float32":  # autocast takes plain linear layers
            pack_weights(network)
        return tokenizer, network

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
            layers=self.layers,
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
        if self.num_layers:
            layers = [layer or self.num_layers for layer, _ in self.states + self.extra_states]
            truncate(network, tokenizer, layers, self.num_layers)
        if self.settings.lower_case:
            lowercase(tokenizer)
        return tokenizer, network

    def _load_trainable(self, layers: int | None, lora_rank: int | None, gradient_checkpointing: bool = False) -> tuple:
        tokenizer, network = self._load(torch.float32)
        if self.dtype != "float32":
            autocast = torch.autocast(self.device.type, getattr(torch, self.dtype))
            network.forward = autocast(network.forward)
        if gradient_checkpointing:
            checkpoint_activations(network)
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
        return combine(self._pool(ids, self.states))  # (B, H)

    def states_to_cache(self, ids: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the cache keeps of queries' token ids, in one pass: (B, W) of each state, the embedding's first."""
        return self._pool(ids, self.states + self.extra_states)

    def _pool(self, ids: list[torch.Tensor], states: list[PooledState]) -> list[torch.Tensor]:
        _, network = self.loaded
        padded, mask = pad(ids, network.device)  # (B, T) each
        hidden = hidden_states(network, padded, mask, {layer for layer, _ in states})  # (B, T, W) by layer
        skipped = 0 if self.settings.include_prompt else self.prompt_tokens
        pooled = [pool(hidden[layer], mask, pooling, skipped) for layer, pooling in states]  # (B, W) each
        if not len(self.dense):
            return pooled
        (pooled,) = pooled
        if self.dense[0].in_features != pooled.shape[1]:
            raise UserError(
                f"{self.settings.dense[0]} takes vectors of width {self.dense[0].in_features}, {self.pooling} pooling "
                f"gives {pooled.shape[1]}; choose another encoder"
            )
        return [self.dense(pooled)]  # (B, H)

    def embed(self, queries: list[str]) -> tuple[torch.Tensor, int]:
        """Embeddings of distinct queries, float32 (Q, H) on the CPU, and the number of them that this call encoded.

        Where all are cached, neither encoder nor tokenizer is loaded. All processes of a run must call it. Raises
        `UserError` where the encoder cannot encode them, or the cache cannot be written.
        """
        cache = self.cache or self._cache()  # in memory for this call only
        keys = query_keys(queries)
        cache.refresh()
        stored = stored_at_rank0(cache, keys)  # (Q,)
        tokens_read, num_encoded = distributed.broadcast_from_rank0(cache.tokens_read), 0
        if tokens_read is None or not stored.all():
            tokens_read = self.tokens_read
            cache.describe({"path": str(self.folder.absolute()), "tokens_read": tokens_read})
            if not stored.all():
                (num_encoded,) = distributed.totals(encode_missing(self, queries, keys, stored, cache))
        cache.refresh()
        embeddings = combine([read_everywhere(each, keys) for each in cache.caches[: len(self.states)]])  # (Q, H)
        if distributed.size() > 1:  # what is read everywhere is also kept where rank 0 runs
            for each in cache.caches[len(self.states) :]:
                read_everywhere(each, keys)
        self.metadata = {"prefix": "", "include_prompt": True} | self.usage
        self.metadata |= {
            "path": self.path,
            "from_hub": is_hub_id(self.path),
            "max_length": tokens_read,
            "width": embeddings.shape[1],
        }
        return embeddings, num_encoded
