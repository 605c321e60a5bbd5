"""Scores against a computation of their own, and checkpoints that come back bit for bit."""

import copy
import pickle

import numpy as np
import pytest
import torch

from metrics import log_win_probability
from model_profiling import ModelTower
from rankrouter import RankRouter
from support.files import UserError
from support.new_models import vector_from_battles

ARGS = {
    "embedding_dim": 16,
    "num_clusters": 4,
    "cluster_dim": 3,
    "capability_dim": 5,
    "no_capability": False,
    "no_model_id": False,
    "dropout": 0.1,
    "random_start": True,
    "unscaled": False,
    "id_dropout": 0.1,
    "similarity_metric": "dot",
    "loss_type": "bpr",
    "margin": 1.0,
    "pooling": "mean",
    "max_length": 512,
    "seed": 42,
}
NAMES = ["org/a", "b, c", "\U0001f999"]
FACTS = {
    "args": ARGS,
    "encoder": {"width": 8, "path": "encoder", "fingerprint": "f", "dtype": "float32"},
    "profiles": {"kind": "random"},
    "seen_queries": torch.tensor([1, 2]),
    "temperature": 1.5,
    "best_single_model": "b, c",
}


def make(**changes):
    torch.manual_seed(0)
    router = RankRouter(NAMES, 8, ARGS | changes)
    embeddings = torch.randn(60, 8) * 10
    router.query_tower.fit(embeddings, seed=0)
    points = router.query_tower.standardise(embeddings)
    return router.eval(), points, router.query_tower.assign(points)


def mlp(block, x):
    return torch.relu(x @ block[0].weight.T + block[0].bias) @ block[3].weight.T + block[3].bias


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_scores_equal_a_loop_over_queries_and_models(similarity):
    router, points, cluster_idx = make(similarity_metric=similarity)
    scores = router(points, cluster_idx)
    assert scores.shape == (60, 3)
    query_tower, model_tower = router.query_tower, router.model_tower
    for i in (0, 7, 59):
        semantic = query_tower.semantic.weight @ points[i] + query_tower.semantic.bias
        q = mlp(query_tower.mlp, torch.cat([semantic, query_tower.cluster.weight[cluster_idx[i]]]))
        for j in range(3):
            m = mlp(model_tower.mlp, torch.cat([model_tower.capability.weight[j], model_tower.model_id.weight[j]]))
            expected = q @ m / (4 if similarity == "dot" else q.norm() * m.norm() / 10)  # 4 is the root of the width
            torch.testing.assert_close(scores[i, j], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_no_query_is_told_from_another_before_training(similarity):
    router, points, cluster_idx = make(similarity_metric=similarity, random_start=False)
    scores = router.score(points, cluster_idx)
    assert np.ptp(scores, axis=0).max() == 0
    assert np.ptp(scores, axis=1).min() > 0  # yet a gradient leads to every model's vector
    at_random, *_ = make(similarity_metric=similarity)
    assert np.ptp(at_random.score(points, cluster_idx), axis=0).min() > 0


def test_a_dot_product_is_divided_by_the_root_of_its_width():
    router, points, cluster_idx = make()
    unscaled, *_ = make(unscaled=True)
    np.testing.assert_allclose(unscaled.score(points, cluster_idx), 4 * router.score(points, cluster_idx), rtol=1e-5)


def test_the_cosine_scale_is_learned_and_stays_positive():
    router, points, cluster_idx = make(similarity_metric="cosine")
    (-router(points, cluster_idx).sum()).backward()
    assert router.log_scale.grad != 0
    with torch.no_grad():
        router.log_scale -= 20
    assert 0 < router(points, cluster_idx).abs().max() < 1e-6


def test_parts_of_the_model_tower_can_be_left_out():
    assert ModelTower(3, use_model_id=False).model_id is None
    assert ModelTower(3, use_capability=False).capability is None
    for changes in ({"no_model_id": True}, {"no_capability": True}):
        router, points, cluster_idx = make(**changes)
        assert router(points, cluster_idx).shape == (60, 3)
    with pytest.raises(ValueError, match="capability vectors, ID embeddings, or both"):
        ModelTower(3, use_capability=False, use_model_id=False)


@pytest.mark.parametrize(
    "changes",
    [{}, {"similarity_metric": "cosine"}, {"num_clusters": 0}, {"no_model_id": True}, {"no_capability": True}],
)
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, changes):
    router, points, cluster_idx = make(**changes)
    path = tmp_path / "best_model.pt"
    facts = FACTS | {"args": ARGS | changes, "epoch": 3}
    router.save(path, **facts)
    loaded = RankRouter.load(path)
    assert loaded.model_names == NAMES
    assert loaded.facts.keys() == facts.keys()
    assert all(loaded.facts[name] == facts[name] for name in facts if name != "seen_queries")
    assert torch.equal(loaded.facts["seen_queries"], facts["seen_queries"])
    assert not loaded.training
    assert torch.equal(loaded.query_tower.assign(points), cluster_idx)
    assert torch.equal(loaded(points, cluster_idx), router(points, cluster_idx))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("num_models", [3, 31, 32, 33])
