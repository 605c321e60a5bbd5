"""An encoder that is trained with the towers: what is trainable, the batches, the clusters, and what is saved."""

import json
import signal

import numpy as np
import pytest
import torch
from conftest import after_step, every_step, kill

import route
import train
from data_loader import load_battles, split_battles
from loss import bpr
from query_representation import QueryEncoder
from rankrouter import RankRouter, RouterConfig
from support.encoding.huggingface import load_encoder
from support.encoding.lora import load_weights, make_trainable, weights_hash
from support.reporting.runs import parse
from support.system.command_line import run_command
from support.system.errors import UserError
from support.system.safe_torch import write_checkpoint
from support.training.batches import QueryBatches
from support.training.checkpoint import TrainingState
from support.training.history import LearningCurves
from support.training.optimization import EMA, make_optimizer

CPU = torch.device("cpu")
WAYS = {"whole": [], "layers": ["--finetune_layers", "1"], "lora": ["--lora_rank", "2", "--encoder_lr", "0.001"]}


@pytest.fixture(scope="module")
def flags(small):
    """Flags of a run that takes a second and trains the encoder from the first step."""
    return [*small, "--finetune_encoder", "--batch_tokens", "300", "--tower_epochs", "0"]


@pytest.fixture
def network(demo):
    return load_encoder(demo / "encoder", CPU, torch.float32)[1]


@pytest.fixture
def made(flags, demo):
    """Makes batches on the data of `small`, and the router that they train; each step in `accumulate` parts."""

    def make(accumulate=1, tokens=300, clusters=3, gradient_checkpointing=False):
        torch.manual_seed(0)
        split = split_battles(load_battles(flags[1])[0], 42)[0]
        config = RouterConfig(num_clusters=clusters, embedding_dim=8, dropout=0.0, id_dropout=0.0, zero_init=False)
        encoder = QueryEncoder(demo / "encoder", CPU, dtype="float32", progress=False)
        embeddings, _ = encoder.embed(split.train.queries)
        router = RankRouter(split.train.model_names, embeddings.shape[1], config)
        tower = router.query_tower
        tower.fit(embeddings[torch.from_numpy(split.train.unique_queries)], 0)
        cluster_idx = tower.assign(tower.standardize(embeddings))
        trainable = encoder.trainable(None, None, gradient_checkpointing)
        batches = QueryBatches(split.train, tower, cluster_idx, trainable, tokens=tokens, accumulate=accumulate)
        return batches, router, split

    return make


def state_of(router, batches, optimizer):
    return TrainingState(router, batches, optimizer, EMA([], 0.0), LearningCurves(), epochs=2)


def shuffled(batches):
    """The batches of an epoch."""
    return batches.plan(torch.randperm(batches.count))


def history_of(output):
    return json.loads((output / "training_history.json").read_text())


def trained(output):
    return RankRouter.load(output / "best_model.pt").metadata.trained["weights"]


# --- what is trainable ---------------------------------------------------------------------------------------------


def test_only_the_last_layers_are_trainable(network):
    trainable = make_trainable(network, 1, None)
    assert all(name.startswith("layers.1.") for name in trainable)
    assert sum(p.requires_grad for p in network.parameters()) == len(trainable) == 12


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


def test_a_pooler_is_not_trainable():
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32))
    trainable = make_trainable(bert.requires_grad_(False), None, None)
    assert "encoder.layer.0.output.dense.weight" in trainable
    assert not any("pooler" in name for name in trainable)
    assert set(make_trainable(bert.requires_grad_(False), 2, None)) == {
        name for name, _ in bert.named_parameters() if name.startswith(("encoder.layer.1.", "encoder.layer.2."))
    }


