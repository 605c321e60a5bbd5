"""The training command: planted truth, what it keeps and writes, every ablation, every bad input."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel

import loss
import metrics
import rankrouter
import train
from data_loader import Battles, load_battles, split_battles
from query_representation import QueryEncoder
from rankrouter import RankRouter, RouterConfig
from support.data.demo import FILES, demo_folder, true_skills
from support.encoding.huggingface import encoder_fingerprint
from support.evaluation import baselines
from support.reporting.runs import read_runs
from support.system.command_line import run_command
from support.system.files import content_hash
from support.training.batches import BattleBatches
from support.training.checkpoint import TrainingState
from support.training.history import History, LearningCurves
from support.training.optimization import EMA

ROOT = Path(__file__).parent.parent.parent
QUICK = ("--limit", "600", "--epochs", "2", "--num_clusters", "10", "--embedding_dim", "48")


def one_hot_difference(battles):
    """+1 for model a, -1 for model b: the design matrix of Bradley-Terry."""
    identity = np.eye(len(battles.model_names))
    return identity[battles.model_a_idx] - identity[battles.model_b_idx]


def embed(demo, queries):
    """Embeddings (Q, H) of queries by the demo's encoder."""
    return QueryEncoder(str(demo / "encoder"), torch.device("cpu"), dtype="float32", progress=False).embed(queries)[0]


def margins(router, embeddings, battles):
    """The router's margins d (N,) from embeddings of all queries, as somebody who routes would get them."""
    x = router.query_tower.standardize(embeddings)
    scores = router(x, router.query_tower.assign(x)).detach().double().numpy()  # (Q, M)
    return scores[battles.query_idx, battles.model_a_idx] - scores[battles.query_idx, battles.model_b_idx]


def test_planted_truth_is_recovered(demo, default_run):
    history, _ = default_run
    battles, _ = load_battles(str(demo / "battles.parquet"))
    split, _ = split_battles(battles, 42)
    fixed = LogisticRegression(fit_intercept=False, C=10).fit(one_hot_difference(split.train), split.train.outcome)
    test = split.test
    fixed_auc = metrics.auc(one_hot_difference(test) @ fixed.coef_[0], test.outcome)
    skills, _ = true_skills(demo, test.queries, test.model_names)
    true_d = skills[test.query_idx, test.model_a_idx] - skills[test.query_idx, test.model_b_idx]
    true_auc = metrics.auc(true_d, test.outcome)
    assert true_auc - fixed_auc >= 0.10
    closed = (history["test_metrics"]["auc"] - fixed_auc) / (true_auc - fixed_auc)
    assert 0.5 <= closed < 1
    reported = history["demo"]
    assert reported["true_margins"]["auc"] == pytest.approx(true_auc)
    assert reported["fixed_ranking"]["auc"] == pytest.approx(fixed_auc, abs=0.02)
    fixed_auc = reported["fixed_ranking"]["auc"]
    closed = (history["test_metrics"]["auc"] - fixed_auc) / (true_auc - fixed_auc)
    assert reported["gap_closed"] == pytest.approx(closed)


def test_the_fixed_skills_are_the_best_that_ignore_the_query(demo):
    names = [f"demo-model-{letter}" for letter in "abcdefghijkl"]
    truth = json.loads((demo / "truth.json").read_text())
    _, fixed = true_skills(demo, [], names)
    skills = np.array(truth["skills"])
    a, b = np.triu_indices(12, 1)
    p = 1 / (1 + np.exp(skills[:, b] - skills[:, a]))  # (topics, pairs)

    def expected_loss(s):
        d = s[a] - s[b]
        return np.mean(p * np.logaddexp(0, -d) + (1 - p) * np.logaddexp(0, d))

    rng = np.random.default_rng(0)
    others = [skills.mean(0), *(fixed + rng.normal(0, 0.1, 12) for _ in range(50))]
    assert all(expected_loss(fixed) < expected_loss(other) for other in others)


def test_the_true_margins_are_the_log_odds_that_drew_the_outcomes(demo):
    battles, _ = load_battles(str(demo / "battles.parquet"))
    decisive = battles.select(battles.outcome != 0.5)
    skills, _ = true_skills(demo, battles.queries, battles.model_names)
    d = skills[decisive.query_idx, decisive.model_a_idx] - skills[decisive.query_idx, decisive.model_b_idx]
    assert metrics.fit_temperature(d, decisive.outcome) == pytest.approx(1, abs=0.08)
    assert 0.03 < np.mean(battles.outcome == 0.5) < 0.3


def test_nothing_is_learned_from_shuffled_outcomes(demo, run_demo, tmp_path):
    table = pd.read_parquet(demo / "battles.parquet")
    table["winner"] = np.random.default_rng(0).permutation(table["winner"].to_numpy())
    table.to_parquet(tmp_path / "shuffled.parquet")
    history, _ = run_demo("--data_path", str(tmp_path / "shuffled.parquet"), "--epochs", "2")
    assert history["test_metrics"]["auc"] == pytest.approx(0.5, abs=0.06)
    assert "demo" not in history  # the truth is not that of these battles


def test_the_history_is_complete_and_consistent(demo, default_run):
    history, output = default_run
    split, _ = split_battles(load_battles(str(demo / "battles.parquet"))[0], 42)
    assert history["status"] == "finished"
    assert len(history["train_losses"]) == len(history["val_metrics"]) == 10
    assert history["train_losses"][-1] < history["train_losses"][0]
    names = ["accuracy", "precision", "recall", "f1", "auc", "log_loss"]
    assert all(list(row) == names for row in history["val_metrics"])
    assert list(history["test_metrics"]) == [*names, "log_loss_calibrated"]
    assert 0 < history["test_metrics"]["precision"] < 1
    data = history["data"]
    held = sum(side["battles"] for side in data["split"].values())
    assert data["rows_read"] == data["battles"] == held + data["ties_left_out"]
    assert data["test_queries_in_train"] == 0
    assert sum(cluster["size"] for cluster in history["clusters"]) == data["split"]["train"]["queries"]
    assert history["args"]["split_seed"] == history["args"]["seed"] == 42
    assert {path.name for path in output.iterdir()} == {"training_history.json", "best_model.pt", "last_checkpoint.pt"}
    assert set(history) == {
        *("status", "args", "train_losses", "val_metrics", "best_epoch", "test_metrics", "data", "clusters"),
        *("calibration", "environment", "timing", "demo", "test_intervals", "baselines", "encoder"),
        *("validations", "best_step"),
    }
    counts = ("queries_encoded", "queries_from_cache")
    assert set(history["timing"]) == {"load", "encode", "cluster", "train", "evaluate", "baselines", *counts}
    assert all(history["timing"][name] > 0 for name in ("load", "encode", "cluster", "train", "evaluate"))
    assert data["content_hash"] == content_hash([demo / "battles.parquet"])
    assert data["embeddings_hash"] == hashlib.sha256(embed(demo, split.train.queries).numpy()).hexdigest()
    encoder = RankRouter.load(output / "best_model.pt").metadata.encoder
    assert encoder == {
        "path": str(demo / "encoder"),
        "fingerprint": encoder_fingerprint(demo / "encoder"),
        "width": 128,
        "pooling": "mean",
        "max_length": 512,
        "dtype": "float32",
    }


