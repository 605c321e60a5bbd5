"""Compare runs by their `training_history.json` alone: a table over flags and seeds, and pictures with --plots."""

import argparse
import csv
import io
import itertools
import json
import re
import statistics
import sys
from pathlib import Path

from support.command_line import OneLineParser, run_command
from support.files import UserError, make_folder, one_line
from support.history import Run, read_runs
from support.printing import LABELS, verdict

SHOWN = {"auc": "AUC", "accuracy": "accuracy", "log_loss": "log loss", "mean_score": "mean score"}
ONE_RUN = "[ ] is a 95 % interval: of one run over the drawing of the test queries, not the training"
SEEDS = "± is the standard deviation over seeds, and [ ] then the Nadeau-Bengio interval of a mean difference"
FIXED = "Where all seeds share one split, that covers the training, and not the drawing of the data"
CALIBRATION = "ECE is the expected calibration error at the temperature that validation chose"
FIRST = "AUC - first row: to the first row on the same test battles, over the seeds that both have"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = OneLineParser(
        "Compare finished runs: a line for each set of flags, its seeds put together, the best on validation first "
        "among those with the same test battles; and pictures."
    )
    parser.add_argument("runs", nargs="+", help="output folders of train.py, or their training_history.json")
    parser.add_argument(
        "--format",
        choices=["text", "markdown", "csv", "json"],
        default="text",
        help="of the table; csv and json hold every metric and baseline",
    )
    parser.add_argument("--plots", metavar="DIR", help="write PNGs there; needs matplotlib (requirements-dev.txt)")
    return parser.parse_args(argv)


def group_by_seeds(runs: list[Run]) -> tuple[list[list[Run]], list[str]]:
    """Runs that differ by their seeds only, together; and a line for each run that repeats another's seeds.

    A group has either one split for all its seeds, or a split of its own for each.
    """
    experiments, repeated = {}, []
    for run in runs:
        seeds = experiments.setdefault(run.experiment, {})
        kept = seeds.setdefault(run.seeds, run)
        if kept is not run:
            if len(run.baselines) > len(kept.baselines):
                seeds[run.seeds], kept, run = run, run, kept
            repeated.append(f"{run.name}: repeats {kept.name}, flags and seeds; left out")
    groups = []
    for seeds in experiments.values():
        by_split = {}
        for run in seeds.values():
            by_split.setdefault(run.split_seed, []).append(run)
        groups += [members for members in by_split.values() if len(members) > 1]
        alone = [members[0] for members in by_split.values() if len(members) == 1]
        groups += [alone] if alone else []
    return [sorted(members, key=lambda run: run.seeds) for members in groups], repeated


def spread(values: list[float]) -> dict:
    """The mean of one value a seed, and the standard deviation of several."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def difference(values: list[float], runs: list[Run], of_one: list[float] | None = None) -> dict:
    """The `spread` of a difference, one value a run, and its interval: that of the one run, or over several seeds."""
    if len(values) == 1:
        return spread(values) | {"interval": of_one}
    from metrics import seeds_interval

    return spread(values) | {"interval": seeds_interval(values, statistics.fmean(run.test_by_train for run in runs))}


def summarise(members: list[Run]) -> dict:
    """A group's row: its runs and seeds, its metrics, and those of the baselines that all its runs have."""
    first = members[0]
    errors = [run.calibration["calibrated"]["expected_calibration_error"] for run in members]
    baselines = {}
    for name in (name for name in first.baselines if all(name in run.baselines for run in members)):
        rows = [run.baselines[name] for run in members]
        beyond = {}
        for metric in known(first.test, [row["difference"] for row in rows]):
            values = [row["difference"][metric] for row in rows]
            beyond[metric] = difference(values, members, rows[0]["difference_intervals"][metric])
        tests = [(row["metrics"], row["intervals"]) for row in rows]
        told = verdict(beyond["auc"]["interval"], LABELS.get(name, name), sum(run.test_queries for run in members))
        baselines[name] = {"test": spreads(tests), "beyond": beyond, "verdict": told}
    return {
        "run": common_name([run.name for run in members]),
        "runs": [run.name for run in members],
        "seeds": [run.seed for run in members],
        "one_split": len({run.split_seed for run in members}) == 1,
        "val_auc": spread([run.val_auc for run in members]),
        "test": spreads([(run.test, run.intervals) for run in members]),
        "expected_calibration_error": spread(errors),
        "baselines": baselines,
        "score_table": {
            end: spread([run.score_table[end] for run in members])
            for end in known(first.score_table, [run.score_table for run in members])
        },
    }


