"""A held-out model: nothing of it leaks into training, a few battles help, and each number has a second computation."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import same
from sklearn.linear_model import LogisticRegression

import metrics
import support.evaluation.cold_start
import train
from data_loader import load_battles, split_battles
from rankrouter import RankRouter
from support.evaluation.baselines import best, bradley_terry, rankings
from support.evaluation.cold_start import cold_start
from support.routing.new_model import battles_of

HELD = "demo-model-j"  # the weakest
HOLD_OUT = ("--hold_out_model", HELD)
FLAGS = "--epochs 5 --embedding_dim 64 --num_clusters 20 --batch_size 128 --lr 2e-3 --baselines none"
WIN_RATE = ("--capability_init", "win_rate")


@pytest.fixture(scope="module")
def held_out(run_demo):
    return run_demo(*FLAGS.split(), *WIN_RATE, *HOLD_OUT)


@pytest.fixture(scope="module")
def with_all_models(run_demo):
    """The router of a run with the same flags that holds no model out."""
    return RankRouter.load(run_demo(*FLAGS.split(), *WIN_RATE)[1] / "best_model.pt")


@pytest.fixture(scope="module")
def full_split(demo):
    return split_battles(load_battles(str(demo / "battles.parquet"))[0], 42)[0]


def rows(history):
    return {(row["battles"], row["from"]): row for row in history["cold_start"]["rows"]}


def aucs(table, name="rank_router"):
    """AUC given no, 10, 50 and 200 battles of the model."""
    return [row[name]["auc"] for row in table if row["from"] == "battles"]


def swap_winners(source, folder):
    """Write battles in which the winners of the held-out model's battles are swapped; returns the path."""
    table = pd.read_parquet(source)
    of_model = (table["model_a"] == HELD) | (table["model_b"] == HELD)
    swapped = table["winner"].replace({"model_a": "model_b", "model_b": "model_a"})
    table["winner"] = table["winner"].where(~of_model, swapped)
    table.to_parquet(folder / "battles.parquet")
    return str(folder / "battles.parquet")


@pytest.fixture(scope="module")
def both(held_out, with_all_models, full_split):
    """The routers without and with the model, each with standardized embeddings and clusters of all queries."""
    routers = RankRouter.load(held_out[1] / "best_model.pt"), with_all_models
    return [(router, *router.embed(full_split.train.queries)) for router in routers]


def swap_scores(source, folder):
    """Write a score table in which the scores of the model in its second column are swapped; returns the path."""
    table = pd.read_parquet(source)
    table.iloc[:, 1] = 1 - table.iloc[:, 1]
    table.to_parquet(folder / "scores.parquet")
    return str(folder / "scores.parquet")


@pytest.mark.parametrize("data", ["small", "small_table"])
def test_nothing_of_the_model_enters_training(request, tmp_path, data):
    flags = request.getfixturevalue(data)
    name, swap = (HELD, swap_winners) if data == "small" else ("demo-model-a", swap_scores)
    found = []
    for number, path in enumerate((flags[1], swap(flags[1], tmp_path))):
        output = tmp_path / str(number)
        train.main([*flags, "--hold_out_model", name, "--data_path", path, "--output_dir", str(output)])
        history = json.loads((output / "training_history.json").read_text())
        router = RankRouter.load(output / "best_model.pt")
        assert name not in router.model_names
        parts = ("train_losses", "val_metrics", "best_epoch", "test_metrics", "clusters")
        found.append((router.state_dict(), [history[part] for part in parts]))
        split = split_battles(load_battles(path)[0], 42)[0]
        pool, test = (len(battles_of(part, name, part.model_names)) for part in (split.train, split.test))
        assert history["data"]["training_battles_held_out"] == pool > 0
        assert history["cold_start"]["test_battles"] == test > 0
    assert same(*found)


def test_a_few_battles_help_whichever_their_outcomes(held_out, both, demo, tmp_path):
    battles, _ = load_battles(swap_winners(demo / "battles.parquet", tmp_path))
    splits = (split_battles(battles, 42, hold_out=name)[0] for name in (HELD, None))
    swapped_none, *swapped = aucs(cold_start(HELD, *splits, *both, None, 42)["rows"])
    none, *given = aucs(held_out[0]["cold_start"]["rows"])
    assert none == pytest.approx(1 - swapped_none)  # without its battles, its scores are equal in both
    for start, (few, _, many) in ((none, given), (swapped_none, swapped)):
        assert start + 0.03 < few < many
        assert many > 0.53


