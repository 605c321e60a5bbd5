"""An encoder that is trained with the towers: what learns, in which batches, where clusters go, what is kept of it."""

import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from conftest import result

import route
import train
from data_loader import load_battles, split_battles
from loss import bpr_loss
from rankrouter import RankRouter
from support.adapters import let_learn, set_learned, weights_hash
from support.batches import QueryBatches, begin
from support.beginning import begin_optimiser
from support.cached_encoder import Encoder
from support.checkpoints import write_checkpoint
from support.command_line import run_command
from support.encoder import load_encoder
from support.files import UserError
from support.history import parse
from support.selection import best_moment, waited

CPU = torch.device("cpu")
WAYS = {"whole": [], "layers": ["--finetune_layers", "1"], "lora": ["--lora_rank", "2", "--encoder_lr", "0.001"]}


@pytest.fixture(scope="module")
def flags(small):
    """Flags of a run of a second that trains the encoder, from the first step on."""
    return [*small, "--finetune_encoder", "--batch_tokens", "300", "--tower_epochs", "0"]


@pytest.fixture
def network(demo):
    return load_encoder(demo / "encoder", CPU, torch.float32)[1]


@pytest.fixture
def made(flags, demo):
    """Batches on the data of `small`, and the router that they train; accumulated in so many pieces."""

    def make(pieces=1, tokens=300, clusters=3, gradient_checkpointing=False):
        torch.manual_seed(0)
        split = split_battles(load_battles(flags[1])[0], 42)[0]
        args = vars(
            train.parse_args(
                ["--num_clusters", str(clusters), "--embedding_dim", "8", "--dropout", "0", "--random_start"]
            )
        )
        encoder = Encoder(str(demo / "encoder"), CPU, "float32", progress=False)
        embeddings, _ = encoder.embed(split.train.queries)
        router = RankRouter(split.train.model_names, embeddings.shape[1], args | {"id_dropout": 0.0})
        tower = router.query_tower
        tower.fit(embeddings[torch.from_numpy(split.train.fought[0])], 0)
        cluster_idx = tower.assign(tower.standardise(embeddings))
        learner = encoder.learner(None, None, gradient_checkpointing)
        return QueryBatches(split, tower, cluster_idx, learner, "mean", 512, tokens, pieces), router, split, embeddings

    return make


def history_of(output):
    return json.loads((output / "training_history.json").read_text())


def trained(output):
    return RankRouter.load(output / "best_model.pt").facts["trained"]["weights"]


# --- what learns ---------------------------------------------------------------------------------------------


def test_the_last_layers_learn_and_nothing_else(network):
    learned = let_learn(network, 1, None)
    assert all(name.startswith("layers.1.") for name in learned)
    assert sum(p.requires_grad for p in network.parameters()) == len(learned) == 12


def test_adapters_at_all_linear_maps_begin_as_nothing_and_are_all_that_learns(network):
    ids = torch.arange(12).view(2, 6)
    before = network(ids).last_hidden_state
    learned = let_learn(network, None, 3)
    assert torch.equal(network(ids).last_hidden_state, before)
    maps = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(learned) == 2 * 2 * len(maps)  # layers, A and B
    assert {name.split(".")[3] for name in learned} == set(maps)
    with torch.no_grad():
        layer = network.layers[0].mlp.up_proj
        layer.up.copy_(torch.randn_like(layer.up))
    x = torch.randn(4, layer.linear.in_features)
    expected = x @ (layer.linear.weight + layer.up @ layer.down).T  # W + B A, merged
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_a_pooler_does_not_learn():
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32))
    learned = let_learn(bert.requires_grad_(False), None, None)
    assert "encoder.layer.0.output.dense.weight" in learned
    assert not any("pooler" in name for name in learned)
    assert set(let_learn(bert.requires_grad_(False), 2, None)) == {
        name for name, _ in bert.named_parameters() if name.startswith(("encoder.layer.1.", "encoder.layer.2."))
    }


