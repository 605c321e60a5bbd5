"""Seconds of each stage and peak memory of complete runs on synthetic score tables: `python -m benchmarks.tables`.

The tables are files; only the encoder is left out: embeddings are given. Each run has a process of its own.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from benchmarks.common import ROOT, peak_memory, print_header, report
from support.system.command_line import OneLineParser, run_command, whole_number

WIDTH = 384  # of the embeddings, as of all-MiniLM-L6-v2


def write_table(path: Path, num_rows: int, num_models: int) -> None:
    """A wide table of scores 0 and 1, whose probabilities depend on model and query as far as embeddings show it."""
    import numpy as np
    import pandas as pd

    rng, x = np.random.default_rng(0), embeddings_of(num_rows)  # (R, H)
    skill, taste = rng.normal(0, 0.7, num_models), rng.normal(0, 1 / WIDTH**0.5, (WIDTH, num_models))  # (M,), (H, M)
    logits = rng.normal(0, 1, (num_rows, 1)) + skill + x @ taste  # (R, M): difficulty, skill, what depends on both
    scores = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.int8)  # (R, M)
    table = pd.DataFrame(scores, columns=[f"model-{i:03d}" for i in range(num_models)])
    table.insert(0, "prompt", [f"query number {i}" for i in range(num_rows)])
    table.to_parquet(path)


def embeddings_of(num_rows: int):
    """The embeddings (R, H) of the queries, float32."""
    import numpy as np

    return np.random.default_rng(1).standard_normal((num_rows, WIDTH), dtype=np.float32)


def measure(path: str, flags: list[str]) -> dict[str, float]:
    """Seconds of each stage of a run on the table in a file, its test AUC, and this process's peak memory in GiB."""
    import torch

    import train
    from rankrouter import RouterConfig
    from support.system import device
    from support.training.checkpoint import Checkpoint
    from support.training.history import History
    from support.training.inputs import load_data
    from support.training.options import router_options

    device.tune_cpu()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args = train.parse_args(["--data_path", path, "--output_dir", folder, *flags])
        data = load_data(args)
        stages = {"load": time.perf_counter() - start}
        numbers = [int(query.split()[-1]) for query in data.full_split.train.queries]  # (Q,)
        embeddings = torch.from_numpy(embeddings_of(max(numbers) + 1)[numbers])  # (Q, H)
        metadata = {"path": "", "fingerprint": "", "dtype": "float32", "width": WIDTH}
        encoder = SimpleNamespace(device=torch.device("cpu"), metadata=metadata)
        history = History(folder, vars(args), data.counts | {"embeddings_hash": ""}, device.Timing())
        run = train.Run(args, data, encoder, history, Checkpoint(history, {}, resume=False), device.tower_threads(None))
        config = RouterConfig(**router_options(args))  # on the embeddings alone
        with contextlib.redirect_stdout(sys.stderr):
            router, *inputs = train.train_towers_and_encoder(run, config, data.split, embeddings)
            train.test(run, router, inputs, inputs)
        seconds = history.as_dict()["timing"]
        stages |= {name: seconds[name] for name in ("cluster", "train", "evaluate", "baselines") if name in seconds}
        stages["all"] = time.perf_counter() - start
        auc = history.results["test_metrics"]["auc"]
    return stages | {"AUC": auc, "best epoch": history.main.best.metadata.epoch, "peak GB": peak_memory()}


def main(argv: list[str] | None = None) -> None:
    """Print the rows of the table, or with --measure those of one file as JSON."""
    parser = OneLineParser("Measure complete runs on synthetic score tables, without the encoder.")
    parser.add_argument("--rows", nargs="+", type=whole_number(100), default=[36_000], help="sizes of the tables")
    parser.add_argument("--models", type=whole_number(2), default=112, help="models of each")
    parser.add_argument("--flags", default="", help="flags of train.py, in quotes")
    parser.add_argument("--measure", metavar="FILE", help="only this table, in this process")
    args = parser.parse_args(argv)
    if args.measure is not None:
        print(json.dumps(measure(args.measure, args.flags.split())))
        return
    print_header()
    with tempfile.TemporaryDirectory() as work:
        measured = []
        for size in args.rows:
            path = Path(work) / f"{size}.parquet"
            write_table(path, size, args.models)
            command = [sys.executable, "-m", "benchmarks.tables", "--measure", path, f"--flags={args.flags}"]
            measured.append(json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout))
            stages = ", ".join(f"{name} {value:.4g}" for name, value in measured[-1].items())
            report(f"{size:,} x {args.models}", "itself", stages, "<= 6 GB")
    for name in ("load", "train", "evaluate", "all") if len(measured) > 1 else ():
        growth = measured[-1][name] / measured[0][name] / (args.rows[-1] / args.rows[0])
        report(f"{name}, seconds per row at {args.rows[-1]:,}", f"at {args.rows[0]:,}", f"{growth:.2f} x", "<= 1.3 x")


if __name__ == "__main__":
    run_command(main)
