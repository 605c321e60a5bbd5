"""What a CPU or a GPU achieves: `python -m benchmarks.device encoders --files a.parquet b.parquet --device cuda`."""

import statistics
import tempfile
from pathlib import Path

from benchmarks.common import add_corpus, corpus, make_encoder, median, print_header, report, rounds, seconds, shapes
from benchmarks.finetuning import prepare, take_steps
from benchmarks.training import frozen_epoch
from support.system.command_line import OneLineParser, run_command, whole_number
from support.system.device import pick_device, threads, tune_cpu


def synchronize(device) -> None:
    """Wait until a GPU has done what it was told."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action, device) -> float:
    """Seconds that a call takes, with all that it left to the device."""

    def complete():
        action()
        synchronize(device)

    synchronize(device)
    return seconds(complete)


def matrix_rate(device, dtype: str) -> float:
    """Floating-point operations a second of a large product; on a CPU that of its faster library."""
    import torch

    from support.encoding.huggingface import PackedLinear

    size, count = (8192, 20) if device.type == "cuda" else (4096, 1)
    options = {"device": device, "dtype": getattr(torch, dtype)}
    x, layer = torch.randn(size, size, **options), torch.nn.Linear(size, size, bias=False, **options)
    can_pack = device.type == "cpu" and torch.backends.mkldnn.is_available()
    layers = [layer, PackedLinear(layer.weight.detach(), None)] if can_pack else [layer]
    with torch.inference_mode():
        times = [timed(lambda each=each: [each(x) for _ in range(count)], device) for _ in range(5) for each in layers]
    return 2 * size**3 * count / min(times)


def operations(network, lengths) -> float:
    """Floating-point operations of a pass over texts of these lengths (Q,): products of the layers and of attention."""
    from torch import nn

    from support.encoding.huggingface import PackedLinear, layers_of

    layers = layers_of(network)
    linear = [part for part in layers.modules() if isinstance(part, nn.Linear | PackedLinear)]
    weights = sum(part.in_features * part.out_features for part in linear)
    is_causal = network.config.model_type == "qwen2"  # half of attention's products are masked
    attention = 4 * network.config.hidden_size * len(layers) * float((lengths.astype(float) ** 2).sum())
    return 2 * weights * float(lengths.sum()) + attention / (2 if is_causal else 1)


def benchmark_encoders(args, device) -> None:
    """Tokens a second of both shapes, and their share of the device's matrix rate."""
    import numpy as np

    from support.encoding.encoder import QueryEncoder

    queries = corpus(args.files, args.sizes)
    for dtype in ("float32", "bfloat16"):
        rate = matrix_rate(device, dtype)
        for name, config in shapes().items():
            with tempfile.TemporaryDirectory() as folder:
                path = make_encoder(Path(folder), queries, config)
                encoder = QueryEncoder(path, device, dtype=dtype, progress=False)
                lengths = np.array([len(ids) for ids in encoder.tokenize(queries)])  # (Q,)
                encoder.embed(queries[: len(queries) // 8])  # warm
                times = [timed(lambda e=encoder: e.embed(queries), device) for _ in range(args.rounds)]
            middle = statistics.median(times)
            share = operations(encoder.loaded[1], lengths) / middle / rate
            measured = f"{lengths.sum() / middle:,.0f} tokens a second, {share:.0%}"
            report(f"encoding, {name}, {dtype}", f"{rate / 1e12:.3g} TFLOP/s of a large product", measured)


def benchmark_towers(args, device) -> None:
    """Steps a second of frozen towers on the device and on one thread of the CPU."""
    import torch

    for num_models, batch_size in ((20, 32), (20, 1024), (100, 1024), (100, 8192)):
        steps = 100 if batch_size < 8192 else 20
        places = [device, torch.device("cpu")] if device.type == "cuda" else [device]
        with threads(1):
            epochs = [frozen_epoch(place, num_models, batch_size, steps)[1] for place in places]
            for epoch in epochs:
                epoch()
            times = rounds(args.rounds, *epochs)
        measured = ", ".join(f"{steps / median(times, i):,.0f} on {place.type}" for i, place in enumerate(places))
        report(f"steps of frozen towers, B {batch_size}, M {num_models}", "a second", measured)


def benchmark_finetuning(args, device) -> None:
    """Training steps of the Qwen2 with adapters and of all its weights: tokens a second, share of the matrix rate."""
    rate, queries = matrix_rate(device, "bfloat16"), corpus(args.files, args.sizes)
    count, budget = (20, 16384) if device.type == "cuda" else (1, 2048)  # steps, tokens of each
    for name, lora_rank in (("rank 8", 8), ("all weights", None)):
        with tempfile.TemporaryDirectory() as folder:
            path = make_encoder(Path(folder), queries, shapes()["Qwen2-0.5B"])
            state, flags = prepare(args.files[0], path, None, lora_rank, limit=3000, device=device, tokens=budget)
        take_steps(state, flags, 2)  # warm
        times = [timed(lambda s=state, f=flags: take_steps(s, f, count), device) for _ in range(args.rounds)]
        lengths = [state.batches.lengths[batch] for batch in state.planned[:count]]  # (b,) each
        passes = 3 if lora_rank is None else 2  # of frozen weights no gradient is computed
        needed = passes * sum(operations(state.batches.encoder.loaded[1], each) for each in lengths)
        middle = statistics.median(times)
        measured = f"{sum(map(sum, lengths)) / middle:,.0f} tokens a second, {needed / middle / rate:.0%}"
        report(f"finetuning, Qwen2-0.5B, {name}", f"{rate / 1e12:.3g} TFLOP/s of a large product", measured)


def main(argv: list[str] | None = None) -> None:
    """Print the rows of the table for the requested parts."""
    parts = {"encoders": benchmark_encoders, "towers": benchmark_towers, "finetuning": benchmark_finetuning}
    parser = OneLineParser("Measure what this CPU or GPU achieves, on encoders of real shapes with random weights.")
    parser.add_argument("parts", nargs="+", choices=parts, metavar="PART", help=", ".join(parts))
    add_corpus(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="of each comparison")
    args = parser.parse_args(argv)
    tune_cpu()
    device = pick_device(args.device)
    print_header()
    for part in args.parts:
        parts[part](args, device)


if __name__ == "__main__":
    run_command(main)
