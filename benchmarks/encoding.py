"""Speed of encoding queries, cold and cached: `python -m benchmarks.encoding --files a.parquet b.parquet`."""

import statistics
import tempfile
from pathlib import Path

from benchmarks.common import (
    add_corpus,
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
from support.system.device import tune_cpu


def floor_seconds(network, lengths) -> float:
    """Seconds for the encoder's matrix products on texts of these lengths (Q,), without padding, in its own shapes."""
    import torch
    from torch import nn

    from support.encoding.huggingface import PackedLinear

    tokens, width = int(lengths.sum()), network.config.hidden_size
    flops = linear_seconds = 0.0
    with torch.inference_mode():
        for layer in (module for module in network.layers[0].modules() if isinstance(module, nn.Linear | PackedLinear)):
            x = torch.randn(2048, layer.in_features)  # (B * T, in)
            layer(x)
            once = statistics.median(seconds(lambda x=x, layer=layer: [layer(x) for _ in range(10)]) for _ in range(5))
            linear_seconds += once / 10 / 2048 * tokens
            flops += 2 * layer.in_features * layer.out_features * tokens
    attention = 4 * width * float((lengths.astype(float) ** 2).sum()) / 2  # causal: half of the products
    return (linear_seconds + attention * linear_seconds / flops) * network.config.num_hidden_layers


def sentence_transformer(folder: str):
    """The same encoder in sentence-transformers; None where that is not installed."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    except ImportError:
        print("sentence-transformers is not installed: its row is left out\n")
        return None
    modules = [Transformer(folder, max_seq_length=512), Pooling(384, "mean")]
    return SentenceTransformer(modules=modules, device="cpu")


def benchmark(queries: list[str], work: Path, number: int) -> None:
    """Print the rows of the table, each over a number of rounds."""
    import numpy as np
    import torch

    from support.encoding.encoder import QueryEncoder

    folder, cpu = make_encoder(work / "encoder", queries), torch.device("cpu")
    full, half = (QueryEncoder(folder, cpu, dtype=dtype, progress=False) for dtype in ("float32", "bfloat16"))
    options = {"dtype": "float32", "progress": False}
    middle = QueryEncoder(folder, cpu, layers=[3], pooling="mean+last", **options)  # of six
    candidates = QueryEncoder(folder, cpu, cache_layers=[1, 2, 3, 4, 5, 6], **options)
    tokenizer, network = full.loaded
    lengths = np.array([len(ids) for ids in full.tokenize(queries)])  # (Q,)
    print(f"\n{len(queries)} queries, {lengths.sum()} tokens, {torch.get_num_threads()} threads\n")
    library, floors, embeddings = sentence_transformer(folder), [], {}
    actions = {
        "ours": lambda: embeddings.update(ours=full.embed(queries)[0]),
        "half": lambda: half.embed(queries),
        "middle": lambda: middle.embed(queries),
        "candidates": lambda: candidates.embed(queries),
        "plain": lambda: encode_in_file_order(queries, tokenizer, network),
        "floor": lambda: floors.append(floor_seconds(network, lengths)),
    }
    if library is not None:
        actions["library"] = lambda: embeddings.update(
            library=library.encode(queries, batch_size=32, convert_to_tensor=True)
        )
    for encoder in (full, half, middle, candidates):
        encoder.embed(queries[:200])  # warm
    print_header()
    times = rounds(number, *actions.values())
    at = {name: i for i, name in enumerate(actions)}
    if library is not None:
        away = (embeddings["ours"] - embeddings["library"]).abs().max()
        measured = f"{ratio(times, at['library'], at['ours']):.2f} x, vectors within {away:.0e}"
        report("encoding, float32", "sentence-transformers, batch 32", measured, ">= 2.2 x, 1e-4")
    measured = f"{ratio(times, at['plain'], at['ours']):.2f} x"
    report("encoding, float32", "file order, batches of 32", measured, ">= 6 x")
    share = statistics.median(floor / row[at["ours"]] for floor, row in zip(floors, times, strict=True))
    report("encoding, float32", "floor of its matrix products", f"{share:.0%}", ">= 75 %")
    report("encoding, bfloat16", "float32", f"{ratio(times, at['ours'], at['half']):.2f} x", ">= 1.7 x")

    report("up to the middle layer", "all layers", f"{ratio(times, at['middle'], at['ours']):.2f} x", "<= 0.55 x")
    measured = f"{ratio(times, at['candidates'], at['ours']):.2f} x"
    report("with mean and last token of all six layers", "the mean of the last", measured, "<= 1.05 x")

    def run():
        QueryEncoder(folder, cpu, dtype="float32", cache_dir=work / "cache", progress=False).embed(queries)

    first, second = seconds(run), seconds(run)
    report("second run on the same queries", "first run's encoding", f"{second / first:.1%}", "<= 2 %")
    print("\nmedian seconds:", ", ".join(f"{name} {median(times, i):.1f}" for name, i in at.items() if name != "floor"))
    print(f"floor {statistics.median(floors):.1f}; first run {first:.1f}, second {second:.2f}")


def main(argv: list[str] | None = None) -> None:
    """Encode queries of battles by a random Qwen2 and print the table."""
    parser = OneLineParser("Measure the speed of encoding as ratios, side by side in one run.")
    add_corpus(parser)
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="of each comparison")
    args = parser.parse_args(argv)
    tune_cpu()
    queries = corpus(args.files, args.sizes)
    with tempfile.TemporaryDirectory() as work:
        benchmark(queries, Path(work), args.rounds)


if __name__ == "__main__":
    run_command(main)