def test_the_hash_of_weights_depends_on_names_shapes_and_values():
    weights = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [{"a": torch.zeros(3, 2), "b": torch.ones(2)}, {"a": torch.zeros(2, 3), "c": torch.ones(2)}]
    others += [{"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 1.0 + 1e-7])}]
    assert len({weights_hash(one) for one in (weights, *others)}) == 4
    assert weights_hash(dict(reversed(weights.items()))) == weights_hash(weights)


# --- batches -------------------------------------------------------------------------------------------------


def test_an_epoch_has_each_query_once_with_all_its_battles_within_the_budget(made):
    batches, _, split = made()
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
            seen += zip(train_queries[queries[row]], *models.T.tolist(), outcome.tolist(), strict=True)
        sides = (battles.query_idx, battles.model_a_idx, battles.model_b_idx, battles.outcome)
        assert sorted(seen) == sorted(zip(*(side.tolist() for side in sides), strict=True))
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
        assert abs(np.corrcoef(position, batches.lengths)[0, 1]) < 0.1
        positions.append(position)
    assert abs(np.corrcoef(*positions)[0, 1]) < 0.05


@pytest.mark.parametrize(
    "options", [{"accumulate": 1}, {"accumulate": 3}, {"accumulate": 2, "gradient_checkpointing": True}]
)
def test_a_step_has_the_gradient_of_the_mean_over_its_battles(made, options):
    batches, router, _ = made(**options)
    batch, parameters = shuffled(batches)[0], [*router.parameters(), *batches.parameters.values()]
    # Each battle by itself, its query encoded for it alone.
    total = 0.0
    for query in batch:
        queries, _, models, outcomes = batches._with_battles(torch.tensor([query]))
        x, cluster_idx = batches.embed(queries)
        for (a, b), outcome in zip(models, outcomes, strict=True):
            scores = router(x, cluster_idx)[0]
            total = total + bpr(scores[a], scores[b], outcome, 1.0)
    expected = torch.autograd.grad(total / batches.num_battles(batch), parameters)
    batches.cluster_sums[0].zero_()
    args = train.parse_args(["--demo", "--finetune_encoder", "--max_grad_norm", "1e9"])
    optimizer = torch.optim.SGD([{"params": parameters, "lr": 0.0, "peak_lr": 0.0}])
    state = state_of(router, batches, optimizer)
    state.planned = [batch]
    loss = train.train_step(args, state, batch)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-3)
    assert loss.item() == pytest.approx(total.item() / batches.num_battles(batch), rel=1e-5)


def test_a_constant_dimension_does_not_make_gradients_explode(made):
    batches, router, split = made()
    router.query_tower.scale[5] = 1e-30  # as two dimensions of MiniLM have it
    again = QueryBatches(
        split.train,
        router.query_tower,
        torch.zeros(len(split.train.queries), dtype=torch.int64),
        batches.encoder,
        tokens=300,
        accumulate=1,
    )
    again.embed(torch.arange(4))[0].sum().backward()
    assert max(float(p.grad.abs().max()) for p in again.parameters.values()) < 1e6


def test_a_centroid_is_the_running_mean_of_its_own_queries(made):
    batches, *_ = made()
    tower, before = batches.tower, batches.tower.centroids.clone()
    members = (batches.cluster_of_query == 1).nonzero()[:, 0]
    with torch.no_grad():
        for parameter in batches.parameters.values():  # the encoder has moved
            parameter.mul_(1.05)
        chosen = members[:4]
        x, _ = batches.embed(chosen)
    batches.update_centroids()
    size = min(50, len(members))
    kept = (1 - 1 / size) ** 4
    expected = kept * before[1] + (1 - kept) * x.mean(0)
    torch.testing.assert_close(tower.centroids[1], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(tower.centroids[[0, 2]], before[[0, 2]])
    assert not batches.cluster_sums[0].any()


def test_clusters_keep_their_queries_while_the_encoder_moves(flags, tmp_path, monkeypatch):
    initial, fit = {}, train.fit

    def watched(run, router, *args, **options):
        if options["phase"] == "encoder":
            initial.update({name: buffer.clone() for name, buffer in router.query_tower.named_buffers()})
        fit(run, router, *args, **options)

    monkeypatch.setattr(train, "fit", watched)
    train.main([*flags, "--output_dir", str(tmp_path), "--no_cache", "--encoder_lr", "0.001", "--epochs", "4"])
    router = RankRouter.load(tmp_path / "best_model.pt")
    split = split_battles(load_battles(flags[1])[0], 42)[0]
    train_queries = [split.train.queries[i] for i in split.train.unique_queries]
    router.open_encoder()
    x, now = router.embed(train_queries)
    encoder = QueryEncoder(router.metadata.encoder["path"], CPU, dtype="float32", progress=False)
    first = (encoder.embed(train_queries)[0] - initial["mean"]) / initial["scale"]
    then = torch.cdist(first, initial["centroids"]).argmin(1)
    stale = torch.cdist(x, initial["centroids"]).argmin(1)
    assert (x - first).norm() > first.norm()  # it has moved far
    assert (now == then).float().mean() > max(0.6, (stale == then).float().mean() + 0.05)
    moved = torch.stack([x[then == k].mean(0) for k in range(3)])
    own = (moved - router.query_tower.centroids).norm(dim=1)
    stayed = (moved - initial["centroids"]).norm(dim=1)
    assert (own < stayed).all()


# --- the towers first ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", ["random", "win_rate"])
def test_the_encoder_is_trained_from_the_best_validation_of_its_towers(small, flags, tmp_path, monkeypatch, vectors):
    if vectors == "win_rate":
        place = small.index("--capability_dim")
        small = [*small[:place], *small[place + 2 :], "--capability_init", "win_rate"]
        flags = [*small, *flags[len(small) :]]
    train.main([*small, "--epochs", "2", "--eval_every", "2", "--output_dir", str(tmp_path / "frozen")])
    initial, train_step = [], train.train_step

    def watched(args, state, batch):
        if state.batches.parameters and not initial:
            initial.append({name: weight.clone() for name, weight in state.router.state_dict().items()})
        return train_step(args, state, batch)

    monkeypatch.setattr(train, "train_step", watched)
    alone = ["--tower_epochs", "2", "--eval_every", "2", "--epochs", "1"]
    train.main([*flags, *alone, "--output_dir", str(tmp_path / "trained")])
    frozen, both = history_of(tmp_path / "frozen"), history_of(tmp_path / "trained")
    assert {name: frozen[name] for name in both["towers_alone"]} == both["towers_alone"]
    kept = RankRouter.load(tmp_path / "frozen" / "best_model.pt").state_dict()
    assert all(torch.equal(initial[0][name], kept[name]) for name in kept)


def test_the_number_of_tower_epochs_does_not_change_the_random_numbers_of_the_encoders_training(
    flags, tmp_path, monkeypatch
):
    orders, plan = [], QueryBatches.plan

    def watched(batches, order):
        orders.append(order)
        return plan(batches, order)

    monkeypatch.setattr(QueryBatches, "plan", watched)
    for tower_epochs in ("0", "2"):
        train.main([*flags, "--tower_epochs", tower_epochs, "--output_dir", str(tmp_path / tower_epochs)])
    assert len(orders) == 4
    assert all(map(torch.equal, orders[:2], orders[2:]))


# --- what is saved --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_restores_the_finetuned_encoder(flags, tmp_path, capsys, way):
    output = tmp_path / "out"
    cache = ["--cache_dir", str(tmp_path / "cache")]
    train.main([*flags, *WAYS[way], *cache, "--output_dir", str(output)])
    history, router = history_of(output), RankRouter.load(output / "best_model.pt")
    split = split_battles(load_battles(flags[1])[0], 42)[0]
    test_queries = [split.test.queries[i] for i in split.test.unique_queries]
    router.open_encoder(cache_dir=None)
    x, cluster_idx = router.embed(test_queries)
    d = split.test.margins(router.score(x, cluster_idx))
    wins = np.where(split.test.outcome == 1, d > 0, d < 0) + 0.5 * (d == 0)
    assert history["test_metrics"]["accuracy"] == pytest.approx(wins.mean(), abs=1e-6)
    weights = router.metadata.trained["weights"]
    fresh = load_encoder(router.encoder.folder, CPU, torch.float32)[1]
    whole = dict(fresh.named_parameters())
    if way == "lora":
        assert all(name.endswith((".up", ".down")) for name in weights)
    else:
        assert all(
            name in whole and not torch.equal(whole[name], weights[name]) for name in weights if "norm" not in name
        )
        assert (set(weights) == set(whole)) == (way == "whole")
    # The cache keeps its embeddings apart from the pretrained encoder's.
    assert len(list((tmp_path / "cache" / "embeddings").iterdir())) == 2
    again = RankRouter.load(output / "best_model.pt")
    again.open_encoder(cache_dir=tmp_path / "cache")
    assert torch.equal(again.query_tower.assign(again.embed(split.test.queries)[0]), again.embed(split.test.queries)[1])
    torch.testing.assert_close(again.embed(test_queries)[0], x, atol=1e-4, rtol=1e-4)
    assert again.encoder.__dict__.get("loaded") is None  # all of it was read
    capsys.readouterr()
    route.main(["--checkpoint", str(output / "best_model.pt"), "--no_cache", test_queries[0]])
    best = capsys.readouterr().out.splitlines()[2].split()[1]
    assert best == router.model_names[int(router.score(x, cluster_idx)[0].argmax())]


def test_baselines_get_the_pretrained_embeddings(flags, small, tmp_path):
    for name, base in (("tuned", flags), ("frozen", small)):
        train.main([*base, "--baselines", "fast", "--output_dir", str(tmp_path / name)])
    tuned, frozen = (history_of(tmp_path / name)["baselines"] for name in ("tuned", "frozen"))
    for name in ("cluster_bradley_terry", "neighbours"):
        assert tuned[name]["auc"] == frozen[name]["auc"]


def test_training_the_encoder_fits_more_than_frozen_embeddings_do(flags, tmp_path):
    losses = {}
    for lr in ("1e-12", "0.002"):
        rates = ["--encoder_lr", lr, "--lr", "0.003", "--epochs", "8"]
        train.main([*flags, *rates, "--recipe", "original", "--output_dir", str(tmp_path / lr)])
        losses[lr] = history_of(tmp_path / lr)["train_losses"][-1]
    assert losses["0.002"] < losses["1e-12"] - 0.05


def test_towers_that_are_trained_first_are_refused_or_kept_like_everything_else(
    flags, fails, forked, tmp_path, monkeypatch
):
    every_step(monkeypatch.setattr)
    flags = [*flags, "--tower_epochs", "2", "--output_dir", str(tmp_path)]
    path = tmp_path / "last_checkpoint.pt"
    assert forked(train.main, flags, after_step(3), kill)[0] == -signal.SIGKILL
    before = path.read_bytes()
    assert torch.load(path)["phase"] == "towers"
    assert "holds an unfinished run" in fails(*flags)
    assert "--lr was 0.0001, is 0.5" in fails(*flags, "--resume", "--lr", "0.5")
    assert "--tower_epochs was 2, is 1" in fails(*flags, "--resume", "--tower_epochs", "1")
    assert path.read_bytes() == before
    path.write_bytes(before[:-9])
    assert "is not a RankRouter checkpoint" in fails(*flags, "--resume")
    path.write_bytes(before)
    train.main([*flags, "--resume"])
    assert torch.load(path)["phase"] == "encoder"


def test_more_epochs_are_another_schedule_and_are_refused(flags, fails, tmp_path):
    train.main([*flags, "--output_dir", str(tmp_path)])
    message = fails(*flags, "--output_dir", str(tmp_path), "--resume", "--epochs", "5")
    assert "--epochs was 2, is 5" in message


def test_an_invalid_trained_weight_is_refused(flags, tmp_path, capsys):
    train.main([*flags, "--finetune_layers", "1", "--output_dir", str(tmp_path)])
    content = torch.load(tmp_path / "best_model.pt")
    some = next(iter(content["trained"]["weights"]))
    spoiled = {
        "nan": {some: torch.full_like(content["trained"]["weights"][some], torch.nan)},
        "shape": {some: torch.zeros(3)},
        "name": {"another": torch.zeros(3)},
        "kind": {some: "text"},
    }
    for change in spoiled.values():
        trained = content["trained"] | {"weights": content["trained"]["weights"] | change}
        write_checkpoint(tmp_path / "bad.pt", content | {"trained": trained})
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: route.main(["--checkpoint", str(tmp_path / "bad.pt"), "--no_cache", "a query"]))
        errors = capsys.readouterr().err.splitlines()
        assert (stopped.value.code, len(errors)) == (2, 1)
        assert errors[0].startswith("error: ")


def test_weights_of_another_training_do_not_fit(network):
    trainable = make_trainable(network, 1, None)
    with pytest.raises(UserError, match="do not fit its encoder"):
        load_weights(trainable, {name: tensor[:1] for name, tensor in trainable.items()})


# --- validations and patience --------------------------------------------------------------------------------


def test_the_best_validation_may_lie_within_an_epoch(small, tmp_path):
    train.main([*small, "--eval_every", "2", "--output_dir", str(tmp_path)])
    history = history_of(tmp_path)
    steps = -(-history["data"]["split"]["train"]["battles"] // 40)
    assert [(val["epoch"], val["step"]) for val in history["validations"]] == [
        (epoch, step) for epoch in (0, 1) for step in range(2, steps, 2)
    ]
    highest = max(val["auc"] for val in (*history["validations"], *history["val_metrics"]))
    epoch, step = history["best_epoch"], history["best_step"]
    first, *_ = [(e, s) for e, s, val in curves_of(history).in_order() if val["auc"] == highest]
    assert (epoch, step) == first
    metadata = RankRouter.load(tmp_path / "best_model.pt").metadata
    assert (metadata.epoch, metadata.step, metadata.val_metrics["auc"]) == (epoch, step, highest)
    assert parse("run", history | {"best_epoch": 0, "best_step": 2}).val_auc == history["validations"][0]["auc"]


def curves_of(history):
    return LearningCurves(history["train_losses"], history["val_metrics"], history["validations"])


def test_the_earliest_of_equal_validations_is_the_best_and_patience_counts_from_it():
    curves = LearningCurves()
    aucs = [(0, 3, 0.5), (0, None, 0.5), (1, 3, 0.7), (1, 9, 0.6), (1, None, 0.7)]
    assert not curves.out_of_patience(1)
    best = [curves.add(epoch, step, 1.0, {"auc": auc}) for epoch, step, auc in aucs]
    assert best == [True, False, True, False, False]
    assert [auc for *_, auc in aucs] == [val["auc"] for *_, val in curves.in_order()]
    assert curves.out_of_patience(2)
    assert not curves.out_of_patience(3)
    assert not curves.out_of_patience(None)


def test_patience_ends_a_training_early(small, tmp_path, capsys):
    # At so high a rate the first validations are the best.
    rates = ["--eval_every", "2", "--patience", "2", "--lr", "3", "--epochs", "50"]
    train.main([*small, *rates, "--output_dir", str(tmp_path)])
    history = history_of(tmp_path)
    assert history["status"] == "finished"
    assert len(history["train_losses"]) == len(history["val_metrics"]) < 50
    assert curves_of(history).out_of_patience(2)
    assert "stopped  no new best in 2 validations" in capsys.readouterr().out
    train.main([*small, *rates, "--output_dir", str(tmp_path), "--resume"])
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--lora_rank", "4"], "--lora_rank needs --finetune_encoder"),
        (["--warmup", "0.2"], "--warmup needs --finetune_encoder"),
        (["--gradient_checkpointing"], "--gradient_checkpointing needs --finetune_encoder"),
        (["--finetune_encoder", "--dtype", "float16"], "float16 does not train"),
        (["--finetune_encoder", "--finetune_layers", "0"], "expected a whole number"),
    ],
)
def test_flags_that_do_not_go_together(fails, tmp_path, given, message):
    assert message in fails("--demo", "--output_dir", str(tmp_path), *given)


