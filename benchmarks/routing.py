"""Speed of routing, one new query and 10,000 cached ones: `python -m benchmarks.routing`.

With `--checkpoint best_model.pt --input queries.jsonl` instead the time of each decision of a router of yours.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.common import ROOT, median, print_header, report, rounds
from support.system.command_line import OneLineParser, run_command, whole_number
from support.system.device import tune_cpu
from support.system.errors import UserError

start = partial(subprocess.run, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train_wide(work: Path) -> Path:
    """A checkpoint with 100 models for the demo's encoder, its query tower trained on the demo."""
    from rankrouter import RankRouter

    flags = ["--demo", "--demo_dir", work, "--epochs", "1", "--limit", "500", "--no_cache", "--baselines", "none"]
    start([sys.executable, "train.py", *flags, "--output_dir", work / "trained"])
    small = RankRouter.load(work / "trained" / "best_model.pt")
    wide = RankRouter([f"provider/model-{i}" for i in range(100)], small.encoder_width, small.config)
    wide.query_tower.load_state_dict(small.query_tower.state_dict())
    wide.metadata = replace(small.metadata, best_single_model=wide.model_names[0])
    wide.save(work / "wide.pt")
    return work / "wide.pt"


def benchmark_batch(checkpoint: Path, work: Path, number: int) -> None:
    """A command that ranks 10,000 cached queries against one that ranks one."""
    queries = [f"What is the answer to question {i}, and why?" for i in range(10_000)]
    (work / "queries.txt").write_text("\n".join(queries))
    command = [sys.executable, "route.py", "--checkpoint", checkpoint, "--cache_dir", work / "cache"]
    batch = partial(start, [*command, "--input", work / "queries.txt", "--output", work / "out.jsonl"])
    batch()
    times = rounds(number, batch, partial(start, [*command, queries[0]]))
    beyond = statistics.median(row[0] - row[1] for row in times)
    measured = f"{beyond:.1f} s beyond it ({median(times, 1):.1f} s)"
    report("10,000 cached queries, 100 models", "one cached query, with the start", measured, "<= 2 s")


def benchmark_query(checkpoint: Path, number: int) -> None:
    """Ranking a query that was never seen against its tokenization and its pass of the encoder."""
    import torch

    from rankrouter import RankRouter

    router = RankRouter.load(checkpoint)
    router.open_encoder()
    tokenizer, network = router.encoder.loaded
    numbers = iter(range(10**6))

    @torch.inference_mode()
    def bare():
        ids = tokenizer([f"How do I invert matrix {next(numbers)}?"], return_tensors="pt")
        network(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])

    def ranked():
        router.rank([f"How do I invert matrix {next(numbers)}?"], top_k=3)

    rounds(50, bare, ranked)
    times = rounds(300 * number, bare, ranked)
    beyond = statistics.median(row[1] - row[0] for row in times) * 1e3
    measured = f"{beyond:.2f} ms beyond it ({median(times, 0) * 1e3:.2f} ms)"
    report("rank one new query, 100 models", "its tokens and its encoder pass", measured, "<= 1 ms")


def benchmark_decisions(checkpoint: str, path: str, model_path: str | None, count: int) -> None:
    """The time from a query that was never seen to the name of its best model, one query at a time."""
    import numpy as np

    from rankrouter import RankRouter
    from support.data.queries import read_queries

    router = RankRouter.load(checkpoint)
    router.open_encoder(model_path)
    queries = [query for chunk in read_queries(path) for _, query, _ in chunk if query is not None][: 50 + count]
    if len(queries) <= 50:
        raise UserError(f"{path} has {len(queries)} queries; expected more than the 50 that warm up")
    tokens = np.array([len(ids) for ids in router.encoder.tokenize(queries)])[50:]  # (Q,)
    milliseconds = []
    for query in queries:
        start_time = time.perf_counter()
        router.rank([query], top_k=1)
        milliseconds.append((time.perf_counter() - start_time) * 1e3)
    milliseconds = np.array(milliseconds)[50:]  # (Q,), without those that warm up
    p50, p99 = np.percentile(milliseconds, (50, 99))
    print(
        f"{len(milliseconds)} decisions of {len(router.model_names)} models, queries of {np.median(tokens):.0f} tokens"
    )
    print(f"(99 % have at most {np.percentile(tokens, 99):.0f}): p50 {p50:.1f} ms, p99 {p99:.1f} ms")


def main(argv: list[str] | None = None) -> None:
    """Print the rows of the table."""
    parser = OneLineParser("Measure the speed of routing, side by side in one run.")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="of each comparison")
    parser.add_argument("--checkpoint", metavar="FILE", help="measure single decisions of this router instead")
    parser.add_argument("--input", metavar="FILE", help="its queries")
    parser.add_argument("--model_path", help="its encoder; default: that of training")
    parser.add_argument("--queries", type=whole_number(1), default=1000, help="so many of them, after 50")
    args = parser.parse_args(argv)
    tune_cpu()
    if (args.checkpoint is None) != (args.input is None):
        parser.error("--checkpoint and --input need each other")
    if args.checkpoint is not None:
        benchmark_decisions(args.checkpoint, args.input, args.model_path, args.queries)
        return
    with tempfile.TemporaryDirectory() as work:
        checkpoint = train_wide(Path(work))
        print_header()
        benchmark_batch(checkpoint, Path(work), args.rounds)
        benchmark_query(checkpoint, args.rounds)


if __name__ == "__main__":
    run_command(main)
