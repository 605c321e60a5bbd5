"""A held-out model: nothing of it leaks into training, a few battles help, and each number has a second computation."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import metrics
from data_loader import load_battles, split_battles
from rankrouter import RankRouter
from support.evaluation.baselines import best, bradley_terry, rankings
from support.routing.new_model import battles_of

HELD = "demo-model-j"  # the weakest
FLAGS = (
    "--epochs",
    "5",
    "--embedding_dim",
    "64",
    "--num_clusters",
    "20",
    "--lr",
    "1e-3",
    "--no_cache",
    "--capability_init",
    "win_rate",
)


@pytest.fixture(scope="module")
def held_out(run_demo):
    return run_demo(*FLAGS, "--baselines", "none", "--hold_out_model", HELD)


@pytest.fixture(scope="module")
def flipped(run_demo, demo, tmp_path_factory):
    """The same with the winners of all battles of that model swapped."""
    table = pd.read_parquet(demo / "battles.parquet")
    of_model = (table["model_a"] == HELD) | (table["model_b"] == HELD)
    swapped = table["winner"].replace({"model_a": "model_b", "model_b": "model_a"})
    table["winner"] = table["winner"].where(~of_model, swapped)
    path = tmp_path_factory.mktemp("flipped") / "battles.parquet"
    table.to_parquet(path)
    return run_demo(*FLAGS, "--baselines", "none", "--hold_out_model", HELD, "--data_path", str(path))


@pytest.fixture(scope="module")
def full_split(demo):
    return split_battles(load_battles(str(demo / "battles.parquet"))[0], 42)[0]


def rows(history):
    return {(row["battles"], row["from"]): row for row in history["cold_start"]["rows"]}


def test_nothing_of_the_model_enters_training_and_a_few_battles_help(held_out, flipped):
    (history, output), (other, other_output) = held_out, flipped
    for name in ("train_losses", "val_metrics", "best_epoch", "test_metrics"):
        assert history[name] == other[name]
    router, same = (RankRouter.load(folder / "best_model.pt") for folder in (output, other_output))
    assert HELD not in router.model_names
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in router.state_dict().items())
    aucs = [[rows(run)[count, "battles"]["rank_router"]["auc"] for count in (0, 10, 200)] for run in (history, other)]
    assert aucs[0][0] == pytest.approx(1 - aucs[1][0])  # without its battles, its scores are equal in both runs
    for none, few, many in aucs:
        assert none + 0.03 < few < many
        assert many > 0.53


def test_sizes_and_intervals(held_out, full_split):
    history, _ = held_out
    cold, known = history["cold_start"], [name for name in full_split.test.model_names if name != HELD]
    test, pool = battles_of(full_split.test, HELD, known), battles_of(full_split.train, HELD, known)
    assert (cold["model"], cold["test_battles"], cold["calibration_battles"]) == (HELD, len(test), len(pool))
    assert cold["test_queries"] == len(np.unique(test.query_idx))
    assert history["data"]["training_battles_held_out"] == len(pool)
    assert list(rows(history)) == [*((count, "battles") for count in (0, 10, 50, 200)), (len(pool), "training")]
    for row in cold["rows"]:
        for metric in ("auc", "accuracy", "log_loss_calibrated"):
            ours, theirs, difference = (row[name] for name in ("rank_router", "bradley_terry", "difference"))
            assert difference[metric] == pytest.approx(ours[metric] - theirs[metric])
            for part in (ours, theirs, difference):
                low, high = part["intervals"][metric]
                assert low < part[metric] < high


def test_the_ceiling_is_a_run_with_the_model(held_out, run_demo, full_split, demo):
    history, _ = held_out
    _, output = run_demo(*FLAGS, "--baselines", "none")
    router = RankRouter.load(output / "best_model.pt")
    test = battles_of(full_split.test, HELD, full_split.test.model_names)
    d = test.margins(router.scores_of([test.queries[i] for i in test.unique_queries]))
    (ceiling,) = (row for row in history["cold_start"]["rows"] if row["from"] == "training")
    assert ceiling["rank_router"]["auc"] == pytest.approx(metrics.auc(d, test.outcome), abs=1e-3)
    loss = metrics.log_loss(d, test.outcome, temperature=router.temperature)
    assert ceiling["rank_router"]["log_loss_calibrated"] == pytest.approx(loss, abs=1e-3)
    assert ceiling["rank_router"]["accuracy"] == pytest.approx(metrics.accuracy(d, test.outcome), abs=0.01)


def test_bradley_terry_is_given_the_same_battles(held_out, full_split):
    history, _ = held_out
    train, test = full_split.train, battles_of(full_split.test, HELD, full_split.test.model_names)
    identity = np.eye(12)

    def design(battles):
        return identity[battles.model_a_idx] - identity[battles.model_b_idx]

    def auc(battles):
        model = LogisticRegression(fit_intercept=False, C=10).fit(design(battles), battles.outcome)
        return metrics.auc(design(test) @ model.coef_[0], test.outcome)

    number = train.model_names.index(HELD)
    without = train.select((train.model_a_idx != number) & (train.model_b_idx != number))
    found = rows(history)
    assert found[0, "battles"]["bradley_terry"]["auc"] == pytest.approx(auc(without), abs=0.01)
    few = found[200, "battles"]["bradley_terry"]["auc"]
    assert found[0, "battles"]["bradley_terry"]["auc"] + 0.1 < few
    assert few == pytest.approx(auc(train), abs=0.02)  # one strength needs few battles
    last = list(found.values())[-1]
    assert last["bradley_terry"]["auc"] == pytest.approx(auc(train), abs=0.01)


def test_bradley_terry_is_evaluated_at_its_temperature_with_intervals_over_queries(held_out, full_split, demo):
    history, _ = held_out
    train, test = full_split.train, battles_of(full_split.test, HELD, full_split.test.model_names)
    weights = metrics.bootstrap_weights(test.query_idx, 42)
    number = train.model_names.index(HELD)
    split = split_battles(load_battles(str(demo / "battles.parquet"))[0], 42, hold_out=HELD)[0]
    none, *_, every = rows(history).values()
    for row, side in ((none, split), (every, full_split)):
        chosen, strengths, _ = best(rankings(side), side)
        temperature = metrics.fit_temperature(side.val.margins(strengths), side.val.outcome)
        if side is split:  # for all models, of which one has no battle
            without = train.select((train.model_a_idx != number) & (train.model_b_idx != number))
            strengths = bradley_terry(without, **chosen)
        d, columns = test.margins(strengths), (test.outcome, test.model_a_idx, test.model_b_idx)
        loss = metrics.log_loss(d, test.outcome, temperature=temperature)
        assert row["bradley_terry"]["log_loss_calibrated"] == pytest.approx(loss, abs=1e-9)
        samples = metrics.evaluate_resamples(d, *columns, weights, temperature=temperature)
        assert row["bradley_terry"]["intervals"]["auc"] == pytest.approx(metrics.interval(samples["auc"]), abs=1e-9)


def test_shuffled_outcomes_of_the_model_give_an_auc_of_one_half(run_demo, demo, tmp_path):
    table = pd.read_parquet(demo / "battles.parquet")
    of_model = (table["model_a"] == HELD) | (table["model_b"] == HELD)
    table.loc[of_model, "winner"] = np.random.default_rng(0).choice(["model_a", "model_b"], of_model.sum())
    table.to_parquet(tmp_path / "shuffled.parquet")
    source = ("--data_path", str(tmp_path / "shuffled.parquet"))
    history, _ = run_demo(*FLAGS, "--baselines", "none", "--hold_out_model", HELD, *source)
    for row in history["cold_start"]["rows"]:
        for name in ("rank_router", "bradley_terry"):
            assert row[name]["auc"] == pytest.approx(0.5, abs=0.1)


def test_a_profile_from_a_file_needs_no_battle(run_demo, demo, tmp_path):
    truth = json.loads((demo / "truth.json").read_text())
    skills = np.array(truth["skills"]).T  # (M, topics): the scores of an exact benchmark of each topic
    table = pd.DataFrame(skills, columns=[f"topic {i}" for i in range(skills.shape[1])])
    table.insert(0, "model", truth["models"])
    table.to_csv(tmp_path / "profiles.csv", index=False)
    flags = ("--capability_file", str(tmp_path / "profiles.csv"), "--hold_out_model", HELD, "--baselines", "none")
    history, output = run_demo("--epochs", "6", "--lr", "1e-3", "--id_dropout", "0.3", *flags)
    found = rows(history)
    assert list(found)[:2] == [(0, "battles"), (0, "profile")]
    by_profile, mean = (found[0, source]["rank_router"]["auc"] for source in ("profile", "battles"))
    assert by_profile > mean + 0.05
    assert by_profile > 0.75
    statistics = RankRouter.load(output / "best_model.pt").metadata.profiles
    assert statistics["columns"] == [f"topic {i}" for i in range(8)]
    known = np.array([row for name, row in zip(truth["models"], skills, strict=True) if name != HELD])
    np.testing.assert_allclose(statistics["mean"], known.mean(0))
    np.testing.assert_allclose(statistics["scale"], known.std(0))