def test_more_layers_than_there_are(flags, fails, tmp_path):
    message = fails(*flags, "--finetune_layers", "9", "--output_dir", str(tmp_path))
    assert "--finetune_layers 9: the encoder has 2 layers" in message


def test_the_size_of_an_epoch_is_printed_before_it_starts(flags, tmp_path, capsys):
    train.main([*flags, "--output_dir", str(tmp_path)])
    out = capsys.readouterr().out.splitlines()
    place = next(i for i, line in enumerate(out) if line.startswith("finetune "))
    assert out[place + 1].startswith("epoch 0 ")
    assert f"an epoch has {history_of(tmp_path)['timing']['tokens_per_epoch']} tokens" in out[place]


def test_gradient_checkpointing_keeps_fewer_hidden_states(made):
    kept = {}
    for on in (False, True):
        batches, *_ = made(gradient_checkpointing=on)
        count = []

        def pack(x, count=count):
            count.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            batches.embed(torch.arange(8))
        kept[on] = sum(count)
    assert kept[True] < 0.6 * kept[False]


def test_a_checkpoint_that_lost_its_trained_weights_is_refused(flags, tmp_path):
    train.main([*flags, "--lora_rank", "2", "--output_dir", str(tmp_path)])
    content = torch.load(tmp_path / "best_model.pt")
    for trained in (None, content["trained"] | {"lora_rank": 3}, content["trained"] | {"layers": 1}):
        write_checkpoint(tmp_path / "bad.pt", content | {"trained": trained})
        with pytest.raises(UserError, match="the finetuned encoder"):
            RankRouter.load(tmp_path / "bad.pt")


def test_a_learning_rate_that_is_too_high_is_named(flags, fails, tmp_path):
    message = fails(*flags, "--encoder_lr", "1e30", "--output_dir", str(tmp_path))
    assert "--encoder_lr" in message


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
