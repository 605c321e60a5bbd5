"""Seconds of each stage and peak memory on 33 thousand to a million synthetic battles: `python -m benchmarks.scale`.

Each size has a process of its own, so that the peak is its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, peak_memory, print_header, report
from support.system.command_line import OneLineParser, run_command, whole_number
from support.system.device import tune_cpu


def write_synthetic(path: Path, num_battles: int) -> None:
    """Battles in the Arena layout, two of a query, with answers of a kilobyte."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    names = np.array([f"model-{i:02d}" for i in range(20)])
    answers = [{"role": "assistant", "content": f"{i} " * 400} for i in range(50)]
    writer = None
    for low in range(0, num_battles, 50_000):
        size = min(50_000, num_battles - low)
        a = rng.integers(20, size=size)  # (size,)
        turns = [[{"role": "user", "content": f"query number {(low + i) // 2}"}, answers[i % 50]] for i in range(size)]
        table = pa.table(
            {
                "model_a": names[a],
                "model_b": names[(a + rng.integers(1, 20, size)) % 20],
                "winner": rng.choice(["model_a", "model_b"], size),
                "conversation_a": turns,
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def measure(path: str) -> dict[str, float]:
    """Seconds of each stage of a run on the battles in a file, and the peak memory of this process in GiB."""
    import torch

    import metrics
    import train
    from data_loader import load_battles, split_battles
    from rankrouter import RankRouter, RouterConfig
    from support.training.batches import BattleBatches
    from support.training.checkpoint import TrainingState
    from support.training.history import LearningCurves
    from support.training.items import make_items
    from support.training.optimization import EMA, make_optimizer

    tune_cpu()
    stages, clock = {}, time.perf_counter()

    def lap(name):
        nonlocal clock
        stages[name], clock = time.perf_counter() - clock, time.perf_counter()

    battles, _ = load_battles(path)
    lap("load")
    split, _ = split_battles(battles, 0)
    lap("split")
    torch.manual_seed(0)
    embeddings = torch.randn(len(split.train.queries), 16)  # (Q, H)
    router = RankRouter(split.train.model_names, 16, RouterConfig())
    clock = time.perf_counter()
    router.query_tower.fit(embeddings[torch.from_numpy(split.train.unique_queries)], 0)
    x = router.query_tower.standardize(embeddings)  # (Q, F)
    cluster_idx = router.query_tower.assign(x)  # (Q,)
    lap("cluster")
    optimizer = make_optimizer(router.parameters(), [], lr=1e-4, encoder_lr=None, weight_decay=0.01)
    items = make_items(split.train, x.device, label_range=None)
    batches, args = BattleBatches(x, cluster_idx, items, batch_size=32), train.parse_args([])
    state = TrainingState(router, batches, optimizer, EMA([], 0.0), LearningCurves(), epochs=1)
    for batch in state.remaining_batches():
        state.record(train.train_step(args, state, batch))
    lap("epoch")
    test, (pairs,) = split.test, split.test.chunks()
    d = pairs.margins(router.score(x[test.unique_queries], cluster_idx[test.unique_queries]))  # (N,)
    metrics.evaluate(d, pairs.outcome, pairs.model_a_idx, pairs.model_b_idx, 1.0)
    lap("evaluate")
    return stages | {"peak GB": peak_memory()}


def main(argv: list[str] | None = None) -> None:
    """Print the rows of the table, or with --measure those of one file as JSON."""
    parser = OneLineParser("Measure how time and memory grow with the number of battles.")
    sizes = [33_000, 330_000, 1_000_000]
    parser.add_argument("--sizes", nargs="+", type=whole_number(1000), default=sizes, help="numbers of battles, rising")
    parser.add_argument("--measure", metavar="FILE", help="only these battles, in this process")
    args = parser.parse_args(argv)
    if args.measure is not None:
        print(json.dumps(measure(args.measure)))
        return
    rows, sizes = [], args.sizes
    with tempfile.TemporaryDirectory() as work:
        for size in sizes:
            path = Path(work) / f"{size}.parquet"
            write_synthetic(path, size)
            command = [sys.executable, "-m", "benchmarks.scale", "--measure", path]
            rows.append(json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout))
    print_header()
    for size, row in zip(sizes, rows, strict=True):
        measured = ", ".join(f"{name} {value:.2f}" for name, value in row.items())
        report(f"{size:,} battles", "themselves", measured, "<= 4 GB")
    if len(sizes) < 2:
        return
    for name in rows[0]:
        growth = rows[-1][name] / rows[-2][name] / (sizes[-1] / sizes[-2])
        if name != "peak GB":
            against = f"at {sizes[-2]:,}"
            report(f"{name}, seconds per battle at {sizes[-1]:,}", against, f"{growth:.2f} x", "<= 1.3 x")
    totals = [sum(value for name, value in row.items() if name != "peak GB") for row in rows]
    growth = totals[-1] / totals[0] / (sizes[-1] / sizes[0])
    against = f"at {sizes[0]:,}"
    report(f"all stages, seconds per battle at {sizes[-1]:,}", against, f"{growth:.2f} x", "<= 1.3 x")


if __name__ == "__main__":
    run_command(main)
