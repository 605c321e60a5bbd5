"""The report's groups, numbers and pictures, worked by hand; what is broken is named and costs the rest nothing."""

import copy
import csv
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import report
from support import plots
from support.command_line import run_command
from support.history import read_runs

ROOT = Path(__file__).parent.parent


@pytest.fixture
def write(default_run, tmp_path, monkeypatch):
    """Write the history of the default run, changed, to a folder of this name; returns the name."""
    monkeypatch.chdir(tmp_path)

    def run(name, seed=42, split_seed=None, auc=None, val_auc=None, beyond=None, flags=(), **changes):
        history = copy.deepcopy(default_run[0]) | changes
        history["args"] |= {"seed": seed, "split_seed": seed if split_seed is None else split_seed} | dict(flags)
        if auc is not None:
            history["test_metrics"]["auc"] = auc
        if val_auc is not None:
            history["val_metrics"] = [{"auc": value} for value in (val_auc - 0.1, val_auc)]
            history["train_losses"], history["best_epoch"] = [0.7, 0.6], 1
        if beyond is not None:
            history["baselines"]["bradley_terry"]["difference"]["auc"] = beyond
        Path(name).mkdir(parents=True)
        Path(name, "training_history.json").write_text(json.dumps(history))
        return name

    return run


@pytest.fixture
def rows(capsys):
    """The rows of a report, as its JSON has them, and the lines on stderr."""

    def run(*paths):
        report.main([*paths, "--format", "json"])
        told = capsys.readouterr()
        return json.loads(told.out), told.err.splitlines()

    return run


def test_one_run_is_what_its_history_says(write, rows, default_run):
    history, _ = default_run
    ((row,), problems) = rows(write("a"))
    assert problems == []
    assert row["val_auc"] == {"mean": history["val_metrics"][history["best_epoch"]]["auc"], "sd": None}
    for metric, value in history["test_metrics"].items():
        assert row["test"][metric] == {"mean": value, "sd": None, "interval": history["test_intervals"][metric]}
    for name, baseline in history["baselines"].items():
        for metric in history["test_metrics"]:
            assert row["baselines"][name]["test"][metric]["mean"] == baseline[metric]
            beyond = row["baselines"][name]["beyond"][metric]
            assert beyond["mean"] == baseline["difference"][metric]
            assert beyond["interval"] == baseline["difference_intervals"][metric]
    assert row["baselines"]["bradley_terry"]["verdict"] == "better than Bradley-Terry"
    assert row["expected_calibration_error"]["mean"] == history["calibration"]["expected_calibration_error"]
    assert (row["flags"], row["seeds"], row["runs"]) == ({}, [42], ["a"])


def test_seeds_are_put_together_with_their_spread_and_the_interval_of_nadeau_and_bengio(write, rows):
    for place, seed in enumerate((1, 2, 3)):
        write(f"at/{place}/bpr-{seed}", seed=seed, auc=0.7 + 0.1 * place, val_auc=0.6 + 0.1 * place, beyond=0.01 * seed)
    ((row,), _) = rows("at/0/bpr-1", "at/1/bpr-2/training_history.json", "at/2/bpr-3")
    assert (row["run"], row["seeds"], row["one_split"]) == ("at/*", [1, 2, 3], False)
    assert row["val_auc"] == {"mean": pytest.approx(0.7), "sd": pytest.approx(0.1)}
    assert row["test"]["auc"] == {"mean": pytest.approx(0.8), "sd": pytest.approx(0.1), "interval": None}
    beyond = row["baselines"]["bradley_terry"]["beyond"]["auc"]
    history = json.loads(Path("at/0/bpr-1/training_history.json").read_text())
    sizes = history["data"]["split"]
    half = 4.302653 * 0.01 * math.sqrt(1 / 3 + sizes["test"]["queries"] / sizes["train"]["queries"])  # t of 2 degrees
    assert (beyond["mean"], beyond["sd"]) == (pytest.approx(0.02), pytest.approx(0.01))
    assert beyond["interval"] == pytest.approx([0.02 - half, 0.02 + half], rel=1e-6)
    assert row["baselines"]["bradley_terry"]["verdict"] == "no difference shown"


