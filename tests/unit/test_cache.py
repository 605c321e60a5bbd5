"""Embeddings are cached by content and never computed twice; the command lists them and deletes what is named."""

import hashlib
import os
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import tqdm
from safetensors.numpy import load_file
from transformers import AutoModel

import support.encoding.encoder as encoder_module
from support.encoding import cache as embedding_cache
from support.encoding.cache import EmbeddingCache, query_keys
from support.encoding.encoder import QueryEncoder
from support.system.errors import UserError

QUERIES = [f"{'tell me more about ' * (i % 7)}number {i}" for i in range(60)]
USAGE = {"fingerprint": "f", "pooling": "mean", "max_length": 512, "dtype": "float32"}
METADATA = {"path": "/encoder", "tokens_read": 512}


@pytest.fixture
def encoder_of(demo, tmp_path):
    """A function that returns the demo's encoder for batches of 64 tokens, with a cache for this test."""

    def run(model_path=demo / "encoder", **flags):
        options = {"dtype": "float32", "tokens_per_batch": 64, "cache_dir": tmp_path / "cache"} | flags
        return QueryEncoder(str(model_path), torch.device("cpu"), **options)

    return run


@pytest.fixture
def run_embed(encoder_of):
    """A function that returns embeddings by that encoder, its metadata, and how many it encoded."""

    def run(queries, *args, **flags):
        encoder = encoder_of(*args, **flags)
        embeddings, num_encoded = encoder.embed(queries)
        return embeddings, encoder.metadata, num_encoded

    return run


@pytest.fixture
def small_shards(monkeypatch):
    """Every batch becomes a shard."""
    monkeypatch.setattr(embedding_cache, "SECONDS_PER_SHARD", 0)


@pytest.fixture
def forbid_encoder(monkeypatch):
    return lambda: monkeypatch.setattr(encoder_module, "load_encoder", Mock(side_effect=AssertionError))


@pytest.fixture
def passes(monkeypatch):
    """A list that grows by the number of texts in each pass of the encoder."""
    counts, hidden_states = [], encoder_module.hidden_states

    def watched(network, ids, *others):
        counts.append(len(ids))
        return hidden_states(network, ids, *others)

    monkeypatch.setattr(encoder_module, "hidden_states", watched)
    return counts


@pytest.fixture
def caches(tmp_path):
    """The cache as two runs open it."""
    return [EmbeddingCache(tmp_path / "cache", USAGE) for _ in range(2)]


def shards(tmp_path):
    return sorted(tmp_path.glob("cache/embeddings/*/*.safetensors"))


def vectors(count, start=0):
    return torch.arange(start, start + 3 * count, dtype=torch.float32).reshape(count, 3)


def look_up(cache, keys):
    """Which queries are stored by now."""
    cache.refresh()
    return cache.has(keys)


def test_cached_embeddings_equal_those_encoded_and_load_nothing(run_embed, small_shards, forbid_encoder, tmp_path):
    expected, metadata, num_encoded = run_embed(QUERIES, cache_dir=None)
    assert num_encoded == 60
    assert not (tmp_path / "cache").exists()
    first, first_metadata, num_encoded = run_embed(QUERIES)
    assert num_encoded == 60
    assert torch.equal(first, expected)
    assert len(shards(tmp_path)) > 5
    forbid_encoder()
    for queries in (QUERIES, QUERIES[::-1]):
        second, second_metadata, num_encoded = run_embed(queries)
        assert num_encoded == 0
        assert torch.equal(second if queries is QUERIES else second.flip(0), expected)
        assert metadata == first_metadata == second_metadata


def test_only_what_is_missing_is_encoded(run_embed, small_shards, passes, monkeypatch):
    expected, _, _ = run_embed(QUERIES, cache_dir=None)
    some, _, _ = run_embed(QUERIES[:50])
    bars = Mock(wraps=tqdm.tqdm)
    monkeypatch.setattr(tqdm, "tqdm", bars)
    passes.clear()
    every, _, num_encoded = run_embed(QUERIES)
    assert num_encoded == 10
    assert 10 < sum(passes) < 60  # the batches that hold them are encoded whole, whatever is stored
    assert torch.equal(every[:50], some)
    torch.testing.assert_close(every, expected, atol=1e-5, rtol=1e-4)
    run_embed(QUERIES, cache_dir=None)
    missing, all_queries = (call.kwargs["total"] for call in bars.call_args_list)
    assert missing < all_queries  # the time left counts what will be encoded


