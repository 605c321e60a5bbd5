"""Training an encoder: what is trainable, the batches of its queries, the centroids, gradients and learning rates."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AlbertConfig, AlbertModel, BartConfig, BartModel, BertConfig, BertModel

import train
from data_loader import load_battles, split_battles
from loss import bpr
from query_representation import query_features
from rankrouter import RankRouter, RouterConfig
from support.data.battles import ScoreTable
from support.encoding.encoder import QueryEncoder
from support.encoding.huggingface import load_encoder
from support.encoding.lora import load_weights, make_trainable, weights_hash
from support.system.errors import UserError
from support.training.batches import QueryBatches
from support.training.checkpoint import TrainingState
from support.training.history import LearningCurves
from support.training.items import make_items
from support.training.optimization import EMA, make_optimizer

CPU = torch.device("cpu")


@pytest.fixture
def network(demo):
    return load_encoder(demo / "encoder", CPU, torch.float32)[1]


@pytest.fixture
def made(demo):
    """Makes batches on some battles of the demo, and the router that they train; each step in `accumulate` parts."""

    def make(accumulate=1, tokens=300, clusters=3, gradient_checkpointing=False, rows=False):
        torch.manual_seed(0)
        split = split_battles(load_battles(str(demo / "battles.parquet"), limit=120)[0], 42)[0]
        if rows:  # of a score table, beside the single battles
            of_row = np.random.default_rng(0).choice(split.train.unique_queries, 50)
            scores = np.random.default_rng(1).integers(3, size=(50, len(split.train.model_names))) / 2
            split = replace(split, train=replace(split.train, table=ScoreTable(of_row, scores), ties=False))
        config = RouterConfig(num_clusters=clusters, embedding_dim=8, dropout=0.0, id_dropout=0.0, zero_init=False)
        config = replace(config, surface_features=("words", "question_marks"))
        encoder = QueryEncoder(demo / "encoder", CPU, dtype="float32", progress=False)
        embeddings, _ = encoder.embed(split.train.queries)
        router = RankRouter(split.train.model_names, embeddings.shape[1], config)
        features = query_features(split.train.queries, embeddings, config.surface_features)
        router.query_tower.fit(features[torch.from_numpy(split.train.unique_queries)], 0)
        _, cluster_idx = router.query_tower.inputs(features)
        trainable = encoder.trainable(None, None, gradient_checkpointing)
        items, options = make_items(split.train, CPU, None), {"tokens": tokens, "accumulate": accumulate}
        batches = QueryBatches(split.train, items, router, cluster_idx, trainable, **options)
        return batches, router, split

    return make


def state_of(router, batches, optimizer):
    return TrainingState(router, batches, optimizer, EMA([], 0.0), LearningCurves(), epochs=2)


def shuffled(batches):
    """The batches of an epoch."""
    return batches.plan(torch.randperm(batches.count))


def test_the_last_layers_are_trainable_and_a_pooler_never(network):
    config = BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    bert = BertModel(config).requires_grad_(False)
    for encoder, layers, expected in (
        (network, 1, ("layers.1.",)),
        (bert, 2, ("encoder.layer.1.", "encoder.layer.2.")),
        (bert, None, ("embeddings.", "encoder.layer.")),
    ):
        named = dict(encoder.requires_grad_(False).named_parameters())
        trainable = make_trainable(encoder, layers, None)
        assert set(trainable) == {name for name in named if name.startswith(expected)}, expected
        assert {name for name, parameter in named.items() if parameter.requires_grad} == set(trainable), expected


def test_adapters_at_all_linear_maps_start_as_zero_and_are_all_that_is_trainable(network):
    ids = torch.arange(12).view(2, 6)
    before = network(ids).last_hidden_state
    trainable = make_trainable(network, None, 3)
    assert torch.equal(network(ids).last_hidden_state, before)
    maps = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(trainable) == 2 * 2 * len(maps)  # layers, A and B
    assert {name.split(".")[3] for name in trainable} == set(maps)
    with torch.no_grad():
        layer = network.layers[0].mlp.up_proj
        layer.up.copy_(torch.randn_like(layer.up))
    x = torch.randn(4, layer.linear.in_features)
    expected = x @ (layer.linear.weight + layer.up @ layer.down).T  # W + B A, merged
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_weights_are_known_by_names_shapes_and_values_and_others_do_not_fit(network):
    weights = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [{"a": torch.zeros(3, 2), "b": torch.ones(2)}, {"a": torch.zeros(2, 3), "c": torch.ones(2)}]
    others += [{"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 1.0 + 1e-7])}]
    assert len({weights_hash(one) for one in (weights, *others)}) == 4
    assert weights_hash(dict(reversed(weights.items()))) == weights_hash(weights)
    trainable = make_trainable(network, 1, None)
    with pytest.raises(UserError, match="do not fit its encoder"):
        load_weights(trainable, {name: tensor[:1] for name, tensor in trainable.items()})


@pytest.mark.parametrize("rows", [False, True])
def test_an_epoch_has_each_query_once_with_all_its_battles_within_the_budget(made, rows):
    batches, _, split = made(rows=rows)
    battles, orders = split.train, []
    train_queries = battles.unique_queries
    for _ in range(3):
        planned = shuffled(batches)
        flat = np.concatenate(planned)
        orders.append(tuple(flat))
        assert sorted(flat) == list(range(len(train_queries)))
        assert all(len(batch) * batches.lengths[batch].max() <= 300 or len(batch) == 1 for batch in planned)
        seen = []
        for batch in planned:
            ((queries, row, models, outcome),) = batches.parts(batch)
            assert batches.num_battles(batch) == len(outcome)
            a, b = torch.where(outcome > 0, models.T, models.T.flip(0)).tolist()  # a won
            seen += zip(train_queries[queries[row]], a, b, strict=True)
        expected = []
        for pairs in battles.chunks():
            a_won = pairs.outcome == 1
            a, b = (np.where(a_won, *models) for models in (pairs[1:3], pairs[2:0:-1]))
            expected += zip(train_queries[pairs.row], a, b, strict=True)
        assert sorted(seen) == sorted(expected)
    assert len(set(orders)) == 3


def test_batches_of_similar_length_are_shuffled(made):
    batches, *_ = made()
    batches.lengths = np.random.default_rng(0).geometric(1 / 40, 20_000).clip(3, 256)
    batches.count, batches.tokens = 20_000, 2048
    positions = []
    for _ in range(2):
        planned = shuffled(batches)
        padded = sum(len(batch) * batches.lengths[batch].max() for batch in planned)
        assert batches.lengths.sum() / padded > 0.85
        position = np.empty(20_000)
        position[np.concatenate(planned)] = np.repeat(np.arange(len(planned)), [len(batch) for batch in planned])
        assert (
            abs(np.corrcoef(position, batches.lengths)[0, 1]) < 0.2
        )  # four standard errors with 400 batches; 1 in order of length
        positions.append(position)
    assert abs(np.corrcoef(*positions)[0, 1]) < 0.05


def test_a_step_has_the_gradient_of_the_mean_over_its_battles(made):
    for options in ({"accumulate": 1}, {"accumulate": 3}, {"accumulate": 2, "gradient_checkpointing": True}):
        batches, router, _ = made(**options)
        batch, parameters = shuffled(batches)[0], [*router.parameters(), *batches.parameters.values()]
        # Each battle by itself, its query encoded for it alone.
        total = 0.0
        for query in batch:
            queries, _, models, outcomes = batches._with_battles(torch.tensor([query]))
            x, cluster_idx = batches.inputs(queries)
            for (a, b), outcome in zip(models, outcomes, strict=True):
                scores = router(x, cluster_idx)[0]
                total = total + bpr(scores[a], scores[b], outcome, 1.0)
        expected = torch.autograd.grad(total / batches.num_battles(batch), parameters)
        batches.cluster_sums[0].zero_()
        args = train.parse_args(["--demo", "--finetune_encoder", "--max_grad_norm", "1e9"])
        state = state_of(router, batches, torch.optim.SGD([{"params": parameters, "lr": 0.0, "peak_lr": 0.0}]))
        state.planned = [batch]
        loss = train.train_step(args, state, batch)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-3, msg=f"{options}")
        assert loss.item() == pytest.approx(total.item() / batches.num_battles(batch), rel=1e-5), options


def test_a_constant_dimension_does_not_make_gradients_explode(made):
    batches, router, split = made()
    router.query_tower.scale[5] = 1e-30  # as two dimensions of MiniLM have it
    again = QueryBatches(
        split.train,
        batches.items,
        router,
        torch.zeros(len(split.train.queries), dtype=torch.int64),
        batches.encoder,
        tokens=300,
        accumulate=1,
    )
    again.inputs(torch.arange(4))[0].sum().backward()
    assert max(float(p.grad.abs().max()) for p in again.parameters.values()) < 1e6


def test_a_centroid_is_the_running_mean_of_its_own_queries(made):
    batches, *_ = made()
    tower, before = batches.tower, batches.tower.centroids.clone()
    members = (batches.cluster_of_query == 1).nonzero()[:, 0]
    with torch.no_grad():
        for parameter in batches.parameters.values():  # the encoder has moved
            parameter.mul_(1.05)
        chosen = members[:4]
        x, _ = batches.inputs(chosen)
    batches.update_centroids()
    size = min(50, len(members))
    kept = (1 - 1 / size) ** 4
    expected = kept * before[1] + (1 - kept) * x.mean(0)
    torch.testing.assert_close(tower.centroids[1], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(tower.centroids[[0, 2]], before[[0, 2]])
    assert not batches.cluster_sums[0].any()


def test_learning_rates_follow_the_schedule_and_gradients_are_clipped_together(made):
    batches, router, _ = made()
    args = train.parse_args(["--demo", "--finetune_encoder", "--warmup", "0.25", "--max_grad_norm", "0.01"])
    parameters = [*router.parameters(), *batches.parameters.values()]
    optimizer = make_optimizer(
        router.parameters(), batches.parameters.values(), lr=0.2, encoder_lr=5e-5, weight_decay=0.0
    )
    state, rates = state_of(router, batches, optimizer), []
    for batch in state.remaining_batches():
        before = [parameter.clone() for parameter in parameters]
        state.record(train.train_step(args, state, batch))
        rates.append([group["lr"] for group in optimizer.param_groups])
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item()
        assert norm == pytest.approx(0.01, rel=1e-3)
        assert not all(map(torch.equal, before, parameters))
    steps = len(state.planned)
    middles = (np.arange(steps) + 0.5) / (2 * steps)  # of two epochs
    factors = np.minimum(middles / 0.25, (1 - middles) / 0.75)
    np.testing.assert_allclose(rates, np.outer(factors, [0.2, 5e-5]), rtol=1e-12)


def test_gradient_checkpointing_leaves_dropout_off(demo, tmp_path):
    ignored = shutil.ignore_patterns("config.json", "*.safetensors")
    shutil.copytree(demo / "encoder", tmp_path / "bart", ignore=ignored)
    shutil.copytree(demo / "encoder", tmp_path / "albert", ignore=ignored)
    sizes = {"encoder_layers": 2, "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "encoder_layerdrop": 0.5}
    BartModel(BartConfig(vocab_size=4096, d_model=16, decoder_layers=1, dropout=0.5, **sizes)).save_pretrained(
        tmp_path / "bart"
    )
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    AlbertModel(AlbertConfig(vocab_size=4096, **small)).save_pretrained(tmp_path / "albert")
    bart, albert = (QueryEncoder(tmp_path / name, CPU, dtype="float32", progress=False) for name in ("bart", "albert"))
    trainable = bart.trainable(None, None, gradient_checkpointing=True)
    expected, _ = bart.embed(["a text", "another one"])
    got = trainable.embed_tokens(trainable.tokenize(["a text", "another one"]))
    torch.testing.assert_close(got, expected)
    with pytest.raises(UserError, match="--gradient_checkpointing: AlbertModel does not support"):
        albert.trainable(None, None, gradient_checkpointing=True)


def test_gradient_checkpointing_keeps_fewer_hidden_states(made):
    kept = {}
    for on in (False, True):
        batches, *_ = made(gradient_checkpointing=on)
        count = []

        def pack(x, count=count):
            count.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            batches.inputs(torch.arange(8))
        kept[on] = sum(count)
    assert kept[True] < 0.6 * kept[False]
