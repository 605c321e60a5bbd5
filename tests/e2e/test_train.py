"""The training command: planted truth, what is kept and written, calibration, seeds, and every ablation."""

import hashlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_same, result
from sklearn.linear_model import LogisticRegression

import metrics
import train
from data_loader import load_battles, split_battles
from query_representation import query_features
from rankrouter import RankRouter, RouterConfig
from support.data.demo import true_skills
from support.encoding.encoder import QueryEncoder
from support.encoding.huggingface import encoder_fingerprint
from support.evaluation import baselines
from support.reporting.runs import parse
from support.system.files import content_hash
from support.training.history import History, LearningCurves


def one_hot_difference(battles):
    """+1 for model a, -1 for model b: the design matrix of Bradley-Terry."""
    identity = np.eye(len(battles.model_names))
    return identity[battles.model_a_idx] - identity[battles.model_b_idx]


def features_of(demo, split):
    """Features (Q, F) of a split's queries with the demo's encoder."""
    encoder = QueryEncoder(str(demo / "encoder"), torch.device("cpu"), dtype="float32", progress=False)
    queries = split.train.queries
    return query_features(queries, encoder.embed(queries)[0], ())


def margins(router, features, battles):
    """The router's margins d (N,) from features of all queries, as somebody who routes would get them."""
    scores = router(*router.query_tower.inputs(features)).detach().double().numpy()  # (Q, M)
    return scores[battles.query_idx, battles.model_a_idx] - scores[battles.query_idx, battles.model_b_idx]


@pytest.fixture(scope="module")
def default(demo, default_run):
    """The default run with its router, its split, and the features of its queries, computed again."""
    history, output = default_run
    split, _ = split_battles(load_battles(str(demo / "battles.parquet"))[0], 42)
    router = RankRouter.load(output / "best_model.pt")
    return SimpleNamespace(
        history=history, output=output, split=split, router=router, features=features_of(demo, split)
    )


@pytest.fixture
def run_small(small, tmp_path):
    """Train on a few battles with some flags, in a tenth of a second; returns the history and the output folder."""
    numbers = itertools.count()

    def run(*flags):
        output = tmp_path / f"run{next(numbers)}"
        train.main([*small, "--output_dir", str(output), *flags])
        return json.loads((output / "training_history.json").read_text()), output

    return run


@pytest.fixture(scope="module")
def small_split(small, demo):
    """The split of these battles, and the features of its queries."""
    split, _ = split_battles(load_battles(small[1])[0], 42)
    return split, features_of(demo, split)


# --- what is learned ------------------------------------------------------------------------------------------


def test_planted_truth_is_recovered(demo, default_run):
    history, output = default_run
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
    truth = json.loads((demo / "truth.json").read_text())
    _, fixed_skills = true_skills(demo, [], truth["models"])
    router = RankRouter.load(output / "best_model.pt")
    assert router.metadata.best_single_model == truth["models"][fixed_skills.argmax()]
    assert router.config == RouterConfig()


def test_nothing_is_learned_from_shuffled_outcomes(demo, run_demo, tmp_path):
    table = pd.read_parquet(demo / "battles.parquet")
    table["winner"] = np.random.default_rng(0).permutation(table["winner"].to_numpy())
    table.to_parquet(tmp_path / "shuffled.parquet")
    flags = "--limit 2000 --epochs 3 --embedding_dim 64 --batch_size 128 --lr 1e-3 --baselines none"
    history, _ = run_demo("--data_path", str(tmp_path / "shuffled.parquet"), *flags.split())
    assert history["test_metrics"]["auc"] == pytest.approx(0.5, abs=0.06)
    assert "demo" not in history  # the truth is not that of these battles


