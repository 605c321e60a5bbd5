"""Queries that no cache holds are encoded once, in batches by tokens that the processes of a run share."""

import sys

import numpy as np
import torch

from support.encoding.batching import plan_batches
from support.encoding.cache import CombinedCache, EmbeddingCache
from support.system import distributed
from support.system.errors import UserError, is_out_of_memory, reason
from support.system.progress import progress_bar

# Tokens per batch: enough to keep the device busy, few enough that long queries still fit.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768, "mps": 8192}


@torch.inference_mode()
def encode_missing(encoder, queries: list[str], keys: list[bytes], stored: np.ndarray, cache: CombinedCache) -> int:
    """Encode the queries that are not `stored` (Q,) into the cache; returns how many this process encoded.

    The batches follow from the set of queries alone, not from their order or from what is stored: the same set
    gives the same bits, however often it was interrupted, unless memory ran out. A batch that is stored
    completely is skipped. Several processes share the batches, by tokens.

    Args:
        encoder: a `QueryEncoder`.
        keys: of the queries, by `query_keys`.
    """
    order = np.array(sorted(range(len(queries)), key=queries.__getitem__))  # (Q,)
    ids = encoder.tokenize([queries[i] for i in order])
    lengths = np.array([len(query_ids) for query_ids in ids])  # (Q,)
    budget = encoder.tokens_per_batch or TOKENS_PER_BATCH[encoder.device.type]
    batches = [batch for batch in plan_batches(lengths, budget) if not stored[order[batch]].all()]  # (B,) each
    batches = [batches[i] for i in distributed.assign(np.array([lengths[batch].sum() for batch in batches]))]
    # The longest first, which shows at once whether it fits. The rest in random order: the progress bar's estimate
    # is then right from the start, and runs side by side work on different batches.
    batches[1:] = [batches[1 + i] for i in np.random.default_rng().permutation(len(batches[1:]))]
    total, num_encoded = int(sum(lengths[batch].sum() for batch in batches)), 0
    with progress_bar("encode", total=total, unit="tok", unit_scale=True, disable=not encoder.progress) as bar:
        try:
            for batch in batches:
                batch_keys = [keys[i] for i in order[batch]]
                missing = ~cache.has(batch_keys)  # (B,): another run may have stored some
                if missing.any():
                    pooled, budget = _encode_in_memory(encoder, [ids[i] for i in batch], budget)  # (B, W) each
                    _refuse_not_finite(encoder, pooled, queries[order[batch[0]]])
                    cache.add(batch_keys, pooled)
                    num_encoded += int(missing.sum())
                bar.update(int(lengths[batch].sum()))
        finally:  # what was encoded before an error or Ctrl-C is kept too
            cache.flush()
    return num_encoded


def _encode_in_memory(encoder, ids: list[torch.Tensor], budget: int) -> tuple[list[torch.Tensor], int]:
    """Pooled states of a batch, (B, W) each, on the CPU; in smaller batches where memory runs out.

    Returns also the tokens per batch that fit: `budget`, or fewer. Raises `UserError` where one query does not.
    """
    lengths = np.array([len(query_ids) for query_ids in ids])  # (B,)
    first = budget
    while True:
        pieces, parts = plan_batches(lengths, budget), []  # (b,) each
        try:
            for piece in pieces:
                parts.append([state.cpu() for state in encoder.states_to_cache([ids[i] for i in piece])])  # (b, W)
            break
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(pieces) == len(ids):
                raise UserError(
                    f"out of memory with one query of {lengths.max()} tokens ({reason(error)}); a lower "
                    "--max_length needs less, or --device cpu"
                ) from error
        if encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        budget = max(1, min(budget, len(ids) * int(lengths.max())) // 2)
    if budget < first:
        message = f"out of memory with {first} tokens per batch; continuing with --encode_tokens {budget}"
        print(f"warning: {message}", file=sys.stderr)
    place = np.argsort(np.concatenate(pieces))  # (B,), of each query within the pieces
    return [torch.cat(state)[place] for state in zip(*parts, strict=True)], budget


def _refuse_not_finite(encoder, pooled: list[torch.Tensor], query: str) -> None:
    if not all(state.isfinite().all() for state in pooled):
        raise UserError(
            f"embeddings of {len(pooled[0])} queries, such as {query[:40]!r}, are not finite in {encoder.dtype}; "
            "try --dtype float32, and if it is that already, get the encoder's weights again"
        )


def stored_at_rank0(cache: EmbeddingCache | CombinedCache, keys: list[bytes]) -> np.ndarray:
    """Which queries the cache of rank 0 holds (Q,): the caches of other machines may hold others."""
    stored = torch.from_numpy(cache.has(keys))  # (Q,)
    distributed.broadcast([stored])
    return stored.numpy()


def read_everywhere(cache: EmbeddingCache, keys: list[bytes]) -> torch.Tensor:
    """Pooled states (Q, W) of queries each of which is in the cache of some process, the same for all of them."""
    if distributed.size() == 1:
        return cache.read(keys)
    has = cache.has(keys)  # (Q,)
    known = cache.read([keys[i] for i in np.flatnonzero(has)]) if has.any() else torch.empty(0, 0)  # (q, W)
    width = max(int(width) for width in distributed.all_gather(torch.tensor([known.shape[1]])))
    pooled = torch.empty(len(keys), width)  # (Q, W)
    pooled[has] = known.view(-1, width)
    missing = np.flatnonzero(~stored_at_rank0(cache, keys))  # (n,)
    if len(missing):  # the machines have no common folder
        own = missing[has[missing]]  # (m,)
        rows = torch.cat(distributed.all_gather(torch.from_numpy(own)))  # (n,)
        pooled[rows] = torch.cat(distributed.all_gather(pooled[own]))  # (n, W)
        if distributed.rank() == 0:
            cache.store([keys[i] for i in missing], pooled[missing])
    distributed.broadcast([pooled])
    return pooled
