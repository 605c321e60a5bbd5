"""Cost beside quality, and the guard: worked by hand, by brute force, and against a planted truth."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import mixed_battles, written_out

import metrics
from support.data.battles import ScoreTable
from support.evaluation.cost import CostEvaluation, expected_prices
from support.evaluation.guard import GuardedRows


def test_the_hull_keeps_what_no_mix_of_others_reaches():
    cost, quality = metrics.hull([3.0, 1.0, 2.0, 4.0, 2.5], [0.4, 0.1, 0.5, 0.5, 0.1])
    assert (cost.tolist(), quality.tolist()) == ([1, 2], [0.1, 0.5])
    cost, quality = metrics.hull([1, 2, 3, 4], [0.0, 0.2, 0.6, 0.7])  # at cost 2 a mix of the first and third has 0.3
    assert (cost.tolist(), quality.tolist()) == ([1, 3, 4], [0, 0.6, 0.7])
    assert metrics.hull([1, 1], [0.3, 0.4])[1].tolist() == [0.4]


def test_aiq_is_the_mean_height_of_the_hull():
    # From 0.2 to 0.6 over the first half of the range, then flat.
    assert metrics.aiq([1.0, 2.0], [0.2, 0.6], low=1.0, high=3.0) == pytest.approx((0.4 + 0.6) / 2)
    assert metrics.aiq([2.0], [0.6], low=1.0, high=3.0) == pytest.approx(0.6)
    assert np.isnan(metrics.aiq([2.0], [0.6], low=1.0, high=1.0))
    # The best mix of two settings at each cost, by brute force.
    rng = np.random.default_rng(0)
    cost, quality, at = rng.random(8), rng.random(8), np.linspace(0.2, 0.9, 2001)
    best = []
    for budget in at:
        mixes = [
            q0 + (q1 - q0) * min(1, (budget - c0) / (c1 - c0)) if c1 > budget else max(q0, q1)
            for c0, q0 in zip(cost, quality, strict=True)
            for c1, q1 in zip(cost, quality, strict=True)
            if c0 <= budget and c1 > c0
        ]
        best.append(max(mixes, default=quality[cost.argmin()]))
    assert metrics.aiq(cost, quality, 0.2, 0.9) == pytest.approx(np.mean(best), abs=1e-3)


def test_strong_calls_by_hand():
    # The strong model wins the row of the second highest lead and loses that of the lowest: PGR 0, 2, 2, 1 by quarters.
    lead, gain = np.array([0.0, 3.0, 2.0, 1.0]), np.array([-0.5, 0.0, 1.0, 0.0])
    found = metrics.strong_calls(lead, gain, np.ones((1, 4)))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {"apgr": (0 + 1 + 2 + 1.5) / 4, "cpt_20": 0.275, "cpt_50": 0.3125, "cpt_80": 0.35}
    )
    # Weights repeat rows; equal leads are mixed, so that nothing is gained over chance.
    weights = np.array([[1, 0, 2, 1]])
    rows = np.repeat(np.arange(4), weights[0])
    repeated = metrics.strong_calls(lead[rows], gain[rows], np.ones((1, 4)))
    for name, values in metrics.strong_calls(lead, gain, weights).items():
        assert values == pytest.approx(repeated[name])
    chance = metrics.strong_calls(np.zeros(4), gain, np.ones((1, 4)))
    assert [value.item() for value in chance.values()] == pytest.approx([0.5, 0.2, 0.5, 0.8])
    # The strong model is not better: undefined, in that sample alone.
    both = metrics.strong_calls(lead, gain, np.array([[1, 1, 0, 1], [1, 1, 1, 1]]))
    assert [np.isnan(value).tolist() for value in both.values()] == [[True, False]] * 4


# Models: cheap, middle, expensive, at 1, 2 and 4. On the first row the expensive one alone is right.
SCORES = np.array([[0.0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 0, 1]])
ROUTER = np.array([[0.0, 1, 3], [0, 2, 1], [1, 0, 2], [0, 0, 1]])
PRICES, RANKS = np.array([1.0, 2, 4]), np.array([[1.0, 0, 2]])


def evaluation_of(scores=SCORES, costs=None, weights=None):
    costs = np.broadcast_to(PRICES, scores.shape) if costs is None else costs
    weights = np.ones((1, len(scores))) if weights is None else weights
    return CostEvaluation(scores, costs, np.arange(len(scores)), PRICES, RANKS, weights)


def test_the_numbers_of_a_router_by_hand():
    evaluation = evaluation_of()
    settings = evaluation.choose_settings(ROUTER)
    # Without prices the rows choose expensive, middle, expensive, expensive: scores 1, 1, 0, 1 at 4, 2, 4, 4. From a
    # weight of 1/3 on the last two choose cheap and are right; from 3/3 and 2/1 on the others do, too, and are wrong.
    score, cost = evaluation.means([evaluation.choose(ROUTER, weight) for weight in (0.0, 0.4, 1.0, 2.0)])
    assert score.tolist() == [[0.75, 1.0, 0.75, 0.5]]
    assert cost.tolist() == [[3.5, 2.0, 1.25, 1.0]]
    numbers, details = evaluation.evaluate(ROUTER, settings)
    numbers = {name: values.item() for name, values in numbers.items()}
    assert numbers["perf_gain"] == 0.25  # the expensive model alone has 0.75
    assert numbers["cost_save"] == pytest.approx(1 - 1.25 / 4)
    assert (numbers["cost_save_gain"], numbers["optimal_selection"], numbers["optimal_cost"]) == (0, 1, 1)
    assert numbers["aiq"] == pytest.approx((0.625 * 0.25 + 0.875 * 0.75 + 1 * 2) / 3)
    assert evaluation.aiq_of_models.item() == pytest.approx(0.625)  # from 0.5 at 1 to 0.75 at 4, the middle has 0.25
    assert numbers["aiq_beyond_models"] == pytest.approx(numbers["aiq"] - 0.625)
    assert details["test_chosen"] == {"perf_gain": 0.25, "cost_save": 0.6875}
    assert [point["mean_score"] for point in details["curve"]][-1] == 0.5
    assert (evaluation.strong, evaluation.weak) == (2, 0)
    # Expensive leads cheap by 3 on the first row, where all is gained, and by 1 on the others, which add 1 - 1 + 0.
    assert numbers["apgr"] == pytest.approx((0.5 + 1 + 1 + 1) / 4)


def test_settings_are_chosen_elsewhere_and_fall_back_on_the_best_single_model():
    val = evaluation_of(np.array([[0.0, 0, 1]] * 4))  # only the expensive model is ever right
    settings = val.choose_settings(np.zeros((1, 3)))  # and this router never chooses it alone
    assert settings.saving is None
    numbers, _ = evaluation_of().evaluate(np.zeros((1, 3)), settings)
    assert (numbers["cost_save"].item(), numbers["cost_save_gain"].item()) == (0, 0)
    # A setting of validation, though another one would be better on the test.
    settings = val.choose_settings(ROUTER)
    numbers, details = evaluation_of().evaluate(ROUTER, settings)
    assert (numbers["perf_gain"].item(), details["test_chosen"]["perf_gain"]) == (0, 0.25)


def test_costs_of_rows_count_and_expected_prices_decide():
    train = ScoreTable(np.arange(2), np.ones((2, 3)), np.array([[1.0, 2, 4], [3.0, np.nan, 4]]))
    assert expected_prices(train, ["a", "b", "c"], None).tolist() == [2, 2, 4]
    assert expected_prices(train, ["a", "b", "c"], {"c": 1.0, "a": 2.0, "b": 3.0}).tolist() == [2, 3, 1]
    costs = np.broadcast_to(PRICES, SCORES.shape).copy()
    costs[0], costs[3, 0] = [10, 20, 40], np.nan
    evaluation = evaluation_of(costs=costs)
    assert evaluation.num_left_out == 1
    _, cost = evaluation.means([evaluation.choose(ROUTER[:3], 0.0)])
    assert cost.item() == pytest.approx((40 + 2 + 4) / 3)
    nan = np.nan
    evaluation = evaluation_of(np.where([[1, 1, 0]] * 4, SCORES, nan), np.where([[1, 1, 0]] * 4, costs, nan))
    assert evaluation.num_left_out == 1  # an unavailable model needs no cost; the first row has no difference now
    assert evaluation.means([evaluation.choose(ROUTER[1:3], 0.0)])[1].item() == pytest.approx((2 + 1) / 2)


def test_a_model_that_lacks_rows_is_replaced_there_by_the_next_best():
    nan = np.nan
    scores = np.array([[0.2, nan, 1.0], [0.4, 0.9, 0.0], [0.1, nan, 0.5], [0.3, nan, 0.6]])
    evaluation = evaluation_of(scores)
    assert evaluation.model_scores[0, 1] == pytest.approx((1.0 + 0.9 + 0.5 + 0.6) / 4)  # the expensive one is best
    assert evaluation.model_costs[0, 1] == pytest.approx((4 + 2 + 4 + 4) / 4)
    # A model without any row is none.
    scores[:, 1] = nan
    assert evaluation_of(scores).describe(["a", "b", "c"])["models"].keys() == {"a", "c"}


def test_weighted_means_of_small_integers_do_not_overflow():
    weights = np.stack([np.ones(600, np.uint8), np.repeat(np.array([0, 2], np.uint8), 300)])
    assert metrics.weighted_means(np.arange(600) < 300, weights).tolist() == [0.5, 0]
    found = metrics.weighted_means(np.ones((3, 2)), np.array([[1, 1, 1], [0, 0, 0]]))
    np.testing.assert_array_equal(found, [[1, 1], [np.nan, np.nan]])


def test_samples_of_many_rows_are_weighted():
    rng = np.random.default_rng(0)
    scores = (rng.random((600, 3)) < [0.4, 0.6, 0.7]).astype(float)
    scores = scores[scores.max(1) > scores.min(1)]
    weights = metrics.bootstrap_weights(len(scores), 0, 5)
    weights = np.concatenate([np.ones_like(weights[:1]), weights])
    evaluation = evaluation_of(scores, weights=weights)
    np.testing.assert_allclose(evaluation.model_scores[0], scores.mean(0))
    np.testing.assert_allclose(evaluation.model_scores[3], np.average(scores, axis=0, weights=weights[3]))
    np.testing.assert_allclose(evaluation.model_costs, np.tile(PRICES, (6, 1)))


def test_what_is_undefined_is_nan():
    evaluation = CostEvaluation(SCORES, 0 * SCORES, np.arange(4), 0 * PRICES, RANKS, np.ones((1, 4)))
    numbers, details = evaluation.evaluate(ROUTER, evaluation.choose_settings(ROUTER))
    assert all(np.isnan(numbers[name]).all() for name in ("aiq", "cost_save", "optimal_cost"))
    assert details["test_chosen"]["cost_save"] is None
    # Equal scores: without prices any model, with any price the cheapest.
    numbers, details = evaluation_of().evaluate(np.zeros((1, 3)), evaluation_of().choose_settings(np.zeros((1, 3))))
    assert [point["mean_cost"] for point in details["curve"]] == [pytest.approx(7 / 3), 1]


def test_samples_are_those_of_their_rows():
    rng = np.random.default_rng(1)
    scores, router = rng.random((30, 3)).round(1), rng.normal(size=(30, 3))
    weights = np.concatenate([np.ones((1, 30), int), metrics.bootstrap_weights(30, 0, 5)])
    evaluation = evaluation_of(scores, weights=weights)
    settings = evaluation.choose_settings(router)
    numbers, _ = evaluation.evaluate(router, settings)
    assert {len(values) for values in numbers.values()} == {6}
    for sample, weight in enumerate(weights):
        rows = np.repeat(np.arange(30), weight)
        alone, _ = evaluation_of(scores[rows]).evaluate(router[rows], settings)
        for name, value in alone.items():
            assert numbers[name][sample] == pytest.approx(value.item(), nan_ok=True), name


def test_a_guarded_router_leaves_its_fallback_only_with_confidence():
    scores = np.array([[0.0, 1.0, 0.5]])
    for confidence, leaves in ((0.5, True), (0.73, True), (0.74, False), (1.0, False)):  # sigmoid(1 / 1) = 0.731
        assert (metrics.raise_fallback(scores, 0, confidence, 1.0).argmax() == 1) == leaves
    assert metrics.raise_fallback(scores, 0, 0.65, temperature=2.0).argmax() == 0  # sigmoid(1 / 2) = 0.622
    for far in (1.0, 1e6):  # at 1 none is chosen, however far it leads, and prices still count
        raised = metrics.raise_fallback(far * scores, 0, 1.0, 1.0)
        assert raised.argmax() == 0
        assert np.isfinite(raised).all()
    assert metrics.raise_fallback(np.array([[1.0, 2.0, 2.0]]), 2, 0.5, 1.0).argmax() == 2  # of equal ones the fallback
    assert scores.tolist() == [[0.0, 1.0, 0.5]]


def rows_of(gain, lead, repeats=1):
    """A fallback that scores 0 and another model that scores `gain`, led by `lead`, on queries of several rows."""
    gain, lead = np.broadcast_arrays(np.asarray(gain, float), lead)
    table = ScoreTable(np.arange(len(gain)).repeat(repeats), np.column_stack([0 * gain, gain]).repeat(repeats, 0))
    battles = SimpleNamespace(
        table=table, unique_queries=np.arange(len(gain)), table_query_rows=table.query_idx, chunks=None
    )
    return GuardedRows(battles, np.column_stack([0 * lead, lead]), fallback_idx=0, temperature=1.0)


def test_validation_chooses_the_confidence():
    log_odds = np.log(np.array([0.6, 0.8, 0.9]) / np.array([0.4, 0.2, 0.1]))
    # Another model is worse where P is 0.6, and better at 0.8 and 0.9: any threshold between is as good, the highest
    # is chosen, unless all are left.
    assert rows_of(np.tile([-1, 1, 1], 50), np.tile(log_odds, 50)).choose_confidence() == 0.75
    assert rows_of(np.tile([1, 1, 1], 50), np.tile(log_odds, 50)).choose_confidence() == 0.55
    assert rows_of(np.tile([-1, -1, -1], 50), np.tile(log_odds, 50)).choose_confidence() == 1
    # A gain within its standard error is none: 52 rows won and 48 lost, 0.04 ± 0.1, against 58 and 42, 0.16.
    assert rows_of(np.repeat([1, -1], [52, 48]), 1.0).choose_confidence() == 1
    assert rows_of(np.repeat([1, -1], [58, 42]), 1.0).choose_confidence() == 0.7
    # A hundred rows of each query say no more than one.
    assert rows_of(np.repeat([1, -1], [52, 48]), 1.0, repeats=100).choose_confidence() == 1
    assert rows_of([], []).choose_confidence() == 1
    assert rows_of([1], 3.0, repeats=5).choose_confidence() == 1  # of one query nothing is known


def test_the_guard_on_the_test_by_hand():
    rows = rows_of([1, -1, 0.5, 1], np.log([4.0, 1.5, 9, 0.5]))  # P: 0.8, 0.6, 0.9, 1/3
    results = rows.evaluate(0.7, np.array([[1, 1, 1, 1], [0, 2, 1, 1]]))
    assert results["routed_away"].tolist() == [0.5, 0.25]
    assert results["difference"].tolist() == [0.375, 0.125]
    assert results["unguarded_difference"].tolist() == [0.125, -0.375]
    assert rows.evaluate(1.0, np.ones((1, 4), int))["difference"] == 0


def test_on_votes_the_guard_is_judged_on_battles_of_the_fallback():
    battles = written_out(mixed_battles(ties=False))
    scores = np.random.default_rng(0).normal(size=(len(battles.unique_queries), len(battles.model_names)))
    rows, won, fallback_won = GuardedRows(battles, scores, 2, temperature=1.5), [], []
    (pairs,) = battles.chunks()
    for row, a, b, outcome in zip(*pairs, strict=True):
        if 2 in (a, b):
            other, fallback = (b, outcome) if a == 2 else (a, 1 - outcome)
            leaves = 1 / (1 + np.exp(-(scores[row, other] - scores[row, 2]) / 1.5)) > 0.6
            won.append(1 - fallback if leaves else fallback)
            fallback_won.append(fallback)
    results = rows.evaluate(0.6, np.ones((1, len(battles.unique_queries)), int))
    assert (len(rows.row), results["score"].item()) == (len(won), pytest.approx(np.mean(won)))
    assert results["fallback_score"].item() == pytest.approx(np.mean(fallback_won))
    assert results["difference"].item() == pytest.approx(np.mean(won) - np.mean(fallback_won), rel=1e-5)