def test_the_checkpoint_is_that_of_the_best_epoch_and_gives_the_test_metrics(demo, default_run):
    history, output = default_run
    aucs = [row["auc"] for row in history["val_metrics"]]
    assert history["best_epoch"] == aucs.index(max(aucs)) > 0
    router = RankRouter.load(output / "best_model.pt")
    assert router.metadata.epoch == history["best_epoch"]
    split, _ = split_battles(load_battles(str(demo / "battles.parquet"))[0], 42)
    embeddings = embed(demo, split.test.queries)
    for part, expected in (
        (split.val, history["val_metrics"][history["best_epoch"]]),
        (split.test, history["test_metrics"]),
    ):
        d = margins(router, embeddings, part)
        got = metrics.evaluate(d, part.outcome, part.model_a_idx, part.model_b_idx, margin=1.0)
        assert got == pytest.approx({key: expected[key] for key in got}, abs=1e-6)


def test_statistics_and_clusters_see_training_queries_only(demo, default_run):
    history, output = default_run
    router = RankRouter.load(output / "best_model.pt")
    split, _ = split_battles(load_battles(str(demo / "battles.parquet"))[0], 42)
    embeddings = embed(demo, split.train.queries)[np.unique(split.train.query_idx)]
    torch.testing.assert_close(router.query_tower.mean, embeddings.mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(router.query_tower.scale, embeddings.std(0, correction=0), atol=1e-6, rtol=1e-5)
    x = router.query_tower.standardize(embeddings)
    cluster_idx = router.query_tower.assign(x)
    assert torch.bincount(cluster_idx, minlength=50).tolist() == [cluster["size"] for cluster in history["clusters"]]
    for k, centroid in enumerate(router.query_tower.centroids):  # the mean of its training queries, and of no other
        torch.testing.assert_close(x[cluster_idx == k].mean(0), centroid, atol=0.02, rtol=0)


def test_the_temperature_is_fitted_on_validation_and_applied_on_test(demo, default_run):
    history, output = default_run
    router = RankRouter.load(output / "best_model.pt")
    split, _ = split_battles(load_battles(str(demo / "battles.parquet"))[0], 42)
    embeddings = embed(demo, split.test.queries)
    temperature = metrics.fit_temperature(margins(router, embeddings, split.val), split.val.outcome)
    assert router.metadata.temperature == history["calibration"]["temperature"] == pytest.approx(temperature, rel=1e-3)
    calibrated = metrics.log_loss(margins(router, embeddings, split.test), split.test.outcome, temperature=temperature)
    assert history["test_metrics"]["log_loss_calibrated"] == pytest.approx(calibrated, abs=1e-4)
    assert temperature != pytest.approx(1, abs=0.05)


def test_of_equal_epochs_the_earliest_is_kept(run_demo, monkeypatch):
    def constant(d, outcome, weights=None):
        return 0.7 if weights is None else np.full(len(weights), 0.7)

    monkeypatch.setattr(metrics, "auc", constant)
    history, output = run_demo(*QUICK)
    assert history["best_epoch"] == RankRouter.load(output / "best_model.pt").metadata.epoch == 0


def test_the_history_is_written_after_every_epoch(run_demo, monkeypatch):
    written, write = [], History.write

    def watched(history):
        write(history)
        read = json.loads(history.path.read_text())
        written.append((read["status"], len(read["train_losses"]), len(read["val_metrics"])))

    monkeypatch.setattr(History, "write", watched)
    run_demo(*QUICK)
    assert written == [("running", 0, 0), ("running", 1, 1), ("running", 2, 2), ("finished", 2, 2)]


def make_state(num_battles, lr, batch_size=6, **config):
    """A training of a small router on one battle per query, by plain gradient descent at the rate `lr`."""
    torch.manual_seed(0)
    config = RouterConfig(num_clusters=0, embedding_dim=8, capability_dim=4, zero_init=False, **config)
    router, numbers = RankRouter(["x", "y", "z"], 4, config), np.arange(num_battles)
    outcome = (numbers % 3 / 2).astype(np.float32)
    battles = Battles([f"{i}" for i in numbers], router.model_names, numbers, numbers % 2, numbers % 2 + 1, outcome)
    x = torch.randn(num_battles, 4)
    x[:, 0] = torch.arange(num_battles)  # by which a test knows a query
    batches = BattleBatches(x, torch.zeros(num_battles, dtype=torch.int64), battles, batch_size)
    optimizer = torch.optim.SGD(router.parameters(), lr=lr)
    return TrainingState(router, batches, optimizer, EMA([], 0.0), LearningCurves(), epochs=2), x, battles


def train_epoch(state, *flags):
    """Take the steps of an epoch that are left; returns the loss of each."""
    args, losses = train.parse_args(list(flags)), []
    for batch in state.remaining_batches():
        losses.append(train.train_step(args, state, batch))
        state.record(losses[-1])
    return torch.stack(losses)


def test_each_epoch_has_its_own_order():
    state, _, _ = make_state(num_battles=20, lr=0.1)
    seen, forward = [], state.router.forward

    def watched(x, cluster_idx):
        seen.extend(x[:, 0].int().tolist())
        return forward(x, cluster_idx)

    state.router.forward = watched
    for _ in range(2):
        assert len(train_epoch(state)) == 4
        state.next_epoch()
    first, second = seen[:20], seen[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert len({tuple(order) for order in (first, second, range(20))}) == 3


def test_the_loss_of_an_epoch_is_the_mean_over_its_battles_also_where_the_last_batch_is_short():
    state, x, battles = make_state(num_battles=20, lr=0, dropout=0.0, id_dropout=0.0)
    assert len(train_epoch(state, "--margin", "0.7")) == 4
    with torch.no_grad():
        scores = state.router(x, torch.zeros(20, dtype=torch.int64))
        a, b = (scores[torch.arange(20), torch.from_numpy(idx)] for idx in (battles.model_a_idx, battles.model_b_idx))
        expected = loss.bpr(a, b, torch.from_numpy(battles.outcome), 0.7).mean().item()
    assert state.mean_loss() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss_type", loss.LOSSES)
def test_a_step_descends_the_mean_loss_of_its_battles(loss_type):
    """Written out battle by battle, on the steps of an epoch, the last of which has two battles."""
    state, x, battles = make_state(num_battles=20, lr=0.1, dropout=0.0, id_dropout=0.0)
    twin, *_ = make_state(num_battles=20, lr=0.1, dropout=0.0, id_dropout=0.0)
    losses = train_epoch(state, "--loss_type", loss_type, "--margin", "0.7")
    router, zero = twin.router, torch.zeros(1, dtype=torch.int64)
    for numbers, step_loss in zip(state.order.split(6), losses, strict=True):
        total = 0.0
        for i in numbers.tolist():
            scores = router(x[i : i + 1], zero)[0]  # (M,)
            a, b, y = scores[battles.model_a_idx[i]], scores[battles.model_b_idx[i]], torch.tensor(battles.outcome[i])
            total = total + loss.LOSSES[loss_type](a, b, y, 0.7) / len(numbers)
        assert step_loss.item() == pytest.approx(total.item(), abs=1e-5)
        gradients = torch.autograd.grad(total, list(router.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(router.parameters(), gradients, strict=True):
                if gradient is not None:  # that of an unknown model's ID is not used here
                    parameter -= 0.1 * gradient
    start, *_ = make_state(num_battles=20, lr=0.1)
    for name, weight in state.router.named_parameters():
        torch.testing.assert_close(weight, router.get_parameter(name), atol=1e-5, rtol=1e-4)
    assert not torch.equal(state.router.model_tower.capability.weight, start.router.model_tower.capability.weight)


def test_a_run_flushes_denormals(run_demo):
    torch.set_flush_denormal(False)
    small = torch.tensor([1e-30])
    assert (small * 1e-10).item() > 0
    run_demo(*QUICK)
    assert (small * 1e-10).item() == 0


def test_scores_do_not_depend_on_the_chunks_in_which_they_are_computed(demo, monkeypatch):
    part = split_battles(load_battles(str(demo / "battles.parquet"), limit=300)[0], 42)[0].test
    router = RankRouter(part.model_names, 4, RouterConfig(num_clusters=0, embedding_dim=8, zero_init=False))
    x, zeros = torch.randn(len(part.queries), 4), torch.zeros(len(part.queries), dtype=torch.int64)
    embedded = [column[part.unique_queries] for column in (x, zeros)]
    expected = part.margins(router.score(*embedded))
    monkeypatch.setattr(rankrouter, "ROWS_AT_ONCE", 7)
    np.testing.assert_allclose(part.margins(router.score(*embedded)), expected, atol=1e-5)
    np.testing.assert_allclose(expected, margins(router, x, part), atol=1e-5)


def test_the_best_checkpoint_is_kept_and_tested_where_later_epochs_are_worse(demo, run_demo):
    overfits = "--recipe original --limit 300 --epochs 12 --num_clusters 5 --lr 3e-3 --dropout 0 --no_cache"
    history, output = run_demo(*overfits.split())
    aucs = [row["auc"] for row in history["val_metrics"]]
    assert history["best_epoch"] == int(np.argmax(aucs)) < 11  # the run is one that overfits
    router = RankRouter.load(output / "best_model.pt")
    assert router.metadata.val_metrics["auc"] == max(aucs)
    part = split_battles(load_battles(str(demo / "battles.parquet"), limit=300)[0], 42)[0].test
    d = margins(router, embed(demo, part.queries), part)
    assert history["test_metrics"]["log_loss"] == pytest.approx(metrics.log_loss(d, part.outcome, 1.0), abs=1e-5)


def test_the_default_flags_are_the_defaults_of_a_router_built_in_python(default_run):
    assert RankRouter.load(default_run[1] / "best_model.pt").config == RouterConfig()


ORIGINAL = {"dropout": 0.1, "id_dropout": 0.0, "ema_decay": 0.0, "eval_every": 0}


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        ((), {}),
        (("--dropout", "0.5", "--ema_decay", "0.9"), {"dropout": 0.5, "ema_decay": 0.9}),  # one is the usual default
        (("--id_dropout", "0.1", "--eval_every", "5"), {"id_dropout": 0.1, "eval_every": 5}),
    ],
)
def test_the_original_recipe_resolves_its_flags_and_explicit_ones_win(run_demo, flags, given):
    history, output = run_demo(*QUICK, "--recipe", "original", *flags, "--baselines", "none")
    expected = ORIGINAL | given
    assert {name: history["args"][name] for name in expected} == expected
    config = RankRouter.load(output / "best_model.pt").config
    assert (config.dropout, config.id_dropout) == (expected["dropout"], expected["id_dropout"])
    assert (config.scale_dot, config.zero_init) == (False, False)
    assert bool(history["validations"]) == ("eval_every" in given)
    others = {name: value for name, value in history["args"].items() if name not in (*ORIGINAL, "recipe")}
    defaults = vars(train.parse_args([*QUICK, "--baselines", "none"]))
    places = ("output_dir", "data_path", "model_path", "demo", "demo_dir", "dtype")
    assert all(value == defaults[name] for name, value in others.items() if name not in places)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_the_original_recipe_starts_at_random_and_scales_a_cosine_alone(demo, run_demo, metric):
    # The learning rate leaves the initial weights as they are, but for a millionth.
    same = (*QUICK, "--similarity_metric", metric, "--lr", "1e-8", "--ema_decay", "0", "--baselines", "none")
    routers = {}
    for recipe in ("default", "original"):
        _, output = run_demo(*same, "--recipe", recipe)
        routers[recipe] = RankRouter.load(output / "best_model.pt")
    last = {recipe: router.query_tower.mlp[-1].weight.abs().max().item() for recipe, router in routers.items()}
    assert last["default"] < 1e-5 < 0.1 < last["original"]
    router = routers["original"]
    x = router.query_tower.standardize(embed(demo, ["Who ruled Rome?", "lentil soup"]))
    cluster_idx = router.query_tower.assign(x)
    q, m = router.query_tower(x, cluster_idx), router.model_tower()
    expected = q @ m.T
    if metric == "cosine":
        expected = 10 * expected / (q.norm(dim=1)[:, None] * m.norm(dim=1))
    torch.testing.assert_close(router(x, cluster_idx), expected, atol=1e-4, rtol=1e-4)
    assert routers["default"].config.scale_dot


def comparable(history):
    args = {key: value for key, value in history["args"].items() if key != "output_dir"}
    return json.dumps(history | {"timing": None, "args": args})


def test_the_same_seed_gives_the_same_history_and_checkpoint(run_demo):
    (first, first_output), (second, second_output) = run_demo(*QUICK), run_demo(*QUICK)
    assert comparable(first) == comparable(second)
    states = [torch.load(out / "best_model.pt")["model_state_dict"] for out in (first_output, second_output)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_seed_varies_everything_unless_the_split_seed_is_given(run_demo):
    base, _ = run_demo(*QUICK)
    other, _ = run_demo(*QUICK, "--seed", "1")
    same_split, _ = run_demo(*QUICK, "--seed", "1", "--split_seed", "42")
    assert other["data"]["embeddings_hash"] != base["data"]["embeddings_hash"]
    assert same_split["data"] == base["data"]
    assert same_split["clusters"] != base["clusters"]
    plain, plain_other = (
        run_demo(*QUICK, "--num_clusters", "0", "--seed", seed, "--split_seed", "42")[0] for seed in ("42", "1")
    )
    assert plain["train_losses"] != plain_other["train_losses"]


ABLATIONS = [
    ("--loss_type", "bce"),
    ("--loss_type", "hinge"),
    ("--loss_type", "hinge", "--margin", "0.5"),
    ("--similarity_metric", "cosine"),
    ("--num_clusters", "0"),
    ("--no_model_id",),
    ("--no_capability",),
    ("--ties", "half"),
    ("--split_by", "battle"),
    ("--pooling", "last"),
    ("--max_length", "4"),
    ("--margin", "0"),
    ("--batch_size", "7"),
    ("--capability_dim", "8"),
    ("--capability_init", "win_rate"),
    ("--freeze_capabilities",),
    ("--id_dropout", "0"),
    ("--cluster_dim", "8"),
    ("--dropout", "0.1"),
    ("--recipe", "original"),
    ("--recipe", "original", "--dropout", "0.5", "--id_dropout", "0.1", "--ema_decay", "0.999", "--eval_every", "100"),
    ("--weight_decay", "1"),
    ("--dtype", "bfloat16"),
]


def test_every_ablation_runs_and_differs(run_demo):
    losses = {(): run_demo(*QUICK)[0]["train_losses"][-1]}
    for flags in ABLATIONS:
        history, _ = run_demo(*QUICK, *flags)
        assert history["status"] == "finished"
        losses[flags] = history["train_losses"][-1]
    assert len(set(losses.values())) == len(losses), losses


def test_a_split_by_battle_is_counted(run_demo):
    history, _ = run_demo(*QUICK, "--split_by", "battle")
    assert history["data"]["test_queries_in_train"] > 0


@pytest.mark.parametrize(("loss_type", "margin"), [("bpr", 2.0), ("hinge", 0.0), ("bce", 0.0)])
def test_only_bpr_reads_scores_with_its_margin(demo, run_demo, loss_type, margin):
    history, output = run_demo(*QUICK, "--loss_type", loss_type, "--margin", "2")
    part = split_battles(load_battles(str(demo / "battles.parquet"), limit=600)[0], 42)[0].test
    d = margins(RankRouter.load(output / "best_model.pt"), embed(demo, part.queries), part)
    assert history["test_metrics"]["log_loss"] == pytest.approx(metrics.log_loss(d, part.outcome, margin), abs=1e-5)


def test_the_intervals_are_over_the_test_queries_of_the_checkpoint_that_was_kept(demo, run_demo):
    history, output = run_demo(*QUICK)
    part = split_battles(load_battles(str(demo / "battles.parquet"), limit=600)[0], 42)[0].test
    router = RankRouter.load(output / "best_model.pt")
    d, rng = margins(router, embed(demo, part.queries), part), np.random.default_rng(5)
    rows_of_query = [np.flatnonzero(part.query_idx == query) for query in np.unique(part.query_idx)]
    values = []
    for _ in range(1000):  # written out, with other random numbers
        rows = np.concatenate([rows_of_query[i] for i in rng.integers(len(rows_of_query), size=len(rows_of_query))])
        loss = metrics.log_loss(d[rows], part.outcome[rows], temperature=history["calibration"]["temperature"])
        values.append((metrics.auc(d[rows], part.outcome[rows]), loss))
    for name, column in zip(("auc", "log_loss_calibrated"), np.transpose(values), strict=True):
        low, high = history["test_intervals"][name]
        assert low < history["test_metrics"][name] < high
        assert (low, high) == pytest.approx(np.percentile(column, [2.5, 97.5]), abs=0.15 * (high - low))
    assert list(history["test_intervals"]) == list(history["test_metrics"])
    weights = metrics.bootstrap_weights(part.query_idx, history["args"]["seed"])
    samples = metrics.evaluate_resamples(d, part.outcome, part.model_a_idx, part.model_b_idx, weights)
    assert metrics.interval(samples["accuracy"]) == pytest.approx(history["test_intervals"]["accuracy"], abs=1e-9)


def test_a_step_trains_with_dropout_also_after_an_evaluation():
    state, x, _ = make_state(num_battles=6, lr=0.0)
    state.router.score(x, torch.zeros(6, dtype=torch.int64))
    assert not state.router.training
    (first,) = train_epoch(state)
    assert state.router.training
    state.next_epoch()
    (second,) = train_epoch(state)
    assert first != second  # of the same battles and weights


def test_a_score_table_trains(run_demo, tmp_path):
    rng = np.random.default_rng(0)
    prompts = [f"solve problem {i}" if i % 2 else f"write poem {i}" for i in range(200)]
    table = pd.DataFrame({"prompt": prompts, "m1": rng.random(200), "m2": rng.random(200), "m3": rng.random(200)})
    table.to_parquet(tmp_path / "scores.parquet")
    history, _ = run_demo("--data_path", str(tmp_path / "scores.parquet"), "--num_clusters", "2", "--epochs", "1")
    assert history["data"]["battles"] == 600
    assert history["data"]["score_columns"] == ["m1", "m2", "m3"]
    two = ("--score_columns", "m3, m1", "--num_clusters", "2", "--epochs", "1")
    history, output = run_demo("--data_path", str(tmp_path / "scores.parquet"), *two)
    assert history["data"]["battles"] == 200
    assert RankRouter.load(output / "best_model.pt").model_names == ["m1", "m3"]


@pytest.fixture(scope="session")
def table_run(run_demo, tmp_path_factory):
    """A run on a score table in which the kind of prompt decides who is best; returns history, output and table."""
    rng = np.random.default_rng(0)
    verbs = np.array(["solve problem", "write poem", "sing song"])[rng.integers(3, size=400)]
    quality = {"solve problem": (0.7, 0.4, 0.2), "write poem": (0.1, 0.5, 0.3), "sing song": (0.2, 0.3, 0.6)}
    scores = np.array([quality[verb] for verb in verbs]) + rng.normal(0, 0.15, (400, 3))
    table = pd.DataFrame({"prompt": [f"{verb} {i}" for i, verb in enumerate(verbs)]})
    table[["m1", "m2", "m3"]] = scores
    table.loc[::7, "m3"] = np.nan
    path = tmp_path_factory.mktemp("table") / "scores.parquet"
    table.to_parquet(path)
    history, output = run_demo("--data_path", str(path), "--num_clusters", "3", "--epochs", "6", "--lr", "1e-3")
    return history, output, path


def test_a_score_table_is_evaluated_by_the_scores_of_the_chosen_models(demo, table_run):
    history, output, path = table_run
    split, _ = split_battles(load_battles(str(path))[0], 42)
    table, train = split.test.table, split.train.table.scores
    router = RankRouter.load(output / "best_model.pt")
    x = router.query_tower.standardize(embed(demo, [split.test.queries[i] for i in table.query_idx]))
    scores = router(x, router.query_tower.assign(x)).detach().numpy()
    best_single = np.nanmean(train, 0).argmax()
    fallback = np.argsort(-np.nanmean(train, 0))  # every model has most of the rows
    chosen, single, hits = [], [], []
    for row, mine in zip(table.scores, scores, strict=True):
        there = np.flatnonzero(~np.isnan(row))
        choice = max(there, key=lambda model: mine[model])
        chosen.append(row[choice])
        hits.append(row[choice] == np.nanmax(row))
        single.append(row[next(model for model in fallback if model in there)])
    oracle = np.nanmax(table.scores, 1)
    test, ends = history["test_metrics"], history["score_table"]
    assert test["mean_score"] == pytest.approx(np.mean(chosen), abs=1e-9)
    assert test["top1_accuracy"] == pytest.approx(np.mean(hits), abs=1e-9)
    gap = (np.mean(chosen) - np.mean(single)) / (np.mean(oracle) - np.mean(single))
    assert test["gap_closed"] == pytest.approx(gap)
    assert (ends["rows"], ends["best_single"]["model"]) == (len(table.scores), f"m{best_single + 1}")
    assert ends["best_single"]["mean_score"] == pytest.approx(np.mean(single))
    assert ends["oracle"]["mean_score"] == pytest.approx(np.mean(oracle))
    assert (ends["oracle"]["top1_accuracy"], router.metadata.best_single_model) == (1, f"m{best_single + 1}")
    assert gap > 0.4  # the kind of prompt was planted
    rng, values = np.random.default_rng(3), []
    for _ in range(1000):  # a query has one row here
        rows = rng.integers(len(oracle), size=len(oracle))
        low, mid, high = (np.array(column)[rows].mean() for column in (single, chosen, oracle))
        values.append((mid, (mid - low) / (high - low)))
    for name, column in zip(("mean_score", "gap_closed"), np.transpose(values), strict=True):
        low, high = history["test_intervals"][name]
        assert (low, high) == pytest.approx(np.percentile(column, [2.5, 97.5]), abs=0.2 * (high - low))


@pytest.mark.parametrize("winner", ["alphabet", "random"])
def test_separable_battles_leave_a_valid_history(run_demo, tmp_path, winner):
    rng, names = np.random.default_rng(0), np.array(["a", "b", "c", "d"])
    pairs = [sorted(rng.choice(4, 2, replace=False)) for _ in range(200)]
    table = pd.DataFrame({"prompt": [f"query {i}" for i in range(200)]})
    table["model_a"], table["model_b"] = names[np.array(pairs).T]
    table["winner"] = "model_a" if winner == "alphabet" else rng.choice(["model_a", "model_b"], 200)
    table.head(200 if winner == "alphabet" else 10).to_parquet(tmp_path / "battles.parquet")
    flags = ("--num_clusters", "4", "--epochs", "8", "--lr", "5e-3", "--baselines", "all")
    history, _ = run_demo("--data_path", str(tmp_path / "battles.parquet"), *flags)
    assert history["status"] == "finished"
    odds = [value for cluster in history["clusters"] for value in (cluster["log_odds"] or {}).values()]
    assert np.isfinite(odds).all()


def test_the_baselines_are_those_requested_with_the_seed_of_the_run(run_demo, monkeypatch):
    fit, requested = baselines.fit, []

    def watched(split, x, cluster_idx, num_clusters, learned, seed):
        requested.append((num_clusters, learned, seed))
        return fit(split, x, cluster_idx, num_clusters, False, seed)

    monkeypatch.setattr(baselines, "fit", watched)
    for which in ("fast", "all", "none"):
        run_demo("--limit", "100", "--epochs", "1", "--num_clusters", "2", "--seed", "7", "--baselines", which)
    assert requested == [(2, False, 7), (2, True, 7)]


def test_few_test_queries_give_no_verdict(demo_dir, tmp_path, capsys):
    flags = ("--limit", "100", "--epochs", "1", "--num_clusters", "2", "--output_dir", str(tmp_path))
    train.main(["--demo", "--demo_dir", str(demo_dir), *flags])
    assert capsys.readouterr().out.count("no verdict on fewer than 30 queries") == 4


def test_the_gap_is_undefined_where_the_best_single_model_is_as_good_as_the_oracle(run_demo, tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"prompt": [f"query {i}" for i in range(120)], "good": 1.0, "bad": rng.random(120) / 2})
    table.to_parquet(tmp_path / "scores.parquet")
    history, output = run_demo("--data_path", str(tmp_path / "scores.parquet"), "--num_clusters", "2", "--epochs", "1")
    assert history["test_metrics"]["gap_closed"] is history["test_intervals"]["gap_closed"] is None
    assert history["baselines"]["random"]["difference"]["gap_closed"] is None
    assert history["score_table"]["oracle"]["mean_score"] == history["score_table"]["best_single"]["mean_score"] == 1
    (run,), _ = read_runs([str(output)])
    assert run.test["gap_closed"] is None


def test_baselines_on_a_score_table_are_paired_with_the_router(table_run):
    history, _, _ = table_run
    rows, test = history["baselines"], history["test_metrics"]
    assert set(rows) == {"random", "best_single", "bradley_terry", "cluster_bradley_terry", "neighbours"}
    assert rows["best_single"]["gap_closed"] == 0
    assert rows["best_single"]["intervals"]["gap_closed"] == [0, 0]
    assert rows["best_single"]["mean_score"] == pytest.approx(history["score_table"]["best_single"]["mean_score"])
    assert rows["random"]["gap_closed"] < 0
    for row in rows.values():
        for name in ("mean_score", "gap_closed", "top1_accuracy"):
            assert row["difference"][name] == pytest.approx(test[name] - row[name])
            low, high = row["difference_intervals"][name]
            assert low <= row["difference"][name] <= high
    # Paired on the same samples: the gap closed beyond one that closes none is the gap closed.
    assert rows["best_single"]["difference_intervals"]["gap_closed"] == pytest.approx(
        history["test_intervals"]["gap_closed"]
    )


def test_the_score_table_is_printed_and_also_without_baselines(demo_dir, table_run, tmp_path, capsys):
    _, _, path = table_run
    flags = ["--demo", "--demo_dir", str(demo_dir), "--data_path", str(path), "--output_dir", str(tmp_path)]
    flags += ["--num_clusters", "3", "--epochs", "1", "--dtype", "float32"]
    labels = ["RankRouter", "random", "best single model", "Bradley-Terry", "per-cluster BT", "neighbours", "oracle"]
    for more, expected in (([], labels), (["--baselines", "none"], [labels[0], labels[2], labels[-1]])):
        train.main(flags + more)
        printed = capsys.readouterr().out
        history = json.loads((tmp_path / "training_history.json").read_text())
        for row in history["baselines"].values():
            low, high = row["difference_intervals"]["mean_score"]
            assert f"  {row['difference']['mean_score']:+.4f} [{low:+.4f}, {high:+.4f}]  " in printed
        calibration = history["calibration"]
        errors = [each["expected_calibration_error"] for each in (calibration["uncalibrated"], calibration)]
        assert "Expected calibration error {:.4f}, and {:.4f} at the temperature".format(*errors) in printed
        table = printed.split("mean score, 95 %")[1].split("\n\n")[0].splitlines()[1:]
        assert [line[:18].strip() for line in table] == expected
    train.main([*flags, "--pairs_per_query", "1"])
    data = json.loads((tmp_path / "training_history.json").read_text())["data"]
    assert data["split"]["train"]["battles"] == data["split"]["train"]["queries"]
    drawn = f"drawn    {data['training_battles_not_drawn']} training battles are left out by --pairs_per_query"
    assert drawn in capsys.readouterr().out
    train.main([*flags, "--split_by", "battle"])
    printed = capsys.readouterr().out
    assert "are not evaluated: --split_by battle" in printed
    assert "oracle" not in printed


def test_shuffled_rows_of_a_score_table_close_no_gap(run_demo, table_run, tmp_path):
    table = pd.read_parquet(table_run[2])
    table[["m1", "m2", "m3"]] = table[["m1", "m2", "m3"]].sample(frac=1, random_state=0).to_numpy()
    table.to_parquet(tmp_path / "shuffled.parquet")
    flags = ("--num_clusters", "3", "--epochs", "3")
    history, _ = run_demo("--data_path", str(tmp_path / "shuffled.parquet"), *flags)
    assert history["test_intervals"]["gap_closed"][0] < 0.05
    for name in ("best_single", "bradley_terry"):
        low, high = history["baselines"][name]["difference_intervals"]["mean_score"]
        assert low <= 0 <= high


def test_the_calibration_is_that_of_the_test_battles(demo, default_run):
    history, output = default_run
    router = RankRouter.load(output / "best_model.pt")
    part = split_battles(load_battles(str(demo / "battles.parquet"))[0], 42)[0].test
    d = margins(router, embed(demo, part.queries), part)
    calibration = history["calibration"]
    assert set(calibration) == {"temperature", "expected_calibration_error", "bins", "uncalibrated"}
    for found, link in ((calibration, (0.0, calibration["temperature"])), (calibration["uncalibrated"], (1.0, 1.0))):
        error, bins = metrics.reliability(d, part.outcome, *link).values()
        assert found["expected_calibration_error"] == pytest.approx(error, abs=1e-3)
        assert sum(part["battles"] for part in found["bins"]) == len(d) == sum(part["battles"] for part in bins)


def test_clusters_are_described_by_their_central_queries_and_strong_models(demo, default_run):
    history, output = default_run
    router = RankRouter.load(output / "best_model.pt")
    part = split_battles(load_battles(str(demo / "battles.parquet"))[0], 42)[0].train
    queries = np.unique(part.query_idx)
    x = router.query_tower.standardize(embed(demo, part.queries))
    cluster_idx = router.query_tower.assign(x).numpy()
    for number in (0, 7, 49):
        cluster = history["clusters"][number]
        inside = queries[cluster_idx[queries] == number]
        distance = (x[inside] - router.query_tower.centroids[number]).norm(dim=1).numpy()
        assert cluster["central_queries"] == [part.queries[query] for query in inside[np.argsort(distance)[:3]]]
        means = router(x[inside], torch.from_numpy(cluster_idx[inside])).detach().numpy().mean(0)
        wins = []
        for model in range(12):
            d = np.delete(means[model] - means, model).astype(float)
            wins.append(
                np.exp(metrics.log_win_probability(d, temperature=history["calibration"]["temperature"])).mean()
            )
        expected = np.log(np.array(wins) / (1 - np.array(wins)))
        assert list(cluster["log_odds"]) == part.model_names
        assert list(cluster["log_odds"].values()) == pytest.approx(expected, abs=1e-3)


def test_the_best_single_model_of_battles_is_the_strongest_by_bradley_terry(demo, default_run):
    _, output = default_run
    truth = json.loads((demo / "truth.json").read_text())
    _, fixed = true_skills(demo, [], truth["models"])
    assert RankRouter.load(output / "best_model.pt").metadata.best_single_model == truth["models"][fixed.argmax()]


def test_the_demo_is_the_same_wherever_it_is_written(demo, tmp_path):
    again = demo_folder(str(tmp_path))
    files = sorted(path.relative_to(demo) for path in demo.rglob("*") if path.is_file())
    assert len(files) >= 5
    assert all((again / file).read_bytes() == (demo / file).read_bytes() for file in files)
    assert demo_folder(str(tmp_path), seed=1).name != again.name


@pytest.mark.parametrize("lost", FILES)
def test_a_demo_that_lost_a_file_is_made_again(demo, tmp_path, lost):
    shutil.copytree(demo, tmp_path / demo.name)
    (tmp_path / demo.name / lost).unlink()
    again = demo_folder(str(tmp_path))
    assert all((again / file).read_bytes() == (demo / file).read_bytes() for file in FILES)


# --- bad input ------------------------------------------------------------------------------------------------


def test_missing_data_is_reported_before_the_demo_is_made_or_a_hub_is_requested(fails, tmp_path):
    fresh = str(tmp_path / "demo")
    message = fails("--output_dir", str(tmp_path), "--data_path", "no/such.parquet", "--demo", "--demo_dir", fresh)
    assert not Path(fresh).exists()
    assert "no data at" in fails("--output_dir", str(tmp_path), "--data_path", "no/such.parquet", "--model_path", "a/b")
    for part in ("no data at no/such.parquet", "accept", "hf download lmsys/chatbot_arena_conversations", "--demo"):
        assert part in message


def test_the_message_about_a_missing_encoder_says_how_to_get_it(fails, tmp_path, demo):
    data = str(demo / "battles.parquet")
    message = fails("--output_dir", str(tmp_path), "--data_path", data, "--model_path", "../no/model")
    assert "no model folder at ../no/model" in message
    assert "hf download Qwen/Qwen2-0.5B" in message
    message = fails("--output_dir", str(tmp_path), "--data_path", data, "--model_path", str(tmp_path))
    assert "is not a Hugging Face model" in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--batch_size", "0"),
        ("--batch_size", "ten"),
        ("--batch_size", "1" + "0" * 24),
        ("--epochs", "0"),
        ("--epochs", "1.5"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--lr", "-1"),
        ("--embedding_dim", "0"),
        ("--embedding_dim", "99999999"),
        ("--capability_dim", "-3"),
        ("--cluster_dim", "0"),
        ("--num_clusters", "-1"),
        ("--margin", "-0.1"),
        ("--dropout", "1"),
        ("--weight_decay", "-1"),
        ("--max_length", "0"),
        ("--limit", "0"),
        ("--seed", "-1"),
        ("--seed", "4294967296"),
        ("--loss_type", "BPR"),
        ("--similarity_metric", "euclid"),
        ("--score_columns", ","),
        ("--no_such_flag", "1"),
        ("--loss", "bce"),  # no abbreviations
    ],
)
def test_flags_out_of_range_are_refused(fails, tmp_path, flag, value):
    message = fails("--demo", "--output_dir", str(tmp_path / "out"), flag, value)
    assert flag in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "hpu", ""])
