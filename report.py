"""Compare finished runs by their `training_history.json`: a table over flags and seeds, and pictures with --plots."""

import argparse
import itertools
import json
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

from support.reporting.console import LABELS, bounds, verdict
from support.reporting.runs import Run, read_runs
from support.system.command_line import OneLineParser, run_command
from support.system.errors import UserError, one_line
from support.system.files import make_folder

# numpy, pandas and matplotlib are imported where they are needed, so that --help and a typo are answered at once.

SHOWN = {
    "auc": "AUC",
    "accuracy": "accuracy",
    "log_loss": "log loss",
    "mean_score": "mean score",
    "macro_score": "macro",
    "aiq": "AIQ",
}
ONE_RUN = "[ ] is a 95 % interval: of one run over the drawing of the test queries, not the training"
SEEDS = "± is the standard deviation over seeds, and [ ] then the Nadeau-Bengio interval of a mean difference"
FIXED = "Where all seeds share one split, that covers the training, and not the drawing of the data"
CALIBRATION = "ECE is the expected calibration error at the temperature that validation chose"
FIRST = "AUC - first row: to the first row on the same test battles, over the seeds that both have"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = OneLineParser(
        "Compare finished runs: a line for each set of flags, its seeds put together, the best on validation first "
        "among those with the same test battles; and pictures."
    )
    parser.add_argument("runs", nargs="+", help="output folders of train.py, or their training_history.json")
    formats = ["text", "markdown", "csv", "json"]
    help_text = "of the table; csv and json hold every metric and baseline"
    parser.add_argument("--format", choices=formats, default="text", help=help_text)
    parser.add_argument("--plots", metavar="DIR", help="write PNGs there; needs matplotlib (requirements-dev.txt)")
    return parser.parse_args(argv)


def group_by_seeds(runs: list[Run]) -> tuple[list[list[Run]], list[str]]:
    """Group the runs that differ only in their seeds.

    All seeds of a group share one split, or each seed has a split of its own. Of two runs with the same flags and
    seeds, the one with more baselines is kept.
    Returns: the groups, each sorted by seeds; a message for every run that is left out.
    """
    kept, repeated = {}, []
    for run in runs:
        key = (run.experiment, run.seeds)
        other = kept.setdefault(key, run)
        if other is not run:
            if len(run.baselines) > len(other.baselines):
                kept[key], other, run = run, run, other
            repeated.append(f"{run.name}: repeats {other.name}, flags and seeds; left out")
    num_runs = Counter((run.experiment, run.split_seed) for run in kept.values())
    groups = {}
    for run in kept.values():
        shared_split = run.split_seed if num_runs[run.experiment, run.split_seed] > 1 else None
        groups.setdefault((run.experiment, shared_split), []).append(run)
    return [sorted(members, key=lambda run: run.seeds) for members in groups.values()], repeated


def sort_groups(groups: list[list[Run]]) -> list[list[Run]]:
    """Put groups with the same test battles together, and within those the best mean validation AUC first."""
    test_sets = [members[0].test_set for members in groups]
    by_auc = sorted(groups, key=lambda members: -statistics.fmean(run.val_auc for run in members))
    return sorted(by_auc, key=lambda members: test_sets.index(members[0].test_set))


def mean_and_sd(values: list[float]) -> dict:
    """The mean over runs, and the standard deviation where there are several."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def mean_difference(values: list[float], runs: list[Run], interval: list[float] | None = None) -> dict:
    """`mean_and_sd` of a difference, one value per run, and its 95 % interval.

    That is the Nadeau-Bengio interval over several runs, and the given bootstrap `interval` for a single one.
    """
    if len(values) > 1:
        from metrics import seeds_interval

        interval = seeds_interval(values, statistics.fmean(run.test_by_train for run in runs))
    return mean_and_sd(values) | {"interval": interval}


def summarize_metrics(metrics: list[dict], intervals: list[dict]) -> dict[str, dict]:
    """`mean_and_sd` of every metric over runs; for a single run its interval."""
    single = intervals[0] if len(metrics) == 1 else {}
    return {name: mean_and_sd(values) | {"interval": single.get(name)} for name, values in by_name(metrics).items()}


def summarize_baseline(rows: list[dict], members: list[Run], label: str) -> dict:
    """The metrics of a baseline in each run of a group, RankRouter's differences to it, and the verdict."""
    intervals = rows[0]["difference_intervals"]
    differences = by_name([row["difference"] for row in rows])
    beyond = {name: mean_difference(values, members, intervals[name]) for name, values in differences.items()}
    return {
        "test": summarize_metrics([row["metrics"] for row in rows], [row["intervals"] for row in rows]),
        "beyond": beyond,
        "verdict": verdict(beyond["auc"]["interval"], label, sum(run.test_queries for run in members)),
    }


