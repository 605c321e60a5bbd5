"""Baselines recover planted strengths, equal independent fits, and are compared on the same bootstrap samples."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import mixed_battles, written_out
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

import metrics
import support.data.battles
import train
from data_loader import Battles, Split
from rankrouter import Metadata, RankRouter, RouterConfig
from support.data.battles import ScoreTable
from support.evaluation import baselines
from support.evaluation.comparison import TestEvaluation, summarize
from support.reporting.console import verdict
from support.system.device import Timing
from support.training.history import History

NAMES = [f"m{i}" for i in range(5)]


def draw(strengths, queries, size, seed):
    """Battles (N,) on random queries, whose outcome follows the strengths (Q, M)."""
    rng = np.random.default_rng(seed)
    query, a = rng.integers(queries, size=size), rng.integers(5, size=size)
    b = (a + rng.integers(1, 5, size)) % 5
    outcome = rng.random(size) < expit(strengths[query, a] - strengths[query, b])
    return Battles([f"q{i}" for i in range(queries)], NAMES, query, a, b, outcome.astype(np.float32))


def split_of(strengths, queries=300, sizes=(6000, 1500, 1500)):
    return as_split(*(draw(strengths, queries, size, seed) for seed, size in enumerate(sizes)))


def as_split(train, val, test):
    return Split(train, val, test, val.sample(len(val), seed=0))


def margins(battles, scores):
    (pairs,) = battles.chunks()
    return pairs.margins(scores)


def centered(scores):
    return scores - scores.mean(1, keepdims=True)


def test_bradley_terry_equals_an_independent_fit_also_with_ties_and_clusters():
    for ties, num_clusters in ((True, 0), (False, 3), (True, 3)):
        battles = draw(np.tile(np.linspace(-1, 1, 5), (50, 1)), 50, 400, 1)
        if ties:
            battles.outcome[::4] = 0.5
        cluster_of_query, c = np.arange(50) % 3 if num_clusters else None, 0.3
        cluster = battles.query_idx % 3
        a, b, y = battles.model_a_idx, battles.model_b_idx, battles.outcome

        def penalized(flat, k=cluster, num_clusters=num_clusters, a=a, b=b, y=y, c=c):
            strengths = flat[None, :5] * baselines.GLOBAL_SCALE  # (1, M): shared
            if num_clusters:
                strengths = strengths + flat[5:].reshape(num_clusters, 5)[k]  # (N, M)
            battle = np.arange(len(y)) if num_clusters else 0
            d = strengths[battle, a] - strengths[battle, b]  # (N,)
            return c * (y * np.logaddexp(0, -d) + (1 - y) * np.logaddexp(0, d)).sum() + flat @ flat / 2

        best = minimize(penalized, np.zeros(5 * (1 + num_clusters)), tol=1e-10).x
        expected = best[None, :5] * baselines.GLOBAL_SCALE + (best[5:].reshape(num_clusters, 5) if num_clusters else 0)
        got = baselines.bradley_terry(battles.win_counts(cluster_of_query), 5, c, num_clusters)
        np.testing.assert_allclose(got, expected, atol=5e-3, err_msg=f"{ties} {num_clusters}")


def test_bradley_terry_is_finite_where_model_a_always_won():
    battles = draw(np.zeros((5, 5)), 5, 100, 2)
    battles.outcome[:] = 1
    assert np.isfinite(baselines.bradley_terry(battles.win_counts(), 5, 1.0)).all()


def test_strengths_of_a_cluster_are_recovered_and_shrink_to_the_shared_ones():
    strengths = np.array([np.linspace(-1, 1, 5), np.linspace(1, -1, 5)])[np.arange(100) % 2]  # (Q, M)
    battles = draw(strengths, 100, 6000, 3)
    wins = battles.win_counts(np.arange(100) % 2)
    shrunk, free = (baselines.bradley_terry(wins, 5, inverse_penalty, 2) for inverse_penalty in (1e-6, 1.0))
    np.testing.assert_allclose(shrunk[0], shrunk[1], atol=1e-2)
    np.testing.assert_allclose(centered(free), strengths[:2], atol=0.15)


def test_neighbors_take_one_newton_step_on_the_nearest_training_queries(monkeypatch):
    monkeypatch.setattr(baselines, "NEIGHBORS", (3,))
    monkeypatch.setattr(baselines, "DAMPINGS", (2.0,))
    rng = np.random.default_rng(0)
    split = split_of(np.zeros((20, 5)), queries=20, sizes=(60, 30, 30))
    x, strengths = rng.normal(size=(20, 4)), rng.normal(size=(1, 5))
    ((chosen, *got),) = baselines.neighbors(split, strengths, x)
    assert chosen == {"neighbours": 3, "damping": 2.0}
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    train_queries = np.unique(split.train.query_idx)
    for side, scores in zip((split.val, split.test), got, strict=True):
        d = margins(side, scores)
        for battle in range(len(side)):
            near = train_queries[np.argsort(-(unit[train_queries] @ unit[side.query_idx[battle]]))[:3]]
            up, down = np.zeros(5), np.full(5, 2.0)
            for i in np.flatnonzero(np.isin(split.train.query_idx, near)):
                a, b = split.train.model_a_idx[i], split.train.model_b_idx[i]
                p = expit(strengths[0, a] - strengths[0, b])
                up[a], up[b] = up[a] + split.train.outcome[i] - p, up[b] - split.train.outcome[i] + p
                down[[a, b]] += p * (1 - p)
            score = strengths[0] + up / down
            assert d[battle] == pytest.approx(score[side.model_a_idx[battle]] - score[side.model_b_idx[battle]])


FAST = ("random", "bradley_terry", "cluster_bradley_terry", "neighbours")


def test_each_baseline_recovers_the_structure_planted_for_it():
    rng = np.random.default_rng(0)
    cluster = rng.integers(4, size=300)  # (Q,)
    planted = rng.normal(size=(4, 5))[cluster]  # (Q, M): the best model depends on the cluster
    x = np.eye(4)[cluster] * 5 + rng.normal(size=(300, 4))
    split = split_of(planted)
    fitted = baselines.fit(split, x, cluster, 4, learned=True, seed=0)
    assert set(fitted) >= {*FAST, "linear_head", "factorisation"}
    auc = {
        name: metrics.auc(margins(split.test, scores), split.test.outcome) for name, (_, _, scores) in fitted.items()
    }
    truth = metrics.auc(margins(split.test, planted[split.test.unique_queries]), split.test.outcome)
    assert auc["random"] == 0.5
    assert auc["cluster_bradley_terry"] > truth - 0.01 > auc["neighbours"] - 0.01 > auc["bradley_terry"] + 0.05
    for name in ("linear_head", "factorisation"):
        assert truth + 0.01 > auc[name] > truth - 0.015
    without_clusters = baselines.fit(split, x, 0 * cluster, 0, learned=False, seed=0)
    assert {*FAST} - set(without_clusters) == {"cluster_bradley_terry"}


def planted_heads(rank, queries=400, width=6, seed=0):
    """A split whose strengths are linear in x, with weights (H, M) of that rank, plus shared ones (1, M)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(queries, width))
    weights = rng.normal(size=(width, rank)) @ rng.normal(size=(rank, 5))
    shared = np.linspace(-1, 1, 5)[None]
    return split_of(x @ weights + shared, queries, (12000, 1500, 1500)), x, weights, shared


