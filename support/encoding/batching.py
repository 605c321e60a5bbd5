"""From texts to padded batches of tokens: tokenization, and batches that are planned by tokens."""

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from support.system.errors import UserError, is_out_of_memory, reason

# Of a text, a tokenizer reads this many characters, or this many per token of `max_length`, and more of it only where
# its first tokens do not stay the same then, up to a bound.
CHARACTERS_AT_FIRST, CHARACTERS_PER_TOKEN, MOST_CHARACTERS = 2**16, 16, 2**20
CHARACTERS_AT_ONCE = 2**21  # of all texts in one call of the tokenizer, which takes 200 times as much memory


def tokenize(queries: list[str], tokenizer, max_length: int) -> list[torch.Tensor]:
    """Token ids of each query, cut to `max_length` tokens, without padding: Q int64 tensors (T,), T >= 1.

    Raises `UserError` where the tokenizer fails, or `max_length` leaves no room for a word.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:  # the tokenizer would then not cut at all
        raise UserError(f"--max_length {max_length} leaves no room beside {special} special tokens; give more")
    read = max(CHARACTERS_AT_FIRST, CHARACTERS_PER_TOKEN * max_length)
    group = np.cumsum([min(len(query), read) for query in queries]) // CHARACTERS_AT_ONCE  # (Q,)
    ids = []
    try:
        for some in np.split(np.arange(len(queries)), np.flatnonzero(np.diff(group)) + 1):
            ids += _tokenize_some([queries[i] for i in some], tokenizer, max_length, read)
    except Exception as error:  # a damaged tokenizer raises anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"the tokenizer cannot take the queries: {reason(error)}; get its files again") from error
    # A text may have no token at all (control characters, say); the pad token stands in.
    return [torch.tensor(query_ids or [tokenizer.pad_token_id]) for query_ids in ids]


def _tokenize_some(queries: list[str], tokenizer, max_length: int, read: int) -> list[list[int]]:
    """Token ids of some queries as if the tokenizer had read all of each; at first it reads `read` characters.

    A tokenizer cuts to `max_length` only after it has read a text, which takes 200 times its size in memory. The first
    tokens hardly depend on what is far behind them: where twice as much of the text gives the same, they are taken.
    The last ones, which a few tokenizers keep instead, may depend on all before them.
    """
    keeps_last, most = getattr(tokenizer, "truncation_side", "right") == "left", max(read, MOST_CHARACTERS)

    # Lists of the others take as long as the ids.
    others = [name for name in ("attention_mask", "token_type_ids") if name in tokenizer.model_input_names]
    only_ids = {f"return_{name}": False for name in others}

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, truncation=True, max_length=max_length, **only_ids)["input_ids"]

    ids = encode([query[-most:] if keeps_last else query[:read] for query in queries])
    for i in (i for i, query in enumerate(queries) if len(query) > read and not keeps_last):
        count, is_settled = read, False
        while not is_settled and count < min(len(queries[i]), most):
            count = 2 * count + 1  # odd: tokens of one letter's repetition may depend on its length modulo 2, 4, ...
            (more,) = encode([queries[i][:count]])
            is_settled = len(more) == max_length and more == ids[i]
            ids[i] = more
    return ids


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
