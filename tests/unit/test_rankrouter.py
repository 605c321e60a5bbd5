"""Scores against an independent computation, and checkpoints that are read bit for bit as they were written."""

import copy
import itertools
import pickle
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metrics import log_win_probability
from model_profiling import ModelTower
from rankrouter import Metadata, RankRouter, RouterConfig
from support.encoding.encoder import QueryEncoder
from support.routing.new_model import vector_from_battles
from support.system.errors import UserError

SMALL = {"embedding_dim": 16, "num_clusters": 4, "cluster_dim": 3, "capability_dim": 5, "dropout": 0.1}
NAMES = ["org/a", "b, c", "\U0001f999"]
ARGS = {"pooling": "mean", "max_length": 512, "seed": 42, "finetune_encoder": False}


def some_metadata(**changes):
    """Valid metadata of a trained router."""
    values = {
        "args": dict(ARGS),
        "encoder": {"width": 8, "path": "encoder", "fingerprint": "f", "dtype": "float32"},
        "content_hash": "c",
        "profiles": {"kind": "random"},
        "seen_queries": torch.tensor([1, 2]),
        "temperature": 1.5,
        "best_single_model": "b, c",
    }
    return Metadata(**values | changes)


def make(names=NAMES, **changes):
    """A router with random weights, and standardized embeddings with their clusters."""
    torch.manual_seed(0)
    router = RankRouter(names, 8, RouterConfig(**SMALL | {"zero_init": False} | changes))
    router.metadata = some_metadata()
    embeddings = torch.randn(60, 8) * 10
    router.query_tower.fit(embeddings, seed=0)
    x = router.query_tower.standardize(embeddings)
    return router.eval(), x, router.query_tower.assign(x)


def mlp(block, x):
    return torch.relu(x @ block[0].weight.T + block[0].bias) @ block[3].weight.T + block[3].bias


def test_scores_equal_a_loop_over_queries_and_models():
    # A dot product is divided by the root of its width, 4, unless that is switched off; a cosine starts at 10.
    for changes in ({}, {"scale_dot": False}, {"similarity_metric": "cosine"}):
        router, x, cluster_idx = make(**changes)
        scores = router(x, cluster_idx)
        assert scores.shape == (60, 3)
        query_tower, model_tower = router.query_tower, router.model_tower
        for i, j in itertools.product((0, 7, 59), range(3)):
            semantic = query_tower.semantic.weight @ x[i] + query_tower.semantic.bias
            q = mlp(query_tower.mlp, torch.cat([semantic, query_tower.cluster.weight[cluster_idx[i]]]))
            m = mlp(model_tower.mlp, torch.cat([model_tower.capability.weight[j], model_tower.model_id.weight[j]]))
            divisor = q.norm() * m.norm() / 10 if "similarity_metric" in changes else 1 if changes else 4
            torch.testing.assert_close(scores[i, j], q @ m / divisor, atol=1e-5, rtol=1e-5)


def test_all_queries_have_equal_scores_before_training():
    for similarity in ("dot", "cosine"):
        router, x, cluster_idx = make(similarity_metric=similarity, zero_init=True)
        scores = router.score(x, cluster_idx)
        assert np.ptp(scores, axis=0).max() == 0, similarity
        assert np.ptp(scores, axis=1).min() > 0, similarity  # yet a gradient leads to every model's vector
        random_init, *_ = make(similarity_metric=similarity)
        assert np.ptp(random_init.score(x, cluster_idx), axis=0).min() > 0, similarity


def test_the_cosine_scale_is_learned_and_stays_positive():
    router, x, cluster_idx = make(similarity_metric="cosine")
    (-router(x, cluster_idx).sum()).backward()
    assert router.log_scale.grad != 0
    with torch.no_grad():
        router.log_scale -= 20
    assert 0 < router(x, cluster_idx).abs().max() < 1e-6


def test_parts_of_the_model_tower_can_be_left_out():
    assert ModelTower(3, use_model_id=False).model_id is None
    assert ModelTower(3, use_capability=False).capability is None
    for changes in ({"use_model_id": False}, {"use_capability": False}):
        router, x, cluster_idx = make(**changes)
        assert router(x, cluster_idx).shape == (60, 3)
    with pytest.raises(ValueError, match="capability vectors, ID embeddings, or both"):
        ModelTower(3, use_capability=False, use_model_id=False)


