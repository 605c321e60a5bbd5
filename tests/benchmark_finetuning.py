"""What fine-tuning and several processes cost, by hand: `python tests/benchmark_finetuning.py --help`.

Nothing else should run on the machine meanwhile. A ratio is the median over rounds that take both sides in turn.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmark import ratio, report, rounds  # noqa: E402

from support.command_line import OneLineParser, run_command, some_path, whole_number  # noqa: E402
from support.runs import tune_cpu  # noqa: E402

WAYS = {"whole": (None, None), "last 2 layers": (2, None), "rank 8": (None, 8)}


def prepared(data_path: str, model_path: str, layers, lora_rank, dtype: str = "auto", limit: int | None = 500) -> tuple:
    """Batches of queries, a router, and the encoder that they come from."""
    import torch

    import train
    from data_loader import load_battles, split_battles
    from rankrouter import RankRouter
    from support.batches import QueryBatches
    from support.cached_encoder import Encoder

    split = split_battles(load_battles(data_path, limit=limit)[0], 0)[0]
    encoder = Encoder(model_path, torch.device("cpu"), dtype, progress=False)
    learner = encoder.learner(layers, lora_rank)
    width = learner[1].config.hidden_size
    router = RankRouter(split.train.model_names, width, vars(train.parse_args(["--num_clusters", "0"])))
    clusters = torch.zeros(len(split.train.queries), dtype=torch.int64)
    return QueryBatches(split, router.query_tower, clusters, learner, "mean", 512, 2048, 1), router, encoder


def bench_rate(args) -> None:
    """Training steps against three times the forward passes of the same queries."""
    import torch

    from loss import bpr_loss
    from support.batches import begin
    from train import train_epoch

    tune_cpu()
    torch.manual_seed(0)
    for name, way in WAYS.items():
        batches, router, _ = prepared(args.data_path, args.model_path, *way)
        optimiser = torch.optim.AdamW([*router.parameters(), *batches.learned.values()], lr=1e-5, fused=True)

        def step(epoch, router=router, optimiser=optimiser, batches=batches):
            for _ in train_epoch(router, optimiser, partial(bpr_loss, margin=1.0), batches, epoch):
                pass

        @torch.inference_mode()
        def forward(epoch, batches=batches):
            for queries in epoch.steps:
                batches.embed(torch.from_numpy(queries))

        epochs = [begin(batches) for _ in range(2)]
        for epoch in epochs:
            epoch.steps = epoch.steps[:6]
        forward(epochs[0])

        def again(action, epoch):
            epoch.taken = 0
            action(epoch)

        actions = (lambda step=step, e=epochs: again(step, e[0]), lambda f=forward, e=epochs: again(f, e[0]))
        actions[0]()
        times = rounds(args.rounds, *actions)
        tokens = sum(int(batches.lengths[queries].sum()) for queries in epochs[0].steps)
        rate = tokens / statistics.median(row[0] for row in times)
        told = f"{ratio(times, 0, 1) / 3:.2f} x the time ({rate:.0f} tokens a second)"
        report(f"fine-tuning steps, {name}", "3 forward passes of the same queries", told, "")


def bench_processes(args) -> None:
    """Encoding by two processes of one thread against one of one thread."""
    seconds = []
    for _ in range(args.rounds):
        row = []
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
                row.append(history["timing"]["encode"])
                hashes = history["data"]["embeddings_hash"]
        seconds.append((*row, hashes))
    told = f"{ratio(seconds, 0, 1):.2f} x as fast ({statistics.median(row[0] for row in seconds):.1f} s alone)"
    report("encoding, 2 processes of 1 thread", "1 process of 1 thread", told, "")


def bench_qwen(args) -> None:
    """A Qwen2 of the real 0.5B shape, random weights: an encoding batch and a fine-tuning step."""
    import torch
    from transformers import Qwen2Config, Qwen2Model

    from loss import bpr_loss
    from query_representation import embed_batch
    from support.batches import begin
    from support.demo import demo_folder
    from train import train_epoch

    tune_cpu()
    demo = demo_folder()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": 24}
        sizes = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}
        Qwen2Model(Qwen2Config(**sizes, **heads)).to(torch.bfloat16).save_pretrained(folder)
        for file in (demo / "encoder").glob("tokenizer*"):
            (Path(folder) / file.name).write_bytes(file.read_bytes())
        way = WAYS[args.way]
        batches, router, _ = prepared(str(demo / "battles.parquet"), folder, *way, limit=1500)
        count = sum(parameter.numel() for parameter in batches.network.parameters())
        epoch = begin(batches)
        epoch.steps = epoch.steps[:1]
        ids = [batches.ids[i] for i in epoch.steps[0]]
        tokens = sum(map(len, ids))
        with torch.inference_mode():
            since = time.perf_counter()
            embed_batch(ids, batches.network.eval(), "mean", 2048)
            encoding = time.perf_counter() - since
        optimiser = torch.optim.AdamW([*router.parameters(), *batches.learned.values()], lr=1e-5, fused=True)
        since = time.perf_counter()
        for _ in train_epoch(router, optimiser, partial(bpr_loss, margin=1.0), batches, epoch):
            pass
        step = time.perf_counter() - since
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    told = f"{tokens} tokens: encoded in {encoding:.1f} s, a step in {step:.1f} s, {peak:.1f} GiB at most"
    report(f"Qwen2, {count / 1e6:.0f} million weights, {args.way}", "itself", told, "")


def main(argv: list[str] | None = None) -> None:
    """Print rows of the table for the parts asked for."""
    parts = {"rate": bench_rate, "processes": bench_processes, "qwen": bench_qwen}
    parser = OneLineParser("Measure what fine-tuning and several processes cost.")
    parser.add_argument("parts", nargs="*", choices=parts, default=list(parts), metavar="PART", help=", ".join(parts))
    parser.add_argument("--data_path", type=some_path, help="battles, for rate and processes")
    parser.add_argument("--model_path", type=some_path, help="an encoder, for rate and processes")
    parser.add_argument("--way", choices=WAYS, default="whole", help="what of the Qwen2 learns")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="of each comparison")
    args = parser.parse_args(argv)
    if {"rate", "processes"} & set(args.parts) and None in (args.data_path, args.model_path):
        parser.error("rate and processes need --data_path and --model_path")
    print("| what | against | measured | to reach |\n|---|---|---|---|")
    for part in args.parts:
        parts[part](args)


if __name__ == "__main__":
    run_command(main)