def summarize(members: list[Run]) -> dict:
    """A group's row of the table: its runs and seeds, its metrics, and the baselines that all its runs have."""
    errors = [run.calibration["calibrated"]["expected_calibration_error"] for run in members]
    baselines, ends = by_name([run.baselines for run in members]), by_name([run.score_table for run in members])
    return {
        "run": common_name([run.name for run in members]),
        "runs": [run.name for run in members],
        "seeds": [run.seed for run in members],
        "one_split": len({run.split_seed for run in members}) == 1,
        "val_auc": mean_and_sd([run.val_auc for run in members]),
        "test": summarize_metrics([run.test for run in members], [run.intervals for run in members]),
        "expected_calibration_error": mean_and_sd(errors),
        "baselines": {
            name: summarize_baseline(rows, members, LABELS.get(name, name)) for name, rows in baselines.items()
        },
        "score_table": {end: mean_and_sd(values) for end, values in ends.items()},
    }


def by_name(holders: list[dict]) -> dict[str, list]:
    """The values of all holders, by each name for which every holder has a value."""
    values = {name: [holder.get(name) for holder in holders] for name in holders[0]}
    return {name: column for name, column in values.items() if None not in column}


def common_name(names: list[str]) -> str:
    """One name for several: their common start and end, with * for what differs."""
    if len(names) == 1:
        return names[0]
    start = _common_start(names)
    end = _common_start([name[len(start) :][::-1] for name in names])[::-1]
    return f"{start}*{end}" if start or end else f"{names[0]} and {len(names) - 1} more"


def _common_start(names: list[str]) -> str:
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same)


def differing_flags(runs: list[Run]) -> list[dict]:
    """For each run the flags that differ between runs; data and encoder are compared by content, shown as paths."""
    flags = dict.fromkeys(flag for run in runs for flag in run.flags)
    differing = [flag for flag in flags if len({json.dumps(run.flags.get(flag)) for run in runs}) > 1]
    return [{flag: (run.flags | run.paths).get(flag) for flag in differing} for run in runs]


def table(groups: list[list[Run]]) -> list[dict]:
    """The row of each group: its `summarize`, and under "flags" those that differ between the groups.

    Under "beyond_first" also its test AUC minus that of the first group with the same test battles, paired by seeds.
    """
    rows, firsts = [], {}
    for members, flags in zip(groups, differing_flags([members[0] for members in groups]), strict=True):
        row = summarize(members) | {"flags": flags}
        first = firsts.setdefault(members[0].test_set, members)
        auc = {run.seeds: run.test["auc"] for run in first}
        shared = [run for run in members if run.seeds in auc]
        if first is not members and len(shared) > 1:
            values = [run.test["auc"] - auc[run.seeds] for run in shared]
            row["beyond_first"] = mean_difference(values, shared) | {"seeds": [run.seed for run in shared]}
        rows.append(row)
    return rows


def cell(value: dict | None, sign: str = "") -> str:
    """A value as text: mean, ± standard deviation, [interval], as far as they are known; `sign` "+" shows it always."""
    if not value:
        return ""
    sd = "" if value.get("sd") is None else f" ± {value['sd']:.4f}"
    interval = f" {bounds(value['interval'], sign)}" if value.get("interval") else ""
    return f"{value['mean']:{sign}.4f}{sd}{interval}"