def test_a_checkpoint_keeps_its_surface_features_and_names_those_that_are_no_longer_computed(tmp_path):
    path, names = tmp_path / "best_model.pt", ("words", "digits")
    for features in (names, ("words", "gone\n")):
        router = RankRouter(NAMES, 8, RouterConfig(**SMALL, surface_features=features))
        router.metadata = some_metadata()
        router.query_tower.fit(torch.randn(60, 10), seed=0)
        router.save(path)
        if features == names:
            loaded = RankRouter.load(path)
            assert loaded.config.surface_features == names
            loaded.encoder = SimpleNamespace(device="cpu", embed=lambda queries: (torch.zeros(len(queries), 8), 0))
            x, _ = loaded.embed(["a b 1", "22"])
            expected = torch.tensor([[3 / 5, 1 / 5], [1 / 2, 1.0]])
            scale, mean = loaded.query_tower.scale[8:], loaded.query_tower.mean[8:]
            torch.testing.assert_close(x[:, 8:] * scale + mean, expected)
        else:
            with pytest.raises(UserError, match="this version does not compute: gone; expected") as e:
                RankRouter.load(path)
            assert "\n" not in str(e.value)
    # One of before there were any.
    router, x, cluster_idx = make()
    router.save(path)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["config"]["surface_features"]
    torch.save(checkpoint, path)
    assert torch.equal(RankRouter.load(path)(x, cluster_idx), router(x, cluster_idx))


def test_a_checkpoint_is_read_bit_for_bit_as_it_was_written(tmp_path):
    for changes in (
        *({}, {"similarity_metric": "cosine"}, {"num_clusters": 0}, {"use_model_id": False}, {"use_capability": False}),
        *({"scale_dot": False}, {"zero_init": True}, {"id_dropout": 0.0}),
    ):
        router, x, cluster_idx = make(**changes)
        added = [{"model": "\U0001f999"}]
        router.metadata = some_metadata(epoch=3, step=7, val_metrics={"auc": 0.6}, added_models=added)
        router.save(tmp_path / "best_model.pt")
        loaded = RankRouter.load(tmp_path / "best_model.pt")
        assert loaded.model_names == NAMES
        assert loaded.config == router.config, changes
        found, expected = vars(loaded.metadata), vars(router.metadata)
        assert torch.equal(found.pop("seen_queries"), expected.pop("seen_queries"))
        assert found == expected
        assert not loaded.training
        assert torch.equal(loaded.query_tower.assign(x), cluster_idx), changes
        assert torch.equal(loaded(x, cluster_idx), router(x, cluster_idx)), changes


def test_a_new_model_leaves_the_scores_of_the_others_as_they_are_to_the_last_bit():
    for similarity, num_models in itertools.product(("dot", "cosine"), (3, 31, 32, 33)):
        router, *_ = make([f"m{i}" for i in range(num_models)], similarity_metric=similarity)
        x, zeros = torch.randn(500, 8), torch.zeros(500, dtype=torch.int64)
        before = router.score(x, zeros)
        assert before.shape == (500, num_models)
        np.testing.assert_allclose(before, router(x, zeros).detach(), atol=1e-5)
        for added in range(3):
            router.add_model(f"new{added}", torch.randn(5))
            after = router.score(x, zeros)
            assert np.array_equal(after[:, :num_models], before), (similarity, num_models, added)
            np.testing.assert_allclose(after, router(x, zeros).detach(), atol=1e-5)


def test_a_new_model_that_cannot_be_added_changes_nothing():
    nan, inf = float("nan"), float("inf")
    for name, vector, message, changes in (
        ("b, c", [0.0] * 5, "knows b, c already", {}),
        ("new", [0.0] * 5, "--no_capability", {"use_capability": False}),
        ("new", [nan] * 5, "nothing is known of new", {}),
        ("new", [0.0] * 4, "5 finite values", {}),
        ("new", [[0.0] * 5], "5 finite values", {}),
        ("new", [inf] * 5, "5 finite values", {}),
    ):
        router, *_ = make(**changes)
        with pytest.raises(UserError, match=message):
            router.add_model(name, torch.tensor(vector))
        assert (router.model_names, router.metadata.added_models) == (NAMES, []), vector