def test_no_outcome_of_a_test_battle_is_known(both, full_split, demo, monkeypatch):
    monkeypatch.setattr(support.evaluation.cold_start, "DRAWS", 3)
    split, _ = split_battles(load_battles(str(demo / "battles.parquet"))[0], 42, hold_out=HELD)
    swapped = replace(full_split, test=replace(full_split.test, outcome=1 - full_split.test.outcome))
    tables = [cold_start(HELD, split, full, *both, None, 42)["rows"] for full in (full_split, swapped)]
    for name in ("rank_router", "bradley_terry"):
        given, other = ([row[name]["auc"] for row in table] for table in tables)
        assert given == pytest.approx([1 - auc for auc in other], abs=1e-9)


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


def test_the_ceiling_is_a_run_with_the_model(held_out, with_all_models, full_split):
    history, _ = held_out
    router = with_all_models
    test = battles_of(full_split.test, HELD, full_split.test.model_names)
    (pairs,) = test.chunks()
    d = pairs.margins(router.scores_of([test.queries[i] for i in test.unique_queries]))
    (ceiling,) = (row for row in history["cold_start"]["rows"] if row["from"] == "training")
    assert ceiling["rank_router"]["auc"] == pytest.approx(metrics.auc(d, test.outcome), abs=1e-3)
    loss = metrics.log_loss(d, test.outcome, temperature=router.temperature)
    assert ceiling["rank_router"]["log_loss_calibrated"] == pytest.approx(loss, abs=1e-3)
    assert ceiling["rank_router"]["accuracy"] == pytest.approx(metrics.is_correct(d, test.outcome).mean(), abs=0.01)


def test_bradley_terry_is_given_the_same_battles(held_out, full_split):
    history, _ = held_out
    known, test = full_split.train, battles_of(full_split.test, HELD, full_split.test.model_names)
    identity = np.eye(12)

    def design(battles):
        return identity[battles.model_a_idx] - identity[battles.model_b_idx]

    def auc(battles):
        model = LogisticRegression(fit_intercept=False, C=10).fit(design(battles), battles.outcome)
        return metrics.auc(design(test) @ model.coef_[0], test.outcome)

    number = known.model_names.index(HELD)
    without = known.select((known.model_a_idx != number) & (known.model_b_idx != number), None)
    found = rows(history)
    assert found[0, "battles"]["bradley_terry"]["auc"] == pytest.approx(auc(without), abs=0.01)
    few = found[200, "battles"]["bradley_terry"]["auc"]
    assert found[0, "battles"]["bradley_terry"]["auc"] + 0.1 < few
    assert few == pytest.approx(auc(known), abs=0.02)  # one strength needs few battles
    last = list(found.values())[-1]
    assert last["bradley_terry"]["auc"] == pytest.approx(auc(known), abs=0.01)


def test_bradley_terry_is_evaluated_at_its_temperature_with_intervals_over_queries(held_out, full_split, demo):
    history, _ = held_out
    known, test = full_split.train, battles_of(full_split.test, HELD, full_split.test.model_names)
    (pairs,), weights = test.chunks(), metrics.bootstrap_weights(len(test.unique_queries), 42)
    number = known.model_names.index(HELD)
    split = split_battles(load_battles(str(demo / "battles.parquet"))[0], 42, hold_out=HELD)[0]
    none, *_, every = rows(history).values()
    for row, side in ((none, split), (every, full_split)):
        chosen, strengths, _ = best(rankings(side), side)
        temperature = metrics.fit_temperature(side.val_pairs.margins(strengths), side.val.outcome)
        if side is split:  # for all models, of which one has no battle
            without = known.select((known.model_a_idx != number) & (known.model_b_idx != number), None)
            strengths = bradley_terry(without.win_counts(), 12, **chosen)
        d = pairs.margins(strengths)
        loss = metrics.log_loss(d, test.outcome, temperature=temperature)
        assert row["bradley_terry"]["log_loss_calibrated"] == pytest.approx(loss, abs=1e-9)
        totals = metrics.Totals(weights, 12, temperature=temperature, bins=metrics.lead_bins(d))
        totals.add(*pairs, d)
        expected = metrics.interval(totals.metrics()["auc"])
        assert row["bradley_terry"]["intervals"]["auc"] == pytest.approx(expected, abs=1e-9)


def test_a_profile_from_a_file_needs_no_battle(run_demo, demo, tmp_path):
    truth = json.loads((demo / "truth.json").read_text())
    skills = np.array(truth["skills"]).T  # (M, topics): the scores of an exact benchmark of each topic
    table = pd.DataFrame(skills, columns=[f"topic {i}" for i in range(skills.shape[1])])
    table.insert(0, "model", truth["models"])
    table.to_csv(tmp_path / "profiles.csv", index=False)
    flags = ("--capability_file", str(tmp_path / "profiles.csv"), "--id_dropout", "0.3")
    history, output = run_demo(*FLAGS.split(), *flags, *HOLD_OUT)
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