def test_devices_that_do_not_exist_are_refused(fails, tmp_path, demo_dir, device):
    message = fails("--demo", "--demo_dir", str(demo_dir), "--output_dir", str(tmp_path), "--device", device)
    assert "--device" in message


def test_a_model_tower_without_input_is_refused(fails):
    assert "without input" in fails("--demo", "--no_model_id", "--no_capability")


def test_more_clusters_than_training_queries_are_refused(fails, tmp_path, demo_dir):
    common = ("--demo", "--demo_dir", str(demo_dir), "--output_dir", str(tmp_path), "--limit", "40")
    assert "--num_clusters 50 is more than the 3" in fails(*common)
    assert not (tmp_path / "training_history.json").exists()


@pytest.mark.parametrize("flag", ["--output_dir", "--demo_dir", "--model_path", "--data_path", "--cache_dir"])
def test_an_empty_path_does_not_mean_the_current_folder(fails, demo_dir, tmp_path, flag):
    paths = {"--output_dir": str(tmp_path), "--demo_dir": str(demo_dir)} | {flag: ""}
    message = fails("--demo", *(word for pair in paths.items() for word in pair))
    assert "is empty" in message or "no model folder at" in message or "no data at" in message


def test_folders_that_cannot_be_written_are_refused(fails, tmp_path):
    (tmp_path / "file").write_text("")
    inside = str(tmp_path / "file" / "folder")
    assert "choose another with --output_dir" in fails("--demo", "--output_dir", inside)
    message = fails("--demo", "--demo_dir", inside, "--output_dir", str(tmp_path / "out"))
    assert "choose another with --demo_dir" in message


