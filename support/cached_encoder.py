"""An encoder as one run uses it: pretrained or trained further, with its cache, loaded when a query is not in that."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from query_representation import encode, encode_batches, exchange
from support import processes
from support.adapters import let_learn, set_learned, weights_hash
from support.embedding_cache import EmbeddingCache, query_keys
from support.encoder import encoder_fingerprint, find_encoder, load_encoder, longest_input, pick_dtype


class Encoder:
    """A frozen encoder with its cache.

    Args:
        model_path: a Hugging Face folder or a hub id.
        dtype: "auto", "float32", "bfloat16" or "float16"; see `pick_dtype`.
        pooling, max_length: see `pool` and `encode_batches`.
        tokens_per_batch: without it, `TOKENS_PER_BATCH` of the device.
        cache_dir: where embeddings are kept; None neither reads nor keeps any.
        progress: whether a bar on stderr counts the tokens.
        download: whether a hub id may be fetched from the hub.
        trained: of an encoder that was trained further, `layers`, `lora_rank` (see `let_learn`) and `weights`.

    Raises `UserError` where there is no encoder at `model_path`, or the cache cannot be written.
    """

    def __init__(
        self,
        model_path: str,
        device: torch.device,
        dtype: str = "auto",
        pooling: str = "mean",
        max_length: int = 512,
        tokens_per_batch: int | None = None,
        cache_dir: str | Path | None = None,
        progress: bool = True,
        download: bool = True,
        trained: dict | None = None,
    ):
        self.path, self.folder, self.device = str(model_path), find_encoder(model_path, download), device
        self.usage = {
            "fingerprint": encoder_fingerprint(self.folder),
            "pooling": pooling,
            "max_length": max_length,
            "dtype": pick_dtype(dtype, device),
        }
        self.how = {
            "max_length": max_length,
            "pooling": pooling,
            "tokens_per_batch": tokens_per_batch,
            "progress": progress,
        }
        self.cache_dir, self.trained = cache_dir, trained
        kept_apart = {} if trained is None else {"trained": weights_hash(trained["weights"])}
        self.cache = None if cache_dir is None else EmbeddingCache(cache_dir, self.usage | kept_apart)
        self.facts = None  # what a checkpoint must know of the encoder, from the first embeddings on

    @cached_property
    def loaded(self) -> tuple:
        """Tokenizer and network."""
        if self.trained is None:
            return load_encoder(self.folder, self.device, getattr(torch, self.usage["dtype"]))
        tokenizer, network, learned = self.learner(self.trained["layers"], self.trained["lora_rank"])
        set_learned(learned, self.trained["weights"])
        return tokenizer, network.requires_grad_(False)

    def learner(self, layers: int | None, lora_rank: int | None, gradient_checkpointing: bool = False) -> tuple:
        """Tokenizer, network, and by name the parameters of it that are to learn, as `let_learn` chooses them.

        Weights are float32 then, and bfloat16 is what products are computed in. Raises `UserError` as `let_learn` does.
        """
        tokenizer, network = load_encoder(self.folder, self.device, torch.float32)
        if self.usage["dtype"] != "float32":
            compute_in = torch.autocast(self.device.type, getattr(torch, self.usage["dtype"]))
            network.forward = compute_in(network.forward)
        if gradient_checkpointing:
            network.activation_checkpointing_enable({"use_reentrant": False})
            for module in network.modules():
                if getattr(module, "gradient_checkpointing", False):  # it asks for training; dropout within stays off
                    module.training = True
        learned = let_learn(network, layers, lora_rank)
        processes.broadcast([parameter.data for parameter in learned.values()])  # adapters begin by chance
        return tokenizer, network, learned

    def trained_further(self, trained: dict) -> "Encoder":
        """This encoder with trained weights."""
        return Encoder(
            self.path,
            self.device,
            self.usage["dtype"],
            cache_dir=self.cache_dir,
            download=False,
            trained=trained,
            **self.how,
        )

    def release(self) -> None:
        """Free the network's memory; `loaded` loads it again."""
        self.__dict__.pop("loaded", None)

    @cached_property
    def _tokens_read(self) -> int:
        return min(self.usage["max_length"], longest_input(*self.loaded))

    def embed(self, queries: list[str]) -> tuple[torch.Tensor, int]:
        """Embeddings of distinct queries, float32 (Q, H) on the CPU, and how many this run encoded for them.

        Where all are cached, neither encoder nor tokenizer is loaded. All processes of a run must call it. Raises
        `UserError` where the encoder cannot encode them, or the cache cannot be written.
        """
        if self.cache is None:
            embeddings, encoded = encode(queries, *self.loaded, **self.how), len(queries)  # (Q, H)
            tokens_read = self._tokens_read
        else:
            keys = query_keys(queries)
            stored = self._stored(keys)  # (Q,)
            encoded = int((~stored).sum())
            tokens_read = processes.from_main((self.cache.facts or {}).get("tokens_read"))
            if encoded or tokens_read is None:
                tokens_read = self._tokens_read
                facts = {"path": str(self.folder.absolute()), "tokens_read": tokens_read}
                batches = encode_batches(queries, *self.loaded, stored=stored.copy(), **self.how)
                encoded = processes.total(self.cache.fill(keys, stored.copy(), batches, facts))
                self.cache.describe(facts)
            embeddings = self._read(keys)  # (Q, H)
        self.facts = self.usage | {"path": self.path, "max_length": tokens_read, "width": embeddings.shape[1]}
        return embeddings, encoded

    def _stored(self, keys: list[bytes]) -> np.ndarray:
        """Which queries the cache of rank 0 holds (Q,): those of other machines may hold others."""
        stored = torch.from_numpy(self.cache.look_up(keys))  # (Q,)
        processes.broadcast([stored])
        return stored.numpy()

    def _read(self, keys: list[bytes]) -> torch.Tensor:
        """Embeddings (Q, H) of queries each of which is in the cache of some process, the same for all of them."""
        have = self.cache.look_up(keys)  # (Q,)
        if processes.size() == 1:
            return self.cache.read(keys)
        embeddings = torch.empty(len(keys), 0)  # (Q, 0)
        if have.any():
            known = self.cache.read([keys[i] for i in np.flatnonzero(have)])  # (q, H)
            embeddings = torch.empty(len(keys), known.shape[1])  # (Q, H)
            embeddings[have] = known
        lacking = np.flatnonzero(~self._stored(keys))  # (n,)
        if len(lacking):  # the machines have no common folder
            embeddings = exchange(embeddings, lacking[have[lacking]])
            if processes.rank() == 0:
                self.cache.store([keys[i] for i in lacking], embeddings[lacking].numpy(), self.cache.facts)
        width = processes.from_main(embeddings.shape[1])
        embeddings = embeddings if embeddings.shape[1] else torch.empty(len(keys), width)  # (Q, H)
        processes.broadcast([embeddings])
        return embeddings
