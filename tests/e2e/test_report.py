"""The report's groups, numbers and pictures against hand-worked values; broken histories are named and left out."""

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
from support.reporting import plots
from support.reporting.runs import read_runs
from support.system.command_line import run_command

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def write(default_run, tmp_path, monkeypatch):
    """A function that writes a changed history of the default run to a folder of this name, and returns the name."""
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
def rows_of(capsys):
    """A function that returns the rows of a report from its JSON, and the lines on stderr."""

    def run(*paths):
        report.main([*paths, "--format", "json"])
        output = capsys.readouterr()
        return json.loads(output.out), output.err.splitlines()

    return run


def test_the_row_of_one_run_equals_its_history(write, rows_of, default_run):
    history, _ = default_run
    ((row,), problems) = rows_of(write("a"))
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


def test_seeds_are_grouped_with_standard_deviation_and_nadeau_bengio_interval(write, rows_of):
    for place, seed in enumerate((1, 2, 3)):
        write(f"at/{place}/bpr-{seed}", seed=seed, auc=0.7 + 0.1 * place, val_auc=0.6 + 0.1 * place, beyond=0.01 * seed)
    ((row,), _) = rows_of("at/0/bpr-1", "at/1/bpr-2/training_history.json", "at/2/bpr-3")
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


def test_runs_with_other_flags_are_separate_rows_sorted_by_validation_auc(write, rows_of):
    write("bpr-1", seed=1, split_seed=7, val_auc=0.7, auc=0.6)
    write("bpr-2", seed=2, split_seed=7, val_auc=0.8, auc=0.7)
    write("bce-1", seed=1, split_seed=7, val_auc=0.9, auc=0.64, flags={"loss_type": "bce"})
    write("bce-2", seed=2, split_seed=7, val_auc=0.8, auc=0.76, flags={"loss_type": "bce"})
    rows, _ = rows_of("bpr-1", "bce-1", "bpr-2", "bce-2")
    assert [(row["run"], row["flags"], row["one_split"]) for row in rows] == [
        ("bce-*", {"loss_type": "bce"}, True),
        ("bpr-*", {"loss_type": "bpr"}, True),
    ]
    assert "beyond_first" not in rows[0]
    beyond = rows[1]["beyond_first"]
    assert (beyond["mean"], beyond["seeds"]) == (pytest.approx(-0.05), [1, 2])
    assert beyond["sd"] == pytest.approx(0.02 / 2**0.5)  # of -0.04 and -0.06: paired by seed


def test_flags_that_do_not_affect_the_result_do_not_separate_runs(write, rows_of, default_run):
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
    rows, _ = rows_of(write("a", seed=1), write("b", seed=2, flags=flags, **elsewhere))
    assert [row["seeds"] for row in rows] == [[1, 2]]
    assert rows[0]["run"] == "a and 1 more"


@pytest.mark.parametrize(
    ("part", "field", "flag"),
    [("data", "content_hash", "data_path"), ("encoder", "fingerprint", "model_path"), ("encoder", "dtype", "dtype")],
)
def test_other_data_or_another_encoder_is_a_separate_row(write, rows_of, default_run, part, field, flag):
    history, _ = default_run
    rows, _ = rows_of(write("a", seed=1), write("b", seed=2, **{part: history[part] | {field: "other"}}))
    assert [row["seeds"] for row in rows] == [[1], [2]]
    assert [set(row["flags"]) for row in rows] == [{flag}, {flag}]


def test_rows_are_sorted_within_the_same_data_only(write, rows_of, default_run):
    other = {"data": default_run[0]["data"] | {"content_hash": "other"}}
    write("a", seed=1, val_auc=0.6)
    write("b", seed=1, val_auc=0.9, **other)
    write("c", seed=1, val_auc=0.7, flags={"lr": 1.0})
    assert [row["run"] for row in rows_of("a", "b", "c")[0]] == ["c", "a", "b"]


def test_one_split_for_all_seeds_and_one_split_per_seed_are_separate_rows(write, rows_of):
    for seed, split_seed in ((1, 1), (2, 2), (42, 42), (1, 42), (2, 42)):
        write(f"{seed}-of-{split_seed}", seed=seed, split_seed=split_seed)
    rows, _ = rows_of(*sorted(path.name for path in Path().iterdir()))
    assert sorted((row["seeds"], row["one_split"]) for row in rows) == [([1, 2], False), ([1, 2, 42], True)]


