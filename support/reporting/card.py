"""The model card of an exported router: what it routes, how it was trained, and what its test showed."""

import re
import shlex
from pathlib import Path

from rankrouter import Metadata, RankRouter, without_local_paths
from support.reporting.console import LABELS, bounds
from support.system.errors import one_line
from support.training.options import as_word, with_defaults

CARD = """---
library_name: rankrouter
tags:
- llm-routing
- model-routing
{base}---

# RankRouter of {count} models

Given a query, it ranks these models, the best for it first: {models}.{added}

## Use

In a clone of RankRouter, with its `requirements.txt` installed:

```python
from rankrouter import RankRouter

router = RankRouter.from_pretrained("FOLDER_OR_HUB_ID")
router.{opening}
print(router.rank(["How do I invert a matrix?"], top_k=3))
```

{encoder}

P(a beats b) is sigmoid((s_a - s_b) / {temperature:.4g}) of their scores. The best single model of training is
{single}{guard}.

## Test

{test}

## Training

{training}

## What is inside

`config.json` and `model.safetensors`; nothing in them is executed. They hold 64 bits of a hash of each training and
validation query, so that an evaluation can leave these out: somebody who knows a query can see whether it is there.
"""
NO_TEST = "No finished `training_history.json` of this router was beside its checkpoint."


def model_card(router: RankRouter, history: dict | None) -> str:
    """The card in Markdown, with the metadata that the hub reads; `history` is that of the training, if it is known."""
    metadata = without_local_paths(router.metadata)
    encoder, from_hub = metadata.encoder, metadata.encoder.get("from_hub", False)
    added = ", ".join(_code(each["model"]) for each in metadata.added_models)
    method = "open_embeddings" if encoder.get("precomputed") else "open_encoder"
    place = encoder["path"] if from_hub else f"PATH/TO/{encoder['path']}"
    return CARD.format(
        base=f"base_model: {encoder['path']}\n" if from_hub else "",
        count=len(router.model_names),
        models=", ".join(map(_code, router.model_names)),
        added=f" Added after training, and in no test: {added}." if added else "",
        opening=f'{method}("{place}")',
        encoder=_encoder(metadata, router.config.surface_features),
        temperature=metadata.temperature,
        single=_code(metadata.best_single_model),
        guard=_guard(metadata.confidence),
        test=NO_TEST if history is None else _test(history),
        training=_training(metadata, history, is_demo=_is_demo(router.metadata.args)),
    )


def _code(text: str) -> str:
    """A text as code of Markdown."""
    return f"`{one_line(text).replace('`', '')}`"


def _guard(confidence: float | None) -> str:
    if confidence is None:
        return ""
    call = '; `rank(queries, fallback="best")`'
    if confidence == 1:
        return f"{call} never leaves it, as nothing was gained on validation"
    return f"{call} leaves it only for a model that beats it with P > {confidence:g}, chosen on validation"


def _encoder(metadata: Metadata, surface_features: tuple[str, ...]) -> str:
    args, encoder = metadata.args, metadata.encoder
    beside = "; beside it, surface features of the text" if surface_features else ""
    if encoder.get("precomputed"):
        file = f"of the file {_code(encoder['path'])}, SHA-256 `{encoder['fingerprint']}`"
        return f"It was trained on precomputed embeddings, {file}, and needs those of new queries{beside}."
    layers = f"layers {', '.join(map(str, encoder['layers']))}, " if encoder.get("layers") else ""
    prefix = f", prefix {_code(encoder['prefix'])}" if encoder.get("prefix") else ""
    weights = "its trained weights are in this folder" if metadata.trained else "it is frozen, and not in this folder"
    tokens = encoder.get("max_length", args["max_length"])
    settings = f"{layers}{args['pooling']} pooling{prefix}, {encoder['dtype']}, at most {tokens} tokens"
    text = (
        f"The encoder is {_code(encoder['path'])}, {settings}{beside}; {weights}. Its fingerprint, a hash of its files,"
    )
    return f"{text} is `{encoder['fingerprint']}`; one with another is refused."


def _table(lines: list[list[str]]) -> str:
    head, *rows = ([re.sub(r"([\\|*<`])", r"\\\1", one_line(cell)) for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def _test(history: dict) -> str:
    """The test of one run: RankRouter's metrics, and the baselines compared with it."""
    data, intervals = history["data"], history["test_intervals"]
    metrics = [["metric", "RankRouter", "95 % interval"]]
    for name, value in history["test_metrics"].items():
        if value is not None:
            metrics.append([name, f"{value:.4f}", bounds(intervals[name]) if intervals[name] else ""])
    shown = [name for name in ("auc", "mean_score") if name in history["test_metrics"]]
    compared = [["compared with", *(head for name in shown for head in (name, "RankRouter minus it, 95 % interval"))]]
    for name, row in history["baselines"].items():
        cells = [LABELS.get(name, name)]
        for metric in shown:
            interval = bounds(row["difference_intervals"][metric], "+")
            cells += [f"{row[metric]:.4f}", f"{row['difference'][metric]:+.4f} {interval}"]
        compared.append(cells)
    size = data["split"]["test"]
    rows = f" in {data['table_rows']['test']} rows of a score table," if data["table_rows"] else ""
    text = f"Once, on {size['battles']} decisive battles of {size['queries']} queries,{rows} split by "
    text += f"{history['args']['split_by']}; one run, with seed {history['args']['seed']}. Intervals are over the test "
    text += "queries, and do not count what another training or split would change. Metrics and baselines are those of "
    text += f"RankRouter's docs/method.md.\n\n{_table(metrics)}"
    return text + (f"\n\n{_table(compared)}" if history["baselines"] else "")


def _is_demo(args: dict) -> bool:
    """Whether data and encoder are both the demo's, which has them in one folder."""
    folders = {Path(str(args[name])).parent for name in ("data_path", "model_path")}
    return bool(args.get("demo")) and len(folders) == 1 and folders.pop().name.startswith("demo-")


def _training(metadata: Metadata, history: dict | None, is_demo: bool) -> str:
    """The data, the flags that differ from their defaults, and the commit."""
    args, defaults = metadata.args, with_defaults({})
    changed = {name: value for name, value in args.items() if name in defaults and value != defaults[name]}
    places = {name: args.get(name) for name in ("data_path", "model_path", "embeddings")}
    places = {"demo": True} if is_demo else places
    places["dtype"] = metadata.encoder["dtype"] if args["model_path"] else None
    in_memory = args["data_path"] == "memory"
    if in_memory:
        del places["data_path"]
    words = ["python", "train.py"]
    seeds = {"seed": args["seed"], "split_seed": args["split_seed"] if args["split_seed"] != args["seed"] else None}
    for name, value in (places | seeds | changed).items():
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", shlex.quote(as_word(value))]
    data = (
        "Data: battles in memory"
        if in_memory
        else f"Data: {_code(args['data_path'])}{' of the demo' if is_demo else ''}"
    )
    data += f", content hash `{metadata.content_hash}`"
    if history is not None:
        data += f", {history['data']['battles']} battles on {history['data']['queries']} queries"
        if commit := history["environment"]["commit"]:
            data += f". Commit of RankRouter: {_code(commit)}"
    return f"{data}. Of paths, only the last part is shown.\n\n```bash\n{' '.join(words)}\n```"
