"""What a query looks like reaches the router where its embedding does not show it."""

import json

import numpy as np
import pandas as pd
import pytest

import query_representation
import rankrouter
import report
import route
import train
from query_representation import SURFACE_FEATURES
from rankrouter import RankRouter
from support.system.errors import UserError

MODELS = ["asker", "teller"]


@pytest.fixture
def run(demo, tmp_path):
    """A function that trains on battles that `asker` wins where the query ends in a question mark, else `teller`.

    The encoder reads 3 tokens, which all queries have in common.
    """
    rng = np.random.default_rng(0)
    rows = []
    for number in range(600):
        is_question, is_a = rng.integers(2, size=2)
        winner = "model_a" if (is_question == 1) == (is_a == 1) else "model_b"
        a, b = MODELS if is_a else MODELS[::-1]
        rows.append((f"tell me about the number {number}{'?' if is_question else '.'}", a, b, winner))
    data = tmp_path / "battles.csv"
    pd.DataFrame(rows, columns=["prompt", "model_a", "model_b", "winner"]).to_csv(data, index=False)

    def train_with(name, *flags):
        output = tmp_path / name
        same = ("--model_path", str(demo / "encoder"), "--dtype", "float32", "--max_length", "3", "--epochs", "3")
        small = ("--num_clusters", "2", "--embedding_dim", "32", "--lr", "1e-3", "--ema_decay", "0")
        place = ("--data_path", str(data), "--no_cache", "--output_dir", str(output))
        train.main([*place, *same, *small, "--surface_features", *flags])
        return json.loads((output / "training_history.json").read_text()), output

    return train_with


def test_another_set_of_surface_features_is_another_experiment(run, monkeypatch, capsys):
    history, output = run("run")
    assert history["data"]["surface_features"] == list(SURFACE_FEATURES)
    fewer = {name: compute for name, compute in SURFACE_FEATURES.items() if name != "words"}
    for module in (query_representation, rankrouter, train):
        monkeypatch.setattr(module, "SURFACE_FEATURES", fewer)
    with pytest.raises(UserError, match=r"the list of surface features was \['characters', .*; restore that"):
        run("run", "--resume", "--epochs", "4")
    with pytest.raises(UserError, match="this version does not compute: words; expected some of characters, "):
        RankRouter.load(output / "best_model.pt")
    run("fewer")
    capsys.readouterr()
    report.main([str(output), str(output.parent / "fewer"), "--format", "json"])
    assert [row["flags"]["surface_features"][:2] for row in json.loads(capsys.readouterr().out)] in (
        ["15", "14"],
        ["14", "15"],
    )


def test_a_surface_feature_that_decides_is_learned_and_the_ablation_does_not_see_it(run, capsys):
    history, output = run("with")
    assert history["args"]["surface_features"] is True
    assert history["test_metrics"]["auc"] > 0.99
    assert history["baselines"]["neighbours"]["auc"] > 0.95  # the baselines get the same features
    history, _ = run("without", "--no_surface_features")
    assert history["args"]["surface_features"] is False
    assert abs(history["test_metrics"]["auc"] - 0.5) < 0.2
    assert abs(history["baselines"]["neighbours"]["auc"] - 0.5) < 0.2
    history, _ = run("original", "--recipe", "original")
    assert history["test_metrics"]["auc"] > 0.99
    queries = ["tell me about the number 1000?", "tell me about the number 1000.", "Who?"]
    capsys.readouterr()
    route.main(["--checkpoint", str(output / "best_model.pt"), "--no_cache", "--output", str(output / "r"), *queries])
    ranked = [json.loads(line)["ranking"][0] for line in (output / "r").read_text().splitlines()]
    assert ranked == ["asker", "teller", "asker"]