ABLATIONS = """
    --loss_type bce | --loss_type hinge | --loss_type hinge --margin 0.5 | --margin 0 | --similarity_metric cosine
    --num_clusters 0 | --cluster_dim 8 | --no_model_id | --id_dropout 0 | --no_capability | --capability_dim 8
    --capability_init win_rate | --freeze_capabilities | --ties half | --split_by battle | --pooling last
    --max_length 4 | --dtype bfloat16 | --batch_size 7 | --dropout 0.1 | --weight_decay 1 | --recipe original
    --recipe original --dropout 0.5 --id_dropout 0.1 --ema_decay 0.999 --eval_every 100 | --surface_features
    --recipe original --surface_features | --layers 1 | --layers 1,2 | --pooling mean+last
""".strip().replace("\n", "|")


def test_every_ablation_runs_and_differs(small, tmp_path):
    place, losses = small.index("--capability_dim"), {}
    base = [*small[:place], *small[place + 2 :], "--epochs", "1"]  # with win rates that flag is refused
    for flags in ("", *map(str.strip, ABLATIONS.split("|"))):
        train.main([*base, "--output_dir", str(tmp_path), *flags.split()])
        history = json.loads((tmp_path / "training_history.json").read_text())
        assert history["status"] == "finished", flags
        losses[flags] = history["train_losses"][-1]
        assert (history["data"]["test_queries_in_train"] > 0) == ("--split_by" in flags), flags
    assert len(set(losses.values())) == len(losses) == 29, losses


def test_separable_or_few_battles_leave_a_valid_history(run_demo, tmp_path):
    rng, names = np.random.default_rng(0), np.array(["a", "b", "c", "d"])
    pairs = [sorted(rng.choice(4, 2, replace=False)) for _ in range(200)]
    table = pd.DataFrame({"prompt": [f"query {i}" for i in range(200)]})
    table["model_a"], table["model_b"] = names[np.array(pairs).T]
    flags = ("--num_clusters", "4", "--epochs", "8", "--lr", "5e-3", "--baselines", "all")
    for winner, count in (("model_a", 200), (rng.choice(["model_a", "model_b"], 200), 10)):
        table.assign(winner=winner).head(count).to_parquet(tmp_path / "battles.parquet")
        history, _ = run_demo("--data_path", str(tmp_path / "battles.parquet"), *flags)
        assert history["status"] == "finished", count
        odds = [value for cluster in history["clusters"] for value in (cluster["log_odds"] or {}).values()]
        assert np.isfinite(odds).all(), count


# --- what is kept and written ---------------------------------------------------------------------------------


def test_the_history_is_complete_and_consistent(demo, default):
    history, output = default.history, default.output
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
    assert (data["validation_battles"], data["label_range"]) == (data["split"]["val"]["battles"], None)
    assert data["test_queries_in_train"] == 0
    assert sum(cluster["size"] for cluster in history["clusters"]) == data["split"]["train"]["queries"]
    assert history["args"]["split_seed"] == history["args"]["seed"] == 42
    assert {path.name for path in output.iterdir()} == {"training_history.json", "best_model.pt", "last_checkpoint.pt"}
    assert set(history) == {
        *("status", "args", "train_losses", "val_metrics", "best_epoch", "test_metrics", "data", "clusters"),
        *("calibration", "environment", "timing", "demo", "test_intervals", "baselines", "encoder"),
        *("validations", "best_step", "guard"),
    }
    counts = ("queries_encoded", "queries_from_cache")
    assert set(history["timing"]) == {"load", "encode", "cluster", "train", "evaluate", "baselines", *counts}
    assert all(history["timing"][name] > 0 for name in ("load", "encode", "cluster", "train", "evaluate"))
    assert data["content_hash"] == content_hash([demo / "battles.parquet"])
    assert data["embeddings_hash"] == hashlib.sha256(default.features[:, :128].numpy().tobytes()).hexdigest()
    assert default.router.metadata.encoder == {
        "path": str(demo / "encoder"),
        "from_hub": False,
        "fingerprint": encoder_fingerprint(demo / "encoder"),
        "width": 128,
        "pooling": "mean",
        "prefix": "",
        "include_prompt": True,
        "max_length": 512,
        "dtype": "float32",
    }


