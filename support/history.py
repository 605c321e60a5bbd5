"""Histories of finished runs, read back: each whole and checked, or named with what is wrong with it."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Flags that do not make a result: where things lie, seeds, and how fast it goes. Data and encoder count by content.
NO_EXPERIMENT = {
    *("output_dir", "data_path", "model_path", "demo", "demo_dir", "cache_dir", "no_cache", "seed", "split_seed"),
    *("device", "dtype", "encode_tokens", "baselines"),
}


@dataclass(frozen=True)
class Run:
    """A finished run, as its `training_history.json` tells it; metrics and baselines go by their names there."""

    name: str
    flags: dict  # those that make the result
    seed: int
    split_seed: int
    data_path: str
    content_hash: str  # of the data
    model_path: str
    fingerprint: str  # of the encoder
    dtype: str
    test_by_train: float  # n_test / n_train, in queries
    train_losses: list[float]  # per epoch
    val_aucs: list[float]  # per epoch
    best_epoch: int
    val_auc: float  # of that epoch
    test: dict[str, float | None]
    intervals: dict[str, list[float] | None]
    calibration: dict[str, dict]  # "calibrated" and "uncalibrated": expected calibration error, bins
    baselines: dict[str, dict]
    score_table: dict[str, float]  # mean score of "best_single" and "oracle"; empty without a score table
    clusters: list[dict]  # size, central_queries, log_odds

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
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            problems.append(f"{file}: not a history of ours ({error}); left out")
    return runs, problems


def parse(name: str, history: dict) -> Run:
    """A finished run from its history. Raises one of Python's errors on values where it lacks or mistakes something."""
    args, data, encoder = history["args"], history["data"], history["encoder"]
    calibration, test = history["calibration"], history["test_metrics"]
    val_aucs, best_epoch = [_number(epoch["auc"]) for epoch in history["val_metrics"]], int(history["best_epoch"])
    return Run(
        name=name,
        flags={flag: value for flag, value in args.items() if flag not in NO_EXPERIMENT},
        seed=int(args["seed"]),
        split_seed=int(args["split_seed"]),
        data_path=str(data["path"]),
        content_hash=str(data["content_hash"]),
        model_path=str(encoder["path"]),
        fingerprint=str(encoder["fingerprint"]),
        dtype=str(encoder["dtype"]),
        test_by_train=_number(data["split"]["test"]["queries"]) / _number(data["split"]["train"]["queries"]),
        train_losses=[_number(loss) for loss in history["train_losses"]],
        val_aucs=val_aucs,
        best_epoch=best_epoch,
        val_auc=val_aucs[best_epoch],
        test=_metrics(test, dict.fromkeys([*test, "auc", "accuracy", "log_loss"])),
        intervals=_bounds(history["test_intervals"], test),
        calibration={
            "calibrated": _reliability(calibration),
            "uncalibrated": _reliability(calibration["uncalibrated"]),
        },
        baselines={baseline: _baseline(row) for baseline, row in history["baselines"].items()},
        score_table={
            end: _number(history["score_table"][end]["mean_score"])
            for end in ("best_single", "oracle")
            if "score_table" in history
        },
        clusters=[_cluster(cluster) for cluster in history.get("clusters", [])],
    )


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]!r} is no number")
    return float(value)


def _metrics(values: dict, names: Iterable[str]) -> dict[str, float | None]:
    return {name: None if _is_undefined(name, values) else _number(values[name]) for name in names}


def _bounds(values: dict, names: Iterable[str]) -> dict[str, list[float] | None]:
    return {
        name: None if _is_undefined(name, values) else [_number(values[name][0]), _number(values[name][1])]
        for name in names
    }


def _is_undefined(name: str, values: dict) -> bool:
    return name == "gap_closed" and values[name] is None  # where the best single model is an oracle


def _baseline(row: dict) -> dict:
    names = dict.fromkeys([*row["difference"], "auc"])
    return {
        "metrics": _metrics(row, names),
        "intervals": _bounds(row["intervals"], names),
        "difference": _metrics(row["difference"], names),
        "difference_intervals": _bounds(row["difference_intervals"], names),
    }


def _reliability(told: dict) -> dict:
    names = ("low", "high", "battles", "probability", "won")
    return {
        "expected_calibration_error": _number(told["expected_calibration_error"]),
        "bins": [{name: _number(part[name]) for name in names} for part in told["bins"]],
    }


def _cluster(cluster: dict) -> dict:
    return {
        "size": int(cluster["size"]),
        "central_queries": [str(query) for query in cluster["central_queries"]],
        "log_odds": {str(model): _number(odds) for model, odds in (cluster["log_odds"] or {}).items()},
    }
