"""Speed as ratios, each measured side by side in one run, by hand: `python tests/benchmark.py --help`.

Nothing else should run on the machine meanwhile. A ratio is the median over rounds that take both sides in turn.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmark_scale import TOWERS, write_synthetic  # noqa: E402

from support.command_line import OneLineParser, run_command, whole_number  # noqa: E402
from support.files import UserError  # noqa: E402
from support.runs import tune_cpu  # noqa: E402


def report(what: str, against: str, measured: str, target: str) -> None:
    print(f"| {what} | {against} | {measured} | {target} |", flush=True)


def seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def rounds(number: int, *actions) -> list[list[float]]:
    """Seconds of each action in each round; every round takes them in turn."""
    return [[seconds(action) for action in actions] for _ in range(number)]


def ratio(times: list[list[float]], above: int, below: int) -> float:
    return statistics.median(row[above] / row[below] for row in times)


def corpus(files: list[str], sizes: list[int]) -> list[str]:
    """Distinct queries drawn from each file, mixed in random order."""
    import numpy as np

    from data_loader import load_battles

    rng, drawn = np.random.default_rng(0), {}
    for file, size in zip(files, sizes, strict=True):
        queries = load_battles(file)[0].queries
        if len(queries) < size:
            raise UserError(f"{file} has {len(queries)} queries; {size} are needed")
        drawn |= dict.fromkeys(queries[i] for i in rng.choice(len(queries), size, replace=False))
    return [list(drawn)[i] for i in rng.permutation(len(drawn))]


def make_encoder(folder: Path, queries: list[str]) -> Path:
    """A random Qwen2 of six layers, 384 wide, with a byte-level BPE tokenizer trained on the queries."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

    bpe, end = ByteLevelBPETokenizer(), "<|endoftext|>"
    bpe.train_from_iterator(queries, vocab_size=8000, special_tokens=[end], show_progress=False)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=end, pad_token=end, model_max_length=512
    ).save_pretrained(folder)
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2}
    sizes = {"vocab_size": 8000, "hidden_size": 384, "intermediate_size": 1536, "max_position_embeddings": 1024}
    Qwen2Model(Qwen2Config(**sizes, **layers)).save_pretrained(folder)
    return folder


def encode_in_file_order(queries: list[str], tokenizer, network):
    """Batches of 32 as they come, padded to the longest, mean pooling: what most scripts do."""
    import torch

    rows = []
    with torch.inference_mode():
        for start in range(0, len(queries), 32):
            some = tokenizer(
                queries[start : start + 32], padding=True, truncation=True, max_length=512, return_tensors="pt"
            )
            states = network(**some).last_hidden_state  # (32, T, H)
            mask = some["attention_mask"][:, :, None]  # (32, T, 1)
            rows.append((states * mask).sum(1) / mask.sum(1))  # (32, H)
    return torch.cat(rows)  # (Q, H)


def floor_seconds(network, lengths, dtype) -> float:
    """Seconds for the encoder's matrix products on these lengths, without padding, at the rate of its own shapes."""
    import torch
    from torch import nn

    tokens, width = int(lengths.sum()), network.config.hidden_size
    total = flops = linear_seconds = 0.0
    with torch.inference_mode():
        for layer in (module for module in network.layers[0].modules() if isinstance(module, nn.Linear)):
            x = torch.randn(2048, layer.in_features, dtype=dtype)  # (B * T, in)
            layer(x)
            once = statistics.median(seconds(lambda x=x, layer=layer: [layer(x) for _ in range(10)]) for _ in range(5))
            linear_seconds += once / 10 / 2048 * tokens
            flops += 2 * layer.in_features * layer.out_features * tokens
    attention = 4 * width * float((lengths.astype(float) ** 2).sum()) / 2  # causal: half of the products
    total = (linear_seconds + attention * linear_seconds / flops) * network.config.num_hidden_layers
    return total