def test_the_linear_head_is_penalized_logistic_regression(monkeypatch):
    penalty = 3.0
    monkeypatch.setattr(baselines, "PENALTIES", (50.0, penalty))
    split, x, *_ = planted_heads(rank=2)
    *_, (chosen, _, scores) = baselines.linear_heads(split, np.ones((1, 5)), x, seed=0)
    identity, train = np.eye(5), split.train
    signs = identity[train.model_a_idx] - identity[train.model_b_idx]  # (N, M)
    scaled = x / x.shape[1] ** 0.5  # (Q, H)
    interactions = (scaled[train.query_idx][:, :, None] * signs[:, None, :]).reshape(
        len(train), -1
    ) / penalty**0.5  # (N, H M)
    model = LogisticRegression(fit_intercept=False, C=1, tol=1e-8, max_iter=1000)
    model.fit(np.hstack([interactions, baselines.GLOBAL_SCALE * signs]), train.outcome)
    weights = model.coef_[0, :-5].reshape(-1, 5) / penalty**0.5  # (H, M)
    expected = scaled[split.test.unique_queries] @ weights + baselines.GLOBAL_SCALE * model.coef_[0, -5:]
    assert chosen == {"penalty": penalty}
    np.testing.assert_allclose(centered(scores), centered(expected), atol=0.02)