def test_an_encoder_is_known_by_its_content_and_not_by_its_path(run_embed, demo, tmp_path):
    shutil.copytree(demo / "encoder", tmp_path / "moved")
    expected, _, _ = run_embed(QUERIES)
    assert run_embed(QUERIES, tmp_path / "moved")[2] == 0
    network = AutoModel.from_pretrained(tmp_path / "moved")
    with torch.no_grad():
        network.norm.weight[0] += 1
    network.save_pretrained(tmp_path / "moved")
    other, _, num_encoded = run_embed(QUERIES, tmp_path / "moved")
    assert num_encoded == 60
    assert not torch.equal(other, expected)


def test_another_use_of_the_encoder_is_another_part(run_embed, encoder_of, monkeypatch):
    expected, _, _ = run_embed(QUERIES)
    # Without prefix and Dense layers a part has the name that it had before there were any.
    assert list(EmbeddingCache(None, encoder_of().usage).usage) == ["fingerprint", "pooling", "max_length", "dtype"]
    for flag in ({"pooling": "last"}, {"pooling": "max"}, {"max_length": 3}, {"dtype": "bfloat16"}, {"prefix": "q: "}):
        other, metadata, num_encoded = run_embed(QUERIES, **flag)
        assert num_encoded == 60, flag
        assert not torch.equal(other, expected), flag
        assert metadata | flag == metadata
        assert torch.equal(run_embed(QUERIES)[0], expected), flag
        assert run_embed(QUERIES, **flag)[2] == 0, flag
    monkeypatch.setattr(embedding_cache, "FORMAT_VERSION", embedding_cache.FORMAT_VERSION + 1)
    assert run_embed(QUERIES)[2] == 60


def test_the_maximum_length_of_the_encoder_is_known_without_loading_it(run_embed, forbid_encoder):
    assert run_embed(QUERIES, max_length=10**6)[1]["max_length"] == 1024
    forbid_encoder()
    assert run_embed(QUERIES, max_length=10**6)[1]["max_length"] == 1024


def test_what_another_run_stores_meanwhile_is_not_encoded(encoder_of, small_shards, passes, tmp_path, monkeypatch):
    expected, _ = encoder_of(cache_dir=None).embed(QUERIES)
    encoder, hidden_states = encoder_of(), encoder_module.hidden_states

    def stored_meanwhile(*args):
        EmbeddingCache(tmp_path / "cache", encoder.usage).store(query_keys(QUERIES), expected)
        return hidden_states(*args)

    passes.clear()
    monkeypatch.setattr(encoder_module, "hidden_states", stored_meanwhile)
    got, num_encoded = encoder.embed(QUERIES)
    assert passes == [num_encoded]
    assert torch.equal(got, expected)


def test_of_two_runs_that_store_the_same_query_the_first_counts_for_all(caches, tmp_path):
    keys = query_keys(["x", "y", "z"])
    one, two = caches
    one.describe(METADATA)
    one.store(keys[:2], vectors(2))
    refresh, two.refresh = two.refresh, Mock()

    def later():  # it sees the first too late
        assert not two.names
        two.refresh.side_effect = refresh

    two.refresh.side_effect = later
    two.store(keys[1:], vectors(2, 100))
    assert [path.name[:6] for path in shards(tmp_path)] == ["000000", "000000"]
    three, four = (EmbeddingCache(tmp_path / "cache", USAGE) for _ in range(2))
    assert look_up(three, keys).all()
    assert look_up(four, keys[::-1]).all()
    assert torch.equal(three.read(keys), four.read(keys[::-1]).flip(0))
    assert torch.equal(three.read(keys)[[0, 2]], torch.tensor([[0.0, 1, 2], [103, 104, 105]]))
    first_by_name = load_file(shards(tmp_path)[0])
    (row,) = np.flatnonzero([bytes(key) == keys[1] for key in first_by_name["keys"]])
    np.testing.assert_array_equal(three.read(keys)[1], first_by_name["embeddings"][row])