def bench_encode(args) -> None:
    import numpy as np
    import torch

    from query_representation import encode
    from support.cached_encoder import Encoder
    from support.encoder import load_encoder, tokenize

    tune_cpu()
    queries = corpus(args.files, args.sizes)
    with tempfile.TemporaryDirectory() as work:
        folder = make_encoder(Path(work) / "encoder", queries)
        cpu = torch.device("cpu")
        tokenizer, network = load_encoder(folder, cpu, torch.float32)
        _, network_half = load_encoder(folder, cpu, torch.bfloat16)
        lengths = np.array([len(ids) for ids in tokenize(queries, tokenizer, 512)])  # (Q,)
        print(f"\n{len(queries)} queries, {lengths.sum()} tokens, {torch.get_num_threads()} threads\n")
        result = {}

        def ours(network, name):
            result[name] = encode(queries, tokenizer, network)

        actions = {
            "ours": lambda: ours(network, "ours"),
            "half": lambda: ours(network_half, "half"),
            "plain": lambda: result.update(plain=encode_in_file_order(queries, tokenizer, network)),
            "floor": lambda: result.setdefault("floor", []).append(floor_seconds(network, lengths, torch.float32)),
        }
        try:
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

            parts = Transformer(str(folder), max_seq_length=512), Pooling(384, "mean")
            library = SentenceTransformer(modules=list(parts), device="cpu")
            actions["library"] = lambda: result.update(
                library=library.encode(queries, batch_size=32, convert_to_tensor=True)
            )
        except ImportError:
            print("sentence-transformers is not installed: its row is left out\n")
        encode(queries[:200], tokenizer, network)  # warm
        times = rounds(args.rounds, *actions.values())
        at = {name: i for i, name in enumerate(actions)}
        if "library" in actions:
            away = (result["ours"] - result["library"]).abs().max()
            report(
                "encoding, float32",
                "sentence-transformers, batch 32",
                f"{ratio(times, at['library'], at['ours']):.2f} x, vectors within {away:.0e}",
                ">= 2.2 x, 1e-4",
            )
        report(
            "encoding, float32", "file order, batches of 32", f"{ratio(times, at['plain'], at['ours']):.2f} x", ">= 6 x"
        )
        share = statistics.median(low / row[at["ours"]] for low, row in zip(result["floor"], times, strict=True))
        report("encoding, float32", "floor of its matrix products", f"{share:.0%}", ">= 75 %")
        report("encoding, bfloat16", "float32", f"{ratio(times, at['ours'], at['half']):.2f} x", ">= 1.7 x")
        median = {name: statistics.median(row[i] for row in times) for name, i in at.items() if name != "floor"}

        def run():
            return Encoder(str(folder), cpu, dtype="float32", cache_dir=Path(work) / "cache").embed(queries)

        first, second = seconds(run), seconds(run)
        report("second run on the same queries", "first run's encoding", f"{second / first:.1%}", "<= 2 %")
        print("\nmedian seconds:", ", ".join(f"{name} {value:.1f}" for name, value in median.items()))
        print(f"floor {statistics.median(result['floor']):.1f}; first run {first:.1f}, second {second:.2f}")


