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
import train
from support.reporting import plots
from support.reporting.runs import read_runs
from support.system.command_line import run_command
from support.system.files import locked

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def history(small, tmp_path_factory):
    """The history of a finished run with baselines, of which the tests write changed copies."""
    output = tmp_path_factory.mktemp("outputs")
    better = ["--epochs", "8", "--lr", "0.01", "--baselines", "fast"]
    train.main([*small, *better, "--output_dir", str(output)])
    return json.loads((output / "training_history.json").read_text())


@pytest.fixture
def write(history, tmp_path, monkeypatch):
    """A function that writes a changed history to a folder of this name, and returns the name."""
    monkeypatch.chdir(tmp_path)

    def run(name, seed=42, split_seed=None, auc=None, val_auc=None, beyond=None, flags=(), **changes):
        changed = copy.deepcopy(history) | changes
        changed["args"] |= {"seed": seed, "split_seed": seed if split_seed is None else split_seed} | dict(flags)
        if auc is not None:
            changed["test_metrics"]["auc"] = auc
        if val_auc is not None:
            changed["val_metrics"] = [{"auc": value} for value in (val_auc - 0.1, val_auc)]
            changed["train_losses"], changed["best_epoch"] = [0.7, 0.6], 1
        if beyond is not None:
            changed["baselines"]["bradley_terry"]["difference"]["auc"] = beyond
        Path(name).mkdir(parents=True)
        Path(name, "training_history.json").write_text(json.dumps(changed))
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


@pytest.fixture
def drawn(write):
    """A function that returns groups of runs and their rows, which the pictures are drawn from."""

    def run(*names):
        groups = report.sort_groups(report.group_by_seeds(read_runs(names)[0])[0])
        return groups, report.table(groups)

    return run


def test_the_row_of_one_run_equals_its_history(write, rows_of, history):
    ((row,), problems) = rows_of(write("a", best_epoch=5))
    assert problems == []
    assert row["val_auc"] == {"mean": history["val_metrics"][5]["auc"], "sd": None}
    for metric, value in history["test_metrics"].items():
        assert row["test"][metric] == {"mean": value, "sd": None, "interval": history["test_intervals"][metric]}
    for name, baseline in history["baselines"].items():
        for metric in history["test_metrics"]:
            assert row["baselines"][name]["test"][metric]["mean"] == baseline[metric]
            beyond = row["baselines"][name]["beyond"][metric]
            assert beyond["mean"] == baseline["difference"][metric]
            assert beyond["interval"] == baseline["difference_intervals"][metric]
    assert row["expected_calibration_error"]["mean"] == history["calibration"]["expected_calibration_error"]
    assert (row["flags"], row["seeds"], row["runs"]) == ({}, [42], ["a"])
    validations = [{"epoch": 1, "step": step, "auc": 0.6 + step / 1000} for step in (5, 10)]
    ((row,), _) = rows_of(write("within", best_epoch=1, best_step=5, validations=validations))
    assert row["val_auc"]["mean"] == 0.605  # of the best validation, within an epoch


def test_seeds_are_grouped_with_standard_deviation_and_nadeau_bengio_interval(write, rows_of, history):
    for unit in ("query", "battle"):  # the unit of the split is counted
        for place, seed in enumerate((1, 2, 3)):
            values = {"auc": 0.7 + 0.1 * place, "val_auc": 0.6 + 0.1 * place, "beyond": 0.01 * seed}
            write(f"{unit}/{place}/bpr-{seed}", seed=seed, flags={"split_by": unit}, **values)
        paths = [f"{unit}/0/bpr-1", f"{unit}/1/bpr-2/training_history.json", f"{unit}/2/bpr-3"]
        ((row,), _) = rows_of(*paths)
        assert (row["run"], row["seeds"], row["one_split"]) == (f"{unit}/*", [1, 2, 3], False)
        assert row["val_auc"] == {"mean": pytest.approx(0.7), "sd": pytest.approx(0.1)}
        assert row["test"]["auc"] == {"mean": pytest.approx(0.8), "sd": pytest.approx(0.1), "interval": None}
        beyond = row["baselines"]["bradley_terry"]["beyond"]["auc"]
        num_test, num_train = (
            history["data"]["split"][part]["battles" if unit == "battle" else "queries"] for part in ("test", "train")
        )
        half = 4.302653 * 0.01 * math.sqrt(1 / 3 + num_test / num_train)  # t of 2 degrees of freedom
        assert (beyond["mean"], beyond["sd"]) == (pytest.approx(0.02), pytest.approx(0.01))
        assert beyond["interval"] == pytest.approx([0.02 - half, 0.02 + half], rel=1e-6), unit
        assert row["baselines"]["bradley_terry"]["verdict"] == "no difference shown"


