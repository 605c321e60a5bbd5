"""Exported routers: read back from a folder or a hub id with the same scores, their cards, and damaged folders."""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import kill
from safetensors.torch import load_file, save_file

import route
import train
from rankrouter import RankRouter
from support.system.command_line import run_command
from support.system.errors import UserError
from support.training.options import with_defaults

ROOT = Path(__file__).parent.parent.parent
QUERIES = ["How do I invert a matrix?", "What is in lentil soup?"]
FRESH = """
import sys, numpy
from rankrouter import RankRouter
router = RankRouter.from_pretrained(sys.argv[1])
router.open_encoder(sys.argv[2])
numpy.save(sys.argv[3], router.scores_of(sys.argv[4:]))
"""


def export(output, folder, *flags):
    route.main(["--checkpoint", str(output / "best_model.pt"), "--export", str(folder), *flags])
    return folder


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    return export(tiny_run[1], tmp_path_factory.mktemp("shared") / "router")


@pytest.fixture
def copied(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def same_scores(output, folder, encoder, tmp_path):
    """Whether a fresh process scores as the checkpoint does, to the last bit."""
    router = RankRouter.load(output / "best_model.pt")
    router.open_encoder(str(encoder))
    command = [sys.executable, "-c", FRESH, str(folder), str(encoder), str(tmp_path / "scores.npy"), *QUERIES]
    subprocess.run(command, cwd=ROOT, check=True)
    return np.array_equal(np.load(tmp_path / "scores.npy"), router.scores_of(QUERIES))


def test_a_fresh_process_scores_as_the_checkpoint(tiny_run, exported, demo, tmp_path):
    assert same_scores(tiny_run[1], exported, demo / "encoder", tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        ("--finetune_encoder", "--lora_rank", "2", "--surface_features", "--capability_init", "win_rate"),
        ("--finetune_encoder", "--finetune_layers", "1", "--similarity_metric", "cosine"),
    ],
)
def test_a_trained_encoder_and_all_that_is_known_travel_inside(flags, small, demo, tmp_path):
    without = [word for word in small if word not in ("--capability_dim", "4")] if "win_rate" in flags else small
    train.main([*without, *flags, "--epochs", "1", "--output_dir", str(tmp_path)])
    folder = export(tmp_path, tmp_path / "router")
    assert same_scores(tmp_path, folder, demo / "encoder", tmp_path)
    one, other = RankRouter.load(tmp_path / "best_model.pt"), RankRouter.from_pretrained(folder)
    assert {name: weight.tolist() for name, weight in one.metadata.trained["weights"].items()} == {
        name: weight.tolist() for name, weight in other.metadata.trained["weights"].items()
    }
    assert torch.equal(one.metadata.seen_queries, other.metadata.seen_queries)
    assert one.config == other.config
    other.save(tmp_path / "again.pt")
    assert same_scores(tmp_path, export(tmp_path, tmp_path / "more"), demo / "encoder", tmp_path)