def test_a_later_shard_never_overrules_an_earlier_one(caches, tmp_path):
    keys = query_keys([f"{i}" for i in range(20)])
    cache, fresh = caches
    cache.describe(METADATA)
    for i in range(20):
        cache.store(keys[: i + 1], vectors(i + 1, 100 * i))
    expected = torch.stack([vectors(i + 1, 100 * i)[i] for i in range(20)])
    assert look_up(fresh, keys).all()
    for reader in (cache, fresh):
        assert torch.equal(reader.read(keys), expected)
        assert look_up(reader, keys).all()
        assert len(reader.shards) == len(shards(tmp_path)) == 20  # each mapped once


def test_added_embeddings_are_stored_together_by_flush(caches, tmp_path):
    keys = query_keys(["x", "y", "z"])
    cache, other = caches
    cache.add(keys[:1], vectors(1))
    cache.add(keys[1:], vectors(2, 100))
    assert not look_up(other, keys).any()
    cache.flush()
    assert look_up(other, keys).all()
    assert torch.equal(other.read(keys), torch.cat([vectors(1), vectors(2, 100)]))
    assert len(shards(tmp_path)) == 1


def test_a_cache_in_memory_keeps_nothing_on_disk(run_embed, tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    for name in ("atomic_write", "make_folder"):
        monkeypatch.setattr(embedding_cache, name, Mock(side_effect=AssertionError))
    keys, cache = query_keys(["x", "y", "z"]), EmbeddingCache(None, USAGE)
    cache.describe(METADATA)
    cache.store(keys[:2], vectors(2))
    cache.add(keys, vectors(3, 100))
    cache.flush()
    assert look_up(cache, keys).all()
    assert torch.equal(cache.read(keys), torch.cat([vectors(2), vectors(3, 100)[2:]]))  # the earlier ones stay
    assert not EmbeddingCache(None, USAGE).has(keys).any()
    for _ in range(2):
        assert run_embed(QUERIES, cache_dir=None)[2] == 60  # nor does it outlive the call
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


def test_shards_are_named_by_their_content_and_hold_the_keys_of_the_texts(run_embed, tmp_path):
    texts = ("b", "\u4f60\u597d")
    embeddings, _, _ = run_embed(texts)
    (shard,) = shards(tmp_path)
    assert shard.stem == f"000000-{hashlib.sha256(shard.read_bytes()).hexdigest()}"
    content = load_file(shard)
    stored = {bytes(key): vector for key, vector in zip(content["keys"], content["embeddings"], strict=True)}
    for text, vector in zip(texts, embeddings, strict=True):
        np.testing.assert_array_equal(stored[hashlib.sha256(text.encode()).digest()], vector.numpy())


def test_the_command_lists_and_deletes_only_its_own_folders_named_exactly(run_embed, small_shards, tmp_path, capsys):
    def lines_of(*flags):
        embedding_cache.main(["--cache_dir", str(tmp_path / "cache"), *flags])
        return capsys.readouterr().out.splitlines()

    assert lines_of() == [f"{tmp_path / 'cache' / 'embeddings'}: 0 encoders"]
    run_embed(QUERIES)
    run_embed(QUERIES[:7], pooling="last")
    parts = {part["metadata"]["pooling"]: part for part in embedding_cache.parts(tmp_path / "cache")}
    assert {pooling: part["queries"] for pooling, part in parts.items()} == {"mean": 60, "last": 7}
    folder = tmp_path / "cache" / "embeddings" / parts["mean"]["name"]
    (folder.parent / "photos").mkdir()
    (folder.parent / ("a" * 32)).symlink_to(folder)
    assert parts["mean"]["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    os.utime(folder / "encoder.json", (0, 0))
    lines = lines_of()
    assert [line.split()[:2] for line in lines[2:]] == [[parts["last"]["name"][:8], "7"], [folder.name[:8], "60"]]
    assert "1970-01-01" in lines[3]
    assert lines[3].endswith("encoder")
    for name in ("", "zz", "../x", "photos", "a" * 32):
        with pytest.raises(UserError, match="fits 0 of the cached encoders"):
            lines_of("--drop", name)
    assert run_embed(QUERIES)[2] == 0
    assert lines_of("--drop", folder.name[:8])[0].startswith("dropped 60 queries")
    assert not folder.exists()
    assert run_embed(QUERIES[:7], pooling="last")[2] == 0
