"""Checkpoints that are damaged or malicious are refused in one line, and nothing in them runs or takes memory."""

import re
import warnings
import zipfile

import numpy as np
import pytest
import torch
from conftest import same

from rankrouter import FORMAT_VERSION, Metadata, RankRouter, RouterConfig
from support.system.errors import UserError
from support.system.safe_torch import read_checkpoint


@pytest.fixture
def path(tmp_path):
    """The checkpoint of a router with random weights."""
    router = RankRouter(["a", "b", "c"], 8, RouterConfig(embedding_dim=4, num_clusters=2, capability_dim=3))
    router.query_tower.fit(torch.randn(20, 8), seed=0)
    router.metadata = Metadata(
        args={"pooling": "mean", "max_length": 512, "seed": 42, "finetune_encoder": False},
        encoder={"width": 8, "path": "encoder", "fingerprint": "f", "dtype": "float32"},
        content_hash="c",
        seen_queries=torch.tensor([1, 2]),
        profiles={"kind": "random"},
        best_single_model="b",
    )
    router.save(tmp_path / "best_model.pt")
    RankRouter.load(tmp_path / "best_model.pt")
    return tmp_path / "best_model.pt"


def refused(path):
    with pytest.raises(UserError, match=r"is (not a|a damaged) RankRouter checkpoint") as error:
        RankRouter.load(path)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_or_a_cut_is_refused_or_changes_nothing(path):
    content, expected = path.read_bytes(), read_checkpoint(path, FORMAT_VERSION)
    rng, flips_refused = np.random.default_rng(0), 0
    for position in rng.integers(0, len(content), 300):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            assert same(read_checkpoint(path, FORMAT_VERSION), expected), position
        except UserError as error:
            flips_refused += 1
            assert "\n" not in str(error)
    assert flips_refused > 100
    for length in [0, 1, *rng.integers(0, len(content), 30)]:
        path.write_bytes(content[:length])
        refused(path)


def test_a_call_a_bomb_or_a_path_in_a_checkpoint_is_refused_and_none_of_it_runs(path):
    class Payload:
        def __reduce__(self):
            return exec, (f"open({str(path.with_name('ran'))!r}, 'w')",)

    content = path.read_bytes()
    for protocol, record, size in (
        (2, None, 0),
        (4, None, 0),  # of which torch's unpickler warns, before it fails
        (None, "archive/data/bomb", 10**8),
        (None, "archive/../../ran", 1),
        (None, "/ran", 1),
    ):
        if protocol is not None:
            torch.save({"config": Payload()}, path, pickle_protocol=protocol)
        else:
            path.write_bytes(content)
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(record, bytes(size), zipfile.ZIP_DEFLATED if size > 1 else zipfile.ZIP_STORED)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            refused(path)
        assert not warned
        assert not path.with_name("ran").exists()


def test_an_invalid_value_or_a_claim_to_more_than_the_file_holds_is_refused_without_using_the_memory(path, capfd):
    content = path.read_bytes()
    weights, mean = "model_state_dict", "query_tower.mean"
    checkpoint = torch.load(path, weights_only=True)
    thin = {name: torch.zeros(1, dtype=t.dtype).expand(t.shape) for name, t in checkpoint[weights].items()}
    for (*parents, last), value in (
        (("config", "embedding_dim"), 2**40),
        (("model_names",), [str(i) for i in range(200_000)]),
        ((weights,), thin),
        ((weights, mean), checkpoint[weights][mean].double()),
        (("seen_queries",), torch.zeros(1, dtype=torch.int64).expand(10**15)),
        (("encoder", "dtype"), "load"),
        (("config", "dropout"), float("nan")),
        (("config", "use_model_id"), "yes"),
        (("config", "surface_features"), ["words"]),
        (("config", "surface_features"), "words"),
        (("config", "surface_features"), ({}, {})),
        (("args", "layers"), [0]),
        (("args", "layers"), "12"),
        (("args", "layers"), 3),
        (("args", "pooling"), "auto"),
        (("args", "query_prefix"), 5),
        (("args", "query_prefix"), "\ud800"),
        (("encoder", "include_prompt"), "no"),
        (("args", "max_length"), 0),
    ):
        path.write_bytes(content)
        checkpoint = inner = torch.load(path, weights_only=True)
        for key in parents:
            inner = inner[key]
        inner[last] = value
        torch.save(checkpoint, path)
        refused(path)
    assert capfd.readouterr().err == ""


def test_a_checkpoint_is_a_file(tmp_path):
    for path in ("/dev/zero", tmp_path):
        with pytest.raises(UserError, match="is not a file"):
            read_checkpoint(path, FORMAT_VERSION)


def test_a_checkpoint_does_not_make_us_download(path, monkeypatch):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["encoder"] |= {"path": "somebody/elses"}
    torch.save(checkpoint, path)
    requested = []

    def snapshot_download(hub_id, local_files_only, **_):
        requested.append((hub_id, local_files_only))
        raise FileNotFoundError(hub_id)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=re.escape("has not been downloaded; --model_path somebody/elses")):
        RankRouter.load(path).rank(["a query"])
    assert requested == [("somebody/elses", True)]