def test_what_differs_in_more_than_its_seeds_stands_apart_and_the_best_on_validation_first(write, rows):
    write("bpr-1", seed=1, split_seed=7, val_auc=0.7, auc=0.6)
    write("bpr-2", seed=2, split_seed=7, val_auc=0.8, auc=0.7)
    write("bce-1", seed=1, split_seed=7, val_auc=0.9, auc=0.64, flags={"loss_type": "bce"})
    write("bce-2", seed=2, split_seed=7, val_auc=0.8, auc=0.76, flags={"loss_type": "bce"})
    found, _ = rows("bpr-1", "bce-1", "bpr-2", "bce-2")
    assert [(row["run"], row["flags"], row["one_split"]) for row in found] == [
        ("bce-*", {"loss_type": "bce"}, True),
        ("bpr-*", {"loss_type": "bpr"}, True),
    ]
    assert "beyond_first" not in found[0]
    beyond = found[1]["beyond_first"]
    assert (beyond["mean"], beyond["seeds"]) == (pytest.approx(-0.05), [1, 2])
    assert beyond["sd"] == pytest.approx(0.02 / 2**0.5)  # of -0.04 and -0.06: paired by seed


def test_what_does_not_make_the_result_does_not_part_runs(write, rows, default_run):
    history, _ = default_run
    elsewhere = {"data": history["data"] | {"path": "x"}, "encoder": history["encoder"] | {"path": "y"}}
    flags = {
        "output_dir": "o",
        "data_path": "x",
        "model_path": "y",
        "cache_dir": "c",
        "baselines": "all",
        "demo": False,
        "device": "cuda",
        "encode_tokens": 7,
    }
    found, _ = rows(write("a", seed=1), write("b", seed=2, flags=flags, **elsewhere))
    assert [row["seeds"] for row in found] == [[1, 2]]
    assert found[0]["run"] == "a and 1 more"


@pytest.mark.parametrize(
    ("part", "field", "flag"),
    [("data", "content_hash", "data_path"), ("encoder", "fingerprint", "model_path"), ("encoder", "dtype", "dtype")],
)
def test_other_data_or_another_encoder_stands_apart(write, rows, default_run, part, field, flag):
    history, _ = default_run
    found, _ = rows(write("a", seed=1), write("b", seed=2, **{part: history[part] | {field: "other"}}))
    assert [row["seeds"] for row in found] == [[1], [2]]
    assert [set(row["flags"]) for row in found] == [{flag}, {flag}]


def test_runs_on_other_data_are_not_sorted_among_each_other(write, rows, default_run):
    other = {"data": default_run[0]["data"] | {"content_hash": "other"}}
    write("a", seed=1, val_auc=0.6)
    write("b", seed=1, val_auc=0.9, **other)
    write("c", seed=1, val_auc=0.7, flags={"lr": 1.0})
    assert [row["run"] for row in rows("a", "b", "c")[0]] == ["c", "a", "b"]


def test_one_split_for_all_seeds_is_told_from_one_each(write, rows):
    for seed, split_seed in ((1, 1), (2, 2), (42, 42), (1, 42), (2, 42)):
        write(f"{seed}-of-{split_seed}", seed=seed, split_seed=split_seed)
    found, _ = rows(*sorted(path.name for path in Path().iterdir()))
    assert sorted((row["seeds"], row["one_split"]) for row in found) == [([1, 2], False), ([1, 2, 42], True)]


def test_of_two_that_repeat_the_one_with_more_baselines_is_kept(write, rows):
    found, problems = rows(write("bare", baselines={}), write("a"))
    assert [row["runs"] for row in found] == [["a"]]
    assert problems == ["warning: bare: repeats a, flags and seeds; left out"]


def test_the_same_run_twice_counts_once(write, rows):
    found, problems = rows(write("a", seed=1), write("b", seed=1), "a/training_history.json", "./a")
    assert [row["runs"] for row in found] == [["a"]]
    assert problems == ["warning: b: repeats a, flags and seeds; left out"]