def test_the_factorization_recovers_planted_weights_of_low_rank_and_starts_from_its_seed(monkeypatch):
    monkeypatch.setattr(baselines, "PENALTIES", (5.0,))
    split, x, weights, shared = planted_heads(rank=1)
    scores, again, other = (next(baselines.factorizations(split, np.zeros((1, 5)), x, seed))[2] for seed in (0, 0, 1))
    truth = centered((x @ weights + shared)[split.test.unique_queries])
    assert (centered(scores) - truth).std() < 0.1 * truth.std()
    # What the query adds is of rank one, as planted: the penalty of both factors leaves out the rest.
    values = np.linalg.svd(centered(scores) - centered(scores).mean(0), compute_uv=False)
    assert values[1] < 0.05 * values[0]
    assert np.array_equal(scores, again)
    assert not np.array_equal(scores, other)


def test_a_strong_penalty_leaves_bradley_terry(monkeypatch):
    monkeypatch.setattr(baselines, "PENALTIES", (1e7,))
    split, x, *_ = planted_heads(rank=2)
    expected = centered(baselines.bradley_terry(split.train.win_counts(), 5, 1.0))
    for head in (baselines.linear_heads, baselines.factorizations):
        ((_, _, scores),) = head(split, np.zeros((1, 5)), x, seed=0)
        np.testing.assert_allclose(centered(scores), np.broadcast_to(expected, scores.shape), atol=0.01)


def test_shared_strengths_are_penalized_as_those_of_bradley_terry(monkeypatch):
    monkeypatch.setattr(baselines, "PENALTIES", (1e7,))
    split, x, *_ = planted_heads(rank=2)
    split = replace(split, train=split.train.select(np.arange(40), None))
    split.train.outcome[:] = split.train.model_a_idx < split.train.model_b_idx  # only a penalty bounds the strengths
    ((_, _, scores),) = baselines.linear_heads(split, np.zeros((1, 5)), x, seed=0)
    # Of strengths up to 7.6: ten times the penalty moves them by 3, none by 100.
    np.testing.assert_allclose(
        centered(scores[:1]), centered(baselines.bradley_terry(split.train.win_counts(), 5, 1.0)), atol=0.4
    )


def test_ties_are_half_a_win_of_each_side_in_the_learned_heads(monkeypatch):
    monkeypatch.setattr(baselines, "PENALTIES", (1e7,))
    split, x, *_ = planted_heads(rank=2)
    split.train.outcome[:] = 0.5
    ((_, _, scores),) = baselines.linear_heads(split, np.ones((1, 5)) * np.arange(5), x, seed=0)
    np.testing.assert_allclose(centered(scores), 0, atol=0.01)


def test_a_path_of_penalties_ends_where_validation_auc_falls():
    planted = np.tile(np.linspace(-1, 1, 5), (300, 1))
    split = split_of(planted)
    planted = planted[:1] + np.array([0, 0, 0.1, 0, 0])
    right, wrong = np.arange(5.0)[None], -np.arange(5.0)[None]
    path = [({"n": n}, scores, scores) for n, scores in enumerate((0 * right, right, right, wrong, right))]
    rest = iter(path)
    assert baselines.best(rest, split, leave_early=True)[0] == {"n": 1}
    assert len(list(rest)) == 1
    better = [*path, ({"n": 5}, planted, planted)]
    assert baselines.best(better, split)[0] == {"n": 5}
    assert baselines.best(better, split, leave_early=True)[0] == {"n": 1}