def test_a_new_model_leaves_the_scores_of_the_others_as_they_are_to_the_last_bit(similarity, num_models):
    torch.manual_seed(0)
    router = RankRouter([f"m{i}" for i in range(num_models)], 8, ARGS | {"similarity_metric": similarity})
    router.facts = {"profiles": {"kind": "random"}}
    points, zeros = torch.randn(500, 8), torch.zeros(500, dtype=torch.int64)
    before = router.score(points, zeros)
    assert before.shape == (500, num_models)
    np.testing.assert_allclose(before, router(points, zeros).detach(), atol=1e-5)
    for added in range(3):
        router.add_model(f"new{added}", torch.randn(5))
        after = router.score(points, zeros)
        assert np.array_equal(after[:, :num_models], before)
        np.testing.assert_allclose(after, router(points, zeros).detach(), atol=1e-5)


def test_a_new_model_needs_a_name_of_its_own_and_capability_vectors():
    router, _, _ = make()
    with pytest.raises(UserError, match="knows b, c already"):
        router.add_model("b, c", torch.zeros(5))
    router, _, _ = make(no_capability=True)
    with pytest.raises(UserError, match="--no_capability"):
        router.add_model("new", torch.zeros(5))
    router, _, _ = make()
    with pytest.raises(UserError, match="nothing is known of new"):
        router.add_model("new", torch.full((5,), torch.nan))


@pytest.mark.parametrize("changes", [{}, {"similarity_metric": "cosine"}, {"no_model_id": True}, {"id_dropout": 0}])
def test_a_vector_fitted_to_battles_is_the_likeliest_under_its_prior(changes):
    router, points, cluster_idx = make(**changes)
    router.facts = {"profiles": {"kind": "random"}, "temperature": 2.0}
    opponents, outcome = torch.arange(60) % 3, (torch.arange(60) % 4 != 0).double()
    battles = points, cluster_idx, opponents, outcome
    vectors = router.model_tower.capability.weight.detach().double()
    state = {name: tensor.clone() for name, tensor in router.state_dict().items()}

    def loss(vector, spread):
        """The negative log posterior, by the matrix of scores with the vector in its place."""
        wider = copy.deepcopy(router)
        wider.model_names.append("new")
        wider.model_tower.add_model(vector.float())
        scores = wider.score(points, cluster_idx)
        d = scores[:, 3] - scores[np.arange(60), opponents]
        log_p = log_win_probability(np.where(outcome == 1, d, -d), temperature=2.0)
        off = (vector - vectors.mean(0)).numpy()
        return -log_p.sum() + off @ np.linalg.pinv(spread**2 * torch.cov(vectors.T).numpy(), rcond=1e-6) @ off / 2

    found = vector_from_battles(router, *battles)
    with torch.no_grad():
        q, tower = router.query_tower(router.query_tower.centroids, torch.arange(4)), router.model_tower
        known, unknown = tower(), tower.mlp(tower.unknown_features(vectors.float()))  # (M, D) each
        spread = float(router.similarity(q, known).mean(0).std() / router.similarity(q, unknown).mean(0).std())
    best, directions = loss(found, spread), vectors - vectors.mean(0)  # the prior allows these alone
    for direction in directions:
        for step in (-0.005, 0.005):
            assert loss(found + step * direction, spread) > best
    assert all(torch.equal(tensor, router.state_dict()[name]) for name, tensor in state.items())
    none = [column[:0] for column in battles]
    torch.testing.assert_close(vector_from_battles(router, *none), vectors.mean(0))


def test_a_win_rate_profile_rises_with_wins_over_the_known():
    router, points, cluster_idx = make(capability_dim=4)
    known = torch.tensor([[1.0] * 4, [0.0] * 4, [-1.0] * 4]).double()
    router.facts = {"profiles": {"kind": "win_rate", "known": known}}
    opponents = torch.arange(60) % 3
    won, lost = (
        vector_from_battles(router, points, cluster_idx, opponents, torch.full((60,), y).double()) for y in (1.0, 0.0)
    )
    assert (won > 0.5).all()
    assert (lost < -0.5).all()
    router.add_model("new", won)
    torch.testing.assert_close(router.facts["profiles"]["known"], torch.cat([known, won[None]]))