def without(history, *names):
    *holders, last = names
    changed = history = copy.deepcopy(history)
    for name in holders:
        history = history[name]
    del history[last]
    return changed


BROKEN = {
    "empty": lambda history: "",
    "half": lambda history: json.dumps(history)[:999],
    "list": lambda history: "[]",
    "number": lambda history: "7",
    "deep": lambda history: "[" * 100_000,
    "binary": lambda history: b"\xff\xfe\x00",
    "nan": lambda history: json.dumps(history | {"train_losses": [math.nan]}),
    "text": lambda history: json.dumps(history | {"train_losses": ["high"]}),
    "epoch": lambda history: json.dumps(history | {"best_epoch": 99}),
    "none": lambda history: json.dumps(history | {"test_metrics": None}),
    "null": lambda history: json.dumps(history | {"test_metrics": history["test_metrics"] | {"auc": None}}),
    "bins": lambda history: json.dumps(without(history, "calibration", "bins")),
    "hash": lambda history: json.dumps(without(history, "data", "content_hash")),
    "metric": lambda history: json.dumps(without(history, "test_metrics", "auc")),
    "interval": lambda history: json.dumps(without(history, "test_intervals", "auc")),
    "baseline": lambda history: json.dumps(without(history, "baselines", "bradley_terry", "difference", "auc")),
    "table": lambda history: json.dumps(
        history
        | {"baselines": {}, "test_metrics": history["test_metrics"] | {"mean_score": 1.0}}
        | {"test_intervals": history["test_intervals"] | {"mean_score": [0.0, 1.0]}}
    ),
    "negative": lambda history: json.dumps(history | {"best_epoch": -1}),
    "short": lambda history: json.dumps(history | {"train_losses": [1.0]}),
    "huge": lambda history: json.dumps(history | {"train_losses": [1e308] * 10}),
    "seed": lambda history: json.dumps(history | {"args": history["args"] | {"seed": "7"}}),
    "empty_bins": lambda history: json.dumps(history | {"calibration": history["calibration"] | {"bins": []}}),
    "baseline_metric": lambda history: json.dumps(without(history, "baselines", "neighbours", "f1")),
    "models": lambda history: json.dumps(without(history, "clusters", 3, "log_odds", "demo-model-b")),
    "central": lambda history: json.dumps(without(history, "clusters", 3, "central_queries", slice(None))),
    "zero": lambda history: json.dumps(
        history | {"data": history["data"] | {"split": {"train": {"queries": 0}, "test": {"queries": 1}}}}
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_history_is_named_and_costs_the_others_nothing(write, rows, default_run, damage):
    content = BROKEN[damage](default_run[0])
    Path("broken").mkdir()
    Path("broken", "training_history.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    found, problems = rows("broken", write("whole"))
    assert [row["run"] for row in found] == ["whole"]
    assert len(problems) == 1
    assert "broken/training_history.json" in problems[0]


def test_a_pipe_is_not_waited_for(write, rows):
    os.mkfifo("pipe")
    found, problems = rows("pipe", write("whole"))
    assert [row["run"] for row in found] == ["whole"]
    assert problems == ["warning: pipe: no history (it is no file); left out"]


def test_seeds_of_which_some_have_no_score_table(write, rows):
    ends = {"best_single": {"mean_score": 0.5}, "oracle": {"mean_score": 1.0}}
    for names in (("a", "b"), ("c", "d")):
        for name, seed, table in zip(names, (1, 2), ({"score_table": ends}, {}), strict=True):
            write(name, seed=seed, **table)
    for names in (("a", "b"), ("d", "c")):
        ((row,), _) = rows(*names)
        assert row["score_table"] == {}


def test_a_split_by_battle_counts_battles_in_the_interval_over_seeds(write, rows):
    for seed, beyond in ((1, 0.01), (2, 0.03)):
        write(f"b{seed}", seed=seed, beyond=beyond, flags={"split_by": "battle"})
    ((row,), _) = rows("b1", "b2")
    sizes = json.loads(Path("b1/training_history.json").read_text())["data"]["split"]
    sd = 0.02 / 2**0.5
    half = 12.7062 * sd * math.sqrt(1 / 2 + sizes["test"]["battles"] / sizes["train"]["battles"])
    assert row["baselines"]["bradley_terry"]["beyond"]["auc"]["interval"] == pytest.approx(
        [0.02 - half, 0.02 + half], rel=1e-4
    )


def test_one_seed_in_common_is_no_comparison(write, rows):
    write("a-1", seed=1)
    for seed in (1, 2):
        write(f"b-{seed}", seed=seed, flags={"lr": 0.5})
    assert not any("beyond_first" in row for row in rows("a-1", "b-1", "b-2")[0])


def test_the_ends_of_a_score_table_are_spread_over_seeds(write, rows, capsys):
    for seed in (1, 2):
        ends = {"best_single": {"mean_score": 0.1 * seed}, "oracle": {"mean_score": 1.0}}
        write(f"a{seed}", seed=seed, score_table=ends)
    ((row,), _) = rows("a1", "a2")
    assert row["score_table"]["best_single"]["mean"] == pytest.approx(0.15)
    assert row["score_table"]["oracle"] == {"mean": 1.0, "sd": 0.0}
    report.main(["a1", "a2", "--format", "csv"])
    (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert float(line["best_single_mean_score"]) == pytest.approx(0.15)


def test_paths_are_shortened_where_their_ends_tell_them_apart(write, capsys, default_run):
    def data(path, content_hash):
        return {"data": default_run[0]["data"] | {"path": path, "content_hash": content_hash}}

    names = [write("a", **data("x/one.parquet", "1")), write("b", **data("y/two.parquet", "2"))]
    report.main(names)
    assert "x/one.parquet" not in (text := capsys.readouterr().out)
    assert "one.parquet" in text
    report.main([*names, write("c", **data("z/one.parquet", "3"))])
    assert {"x/one.parquet", "z/one.parquet"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(("flag", "value"), [("limit", 500), ("hold_out_model", "gpt-4")])
def test_runs_with_other_test_battles_are_not_compared(write, rows, flag, value):
    for name, given in (("all", None), ("some", value)):
        for seed in (1, 2):
            write(f"{name}-{seed}", seed=seed, val_auc=0.7 if given else 0.6, flags={flag: given})
    found, _ = rows("all-1", "all-2", "some-1", "some-2")
    assert [row["run"] for row in found] == ["all-*", "some-*"]
    assert not any("beyond_first" in row for row in found)


def test_what_a_terminal_would_act_on_is_not_printed(write, capsys):
    write("a", flags={"loss_type": "\x1b[31mred\x07"})
    write("b", seed=1, status="\x1b[2J\nrunning")
    write("c", seed=1)
    report.main(["a", "b", "c"])
    told = capsys.readouterr()
    assert "[31mred" in told.out
    assert len(told.err.splitlines()) == 1
    assert not any(letter in told.out + told.err for letter in "\x1b\x07")


def test_runs_that_are_not_finished_are_named(write, rows):
    write("killed", status="running")
    write("failed", status="failed", val_metrics=[])
    Path("nothing").mkdir()
    Path("notes.txt").write_text("hello")
    long = "x" * 5000
    found, problems = rows("killed", "nothing", write("whole"), "failed", "notes.txt", "no/such", long)
    assert [row["run"] for row in found] == ["whole"]
    assert problems[0] == "warning: killed: running after 10 epochs; left out"
    assert problems[1].startswith("warning: nothing: no history")
    assert problems[2] == "warning: failed: failed after 0 epochs; left out"
    assert [problem.split(":")[1].strip() for problem in problems[3:]] == ["notes.txt", "no/such", long]


def test_no_finished_run_is_one_error(write, capsys):
    write("killed", status="running")
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: report.main(["killed"]))
    assert stopped.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "error: no finished run among 1 paths; expected output folders of train.py"


def test_the_text_is_a_table_whose_columns_stand_under_each_other(write, capsys):
    write("short", seed=1, val_auc=0.8, auc=0.75, flags={"lr": 0.5})
    write("a-long-name-1", seed=1, val_auc=0.7, flags={"lr": 0.25})
    write("a-long-name-2", seed=2, val_auc=0.6, flags={"lr": 0.25})
    report.main(["short", "a-long-name-1", "a-long-name-2"])
    text, *_ = capsys.readouterr().out.split("\n\n")
    header, *lines = text.splitlines()
    starts = [match.start() for match in re.finditer(r"\S+( \S+)*", header)] + [None]
    first, second = (
        {header[low:high].strip(): line[low:high].strip() for low, high in itertools.pairwise(starts)} for line in lines
    )
    assert (first["run"], first["lr"], first["seeds"], first["val AUC"]) == ("short", "0.5", "1", "0.8000")
    assert first["AUC"].startswith("0.7500 [")
    assert first["verdict"] == "better than Bradley-Terry"
    assert (second["run"], second["seeds"], second["val AUC"]) == ("a-long-name-*", "2", "0.6500 ± 0.0707")


def test_csv_and_markdown_say_the_same_as_json(write, rows, capsys):
    names = [write("a|b", seed=1, flags={"lr": 0.5}), write("c", seed=1)]
    expected, _ = rows(*names)
    report.main([*names, "--format", "csv"])
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    for line, row in zip(lines, expected, strict=True):
        assert (line["run"], float(line["lr"]), line["seeds"]) == (row["run"], row["flags"]["lr"], "1")
        for metric, value in row["test"].items():
            assert float(line[f"test_{metric}"]) == value["mean"]
            assert [float(line[f"test_{metric}_{end}"]) for end in ("low", "high")] == value["interval"]
        beyond = row["baselines"]["neighbours"]["beyond"]["log_loss"]
        assert float(line["beyond_neighbours_log_loss_low"]) == beyond["interval"][0]
    report.main([*names, "--format", "markdown"])
    header, rule, *cells = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert header.count("|") == rule.count("|") == cells[0].replace("\\|", "").count("|")
    assert "a\\|b" in cells[0] + cells[1]
    assert float(lines[0]["val_auc"]) == expected[0]["val_auc"]["mean"]
    assert lines[0]["verdict_bradley_terry"] == expected[0]["baselines"]["bradley_terry"]["verdict"]


def test_columns_come_in_the_same_order_every_time(write):
    write("a")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import report; report.main(['a', '--format', 'csv'])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, env={"PYTHONHASHSEED": str(seed)}
        ).stdout
        for seed in (0, 1)
    }
    assert len(outputs) == 1


def test_the_report_loads_no_torch(write):
    write("a")
    write("b", seed=1)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import report
report.main(["a", "b", "--plots", "."])
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


# --- pictures -------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(write):
    """Groups of runs and their rows, as the pictures get them."""

    def run(*names):
        groups = report.in_order(report.group_by_seeds(read_runs(names)[0])[0])
        return groups, report.table(groups)

    return run


def test_training_shows_every_run_and_the_epoch_that_was_kept(write, drawn, default_run):
    history, _ = default_run
    loss, auc = plots.training(*drawn(write("a", seed=1), write("b", seed=2))).axes
    lines = [line for line in auc.get_lines() if len(line.get_xdata()) > 1]
    assert len(lines) == 2
    for axes, values in ((loss, history["train_losses"]), (auc, [row["auc"] for row in history["val_metrics"]])):
        curve, dot, *_ = axes.get_lines()
        assert list(curve.get_ydata()) == values
        assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (history["best_epoch"], values[history["best_epoch"]])


def test_reliability_shows_the_bins_and_pools_seeds_by_their_battles(write, drawn):
    def bins(*parts):
        return [{"low": low, "high": low + 0.1, "battles": n, "probability": p, "won": won} for low, n, p, won in parts]

    def calibration(*parts):
        told = {"expected_calibration_error": 0.1, "bins": bins(*parts)}
        return {"temperature": 2.0, "uncalibrated": told | {"expected_calibration_error": 0.2}} | told

    write("a", seed=1, calibration=calibration((0.5, 1, 0.52, 0.6), (0.8, 10, 0.85, 0.9)))
    write("b", seed=2, calibration=calibration((0.5, 3, 0.56, 0.4)))
    (axes,) = plots.reliability(*drawn("a", "b")).axes
    assert len(axes.collections) == 2
    for dots in axes.collections:
        assert dots.get_offsets().tolist() == [[pytest.approx(0.55), pytest.approx(0.45)], [0.85, 0.9]]
        assert np.diff(dots.get_sizes()) == pytest.approx(600 * (10 - 4) / 14)
    assert "ECE 0.200 as trained (grey), 0.100 at the fitted T (blue)" in axes.get_title()


def test_baselines_show_intervals_and_differences(write, drawn, default_run):
    history, _ = default_run
    (axes,) = plots.baselines(*drawn(write("a")), "auc").axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["RankRouter", "Bradley-Terry", "per-cluster BT", "neighbours"]
    bars = [line for line in axes.get_lines() if len(line.get_xdata()) == 2]
    dots = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
    names = list(history["baselines"])[1:]
    intervals = [history["test_intervals"], *(history["baselines"][name]["intervals"] for name in names)]
    values = [history["test_metrics"], *(history["baselines"][name] for name in names)]
    assert [list(bar.get_xdata()) for bar in bars] == [interval["auc"] for interval in intervals]
    assert [dot.get_xdata()[0] for dot in dots] == [value["auc"] for value in values]
    assert [bar.get_ydata()[0] for bar in bars] == [dot.get_ydata()[0] for dot in dots] == [0, 1, 2, 3]
    beyond = history["baselines"]["neighbours"]["difference"]["auc"]
    assert f"{beyond:+.4f} [" in axes.texts[2].get_text()


def test_the_map_shows_each_cluster_and_model_where_its_labels_say(write, drawn, monkeypatch):
    odds = {("first", "x"): -1.0, ("first", "y"): 2.0, ("second", "x"): 5.0, ("second", "y"): 1.0}
    clusters = [
        {"size": size, "central_queries": [name], "log_odds": {model: odds[name, model] for model in "xy"}}
        for name, size in (("first", 30), ("second", 5))
    ]
    clusters.append({"size": 0, "central_queries": [], "log_odds": None})
    ((run,),), _ = drawn(write("a", clusters=clusters))
    assert len(run.clusters) == 2
    axes = plots.cluster_map(run).axes[0]
    shown = axes.get_images()[0].get_array()
    rows = [label.get_text().split("  ")[0] for label in axes.get_yticklabels()]
    models = [label.get_text() for label in axes.get_xticklabels()]
    assert models == ["y", "x"]  # y is stronger over all queries
    for row, name in enumerate(rows):
        for column, model in enumerate(models):
            assert shown[row, column] == odds[name, model]
    strongest = dict(zip(*reversed(axes.get_lines()[0].get_data()), strict=True))
    assert {name: models[strongest[row]] for row, name in enumerate(rows)} == {"first": "y", "second": "x"}
    assert [label.get_text().split("  ")[1] for label in axes.get_yticklabels()] == [
        {"first": "(30)", "second": "(5)"}[name] for name in rows
    ]
    limits = axes.get_images()[0].get_clim()
    assert limits[0] == -limits[1]  # white is even odds
    monkeypatch.setattr(plots, "MOST_CLUSTERS", 1)
    axes = plots.cluster_map(run).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first  (30)"]


def test_over_seeds_a_bar_is_one_standard_deviation_to_each_side(write, drawn):
    (axes,) = plots.baselines(*drawn(write("a", seed=1, auc=0.7), write("b", seed=2, auc=0.9)), "auc").axes
    bar = next(line for line in axes.get_lines() if len(line.get_xdata()) == 2)
    assert list(bar.get_xdata()) == pytest.approx([0.8 - 0.02**0.5, 0.8 + 0.02**0.5])


def test_what_is_drawn_is_the_best_run_of_a_line_under_a_name_of_its_own(write, drawn, monkeypatch, tmp_path):
    cluster_map, mapped = plots.cluster_map, []
    monkeypatch.setattr(plots, "cluster_map", lambda run: mapped.append(run.name) or cluster_map(run))
    write("a b-1", seed=1, val_auc=0.6)
    write("a b-2", seed=2, val_auc=0.7)
    write("a-b-1", seed=1, val_auc=0.5, flags={"lr": 0.5})
    write("a-b-2", seed=2, val_auc=0.4, flags={"lr": 0.5})
    paths = plots.draw(*drawn("a b-1", "a b-2", "a-b-1", "a-b-2"), tmp_path)
    assert mapped == ["a b-2", "a-b-1"]
    assert len({path.name for path in paths}) == 5


def test_the_mean_score_has_a_picture_of_its_own(write, drawn, default_run, tmp_path):
    history, _ = default_run

    def with_mean_score(holder, value):
        return holder | {"mean_score": value}

    baselines = {
        name: row
        | {"mean_score": 0.55, "difference": with_mean_score(row["difference"], 0.05)}
        | {part: with_mean_score(row[part], [0.1, 0.2]) for part in ("intervals", "difference_intervals")}
        for name, row in history["baselines"].items()
    }
    groups, rows = drawn(
        write(
            "a",
            baselines=baselines,
            score_table={"best_single": {"mean_score": 0.4}, "oracle": {"mean_score": 0.9}},
            test_metrics=with_mean_score(history["test_metrics"], 0.6),
            test_intervals=with_mean_score(history["test_intervals"], [0.5, 0.7]),
        )
    )
    (axes,) = plots.baselines(groups, rows, "mean_score").axes
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["RankRouter", "random"]
    lines = [list(line.get_xdata()) for line in axes.get_lines()]
    assert lines[:4] == [[0.5, 0.7], [0.6], [0.1, 0.2], [0.55]]
    assert lines[-2:] == [[0.4, 0.4], [0.9, 0.9]]
    assert "scores.png" in {path.name for path in plots.draw(groups, rows, tmp_path)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\t c", "a b c"),
        ("costs $5 and $6", r"costs \$5 and \$6"),
        ("x" * 200, "x" * 19 + "…"),
        ("\U0001f9d0\U0001f9d0 ok", "… ok"),
        ("\x07bell", "…bell"),
        ("x" * 20, "x" * 20),
    ],
)
def test_texts_that_matplotlib_would_choke_on(text, expected):
    assert plots.plain(text, 20) == expected


def test_long_names_keep_their_ends():
    assert plots.ending("outputs/november/bpr-12", 10) == "…er/bpr-12"
    assert plots.ending("bpr-12", 10) == "bpr-12"


def test_the_pngs_are_written_by_name_and_can_be_read(write, capsys):
    write("outputs/a", seed=1)
    write("outputs/b", seed=1, flags={"lr": 0.5}, clusters=[])
    report.main(["outputs/a", "outputs/b", "--plots", "pictures"])
    assert {path.name for path in Path("pictures").iterdir()} == {
        *("training.png", "reliability.png", "baselines.png", "clusters-outputs-a.png")
    }
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4
    for path in Path("pictures").iterdir():
        image = matplotlib.image.imread(path)
        assert np.ptp(image[:, :, :3]) > 0.5  # something is drawn
        assert f"drawn    {path}" in told


@pytest.mark.slow
def test_pictures_of_many_lines_and_of_long_paths(write, capsys):
    names = [write("/".join([*["x" * 60] * 4, f"{i:02d}"]), seed=1, flags={"lr": 1 / (1 + i)}) for i in range(14)]
    report.main([*names, "--plots", "pictures"])
    assert "warning: the pictures show the first 12 of 14 lines" in capsys.readouterr().err
    assert len(list(Path("pictures").glob("clusters-*.png"))) == 12


def test_a_missing_matplotlib_tells_how_to_get_it(write, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "support.plots")
    monkeypatch.delattr("support.plots")
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: report.main([write("a"), "--plots", "p"]))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --plots needs matplotlib: pip install -r requirements-dev.txt\n"