def test_runs_with_other_flags_are_separate_rows_sorted_by_validation_auc_and_compared_by_seed(write, rows_of):
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
    names = [write(f"lr-{seed}", seed=seed, flags={"lr": 0.5}) for seed in (1, 2)]
    assert not any("beyond_first" in row for row in rows_of(write("a", seed=1), *names)[0])  # one seed in common


def test_only_what_affects_the_result_separates_runs(write, rows_of, history):
    data, encoder = history["data"], history["encoder"]
    elsewhere = dict.fromkeys(("output_dir", "data_path", "model_path", "cache_dir"), "x")
    elsewhere |= {"baselines": "all", "demo": True, "device": "cuda", "encode_tokens": 7}
    for i, (changes, flag) in enumerate(
        (
            ({"data": data | {"path": "x"}, "encoder": encoder | {"path": "x"}, "flags": elsewhere}, None),
            ({"data": data | {"content_hash": "other"}}, "data_path"),
            ({"encoder": encoder | {"fingerprint": "other"}}, "model_path"),
            ({"encoder": encoder | {"dtype": "other"}}, "dtype"),
        )
    ):
        rows, _ = rows_of(write(f"a{i}", seed=1), write(f"b{i}", seed=2, **changes))
        expected = [([1, 2], set())] if flag is None else [([1], {flag}), ([2], {flag})]
        assert [(row["seeds"], set(row["flags"])) for row in rows] == expected, flag
    assert report.common_name(["a", "b"]) == "a and 1 more"


def test_rows_with_other_test_battles_are_neither_sorted_together_nor_compared(write, rows_of, history):
    for i, changes in enumerate(
        (
            {"flags": {"limit": 500}},
            {"flags": {"hold_out_model": "gpt-4"}},
            {"flags": {"split_by": "battle"}},
            {"data": history["data"] | {"content_hash": "other"}},
        )
    ):
        kinds = {"all": (0.6, {}), "other": (0.9, changes), "best": (0.7, {"flags": {"lr": 1.0}})}
        rows, _ = rows_of(
            *(
                write(f"{i}-{kind}-{seed}", seed=seed, val_auc=val_auc, **given)
                for kind, (val_auc, given) in kinds.items()
                for seed in (1, 2)
            )
        )
        assert [row["run"] for row in rows] == [f"{i}-best-*", f"{i}-all-*", f"{i}-other-*"], changes
        assert ["beyond_first" in row for row in rows] == [False, True, False], changes


def test_one_split_for_all_seeds_and_one_split_per_seed_are_separate_rows(write, rows_of):
    for seed, split_seed in ((1, 1), (2, 2), (42, 42), (1, 42), (2, 42)):
        write(f"{seed}-of-{split_seed}", seed=seed, split_seed=split_seed)
    rows, _ = rows_of(*sorted(path.name for path in Path().iterdir()))
    assert sorted((row["seeds"], row["one_split"]) for row in rows) == [([1, 2], False), ([1, 2, 42], True)]


def test_of_equal_runs_one_is_kept_with_the_most_baselines(write, rows_of):
    rows, problems = rows_of(write("bare", baselines={}), write("a"), "a/training_history.json", "./a", write("b"))
    assert [row["runs"] for row in rows] == [["a"]]
    assert problems == [f"warning: {name}: repeats a, flags and seeds; left out" for name in ("bare", "b")]


