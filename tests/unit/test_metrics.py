"""Metrics against hand-worked numbers, scikit-learn and naive loops."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from conftest import mixed_battles, written_out
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

import metrics
import support.data.battles


def random_battles(seed: int, size: int = 400, models: int = 6):
    """d with zeros and repeated values, outcome, model a, model b."""
    rng = np.random.default_rng(seed)
    a = rng.integers(models, size=size)
    b = (a + rng.integers(1, models, size=size)) % models
    d = rng.integers(-3, 4, size=size) / 2
    return d, (rng.random(size) < 1 / (1 + np.exp(-d))).astype(float), a, b


battles = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=30).map(
    lambda rows: (np.array([float(d) for d, _ in rows]), np.array([float(y) for _, y in rows]))
)


def samples_of(weights, row, a, b, outcome, d, **options):
    """The metrics of weighted samples, from battles that are added in two lists."""
    totals = metrics.Totals(weights, 1 + max(a.max(), b.max()), bins=metrics.lead_bins(d), **options)
    for some in np.array_split(np.arange(len(d)), 2):
        totals.add(row[some], a[some], b[some], outcome[some], d[some])
    return totals.metrics()


def reliability(d, outcome, *args, **options):
    """The reliability of battles that are added in two lists."""
    total = metrics.Reliability(*args, **options)
    for some in np.array_split(np.arange(len(d)), 2):
        total.add(d[some], outcome[some])
    return total.as_dict()


def test_accuracy_by_hand():
    d, outcome = np.array([2.0, -1.0, 0.0, 3.0]), np.array([1.0, 0.0, 1.0, 0.0])
    assert metrics.is_correct(d, outcome).tolist() == [1, 1, 0.5, 0]
    assert metrics.evaluate(d, outcome, np.zeros(4, int), np.ones(4, int))["accuracy"] == 2.5 / 4


def test_auc_by_hand():
    # Winners lead by 2, 1 and -1: the positives are {2, 1, -1}, the negatives {-2, -1, 1}. Of the nine pairs
    # (2: 3 wins; 1: 2 wins and a tie; -1: 1 win and a tie) 6 are won and 2 tied: 7 / 9.
    assert metrics.auc(np.array([2.0, -1.0, -1.0]), np.array([1.0, 0.0, 1.0])) == pytest.approx(7 / 9)
    # It is defined also where a always won.
    assert metrics.auc(np.array([2.0, 1.0, -1.0]), np.ones(3)) == pytest.approx(7 / 9)
    assert metrics.auc(np.array([1.0, 2.0]), np.ones(2)) == 1
    assert metrics.auc(np.array([-1.0, -2.0]), np.ones(2)) == 0


@given(battles)
def test_auc_equals_a_naive_count(rows):
    d, outcome = rows
    lead = np.where(outcome == 1, d, -d)
    wins = [(x > y) + (x == y) / 2 for x in lead for y in -lead]
    assert metrics.auc(d, outcome) == pytest.approx(sum(wins) / len(wins))


@given(battles, st.integers(0, 2**30 - 1))
def test_metrics_do_not_depend_on_which_model_is_a(rows, flips):
    d, outcome = rows
    a, b = np.arange(len(d)) % 3, np.arange(len(d)) % 3 + 1
    flip = np.array([flips >> i & 1 for i in range(len(d))], bool)
    swapped = np.where(flip, -d, d), np.where(flip, 1 - outcome, outcome), np.where(flip, b, a), np.where(flip, a, b)
    assert metrics.evaluate(d, outcome, a, b, 1.0) == pytest.approx(metrics.evaluate(*swapped, 1.0))
    assert reliability(d, outcome, 1.0) == reliability(*swapped[:2], 1.0)


def test_weighted_metrics_equal_scikit_learn_with_sample_weights_and_ties():
    for seed, without_ties in ((0, True), (1, False), (2, False)):
        d, outcome, a, b = random_battles(seed)
        d = d + 0.25 if without_ties else d
        weights = np.random.default_rng(seed).integers(4, size=(5, 400)).astype(np.uint8)
        weights[0] = 1
        won = np.tile(np.where(outcome == 1, a, b), 2)  # (2N,): a battle with d = 0 is chosen once for each side
        chosen = np.r_[np.where(d >= 0, a, b), np.where(d > 0, a, b)]
        got = samples_of(weights, np.arange(400), a, b, outcome, d)
        for sample, weight in enumerate(weights):
            twice = np.tile(weight, 2)
            auc = roc_auc_score(np.r_[outcome, 1 - outcome], np.r_[d, -d], sample_weight=twice)
            macro = precision_recall_fscore_support(won, chosen, sample_weight=twice, average="macro", zero_division=0)
            accuracy = np.average(won == chosen, weights=twice)
            names = ("auc", "accuracy", "precision", "recall", "f1")
            expected = dict(zip(names, (auc, accuracy, *macro[:3]), strict=True))
            assert {name: got[name][sample] for name in names} == pytest.approx(expected, abs=1e-12), (seed, sample)
        unweighted = metrics.evaluate(d, outcome, a, b)
        assert unweighted == pytest.approx({name: got[name][0] for name in unweighted}, abs=1e-12), seed


def test_a_score_that_is_not_finite_has_no_auc():
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="expected finite differences"):
            metrics.auc(np.array([1.0, bad]), np.ones(2))


def test_precision_is_not_one_by_construction():
    # Model 0 is always chosen and wins one of three; models 1 and 2 win and are never chosen.
    d, outcome = np.ones(3), np.array([1.0, 0.0, 0.0])
    got = metrics.evaluate(d, outcome, np.zeros(3, int), np.array([1, 1, 2]))
    assert got["precision"] == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert got["recall"] == pytest.approx((1 + 0 + 0) / 3)
    assert got["f1"] == pytest.approx((2 * (1 / 3) / (4 / 3)) / 3)
    # A model that is chosen and never wins is a class, too: of 0 and 1, the second wins twice and is chosen once.
    got = metrics.evaluate(np.array([1.0, -1.0]), np.zeros(2), np.zeros(2, int), np.ones(2, int))
    expected = {"precision": (0 + 1) / 2, "recall": (0 + 1 / 2) / 2, "f1": (0 + 2 / 3) / 2}
    assert {name: got[name] for name in expected} == pytest.approx(expected)


def test_win_probability_by_hand():
    # margin 0: sigmoid(ln 3) = 3/4. margin ln 2, d = ln 2: s(ln 4) = 4/5, s(0) = 1/2, so p = 0.8 / 1.3.
    assert np.exp(metrics.log_win_probability(np.log([3.0]))) == pytest.approx([0.75])
    assert np.exp(metrics.log_win_probability(np.log([2.0]), math.log(2))) == pytest.approx([8 / 13])
    assert np.exp(metrics.log_win_probability(np.log([9.0]), temperature=2)) == pytest.approx([0.75])
    assert metrics.log_win_probability(np.array([-2000.0, 2000.0]), 1.0) == pytest.approx([-1999.0, 0], abs=1)


def test_the_link_is_the_minimum_of_bpr():
    # Where a wins with probability p, the d that minimizes BPR's expected loss must be read as p.
    d = np.linspace(-12, 12, 240001)
    for margin, p in itertools.product((0.0, 0.5, 2.0), (0.2, 0.5, 0.9)):
        expected = p * np.logaddexp(0, margin - d) + (1 - p) * np.logaddexp(0, margin + d)
        best = d[[expected.argmin()]]
        assert np.exp(metrics.log_win_probability(best, margin)) == pytest.approx([p], abs=1e-3), (margin, p)


def test_equal_scores_give_an_auc_of_one_half_and_a_log_loss_of_ln_2():
    d, outcome = np.zeros(10), np.r_[np.ones(7), np.zeros(3)]
    got = metrics.evaluate(d, outcome, np.zeros(10, int), np.ones(10, int), margin=1.0)
    assert (got["accuracy"], got["auc"]) == (0.5, 0.5)
    assert got["log_loss"] == pytest.approx(math.log(2))


def test_metrics_of_no_battles_are_undefined():
    empty = np.empty(0)
    assert set(metrics.evaluate(empty, empty, empty, empty).values()) == {None}


def test_reliability_by_hand():
    # p of the chosen model: 0.75 twice (d = +-ln 3), 0.9 twice (ln 9), 0.5 once (d = 0, which counts one half).
    d = np.log([3.0, 1 / 3, 9.0, 1 / 9, 1.0])
    outcome = np.array([1.0, 1.0, 1.0, 0.0, 1.0])
    error, bins = reliability(d, outcome, num_bins=5).values()
    shown = [(part["low"], part["high"], part["battles"], part["probability"], part["won"]) for part in bins]
    assert shown == [
        (0.5, 0.6, 1, pytest.approx(0.5), 0.5),
        (0.7, 0.8, 2, pytest.approx(0.75), 0.5),
        (0.9, 1.0, 2, pytest.approx(0.9), 1.0),
    ]
    assert error == pytest.approx((0 + 2 * 0.25 + 2 * 0.1) / 5)
    warm = reliability(2 * d, outcome, temperature=2.0, num_bins=5)
    assert warm["expected_calibration_error"] == pytest.approx(error)
    certain = reliability(np.array([80.0]), np.ones(1))["bins"]
    assert (certain[0]["high"], certain[0]["won"]) == (1.0, 1.0)


def test_the_temperature_of_labels_is_recovered_where_some_are_missing():
    scores = np.random.default_rng(0).normal(0, 3, (200, 4))
    labels = np.where(scores > 5, np.nan, 1 / (1 + np.exp(-scores / 2)))
    assert metrics.fit_label_temperature(scores, labels) == pytest.approx(2, rel=1e-3)


def test_the_calibration_error_is_small_only_for_calibrated_scores_and_the_temperature_is_recovered():
    rng = np.random.default_rng(1)
    d = rng.normal(0, 2, 40000)
    for margin in (0.0, 1.0):
        outcome = (rng.random(len(d)) < np.exp(metrics.log_win_probability(d, margin))).astype(float)
        options = ((d, 1.0), (3 * d, 1.0), (3 * d, 3.0))
        errors = [reliability(x, outcome, margin, t)["expected_calibration_error"] for x, t in options]
        assert errors[0] < 0.01 < 0.05 < errors[1], margin
        assert errors[2] < 0.01, margin
        if margin == 0:  # as a temperature is fitted
            assert metrics.fit_temperature(3 * d, outcome) == pytest.approx(3, rel=0.05)


def test_log_odds_of_beating_another_at_random_by_hand():
    # Strengths 0, 0, ln 3: the last beats each other with 3/4; the first beats the second with 1/2, the last with 1/4.
    got = metrics.log_odds(np.array([0.0, 0.0, np.log(3)]))
    assert got == pytest.approx([np.log((0.75 / 2) / (1.25 / 2))] * 2 + [np.log(3)])
    assert metrics.log_odds(np.array([0.0, np.log(9)]), temperature=2) == pytest.approx([-np.log(3), np.log(3)])
    far_apart = metrics.log_odds(np.array([0.0, 50.0, 900.0]))
    assert far_apart == pytest.approx([-50 - np.log(2), 0, 850 + np.log(2)], abs=1e-9)


TABLE = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, np.nan], [0.3, 0.3, 0.1]])


def test_routing_by_hand():
    scores = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 9.0], [0.0, 5.0, 5.0]])
    values, is_best = metrics.route(scores, TABLE)
    # Row 1: model 2. Row 2: model 2 is unavailable, so model 1. Row 3: models 1 and 2, of which 1 is best.
    assert values == pytest.approx([0.5, 0.8, 0.2])
    assert is_best == pytest.approx([0, 1, 0.5])


def test_routing_with_equal_scores_and_with_one_ranking():
    values, is_best = metrics.route(np.zeros((1, 3)), TABLE)
    assert values == pytest.approx([0.5, 0.5, 0.7 / 3])
    assert is_best == pytest.approx([1 / 3, 1 / 2, 2 / 3])
    values, is_best = metrics.route(np.array([[1.0, 2.0, 3.0]]), TABLE)
    assert values == pytest.approx([0.5, 0.8, 0.1])
    assert is_best == pytest.approx([0, 1, 0])


def test_the_gap_closed():
    assert metrics.gap_closed(0.7, 0.6, 0.8) == pytest.approx(0.5)
    assert metrics.gap_closed(0.5, 0.6, 0.8) == pytest.approx(-0.5)
    got = metrics.gap_closed(np.array([0.7, 0.6]), np.array([0.6, 0.6]), np.array([0.8, 0.6]))
    assert got[0] == pytest.approx(0.5)
    assert np.isnan(got[1])
    assert np.isnan(metrics.gap_closed(0.6, 0.6, 0.6))
    assert metrics.interval(np.array([np.nan, 1.0, 1.0])) == [1.0, 1.0]
    assert metrics.interval(np.array([np.nan])) is None


def test_the_interval_across_seeds_by_hand():
    # Mean 2, s 1, t of 2 degrees of freedom 4.302653; sqrt(1/3 + 1/8).
    half = 4.302653 * math.sqrt(1 / 3 + 1 / 8)
    assert metrics.seeds_interval(np.array([1.0, 2.0, 3.0]), 1 / 8) == pytest.approx([2 - half, 2 + half], rel=1e-6)


def test_the_bootstrap_draws_as_many_queries_as_there_are():
    weights = metrics.bootstrap_weights(3, seed=1, resamples=500)
    assert weights.shape == (500, 3)
    assert (weights.sum(1) == 3).all()
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.1)
    np.testing.assert_allclose(weights.var(0), 2 / 3, atol=0.1)  # of the multinomial distribution
    assert (metrics.bootstrap_weights(3, seed=1, resamples=500) == weights).all()
    assert (metrics.bootstrap_weights(3, seed=2, resamples=500) != weights).any()


def test_a_resample_equals_its_battles_repeated():
    (d, outcome, a, b), row = random_battles(5), np.arange(400) // 3
    weights = metrics.bootstrap_weights(134, seed=0, resamples=7)
    for margin in (0.0, 1.0):
        got = samples_of(weights, row, a, b, outcome, d, margin=margin, temperature=2.0)
        for sample, weight in enumerate(weights):
            i = np.repeat(np.arange(400), weight[row])
            expected = metrics.evaluate(d[i], outcome[i], a[i], b[i], margin)
            expected["log_loss_calibrated"] = metrics.log_loss(d[i], outcome[i], temperature=2.0)
            assert {name: values[sample] for name, values in got.items()} == pytest.approx(expected, abs=1e-12), margin


def naive_metrics(d, outcome, a, b, temperature):
    """All metrics of decisive battles, battle by battle."""
    lead = np.where(outcome == 1, d, -d)
    hits, wins, chosen = Counter(), Counter(), Counter()
    for d_i, won, lost in zip(lead, np.where(outcome == 1, a, b), np.where(outcome == 1, b, a), strict=True):
        share = (d_i > 0) + (d_i == 0) / 2  # of the battle, in which the winner is chosen
        hits[won] += share
        wins[won] += 1
        chosen[won] += share
        chosen[lost] += 1 - share
    classes = {model for model in wins.keys() | chosen.keys() if wins[model] + chosen[model] > 0}
    return {
        "accuracy": sum(hits.values()) / len(d),
        "precision": sum(hits[model] / chosen[model] for model in classes if chosen[model]) / len(classes),
        "recall": sum(hits[model] / wins[model] for model in classes if wins[model]) / len(classes),
        "f1": sum(2 * hits[model] / (wins[model] + chosen[model]) for model in classes) / len(classes),
        "auc": roc_auc_score(np.r_[outcome, 1 - outcome], np.r_[d, -d]),
        "log_loss": np.log1p(np.exp(-lead)).mean(),
        "log_loss_calibrated": np.log1p(np.exp(-lead / temperature)).mean(),
    }


def test_the_metrics_of_a_score_table_in_chunks_are_those_of_its_pairs_written_out(monkeypatch):
    monkeypatch.setattr(support.data.battles, "PAIRS_AT_ONCE", 100)
    battles = mixed_battles(ties=False)
    pairs, queries = written_out(battles), len(battles.unique_queries)
    scores = np.random.default_rng(3).normal(size=(queries, 7))
    scores[:, :4] = scores[:, :4].round()  # equal ones, too
    (listed,) = pairs.chunks()
    row, a, b, outcome = listed
    d = listed.margins(scores)
    weights = metrics.bootstrap_weights(queries, seed=0, resamples=20)
    weights[0] = 1
    for bins in (4096, 64):
        monkeypatch.setattr(metrics, "LEAD_BINS", bins)
        totals, leads = metrics.Totals(weights, 7, temperature=2.0, bins=metrics.lead_bins(d)), []
        for chunk in battles.chunks():
            totals.add(*chunk, chunk.margins(scores))
            leads.append(np.where(chunk.outcome == 1, chunk.margins(scores), -chunk.margins(scores)))
        assert len(leads) == 1 + 10
        assert (len(totals.bins) == 64) == (bins == 64)
        got = totals.metrics()
        for sample, weight in enumerate(weights):
            i = np.repeat(np.arange(len(d)), weight[row])
            expected = naive_metrics(d[i], outcome[i], a[i], b[i], 2.0)
            found = {name: values[sample] for name, values in got.items()}
            assert found.pop("auc") == pytest.approx(expected.pop("auc"), abs=1e-12 if bins == 4096 else 1e-3)
            assert found == pytest.approx(expected, abs=1e-12), sample
        assert metrics.auc_of_leads(np.concatenate(leads)) == pytest.approx(
            naive_metrics(d, outcome, a, b, 2.0)["auc"], abs=1e-12
        )


def test_chunks_of_weights_do_not_change_the_metrics(monkeypatch):
    (d, outcome, a, b), row = random_battles(6), np.arange(400) // 2
    weights = metrics.bootstrap_weights(200, seed=0, resamples=50)
    at_once = samples_of(weights, row, a, b, outcome, d)
    monkeypatch.setattr(metrics, "SAMPLES_AT_ONCE", 7)
    assert (metrics.bootstrap_weights(200, seed=0, resamples=50) == weights).all()
    for name, values in samples_of(weights, row, a, b, outcome, d).items():
        np.testing.assert_allclose(values, at_once[name], rtol=1e-12)


def test_the_interval_over_queries_covers_the_truth_in_95_of_100_samples_with_correlated_battles():
    assert metrics.interval(np.arange(1001.0)) == [25.0, 975.0]  # the middle 95 %
    # The five battles of a query are all right or all wrong: intervals over battles are too narrow by sqrt(5).
    rng, queries, each, drawings = np.random.default_rng(0), 200, 5, 400
    covered = {"by query": 0, "by battle": 0}
    for drawing in range(drawings):
        right = np.repeat(rng.random(queries) < 0.7, each)  # (N,): the winner is chosen with probability 0.7
        for name, unit in (("by query", np.repeat(np.arange(queries), each)), ("by battle", np.arange(len(right)))):
            weights = metrics.bootstrap_weights(unit[-1] + 1, seed=drawing, resamples=200)
            low, high = metrics.interval(weights @ np.bincount(unit, right) / len(right))
            covered[name] += low <= 0.7 <= high
    assert 0.92 <= covered["by query"] / drawings <= 0.98
    assert covered["by battle"] / drawings < 0.8
