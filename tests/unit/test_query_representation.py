"""Surface features, standardization, and clusters in one space."""

import numpy as np
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_info, threadpool_limits

import query_representation
from query_representation import SURFACE_FEATURES, QueryTower, Texts, fit_centroids, query_features

SHARES = ("words", "digits", "non_ascii_letters", "brackets", "operators")
COUNTS = ("characters", "line_breaks", "question_marks")


def features_of(texts):
    """Every surface feature (Q,) of texts, by name."""
    return {name: compute(Texts(texts)) for name, compute in SURFACE_FEATURES.items()}


def test_surface_features_by_hand():
    text = "Why 2+2?\nA) 4\n B. 5\n\u4f60\u597d\uff1f"  # 8 + 1 + 4 + 1 + 5 + 1 + 3 characters
    features = {name: float(values[0]) for name, values in features_of([text]).items()}
    for name, count in (("characters", 23), ("line_breaks", 3), ("question_marks", 2)):
        assert np.isclose(features[name], np.log(1 + count)), name
    for name, count in (("words", 7), ("digits", 4), ("non_ascii_letters", 2), ("brackets", 1), ("operators", 1)):
        assert np.isclose(features[name], count / 23), name
    yes = {name for name, value in features.items() if name not in COUNTS + SHARES and value}
    assert yes == {"has_choices", "starts_upper_case", "ends_in_question_mark"}


def test_each_yes_and_no_of_a_text():
    texts = {
        "has_code": (["def f(x):", "x\n  import os", "#include <a.h>"], ["a class of", "define f", "the import os"]),
        "has_choices": (
            ["A. x\nB. y", "(A) x\n(B) y", "A\uff1ax\nB\u3001y"],
            ["A. x", "A x\nB y", "A. x B. y", "D.C. is it", "A) B) C) pick"],
        ),
        "starts_upper_case": (["Hi", "1. \u00c9t\u00e9", '"Who'], ["hi There", "\u4f60A", "123"]),
        "ends_in_question_mark": (["a?", "\uff1f", "\u061f"], ["? a", "a?!"]),
        "ends_in_colon": (["a:", "\u4f60\uff1a"], [": a"]),
        "ends_in_period": (["a.", "\u4f60\u3002", "\u0939\u0964"], [". a"]),
        "ends_in_letter_or_digit": (["a", "1", "\u4f60"], ["a.", "a)"]),
    }
    for name, (yes, no) in texts.items():
        got = features_of(yes + no)[name]
        assert got.tolist() == [1.0] * len(yes) + [0.0] * len(no), name


def test_surface_features_of_hostile_texts_are_finite_bounded_and_do_not_depend_on_the_others():
    hostile = ["", " ", "\0" * 9, "((((" * 50_000, "A.\n" * 70_000, "\ud7ff\U0010ffff" * 99, "1" * 10**6 + "?"]
    together = features_of(hostile)
    for i, text in enumerate(hostile):
        for name, values in features_of([text]).items():
            assert values[0] == together[name][i] and np.isfinite(values[0]), (name, text[:9])
            assert name in COUNTS or 0 <= values[0] <= 1, (name, text[:9])
    assert together["ends_in_question_mark"][-1] == 1  # behind all that is read
    x = torch.zeros(40, 4)
    features = query_features(["like this one"] * 20 + ["Or that, 2 of it?"] * 20, x, tuple(together))
    tower = QueryTower(4, len(together), num_clusters=0)
    tower.fit(features, 0)
    routed = tower.standardize(query_features(hostile, torch.zeros(len(hostile), 4), tuple(together)))
    assert routed.abs().max() <= 5 * (4 / len(together)) ** 0.5 + 1e-6


def test_the_features_of_a_query_follow_its_embedding_in_the_order_of_their_names(monkeypatch):
    monkeypatch.setattr(query_representation, "TEXTS_AT_ONCE", 2)
    queries, embeddings = ["a?", "1", "b.", "c", "22"], torch.arange(10.0).view(5, 2)
    features = query_features(queries, embeddings, ("digits", "ends_in_question_mark"))
    assert features.tolist() == [[0, 1, 0, 1], [2, 3, 1, 0], [4, 5, 0, 0], [6, 7, 0, 0], [8, 9, 1, 0]]
    assert query_features(queries, embeddings, ()) is embeddings
    assert query_features([], embeddings[:0], ("digits",)).shape == (0, 3)


def test_surface_features_weigh_as_much_as_the_embedding():
    features = torch.randn(500, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 30)
    tower = QueryTower(24, 6, num_clusters=0)
    tower.fit(features, 0)
    x = tower.standardize(features)
    for block in (x[:, :24], x[:, 24:]):
        assert torch.isclose(block.square().sum(1).mean(), torch.tensor(24.0), rtol=1e-2)