def test_hyperparameters_are_chosen_on_validation_and_not_on_test():
    split = split_of(np.tile(np.linspace(-1, 1, 5), (300, 1)), sizes=(2000, 1000, 1000))
    x, zeros = np.random.default_rng(1).normal(size=(300, 4)), np.zeros(300, int)
    fitted = baselines.fit(split, x, zeros, 0, learned=True, seed=0)
    split.test.outcome[:] = 1 - split.test.outcome
    for name, (chosen, *scores) in baselines.fit(split, x, zeros, 0, learned=True, seed=0).items():
        assert chosen == fitted[name][0]
        assert all(np.array_equal(got, expected) for got, expected in zip(scores, fitted[name][1:], strict=True))
    strengths = baselines.best(baselines.rankings(split), split)[1]
    candidates = [scores for _, scores, _ in baselines.neighbors(split, strengths, x)]
    all_aucs = [metrics.auc(margins(split.val, scores), split.val.outcome) for scores in candidates]
    assert len(all_aucs) == len(baselines.DAMPINGS) * 4  # 8, 32, 128 and all 300 queries
    chosen_auc = metrics.auc(margins(split.val, fitted["neighbours"][1]), split.val.outcome)
    assert chosen_auc == max(all_aucs)


def evaluate(split, scores, margin=0.0, temperature=1.0, **options):
    val_scores = np.zeros((1, scores.shape[1]))
    options = {"confidence": 0.5, "single_model": baselines.best_single_model(split), "seed": 0} | options
    return TestEvaluation(split, scores, val_scores, margin=margin, temperature=temperature, **options)


def test_differences_are_paired():
    split = split_of(np.tile(np.linspace(-1, 1, 5), (300, 1)))
    fitted = baselines.fit(split, np.random.default_rng(1).normal(size=(300, 4)), np.zeros(300, int), 0, False, 0)
    _, val_scores, scores = fitted["bradley_terry"]
    temperature = metrics.fit_temperature(margins(split.val, val_scores), split.val.outcome)
    evaluation = evaluate(split, scores, temperature=temperature)
    rows, router = evaluation.compare(fitted), evaluation.results()["test_metrics"]
    # A router with Bradley-Terry's scores differs from it nowhere, though both intervals are wide.
    assert rows["bradley_terry"]["difference_intervals"] == {name: [0.0, 0.0] for name in router}
    assert rows["bradley_terry"]["intervals"] == evaluation.results()["test_intervals"]
    assert rows["random"]["log_loss"] == pytest.approx(np.log(2))
    low, high = rows["random"]["difference_intervals"]["auc"]
    assert rows["random"]["difference"]["auc"] == router["auc"] - 0.5
    assert low < router["auc"] - 0.5 < high
    assert verdict([low, high], "random", 30) == "better than random"


def table_of(*rows):
    return ScoreTable(np.arange(len(rows)), np.array(rows, float))


def test_models_are_ranked_by_their_mean_score():
    nan = np.nan
    assert baselines.ranking_by_mean(table_of([0, 1, 0.4], [0.5, 0, 0.7])).tolist() == [[0, 1, 2]]
    # Means 0.25, 0.5, 0.55; then a fourth, the best where it is, on one row of four: it comes last.
    assert baselines.ranking_by_mean(table_of([0, 1, 0.4, 1], *3 * [[0.5, 0, 0.7, nan]])).tolist()[0][3] == 0
    # On two rows of four it counts, and its mean is over those.
    rows = [[0.5, 0.1, 0.9], [0.5, 0.1, 0.9], [0.5, 0.1, nan], [0.5, 0.1, nan]]
    assert baselines.ranking_by_mean(table_of(*rows)).tolist() == [[1, 0, 2]]
    # Where means are equal, the first model is chosen, alone.
    assert baselines.ranking_by_mean(table_of([0, 1, 0], [1, 0, 0])).tolist() == [[2, 1, 0]]