def test_no_folder_of_this_machine_is_published(tiny_run, exported, tmp_path):
    text = (exported / "config.json").read_text() + (exported / "README.md").read_text()
    paths = [tiny_run[0]["args"][name] for name in ("data_path", "model_path", "output_dir", "cache_dir")]
    assert not any(str(Path(path).parent) in text for path in paths)
    assert {path.name for path in exported.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_the_card_has_the_test_of_the_history_and_of_no_other(tiny_run, exported, tmp_path, capsys):
    history, output = tiny_run
    card = (exported / "README.md").read_text()
    low, high = history["test_intervals"]["auc"]
    assert f"| auc | {history['test_metrics']['auc']:.4f} | [{low:.4f}, {high:.4f}] |" in card
    assert f"seed {history['args']['seed']}" in card
    assert "--num_clusters 3" in card
    assert history["environment"]["commit"] in card
    assert card.startswith("---\nlibrary_name: rankrouter\n")
    shutil.copytree(output, tmp_path / "other")
    (tmp_path / "other/training_history.json").write_text(json.dumps(history | {"best_epoch": 7}))
    capsys.readouterr()
    folder = export(tmp_path / "other", tmp_path / "router")
    assert "without a test" in capsys.readouterr().out
    assert "| auc |" not in (folder / "README.md").read_text()


def test_a_card_compares_with_the_baselines_and_names_an_added_model(small_table, tmp_path):
    train.main([*small_table, "--baselines", "fast", "--output_dir", str(tmp_path)])
    router = RankRouter.load(tmp_path / "best_model.pt")
    router.add_model("new | model", torch.zeros(4))
    router.save(tmp_path / "best_model.pt")
    card = (export(tmp_path, tmp_path / "router") / "README.md").read_text()
    row = json.loads((tmp_path / "training_history.json").read_text())["baselines"]["best_single"]
    low, high = row["difference_intervals"]["mean_score"]
    assert f"{row['mean_score']:.4f} | {row['difference']['mean_score']:+.4f} [{low:+.4f}, {high:+.4f}] |" in card
    assert "Added after training, and in no test: `new | model`" in card


def test_the_encoder_has_its_hub_id_where_that_was_given(tiny_run, demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda hub_id, **_: str(demo / "encoder"))
    folder = export(tiny_run[1], tmp_path / "router", "--model_path", "owner/encoder", "--no_cache")
    assert json.loads((folder / "config.json").read_text())["encoder"]["path"] == "owner/encoder"
    assert "base_model: owner/encoder" in (folder / "README.md").read_text()


def test_a_hub_id_downloads_two_files_and_no_encoder(tiny_run, exported, monkeypatch, capsys):
    requested = []

    def snapshot_download(hub_id, **options):
        requested.append((hub_id, options))
        return str(exported)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    expected = RankRouter.load(tiny_run[1] / "best_model.pt").model_names
    assert RankRouter.from_pretrained("owner/router", revision="v1").model_names == expected
    with pytest.raises(SystemExit):
        run_command(lambda: route.main(["--checkpoint", "owner/router", QUERIES[0]]))
    assert "name its folder or hub id by --model_path" in capsys.readouterr().err
    only = {"allow_patterns": ["config.json", "model.safetensors"]}
    assert requested == [("owner/router", only | {"revision": "v1"}), ("owner/router", only)]


class Client:
    """A stand-in for `HfApi`: repositories are folders."""

    folder, tokens, messages, fails = None, [], [], False

    def __init__(self, token=None):
        self.tokens.append(token)

    def create_repo(self, hub_id, private, exist_ok):
        assert exist_ok
        if self.fails:
            raise RuntimeError("401 the token\nmay not")
        (self.folder / hub_id).mkdir(parents=True)
        (self.folder / hub_id / "private").write_text(str(private))
        return type("RepoUrl", (str,), {"repo_id": hub_id})(f"https://hub/{hub_id}")

    def upload_folder(self, repo_id, folder_path, commit_message=None):
        self.messages.append(commit_message)
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)


def test_a_pushed_router_is_that_of_the_folder(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Client)
    monkeypatch.setattr(Client, "folder", tmp_path)
    router = RankRouter.load(tiny_run[1] / "best_model.pt")
    named = {"private": True, "token": "secret", "commit_message": "Better"}
    assert router.push_to_hub("owner/router", card="# Mine", **named) == "https://hub/owner/router"
    assert (Client.tokens[-1], Client.messages[-1]) == ("secret", "Better")
    router.push_to_hub("owner/without")
    assert not (tmp_path / "owner/without/README.md").exists()
    assert (tmp_path / "owner/router/private").read_text() == "True"
    assert (tmp_path / "owner/router/README.md").read_text() == "# Mine"
    pushed = RankRouter.from_pretrained(tmp_path / "owner/router")
    assert all(torch.equal(weight, pushed.state_dict()[name]) for name, weight in router.state_dict().items())
    monkeypatch.setattr(Client, "fails", True)
    with pytest.raises(UserError, match="owner/other could not be uploaded: 401 the token may not; log in"):
        router.push_to_hub("owner/other")