def test_vectors_that_tell_no_model_apart_leave_a_finite_fit():
    router, points, cluster_idx = make(no_model_id=True)
    router.facts = FACTS
    with torch.no_grad():
        router.model_tower.capability.weight.fill_(0.5)
    vector = vector_from_battles(router, points, cluster_idx, torch.arange(60) % 3, torch.ones(60).double())
    torch.testing.assert_close(vector, torch.full((5,), 0.5).double())


@pytest.mark.parametrize("change", ["trained", "loaded", "added"])
def test_a_ranking_sees_the_weights_as_they_are(change):
    router, points, cluster_idx = make()
    router.facts = FACTS
    router.embed = lambda queries: (points, cluster_idx)
    before = router.scores_of([])
    if change == "trained":
        optimiser = torch.optim.AdamW(router.train().parameters(), lr=0.01, fused=True)
        router(points, cluster_idx).square().sum().backward()
        optimiser.step()
    elif change == "loaded":
        router.load_state_dict({name: 2 * tensor for name, tensor in router.state_dict().items()})
    else:
        router.add_model("new", torch.ones(5))
    after = router.scores_of([])
    assert np.array_equal(after, router.score(points, cluster_idx))
    assert after.shape != before.shape or not np.allclose(after, before, atol=1e-3)


def test_a_checkpoint_holds_plain_tensors_and_types(tmp_path):
    router, _, _ = make()
    router.save(tmp_path / "best_model.pt", args=ARGS, encoder={"width": 8})
    checkpoint = torch.load(tmp_path / "best_model.pt", weights_only=True)
    assert set(checkpoint) == {"format_version", "model_state_dict", "model_names", "args", "encoder"}
    state = checkpoint["model_state_dict"]
    for name in ("mean", "scale", "centroids"):  # what routing needs beyond the weights
        assert torch.equal(state[f"query_tower.{name}"], getattr(router.query_tower, name))


def damage(checkpoint, *place, value=None):
    """The checkpoint with another value at a place, or without one."""
    inner = checkpoint
    for key in place[:-1]:
        inner = inner[key]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(((name,), None) for name in FACTS),
        *((("args", name), None) for name in ("unscaled", "max_length", "pooling", "seed")),
        *((("encoder", name), None) for name in ("path", "fingerprint", "dtype")),
        *((("temperature",), value) for value in (0.0, -1.0, float("nan"), float("inf"), "1")),
        (("best_single_model",), "stranger"),
        (("model_names",), ["a", "a", "b"]),
        (("model_names",), "abc"),
        (("profiles",), {"kind": "win_rate"}),
        (("profiles",), {"kind": "win_rate", "known": torch.zeros(2, 5)}),
        (("profiles",), {"kind": "file", "columns": ["x"], "mean": [0.0], "scale": [1.0]}),
        (("seen_queries",), torch.zeros(3)),
        (("args", "seed"), "x"),
        (("args", "unscaled"), "False"),
        (("encoder", "dtype"), 3),
        (("model_state_dict", "query_tower.mean"), torch.full((8,), float("nan"))),
        (("model_state_dict", "query_tower.mean"), torch.zeros(9)),
    ],
)
def test_a_damaged_checkpoint_is_refused_when_it_is_loaded(tmp_path, place, value):
    router, _, _ = make()
    router.save(tmp_path / "c.pt", **copy.deepcopy(FACTS))
    checkpoint = torch.load(tmp_path / "c.pt", weights_only=True)
    damage(checkpoint, *place, value=value)
    torch.save(checkpoint, tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"is (no|a damaged) RankRouter checkpoint"):
        RankRouter.load(tmp_path / "c.pt")


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the checkpoint ran code')",))


@pytest.mark.parametrize("kind", ["pickle", "text", "cut", "empty", "foreign", "lacking", "newer", "missing"])
def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path, kind):
    path = tmp_path / "best_model.pt"
    router, _, _ = make()
    router.save(path, **FACTS)
    RankRouter.load(path)
    good = torch.load(path, weights_only=True)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(), protocol=2))
    elif kind == "text":
        path.write_text("hello")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        torch.save({"weight": torch.zeros(3)}, path)
    elif kind == "lacking":
        good["model_state_dict"].pop("query_tower.centroids")
        torch.save(good, path)
    elif kind == "newer":
        torch.save(good | {"format_version": 99}, path)
    else:
        path.unlink()
    expected = {"newer": "format 99, expected 3", "missing": "cannot read the checkpoint"}
    with pytest.raises(UserError, match=expected.get(kind, "is no RankRouter checkpoint")) as error:
        RankRouter.load(path)
    assert "weights_only" not in str(error.value)  # torch's advice to open it all the same
    assert "\n" not in str(error.value)
