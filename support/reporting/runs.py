"""Read finished runs back from their `training_history.json`, checking every value that a report uses."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.system.files import is_locked
from support.training.options import NO_EXPERIMENT, with_defaults

NO_HISTORY = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)  # raised by `parse`
TEST_SET = (
    "split_by",
    "split_column",
    "group_column",
    "test_groups",
    "limit",
    "score_columns",
    "query_column",
    "hold_out_model",
)  # flags that determine the test battles
REQUIRED = ("auc", "accuracy", "log_loss")  # metrics of the test
LARGEST = 1e100  # far above any value of a real run; a mean or a picture of larger values could overflow


@dataclass(frozen=True)
class Run:
    """A finished run; metrics and baselines are named as in `training_history.json`."""

    name: str
    flags: dict  # those that affect the result, with hashes for the data and the encoder
    paths: dict[str, str]  # "data_path" and "model_path"
    seed: int
    split_seed: int
    test_set: tuple  # what determines the test battles, except the split seed
    test_queries: int
    test_by_train: float  # n_test / n_train, counted in the unit that is split: queries or battles
    train_losses: list[float]  # per epoch
    val_aucs: list[float]  # per epoch
    best_epoch: int
    val_auc: float  # of the best validation, at the end of best_epoch or within it
    test: dict[str, float | None]
    intervals: dict[str, list[float] | None]
    calibration: dict[str, dict]  # "calibrated" and "uncalibrated": expected calibration error, bins
    baselines: dict[str, dict]
    score_table: dict[str, float]  # mean score of "best_single" and "oracle"; empty without a score table
    clusters: list[dict]  # the nonempty ones: size, central_queries, log_odds by model
    choice_shares: dict[str, dict]  # of RankRouter, baselines and the oracle: share and interval by model
    curves: dict[str, list[dict]]  # of RankRouter and baselines: points with mean_cost, mean_score, interval
    priced_models: dict[str, dict]  # mean_cost and mean_score of each model; empty without costs, as are curves

    @property
    def seeds(self) -> tuple[int, int]:
        return self.split_seed, self.seed

    @property
    def experiment(self) -> str:
        """Equal for runs that differ only in their seeds."""
        return json.dumps(self.flags, sort_keys=True)


def read_runs(paths: list[str]) -> tuple[list[Run], list[str], list[str]]:
    """Read the runs at `paths`, folders or history files.

    Returns: the finished runs, a line for each one that is running, and for every other path a message with the reason.
    """
    runs, running, problems, seen = [], [], [], set()
    for path in paths:
        file = Path(path) / "training_history.json" if os.path.isdir(path) else Path(path)
        name = str(file.parent if file.name == "training_history.json" else file)
        if os.path.realpath(file) in seen:  # `outputs/* outputs/best` names one twice
            continue
        seen.add(os.path.realpath(file))
        try:
            if os.path.exists(file) and not os.path.isfile(file):  # reading a pipe might never end
                raise OSError("it is not a regular file")
            history = json.loads(file.read_bytes())
            if history["status"] == "finished":
                runs.append(parse(name, history))
            elif history["status"] == "running" and is_locked(file.parent):
                running.append(f"{name}: {progress(history)}")
            else:
                status = "killed" if history["status"] == "running" else history["status"]
                problems.append(f"{name}: {status} after {len(history['val_metrics'])} epochs; left out")
        except OSError as error:
            problems.append(f"{path}: no history ({error.strerror or error}); left out")
        except KeyError as error:
            problems.append(f"{file}: it lacks {error}, which a history of this version has; left out")
        except NO_HISTORY as error:
            problems.append(f"{file}: not a history of ours ({error}); left out")
    return runs, running, problems


def progress(history: dict) -> str:
    """How far a run is, in a few words. Raises one of `NO_HISTORY` where a value is malformed."""
    epochs, of = len(history["val_metrics"]), _positive(history["args"]["epochs"])
    aucs = [_number(val["auc"]) for val in history["val_metrics"] + history["validations"]]
    if not aucs:
        return "training" if "encoder" in history else "encoding"
    stage = f"epoch {epochs} of {of}" if epochs < of else "test"
    return f"{stage}, best validation AUC {max(aucs):.4f}"


def parse(name: str, history: dict) -> Run:
    """Parse the history of a finished run. Raises one of `NO_HISTORY` where a value is missing or malformed."""
    args, data, encoder, test = history["args"], history["data"], history["encoder"], history["test_metrics"]
    json.dumps(args, allow_nan=False)  # raises on a number that is not finite
    args = with_defaults(args)
    split, unit = data["split"], "battles" if args["split_by"] == "battle" else "queries"
    losses, vals = _read(history["train_losses"], [_number]), _read(history["val_metrics"], [{"auc": _number}])
    epoch, step = _integer(history["best_epoch"]), history["best_step"]
    if not epoch < len(vals) == len(losses):
        raise ValueError(f"best_epoch is {epoch} of {len(vals)} epochs and {len(losses)} losses")
    within = [val for val in history["validations"] if (val["epoch"], val["step"]) == (epoch, step)]
    (best,) = vals[epoch : epoch + 1] if step is None else within
    flags = _flags(args, data, encoder)
    # The shapes of what is read; without a gap between the best single model and the oracle, no method closes any.
    metrics, intervals = (
        {name: check if name in REQUIRED else _optional(check) for name in [*test, *REQUIRED]}
        for check in (_number, _interval)
    )
    differences = {"intervals": intervals, "difference": metrics, "difference_intervals": intervals}
    part = dict.fromkeys(("low", "high", "probability", "won"), _number) | {"battles": _positive}
    calibration = {"expected_calibration_error": _number, "bins": [part]}
    ends = ("best_single", "oracle") if "score_table" in history or "mean_score" in test else ()
    clusters = [cluster for cluster in history.get("clusters", []) if cluster["log_odds"]]
    log_odds = dict.fromkeys(clusters[0]["log_odds"] if clusters else (), _number)
    cluster = {"size": _positive, "central_queries": [str], "log_odds": log_odds}
    return Run(
        name=name,
        flags=flags,
        paths={"data_path": str(data["path"]), "model_path": str(encoder["path"])},
        seed=_integer(args["seed"]),
        split_seed=_integer(args["split_seed"]),
        test_set=(flags["data_path"], *(str(args.get(flag)) for flag in TEST_SET)),
        test_queries=_positive(split["test"]["queries"]),
        test_by_train=_positive(split["test"][unit]) / _positive(split["train"][unit]),
        train_losses=losses,
        val_aucs=[val["auc"] for val in vals],
        best_epoch=epoch,
        val_auc=_number(best["auc"]),
        test=_read(test, metrics),
        intervals=_read(history["test_intervals"], intervals),
        calibration={
            "calibrated": _read(history["calibration"], calibration),
            "uncalibrated": _read(history["calibration"]["uncalibrated"], calibration),
        },
        baselines={
            baseline: {"metrics": _read(row, metrics)} | _read(row, differences)
            for baseline, row in history["baselines"].items()
        },
        score_table={end: _number(history["score_table"][end]["mean_score"]) for end in ends},
        clusters=[_read(row, cluster) for row in clusters],
        **_routing(history),
    )


def _flags(args: dict, data: dict, encoder: dict) -> dict:
    """The flags that affect the result, with hashes for what files hold."""
    flags = {"data_path": str(data["content_hash"]), "model_path": str(encoder["fingerprint"])}
    flags |= {"dtype": str(encoder["dtype"])} | {flag: args[flag] for flag in args if flag not in NO_EXPERIMENT}
    if names := data.get("surface_features"):  # others are another experiment, though the flag is the same
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        flags["surface_features"] = f"{len(names)} [{digest[:4]}]"
    if prices := data.get("prices_hash"):  # other costs are other results
        flags |= {"prices": f"[{prices[:4]}]", "tokens_per_query": args["tokens_per_query"]}
    return flags


def _routing(history: dict) -> dict:
    """`choice_shares`, `curves` and `priced_models` of a `Run`."""
    methods, costs = {"RankRouter": history} | history["baselines"], history.get("costs") or {"models": {}}
    tables = {name: row.get("score_table", row) for name, row in methods.items()}
    tables |= {"oracle": history["score_table"]["oracle"]} if "score_table" in history else {}
    shares = {name: row["choice_shares"] for name, row in tables.items() if "choice_shares" in row}
    share, point = {"share": _number, "interval": _interval}, {"mean_cost": _number, "mean_score": _number}
    curves = {name: row["costs"]["curve"] for name, row in methods.items() if row.get("costs")}
    return {
        "choice_shares": {name: _read(row, dict.fromkeys(row, share)) for name, row in shares.items()},
        "curves": {name: _read(curve, [point | {"interval": _interval}]) for name, curve in curves.items()},
        "priced_models": {name: _read(row, point) for name, row in costs["models"].items()},
    }


def _read(value: object, shape: object) -> object:
    """A value of JSON by its shape: a dict of shapes, a list of one shape, a function that checks it, or None."""
    if isinstance(shape, dict):
        return {key: _read(value[key], part) for key, part in shape.items()}
    if isinstance(shape, list):
        if not value:
            raise ValueError("a list is empty")
        return [_read(part, shape[0]) for part in value]
    return None if shape is None else shape(value)


def _optional(check: Callable) -> Callable:
    return lambda value: None if value is None else check(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST:
        raise ValueError(f"{str(value)[:40]!r} is not a number that a run writes")
    return float(value)


def _integer(value: object, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{str(value)[:40]!r} is not an integer of at least {least}")
    return value


def _positive(value: object) -> int:
    return _integer(value, least=1)


def _interval(value: object) -> list[float]:
    low, high = value
    return [_number(low), _number(high)]