def test_the_hash_of_weights_sees_names_and_numbers():
    weights = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [{"a": torch.zeros(3, 2), "b": torch.ones(2)}, {"a": torch.zeros(2, 3), "c": torch.ones(2)}]
    others += [{"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 1.0 + 1e-7])}]
    assert len({weights_hash(one) for one in (weights, *others)}) == 4
    assert weights_hash(dict(reversed(weights.items()))) == weights_hash(weights)


# --- batches -------------------------------------------------------------------------------------------------


def test_a_pass_has_each_query_once_with_all_its_battles_within_the_budget(made):
    batches, _, split, _ = made()
    battles, orders = split.train, []
    asked = battles.fought[0]
    for _ in range(3):
        steps = begin(batches).steps
        flat = np.concatenate(steps)
        orders.append(tuple(flat))
        assert sorted(flat) == list(range(len(asked)))
        assert all(len(step) * batches.lengths[step].max() <= 300 or len(step) == 1 for step in steps)
        seen = []
        for step in steps:
            ((queries, row, models, outcome),) = batches.parts(step)
            assert batches.size_of(step) == len(outcome)
            seen += zip(asked[queries[row]], *models.T.tolist(), outcome.tolist(), strict=True)
        sides = (battles.query_idx, battles.model_a_idx, battles.model_b_idx, battles.outcome)
        assert sorted(seen) == sorted(zip(*(side.tolist() for side in sides), strict=True))
    assert len(set(orders)) == 3


def test_batches_of_like_length_are_shuffled(made):
    batches, *_ = made()
    batches.lengths = np.random.default_rng(0).geometric(1 / 40, 20_000).clip(3, 256)
    batches.count, batches.tokens = 20_000, 2048
    positions = []
    for _ in range(2):
        steps = begin(batches).steps
        padded = sum(len(step) * batches.lengths[step].max() for step in steps)
        assert batches.lengths.sum() / padded > 0.85
        place = np.empty(20_000)
        place[np.concatenate(steps)] = np.repeat(np.arange(len(steps)), [len(step) for step in steps])
        assert abs(np.corrcoef(place, batches.lengths)[0, 1]) < 0.1
        positions.append(place)
    assert abs(np.corrcoef(*positions)[0, 1]) < 0.05


@pytest.mark.parametrize("how", [{"pieces": 1}, {"pieces": 3}, {"pieces": 2, "gradient_checkpointing": True}])
def test_a_step_has_the_gradient_of_the_mean_over_its_battles(made, how):
    batches, router, *_ = made(**how)
    epoch = begin(batches)
    step, parameters = epoch.steps[0], [*router.parameters(), *batches.learned.values()]
    # Each battle by itself, its query encoded for it alone.
    total = 0.0
    for query in step:
        single = batches._with_battles(torch.tensor([query]))
        points, cluster_idx = batches.embed(single[0])
        for models, outcome in zip(single[2], single[3], strict=True):
            a, b = router(points, cluster_idx)[0, models]
            total = total + bpr_loss(a[None], b[None], outcome[None], 1.0)
    expected = torch.autograd.grad(total / batches.size_of(step), parameters)
    batches.moved[0].zero_()
    next(train.train_epoch(router, torch.optim.SGD(parameters, lr=0), partial(bpr_loss, margin=1.0), batches, epoch))
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-3)
    assert epoch.losses[0].item() == pytest.approx(total.item(), rel=1e-5)


def test_a_dimension_that_does_not_vary_does_not_blow_gradients_up(made):
    batches, *_ = made()
    batches.tower.scale[5] = 1e-30
    batches.varies = batches.tower.scale > 1e-3 * batches.tower.scale.median()
    batches.embed(torch.arange(4))[0].sum().backward()
    assert max(float(p.grad.abs().max()) for p in batches.learned.values()) < 1e6


def test_a_centroid_is_the_running_mean_of_its_own_members(made):
    batches, *_ = made()
    tower, before = batches.tower, batches.tower.centroids.clone()
    members = (batches.members == 1).nonzero()[:, 0]
    with torch.no_grad():
        for parameter in batches.learned.values():  # the encoder has moved
            parameter.mul_(1.05)
        chosen = members[:4]
        points, _ = batches.embed(chosen)
    batches.follow()
    size = min(50, len(members))
    kept = (1 - 1 / size) ** 4
    expected = kept * before[1] + (1 - kept) * points.mean(0)
    torch.testing.assert_close(tower.centroids[1], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(tower.centroids[[0, 2]], before[[0, 2]])
    assert not batches.moved[0].any()


def test_clusters_keep_their_members_while_the_encoder_moves(flags, tmp_path):
    train.main([*flags, "--output_dir", str(tmp_path), "--no_cache", "--encoder_lr", "0.001", "--epochs", "4"])
    router, pretrained = RankRouter.load(tmp_path / "best_model.pt"), torch.load(tmp_path / "last_checkpoint.pt")
    split = split_battles(load_battles(flags[1])[0], 42)[0]
    asked = [split.train.queries[i] for i in split.train.fought[0]]
    router.open_encoder()
    points, now = router.embed(asked)
    encoder = Encoder(router.facts["encoder"]["path"], CPU, "float32", progress=False)
    first, beginning = encoder.embed(asked)[0], pretrained["beginning"]
    first = (first - beginning["mean"]) / beginning["scale"]
    then = torch.cdist(first, beginning["centroids"]).argmin(1)
    stale = torch.cdist(points, beginning["centroids"]).argmin(1)
    assert (points - first).norm() > first.norm()  # it has moved far
    assert (now == then).float().mean() > max(0.6, (stale == then).float().mean() + 0.05)
    moved = torch.stack([points[then == k].mean(0) for k in range(3)])
    own = (moved - router.query_tower.centroids).norm(dim=1)
    stayed = (moved - beginning["centroids"]).norm(dim=1)
    assert (own < stayed).all()


# --- the towers first ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", ["random", "win_rate"])
def test_the_encoder_is_trained_from_the_best_moment_of_its_towers(small, flags, tmp_path, monkeypatch, vectors):
    if vectors == "win_rate":
        place = small.index("--capability_dim")
        small = [*small[:place], *small[place + 2 :], "--capability_init", "win_rate"]
        flags = [*small, *flags[len(small) :]]
    train.main([*small, "--epochs", "2", "--eval_every", "2", "--output_dir", str(tmp_path / "frozen")])
    begun, train_epoch = [], train.train_epoch

    def watched(router, optimiser, loss_of, batches, epoch):
        if batches.learned and not begun:
            begun.append({name: weight.clone() for name, weight in router.state_dict().items()})
        return train_epoch(router, optimiser, loss_of, batches, epoch)

    monkeypatch.setattr(train, "train_epoch", watched)
    alone = ["--tower_epochs", "2", "--eval_every", "2", "--epochs", "1"]
    train.main([*flags, *alone, "--output_dir", str(tmp_path / "trained")])
    frozen, both = history_of(tmp_path / "frozen"), history_of(tmp_path / "trained")
    assert {name: frozen[name] for name in both["towers_alone"]} == both["towers_alone"]
    kept = RankRouter.load(tmp_path / "frozen" / "best_model.pt").state_dict()
    assert all(torch.equal(begun[0][name], kept[name]) for name in kept)


# --- what is kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_brings_the_trained_encoder_back(flags, tmp_path, capsys, way):
    output = tmp_path / "out"
    cache = ["--cache_dir", str(tmp_path / "cache")]
    train.main([*flags, *WAYS[way], *cache, "--output_dir", str(output)])
    history, router = history_of(output), RankRouter.load(output / "best_model.pt")
    split = split_battles(load_battles(flags[1])[0], 42)[0]
    asked = split.test.fought[0]
    router.open_encoder(cache_dir=None)
    points, cluster_idx = router.embed([split.test.queries[i] for i in asked])
    d = split.test.margins(router.score(points, cluster_idx))
    wins = np.where(split.test.outcome == 1, d > 0, d < 0) + 0.5 * (d == 0)
    assert history["test_metrics"]["accuracy"] == pytest.approx(wins.mean(), abs=1e-6)
    weights = router.facts["trained"]["weights"]
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
    torch.testing.assert_close(again.embed([split.test.queries[i] for i in asked])[0], points, atol=1e-4, rtol=1e-4)
    assert again.encoder.__dict__.get("loaded") is None  # all of it was read
    capsys.readouterr()
    route.main(["--checkpoint", str(output / "best_model.pt"), "--no_cache", split.test.queries[asked[0]]])
    best = capsys.readouterr().out.splitlines()[2].split()[1]
    assert best == router.model_names[int(router.score(points, cluster_idx)[0].argmax())]


def test_baselines_get_the_pretrained_embeddings(flags, small, tmp_path):
    judged = ["--baselines", "fast"]
    train.main([*flags, *judged, "--output_dir", str(tmp_path / "tuned")])
    train.main([*small, *judged, "--output_dir", str(tmp_path / "frozen")])
    tuned, frozen = (history_of(tmp_path / name)["baselines"] for name in ("tuned", "frozen"))
    for name in ("cluster_bradley_terry", "neighbours"):
        assert tuned[name]["auc"] == frozen[name]["auc"]


def test_training_the_encoder_fits_what_frozen_embeddings_cannot(flags, tmp_path):
    losses = {}
    for lr in ("1e-12", "0.002"):
        how = "--encoder_lr", lr, "--lr", "0.003", "--epochs", "8", "--dropout", "0.1", "--unscaled"
        train.main([*flags, *how, "--output_dir", str(tmp_path / lr)])
        losses[lr] = history_of(tmp_path / lr)["train_losses"][-1]
    assert losses["0.002"] < losses["1e-12"] - 0.05


@pytest.mark.parametrize("way", ["whole", "lora"])
def test_killed_while_the_encoder_learns_a_run_goes_on_to_the_same_bits(flags, forked, tmp_path, way):
    flags = [*flags, *WAYS[way], "--checkpoint_minutes", "0", "--eval_every", "2", "--tower_epochs", "1"]

    def there(name, *more):
        return [*flags, "--output_dir", str(tmp_path / name), "--cache_dir", str(tmp_path / "cache"), *more]

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    forked(train.main, there("first"))  # fills the cache
    events = forked(train.main, there("whole"))[1]
    steps = [number for number, name in enumerate(events) if name == "after-step"]
    alone = forked(train.main, there("alone", "--tower_epochs", "2"))[1].count("after-step") - len(steps)  # an epoch's
    told = {  # in the towers' epoch, before the first validation of the encoder, in its last epoch
        steps[1]: "resume   in the training of the towers, after 0 epochs and ",
        steps[alone + 1]: "resume   after 0 epochs and ",
        steps[-2]: "resume   after 1 epochs and ",
    }
    for moment, line in told.items():
        name = f"killed {moment}"
        assert forked(train.main, there(name), moment, kill)[0] == -signal.SIGKILL
        code, _, out, err = forked(train.main, there(name, "--resume"))
        assert (code, err) == (0, [])
        assert any(each.startswith(line) for each in out)
        (found, weights), (expected, others) = result(tmp_path / name), result(tmp_path / "whole")
        assert found == expected
        assert all(torch.equal(weights[key], others[key]) for key in others)
        assert weights_hash(trained(tmp_path / name)) == weights_hash(trained(tmp_path / "whole"))


def test_towers_that_are_trained_alone_are_gone_on_with_or_kept_like_all_else(flags, fails, forked, tmp_path):
    flags = [*flags, "--tower_epochs", "2", "--checkpoint_minutes", "0", "--output_dir", str(tmp_path)]
    path = tmp_path / "last_checkpoint.towers.pt"

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    steps = [number for number, name in enumerate(forked(train.main, flags)[1]) if name == "after-step"]
    assert not path.exists()  # the encoder's own has taken its place
    (tmp_path / "last_checkpoint.pt").unlink()
    assert forked(train.main, [*flags, "--no_cache"], steps[2], kill)[0] == -signal.SIGKILL
    before = path.read_bytes()
    assert "--lr was 0.0001, is 0.5" in fails(*flags, "--resume", "--lr", "0.5")
    path.write_bytes(before[:-9])
    assert "is no RankRouter checkpoint" in fails(*flags, "--resume")
    path.write_bytes(before)
    code, _, out, _ = forked(train.main, [*flags, "--no_cache"], 3, kill)  # not resumed
    assert code == -signal.SIGKILL
    assert any(line.startswith("aside ") for line in out)
    assert path.read_bytes() == before


def test_more_epochs_are_another_schedule_and_not_gone_on_with(flags, fails, tmp_path):
    train.main([*flags, "--output_dir", str(tmp_path)])
    message = fails(*flags, "--output_dir", str(tmp_path), "--resume", "--epochs", "5")
    assert "--epochs was 2, is 5" in message


def test_a_trained_weight_that_is_none_is_refused(flags, tmp_path, capsys):
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
        told = capsys.readouterr().err.splitlines()
        assert (stopped.value.code, len(told)) == (2, 1)
        assert told[0].startswith("error: ")


def test_weights_of_another_training_do_not_fit(network):
    learned = let_learn(network, 1, None)
    with pytest.raises(Exception, match="do not fit its encoder"):
        set_learned(learned, {name: tensor[:1] for name, tensor in learned.items()})


# --- when ----------------------------------------------------------------------------------------------------


def test_the_best_moment_may_lie_within_an_epoch(run_demo, small, tmp_path):
    train.main([*small, "--eval_every", "2", "--output_dir", str(tmp_path)])
    history = history_of(tmp_path)
    steps = -(-history["data"]["split"]["train"]["battles"] // 40)
    assert [(val["epoch"], val["step"]) for val in history["validations"]] == [
        (epoch, step) for epoch in (0, 1) for step in range(2, steps, 2)
    ]
    aucs = [val["auc"] for val in (*history["validations"], *history["val_metrics"])]
    epoch, step, val = best_moment(history)
    assert val["auc"] == max(aucs)
    assert (history["best_epoch"], history["best_step"]) == (epoch, step)
    facts = RankRouter.load(tmp_path / "best_model.pt").facts
    assert (facts["epoch"], facts["step"], facts["val_metrics"]["auc"]) == (epoch, step, val["auc"])
    assert parse("run", history | {"best_epoch": 0, "best_step": 2}).val_auc == history["validations"][0]["auc"]


def test_the_earliest_of_equal_moments_counts_and_waiting_is_counted_from_it():
    ends, within = (
        [{"auc": 0.5}, {"auc": 0.7}],
        [{"epoch": 1, "step": 3, "auc": 0.7}, {"epoch": 1, "step": 9, "auc": 0.6}],
    )
    history = {"val_metrics": ends, "validations": within}
    assert best_moment(history)[:2] == (1, 3)
    assert waited(history) == 2
    assert waited({"val_metrics": [], "validations": []}) == 0


def test_patience_ends_a_training_in_time(small, tmp_path, capsys):
    # At so high a rate the first validations are the best.
    how = ["--eval_every", "2", "--patience", "2", "--lr", "3", "--epochs", "50"]
    train.main([*small, *how, "--output_dir", str(tmp_path)])
    history = history_of(tmp_path)
    assert history["status"] == "finished"
    assert len(history["train_losses"]) == len(history["val_metrics"]) < 50
    assert waited(history) >= 2
    assert "since the best one: stopped" in capsys.readouterr().out
    train.main([*small, *how, "--output_dir", str(tmp_path), "--resume"])
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--lora_rank", "4"], "--lora_rank is for --finetune_encoder"),
        (["--warmup", "0.2"], "--warmup is for --finetune_encoder"),
        (["--gradient_checkpointing"], "--gradient_checkpointing is for --finetune_encoder"),
        (["--finetune_encoder", "--dtype", "float16"], "float16 does not train"),
        (["--finetune_encoder", "--finetune_layers", "0"], "expected a whole number"),
    ],
)
def test_flags_that_do_not_go_together(fails, tmp_path, given, told):
    assert told in fails("--demo", "--output_dir", str(tmp_path), *given)


def test_more_layers_than_there_are(flags, fails, tmp_path):
    message = fails(*flags, "--finetune_layers", "9", "--output_dir", str(tmp_path))
    assert "--finetune_layers 9: the encoder has 2 layers" in message


def test_the_cost_is_told_before_it_is_spent(flags, tmp_path, capsys):
    train.main([*flags, "--output_dir", str(tmp_path)])
    out = capsys.readouterr().out.splitlines()
    place = next(i for i, line in enumerate(out) if line.startswith("finetune "))
    assert out[place + 1].startswith("epoch 0 ")
    assert f"an epoch has {history_of(tmp_path)['timing']['tokens_per_epoch']} tokens" in out[place]


def test_gradient_checkpointing_keeps_less(made):
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
        with pytest.raises(UserError, match="trained"):
            RankRouter.load(tmp_path / "bad.pt")


def test_a_rate_that_is_too_high_is_told_by_its_name(flags, fails, tmp_path):
    message = fails(*flags, "--encoder_lr", "1e30", "--output_dir", str(tmp_path))
    assert "--encoder_lr" in message


def test_rates_rise_and_fall_and_gradients_are_clipped_together(made):
    batches, router, *_ = made()
    args, at = train.parse_args(["--demo", "--finetune_encoder", "--lr", "0.2", "--warmup", "0.25"]), [0.0]
    optimiser = begin_optimiser(args, router, batches, lambda: at[0])
    weights = [*router.parameters(), *batches.learned.values()]
    rates = []
    for at[0] in (0.05, 0.25, 0.625, 1.0):
        for weight in weights:
            weight.grad = torch.full_like(weight, 3.0)
        optimiser.step()
        rates.append([group["lr"] for group in optimiser.param_groups])
        assert torch.stack([weight.grad.norm() for weight in weights]).norm().item() == pytest.approx(1.0, rel=1e-3)
    expected = [[0.2 * share, 5e-5 * share] for share in (0.2, 1.0, 0.5, 0.0)]
    np.testing.assert_allclose(rates, expected, atol=1e-12)
