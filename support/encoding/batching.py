"""From texts to padded batches of tokens: tokenization, and batches that are planned by tokens."""

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from support.system.errors import UserError, is_out_of_memory, reason


def tokenize(queries: list[str], tokenizer, max_length: int) -> list[torch.Tensor]:
    """Token ids of each query, cut to `max_length` tokens, without padding: Q int64 tensors (T,), T >= 1.

    Raises `UserError` where the tokenizer fails, or `max_length` leaves no room for a word.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:  # the tokenizer would then not cut at all
        raise UserError(f"--max_length {max_length} leaves no room beside {special} special tokens; give more")
    try:
        ids = tokenizer(queries, truncation=True, max_length=max_length)["input_ids"]
        # A text may have no token at all (control characters, say); the pad token stands in.
        return [torch.tensor(query_ids or [tokenizer.pad_token_id]) for query_ids in ids]
    except Exception as error:  # a damaged tokenizer raises anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"the tokenizer cannot take the queries: {reason(error)}; get its files again") from error


def plan_batches(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Batches of indices into `lengths` (Q,), longest first, each of at most `tokens_per_batch` tokens once padded.

    Queries of similar length share a batch, so that little of it is padding. A query longer than the budget has a
    batch of its own.
    """
    batches, waiting = [], np.argsort(-lengths, kind="stable")  # (Q,)
    while len(waiting):
        rows = max(1, tokens_per_batch // int(lengths[waiting[0]]))
        batches.append(waiting[:rows])
        waiting = waiting[rows:]
    return batches


def pad(ids: list[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of B queries, (T,) each, as one right-padded batch (B, T) and its mask (B, T)."""
    # Padding is masked, so any token does; a pad token may lie outside the encoder's vocabulary.
    padded = pad_sequence(ids, batch_first=True).to(device)  # (B, T)
    lengths = torch.tensor([len(query_ids) for query_ids in ids], device=device)  # (B,)
    mask = (torch.arange(padded.shape[1], device=device) < lengths[:, None]).long()  # (B, T)
    return padded, mask
