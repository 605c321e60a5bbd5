"""Histories of finished runs, read back: each whole and checked, or named with what is wrong with it."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from support.selection import moments

# Flags that do not make a result: where things lie, seeds, and how fast it goes. Data and encoder count by content.
NO_EXPERIMENT = {
    *("output_dir", "data_path", "model_path", "demo", "demo_dir", "cache_dir", "no_cache", "seed", "split_seed"),
    *("device", "dtype", "encode_tokens", "baselines", "deterministic", "checkpoint_minutes"),
    *("accumulate", "gradient_checkpointing"),
}
NO_HISTORY = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)  # of `parse`
TEST_SET = ("split_by", "limit", "score_columns", "hold_out_model")  # flags that say which battles are in the test


@dataclass(frozen=True)
class Run:
    """A finished run, as its `training_history.json` tells it; metrics and baselines go by their names there."""

    name: str
    flags: dict  # those that make the result
    seed: int
    split_seed: int
    data_path: str
    content_hash: str  # of the file
    model_path: str
    fingerprint: str  # of the encoder
    dtype: str
    test_set: tuple  # what the test battles follow from, but for the split's seed
    test_queries: int
    test_by_train: float  # n_test / n_train, in what the split draws: queries or battles
    train_losses: list[float]  # per epoch
    val_aucs: list[float]  # per epoch
    best_epoch: int
    val_auc: float  # of the best moment, which lies in that epoch
    test: dict[str, float | None]
    intervals: dict[str, list[float] | None]
    calibration: dict[str, dict]  # "calibrated" and "uncalibrated": expected calibration error, bins
    baselines: dict[str, dict]
    score_table: dict[str, float]  # mean score of "best_single" and "oracle"; empty without a score table
    clusters: list[dict]  # those that are not empty: size, central_query, log_odds by model

    @property
    def seeds(self) -> tuple[int, int]:
        return self.split_seed, self.seed

    @property
    def experiment(self) -> tuple:
        """What runs that differ by their seeds only share."""
        return self.content_hash, self.fingerprint, self.dtype, json.dumps(self.flags, sort_keys=True)


def read_runs(paths: list[str]) -> tuple[list[Run], list[str]]:
    """The finished runs at `paths`, folders or history files, and a line for each path without one that says why."""
    runs, problems, seen = [], [], set()
    for path in paths:
        file = Path(path) / "training_history.json" if os.path.isdir(path) else Path(path)
        name = str(file.parent if file.name == "training_history.json" else file)
        if os.path.realpath(file) in seen:  # `outputs/* outputs/best` names one twice
            continue
        seen.add(os.path.realpath(file))
        if os.path.exists(file) and not os.path.isfile(file):  # a pipe, which would never end
            problems.append(f"{path}: no history (it is no file); left out")
            continue
        try:
            history = json.loads(file.read_bytes())
            status = history["status"]
            if status != "finished":
                problems.append(f"{name}: {status} after {len(history['val_metrics'])} epochs; left out")
            else:
                runs.append(parse(name, history))
        except OSError as error:
            problems.append(f"{path}: no history ({error.strerror or error}); left out")
        except KeyError as error:
            problems.append(f"{file}: it lacks {error}, which a history of this version has; left out")
        except NO_HISTORY as error:
            problems.append(f"{file}: not a history of ours ({error}); left out")
    return runs, problems


def parse(name: str, history: dict) -> Run:
    """A finished run from its history. Raises one of Python's errors on values where it lacks or mistakes something."""
    args, data, encoder, test = history["args"], history["data"], history["encoder"], history["test_metrics"]
    calibration, sides = history["calibration"], data["split"]
    losses = [_number(loss) for loss in history["train_losses"]]
    val_aucs = [_number(epoch["auc"]) for epoch in history["val_metrics"]]
    best_epoch = _whole(history["best_epoch"], 0)
    if not best_epoch < len(val_aucs) == len(losses):
        raise ValueError(f"best_epoch is {best_epoch} of {len(val_aucs)} epochs and {len(losses)} losses")
    best_moments = [val for epoch, step, val in moments(history) if (epoch, step) == (best_epoch, history["best_step"])]
    if len(best_moments) != 1:
        raise ValueError(f"there are {len(best_moments)} validations of best_epoch and best_step")
    unit = "battles" if args["split_by"] == "battle" else "queries"
    return Run(
        name=name,
        flags={flag: value for flag, value in args.items() if flag not in NO_EXPERIMENT},
        seed=_whole(args["seed"], 0),
        split_seed=_whole(args["split_seed"], 0),
        data_path=str(data["path"]),
        content_hash=str(data["content_hash"]),
        model_path=str(encoder["path"]),
        fingerprint=str(encoder["fingerprint"]),
        dtype=str(encoder["dtype"]),
        test_set=(str(data["content_hash"]), *(str(args.get(flag)) for flag in TEST_SET)),
        test_queries=_whole(sides["test"]["queries"], 1),
        test_by_train=_whole(sides["test"][unit], 1) / _whole(sides["train"][unit], 1),
        train_losses=losses,
        val_aucs=val_aucs,
        best_epoch=best_epoch,
        val_auc=_number(best_moments[0]["auc"]),
        test=_metrics(test, dict.fromkeys([*test, "auc", "accuracy", "log_loss"])),
        intervals=_bounds(history["test_intervals"], test),
        calibration={
            "calibrated": _reliability(calibration),
            "uncalibrated": _reliability(calibration["uncalibrated"]),
        },
        baselines={baseline: _baseline(row, test) for baseline, row in history["baselines"].items()},
        score_table={
            end: _number(history["score_table"][end]["mean_score"])
            for end in ("best_single", "oracle")
            if "score_table" in history or "mean_score" in test
        },
        clusters=_clusters([cluster for cluster in history.get("clusters", []) if cluster["log_odds"]]),
    )