def bench_step(args) -> None:
    import torch
    from torch import nn

    from loss import bpr_loss
    from rankrouter import RankRouter
    from support.averaging import RunningMean
    from support.batches import BattleBatches, begin
    from train import train_epoch

    tune_cpu()
    torch.manual_seed(0)
    num_models, width, batch_size, steps = 20, 896, 32, 200
    router = RankRouter([f"m{i}" for i in range(num_models)], width, TOWERS)
    optimiser = torch.optim.AdamW(router.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    points, cluster_idx = torch.randn(2000, width), torch.randint(50, (2000,))
    a = torch.randint(num_models, (steps * batch_size,))
    query = torch.randint(2000, a.shape)
    battles = (query, torch.stack([a, (a + 1) % num_models], 1), torch.randint(2, a.shape).float())

    # Each linear layer: its product forward, and one backward for the weight and, but for the first, for the input.
    products = []
    for tower, rows in ((router.query_tower, batch_size), (router.model_tower, num_models)):
        for layer in (module for module in tower.modules() if isinstance(module, nn.Linear)):
            x, g = torch.randn(rows, layer.in_features), torch.randn(rows, layer.out_features)
            products += [partial(nn.functional.linear, x, layer.weight.detach()), partial(torch.mm, g.T, x)]
            if layer is not router.query_tower.semantic:
                products.append(partial(torch.mm, g, layer.weight.detach()))
    q, m, g = torch.randn(batch_size, 512), torch.randn(num_models, 512), torch.randn(batch_size, num_models)
    products += [partial(torch.mm, q, m.T), partial(torch.mm, g, m), partial(torch.mm, g.T, q)]
    twin = RankRouter(router.model_names, width, TOWERS)
    lone = torch.optim.AdamW(twin.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    for parameter in twin.parameters():
        parameter.grad = torch.randn_like(parameter)

    def floor():
        for _ in range(steps):
            for product in products:
                product()
            lone.step()

    batches = BattleBatches(points, cluster_idx, battles, batch_size)
    averaged = RunningMean(list(router.parameters()), 0.999)

    def epoch():
        for _ in train_epoch(router, optimiser, partial(bpr_loss, margin=1.0), batches, begin(batches)):
            averaged.update()

    epoch(), floor()
    times = rounds(3 * args.rounds, epoch, floor)
    ours, low = (statistics.median(row[i] for row in times) / steps * 1e3 for i in (0, 1))
    told = f"{ratio(times, 0, 1):.2f} x ({ours:.2f} ms, {low:.2f} ms)"
    report("training step", "its matrix products and fused optimiser", told, "<= 1.5 x")


def circulated_epoch(queries, battles, tokenizer, network, num_models: int) -> float:
    """Seconds of an epoch as the circulated script goes: two encoder passes a step in file order, nothing kept."""
    import torch

    from loss import bpr_loss
    from model_profiling import ModelTower
    from query_representation import QueryTower

    torch.manual_seed(0)
    query_tower, model_tower = QueryTower(384), ModelTower(num_models)
    optimiser = torch.optim.AdamW([*query_tower.parameters(), *model_tower.parameters()], lr=1e-4)

    def represent(some):
        vectors = encode_in_file_order(some, tokenizer, network).clone()  # (B, H)
        return query_tower(vectors, query_tower.assign(vectors))  # (B, D)

    start = time.perf_counter()
    for low in range(0, len(battles), 32):
        batch = battles.select(range(low, min(low + 32, len(battles))))
        texts = [queries[i] for i in batch.query_idx]
        a = torch.stack([model_tower()[i] for i in batch.model_a_idx])  # (B, D)
        b = torch.stack([model_tower()[i] for i in batch.model_b_idx])  # (B, D)
        scores = (represent(texts) * a).sum(1), (represent(texts) * b).sum(1)  # (B,) each
        loss = bpr_loss(*scores, torch.from_numpy(batch.outcome), margin=1.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return time.perf_counter() - start


def bench_runs(args) -> None:
    import numpy as np
    import pandas as pd
    import torch

    import train
    from data_loader import load_battles
    from support.encoder import load_encoder

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
        tokenizer, network = load_encoder(folder, torch.device("cpu"), torch.float32)
        flags = ("--data_path", str(work / "battles.parquet"), "--model_path", str(folder), "--dtype", "float32")

        # Training battles alone, as a router is trained on four fifths of them
        epoch = circulated_epoch(battles.queries, battles.select(np.arange(800)), tokenizer, network, 8)
        with contextlib.redirect_stdout(None):
            ours = seconds(lambda: train.main([*flags, "--no_cache", "--output_dir", str(work / "cold")]))
        told = f"{10 * epoch / ours:.0f} x ({10 * epoch:.0f} s, {ours:.1f} s)"
        report("10 epochs, 1,000 battles, float32, cold", "the circulated algorithm", told, ">= 60 x")

        modules = "argparse, hashlib, numpy, torch, pyarrow.parquet, sklearn.cluster, sklearn.metrics, scipy.optimize"
        imports = [sys.executable, "-c", f"import {modules}, sklearn.preprocessing, safetensors.torch"]
        whole, bare = [], []
        for number in range(8):
            command = [sys.executable, "train.py", *flags, "--seed", str(number), "--split_seed", "1"]
            command += ["--cache_dir", str(work / "cache"), "--output_dir", str(work / str(number))]
            start = partial(subprocess.run, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            whole.append(seconds(lambda command=command, start=start: start(command)))
            bare.append(seconds(lambda start=start: start(imports)))
        told = f"{8 * 10 * epoch / sum(whole):.0f} x ({80 * epoch:.0f} s, {sum(whole):.0f} s)"
        report("8 such runs, whole processes", "the circulated algorithm", told, ">= 50 x")
        beyond = max(run - imported for run, imported in zip(whole[1:], bare[1:], strict=True))
        report("each later run of the 8", "bare imports", f"at most {beyond:.1f} s beyond them", "<= 4 s")


def bench_route(args) -> None:
    import torch

    from rankrouter import RankRouter
    from support.demo import demo_folder

    tune_cpu()
    names = [f"provider/model-{i}" for i in range(100)]
    queries = [f"What is the answer to question {i}, and why?" for i in range(10_000)]
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        trained = work / "trained"
        flags = ("--demo", "--demo_dir", work, "--epochs", "1", "--limit", "500", "--no_cache", "--output_dir", trained)
        start = partial(subprocess.run, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        start([sys.executable, "train.py", *flags, "--baselines", "none"])
        small = RankRouter.load(trained / "best_model.pt")
        wide = RankRouter(names, 128, small.facts["args"])
        wide.query_tower.load_state_dict(small.query_tower.state_dict())
        wide.save(work / "wide.pt", **small.facts | {"best_single_model": names[0]})
        (work / "queries.txt").write_text("\n".join(queries))
        command = [sys.executable, "route.py", "--checkpoint", work / "wide.pt", "--cache_dir", work / "cache"]
        batch = partial(start, [*command, "--input", work / "queries.txt", "--output", work / "out.jsonl"])
        batch()
        times = rounds(args.rounds, batch, partial(start, [*command, queries[0]]))
        beyond = statistics.median(row[0] - row[1] for row in times)
        told = f"{beyond:.1f} s beyond it ({statistics.median(row[1] for row in times):.1f} s)"
        report("10,000 cached queries, 100 models", "one cached query, with the start", told, "<= 2 s")

        wide = RankRouter.load(work / "wide.pt")
        wide.open_encoder(str(demo_folder(str(work)) / "encoder"))
        tokenizer, network = wide.encoder.loaded
        numbers = iter(range(10**6))

        @torch.inference_mode()
        def bare():
            ids = tokenizer([f"How do I invert matrix {next(numbers)}?"], return_tensors="pt")
            network(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])

        def ranked():
            wide.rank([f"How do I invert matrix {next(numbers)}?"], top_k=3)

        rounds(50, bare, ranked)
        times = rounds(300 * args.rounds, bare, ranked)
        beyond = statistics.median(row[1] - row[0] for row in times) * 1e3
        told = f"{beyond:.2f} ms beyond it ({statistics.median(row[0] for row in times) * 1e3:.2f} ms)"
        report("rank one new query, 100 models", "its tokens and its encoder pass", told, "<= 1 ms")


def bench_scale(args) -> None:
    sizes, rows = (33_000, 330_000, 1_000_000), []
    with tempfile.TemporaryDirectory() as work:
        for size in sizes:
            path = Path(work) / f"{size}.parquet"
            write_synthetic(path, size)
            command = [sys.executable, ROOT / "tests" / "benchmark_scale.py", path]
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    for size, row in zip(sizes, rows, strict=True):
        told = ", ".join(f"{name} {value:.2f}" for name, value in row.items())
        report(f"{size:,} battles", "themselves", told, "<= 4 GB")
    for name in rows[0]:
        growth = rows[2][name] / rows[1][name] / (sizes[2] / sizes[1])
        if name != "peak GB":
            report(f"{name}, seconds per battle at 1 M", "at 330 K", f"{growth:.2f} x", "<= 1.3 x")
    totals = [sum(value for name, value in row.items() if name != "peak GB") for row in rows]
    growth = totals[2] / totals[0] / (sizes[2] / sizes[0])
    report("all stages, seconds per battle at 1 M", "at 33 K", f"{growth:.2f} x", "<= 1.3 x")


def main(argv: list[str] | None = None) -> None:
    """Print rows of the table for the parts asked for."""
    parts = {"encode": bench_encode, "step": bench_step, "runs": bench_runs, "route": bench_route, "scale": bench_scale}
    parser = OneLineParser("Measure speed as ratios, side by side in one run.")
    parser.add_argument("parts", nargs="*", choices=parts, default=list(parts), metavar="PART", help=", ".join(parts))
    parser.add_argument("--files", nargs="+", default=[], help="battles whose queries encode and runs draw from")
    parser.add_argument("--sizes", nargs="+", type=whole_number(1), default=[2000, 1000], help="queries of each file")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="of each comparison")
    args = parser.parse_args(argv)
    if {"encode", "runs"} & set(args.parts) and len(args.files) != len(args.sizes):
        parser.error(f"{len(args.files)} --files and {len(args.sizes)} --sizes; expected as many of each")
    print("| what | against | measured | to reach |\n|---|---|---|---|")
    for part in args.parts:
        parts[part](args)


if __name__ == "__main__":
    run_command(main)
