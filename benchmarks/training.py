"""Speed of a training step and of whole runs: `python -m benchmarks.training step`, or `runs --files a.parquet`."""

import contextlib
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.common import (
    ROOT,
    corpus,
    encode_in_file_order,
    make_encoder,
    median,
    print_header,
    ratio,
    report,
    rounds,
    seconds,
)
from support.system.command_line import OneLineParser, run_command, whole_number
from support.system.device import tower_threads, tune_cpu


def random_battles(num_battles: int, num_models: int, num_queries: int):
    """Battles of random models on random queries."""
    import numpy as np

    from data_loader import Battles

    rng = np.random.default_rng(0)
    a = rng.integers(num_models, size=num_battles)  # (N,)
    return Battles(
        queries=[f"query {i}" for i in range(num_queries)],
        model_names=[f"model {i}" for i in range(num_models)],
        query_idx=rng.integers(num_queries, size=num_battles),
        model_a_idx=a,
        model_b_idx=(a + 1) % num_models,
        outcome=rng.integers(2, size=num_battles).astype(np.float32),
    )


def matrix_products(router, batch_size: int) -> list:
    """The products of a step, as calls: of each linear layer one forward, and for weight and input one backward."""
    import torch
    from torch import nn

    products, num_models = [], len(router.model_names)
    for tower, rows in ((router.query_tower, batch_size), (router.model_tower, num_models)):
        for layer in (module for module in tower.modules() if isinstance(module, nn.Linear)):
            x, g = torch.randn(rows, layer.in_features), torch.randn(rows, layer.out_features)
            products += [partial(nn.functional.linear, x, layer.weight.detach()), partial(torch.mm, g.T, x)]
            if layer is not router.query_tower.semantic:  # whose input has no gradient
                products.append(partial(torch.mm, g, layer.weight.detach()))
    width = router.config.embedding_dim
    q, m, g = torch.randn(batch_size, width), torch.randn(num_models, width), torch.randn(batch_size, num_models)
    return [*products, partial(torch.mm, q, m.T), partial(torch.mm, g, m), partial(torch.mm, g.T, q)]


def frozen_epoch(device, num_models: int, batch_size: int, steps: int):
    """A router of the default size on random embeddings, and a function that trains it for an epoch of some steps."""
    import torch

    import train
    from rankrouter import RankRouter, RouterConfig
    from support.training.batches import BattleBatches
    from support.training.checkpoint import TrainingState
    from support.training.history import LearningCurves
    from support.training.items import make_items
    from support.training.optimization import EMA, make_optimizer

    torch.manual_seed(0)
    battles = random_battles(steps * batch_size, num_models, num_queries=2000)
    router = RankRouter(battles.model_names, 896, RouterConfig()).to(device)
    optimizer = make_optimizer(router.parameters(), [], lr=1e-4, encoder_lr=None, weight_decay=0.01)
    x, cluster_idx = torch.randn(2000, 896, device=device), torch.randint(50, (2000,), device=device)
    batches = BattleBatches(x, cluster_idx, make_items(battles, device, label_range=None), batch_size)
    ema = EMA(list(router.parameters()), 0.999)
    state, flags = TrainingState(router, batches, optimizer, ema, LearningCurves(), epochs=1), train.parse_args([])

    def epoch():
        for batch in state.remaining_batches():
            loss = train.train_step(flags, state, batch)
            ema.update()
            state.record(loss)
        state.mean_loss()  # waits for a GPU
        state.next_epoch()

    return router, epoch


def benchmark_step(args) -> None:
    """A step on frozen embeddings against its matrix products and the optimizer alone."""
    import torch

    from rankrouter import RankRouter
    from support.training.optimization import make_optimizer

    tune_cpu()
    torch.set_num_threads(tower_threads(None))  # as in a run
    batch_size, steps = 32, 200
    router, epoch = frozen_epoch(torch.device("cpu"), num_models=20, batch_size=batch_size, steps=steps)
    twin, products = RankRouter(router.model_names, 896, router.config), matrix_products(router, batch_size)
    alone = make_optimizer(twin.parameters(), [], lr=1e-4, encoder_lr=None, weight_decay=0.01)
    for parameter in twin.parameters():
        parameter.grad = torch.randn_like(parameter)

    def floor():
        for _ in range(steps):
            for product in products:
                product()
            alone.step()

    epoch(), floor()
    times = rounds(3 * args.rounds, epoch, floor)
    ours, low = (median(times, i) / steps * 1e3 for i in (0, 1))
    measured = f"{ratio(times, 0, 1):.2f} x ({ours:.2f} ms, {low:.2f} ms)"
    report("training step", "its matrix products and fused optimizer", measured, "<= 1.4 x")


