"""Scores against a computation of their own, and checkpoints that come back bit for bit."""

import pickle

import pytest
import torch

from model_profiling import ModelTower
from rankrouter import RankRouter
from support.files import UserError

ARGS = {
    "embedding_dim": 16,
    "num_clusters": 4,
    "cluster_dim": 3,
    "capability_dim": 5,
    "no_capability": False,
    "no_model_id": False,
    "dropout": 0.1,
    "id_dropout": 0.1,
    "similarity_metric": "dot",
}
NAMES = ["org/a", "b, c", "\U0001f999"]


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
            expected = q @ m
            if similarity == "cosine":
                expected = 10 * expected / (q.norm() * m.norm())
            torch.testing.assert_close(scores[i, j], expected, atol=1e-5, rtol=1e-5)


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
    facts = {"args": ARGS | changes, "encoder": {"width": 8}, "epoch": 3, "temperature": 1.5}
    router.save(path, **facts)
    loaded = RankRouter.load(path)
    assert loaded.model_names == NAMES
    assert loaded.facts == facts
    assert not loaded.training
    assert torch.equal(loaded.query_tower.assign(points), cluster_idx)
    assert torch.equal(loaded(points, cluster_idx), router(points, cluster_idx))


def test_a_checkpoint_holds_plain_tensors_and_types(tmp_path):
    router, _, _ = make()
    router.save(tmp_path / "best_model.pt", args=ARGS, encoder={"width": 8})
    checkpoint = torch.load(tmp_path / "best_model.pt", weights_only=True)
    assert set(checkpoint) == {"format_version", "model_state_dict", "model_names", "args", "encoder"}
    state = checkpoint["model_state_dict"]
    for name in ("mean", "scale", "centroids"):  # what routing needs beyond the weights
        assert torch.equal(state[f"query_tower.{name}"], getattr(router.query_tower, name))


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the checkpoint ran code')",))


@pytest.mark.parametrize("kind", ["pickle", "text", "cut", "empty", "foreign", "lacking", "newer", "missing"])
def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path, kind):
    path = tmp_path / "best_model.pt"
    router, _, _ = make()
    router.save(path, args=ARGS, encoder={"width": 8})
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
    expected = {"newer": "format 99, expected 2", "missing": "cannot read the checkpoint"}
    with pytest.raises(UserError, match=expected.get(kind, "is no RankRouter checkpoint")) as error:
        RankRouter.load(path)
    assert "\n" not in str(error.value)