def test_a_card_has_the_command_of_its_training(small, demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private").mkdir()
    shutil.copy(small[small.index("--data_path") + 1], tmp_path / "private/battles.parquet")
    shutil.copytree(demo / "encoder", tmp_path / "private/enc")
    flags = ["--data_path", "private/battles.parquet", "--model_path", "private/enc", *small[4:], "--layers", "1"]
    train.main([*flags, "--demo", "--output_dir", "out"])
    monkeypatch.chdir(tmp_path / "out")
    card = (export(tmp_path / "out", tmp_path / "router") / "README.md").read_text()
    assert "private" not in card + (tmp_path / "router/config.json").read_text()
    (command,) = re.findall(r"^python train.py (.*)$", card, re.MULTILINE)
    then, now = train.parse_args(flags), train.parse_args(shlex.split(command))
    assert (now.data_path, now.model_path) == ("battles.parquet", "enc")
    resolved = ("pooling", "query_prefix", "eval_every")
    for name in with_defaults({}):
        assert name in resolved or getattr(now, name) == getattr(then, name), name
    assert "layers 1, mean pooling" in card
    assert 'open_encoder("PATH/TO/enc")' in card


def test_a_damaged_history_is_named_and_odd_benchmarks_are_exported(small, tiny_run, tmp_path, capsys):
    history, output = tiny_run
    shutil.copytree(output, tmp_path / "run")
    (tmp_path / "run/training_history.json").write_text(json.dumps(history | {"test_intervals": 3}))
    with pytest.raises(UserError, match=r"training_history.json beside .* is damaged"):
        export(tmp_path / "run", tmp_path / "router")
    names = RankRouter.load(output).model_names
    pd.DataFrame({"model": names, "same": 1.0, "other": range(len(names))}).to_csv(tmp_path / "bench.csv")
    without = [word for word in small if word not in ("--capability_dim", "4")]
    train.main([*without, "--capability_file", str(tmp_path / "bench.csv"), "--output_dir", str(tmp_path / "bench")])
    one = RankRouter.load(tmp_path / "bench").metadata.profiles
    assert RankRouter.load(export(tmp_path / "bench", tmp_path / "shared")).metadata.profiles == one


def test_an_export_that_is_killed_leaves_a_complete_folder_or_none(tiny_run, forked, tmp_path):
    def killed(folder, when=None):
        flags = ["--checkpoint", str(tiny_run[1] / "best_model.pt"), "--export", str(folder)]
        return forked(route.main, flags, when, kill)

    code, events, *_ = killed(tmp_path / "all")
    assert code == 0
    complete = 0
    for when in range(len(events)):
        folder = tmp_path / str(when)
        assert killed(folder, when)[0] == -9
        if folder.exists():
            complete += 1
            assert len(list(folder.iterdir())) == 3
            assert RankRouter.from_pretrained(folder).model_names
    assert 0 < complete < len(events)


def test_an_output_does_not_replace_a_part_of_the_router(exported, capsys):
    with pytest.raises(UserError, match="would replace an input"):
        route.main(["--checkpoint", str(exported), "--output", str(exported / "config.json"), QUERIES[0]])


def test_an_exported_router_is_not_exported_again(exported, tmp_path, capsys):
    with pytest.raises(UserError, match="is exported already; copy it"):
        route.main(["--checkpoint", str(exported), "--export", str(tmp_path / "again")])
    assert RankRouter.load(exported).model_names == RankRouter.from_pretrained(exported).model_names


def test_a_missing_folder_and_a_file_are_named(tiny_run, tmp_path):
    with pytest.raises(UserError, match="gone does not exist; expected a folder that `save_pretrained` wrote"):
        RankRouter.from_pretrained(tmp_path / "gone")
    with pytest.raises(UserError, match="is a file, not a folder; expected a folder that `save_pretrained` wrote"):
        RankRouter.from_pretrained(tiny_run[1] / "best_model.pt")
    assert RankRouter.load(tiny_run[1]).model_names == RankRouter.load(tiny_run[1] / "best_model.pt").model_names


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    change(folder, weights_sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())


def flip_a_bit(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def not_finite(folder):
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, tensors | {"query_tower.mean": tensors["query_tower.mean"] / 0})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "is damaged, or not the file of config.json"),
        (lambda folder: (folder / "config.json").unlink(), "lacks config.json; expected a folder that"),
        (lambda folder: (folder / "config.json").write_text("["), "is not a folder of rankrouter"),
        (lambda folder: (folder / "config.json").write_text("[" * 10**5), "is not a folder of rankrouter"),
        (
            lambda folder: change(folder, library_name="transformers"),
            "is a model of transformers, expected one of rank",
        ),
        (lambda folder: change(folder, format_version=99), "has format 99, expected"),
        (lambda folder: change(folder, model_names=["a", "a"]), "RankRouter checkpoint"),
        (lambda folder: change(folder, config={"embedding_dim": 10**9}), "RankRouter checkpoint"),
        (lambda folder: change(folder, temperature="hot"), "the temperature is not what training writes"),
        (lambda folder: change(folder, temperature=10**400), "the temperature is not what training writes"),
        (lambda folder: change(folder, added_models=[1]), "RankRouter checkpoint"),
        (lambda folder: change(folder, added_models=None), "an added model is not what training writes"),
        (lambda folder: change(folder, model_names="abc"), "RankRouter checkpoint"),
        (lambda folder: change(folder, content_hash="\ud800"), "the hash of the data is not what training writes"),
        (lambda folder: change(folder, args={"data_path": 1}), "RankRouter checkpoint"),
        (lambda folder: rewrite(folder, {"metadata/seen_queries": torch.zeros(1)}), "RankRouter checkpoint"),
        (not_finite, "a weight is not what training writes"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(damage, message, copied, capsys):
    damage(copied)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: route.main(["--checkpoint", str(copied), QUERIES[0]]))
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert message in line


def test_an_export_replaces_nothing_and_leaves_nothing_half_done(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        export(tiny_run[1], tmp_path / "full")
    (tmp_path / "empty").mkdir()
    assert RankRouter.from_pretrained(export(tiny_run[1], tmp_path / "empty"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .* No space left"):
        export(tiny_run[1], tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "empty"}