@pytest.mark.parametrize("changes", [{}, {"similarity_metric": "cosine"}, {"use_model_id": False}, {"id_dropout": 0.0}])
def test_a_vector_fitted_to_battles_has_the_highest_posterior(changes):
    router, x, cluster_idx = make(**changes)
    router.metadata = some_metadata(temperature=2.0)
    opponents, outcome = torch.arange(60) % 3, (torch.arange(60) % 4 != 0).double()
    battles = x, cluster_idx, opponents, outcome
    vectors = router.model_tower.capability.weight.detach().double()
    state = {name: tensor.clone() for name, tensor in router.state_dict().items()}

    def loss(vector, spread):
        """The negative log posterior, by the matrix of scores with the vector in its place."""
        wider = copy.deepcopy(router)
        wider.model_names.append("new")
        wider.model_tower.add_model(vector.float())
        scores = wider.score(x, cluster_idx)
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
    router, x, cluster_idx = make(capability_dim=4)
    known = torch.tensor([[1.0] * 4, [0.0] * 4, [-1.0] * 4]).double()
    router.metadata = some_metadata(profiles={"kind": "win_rate", "known": known})
    opponents = torch.arange(60) % 3
    won, lost = (
        vector_from_battles(router, x, cluster_idx, opponents, torch.full((60,), y).double()) for y in (1.0, 0.0)
    )
    assert (won > 0.5).all()
    assert (lost < -0.5).all()
    router.add_model("new", won)
    torch.testing.assert_close(router.metadata.profiles["known"], torch.cat([known, won[None]]))


def test_the_fit_is_finite_where_all_capability_vectors_are_equal():
    router, x, cluster_idx = make(use_model_id=False)
    with torch.no_grad():
        router.model_tower.capability.weight.fill_(0.5)
    vector = vector_from_battles(router, x, cluster_idx, torch.arange(60) % 3, torch.ones(60).double())
    torch.testing.assert_close(vector, torch.full((5,), 0.5).double())


def test_a_ranking_uses_the_current_weights():
    router, x, cluster_idx = make()
    router.embed = lambda queries, read: (x, cluster_idx)

    def step():
        optimizer = torch.optim.AdamW(router.train().parameters(), lr=0.01, fused=True)
        router(x, cluster_idx).square().sum().backward()
        optimizer.step()

    for change in (
        step,
        lambda: router.load_state_dict({name: 2 * tensor for name, tensor in router.state_dict().items()}),
        lambda: router.add_model("new", torch.ones(5)),
    ):
        before = router.scores_of([])
        change()
        after = router.scores_of([])
        assert np.array_equal(after, router.score(x, cluster_idx))
        assert after.shape != before.shape or not np.allclose(after, before, atol=1e-3)


def test_a_checkpoint_holds_plain_tensors_and_types(tmp_path):
    router, _, _ = make()
    router.save(tmp_path / "best_model.pt")
    checkpoint = torch.load(tmp_path / "best_model.pt", weights_only=True)
    keys = {"format_version", "model_state_dict", "model_names", "config"}
    assert set(checkpoint) == keys | {each.name for each in fields(Metadata)}
    assert checkpoint["format_version"] == 4
    assert checkpoint["config"] == asdict(router.config)
    state = checkpoint["model_state_dict"]
    for name in ("mean", "scale", "centroids"):  # what routing needs beyond the weights
        assert torch.equal(state[f"query_tower.{name}"], getattr(router.query_tower, name))


def test_a_router_is_built_in_one_line_scores_ranks_saves_and_loads(demo, tmp_path):
    router = RankRouter(["model-a", "model-b"], encoder_width=128, config=RouterConfig(num_clusters=2, zero_init=False))
    encoder = QueryEncoder(str(demo / "encoder"), torch.device("cpu"), pooling="last", max_length=9, dtype="float32")
    queries = ["Who ruled Rome?", "Prove it. " * 9, "lentil soup"]
    embeddings, _ = encoder.embed(queries)
    router.query_tower.fit(embeddings, seed=0)
    x = router.query_tower.standardize(embeddings)
    scores = router.score(x, router.query_tower.assign(x))
    assert scores.shape == (3, 2)
    assert len(np.unique(scores)) == 6

    args = ARGS | {"pooling": "last", "max_length": 9}
    router.metadata = some_metadata(args=args, encoder=encoder.metadata, best_single_model="model-a")
    router.save(tmp_path / "router.pt")
    for each in (router, RankRouter.load(tmp_path / "router.pt")):
        for row, ranking in zip(scores, each.rank(queries), strict=True):
            assert [name for name, _ in ranking] == [router.model_names[i] for i in np.argsort(-row)]
            np.testing.assert_allclose([score for _, score in ranking], np.sort(row)[::-1], atol=1e-6)

    with pytest.raises(UserError, match="--loss_type pointwise"):
        router.expected_scores(queries)
    router.metadata = replace(router.metadata, label_range=[-2.0, 8.0], label_temperature=2.0)
    router.save(tmp_path / "router.pt")
    expected = RankRouter.load(tmp_path / "router.pt").expected_scores(queries)
    np.testing.assert_allclose(expected, -2 + 10 / (1 + np.exp(-scores / 2)), atol=1e-5)