def spreads(tests: list[tuple[dict, dict]]) -> dict[str, dict]:
    """By metric the `spread` over runs, of which each gives its metrics and intervals; of one run also the interval."""
    (first, intervals), alone = tests[0], len(tests) == 1
    return {
        metric: spread([test[metric] for test, _ in tests]) | {"interval": intervals[metric] if alone else None}
        for metric in known(first, [test for test, _ in tests])
    }


def known(names: dict, holders: list[dict]) -> list[str]:
    """The metrics that all of some runs have."""
    return [name for name in names if all(holder.get(name) is not None for holder in holders)]


def common_name(names: list[str]) -> str:
    """One name for several: what they share, with * for what differs."""
    if len(names) == 1:
        return names[0]
    start = _shared_start(names)
    end = _shared_start([name[len(start) :][::-1] for name in names])[::-1]
    return f"{start}*{end}" if start or end else f"{names[0]} and {len(names) - 1} more"


def _shared_start(names: list[str]) -> str:
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike)


def in_order(groups: list[list[Run]]) -> list[list[Run]]:
    """Groups with one set of test battles together, and of these the best mean validation AUC first."""
    test_sets = list(dict.fromkeys(members[0].test_set for members in groups))

    def key(members):
        return test_sets.index(members[0].test_set), -statistics.fmean(run.val_auc for run in members)

    return sorted(groups, key=key)


def table(groups: list[list[Run]]) -> list[dict]:
    """The row of each group, with the `flags` that are not the same in all.

    Each but the first on its test battles also has what its AUC is `beyond_first`, over the seeds that both have.
    """
    rows, flags, firsts = [], differing_flags([members[0] for members in groups]), {}
    for members, of_group in zip(groups, flags, strict=True):
        row = summarise(members) | {"flags": of_group}
        first = firsts.setdefault(members[0].test_set, members)
        theirs = {run.seeds: run for run in first}
        shared = [run for run in members if run.seeds in theirs]
        if first is not members and len(shared) > 1:
            values = [run.test["auc"] - theirs[run.seeds].test["auc"] for run in shared]
            row["beyond_first"] = difference(values, shared) | {"seeds": [run.seed for run in shared]}
        rows.append(row)
    return rows


def differing_flags(runs: list[Run]) -> list[dict]:
    """Of each run the flags that are not the same in all; data and encoder differ by content and go by their paths."""
    contents = {"data_path": "content_hash", "model_path": "fingerprint", "dtype": "dtype"}
    rows = [{flag: getattr(run, flag) for flag in contents} | run.flags for run in runs]
    differing = []
    for flag in dict.fromkeys(flag for row in rows for flag in row):
        values = [getattr(run, contents[flag]) if flag in contents else run.flags.get(flag) for run in runs]
        if len({json.dumps(value) for value in values}) > 1:
            differing.append(flag)
    return [{flag: row.get(flag) for flag in differing} for row in rows]


def cell(value: dict | None, signed: bool = False) -> str:
    """A value with what is known of its spread: mean, ± standard deviation, [interval]."""
    if not value:
        return ""
    sign = "+" if signed else ""
    told = f"{value['mean']:{sign}.4f}"
    if value.get("sd") is not None:
        told += f" ± {value['sd']:.4f}"
    if value.get("interval"):
        told += " [{:{sign}.4f}, {:{sign}.4f}]".format(*value["interval"], sign=sign)
    return told