def test_of_two_equal_runs_the_one_with_more_baselines_is_kept(write, rows_of):
    rows, problems = rows_of(write("bare", baselines={}), write("a"))
    assert [row["runs"] for row in rows] == [["a"]]
    assert problems == ["warning: bare: repeats a, flags and seeds; left out"]


def test_the_same_run_twice_counts_once(write, rows_of):
    rows, problems = rows_of(write("a", seed=1), write("b", seed=1), "a/training_history.json", "./a")
    assert [row["runs"] for row in rows] == [["a"]]
    assert problems == ["warning: b: repeats a, flags and seeds; left out"]


def test_the_best_validation_may_lie_within_an_epoch(write, rows_of):
    validations = [
        {"epoch": epoch, "step": step, "auc": 0.5 + epoch / 10 + step / 1000}
        for epoch, step in ((0, 5), (1, 5), (1, 10))
    ]
    ((row,), problems) = rows_of(write("a", best_epoch=1, best_step=5, validations=validations))
    assert problems == []
    assert row["val_auc"]["mean"] == validations[1]["auc"]


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
    "flag": lambda history: json.dumps(history | {"args": history["args"] | {"lr": math.inf}}),
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
    "step": lambda history: json.dumps(history | {"best_step": 10**6}),
    "two_steps": lambda history: json.dumps(
        history | {"best_step": 5, "validations": [{"epoch": history["best_epoch"], "step": 5, "auc": 0.9}] * 2}
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
def test_a_broken_history_is_named_and_the_others_are_reported(write, rows_of, default_run, damage):
    content = BROKEN[damage](default_run[0])
    Path("broken").mkdir()
    Path("broken", "training_history.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    rows, problems = rows_of("broken", write("whole"))
    assert [row["run"] for row in rows] == ["whole"]
    assert len(problems) == 1
    assert "broken/training_history.json" in problems[0]


def test_a_pipe_is_not_read(write, rows_of):
    os.mkfifo("pipe")
    rows, problems = rows_of("pipe", write("whole"))
    assert [row["run"] for row in rows] == ["whole"]
    assert problems == ["warning: pipe: no history (it is not a regular file); left out"]


def test_a_score_table_that_some_seeds_lack_is_left_out(write, rows_of):
    ends = {"best_single": {"mean_score": 0.5}, "oracle": {"mean_score": 1.0}}
    for names in (("a", "b"), ("c", "d")):
        for name, seed, table in zip(names, (1, 2), ({"score_table": ends}, {}), strict=True):
            write(name, seed=seed, **table)
    for names in (("a", "b"), ("d", "c")):
        ((row,), _) = rows_of(*names)
        assert row["score_table"] == {}


def test_with_a_split_by_battle_the_interval_over_seeds_counts_battles(write, rows_of):
    for seed, beyond in ((1, 0.01), (2, 0.03)):
        write(f"b{seed}", seed=seed, beyond=beyond, flags={"split_by": "battle"})
    ((row,), _) = rows_of("b1", "b2")
    sizes = json.loads(Path("b1/training_history.json").read_text())["data"]["split"]
    sd = 0.02 / 2**0.5
    half = 12.7062 * sd * math.sqrt(1 / 2 + sizes["test"]["battles"] / sizes["train"]["battles"])
    assert row["baselines"]["bradley_terry"]["beyond"]["auc"]["interval"] == pytest.approx(
        [0.02 - half, 0.02 + half], rel=1e-4
    )


def test_rows_with_one_seed_in_common_are_not_compared(write, rows_of):
    write("a-1", seed=1)
    for seed in (1, 2):
        write(f"b-{seed}", seed=seed, flags={"lr": 0.5})
    assert not any("beyond_first" in row for row in rows_of("a-1", "b-1", "b-2")[0])


def test_best_single_and_oracle_of_a_score_table_are_averaged_over_seeds(write, rows_of, capsys):
    for seed in (1, 2):
        ends = {"best_single": {"mean_score": 0.1 * seed}, "oracle": {"mean_score": 1.0}}
        write(f"a{seed}", seed=seed, score_table=ends)
    ((row,), _) = rows_of("a1", "a2")
    assert row["score_table"]["best_single"]["mean"] == pytest.approx(0.15)
    assert row["score_table"]["oracle"] == {"mean": 1.0, "sd": 0.0}
    report.main(["a1", "a2", "--format", "csv"])
    (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert float(line["best_single_mean_score"]) == pytest.approx(0.15)


def test_paths_are_shortened_to_names_where_these_are_distinct(write, capsys, default_run):
    def data(path, content_hash):
        return {"data": default_run[0]["data"] | {"path": path, "content_hash": content_hash}}

    names = [write("a", **data("x/one.parquet", "1")), write("b", **data("y/two.parquet", "2"))]
    report.main(names)
    assert "x/one.parquet" not in (text := capsys.readouterr().out)
    assert "one.parquet" in text
    report.main([*names, write("c", **data("z/one.parquet", "3"))])
    assert {"x/one.parquet", "z/one.parquet"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(("flag", "value"), [("limit", 500), ("hold_out_model", "gpt-4")])
def test_runs_with_other_test_battles_are_not_compared(write, rows_of, flag, value):
    for name, given in (("all", None), ("some", value)):
        for seed in (1, 2):
            write(f"{name}-{seed}", seed=seed, val_auc=0.7 if given else 0.6, flags={flag: given})
    rows, _ = rows_of("all-1", "all-2", "some-1", "some-2")
    assert [row["run"] for row in rows] == ["all-*", "some-*"]
    assert not any("beyond_first" in row for row in rows)


@pytest.mark.parametrize("form", ["text", "markdown", "csv"])
def test_control_characters_are_not_printed(write, capsys, form):
    write("a", flags={"loss_type": "\x1b[31mred\x07"})
    write("b", seed=1, status="\x1b[2J\nrunning")
    write("c", seed=1)
    report.main(["a", "b", "c", "--format", form])
    output = capsys.readouterr()
    assert "[31mred" in output.out
    assert len(output.err.splitlines()) == 1
    assert not any(letter in output.out + output.err for letter in "\x1b\x07")


def test_runs_that_are_not_finished_are_named(write, rows_of):
    write("killed", status="running")
    write("failed", status="failed", val_metrics=[])
    Path("nothing").mkdir()
    Path("notes.txt").write_text("hello")
    long = "x" * 5000
    rows, problems = rows_of("killed", "nothing", write("whole"), "failed", "notes.txt", "no/such", long)
    assert [row["run"] for row in rows] == ["whole"]
    assert problems[0] == "warning: killed: running after 10 epochs; left out"
    assert problems[1].startswith("warning: nothing: no history")
    assert problems[2] == "warning: failed: failed after 0 epochs; left out"
    assert [problem.split(":")[1].strip() for problem in problems[3:]] == ["notes.txt", "no/such", long]


def test_no_finished_run_is_an_error_of_one_line(write, capsys):
    write("killed", status="running")
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: report.main(["killed"]))
    assert stopped.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "error: no finished run among 1 paths; expected output folders of train.py"


def test_the_columns_of_the_text_table_are_aligned(write, capsys):
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


def test_csv_and_markdown_hold_the_same_values_as_json(write, rows_of, capsys):
    names = [write("a|b", seed=1, flags={"lr": 0.5}), write("c", seed=1)]
    expected, _ = rows_of(*names)
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


def test_csv_keeps_integers_beside_missing_values_and_takes_broken_unicode(write, drawn):
    write("a", seed=1, flags={"limit": 500, "\ud800": "\ud800"}, val_auc=0.5)
    write("b", seed=1, flags={"limit": None}, val_auc=0.6)
    _, rows = drawn("a", "b")
    lines = list(csv.DictReader(io.StringIO(report.as_csv(rows))))
    assert [(line["run"], line["limit"], line[""]) for line in lines] == [("a", "500", ""), ("b", "", "")]
    assert "beyond_first_auc" not in lines[0]  # empty in both


def test_the_order_of_columns_does_not_depend_on_hashes(write):
    write("a")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import report; report.main(['a', '--format', 'csv'])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, env={"PYTHONHASHSEED": str(seed)}
        ).stdout
        for seed in (0, 1)
    }
    assert len(outputs) == 1


def test_the_report_loads_no_torch_and_its_flags_not_even_numpy(write):
    write("a")
    write("b", seed=1)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import report
print(sorted({{"numpy", "pandas", "matplotlib"}} & set(sys.modules)))
report.main(["a", "b", "--plots", "."])
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *_, last = ended.stdout.splitlines()
    assert (first, last) == ("[]", "[]")


# --- pictures -------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(write):
    """A function that returns groups of runs and their rows, which the pictures are drawn from."""

    def run(*names):
        groups = report.sort_groups(report.group_by_seeds(read_runs(names)[0])[0])
        return groups, report.table(groups)

    return run


def test_training_shows_every_run_and_its_best_epoch(write, drawn, default_run):
    history, _ = default_run
    loss, auc = plots.training(*drawn(write("a", seed=1), write("b", seed=2))).axes
    lines = [line for line in auc.get_lines() if len(line.get_xdata()) > 1]
    assert len(lines) == 2
    for axes, values in ((loss, history["train_losses"]), (auc, [row["auc"] for row in history["val_metrics"]])):
        curve, dot, *_ = axes.get_lines()
        assert list(curve.get_ydata()) == values
        assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (history["best_epoch"], values[history["best_epoch"]])


def test_reliability_shows_bins_pooled_over_seeds_by_their_battles(write, drawn):
    def bins(*parts):
        return [{"low": low, "high": low + 0.1, "battles": n, "probability": p, "won": won} for low, n, p, won in parts]

    def calibration(*parts):
        calibrated = {"expected_calibration_error": 0.1, "bins": bins(*parts)}
        return calibrated | {"temperature": 2.0, "uncalibrated": calibrated | {"expected_calibration_error": 0.2}}

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


def test_the_cluster_map_agrees_with_its_labels(write, drawn, monkeypatch):
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


def test_over_seeds_a_bar_extends_one_standard_deviation_to_each_side(write, drawn):
    (axes,) = plots.baselines(*drawn(write("a", seed=1, auc=0.7), write("b", seed=2, auc=0.9)), "auc").axes
    bar = next(line for line in axes.get_lines() if len(line.get_xdata()) == 2)
    assert list(bar.get_xdata()) == pytest.approx([0.8 - 0.02**0.5, 0.8 + 0.02**0.5])


def test_the_cluster_map_is_of_the_best_run_of_each_row_in_a_file_of_its_own(write, drawn, monkeypatch, tmp_path):
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
def test_texts_that_matplotlib_cannot_draw(text, expected):
    assert plots.shorten(text, 20) == expected


def test_long_names_are_cut_at_the_start():
    assert plots.shorten_start("outputs/november/bpr-12", 10) == "…er/bpr-12"
    assert plots.shorten_start("bpr-12", 10) == "bpr-12"


def test_the_pngs_have_names_and_can_be_read(write, capsys):
    write("outputs/a", seed=1)
    write("outputs/b", seed=1, flags={"lr": 0.5}, clusters=[])
    report.main(["outputs/a", "outputs/b", "--plots", "pictures"])
    assert {path.name for path in Path("pictures").iterdir()} == {
        *("training.png", "reliability.png", "baselines.png", "clusters-outputs-a.png")
    }
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for path in Path("pictures").iterdir():
        image = matplotlib.image.imread(path)
        assert np.ptp(image[:, :, :3]) > 0.5  # something is drawn
        assert f"drawn    {path}" in lines


def test_pictures_of_many_rows_and_of_long_paths(write, capsys):
    names = [write("/".join([*["x" * 60] * 4, f"{i:02d}"]), seed=1, flags={"lr": 1 / (1 + i)}) for i in range(14)]
    report.main([*names, "--plots", "pictures"])
    assert "warning: the pictures show the first 12 of 14 lines" in capsys.readouterr().err
    assert len(list(Path("pictures").glob("clusters-*.png"))) == 12


def test_without_matplotlib_the_error_says_how_to_install_it(write, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "support.reporting.plots")
    monkeypatch.delattr("support.reporting.plots")
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: report.main([write("a"), "--plots", "p"]))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --plots needs matplotlib: pip install -r requirements-dev.txt\n"