def _number(value: object) -> float:
    # Beyond the bound a mean or a picture would overflow, and no run gets there.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e100:
        raise ValueError(f"{str(value)[:40]!r} is no number that a run writes")
    return float(value)


def _whole(value: object, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{str(value)[:40]!r} is no whole number of at least {least}")
    return value


def _metrics(values: dict, names: Iterable[str]) -> dict[str, float | None]:
    return {name: None if _is_undefined(name, values) else _number(values[name]) for name in names}


def _bounds(values: dict, names: Iterable[str]) -> dict[str, list[float] | None]:
    return {
        name: None if _is_undefined(name, values) else [_number(values[name][0]), _number(values[name][1])]
        for name in names
    }


def _is_undefined(name: str, values: dict) -> bool:
    return name == "gap_closed" and values[name] is None  # where the best single model is an oracle


def _baseline(row: dict, names: Iterable[str]) -> dict:
    return {
        "metrics": _metrics(row, names),
        "intervals": _bounds(row["intervals"], names),
        "difference": _metrics(row["difference"], names),
        "difference_intervals": _bounds(row["difference_intervals"], names),
    }


def _reliability(told: dict) -> dict:
    names, bins = ("low", "high", "probability", "won"), told["bins"]
    if not bins:
        raise ValueError("its reliability has no bins")
    return {
        "expected_calibration_error": _number(told["expected_calibration_error"]),
        "bins": [
            {name: _number(part[name]) for name in names} | {"battles": _whole(part["battles"], 1)} for part in bins
        ],
    }


def _clusters(clusters: list[dict]) -> list[dict]:
    models = clusters[0]["log_odds"] if clusters else {}
    return [
        {
            "size": _whole(cluster["size"], 1),
            "central_query": str(cluster["central_queries"][0]),
            "log_odds": {model: _number(cluster["log_odds"][model]) for model in models},
        }
        for cluster in clusters
    ]