def test_a_read_only_output_folder_is_refused(fails, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # the superuser may write anywhere, "nobody" may not
    try:
        assert "choose another with --output_dir" in fails("--demo", "--output_dir", str(tmp_path / "out"))
    finally:
        os.seteuid(user)


def test_a_corrupt_encoder_fails_the_run_and_its_history(fails, demo, tmp_path):
    shutil.copytree(demo / "encoder", tmp_path / "encoder")
    (tmp_path / "encoder" / "model.safetensors").write_bytes(b"cut")
    data = ("--data_path", str(demo / "battles.parquet"))
    message = fails(*data, "--model_path", str(tmp_path / "encoder"), "--output_dir", str(tmp_path))
    assert "could not be loaded" in message
    assert json.loads((tmp_path / "training_history.json").read_text())["status"] == "failed"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(fails, demo_dir, tmp_path, monkeypatch):
    calls = 0

    def breaks(a, b, outcome, margin):
        nonlocal calls
        calls += 1
        return loss.hinge(a, b, outcome, margin) * (float("nan") if calls == 20 else 1)

    monkeypatch.setitem(loss.LOSSES, "bpr", breaks)
    flags = ("--limit", "600", "--num_clusters", "0", "--batch_size", "64", "--embedding_dim", "48")
    message = fails("--demo", "--demo_dir", str(demo_dir), "--output_dir", str(tmp_path), *flags)
    history = json.loads((tmp_path / "training_history.json").read_text())
    steps = -(-history["data"]["split"]["train"]["battles"] // 64)
    epoch, step = divmod(19, steps)
    assert f"epoch {epoch}: the loss is nan at step {step}" in message
    assert history["status"] == "failed"
    assert f"the checkpoint of epoch {history['best_epoch']} is kept" in message
    assert len(history["val_metrics"]) == epoch > 0
    assert RankRouter.load(tmp_path / "best_model.pt").metadata.epoch == history["best_epoch"]


def test_embeddings_that_are_not_finite_are_refused(fails, demo, tmp_path):
    network = AutoModel.from_pretrained(demo / "encoder")
    with torch.no_grad():
        network.embed_tokens.weight[:50] = float("nan")
    shutil.copytree(demo / "encoder", tmp_path / "encoder")
    network.save_pretrained(tmp_path / "encoder")
    data = ("--data_path", str(demo / "battles.parquet"), "--limit", "100", "--num_clusters", "2")
    data += ("--dtype", "float32")
    message = fails(*data, "--model_path", str(tmp_path / "encoder"), "--output_dir", str(tmp_path))
    assert "are not finite in float32" in message


def test_a_run_that_fails_does_not_leave_an_earlier_checkpoint_as_its_own(fails, run_demo, demo, tmp_path):
    _, output = run_demo(*QUICK)
    flags = ("--data_path", str(demo / "battles.parquet"), "--output_dir", str(output), *QUICK, "--lr", "1e30")
    message = fails(*flags, "--model_path", str(demo / "encoder"))
    assert "epoch 0" in message
    assert "is kept" not in message
    assert {path.name for path in output.iterdir()} == {"training_history.json"}
    train.main([*flags, "--lr", "1e-4", "--model_path", str(demo / "encoder")])
    assert {path.name for path in output.iterdir()} == {"training_history.json", "best_model.pt", "last_checkpoint.pt"}


@pytest.mark.parametrize("batch_size", ["32", "100000"])  # of one step an epoch, the loss itself is finite
def test_a_learning_rate_that_explodes_is_reported_in_one_line(fails, demo_dir, tmp_path, batch_size):
    flags = ("--limit", "300", "--num_clusters", "0", "--lr", "1e30", "--batch_size", batch_size)
    message = fails("--demo", "--demo_dir", str(demo_dir), "--output_dir", str(tmp_path), *flags)
    assert "epoch 0" in message
    assert "lower --lr" in message


def run_script(*flags):
    return subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["train.py", "route.py", "report.py"])
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--typo", 2)])
def test_help_and_typos_import_nothing_heavy(script, flag, code):
    program = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = [{script!r}, {flag!r}]
try:
    runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
finally:
    heavy = ("torch", "transformers", "sklearn", "pandas", "numpy", "scipy", "pyarrow")
    print("imported", [name for name in heavy if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == code
    *shown, imported = ended.stdout.splitlines()
    assert imported == "imported []"
    assert len(ended.stderr.splitlines()) == code // 2
    if flag == "--help":
        assert shown[0].startswith(f"usage: {script}")
    if (script, flag) == ("train.py", "--help"):
        assert "(default: 0.0001)" in "\n".join(shown)


def test_a_run_tests_its_own_weights_though_another_writes_to_the_same_folder(run_demo, monkeypatch):
    alone, _ = run_demo(*QUICK)
    save = RankRouter.save

    def overwritten(router, path):
        save(router, path)
        Path(path).write_bytes(b"another run's checkpoint")

    monkeypatch.setattr(RankRouter, "save", overwritten)
    assert run_demo(*QUICK)[0]["test_metrics"] == alone["test_metrics"]


def test_control_characters_in_file_names_are_not_printed(demo, tmp_path, capfd):
    folder = tmp_path / "\x1b[31mred\rfolder\n\x9b"
    folder.mkdir()
    battles, profiles, output = folder / "battles.parquet", folder / "profiles.csv", folder / "out"
    shutil.copy(demo / "battles.parquet", battles)
    rows = [f"demo-model-{letter},{number}" for number, letter in enumerate("abcdefghijkl")]
    profiles.write_text("\n".join(["model,score", *rows]))
    (folder / "bad.csv").write_text("model,score\n")
    (folder / "bad.parquet").write_bytes(b"PAR1")
    data = ["--data_path", str(battles), "--model_path", str(demo / "encoder"), "--output_dir", str(output)]
    data += [*QUICK, "--epochs", "1", "--baselines", "none", "--cache_dir", str(folder / "cache")]
    data += ["--capability_file", str(profiles)]
    for code, flags in (
        (0, ()),
        (0, ("--resume",)),
        (2, ("--resume", "--lr", "1")),
        (2, ("--data_path", str(folder / "missing.parquet"))),
        (2, ("--data_path", str(folder / "bad.parquet"))),
        (2, ("--capability_file", str(folder / "missing.csv"))),
        (2, ("--capability_file", str(folder / "bad.csv"))),
        (2, ("--output_dir", str(battles))),
        (2, ("--cache_dir", str(battles))),
        (2, ("--model_path", str(folder))),
        (2, ("--device", "\x1b[31mred folder")),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda flags=flags: train.main([*data, *flags]))
            sys.exit(0)
        out, err = capfd.readouterr()
        assert stopped.value.code == code, err
        assert "[31mred folder" in (err if code else out)
        assert all(line.isprintable() for line in [*out.split("\n"), *err.split("\n")])


@pytest.mark.parametrize(("redirect", "code"), [(">&-", 0), ("> /dev/full", 2)])
def test_standard_output_that_cannot_be_written_causes_no_traceback(demo, tmp_path, redirect, code):
    paths = f"--data_path {demo}/battles.parquet --model_path {demo}/encoder --output_dir {tmp_path}"
    quick = "--limit 100 --epochs 1 --num_clusters 0 --embedding_dim 8"
    command = f"{sys.executable} train.py {paths} {quick} {redirect}"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code
    assert len(ended.stderr.splitlines()) == (code > 0)


def test_the_script_ends_with_one_line_and_exit_code_2(tmp_path):
    ended = run_script("--output_dir", str(tmp_path), "--data_path", "no/such.parquet", "--model_path", str(tmp_path))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1


def test_the_defaults_are_the_contract():
    args = vars(train.parse_args([]))
    contract = {
        "data_path": "../data/chatbot_arena/data/train-00000-of-00001-cced8514c7ed782a.parquet",
        "model_path": "../model/Qwen2-0.5B",
        "output_dir": "./outputs",
        "batch_size": 32,
        "epochs": 10,
        "lr": 1e-4,
        "embedding_dim": 512,
        "margin": 1.0,
        "similarity_metric": "dot",
        "num_clusters": 50,
        "loss_type": "bpr",
        "seed": 42,
        "split_seed": 42,
        "ties": "drop",
        "split_by": "query",
        "max_length": 512,
        "pooling": "mean",
        "capability_dim": 64,
        "cluster_dim": 32,
    }
    assert {name: args[name] for name in contract} == contract
