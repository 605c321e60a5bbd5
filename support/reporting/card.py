"""The model card of an exported router: what it routes, how it was trained, and what its test showed."""

import re
import shlex

from rankrouter import Metadata, RankRouter, without_folders
from support.reporting.console import LABELS, bounds
from support.system.errors import one_line
from support.system.hub import is_hub_id
from support.training.options import with_defaults

CARD = """---
library_name: rankrouter
tags:
- llm-routing
- model-routing
{base}---

# RankRouter of {count} models

Ranks these models for a query, the best first: {models}.{added}

## Use

In a checkout of RankRouter, with this folder or its hub id:

```python
from rankrouter import RankRouter

router = RankRouter.from_pretrained("FOLDER")
router.{opening}
print(router.rank(["How do I invert a matrix?"], top_k=3))
```

{encoder}

P(a beats b) is sigmoid((s_a - s_b) / {temperature:.4g}). The best single model of training is {single}{guard}.

## Test

{test}

## Training

{training}

## What is inside

`config.json` and `model.safetensors`; nothing in them is executed. They hold 64 bits of a hash of each training and
validation query, so that an evaluation can leave these out: somebody who knows a query can see whether it is there.
"""


def model_card(router: RankRouter, history: dict | None) -> str:
    """The card in Markdown, with the metadata that the hub reads; `history` is that of the training, if it is known."""
    metadata = without_folders(router.metadata)
    path, is_precomputed = metadata.encoder["path"], metadata.encoder.get("precomputed", False)
    is_public = is_hub_id(path) and not is_precomputed
    added = ", ".join(_code(each["model"]) for each in metadata.added_models)
    place = path if is_public else f"../{path}"
    no_history = "No finished `training_history.json` of this router was beside its checkpoint."
    return CARD.format(
        base=f"base_model: {path}\n" if is_public else "",
        count=len(router.model_names),
        models=", ".join(map(_code, router.model_names)),
        added=f" Added after training, and not in the test below: {added}." if added else "",
        opening=f'open_embeddings("{place}")' if is_precomputed else f'open_encoder("{place}")',
        encoder=_encoder(metadata),
        temperature=metadata.temperature,
        single=_code(metadata.best_single_model),
        guard=_guard(metadata.confidence),
        test=no_history if history is None else _test(history),
        training=_training(metadata, history),
    )


def _guard(confidence: float | None) -> str:
    if confidence is None:
        return ""
    return f'; `fallback="best"` {"never leaves it" if confidence == 1 else f"leaves it where P > {confidence:g}"}'


def _encoder(metadata: Metadata) -> str:
    encoder = metadata.encoder
    if encoder.get("precomputed"):
        file = f"of the file {_code(encoder['path'])}, SHA-256 `{encoder['fingerprint']}`"
        return f"It was trained on precomputed embeddings, {file}, and needs those of new queries."
    prefix = f", prefix {_code(encoder['prefix'])}" if encoder.get("prefix") else ""
    weights = "its trained weights are in this folder" if metadata.trained else "it is frozen, and not in this folder"
    settings = f"{encoder['pooling']} pooling{prefix}, {encoder['dtype']}, at most {encoder['max_length']} tokens"
    text = f"The encoder is {_code(encoder['path'])}, {settings}; {weights}. Another one than that with the fingerprint"
    return f"{text} `{encoder['fingerprint']}` is refused."


def _code(text: str) -> str:
    """A name as code of Markdown."""
    return f"`{one_line(text).replace('`', '')}`"


def _table(lines: list[list[str]]) -> str:
    head, *rows = ([re.sub(r"([\\|*<`])", r"\\\1", one_line(cell)) for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def _test(history: dict) -> str:
    """The test of one run: RankRouter's metrics, and the baselines compared with it."""
    size, intervals = history["data"]["split"]["test"], history["test_intervals"]
    metrics = [["metric", "RankRouter", "95 %"]]
    for name, value in history["test_metrics"].items():
        if value is not None:
            metrics.append([name, f"{value:.4f}", bounds(intervals[name]) if intervals[name] else ""])
    shown = [name for name in ("auc", "mean_score") if name in history["test_metrics"]]
    compared = [["compared with", *(head for name in shown for head in (name, "RankRouter minus it, 95 %"))]]
    for name, row in history["baselines"].items():
        cells = [LABELS.get(name, name)]
        for metric in shown:
            interval = bounds(row["difference_intervals"][metric], "+")
            cells += [f"{row[metric]:.4f}", f"{row['difference'][metric]:+.4f} {interval}"]
        compared.append(cells)
    text = f"Once, on {size['battles']} battles of {size['queries']} queries that training did not see; one run, with "
    text += f"seed {history['args']['seed']}. Intervals are over the test queries, and do not count what another "
    text += f"training or split would change.\n\n{_table(metrics)}"
    return text + (f"\n\n{_table(compared)}" if history["baselines"] else "")


def _training(metadata: Metadata, history: dict | None) -> str:
    """The data, the flags that differ from their defaults, and the commit."""
    args, defaults = metadata.args, with_defaults({})
    changed = {name: value for name, value in args.items() if name in defaults and value != defaults[name]}
    places = {"demo": True} if args["demo"] else {name: args[name] for name in ("data_path", "model_path")}
    flags = places | {"seed": args["seed"]} | changed
    words = ["python", "train.py"]
    for name, value in flags.items():
        if value is not None and value is not False:
            value = ",".join(map(str, value)) if isinstance(value, list) else value
            words += [f"--{name}"] if value is True else [f"--{name}", shlex.quote(one_line(value))]
    data = f"Data: {_code(args['data_path'])}, content hash `{metadata.content_hash}`"
    if history is not None:
        counts, commit = history["data"], history["environment"]["commit"]
        data += f", {counts['battles']} battles on {counts['queries']} queries"
        data += f". Commit of RankRouter: {_code(str(commit))}"
    return f"{data}.\n\n```bash\n{' '.join(words)}\n```"