def test_a_broken_history_is_named_and_the_others_are_reported(write, rows_of, history):
    epoch, metrics, sizes = history["best_epoch"], history["test_metrics"], {"train": {"queries": 0}}
    without_table = {"baselines": {}, "test_metrics": metrics | {"mean_score": 1.0}}
    without_table["test_intervals"] = history["test_intervals"] | {"mean_score": [0.0, 1.0]}
    contents = [b"", json.dumps(history)[:999].encode(), b"[]", b"7", b"[" * 100_000, b"\xff\xfe\x00"]
    for changes in (
        {"train_losses": [math.nan]},
        {"train_losses": ["high"]},
        {"train_losses": [1.0]},
        {"train_losses": [1e308] * len(history["train_losses"])},
        {"args": history["args"] | {"lr": math.inf}},
        {"args": history["args"] | {"seed": "7"}},
        {"best_epoch": 99},
        {"best_epoch": -1},
        {"best_step": 10**6},
        {"best_step": 5, "validations": [{"epoch": epoch, "step": 5, "auc": 0.9}] * 2},
        {"test_metrics": None},
        {"test_metrics": metrics | {"auc": None}},
        {"calibration": history["calibration"] | {"bins": []}},
        {"data": history["data"] | {"split": sizes | {"test": {"queries": 1}}}},
        without_table,
    ):
        contents.append(json.dumps(history | changes).encode())
    for *holders, lost in (
        ("calibration", "bins"),
        ("data", "content_hash"),
        ("test_metrics", "auc"),
        ("test_intervals", "auc"),
        ("baselines", "bradley_terry", "difference", "auc"),
        ("baselines", "neighbours", "f1"),
        ("clusters", 1, "log_odds", "demo-model-b"),
        ("clusters", 1, "central_queries", slice(None)),
    ):
        changed = part = copy.deepcopy(history)
        for name in holders:
            part = part[name]
        del part[lost]
        contents.append(json.dumps(changed).encode())
    paths = [write(f"broken-{i}") + "/training_history.json" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        Path(path).write_bytes(content)
    rows, problems = rows_of(*paths, write("whole"))
    assert [row["runs"] for row in rows] == [["whole"]]
    assert [problem.split(": ")[1] for problem in problems] == paths


def test_what_is_not_a_finished_run_is_named_and_without_one_the_report_is_refused(write, rows_of, capsys):
    write("killed", status="running", val_metrics=[{"auc": 0.5}] * 3)
    write("failed", status="failed", val_metrics=[])
    Path("nothing").mkdir()
    Path("notes.txt").write_text("hello")
    os.mkfifo("pipe")
    others = ["nothing", "notes.txt", "pipe", "no/such", "x" * 5000]
    rows, problems = rows_of("killed", write("whole"), "failed", *others)
    assert [row["run"] for row in rows] == ["whole"]
    assert problems[0] == "warning: killed: killed after 3 epochs; left out"
    assert problems[1] == "warning: failed: failed after 0 epochs; left out"
    assert [problem.split(":")[1].strip() for problem in problems[2:]] == others
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: report.main(["killed"]))
    assert stopped.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "error: no finished run among 1 paths; expected output folders of train.py"


def test_a_run_that_is_at_work_is_named_with_how_far_it_is(write, rows_of, capsys):
    write("early", status="running", val_metrics=[], validations=[])
    halfway = [{"epoch": 3, "step": 100, "auc": 0.75}]
    write("halfway", status="running", val_metrics=[{"auc": 0.5}] * 3, validations=halfway)
    with locked(Path("early"), "--output_dir"), locked(Path("halfway"), "--output_dir"):
        rows, lines = rows_of("early", "halfway", write("whole"))
        assert [row["run"] for row in rows] == ["whole"]
        assert lines == ["running  early: training", "running  halfway: epoch 3 of 8, best validation AUC 0.7500"]
        report.main(["early"])  # nothing to compare yet, and nothing wrong
        out, err = capsys.readouterr()
        assert (out, err) == ("", "running  early: training\n")
    _, lines = rows_of("halfway", "whole")
    assert lines == ["warning: halfway: killed after 3 epochs; left out"]