def columns(rows: list[dict]) -> dict[str, list[str]]:
    """The text of the table, by column; a column that is empty throughout is left out."""
    found = {"run": [row["run"] for row in rows]}
    for flag in rows[0]["flags"]:
        found[flag] = [str(row["flags"][flag]) for row in rows]
        if flag in ("data_path", "model_path"):  # their last part, where that tells them apart
            short = [Path(path).name for path in found[flag]]
            found[flag] = short if len(set(short)) == len(set(found[flag])) else found[flag]
    found["seeds"] = [str(len(row["seeds"])) for row in rows]
    found["val AUC"] = [cell(row["val_auc"]) for row in rows]
    found |= {label: [cell(row["test"].get(metric)) for row in rows] for metric, label in SHOWN.items()}
    found["ECE"] = [cell(row["expected_calibration_error"]) for row in rows]
    compared = [row["baselines"].get("bradley_terry") for row in rows]
    found["AUC - Bradley-Terry"] = [cell(row and row["beyond"]["auc"], signed=True) for row in compared]
    found["verdict"] = [row["verdict"] if row else "" for row in compared]
    found["AUC - first row"] = [cell(row.get("beyond_first"), signed=True) for row in rows]
    return {name: [one_line(text) for text in texts] for name, texts in found.items() if any(texts)}


def as_text(rows: list[dict]) -> str:
    found = columns(rows)
    widths = [max(map(len, [name, *texts])) for name, texts in found.items()]
    lines = [found.keys(), *zip(*found.values(), strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines) + "\n" + notes(rows)


def as_markdown(rows: list[dict]) -> str:
    found = columns(rows)
    lines = [found.keys(), ["---"] * len(found), *zip(*found.values(), strict=True)]
    escaped = ([re.sub(r"([\\|*<`])", r"\\\1", text) for text in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped) + "\n" + notes(rows)


def notes(rows: list[dict]) -> str:
    """What the signs of a table mean, a line each."""
    several = [row for row in rows if len(row["seeds"]) > 1]
    told = [ONE_RUN] if len(several) < len(rows) else []
    told += [SEEDS] if several else []
    told += [FIXED] if any(row["one_split"] for row in several) else []
    told += [FIRST] if any("beyond_first" in row for row in rows) else []
    return "\n" + "".join(f"{line}.\n" for line in [*told, CALIBRATION])


def as_csv(rows: list[dict]) -> str:
    """One line a row: every number in a column of its own."""
    lines = []
    for row in rows:
        line = {"run": row["run"], "seeds": " ".join(map(str, row["seeds"]))} | row["flags"]
        values = {"val_auc": row["val_auc"]} | {f"test_{metric}": value for metric, value in row["test"].items()}
        values["expected_calibration_error"] = row["expected_calibration_error"]
        for name, baseline in row["baselines"].items():
            values |= {f"{name}_{metric}": value for metric, value in baseline["test"].items()}
            values |= {f"beyond_{name}_{metric}": value for metric, value in baseline["beyond"].items()}
            line[f"verdict_{name}"] = baseline["verdict"]
        values |= {f"{end}_mean_score": value for end, value in row["score_table"].items()}
        values["beyond_first_auc"] = row.get("beyond_first", {})
        for name, value in values.items():
            low, high = value.get("interval") or (None, None)
            line |= {name: value.get("mean"), f"{name}_sd": value.get("sd"), f"{name}_low": low, f"{name}_high": high}
        lines.append(line)
    names = dict.fromkeys(name for line in lines for name in line)
    used = [name for name in names if any(line.get(name) is not None for line in lines)]
    text = io.StringIO()
    writer = csv.DictWriter(text, used, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_json(rows: list[dict]) -> str:
    return json.dumps(rows, indent=1, allow_nan=False) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Print the table of the runs, and draw them. Raises `UserError` where no path holds a finished run."""
    args = parse_args(argv)
    if args.plots is not None:
        try:
            from support.plots import draw
        except ModuleNotFoundError as error:
            raise UserError(f"--plots needs {error.name}: pip install -r requirements-dev.txt") from error
        folder = make_folder(args.plots, "--plots")
    runs, problems = read_runs(args.runs)
    groups, repeated = group_by_seeds(runs)
    for problem in problems + repeated:
        print("warning:", one_line(problem), file=sys.stderr)
    if not runs:
        raise UserError(f"no finished run among {len(args.runs)} paths; expected output folders of train.py")
    groups = in_order(groups)
    rows = table(groups)
    render = {"text": as_text, "markdown": as_markdown, "csv": as_csv, "json": as_json}[args.format]
    print(render(rows), end="")
    if args.plots is not None:
        for path in draw(groups, rows, folder):
            print(f"drawn    {path}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