def test_the_checkpoint_is_that_of_the_best_epoch_and_gives_the_test_metrics(default):
    history, router, split = default.history, default.router, default.split
    vals = {(val["epoch"], val["step"]): val for val in history["validations"]}
    vals |= {(epoch, None): val for epoch, val in enumerate(history["val_metrics"])}
    best = vals[history["best_epoch"], history["best_step"]]
    assert best["auc"] == max(val["auc"] for val in vals.values())
    assert (router.metadata.epoch, router.metadata.step) == (history["best_epoch"], history["best_step"])
    for part, expected in ((split.val, best), (split.test, history["test_metrics"])):
        d = margins(router, default.features, part)
        got = metrics.evaluate(d, part.outcome, part.model_a_idx, part.model_b_idx, margin=1.0)
        assert got == pytest.approx({key: expected[key] for key in got}, abs=1e-6)


def test_the_best_checkpoint_is_kept_and_tested_where_later_epochs_are_worse(run_small, small_split):
    history, output = run_small(*["--recipe", "original", "--epochs", "12", "--lr", "3e-3", "--dropout", "0"])
    aucs = [row["auc"] for row in history["val_metrics"]]
    assert history["best_epoch"] == int(np.argmax(aucs)) < 11  # the run is one that overfits
    router = RankRouter.load(output / "best_model.pt")
    assert router.metadata.val_metrics["auc"] == max(aucs)
    split, features = small_split
    d = margins(router, features[:, :128], split.test)  # that recipe sees no surface features
    assert history["test_metrics"]["log_loss"] == pytest.approx(metrics.log_loss(d, split.test.outcome, 1.0), abs=1e-5)


def test_of_equal_epochs_the_earliest_is_kept(run_small, monkeypatch):
    def constant(d, outcome, weights=None):
        return 0.7 if weights is None else np.full(len(weights), 0.7)

    monkeypatch.setattr(metrics, "auc", constant)
    history, output = run_small()
    assert history["best_epoch"] == RankRouter.load(output / "best_model.pt").metadata.epoch == 0


