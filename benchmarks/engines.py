"""Encoding on a CPU against other engines, and where its time goes: `python -m benchmarks.engines --model_path M ...`.

OpenVINO and ONNX Runtime get the same batches; those of them are measured that are installed, ONNX Runtime with onnx.
"""

import tempfile
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from benchmarks.common import add_corpus, corpus, print_header, ratio, report, rounds
from support.system.command_line import OneLineParser, run_command, some_path, whole_number
from support.system.device import tune_cpu

KINDS = {  # of a profile, by parts of the names of torch's operations
    "matrix products": ("linear_pointwise", "addmm"),
    "attention": ("scaled_dot_product",),
    "activation": ("gelu", "silu", "relu"),
    "normalization": ("layer_norm", "rms_norm"),
}


def last_states(encoder):
    """The encoder's network without packed weights, from ids and mask to hidden states, for other engines to trace."""
    import torch

    from support.encoding.huggingface import load_encoder

    _, network = load_encoder(encoder.folder, torch.device("cpu"), torch.float32)

    class States(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, input_ids, attention_mask):
            return self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, T, W)

    return States()


def by_openvino(encoder, example: tuple, precision: str):
    """A function from ids and mask, numpy (B, T) each, to hidden states (B, T, W) by OpenVINO."""
    import openvino as ov

    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(ov.convert_model(last_states(encoder), example_input=example), "CPU", hints)
    return lambda ids, mask: compiled([ids, mask])[0]


def by_onnxruntime(encoder, example: tuple):
    """The same by ONNX Runtime in float32."""
    import onnxruntime as ort
    import torch

    names, axes = ["input_ids", "attention_mask"], {0: "batch", 1: "tokens"}
    with tempfile.TemporaryDirectory() as folder:
        file, options = str(Path(folder) / "model.onnx"), {"dynamo": False, "opset_version": 17}
        options |= {"input_names": names, "dynamic_axes": dict.fromkeys(names, axes)}
        torch.onnx.export(last_states(encoder), example, file, **options)
        session = ort.InferenceSession(file)
    return lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0]


def embed_by(engine, encoder, queries: list[str]):
    """Embeddings (Q, H) by another engine, of the same batches as `encoder`."""
    import numpy as np
    import torch

    from support.encoding.batching import pad, plan_batches
    from support.encoding.encode import TOKENS_PER_BATCH
    from support.encoding.encoder import pool

    ids = encoder.tokenize(queries)  # Q of (T,)
    batches, pooled = plan_batches(np.array([len(each) for each in ids]), TOKENS_PER_BATCH["cpu"]), []
    for batch in batches:
        padded, mask = pad([ids[i] for i in batch], encoder.device)  # (B, T) each
        states = torch.from_numpy(engine(padded.numpy(), mask.numpy()))  # (B, T, W)
        pooled.append(pool(states, mask, encoder.pooling))  # (B, H)
    return torch.cat(pooled)[np.argsort(np.concatenate(batches))]  # (Q, H)


def profile(encoder, queries: list[str]) -> dict[str, float]:
    """The share of the time in torch's operations by their kind; tokenizing is not among them."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        encoder.embed(queries)
    shares, total = Counter(), 0
    for event in recorded.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "others")
        shares[kind] += event.self_cpu_time_total
        total += event.self_cpu_time_total
    return {kind: time / total for kind, time in shares.most_common()}


def main(argv: list[str] | None = None) -> None:
    """Encode queries of battles by each engine and print the table."""
    import torch

    from support.encoding.batching import pad
    from support.encoding.encoder import QueryEncoder

    parser = OneLineParser("Measure encoding on a CPU against other engines.")
    add_corpus(parser)
    parser.add_argument("--model_path", type=some_path, required=True, help="an encoder with mean, cls or last pooling")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="of each comparison")
    args = parser.parse_args(argv)
    tune_cpu()
    warnings.simplefilter("ignore")  # of tracing
    queries, cpu = corpus(args.files, args.sizes), torch.device("cpu")
    ours, half = (QueryEncoder(args.model_path, cpu, dtype=name, progress=False) for name in ("float32", "bfloat16"))
    ids = ours.tokenize(["A short query.", "A query that is longer than the other one, so that that one is padded."])
    example, engines = pad(ids, cpu), {}
    if find_spec("openvino"):
        engines |= {f"OpenVINO, {precision}": by_openvino(ours, example, precision) for precision in ("f32", "bf16")}
    if find_spec("onnxruntime") and find_spec("onnx"):
        engines["ONNX Runtime, float32"] = by_onnxruntime(ours, example)
    actions = {"ours": lambda: ours.embed(queries)[0], "bfloat16": lambda: half.embed(queries)[0]}
    actions |= {name: lambda each=each: embed_by(each, ours, queries) for name, each in engines.items()}
    embeddings = {name: action() for name, action in actions.items()}  # warm
    times = rounds(args.rounds, *actions.values())
    print_header()
    for i, name in enumerate(actions):
        away = (embeddings[name] - embeddings["ours"]).abs().max()
        report(f"encoding, {name}", "ours in float32", f"{ratio(times, i, 0):.2f} x the time, within {away:.0e}")
    for encoder in (ours, half):
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in profile(encoder, queries).items())
        report(f"profile, {encoder.dtype}", "torch's operations", shares)


if __name__ == "__main__":
    run_command(main)