def circulated_epoch(queries, battles, tokenizer, network, num_models: int) -> float:
    """Seconds of an epoch of the circulated script: two encoder passes a step in file order, nothing kept."""
    import torch

    from loss import bpr
    from model_profiling import ModelTower
    from query_representation import QueryTower

    torch.manual_seed(0)
    query_tower, model_tower = QueryTower(384), ModelTower(num_models)
    optimizer = torch.optim.AdamW([*query_tower.parameters(), *model_tower.parameters()], lr=1e-4)

    def represent(texts):
        embeddings = encode_in_file_order(texts, tokenizer, network).clone()  # (B, H)
        return query_tower(embeddings, query_tower.assign(embeddings))  # (B, D)

    start = time.perf_counter()
    for low in range(0, len(battles), 32):
        batch = battles.select(range(low, min(low + 32, len(battles))), None)
        texts = [queries[i] for i in batch.query_idx]
        a = torch.stack([model_tower()[i] for i in batch.model_a_idx])  # (B, D)
        b = torch.stack([model_tower()[i] for i in batch.model_b_idx])  # (B, D)
        scores = (represent(texts) * a).sum(1), (represent(texts) * b).sum(1)  # (B,) each
        loss = bpr(*scores, torch.from_numpy(batch.outcome), margin=1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def benchmark_runs(args) -> None:
    """A run without a cache, and eight runs that share one, against the circulated script."""
    import numpy as np
    import pandas as pd
    import torch

    import train
    from data_loader import load_battles
    from support.encoding.huggingface import load_encoder

    queries = corpus(args.files, args.sizes)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        folder = make_encoder(work / "encoder", queries)
        rng = np.random.default_rng(0)
        pairs = np.array([rng.choice(8, 2, replace=False) for _ in range(1000)])  # (N, 2)
        winner = rng.choice(["model_a", "model_b"], 1000)
        table = {"prompt": queries[:1000], "model_a": pairs[:, 0], "model_b": pairs[:, 1], "winner": winner}
        pd.DataFrame(table).astype(str).to_parquet(work / "battles.parquet")
        battles, _ = load_battles(str(work / "battles.parquet"))
        tokenizer, network = load_encoder(Path(folder), torch.device("cpu"), torch.float32)
        flags = ("--data_path", str(work / "battles.parquet"), "--model_path", folder, "--dtype", "float32")

        # Training battles alone, as a router is trained on four fifths of them.
        epoch = circulated_epoch(battles.queries, battles.select(np.arange(800), None), tokenizer, network, 8)
        with contextlib.redirect_stdout(None):
            ours = seconds(lambda: train.main([*flags, "--no_cache", "--output_dir", str(work / "cold")]))
        measured = f"{10 * epoch / ours:.0f} x ({10 * epoch:.0f} s, {ours:.1f} s)"
        report("10 epochs, 1,000 battles, float32, cold", "the circulated script", measured, ">= 60 x")

        modules = "argparse, hashlib, numpy, torch, pyarrow.parquet, sklearn.cluster, sklearn.metrics, scipy.optimize"
        imports = [sys.executable, "-c", f"import {modules}, sklearn.preprocessing, safetensors.torch"]
        runs, bare = [], []
        start = partial(subprocess.run, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for number in range(8):
            command = [sys.executable, "train.py", *flags, "--seed", str(number), "--split_seed", "1"]
            command += ["--cache_dir", str(work / "cache"), "--output_dir", str(work / str(number))]
            runs.append(seconds(partial(start, command)))
            bare.append(seconds(partial(start, imports)))
        measured = f"{8 * 10 * epoch / sum(runs):.0f} x ({80 * epoch:.0f} s, {sum(runs):.0f} s)"
        report("8 such runs, complete processes", "the circulated script", measured, ">= 50 x")
        beyond = max(run - imported for run, imported in zip(runs[1:], bare[1:], strict=True))
        report("each later run of the 8", "bare imports", f"at most {beyond:.1f} s beyond them", "<= 4 s")


def main(argv: list[str] | None = None) -> None:
    """Print the rows of the table for the requested parts."""
    parts = {"step": benchmark_step, "runs": benchmark_runs}
    parser = OneLineParser("Measure the speed of training as ratios, side by side in one run.")
    parser.add_argument("parts", nargs="+", choices=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--files", nargs="+", default=[], help="battles from which the queries of `runs` are drawn")
    parser.add_argument("--sizes", nargs="+", type=whole_number(1), default=[1000], help="queries of each file")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="of each comparison")
    args = parser.parse_args(argv)
    if "runs" in args.parts and (not args.files or sum(args.sizes) < 1000):
        parser.error("runs needs --files, and --sizes of at least 1000 together")
    print_header()
    for part in args.parts:
        parts[part](args)


if __name__ == "__main__":
    run_command(main)