def test_the_best_validation_may_lie_within_an_epoch(run_small):
    history, output = run_small("--eval_every", "2")
    steps = -(-history["data"]["split"]["train"]["battles"] // 40)
    assert [(val["epoch"], val["step"]) for val in history["validations"]] == [
        (epoch, step) for epoch in (0, 1) for step in range(2, steps, 2)
    ]
    highest = max(val["auc"] for val in (*history["validations"], *history["val_metrics"]))
    epoch, step = history["best_epoch"], history["best_step"]
    first, *_ = [(e, s) for e, s, val in curves_of(history).in_order() if val["auc"] == highest]
    assert (epoch, step) == first
    metadata = RankRouter.load(output / "best_model.pt").metadata
    assert (metadata.epoch, metadata.step, metadata.val_metrics["auc"]) == (epoch, step, highest)
    assert parse("run", history | {"best_epoch": 0, "best_step": 2}).val_auc == history["validations"][0]["auc"]


def curves_of(history):
    return LearningCurves(history["train_losses"], history["val_metrics"], history["validations"])


def test_patience_ends_a_training_early(run_small, small, capsys):
    # At so high a rate the first validations are the best.
    rates = ["--eval_every", "2", "--patience", "2", "--lr", "3", "--epochs", "50"]
    history, output = run_small(*rates)
    assert history["status"] == "finished"
    assert len(history["train_losses"]) == len(history["val_metrics"]) < 50
    assert curves_of(history).out_of_patience(2)
    assert "stopped  no new best in 2 validations" in capsys.readouterr().out
    train.main([*small, *rates, "--output_dir", str(output), "--resume"])
    assert "finished already" in capsys.readouterr().out


def test_the_history_is_written_after_every_epoch(run_small, monkeypatch):
    written, write = [], History.write

    def watched(history):
        write(history)
        read = json.loads(history.path.read_text())
        written.append((read["status"], len(read["train_losses"]), len(read["val_metrics"])))

    monkeypatch.setattr(History, "write", watched)
    run_small()
    assert written == [("running", 0, 0), ("running", 1, 1), ("running", 2, 2), ("finished", 2, 2)]


def test_a_run_tests_its_own_weights_though_another_writes_to_the_same_folder(run_small, tiny_run, monkeypatch):
    save = RankRouter.save

    def overwritten(router, path):
        save(router, path)
        Path(path).write_bytes(b"another run's checkpoint")

    monkeypatch.setattr(RankRouter, "save", overwritten)
    assert run_small()[0]["test_metrics"] == tiny_run[0]["test_metrics"]


def test_a_run_flushes_denormals(run_small):
    torch.set_flush_denormal(False)
    denormal = torch.tensor([1e-30])
    assert (denormal * 1e-10).item() > 0
    run_small()
    assert (denormal * 1e-10).item() == 0


@pytest.fixture
def three_threads():
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def test_towers_train_with_one_thread_unless_told_otherwise(run_small, three_threads, monkeypatch):
    fit, in_fit = train.fit, []
    monkeypatch.setattr(
        train, "fit", lambda *args, **named: (in_fit.append(torch.get_num_threads()), fit(*args, **named))
    )
    for flags, variable, expected in (
        ((), None, (3, 1)),
        ((), "3", (3, 3)),
        (("--threads", "2"), None, (2, 2)),
        (("--threads", "2"), "3", (2, 2)),
    ):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if variable:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        used = run_small("--limit", "90", "--epochs", "1", *flags)[0]["environment"]
        assert (used["threads"], used["tower_threads"]) == expected, (flags, variable)
        assert in_fit.pop() == expected[1], (flags, variable)
        assert torch.get_num_threads() == 3


# --- seeds ----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_history_and_checkpoint(run_small, tiny_run):
    assert_same(run_small()[1], result(tiny_run[1]))


def test_the_seed_varies_everything_unless_the_split_seed_is_given(run_small):
    seeds = ((), ("--seed", "1"), ("--seed", "1", "--split_seed", "42"))
    base, other, same_split = (run_small("--limit", "90", *flags)[0] for flags in seeds)
    assert other["data"]["embeddings_hash"] != base["data"]["embeddings_hash"]
    assert same_split["data"] == base["data"]
    assert same_split["clusters"] != base["clusters"]
    seeds = (("--seed", seed, "--split_seed", "42", "--num_clusters", "0") for seed in ("42", "1"))
    first, second = (run_small(*flags)[0]["train_losses"] for flags in seeds)
    assert first != second


# --- clusters, calibration, intervals, baselines --------------------------------------------------------------


def test_statistics_and_clusters_see_training_queries_only(default):
    history, router = default.history, default.router
    features = default.features[np.unique(default.split.train.query_idx)]
    torch.testing.assert_close(router.query_tower.mean, features.mean(0), atol=1e-6, rtol=1e-5)
    scale = features.std(0, correction=0)
    scale[scale == 0] = 1  # of what is the same in all queries
    torch.testing.assert_close(router.query_tower.scale, scale, atol=1e-6, rtol=1e-5)
    x, cluster_idx = router.query_tower.inputs(features)
    assert torch.bincount(cluster_idx, minlength=50).tolist() == [cluster["size"] for cluster in history["clusters"]]
    for k, centroid in enumerate(router.query_tower.centroids):  # the mean of its training queries, and of no other
        torch.testing.assert_close(x[cluster_idx == k].mean(0), centroid, atol=0.02, rtol=0)


def test_clusters_are_described_by_their_central_queries_and_strong_models(default):
    history, router, part = default.history, default.router, default.split.train
    queries = np.unique(part.query_idx)
    x = router.query_tower.standardize(default.features)
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
            wins.append(np.exp(metrics.log_win_probability(d, temperature=router.temperature)).mean())
        expected = np.log(np.array(wins) / (1 - np.array(wins)))
        assert list(cluster["log_odds"]) == part.model_names
        assert list(cluster["log_odds"].values()) == pytest.approx(expected, abs=1e-3)


def test_the_temperature_is_fitted_on_validation_and_calibrates_the_test_battles(default):
    router, val, test = default.router, default.split.val, default.split.test
    calibration = default.history["calibration"]
    assert set(calibration) == {"temperature", "expected_calibration_error", "bins", "uncalibrated"}
    temperature = metrics.fit_temperature(margins(router, default.features, val), val.outcome)
    assert router.metadata.temperature == calibration["temperature"] == pytest.approx(temperature, rel=1e-3)
    assert temperature != pytest.approx(1, abs=0.05)
    d = margins(router, default.features, test)
    calibrated = metrics.log_loss(d, test.outcome, temperature=temperature)
    assert default.history["test_metrics"]["log_loss_calibrated"] == pytest.approx(calibrated, abs=1e-4)
    for found, link in ((calibration, (0.0, temperature)), (calibration["uncalibrated"], (1.0, 1.0))):
        reliability = metrics.Reliability(*link)
        reliability.add(d, test.outcome)
        error, bins = reliability.as_dict().values()
        assert found["expected_calibration_error"] == pytest.approx(error, abs=1e-3)
        assert sum(part["battles"] for part in found["bins"]) == len(d) == sum(part["battles"] for part in bins)


def test_only_bpr_reads_scores_with_its_margin(run_small, small_split):
    split, features = small_split
    for loss_type in ("bpr", "bce", "hinge"):
        history, output = run_small("--loss_type", loss_type, "--margin", "2")
        d = margins(RankRouter.load(output / "best_model.pt"), features, split.test)
        expected = metrics.log_loss(d, split.test.outcome, 2.0 if loss_type == "bpr" else 0.0)
        assert history["test_metrics"]["log_loss"] == pytest.approx(expected, abs=1e-5), loss_type


def test_the_intervals_are_over_the_test_queries_of_the_checkpoint_that_was_kept(default):
    history, part, rng = default.history, default.split.test, np.random.default_rng(5)
    d = margins(default.router, default.features, part)
    rows_of_query = [np.flatnonzero(part.query_idx == query) for query in np.unique(part.query_idx)]
    values = []
    for _ in range(1000):  # written out, with other random numbers
        rows = np.concatenate([rows_of_query[i] for i in rng.integers(len(rows_of_query), size=len(rows_of_query))])
        log_loss = metrics.log_loss(d[rows], part.outcome[rows], temperature=default.router.temperature)
        values.append((metrics.auc(d[rows], part.outcome[rows]), log_loss))
    for name, column in zip(("auc", "log_loss_calibrated"), np.transpose(values), strict=True):
        low, high = history["test_intervals"][name]
        assert low < history["test_metrics"][name] < high
        assert (low, high) == pytest.approx(np.percentile(column, [2.5, 97.5]), abs=0.15 * (high - low))
    assert list(history["test_intervals"]) == list(history["test_metrics"])
    totals = metrics.Totals(metrics.bootstrap_weights(len(part.unique_queries), history["args"]["seed"]), 12)
    totals.add(*next(part.chunks()), d)
    assert metrics.interval(totals.metrics()["accuracy"]) == pytest.approx(
        history["test_intervals"]["accuracy"], abs=1e-9
    )


def test_the_baselines_are_those_requested_with_the_seed_of_the_run(run_small, monkeypatch, capsys):
    fit, requested = baselines.fit, []

    def watched(split, x, cluster_idx, num_clusters, learned, seed):
        requested.append((num_clusters, learned, seed))
        return fit(split, x, cluster_idx, num_clusters, False, seed)

    monkeypatch.setattr(baselines, "fit", watched)
    verdicts = []
    for which in ("fast", "all", "none"):
        run_small("--seed", "7", "--baselines", which)
        verdicts.append(capsys.readouterr().out.count("no verdict on fewer than 30 queries"))
    assert requested == [(3, False, 7), (3, True, 7)]
    assert verdicts == [4, 4, 0]