NOT_PRESENT = object()
DAMAGED = [  # places in a checkpoint, and the value that is put there
    *(((each.name,), NOT_PRESENT) for each in fields(Metadata) if not each.name.startswith(("label_", "confidence"))),
    *((("confidence",), value) for value in (0.4, 1.1, float("nan"), 1, "0.5")),
    *((("label_range",), value) for value in ([1.0, 1.0], [0.0], [0, 1], [0.0, float("inf")], [0.0, 1.0])),
    (("config",), NOT_PRESENT),
    (("model_state_dict", "query_tower.centroids"), NOT_PRESENT),
    *((("args", name), NOT_PRESENT) for name in ("max_length", "pooling", "seed")),
    *((("encoder", name), NOT_PRESENT) for name in ("path", "fingerprint", "dtype")),
    *((("temperature",), value) for value in (0.0, -1.0, float("nan"), float("inf"), "1")),
    (("best_single_model",), "stranger"),
    (("model_names",), ["a", "a", "b"]),
    (("model_names",), "abc"),
    (("profiles",), {"kind": "win_rate"}),
    (("profiles",), {"kind": "win_rate", "known": torch.zeros(2, 5)}),
    (("profiles",), {"kind": "file", "columns": ["x"], "mean": [0.0], "scale": [1.0]}),
    (("seen_queries",), torch.zeros(3)),
    (("args", "seed"), "x"),
    (("config", "scale_dot"), "False"),
    (("config", "zero_init"), 0),
    (("config", "similarity_metric"), "euclid"),
    (("config", "embedding_dim"), 0),
    (("config", "embedding_dim"), 17),
    (("config", "unknown_field"), 1),
    (("encoder", "dtype"), 3),
    (("model_state_dict", "query_tower.mean"), torch.full((8,), float("nan"))),
    (("model_state_dict", "query_tower.mean"), torch.zeros(9)),
]


def test_a_damaged_checkpoint_is_refused_when_it_is_loaded(tmp_path):
    router, _, _ = make()
    router.save(tmp_path / "c.pt")
    for (*outer, key), value in DAMAGED:
        checkpoint = inner = torch.load(tmp_path / "c.pt", weights_only=True)
        for name in outer:
            inner = inner[name]
        inner[key] = value
        if value is NOT_PRESENT:
            del inner[key]
        torch.save(checkpoint, tmp_path / "damaged.pt")
        with pytest.raises(UserError, match=r"is (not a|a damaged) RankRouter checkpoint"):
            RankRouter.load(tmp_path / "damaged.pt")
            pytest.fail(f"{outer} {key} {value}")


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the checkpoint ran code')",))


def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path):
    router, _, _ = make()
    router.save(tmp_path / "good.pt")
    RankRouter.load(tmp_path / "good.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    good = torch.load(tmp_path / "good.pt", weights_only=True)
    torch.save(good | {"format_version": 99}, tmp_path / "newer.pt")
    not_ours = "is not a RankRouter checkpoint"
    for content, message in (
        (pickle.dumps(Payload(), protocol=2), not_ours),
        (b"hello", not_ours),
        ((tmp_path / "good.pt").read_bytes()[:-500], not_ours),
        (b"", not_ours),
        ((tmp_path / "foreign.pt").read_bytes(), not_ours),
        ((tmp_path / "newer.pt").read_bytes(), "format 99, expected 4"),
        (None, "cannot read the checkpoint"),
    ):
        path = tmp_path / "best_model.pt"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            RankRouter.load(path)
        assert message in str(error.value), content
        assert "weights_only" not in str(error.value)  # torch's advice to open it all the same
        assert "\n" not in str(error.value)


def test_a_config_that_means_nothing_is_refused():
    for name, value in (("similarity_metric", "Cosine"), ("embedding_dim", 0)):
        with pytest.raises(ValueError, match=f"{name} is"):
            RouterConfig(**{name: value})


def test_a_router_without_training_says_so_and_can_be_copied():
    router = RankRouter(NAMES, 8, RouterConfig(**SMALL))
    for use in (lambda: router.temperature, lambda: router.rank(["q"]), lambda: router.add_model("new", torch.ones(5))):
        with pytest.raises(UserError, match="is not trained"):
            use()
    with pytest.raises(UserError, match="expected a list of names"):
        router.rank(["q"], models="b, c")
    again = pickle.loads(pickle.dumps(router))
    assert again.model_names == NAMES