@pytest.fixture
def table_split():
    """Battles with tables of several rows a query, in no order, whose best model differs between training and test."""
    rng, split = np.random.default_rng(0), split_of(np.zeros((60, 5)), queries=60, sizes=(600, 200, 200))
    sides = []
    for part, best in ((split.train, 1), (split.val, 3), (split.test, 3)):
        scores = rng.random((80, 5))
        scores[:, best] += 0.3
        scores[rng.random((80, 5)) < 0.1] = np.nan
        sides.append(replace(part, table=ScoreTable(rng.choice(part.unique_queries, 80), scores)))
    return as_split(*sides)


def test_the_best_single_model_is_chosen_on_training(table_split):
    x, zeros = np.random.default_rng(1).normal(size=(60, 4)), np.zeros(60, int)
    assert baselines.best_single_model(table_split) == "m1"
    fitted = baselines.fit(table_split, x, zeros, 0, learned=False, seed=0)
    chosen, val_scores, test_scores = fitted["best_single"]
    assert chosen == {"model": "m1"}
    assert val_scores.argmax() == test_scores.argmax() == 1
    results = evaluate(table_split, test_scores).results()["score_table"]
    assert results["best_single"]["model"] == "m1"
    scores, order = table_split.test.table.scores, np.argsort(-np.nanmean(table_split.train.table.scores, 0))
    single = [next(row[model] for model in order if not np.isnan(row[model])) for row in scores]
    assert results["best_single"]["mean_score"] == pytest.approx(np.mean(single))
    assert results["best_single"]["top1_accuracy"] == pytest.approx(np.mean(single == np.nanmax(scores, 1)))


def test_rows_of_a_query_are_drawn_together_and_weighted_equally(table_split):
    table, queries = table_split.test.table, table_split.test.unique_queries
    mine = np.random.default_rng(2).normal(size=(len(queries), 5))
    evaluation = evaluate(table_split, mine, seed=7)
    numbers, _ = evaluation.evaluate(mine, mine[:1], 0.0, 1.0)
    row, samples = summarize(numbers)[0], {name: values[1:] for name, values in numbers.items()}
    values, hits, oracle = [], [], np.nanmax(table.scores, 1)
    for query, scores in zip(table.query_idx, table.scores, strict=True):
        there = np.flatnonzero(~np.isnan(scores))
        choice = max(there, key=lambda model: mine[list(queries).index(query), model])
        values.append(scores[choice])
        hits.append(scores[choice] == np.nanmax(scores))
    assert (row["mean_score"], row["top1_accuracy"]) == (pytest.approx(np.mean(values)), pytest.approx(np.mean(hits)))
    single = evaluation.single
    weights = metrics.bootstrap_weights(len(queries), 7)[:, np.searchsorted(queries, table.query_idx)]
    assert len(np.unique(weights.sum(1))) > 1  # queries differ in their rows
    for sample in (0, 1, 2):
        rows = np.repeat(np.arange(80), weights[sample])
        low, mid, high = (np.array(column)[rows].mean() for column in (single, values, oracle))
        assert samples["mean_score"][sample] == pytest.approx(mid)
        assert samples["top1_accuracy"][sample] == pytest.approx(np.array(hits)[rows].mean())
        assert samples["gap_closed"][sample] == pytest.approx((mid - low) / (high - low))
    bounds = evaluation.results()["score_table"]
    assert bounds["oracle"]["intervals"]["top1_accuracy"] == pytest.approx([1, 1])
    drawn = np.array([oracle[np.repeat(np.arange(80), weight)].mean() for weight in weights])
    assert bounds["oracle"]["intervals"]["mean_score"] == pytest.approx(metrics.interval(drawn))