def test_many_queries_are_clustered_by_mini_batches_and_few_by_lloyd(monkeypatch):
    rng = np.random.default_rng(0)
    truth = 20 * rng.normal(size=(5, 3))
    x = torch.from_numpy(truth[rng.integers(5, size=3000)] + 0.1 * rng.normal(size=(3000, 3))).float()
    monkeypatch.setattr(query_representation, "LLOYD_QUERIES", 2999)
    calls = []
    fit = MiniBatchKMeans.fit
    monkeypatch.setattr(MiniBatchKMeans, "fit", lambda self, x: calls.append(len(x)) or fit(self, x))
    few = fit_centroids(x[:2999], 5, 0)
    assert not calls
    many = fit_centroids(x, 5, 0)
    assert calls == [3000]
    for centroids in (few, many):
        away = torch.cdist(centroids, torch.from_numpy(truth).float()).min(1)
        assert away.values.max() < 0.2
        assert sorted(away.indices.tolist()) == [0, 1, 2, 3, 4]


def test_statistics_and_clusters_do_not_depend_on_the_chunks(monkeypatch):
    x = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0)) * 3 + 5
    towers = [QueryTower(6, num_clusters=4) for _ in range(2)]
    towers[0].fit(x, 0)
    expected = towers[0].assign(towers[0].standardize(x))
    monkeypatch.setattr(query_representation, "ROWS_AT_ONCE", 37)
    towers[1].fit(x, 0)
    torch.testing.assert_close(towers[1].mean, x.mean(0))
    torch.testing.assert_close(towers[1].scale, x.std(0, correction=0))
    torch.testing.assert_close(towers[0].centroids, towers[1].centroids)
    assert torch.equal(towers[1].assign(towers[1].standardize(x)), expected)


def embeddings_with_huge_dimensions(queries=300, width=8):
    """Two groups that differ in small dimensions, under two huge ones that say nothing."""
    rng = np.random.default_rng(0)
    group = rng.integers(2, size=queries)
    x = rng.normal(0, 0.02, (queries, width)) + np.outer(group, [0, 0, *[1] * (width - 2)])
    x[:, :2] = rng.normal(300, 500, (queries, 2))
    return torch.from_numpy(x).float(), group


def test_standardization_uses_training_statistics_and_survives_constant_dimensions():
    embeddings, _ = embeddings_with_huge_dimensions()
    embeddings[:, 5] = 7.0
    tower = QueryTower(8, num_clusters=0)
    tower.fit(embeddings, seed=0)
    x = tower.standardize(embeddings)
    torch.testing.assert_close(x.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.tensor([1.0] * 5 + [0.0] + [1.0] * 2))
    other = tower.standardize(embeddings + 1)  # new queries do not move the statistics
    torch.testing.assert_close(other - x, (1 / tower.scale).expand(300, 8), atol=1e-4, rtol=1e-4)


def test_wide_dimensions_do_not_dominate_the_clusters():
    embeddings, group = embeddings_with_huge_dimensions()
    tower = QueryTower(8, num_clusters=2)
    tower.fit(embeddings, seed=0)
    found = tower.assign(tower.standardize(embeddings)).numpy()
    assert max(np.mean(found == group), np.mean(found != group)) == 1


def test_centroids_lie_where_the_standardized_embeddings_do():
    embeddings, _ = embeddings_with_huge_dimensions()
    tower = QueryTower(8, num_clusters=6)
    tower.fit(embeddings, seed=0)
    x = tower.standardize(embeddings)
    cluster_idx = tower.assign(x)
    for k in range(6):  # what K-means converges to: every centroid is the mean of those assigned to it
        torch.testing.assert_close(x[cluster_idx == k].mean(0), tower.centroids[k], atol=1e-3, rtol=1e-3)
    distances = (x[:, None] - tower.centroids[None]).square().sum(2)  # (Q, K), the plain way
    assert torch.equal(cluster_idx, distances.argmin(1))


def test_k_means_runs_on_one_thread(monkeypatch):
    threads = []
    fit = KMeans.fit

    def watched(self, x):
        threads.extend(pool["num_threads"] for pool in threadpool_info())
        return fit(self, x)

    monkeypatch.setattr(KMeans, "fit", watched)
    with threadpool_limits(2):
        fit_centroids(torch.randn(50, 4), 3, seed=0)
    assert set(threads) == {1}


def test_the_cluster_reaches_the_query_vector():
    tower = QueryTower(8, num_clusters=3, embedding_dim=16, zero_init=False).eval()
    x = torch.randn(4, 8)
    assert not torch.allclose(tower(x, torch.zeros(4).long()), tower(x, torch.ones(4).long()))
    without = QueryTower(8, num_clusters=0, embedding_dim=16)
    assert without.cluster is None
    assert without(x, torch.zeros(4).long()).shape == (4, 16)
