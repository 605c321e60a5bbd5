"""Shared by the benchmarks: a table of ratios, measured side by side in one process, and an encoder of realistic shape.

Nothing else should run on the machine meanwhile. A ratio is the median over rounds that take both sides in turn.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from support.system.command_line import OneLineParser, whole_number
from support.system.errors import UserError

ROOT = Path(__file__).parent.parent


def print_header() -> None:
    """The head of the table."""
    print("| what | against | measured | to reach |\n|---|---|---|---|", flush=True)


def report(what: str, against: str, measured: str, target: str = "") -> None:
    """A row of the table."""
    print(f"| {what} | {against} | {measured} | {target} |", flush=True)


def seconds(action: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def rounds(number: int, *actions: Callable[[], object]) -> list[list[float]]:
    """Seconds of each action in each round; every round takes them in turn."""
    return [[seconds(action) for action in actions] for _ in range(number)]


def ratio(times: list[list[float]], above: int, below: int) -> float:
    """The median over rounds of one action's seconds, divided by another's."""
    return statistics.median(row[above] / row[below] for row in times)


def median(times: list[list[float]], action: int) -> float:
    """The median over rounds of one action's seconds."""
    return statistics.median(row[action] for row in times)


def peak_memory() -> float:
    """The peak memory of this process in GiB, on Linux; that of `resource.getrusage` may be its parent's."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def add_corpus(parser: OneLineParser) -> None:
    """Flags for the queries that `corpus` draws."""
    parser.add_argument("--files", nargs="+", required=True, help="battles from which queries are drawn")
    parser.add_argument("--sizes", nargs="+", type=whole_number(1), default=[2000, 1000], help="queries of each file")


def corpus(files: list[str], sizes: list[int]) -> list[str]:
    """Distinct queries drawn from each file, mixed in random order. Raises `UserError` where there are too few."""
    import numpy as np

    from data_loader import load_battles

    if len(files) != len(sizes):
        raise UserError(f"{len(files)} --files and {len(sizes)} --sizes; expected as many of each")
    rng, drawn = np.random.default_rng(0), {}
    for file, size in zip(files, sizes, strict=True):
        queries = load_battles(file)[0].queries
        if len(queries) < size:
            raise UserError(f"{file} has {len(queries)} queries; {size} are needed")
        drawn |= dict.fromkeys(queries[i] for i in rng.choice(len(queries), size, replace=False))
    drawn = list(drawn)
    return [drawn[i] for i in rng.permutation(len(drawn))]


def shapes() -> dict:
    """Configurations of two encoders of the field, for `make_encoder`."""
    from transformers import BertConfig, Qwen2Config

    minilm = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    qwen = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864}
    return {
        "MiniLM": BertConfig(vocab_size=30522, **minilm),
        "Qwen2-0.5B": Qwen2Config(vocab_size=151936, num_key_value_heads=2, **qwen),
    }


def make_encoder(folder: Path, queries: list[str], config=None) -> str:
    """A random encoder of this configuration, with a byte-level BPE tokenizer trained on the queries; its folder.

    Without a configuration it is a Qwen2 of six layers, 384 wide.
    """
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModel, PreTrainedTokenizerFast, Qwen2Config

    bpe, end = ByteLevelBPETokenizer(), "<|endoftext|>"
    bpe.train_from_iterator(queries, vocab_size=8000, special_tokens=[end], show_progress=False)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=end, pad_token=end, model_max_length=512
    ).save_pretrained(folder)
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2}
    sizes = {"vocab_size": 8000, "hidden_size": 384, "intermediate_size": 1536, "max_position_embeddings": 1024}
    AutoModel.from_config(config or Qwen2Config(**sizes, **layers)).save_pretrained(folder)
    return str(folder)


def encode_in_file_order(queries: list[str], tokenizer, network):
    """Embeddings (Q, H) in batches of 32 as they come, padded to the longest, mean pooling: what most scripts do."""
    import torch

    rows = []
    with torch.inference_mode():
        for start in range(0, len(queries), 32):
            batch = tokenizer(
                queries[start : start + 32], padding=True, truncation=True, max_length=512, return_tensors="pt"
            )
            states = network(**batch).last_hidden_state  # (32, T, H)
            mask = batch["attention_mask"][:, :, None]  # (32, T, 1)
            rows.append((states * mask).sum(1) / mask.sum(1))  # (32, H)
    return torch.cat(rows)  # (Q, H)