def test_a_score_table_is_evaluated_as_its_pairs_written_out(monkeypatch):
    monkeypatch.setattr(support.data.battles, "PAIRS_AT_ONCE", 100)
    table = as_split(*(mixed_battles(rows=rows, ties=rows == 80, seed=rows) for rows in (80, 30, 31)))
    pairs = as_split(*map(written_out, (table.train, table.val, table.test)))
    rng, cluster = np.random.default_rng(0), np.arange(15) % 3
    x, scores = rng.normal(size=(15, 4)), rng.normal(size=(len(table.test.unique_queries), 7))
    results = [evaluate(split, scores, 1.0, 2.0).results() for split in (table, pairs)]
    of_table, of_pairs = (each["test_metrics"] for each in results)
    assert of_table.keys() - of_pairs.keys() == {"mean_score", "top1_accuracy", "gap_closed"}
    assert {name: of_table[name] for name in of_pairs} == pytest.approx(of_pairs, abs=1e-12)
    (battles,), reliability = pairs.test.chunks(), metrics.Reliability(temperature=2.0)
    reliability.add(battles.margins(scores), battles.outcome)
    for found, expected in zip(results[0]["calibration"]["bins"], reliability.as_dict()["bins"], strict=True):
        assert found == pytest.approx(expected, abs=1e-12)
    assert results[0]["test_intervals"]["auc"] == pytest.approx(results[1]["test_intervals"]["auc"], abs=1e-12)
    # Baselines are fitted on the same battles: what an optimizer finds depends on the last digits of its input.
    of_table, of_pairs = (baselines.fit(split, x, cluster, 3, learned=True, seed=0) for split in (table, pairs))
    for name, (chosen, *expected) in of_pairs.items():
        assert of_table[name][0] == chosen, name
        for found, side in zip(of_table[name][1:], expected, strict=True):
            np.testing.assert_allclose(found, side, atol=1e-4, err_msg=name)


def test_verdicts():
    assert verdict([0.01, 0.02], "x", 30) == "better than x"
    assert verdict([-0.02, -0.01], "x", 30) == "worse than x"
    assert verdict([-0.02, 0.01], "x", 30) == verdict([0.0, 0.0], "x", 30) == "no difference shown"
    assert verdict([0.01, 0.02], "x", 29) == "no verdict on fewer than 30 queries"


def test_a_router_is_compared_with_the_baselines_of_its_own_split_and_without_structure_shows_no_difference(tmp_path):
    """`train.test` of a router at random on outcomes at random, as after a training."""
    split = split_of(np.zeros((300, 5)), sizes=(2000, 600, 600))
    rng = np.random.default_rng(0)
    x, cluster_idx = torch.from_numpy(rng.normal(size=(300, 4))).float(), torch.from_numpy(rng.integers(3, size=300))
    torch.manual_seed(0)
    router = RankRouter(NAMES, 4, RouterConfig(num_clusters=3, embedding_dim=8, zero_init=False))
    router.metadata = Metadata({}, {}, "", torch.zeros(0), {}, "m0")
    rows = {}
    for which in ("none", "all"):
        args = train.parse_args(["--demo", "--baselines", which, "--num_clusters", "3", "--margin", "1"])
        history = History(tmp_path, vars(args), {}, Timing())
        run = train.Run(args, SimpleNamespace(split=split, full_split=None), None, history, None, tower_threads=1)
        train.test(run, router, (x, cluster_idx), (x, cluster_idx))
        rows[which] = history.as_dict()
    assert rows["none"]["baselines"] == {}
    assert rows["none"]["test_metrics"] == rows["all"]["test_metrics"]
    compared = rows["all"]["baselines"]
    assert set(compared) >= {*FAST, "linear_head", "factorisation"}
    for name, row in compared.items():
        assert verdict(row["difference_intervals"]["auc"], name, 100) == "no difference shown"
    inverse_penalty = compared["bradley_terry"]["chosen"]["inverse_penalty"]
    d = margins(split.test, baselines.bradley_terry(split.train.win_counts(), 5, inverse_penalty))
    assert compared["bradley_terry"]["auc"] == pytest.approx(metrics.auc(d, split.test.outcome), abs=1e-6)
    # Its margins are log-odds, without the margin of BPR.
    assert compared["bradley_terry"]["log_loss"] == pytest.approx(metrics.log_loss(d, split.test.outcome), abs=1e-6)
    assert rows["all"]["timing"]["baselines"] > 0