def test_ends_of_a_score_table_are_averaged_over_seeds_and_left_out_where_a_seed_lacks_them(write, rows_of, capsys):
    for seed in (1, 2):
        ends = {"best_single": {"mean_score": 0.1 * seed}, "oracle": {"mean_score": 1.0}}
        write(f"a{seed}", seed=seed, score_table=ends)
        write(f"without{seed}", seed=seed)
    ((row,), _) = rows_of("a1", "a2")
    assert row["score_table"]["best_single"]["mean"] == pytest.approx(0.15)
    assert row["score_table"]["oracle"] == {"mean": 1.0, "sd": 0.0}
    report.main(["a1", "a2", "--format", "csv"])
    (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert float(line["best_single_mean_score"]) == pytest.approx(0.15)
    for names in (("a1", "without2"), ("without1", "a2")):
        ((row,), _) = rows_of(*names)
        assert row["score_table"] == {}, names


def test_paths_are_shortened_to_names_where_these_are_distinct(write, capsys, history):
    def data(path, content_hash):
        return {"data": history["data"] | {"path": path, "content_hash": content_hash}}

    names = [write("a", **data("x/one.parquet", "1")), write("b", **data("y/two.parquet", "2"))]
    report.main(names)
    assert "x/one.parquet" not in (text := capsys.readouterr().out)
    assert "one.parquet" in text
    report.main([*names, write("c", **data("z/one.parquet", "3"))])
    assert {"x/one.parquet", "z/one.parquet"} <= set(capsys.readouterr().out.split())


def test_control_characters_are_not_printed(write, capsys):
    write("a", flags={"loss_type": "\x1b[31mred\x07"})
    write("b", seed=1, status="\x1b[2J\nrunning")
    write("c", seed=1)
    write("d", seed=1, flags={"\ud800\x1b": "\ud800\x1b"})
    for form in ("text", "markdown", "csv"):
        report.main(["c", "d", "--format", form])
        assert not {"\ud800", "\x1b"} & set(capsys.readouterr().out), form
        report.main(["a", "b", "c", "--format", form])
        output = capsys.readouterr()
        assert "[31mred" in output.out, form
        assert len(output.err.splitlines()) == 1, form
        assert not any(letter in output.out + output.err for letter in "\x1b\x07"), form


def test_the_columns_of_the_text_table_are_aligned(write, capsys, history):
    baselines = copy.deepcopy(history["baselines"])
    baselines["bradley_terry"]["difference_intervals"]["auc"] = [0.01, 0.02]
    split = {"train": {"queries": 900}, "test": {"queries": 100}}
    better = {"baselines": baselines, "data": history["data"] | {"split": split}}
    write("short", seed=1, val_auc=0.8, auc=0.75, flags={"lr": 0.5}, **better)
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
    names = [write("a|b", seed=1, flags={"lr": 0.5, "limit": 500}), write("c", seed=1, flags={"limit": None})]
    expected, _ = rows_of(*names)
    report.main([*names, "--format", "csv"])
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(lines[0])[:4] == ["run", "seeds", "limit", "lr"]
    assert [line["limit"] for line in lines] == ["500", ""]  # an integer also beside a missing value
    assert "beyond_first_auc" not in lines[0]  # empty in both
    for line, row in zip(lines, expected, strict=True):
        assert (line["run"], float(line["lr"]), line["seeds"]) == (row["run"], row["flags"]["lr"], "1")
        assert float(line["val_auc"]) == row["val_auc"]["mean"]
        for metric, value in row["test"].items():
            assert float(line[f"test_{metric}"]) == value["mean"]
            assert [float(line[f"test_{metric}_{end}"]) for end in ("low", "high")] == value["interval"]
        beyond = row["baselines"]["neighbours"]["beyond"]["log_loss"]
        assert float(line["beyond_neighbours_log_loss_low"]) == beyond["interval"][0]
        assert line["verdict_bradley_terry"] == row["baselines"]["bradley_terry"]["verdict"]
    report.main([*names, "--format", "markdown"])
    header, rule, *cells = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert header.count("|") == rule.count("|") == cells[0].replace("\\|", "").count("|")
    assert "a\\|b" in cells[0] + cells[1]


def test_the_report_loads_no_torch_and_its_flags_not_even_numpy(write):
    write("a")
    write("b", seed=1)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import report
print(sorted({{"numpy", "pandas", "matplotlib"}} & set(sys.modules)))
report.main(["a", "b", "--format", "csv"])
import support.reporting.plots
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *_, last = ended.stdout.splitlines()
    assert (first, last) == ("[]", "[]")


# --- pictures -------------------------------------------------------------------------------------------------


def test_training_shows_every_run_and_its_best_epoch(write, drawn, history):
    loss, auc = plots.training(*drawn(write("a", seed=1, best_epoch=5), write("b", seed=2))).axes
    lines = [line for line in auc.get_lines() if len(line.get_xdata()) > 1]
    assert len(lines) == 2
    for axes, values in ((loss, history["train_losses"]), (auc, [row["auc"] for row in history["val_metrics"]])):
        curve, dot, *_ = axes.get_lines()
        assert list(curve.get_ydata()) == values
        assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (5, values[5])


def test_reliability_shows_bins_pooled_over_seeds_by_their_battles(write, drawn):
    def calibration(*parts):
        names = ("low", "battles", "probability", "won")
        bins = [dict(zip(names, part, strict=True)) | {"high": part[0] + 0.1} for part in parts]
        calibrated = {"expected_calibration_error": 0.1, "bins": bins}
        return calibrated | {"temperature": 2.0, "uncalibrated": calibrated | {"expected_calibration_error": 0.2}}

    write("a", seed=1, calibration=calibration((0.5, 1, 0.52, 0.6), (0.8, 10, 0.85, 0.9)))
    write("b", seed=2, calibration=calibration((0.5, 3, 0.56, 0.4)))
    (axes,) = plots.reliability(*drawn("a", "b")).axes
    assert len(axes.collections) == 2
    for dots in axes.collections:
        assert dots.get_offsets().tolist() == [[pytest.approx(0.55), pytest.approx(0.45)], [0.85, 0.9]]
        assert np.diff(dots.get_sizes()) == pytest.approx(600 * (10 - 4) / 14)
    assert "ECE 0.200 as trained (grey), 0.100 at the fitted T (blue)" in axes.get_title()


def test_baselines_show_differences_and_intervals_or_standard_deviations(write, drawn, history):
    (axes,) = plots.baselines(*drawn(write("a", seed=1, auc=0.7)), "auc").axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["RankRouter", "Bradley-Terry", "per-cluster BT", "neighbors"]
    bars = [line for line in axes.get_lines() if len(line.get_xdata()) == 2]
    dots = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
    rows = [history["baselines"][name] for name in list(history["baselines"])[1:]]
    intervals = [history["test_intervals"], *(row["intervals"] for row in rows)]
    assert [list(bar.get_xdata()) for bar in bars] == [interval["auc"] for interval in intervals]
    assert [dot.get_xdata()[0] for dot in dots] == [0.7, *(row["auc"] for row in rows)]
    assert [bar.get_ydata()[0] for bar in bars] == [dot.get_ydata()[0] for dot in dots] == [0, 1, 2, 3]
    beyond = history["baselines"]["neighbours"]["difference"]["auc"]
    assert f"{beyond:+.4f} [" in axes.texts[2].get_text()
    (axes,) = plots.baselines(*drawn("a", write("b", seed=2, auc=0.9)), "auc").axes
    bar = next(line for line in axes.get_lines() if len(line.get_xdata()) == 2)
    assert list(bar.get_xdata()) == pytest.approx([0.8 - 0.02**0.5, 0.8 + 0.02**0.5])


def test_the_cluster_map_agrees_with_its_labels(write, drawn, monkeypatch):
    odds = {("first", "x"): -1.0, ("first", "y"): 2.0, ("second", "x"): 5.0, ("second", "y"): 1.0}
    sizes = {"first": 30, "second": 5}
    clusters = [
        {"size": size, "central_queries": [name], "log_odds": {model: odds[name, model] for model in "xy"}}
        for name, size in sizes.items()
    ]
    clusters.append({"size": 0, "central_queries": [], "log_odds": None})
    ((run,),), _ = drawn(write("a", clusters=clusters))
    assert len(run.clusters) == 2
    axes = plots.cluster_map(run).axes[0]
    shown = axes.get_images()[0].get_array()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    names = [label.split("  ")[0] for label in labels]
    models = [label.get_text() for label in axes.get_xticklabels()]
    assert models == ["y", "x"]  # y is stronger over all queries
    assert labels == [f"{name}  ({sizes[name]})" for name in names]
    for row, name in enumerate(names):
        for column, model in enumerate(models):
            assert shown[row, column] == odds[name, model]
    strongest = dict(zip(*reversed(axes.get_lines()[0].get_data()), strict=True))
    assert {name: models[strongest[row]] for row, name in enumerate(names)} == {"first": "y", "second": "x"}
    limits = axes.get_images()[0].get_clim()
    assert limits[0] == -limits[1]  # white is even odds
    monkeypatch.setattr(plots, "MOST_CLUSTERS", 1)
    assert [label.get_text() for label in plots.cluster_map(run).axes[0].get_yticklabels()] == ["first  (30)"]


def test_the_mean_score_has_a_picture_of_its_own(write, drawn, history, tmp_path, monkeypatch):
    def with_mean_score(holder, value):
        return holder | {"mean_score": value}

    baselines = {
        name: row
        | {"mean_score": 0.55, "difference": with_mean_score(row["difference"], 0.05)}
        | {part: with_mean_score(row[part], [0.1, 0.2]) for part in ("intervals", "difference_intervals")}
        for name, row in history["baselines"].items()
    }
    changes = {
        "baselines": baselines,
        "score_table": {"best_single": {"mean_score": 0.4}, "oracle": {"mean_score": 0.9}},
        "test_metrics": with_mean_score(history["test_metrics"], 0.6),
        "test_intervals": with_mean_score(history["test_intervals"], [0.5, 0.7]),
    }
    groups, rows = drawn(write("a", **changes))
    (axes,) = plots.baselines(groups, rows, "mean_score").axes
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["RankRouter", "random"]
    lines = [list(line.get_xdata()) for line in axes.get_lines()]
    assert lines[:4] == [[0.5, 0.7], [0.6], [0.1, 0.2], [0.55]]
    assert lines[-2:] == [[0.4, 0.4], [0.9, 0.9]]
    monkeypatch.setattr(plots.Figure, "savefig", lambda *_, **__: None)
    assert "scores.png" in {path.name for path in plots.draw(groups, rows, tmp_path)}


def test_the_pictures_are_pngs_and_each_row_has_a_cluster_map_of_its_best_run(write, monkeypatch, capsys):
    cluster_map, mapped = plots.cluster_map, []
    monkeypatch.setattr(plots, "cluster_map", lambda run: mapped.append(run.name) or cluster_map(run))
    monkeypatch.setattr(plots, "MOST_ROWS", 4)
    long = "/".join(["x" * 60] * 4)
    names = [write("a b-1", seed=1, val_auc=0.6), write("a b-2", seed=2, val_auc=0.7)]
    names += [write(f"a-b-{seed}", seed=seed, val_auc=0.6 - seed / 10, flags={"lr": 0.5}) for seed in (1, 2)]
    names += [write(long, val_auc=0.3, flags={"lr": 0.4}), write("bare", val_auc=0.2, flags={"lr": 0.3}, clusters=[])]
    names += [write("worst", val_auc=0.1, flags={"lr": 0.2})]
    report.main([*names, "--plots", "pictures"])
    assert mapped == ["a b-2", "a-b-1", long]
    warning, *lines = capsys.readouterr().err.splitlines()
    assert warning == "warning: the pictures show the first 4 of 5 lines"
    expected = {*("training.png", "reliability.png", "baselines.png"), "clusters-a-b-.png"}
    paths = set(Path("pictures").iterdir())
    assert expected < {path.name for path in paths}
    assert len(paths) == 6  # a file for each map
    assert set(lines) == {f"drawn    {path}" for path in paths}
    for path in paths:
        assert np.ptp(matplotlib.image.imread(path)[:, :, :3]) > 0.5, path  # something is drawn


def test_texts_are_cut_and_cleaned_of_what_matplotlib_cannot_draw():
    for text, expected in (
        ("a\nb\t c", "a b c"),
        ("costs $5 and $6", r"costs \$5 and \$6"),
        ("x" * 200, "x" * 19 + "…"),
        ("\U0001f9d0\U0001f9d0 ok", "… ok"),
        ("\x07bell", "…bell"),
        ("x" * 20, "x" * 20),
    ):
        assert plots.shorten(text, 20) == expected, text
    assert plots.shorten_start("outputs/november/bpr-12", 10) == "…er/bpr-12"
    assert plots.shorten_start("bpr-12", 10) == "bpr-12"


def test_without_matplotlib_the_error_says_how_to_install_it(write, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "support.reporting.plots")
    monkeypatch.delattr("support.reporting.plots")
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: report.main([write("a"), "--plots", "p"]))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --plots needs matplotlib: pip install -r requirements-dev.txt\n"
