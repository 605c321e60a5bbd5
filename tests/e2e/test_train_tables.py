"""Training on score tables: the mean score of the chosen models, its baselines, and what is printed."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import report
import train
from data_loader import load_battles, split_battles
from rankrouter import RankRouter
from support.reporting.runs import read_runs

NAMES = [f"demo-model-{letter}" for letter in "abcd"]  # of the small score table


@pytest.fixture(scope="session")
def table_run(run_demo, tmp_path_factory):
    """A run on a score table in which the kind of prompt decides who is best; returns history, output and table."""
    rng = np.random.default_rng(1)  # on training and on test another single model is best
    verbs = np.array(["solve problem", "write poem", "sing song"])[rng.integers(3, size=400)]
    quality = {"solve problem": (0.7, 0.4, 0.2), "write poem": (0.1, 0.5, 0.3), "sing song": (0.2, 0.3, 0.6)}
    scores = np.array([quality[verb] for verb in verbs]) + rng.normal(0, 0.15, (400, 3))
    table = pd.DataFrame({"prompt": [f"{verb} {i}" for i, verb in enumerate(verbs)]})
    table[["m1", "m2", "m3"]] = scores
    table.loc[::7, "m3"] = np.nan
    path = tmp_path_factory.mktemp("table") / "scores.parquet"
    table.to_parquet(path)
    history, output = run_demo(
        "--data_path", str(path), *["--num_clusters", "3", "--epochs", "6", "--lr", "1e-3", "--embedding_dim", "64"]
    )
    return history, output, path


def test_a_score_table_is_evaluated_by_the_scores_of_the_chosen_models(table_run):
    history, output, path = table_run
    split, _ = split_battles(load_battles(str(path))[0], 42)
    table, train = split.test.table, split.train.table.scores
    router = RankRouter.load(output / "best_model.pt")
    scores = router.scores_of([split.test.queries[i] for i in table.query_idx])
    best_single = np.nanmean(train, 0).argmax()
    assert best_single != np.nanmean(table.scores, 0).argmax()
    fallback = np.argsort(-np.nanmean(train, 0))  # every model has most of the rows
    chosen, single, hits = [], [], []
    for row, mine in zip(table.scores, scores, strict=True):
        there = np.flatnonzero(~np.isnan(row))
        choice = max(there, key=lambda model: mine[model])
        chosen.append(row[choice])
        hits.append(row[choice] == np.nanmax(row))
        single.append(row[next(model for model in fallback if model in there)])
    oracle = np.nanmax(table.scores, 1)
    test, ends = history["test_metrics"], history["score_table"]
    assert test["mean_score"] == pytest.approx(np.mean(chosen), abs=1e-9)
    assert test["top1_accuracy"] == pytest.approx(np.mean(hits), abs=1e-9)
    gap = (np.mean(chosen) - np.mean(single)) / (np.mean(oracle) - np.mean(single))
    assert test["gap_closed"] == pytest.approx(gap)
    assert (ends["rows"], ends["best_single"]["model"]) == (len(table.scores), f"m{best_single + 1}")
    assert ends["best_single"]["mean_score"] == pytest.approx(np.mean(single))
    assert ends["oracle"]["mean_score"] == pytest.approx(np.mean(oracle))
    assert (ends["oracle"]["top1_accuracy"], router.metadata.best_single_model) == (1, f"m{best_single + 1}")
    assert gap > 0.4  # the kind of prompt was planted
    rng, values = np.random.default_rng(3), []
    for _ in range(1000):  # a query has one row here
        rows = rng.integers(len(oracle), size=len(oracle))
        low, mid, high = (np.array(column)[rows].mean() for column in (single, chosen, oracle))
        values.append((mid, (mid - low) / (high - low)))
    for name, column in zip(("mean_score", "gap_closed"), np.transpose(values), strict=True):
        low, high = history["test_intervals"][name]
        assert (low, high) == pytest.approx(np.percentile(column, [2.5, 97.5]), abs=0.2 * (high - low))


def test_baselines_on_a_score_table_are_paired_with_the_router(table_run):
    history, _, _ = table_run
    rows, test = history["baselines"], history["test_metrics"]
    assert set(rows) == {"random", "best_single", "bradley_terry", "cluster_bradley_terry", "neighbours"}
    assert rows["best_single"]["gap_closed"] == 0
    assert rows["best_single"]["intervals"]["gap_closed"] == [0, 0]
    assert rows["best_single"]["mean_score"] == pytest.approx(history["score_table"]["best_single"]["mean_score"])
    assert rows["random"]["gap_closed"] < 0
    for row in rows.values():
        for name in ("mean_score", "gap_closed", "top1_accuracy"):
            assert row["difference"][name] == pytest.approx(test[name] - row[name])
            low, high = row["difference_intervals"][name]
            assert low <= row["difference"][name] <= high
    # Paired on the same samples: the gap closed beyond one that closes none is the gap closed.
    assert rows["best_single"]["difference_intervals"]["gap_closed"] == pytest.approx(
        history["test_intervals"]["gap_closed"]
    )


@pytest.fixture
def priced_table(table_run, tmp_path):
    """The table of `table_run` in the columns of RouterBench: kinds of prompts as `eval_name`, costs that vary."""
    table = pd.read_parquet(table_run[2])
    verb = table["prompt"].str.split().str[0]
    table.insert(0, "sample_id", [f"{name}.{i}" for i, name in enumerate(verb)])
    table.insert(2, "eval_name", verb)
    for name, cost in (("m1", 3.0), ("m2", np.linspace(1, 2, len(table))), ("m3", 6.0)):
        table[f"{name}|model_response"], table[f"{name}|total_cost"] = "an answer", cost
    table["oracle_model_to_route_to"] = "m1"
    table.to_parquet(tmp_path / "priced.parquet")
    return table, str(tmp_path / "priced.parquet")


FAST = ("--num_clusters", "3", "--epochs", "6", "--lr", "1e-3", "--embedding_dim", "64")


def test_costs_groups_and_the_guard_are_in_the_history_and_on_the_screen(priced_table, run_demo, capsys):
    _, path = priced_table
    history, output = run_demo("--data_path", path, *FAST)
    router, printed = RankRouter.load(output / "best_model.pt"), capsys.readouterr().out
    split, _ = split_battles(load_battles(path)[0], 42)
    costs, rows = history["costs"], split.test.table
    assert costs["models"]["m2"]["price"] == pytest.approx(split.train.table.costs[:, 1].mean())
    assert costs["models"]["m2"]["mean_cost"] == pytest.approx(rows.costs[:, 1].mean())
    assert (costs["rows"], costs["weak"]) == (len(rows), "m2")
    first = costs["curve"][0]
    assert (first["cost_weight"], first["mean_score"]) == (0, pytest.approx(history["test_metrics"]["mean_score"]))
    assert costs["curve"][-1]["mean_score"] == pytest.approx(np.nanmean(rows.scores[:, 1]))
    for row in (history["test_metrics"], *history["baselines"].values()):
        assert {"aiq", "apgr", "cpt_20", "cpt_50", "cpt_80", "perf_gain", "cost_save", "optimal_cost"} <= row.keys()
    assert history["baselines"]["random"]["difference_intervals"]["aiq"][0] > 0
    # The kind of prompt says which model is best: the router finds it, and leaves the best single model for it.
    shares, oracle = (each["choice_shares"] for each in (history["score_table"], history["score_table"]["oracle"]))
    assert sum(share["share"] for share in shares.values()) == pytest.approx(1)
    assert all(abs(shares[name]["share"] - oracle[name]["share"]) < 0.25 for name in shares)
    guard = history["guard"]
    assert (guard["fallback"], guard["confidence"]) == (router.metadata.best_single_model, router.metadata.confidence)
    assert guard["intervals"]["difference"][0] > 0.05
    groups = history["score_table"]["groups"]
    assert groups.keys() == {"solve", "write", "sing"}
    assert history["test_metrics"]["macro_score"] == pytest.approx(np.mean(list(groups.values())))
    for line in (
        "macro    mean over 3 groups",
        "chosen   m",
        "cost     on ",
        f"guard    stays with {guard['fallback']}",
    ):
        assert line in printed
    (run,), *_ = read_runs([str(output)])
    assert run.curves["RankRouter"][0]["mean_cost"] == first["mean_cost"]
    report.main([str(output), "--plots", str(output / "pictures")])
    drawn = {path.name.split("-")[0] for path in (output / "pictures").iterdir()}
    assert {"cost", "choices"} <= drawn
    assert f"{history['test_metrics']['aiq']:.4f} [" in capsys.readouterr().out


def test_prices_of_a_file_and_tasks_that_training_never_saw(priced_table, run_demo, fails, demo_dir, tmp_path):
    _, path = priced_table
    prices = tmp_path / "prices.csv"
    prices.write_text("model,price_per_million_tokens\nm1,1\nm2,2\nm3,4\nanother,1\n")
    flags = ("--prices", str(prices), "--tokens_per_query", "500", "--split_by", "task", "--test_groups", "sing")
    history, _ = run_demo("--data_path", path, *FAST, *flags)
    assert history["data"]["groups"] == {"test": ["sing"], "train": ["solve", "write"], "left_out": 0}
    assert history["score_table"]["groups"].keys() == {"sing"}
    assert {name: model["price"] for name, model in history["costs"]["models"].items()} == pytest.approx(
        {"m1": 0.0005, "m2": 0.001, "m3": 0.002}
    )
    assert "macro_score" not in history["test_metrics"]
    same = ("--demo", "--demo_dir", str(demo_dir), "--output_dir", str(tmp_path / "out"), "--data_path", path)
    assert "needs --tokens_per_query" in fails(*same, "--prices", str(prices))
    prices.write_text("model,price_per_query\nm1,1\nm3,4\n")
    assert "has no price of m2; expected one of each of m1, m2, m3" in fails(*same, "--prices", str(prices))
    battles = ("--demo", "--demo_dir", str(demo_dir), "--output_dir", str(tmp_path / "out"))
    assert "the data are battles" in fails(*battles, "--prices", str(prices))
    assert "--test_groups needs --split_by task" in fails(*same, "--test_groups", "sing")
    assert "no group is named dance; found sing, solve, write" in fails(
        *same, "--split_by", "task", "--test_groups", "dance"
    )


def test_costs_that_cannot_be_evaluated_are_said_to_be(priced_table, run_demo, tmp_path, capsys):
    table, _ = priced_table
    table.drop(columns="m3|total_cost").to_parquet(tmp_path / "without.parquet")
    history, output = run_demo("--data_path", str(tmp_path / "without.parquet"), *FAST, "--epochs", "1")
    assert history["costs"] is None
    assert "cost     is not evaluated" in capsys.readouterr().out
    (run,), *_ = read_runs([str(output)])
    assert run.curves == run.priced_models == {}


def test_shuffled_rows_of_a_score_table_close_no_gap(run_demo, table_run):
    flags = ("--num_clusters", "3", "--epochs", "3", "--embedding_dim", "64", "--shuffle_outcomes")
    history, _ = run_demo("--data_path", str(table_run[2]), *flags)
    assert history["test_intervals"]["gap_closed"][0] < 0.05
    for name in ("best_single", "bradley_terry"):
        low, high = history["baselines"][name]["difference_intervals"]["mean_score"]
        assert low <= 0 <= high


def test_the_gap_is_undefined_where_the_best_single_model_is_as_good_as_the_oracle(run_demo, tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"prompt": [f"query {i}" for i in range(120)], "good": 1.0, "bad": rng.random(120) / 2})
    table["best"] = 2.0  # left out
    table.to_parquet(tmp_path / "scores.parquet")
    flags = ("--score_columns", "good, bad", "--num_clusters", "2", "--epochs", "1", "--embedding_dim", "64")
    history, output = run_demo("--data_path", str(tmp_path / "scores.parquet"), *flags)
    assert history["data"]["battles"] == 120
    assert RankRouter.load(output / "best_model.pt").model_names == ["bad", "good"]
    assert history["test_metrics"]["gap_closed"] is history["test_intervals"]["gap_closed"] is None
    assert history["baselines"]["random"]["difference"]["gap_closed"] is None
    assert history["score_table"]["oracle"]["mean_score"] == history["score_table"]["best_single"]["mean_score"] == 1
    (run,), *_ = read_runs([str(output)])
    assert run.test["gap_closed"] is None


def test_the_score_table_is_printed_and_also_without_baselines(demo_dir, table_run, tmp_path, capsys):
    _, _, path = table_run
    flags = ["--demo", "--demo_dir", str(demo_dir), "--data_path", str(path), "--output_dir", str(tmp_path)]
    flags += ["--num_clusters", "3", "--epochs", "1", "--embedding_dim", "64", "--dtype", "float32"]
    labels = ["RankRouter", "random", "best single model", "Bradley-Terry", "per-cluster BT", "neighbors", "oracle"]
    for more, expected in (([], labels), (["--baselines", "none"], [labels[0], labels[2], labels[-1]])):
        train.main(flags + more)
        printed = capsys.readouterr().out
        history = json.loads((tmp_path / "training_history.json").read_text())
        for row in history["baselines"].values():
            low, high = row["difference_intervals"]["mean_score"]
            assert f"  {row['difference']['mean_score']:+.4f} [{low:+.4f}, {high:+.4f}]  " in printed
        calibration = history["calibration"]
        errors = [each["expected_calibration_error"] for each in (calibration["uncalibrated"], calibration)]
        assert "Expected calibration error {:.4f}, and {:.4f} at the temperature".format(*errors) in printed
        table = printed.split("mean score, 95 %")[1].split("\n\n")[0].splitlines()[1:]
        assert [line[:18].strip() for line in table] == expected


@pytest.fixture
def scores(small_table):
    """The small score table: a query, and the scores of four models."""
    return pd.read_parquet(small_table[1])


@pytest.fixture
def run_table(small_table, tmp_path):
    """Train on a table with the flags of the small one, and some more; returns the history."""
    numbers = itertools.count()

    def run(table, *flags):
        path = tmp_path / f"{next(numbers)}.parquet"
        table.to_parquet(path)
        train.main([*small_table, "--data_path", str(path), "--output_dir", str(tmp_path / "out"), *flags])
        return json.loads((tmp_path / "out" / "training_history.json").read_text())

    return run


def test_pointwise_learns_the_scores_as_labels_scaled_by_the_range_of_training(small_table, scores, run_table):
    split, _ = split_battles(load_battles(small_table[1])[0], 42)
    of_train, of_test = (part.queries[part.unique_queries[0]] for part in (split.train, split.test))
    scores.loc[scores["prompt"] == of_train, NAMES] = 0.5  # no battle, and four labels
    flags = ("--loss_type", "pointwise", "--lr", "3e-3", "--epochs", "5", "--embedding_dim", "32")
    one = run_table(scores, *flags)
    assert one["data"]["label_range"] == [0, 1]
    assert (one["data"]["split"]["train"]["queries"], one["data"]["table_rows"]["train"]) == (193, 192)
    assert one["test_metrics"]["auc"] > 0.9
    assert one["test_metrics"]["gap_closed"] > 0.6  # the kind of query was planted
    scores[NAMES] = (10 * scores[NAMES]).clip(0, 9)
    scores.loc[scores["prompt"] == of_test, NAMES[0]] = 10  # the range is that of training, without test
    ten = run_table(scores, *flags)
    assert ten["data"]["label_range"] == [0, 9]
    scores[NAMES] /= 9
    assert run_table(scores, *flags)["train_losses"] == pytest.approx(ten["train_losses"], rel=1e-5)


def test_each_way_to_learn_from_rows_differs_and_starts_near_the_loss_of_equal_scores(scores, run_table):
    ways = {"": 1.313, "--ties half": 1.313, "--loss_type bce": 0.693, "--loss_type hinge": 1}  # margin 1
    ways |= {"--loss_type pointwise": 0.693, "--batch_size 30": 1.313}
    losses = {flags: run_table(scores, *flags.split())["train_losses"][-1] for flags in ways}
    assert len(set(losses.values())) == len(ways), losses
    for flags, expected in ways.items():
        start = run_table(scores, *flags.split(), "--lr", "1e-12", "--epochs", "1")["train_losses"]
        assert start == pytest.approx([expected], abs=0.03), flags


def test_rows_that_are_split_one_by_one_are_evaluated(scores, run_table):
    history = run_table(pd.concat([scores, scores]), "--split_by", "battle")
    data = history["data"]
    assert data["table_rows"] == {"train": 386, "val": 48, "test": 48, "without_a_difference": 0}
    assert history["score_table"]["rows"] == 48
    assert data["test_queries_in_train"] > 24  # most queries have their other row there


def test_battles_and_a_score_table_train_together(small, small_table, scores, fails, tmp_path):
    (tmp_path / "data").mkdir()
    for path in (small[1], small_table[1]):
        shutil.copy(path, tmp_path / "data")
    flags = [*small_table, "--data_path", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    train.main(flags)
    history = json.loads((tmp_path / "out" / "training_history.json").read_text())
    votes = pd.read_parquet(small[1])["winner"].isin(["model_a", "model_b"]).sum()
    a, b = np.triu_indices(4, 1)
    d = scores[NAMES].to_numpy()[:, a] - scores[NAMES].to_numpy()[:, b]
    data = history["data"]
    assert sum(side["battles"] for side in data["split"].values()) == votes + (np.abs(d) > 0).sum()
    assert data["battles"] == 320 + (~np.isnan(d)).sum()
    assert data["ties_left_out"] == data["ties"] == (320 - votes) + (d == 0).sum()
    assert data["unseen_model_battles"] == 0
    assert history["score_table"]["rows"] == data["table_rows"]["test"] > 0
    assert "data has battles" in fails(*flags, "--loss_type", "pointwise")
    table = pd.read_parquet(small[1])
    table["winner"] = table["winner"].replace({"model_a": "model_b", "model_b": "model_a"})
    table.to_parquet(tmp_path / "data" / Path(small[1]).name)
    train.main(flags)
    swapped = json.loads((tmp_path / "out" / "training_history.json").read_text())
    assert swapped["train_losses"] != history["train_losses"]  # it learns from the votes, too
