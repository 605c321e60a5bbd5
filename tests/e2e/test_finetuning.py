"""An encoder that is trained with the towers: the clusters, the towers before it, and what is saved."""

import json
import signal

import numpy as np
import pytest
import torch
from conftest import after_step, every_step, kill

import route
import train
from data_loader import load_battles, split_battles
from query_representation import query_features
from rankrouter import RankRouter
from support.encoding.encoder import QueryEncoder
from support.encoding.huggingface import load_encoder
from support.system.command_line import run_command
from support.system.safe_torch import write_checkpoint
from support.training.batches import QueryBatches

CPU = torch.device("cpu")
WAYS = {"whole": [], "layers": ["--finetune_layers", "1"], "lora": ["--lora_rank", "2", "--encoder_lr", "0.001"]}


@pytest.fixture(scope="module")
def flags(small):
    """Flags of a run that takes a second and trains the encoder from the first step."""
    return [*small, "--finetune_encoder", "--batch_tokens", "300", "--tower_epochs", "0"]


@pytest.fixture(scope="module")
def finetuned(flags, tmp_path_factory):
    """Flags and folder of a finished run that trained LoRA adapters, to be read only."""
    flags = [*flags, "--lora_rank", "2", "--encoder_lr", "0.02", "--baselines", "fast"]
    output = tmp_path_factory.mktemp("finetuned")
    train.main([*flags, "--output_dir", str(output)])
    return flags, output


def history_of(output):
    return json.loads((output / "training_history.json").read_text())


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
    features = query_features(train_queries, encoder.embed(train_queries)[0], router.config.surface_features)
    first = router.query_tower.standardize(features)  # by the statistics of the pretrained encoder
    assert all(torch.equal(getattr(router.query_tower, name), initial[name]) for name in ("mean", "scale"))
    then = torch.cdist(first, initial["centroids"]).argmin(1)
    stale = torch.cdist(x, initial["centroids"]).argmin(1)
    assert (x - first).norm() > first.norm()  # it has moved far
    assert (now == then).float().mean() > max(0.6, (stale == then).float().mean() + 0.05)
    moved = torch.stack([x[then == k].mean(0) for k in range(3)])
    own = (moved - router.query_tower.centroids).norm(dim=1)
    stayed = (moved - initial["centroids"]).norm(dim=1)
    assert (own < stayed).all()


def test_the_encoder_is_trained_from_the_best_validation_of_its_towers(small, flags, tmp_path, monkeypatch):
    place = small.index("--capability_dim")  # instead of which initial vectors must not return
    flags = [*flags[:place], *flags[place + 2 :], "--capability_init", "win_rate"]
    small = [*small[:place], *small[place + 2 :], "--capability_init", "win_rate"]
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


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_restores_the_finetuned_encoder(flags, tmp_path, capsys, way):
    output = tmp_path / "out"
    cache = ["--cache_dir", str(tmp_path / "cache")]
    train.main([*flags, *WAYS[way], *cache, "--output_dir", str(output)])
    printed = capsys.readouterr().out.splitlines()
    history, router = history_of(output), RankRouter.load(output / "best_model.pt")
    split = split_battles(load_battles(flags[1])[0], 42)[0]
    test_queries = [split.test.queries[i] for i in split.test.unique_queries]
    router.open_encoder(cache_dir=None)
    x, cluster_idx = router.embed(test_queries)
    (pairs,) = split.test.chunks()
    d = pairs.margins(router.score(x, cluster_idx))
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
    place = next(i for i, line in enumerate(printed) if line.startswith("finetune "))
    assert printed[place + 1].startswith("epoch 0 ")
    assert f"an epoch has {history['timing']['tokens_per_epoch']} tokens" in printed[place]
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


def test_baselines_get_the_pretrained_embeddings(finetuned, small, tmp_path):
    train.main([*small, "--baselines", "fast", "--output_dir", str(tmp_path)])
    tuned, frozen = (history_of(output) for output in (finetuned[1], tmp_path))
    assert tuned["test_metrics"]["log_loss"] != frozen["test_metrics"]["log_loss"]
    for name in ("cluster_bradley_terry", "neighbours"):
        rows = [history["baselines"][name] for history in (tuned, frozen)]
        assert rows[0]["log_loss_calibrated"] == rows[1]["log_loss_calibrated"], name
        assert rows[0]["intervals"] == rows[1]["intervals"], name


def test_training_the_encoder_fits_more_than_frozen_embeddings_do(flags, tmp_path):
    losses = {}
    for lr in ("1e-12", "0.002"):
        rates = ["--encoder_lr", lr, "--lr", "0.003", "--epochs", "4"]
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


def test_more_epochs_are_another_schedule_and_are_refused(finetuned, fails):
    flags, output = finetuned
    message = fails(*flags, "--output_dir", str(output), "--resume", "--epochs", "5")
    assert "--epochs was 2, is 5" in message


def test_trained_weights_that_are_damaged_or_lost_are_refused_in_one_line(finetuned, tmp_path, capsys):
    content = torch.load(finetuned[1] / "best_model.pt")
    trained = content["trained"]
    name, weight = next(iter(trained["weights"].items()))
    changes = [{"weights": trained["weights"] | {name: bad}} for bad in (torch.full_like(weight, torch.nan), "text")]
    changes += [{"weights": trained["weights"] | {other: torch.zeros(3)}} for other in (name, "another")]
    for bad in (None, *(trained | change for change in (*changes, {"lora_rank": 3}, {"layers": 1}))):
        write_checkpoint(tmp_path / "bad.pt", content | {"trained": bad})
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: route.main(["--checkpoint", str(tmp_path / "bad.pt"), "--no_cache", "a query"]))
        errors = capsys.readouterr().err.splitlines()
        assert (stopped.value.code, len(errors)) == (2, 1), errors
        assert errors[0].startswith("error: "), errors
