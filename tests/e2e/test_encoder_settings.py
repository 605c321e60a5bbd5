"""What a run resolves of its encoder and its layers is kept, and is what routing goes by."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import route
import train
from query_representation import query_features
from rankrouter import RankRouter
from support.encoding.encoder import QueryEncoder
from support.system.errors import UserError

CPU = torch.device("cpu")
QUERIES = ["How do I invert a matrix?", "Who ruled Rome?"]
RESOLVED = {"pooling": "max", "query_prefix": "query: "}


@pytest.fixture
def folder(demo, tmp_path):
    """The demo's encoder with max pooling, a Dense layer and a default prompt that is not pooled."""
    folder = tmp_path / "encoder"
    shutil.copytree(demo / "encoder", folder)
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}"} for i, kind in enumerate(kinds)]
    modules[0]["path"] = ""
    dense = {"in_features": 128, "out_features": 24, "bias": False, "activation_function": "torch.nn.Tanh"}
    for name, content in (
        ("modules.json", modules),
        ("1_Pooling/config.json", {"pooling_mode": "max", "include_prompt": False}),
        ("2_Dense/config.json", dense),
        ("config_sentence_transformers.json", {"prompts": {"q": "query: ", "d": "x"}, "default_prompt_name": "q"}),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0)) / 5
    save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors")
    return folder


@pytest.fixture
def run(small, folder, tmp_path):
    """A function that trains with that folder; returns the history."""
    place = small.index("--model_path")

    def train_with(*flags):
        train.main([*small[:place], "--model_path", str(folder), *small[place + 2 :], "--output_dir", *flags])
        return json.loads((tmp_path / flags[0] / "training_history.json").read_text())

    return train_with


def ranking(output, capsys):
    capsys.readouterr()
    route.main(["--checkpoint", str(output / "best_model.pt"), "--no_cache", "--output", str(output / "r"), *QUERIES])
    return [json.loads(line)["scores"] for line in (output / "r").read_text().splitlines()]


def test_history_and_checkpoint_hold_what_was_resolved_and_routing_goes_by_it(run, folder, tmp_path, capsys):
    output = tmp_path / "output"
    history = run(str(output))
    line = "max pooling, as the folder says; then 2_Dense; prefix 'query: ', its default prompt 'q', not pooled"
    assert f"encoder  {line}; Normalize left out" in capsys.readouterr().out
    assert {name: history["args"][name] for name in RESOLVED} == RESOLVED
    assert "query_prompt" not in history["args"]
    expected = {"pooling": "max", "prefix": "query: ", "include_prompt": False, "width": 24}
    assert history["encoder"] | expected == history["encoder"]
    scores = ranking(output, capsys)
    # The same flags in other words are the same experiment.
    same = run(str(output), "--pooling", "max", "--query_prompt", "q", "--resume")
    assert "finished already" in capsys.readouterr().out
    assert same == history
    with pytest.raises(UserError, match="--query_prefix was query: , is x; restore that"):
        run(str(output), "--query_prompt", "d", "--resume", "--epochs", "3")
    # What the folder says later does not matter to a router; another Dense layer does.
    (folder / "1_Pooling" / "config.json").write_text("{}")
    assert ranking(output, capsys) == scores
    dense = folder / "2_Dense" / "model.safetensors"
    save_file({"linear.weight": load_file(dense)["linear.weight"] + 1e-3}, dense)
    with pytest.raises(UserError, match="is not the one that the router was trained with"):
        ranking(output, capsys)


def test_an_encoder_is_trained_through_its_frozen_dense_layers(run, folder, tmp_path, capsys):
    output = tmp_path / "output"
    flags = ("--finetune_encoder", "--finetune_layers", "1", "--tower_epochs", "0", "--batch_tokens", "600")
    run(str(output), *flags, "--encoder_lr", "1e-3", "--epochs", "2")
    router = RankRouter.load(output / "best_model.pt")
    assert all(name.startswith("layers.1.") for name in router.metadata.trained["weights"])
    encoder = QueryEncoder(str(folder), CPU, dtype="float32", progress=False)
    trained = encoder.with_finetuned(router.metadata.trained)
    assert not torch.equal(trained.embed(QUERIES)[0], encoder.embed(QUERIES)[0])
    features = query_features(QUERIES, trained.embed(QUERIES)[0], router.config.surface_features)
    x, cluster_idx = router.query_tower.inputs(features)  # (2, 24 + 15), (2,)
    expected = np.sort(router.score(x, cluster_idx))[:, ::-1]  # (2, M)
    np.testing.assert_allclose(ranking(output, capsys), expected, atol=1e-5)


def test_one_pass_caches_the_candidate_layers_and_a_router_embeds_by_its_own(small, tmp_path, capsys):
    histories = []
    cached = ("--cache_dir", str(tmp_path / "cache"))
    for name, flags in (
        ("one", ("--layers", "1", "--pooling", "mean+last", "--cache_layers", "1,2")),
        ("two", ("--layers", "1,2", "--pooling", "last")),
        ("three", ()),  # the mean of the last layer
    ):
        train.main([*small, *cached, "--output_dir", str(tmp_path / name), *flags])
        histories.append(json.loads((tmp_path / name / "training_history.json").read_text()))
    assert [history["encoder"]["width"] for history in histories] == [256, 256, 128]
    first, *others = [history["timing"]["queries_encoded"] for history in histories]
    assert first > 0 and others == [0, 0]
    assert "layers 1 of 2, mean+last pooling" in capsys.readouterr().out
    for name, layers, pooling in (("one", [1], "mean+last"), ("two", [1, 2], "last")):
        router = RankRouter.load(tmp_path / name / "best_model.pt")
        encoder = QueryEncoder(router.metadata.encoder["path"], CPU, dtype="float32", layers=layers, pooling=pooling)
        features = query_features(QUERIES, encoder.embed(QUERIES)[0], router.config.surface_features)
        expected = np.sort(router.score(*router.query_tower.inputs(features)))[:, ::-1]
        np.testing.assert_allclose(ranking(tmp_path / name, capsys), expected, atol=1e-5)
    with pytest.raises(UserError, match=r"--layers was \[1, 2\], is None; restore that"):
        train.main(
            [*small, *cached, "--output_dir", str(tmp_path / "two"), "--layers", "2", "--pooling", "last", "--resume"]
        )


def test_an_encoder_is_trained_up_to_its_highest_layer(small, tmp_path, capsys):
    flags = ("--finetune_encoder", "--layers", "1", "--pooling", "mean+last", "--tower_epochs", "0", "--epochs", "2")
    train.main([*small, *flags, "--encoder_lr", "1e-3", "--output_dir", str(tmp_path)])
    router = RankRouter.load(tmp_path / "best_model.pt")
    assert not any(name.startswith("layers.1.") for name in router.metadata.trained["weights"])
    encoder = QueryEncoder(router.metadata.encoder["path"], CPU, dtype="float32", layers=[1], pooling="mean+last")
    trained = encoder.with_finetuned(router.metadata.trained)
    assert not torch.equal(trained.embed(QUERIES)[0], encoder.embed(QUERIES)[0])
    features = query_features(QUERIES, trained.embed(QUERIES)[0], router.config.surface_features)
    expected = np.sort(router.score(*router.query_tower.inputs(features)))[:, ::-1]
    np.testing.assert_allclose(ranking(tmp_path, capsys), expected, atol=1e-5)
