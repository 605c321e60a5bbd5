"""Baselines recover planted strengths, equal independent fits, and are compared on the same resamples."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

import metrics
from data_loader import Battles, Split, load_battles, split_battles
from support import baselines
from support.runs import verdict

NAMES = [f"m{i}" for i in range(5)]


def draw(strengths, queries, size, seed):
    """Battles (N,) on random queries, whose outcome follows the strengths (Q, M)."""
    rng = np.random.default_rng(seed)
    query, a = rng.integers(queries, size=size), rng.integers(5, size=size)
    b = (a + rng.integers(1, 5, size)) % 5
    outcome = rng.random(size) < expit(strengths[query, a] - strengths[query, b])
    return Battles([f"q{i}" for i in range(queries)], NAMES, query, a, b, outcome.astype(np.float32))


def split_of(strengths, queries=300, sizes=(6000, 1500, 1500)):
    return Split(*(draw(strengths, queries, size, seed) for seed, size in enumerate(sizes)))


def test_bradley_terry_recovers_planted_strengths():
    planted = np.array([-1.5, -0.5, 0.0, 0.5, 1.5])
    battles = draw(np.tile(planted, (50, 1)), 50, 20000, 0)
    strengths = baselines.bradley_terry(battles, 1.0, None)
    np.testing.assert_allclose(strengths - strengths.mean(), planted, atol=0.08)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("num_clusters", [0, 3])
def test_bradley_terry_equals_an_independent_fit(ties, num_clusters):
    battles = draw(np.tile(np.linspace(-1, 1, 5), (50, 1)), 50, 400, 1)
    if ties:
        battles.outcome[::4] = 0.5
    cluster, c = battles.query_idx % 3, 0.3

    def penalised(flat):  # one battle at a time
        shared, own = flat[:5] * baselines.GLOBAL_SCALE, flat[5:].reshape(num_clusters, 5)
        loss = 0.0
        for a, b, y, k in zip(battles.model_a_idx, battles.model_b_idx, battles.outcome, cluster, strict=True):
            d = shared[a] - shared[b] + (own[k, a] - own[k, b] if num_clusters else 0)
            loss += c * (y * np.logaddexp(0, -d) + (1 - y) * np.logaddexp(0, d))
        return loss + flat @ flat / 2

    best = minimize(penalised, np.zeros(5 * (1 + num_clusters)), tol=1e-10).x
    expected = best[:5] * baselines.GLOBAL_SCALE + (best[5:].reshape(num_clusters, 5) if num_clusters else 0)
    got = baselines.bradley_terry(battles, c, cluster, num_clusters)
    np.testing.assert_allclose(got, expected, atol=5e-3)


def test_bradley_terry_is_fitted_also_where_model_a_always_won():
    battles = draw(np.zeros((5, 5)), 5, 100, 2)
    battles.outcome[:] = 1
    assert np.isfinite(baselines.bradley_terry(battles, 1.0, None)).all()


def test_strengths_of_a_cluster_shrink_to_those_of_all():
    strengths = np.array([np.linspace(-1, 1, 5), np.linspace(1, -1, 5)])[np.arange(100) % 2]  # (Q, M)
    battles = draw(strengths, 100, 6000, 3)
    cluster = battles.query_idx % 2
    shrunk = baselines.bradley_terry(battles, 1e-6, cluster, 2)
    free = baselines.bradley_terry(battles, 1.0, cluster, 2)
    np.testing.assert_allclose(shrunk[0], shrunk[1], atol=1e-2)
    np.testing.assert_allclose(free[0] - free[1], strengths[0] - strengths[1], atol=0.2)


def test_neighbours_take_one_newton_step_on_the_nearest_training_queries(monkeypatch):
    monkeypatch.setattr(baselines, "NEIGHBOURS", (3,))
    monkeypatch.setattr(baselines, "DAMPINGS", (2.0,))
    rng = np.random.default_rng(0)
    split = split_of(np.zeros((20, 5)), queries=20, sizes=(60, 30, 30))
    points, strengths = rng.normal(size=(20, 4)), rng.normal(size=5)
    ((chosen, *got),) = baselines.neighbours(split, strengths, points)
    assert chosen == {"neighbours": 3, "damping": 2.0}
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    known = np.unique(split.train.query_idx)
    for side, d in zip((split.val, split.test), got, strict=True):
        for battle in range(len(side)):
            near = known[np.argsort(-(unit[known] @ unit[side.query_idx[battle]]))[:3]]
            up, down = np.zeros(5), np.full(5, 2.0)
            for i in np.flatnonzero(np.isin(split.train.query_idx, near)):
                a, b = split.train.model_a_idx[i], split.train.model_b_idx[i]
                p = expit(strengths[a] - strengths[b])
                up[a], up[b] = up[a] + split.train.outcome[i] - p, up[b] - split.train.outcome[i] + p
                down[[a, b]] += p * (1 - p)
            score = strengths + up / down
            assert d[battle] == pytest.approx(score[side.model_a_idx[battle]] - score[side.model_b_idx[battle]])


def test_each_baseline_finds_what_was_planted_for_it():
    rng = np.random.default_rng(0)
    cluster = rng.integers(4, size=300)  # (Q,)
    planted = rng.normal(size=(4, 5))[cluster]  # (Q, M): the best model depends on the cluster
    points = np.eye(4)[cluster] * 5 + rng.normal(size=(300, 4))
    split = split_of(planted)
    fitted = baselines.fit(split, points, cluster, 4)
    assert list(fitted) == ["random", "bradley_terry", "cluster_bradley_terry", "neighbours"]
    auc = {name: metrics.auc(d, split.test.outcome) for name, (_, _, d) in fitted.items()}
    truth = metrics.auc(baselines.differences(planted, split.test.query_idx, split.test), split.test.outcome)
    assert auc["random"] == 0.5
    assert auc["cluster_bradley_terry"] > truth - 0.01 > auc["neighbours"] - 0.01 > auc["bradley_terry"] + 0.05
    assert set(baselines.fit(split, points, 0 * cluster, 0)) == {"random", "bradley_terry", "neighbours"}


def test_what_validation_prefers_is_chosen_and_test_is_not_asked():
    split = split_of(np.tile(np.linspace(-1, 1, 5), (300, 1)))
    points, zeros = np.random.default_rng(1).normal(size=(300, 4)), np.zeros(300, int)
    fitted = baselines.fit(split, points, zeros, 0)
    split.test.outcome[:] = 1 - split.test.outcome
    for name, (chosen, d_val, d_test) in baselines.fit(split, points, zeros, 0).items():
        assert chosen == fitted[name][0]
        assert np.array_equal(d_val, fitted[name][1])
        assert np.array_equal(d_test, fitted[name][2])
    every = [metrics.auc(d, split.val.outcome) for _, d, _ in baselines.neighbours(split, np.zeros(5), points)]
    assert len(every) == len(baselines.DAMPINGS) * 4  # 8, 32, 128 and all 300 queries


def test_differences_are_paired():
    split = split_of(np.tile(np.linspace(-1, 1, 5), (300, 1)))
    weights = metrics.bootstrap_weights(split.test.query_idx, 0)
    fitted = baselines.fit(split, np.random.default_rng(1).normal(size=(300, 4)), np.zeros(300, int), 0)
    _, _, d = fitted["bradley_terry"]
    temperature = metrics.fit_temperature(fitted["bradley_terry"][1], split.val.outcome)
    router = baselines.judge(d, split.test, weights, 0.0, temperature)
    rows = baselines.compare(fitted, split, weights, *router)
    # A router that is Bradley-Terry differs from it nowhere, though the interval of either is wide.
    assert rows["bradley_terry"]["difference_intervals"] == {name: [0.0, 0.0] for name in router[0]}
    assert rows["random"]["log_loss"] == pytest.approx(np.log(2))
    low, high = rows["random"]["difference_intervals"]["auc"]
    assert rows["random"]["difference"]["auc"] == router[0]["auc"] - 0.5
    assert low < router[0]["auc"] - 0.5 < high
    assert verdict([low, high], "random") == "better than random"


def test_verdicts():
    assert verdict([0.01, 0.02], "x") == "better than x"
    assert verdict([-0.02, -0.01], "x") == "worse than x"
    assert verdict([-0.02, 0.01], "x") == verdict([0.0, 0.0], "x") == "no difference shown"


def test_shuffled_outcomes_show_no_difference(demo, run_demo, monkeypatch):
    def shuffled(*args):
        battles, counts = load_battles(*args)
        battles.outcome[:] = np.random.default_rng(0).permutation(battles.outcome)
        return battles, counts

    monkeypatch.setattr("data_loader.load_battles", shuffled)
    history, _ = run_demo("--limit", "2000", "--epochs", "3", "--num_clusters", "10", "--embedding_dim", "48")
    assert abs(history["test_metrics"]["auc"] - 0.5) < 0.06
    for row in history["baselines"].values():
        assert verdict(row["difference_intervals"]["auc"], "it") == "no difference shown"


def test_a_run_compares_with_the_baselines_of_its_own_split(demo, run_demo):
    flags = ("--limit", "600", "--epochs", "2", "--num_clusters", "10", "--embedding_dim", "48")
    history, _ = run_demo(*flags)
    split, _ = split_battles(load_battles(str(demo / "battles.parquet"), limit=600)[0], 42)
    strengths = baselines.bradley_terry(
        split.train, history["baselines"]["bradley_terry"]["chosen"]["inverse_penalty"], None
    )
    d = baselines.differences(strengths[None], 0 * split.test.query_idx, split.test)
    assert history["baselines"]["bradley_terry"]["auc"] == pytest.approx(metrics.auc(d, split.test.outcome), abs=1e-4)
    assert history["timing"]["baselines"] > 0
    without, _ = run_demo(*flags, "--baselines", "none")
    assert without["baselines"] == {}
    assert without["test_metrics"] == history["test_metrics"]
