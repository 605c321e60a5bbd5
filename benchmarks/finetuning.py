"""Cost of finetuning and of several processes: `python -m benchmarks.finetuning rate --data_path D --model_path M`."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import (
    ROOT,
    make_encoder,
    median,
    peak_memory,
    print_header,
    ratio,
    report,
    rounds,
    seconds,
    shapes,
)
from support.system.command_line import OneLineParser, run_command, some_path, whole_number
from support.system.device import tune_cpu

CHOICES = {"all": (None, None), "last 2 layers": (2, None), "rank 8": (None, 8)}  # layers, lora_rank


def prepare(
    data_path: str,
    model_path: str,
    layers: int | None,
    lora_rank: int | None,
    limit: int = 500,
    device=None,
    tokens=2048,
):
    """The start of a finetuning on some queries, and its flags."""
    import torch

    import train
    from data_loader import load_battles, split_battles
    from rankrouter import RankRouter, RouterConfig
    from support.encoding.encoder import QueryEncoder
    from support.training.batches import QueryBatches
    from support.training.checkpoint import TrainingState
    from support.training.history import LearningCurves
    from support.training.items import make_items
    from support.training.optimization import EMA, make_optimizer

    device = device or torch.device("cpu")
    split, _ = split_battles(load_battles(data_path, limit=limit)[0], 0)
    encoder = QueryEncoder(model_path, device, progress=False).trainable(layers, lora_rank)
    width = encoder.loaded[1].config.hidden_size
    router = RankRouter(split.train.model_names, width, RouterConfig(num_clusters=0)).to(device)
    clusters = torch.zeros(len(split.train.queries), dtype=torch.int64)  # (Q,)
    items = make_items(split.train, device, label_range=None)
    batches = QueryBatches(split.train, items, router, clusters, encoder, tokens=tokens, accumulate=1)
    rates = {"lr": 1e-5, "encoder_lr": 1e-5, "weight_decay": 0.01}
    optimizer = make_optimizer(router.parameters(), encoder.parameters.values(), **rates)
    state = TrainingState(router, batches, optimizer, EMA([], 0.0), LearningCurves(), epochs=1)
    state.order = torch.arange(batches.count)  # the same batches each time
    state.planned = batches.plan(state.order)
    state.losses = torch.zeros(len(state.planned), device=device)  # (steps,)
    return state, train.parse_args(["--finetune_encoder"])


def take_steps(state, args, number: int) -> None:
    """The first steps of an epoch."""
    import train

    state.step_in_epoch = 0
    for batch in itertools.islice(state.remaining_batches(), number):
        state.record(train.train_step(args, state, batch))


def encode(state, number: int) -> None:
    """The forward passes of the same steps."""
    import torch

    with torch.inference_mode():
        for queries in state.planned[:number]:
            state.batches.inputs(torch.from_numpy(queries))


def benchmark_rate(args) -> None:
    """Training steps against three times the forward passes of the same queries."""
    import torch

    tune_cpu()
    torch.manual_seed(0)
    for name, (layers, lora_rank) in CHOICES.items():
        state, flags = prepare(args.data_path, args.model_path, layers, lora_rank)
        actions = (lambda s=state, f=flags: take_steps(s, f, 6), lambda s=state: encode(s, 6))
        rounds(1, *actions)  # warm
        times = rounds(args.rounds, *actions)
        tokens = sum(int(state.batches.lengths[queries].sum()) for queries in state.planned[:6])
        measured = f"{ratio(times, 0, 1) / 3:.2f} x the time ({tokens / median(times, 0):.0f} tokens a second)"
        report(f"finetuning steps, {name}", "3 forward passes of the same queries", measured)


def benchmark_processes(args) -> None:
    """Encoding by two processes of one thread against one of one thread."""
    times = []
    for _ in range(args.rounds):
        times.append([])
        for count in (1, 2):
            with tempfile.TemporaryDirectory() as output:
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
                flags = ["--data_path", args.data_path, "--model_path", args.model_path, "--no_cache", "--epochs", "1"]
                flags += ["--limit", "3000", "--dtype", "float32", "--baselines", "none", "--output_dir", output]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                subprocess.run(
                    [*command, "train.py", *flags], cwd=ROOT, env=environment, check=True, capture_output=True
                )
                history = json.loads((Path(output) / "training_history.json").read_text())
                times[-1].append(history["timing"]["encode"])
    measured = f"{ratio(times, 0, 1):.2f} x as fast ({median(times, 0):.1f} s alone)"
    report("encoding, 2 processes of 1 thread", "1 process of 1 thread", measured)


def benchmark_qwen(args) -> None:
    """A Qwen2 of the real 0.5B shape with random weights: encoding a batch, and a finetuning step on it."""
    from data_loader import load_battles
    from support.data.demo import demo_folder

    tune_cpu()
    data_path = str(demo_folder() / "battles.parquet")
    with tempfile.TemporaryDirectory() as folder:
        path = make_encoder(Path(folder), load_battles(data_path)[0].queries, shapes()["Qwen2-0.5B"])
        state, flags = prepare(data_path, path, *CHOICES[args.train], limit=1500)
        count = sum(parameter.numel() for parameter in state.batches.encoder.loaded[1].parameters())
        encoding, step = seconds(lambda: encode(state, 1)), seconds(lambda: take_steps(state, flags, 1))
        tokens = int(state.batches.lengths[state.planned[0]].sum())
    measured = f"{tokens} tokens: encoded in {encoding:.1f} s, a step in {step:.1f} s, {peak_memory():.1f} GiB at most"
    report(f"Qwen2, {count / 1e6:.0f} million weights, {args.train}", "itself", measured)


def main(argv: list[str] | None = None) -> None:
    """Print the rows of the table for the requested parts."""
    parts = {"rate": benchmark_rate, "processes": benchmark_processes, "qwen": benchmark_qwen}
    parser = OneLineParser("Measure what finetuning and several processes cost.")
    parser.add_argument("parts", nargs="+", choices=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--data_path", type=some_path, help="battles, for rate and processes")
    parser.add_argument("--model_path", type=some_path, help="an encoder, for rate and processes")
    parser.add_argument("--train", choices=CHOICES, default="all", help="what of the Qwen2 is trained")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="of each comparison")
    args = parser.parse_args(argv)
    if {"rate", "processes"} & set(args.parts) and None in (args.data_path, args.model_path):
        parser.error("rate and processes need --data_path and --model_path")
    print_header()
    for part in args.parts:
        parts[part](args)


if __name__ == "__main__":
    run_command(main)