def columns(rows: list[dict]) -> dict[str, list[str]]:
    """The cells of the table by column, without the columns that are empty in all rows."""
    cells = {"run": [row["run"] for row in rows]}
    for flag in rows[0]["flags"]:
        cells[flag] = [str(row["flags"][flag]) for row in rows]
        if flag in ("data_path", "model_path"):  # only the last part of the path, unless two paths share it
            names = [Path(path).name for path in cells[flag]]
            cells[flag] = names if len(set(names)) == len(set(cells[flag])) else cells[flag]
    cells |= {"seeds": [str(len(row["seeds"])) for row in rows], "val AUC": [cell(row["val_auc"]) for row in rows]}
    cells |= {label: [cell(row["test"].get(metric)) for row in rows] for metric, label in SHOWN.items()}
    cells["ECE"] = [cell(row["expected_calibration_error"]) for row in rows]
    compared = [row["baselines"].get("bradley_terry") for row in rows]
    cells["AUC - Bradley-Terry"] = [cell(baseline and baseline["beyond"]["auc"], "+") for baseline in compared]
    cells["verdict"] = [baseline["verdict"] if baseline else "" for baseline in compared]
    cells["AUC - first row"] = [cell(row.get("beyond_first"), "+") for row in rows]
    return {one_line(name): [one_line(text) for text in texts] for name, texts in cells.items() if any(texts)}


def as_text(rows: list[dict]) -> str:
    cells = columns(rows)
    widths = [max(map(len, [name, *texts])) for name, texts in cells.items()]
    lines = [cells.keys(), *zip(*cells.values(), strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines) + "\n" + notes(rows)


def as_markdown(rows: list[dict]) -> str:
    cells = columns(rows)
    lines = [cells.keys(), ["---"] * len(cells), *zip(*cells.values(), strict=True)]
    escaped = ([re.sub(r"([\\|*<`])", r"\\\1", text) for text in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped) + "\n" + notes(rows)


def notes(rows: list[dict]) -> str:
    """What the signs of the table mean, one line each."""
    several = [row for row in rows if len(row["seeds"]) > 1]
    lines = [ONE_RUN] if len(several) < len(rows) else []
    lines += [SEEDS] if several else []
    lines += [FIXED] if any(row["one_split"] for row in several) else []
    lines += [FIRST] if any("beyond_first" in row for row in rows) else []
    return "\n" + "".join(f"{line}.\n" for line in [*lines, CALIBRATION])


def as_csv(rows: list[dict]) -> str:
    """One line per row, with every number in a column of its own."""
    import pandas as pd

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
        # pandas refuses lone surrogates, and control characters must not reach a terminal.
        line = {one_line(name): one_line(value) if isinstance(value, str) else value for name, value in line.items()}
        lines.append(line)
    frame = pd.DataFrame(lines, dtype=object)  # object: an integer beside a missing value stays an integer
    return frame.dropna(axis="columns", how="all").to_csv(index=False, lineterminator="\n")


def as_json(rows: list[dict]) -> str:
    return json.dumps(rows, indent=1, allow_nan=False) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Print the table of the finished runs, and draw them; name those that are running.

    Raises `UserError` where no path holds either.
    """
    args = parse_args(argv)
    if args.plots is not None:
        try:
            from support.reporting.plots import draw
        except ModuleNotFoundError as error:
            raise UserError(f"--plots needs {error.name}: pip install -r requirements-dev.txt") from error
        folder = make_folder(args.plots, "--plots")
    runs, running, problems = read_runs(args.runs)
    groups, repeated = group_by_seeds(runs)
    for problem in problems + repeated:
        print("warning:", one_line(problem), file=sys.stderr)
    for line in running:
        print("running ", one_line(line), file=sys.stderr)
    if running and not runs:
        return
    if not runs:
        raise UserError(f"no finished run among {len(args.runs)} paths; expected output folders of train.py")
    groups = sort_groups(groups)
    rows = table(groups)
    render = {"text": as_text, "markdown": as_markdown, "csv": as_csv, "json": as_json}
    print(render[args.format](rows), end="")
    if args.plots is not None:
        for path in draw(groups, rows, folder):
            print(f"drawn    {one_line(path)}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
