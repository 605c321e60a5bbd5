"""Embeddings are cached by content, never computed twice; kills, damage, full disks and concurrent runs do no harm."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import tqdm
from safetensors.numpy import load_file, save
from transformers import AutoModel

import query_representation
from query_representation import QueryEncoder
from support.encoding import cache as embedding_cache
from support.encoding.cache import EmbeddingCache, query_keys
from support.system.command_line import run_command
from support.system.errors import UserError

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
QUERIES = [f"{'tell me more about ' * (i % 7)}number {i}" for i in range(60)]
USAGE = {"fingerprint": "f", "pooling": "mean", "max_length": 512, "dtype": "float32"}
METADATA = {"path": "/encoder", "tokens_read": 512}


@pytest.fixture
def run_embed(demo, tmp_path):
    """Embeddings by the demo's encoder in batches of 64 tokens, cached for this test; metadata; how many are new."""

    def run(queries, model_path=demo / "encoder", **flags):
        options = {"dtype": "float32", "tokens_per_batch": 64, "cache_dir": tmp_path / "cache"} | flags
        encoder = QueryEncoder(str(model_path), CPU, **options)
        embeddings, num_encoded = encoder.embed(queries)
        return embeddings, encoder.metadata, num_encoded

    return run


@pytest.fixture
def small_shards(monkeypatch):
    """Every batch becomes a shard."""
    monkeypatch.setattr(embedding_cache, "SECONDS_PER_SHARD", 0)


@pytest.fixture
def forbid_encoder(monkeypatch):
    def forbid(*_):
        raise AssertionError("the encoder was loaded")

    return lambda: monkeypatch.setattr(query_representation, "load_encoder", forbid)


def shards(tmp_path):
    return sorted(tmp_path.glob("cache/embeddings/*/*.safetensors"))


def vectors(count, start=0):
    return torch.arange(start, start + 3 * count, dtype=torch.float32).reshape(count, 3)


def open_caches(tmp_path, count=2):
    """The cache as that many runs open it."""
    return [EmbeddingCache(tmp_path / "cache", USAGE) for _ in range(count)]


def look_up(cache, keys):
    """Which queries are stored by now."""
    cache.refresh()
    return cache.has(keys)


def count_batches(monkeypatch):
    """A list that grows by the number of texts in each pass of the encoder."""
    passes, hidden_states = [], query_representation.hidden_states

    def watched(network, ids, mask):
        passes.append(len(ids))
        return hidden_states(network, ids, mask)

    monkeypatch.setattr(query_representation, "hidden_states", watched)
    return passes


def test_cached_embeddings_equal_those_encoded_and_load_nothing(run_embed, small_shards, forbid_encoder, tmp_path):
    plain, metadata, missing = run_embed(QUERIES, cache_dir=None)
    assert missing == 60
    assert not (tmp_path / "cache").exists()
    first, first_metadata, missing = run_embed(QUERIES)
    assert missing == 60
    assert torch.equal(plain, first)
    assert len(shards(tmp_path)) > 5
    forbid_encoder()
    second, second_metadata, missing = run_embed(QUERIES)
    assert missing == 0
    assert torch.equal(plain, second)
    assert metadata == first_metadata == second_metadata
    backward, _, missing = run_embed(QUERIES[::-1])
    assert missing == 0
    assert torch.equal(backward.flip(0), plain)


def test_only_what_is_missing_is_encoded(run_embed, small_shards, monkeypatch):
    some, _, _ = run_embed(QUERIES[:50])
    bars = Mock(wraps=tqdm.tqdm)
    monkeypatch.setattr(tqdm, "tqdm", bars)
    passes = count_batches(monkeypatch)
    every, _, missing = run_embed(QUERIES)
    assert missing == 10
    assert sum(passes) < 60
    assert torch.equal(every[:50], some)
    torch.testing.assert_close(every, run_embed(QUERIES, cache_dir=None)[0], atol=1e-5, rtol=1e-4)
    first, whole = (call.kwargs["total"] for call in bars.call_args_list)
    assert first < whole  # the time left counts what will be encoded


@pytest.mark.parametrize("stored_shards", [1, 3, 7])
def test_a_killed_run_continues_to_the_same_bits(run_embed, small_shards, monkeypatch, tmp_path, stored_shards):
    expected, _, _ = run_embed(QUERIES, cache_dir=None)
    store = EmbeddingCache.store

    def killed(self, *args):
        if len(shards(tmp_path)) == stored_shards:
            raise KeyboardInterrupt
        store(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingCache, "store", killed)
        with pytest.raises(KeyboardInterrupt):
            run_embed(QUERIES)
    assert len(shards(tmp_path)) == stored_shards
    passes = count_batches(monkeypatch)
    got, _, missing = run_embed(QUERIES[::-1])
    assert torch.equal(got.flip(0), expected)
    assert sum(passes) == missing < 60  # whole batches were stored, so none is encoded for a part of it


def test_a_process_killed_between_two_shards_leaves_the_first_for_the_next(demo, run_embed, tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from query_representation import QueryEncoder
from support.encoding import cache as embedding_cache
from support.encoding.cache import EmbeddingCache
embedding_cache.SECONDS_PER_SHARD = 0
write, written = EmbeddingCache._write, []
def killed(self, name, data):
    write(self, name, data)
    written.append(name)
    if len(written) == 4:  # encoder.json and three shards
        os.kill(os.getpid(), signal.SIGKILL)
EmbeddingCache._write = killed
torch.set_num_threads(1)
encoder = QueryEncoder({str(demo / "encoder")!r}, torch.device("cpu"), dtype="float32", tokens_per_batch=64,
                       cache_dir={str(tmp_path / "cache")!r})
encoder.embed({QUERIES!r})
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert ended.returncode == -9, ended.stderr
    assert len(shards(tmp_path)) == 3
    got, _, missing = run_embed(QUERIES)
    assert 0 < missing < 60
    assert torch.equal(got, run_embed(QUERIES, cache_dir=None)[0])


def test_an_error_while_encoding_keeps_what_was_encoded(run_embed, monkeypatch):
    hidden_states, left = query_representation.hidden_states, [5]

    def fails(*args):
        left[0] -= 1
        if left[0] < 0:
            raise UserError("out of memory")
        return hidden_states(*args)

    with monkeypatch.context() as patch:
        patch.setattr(query_representation, "hidden_states", fails)
        with pytest.raises(UserError, match="out of memory"):
            run_embed(QUERIES)
    assert 0 < run_embed(QUERIES)[2] < 60


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign"])
def test_a_damaged_shard_is_reported_set_aside_and_encoded_again(run_embed, small_shards, tmp_path, capsys, damage):
    expected, _, _ = run_embed(QUERIES)
    chosen = shards(tmp_path)[2]
    content = bytearray(chosen.read_bytes())
    content[len(content) // 2] ^= 1
    broken = {"truncated": content[: len(content) // 2], "empty": b"", "flipped": content, "foreign": b"hello" * 99}
    chosen.write_bytes(broken[damage])
    capsys.readouterr()
    got, _, missing = run_embed(QUERIES)
    assert 0 < missing < 30
    assert torch.equal(got, expected)
    warning = capsys.readouterr().err.splitlines()[0]
    assert f"{chosen} is damaged" in warning
    assert "set aside" in warning
    assert chosen.with_suffix(".damaged").is_file()
    assert run_embed(QUERIES)[2] == 0
    assert "damaged" not in capsys.readouterr().err


def test_control_characters_in_the_name_of_the_folder_are_not_printed(run_embed, small_shards, tmp_path, capsys):
    folder = tmp_path / "\x1b[31mred\rcache\n\x9b"
    expected, _, _ = run_embed(QUERIES, cache_dir=folder)
    damaged, foreign, *_ = sorted(folder.glob("embeddings/*/*.safetensors"))
    damaged.write_bytes(b"damaged")
    foreign.write_bytes(b"foreign")
    foreign.rename(foreign.with_stem(f"000000-{hashlib.sha256(b'foreign').hexdigest()}"))
    assert torch.equal(run_embed(QUERIES, cache_dir=folder)[0], expected)
    embedding_cache.main(["--cache_dir", str(folder)])
    out, err = capsys.readouterr()
    assert "is damaged" in err
    assert "cannot be used" in err
    assert out.count("[31mred cache") == 1
    assert all(line.isprintable() for line in [*out.split("\n"), *err.split("\n")])


def test_a_damaged_description_of_the_encoder_is_written_again(run_embed, tmp_path):
    expected, metadata, _ = run_embed(QUERIES)
    (description,) = tmp_path.glob("cache/embeddings/*/encoder.json")
    for content in (b"", b"{", b"[]", b'{"tokens_read": "x"}', b'{"path": "x"}'):
        description.write_bytes(content)
        again, again_metadata, _ = run_embed(QUERIES)
        assert torch.equal(again, expected)
        assert again_metadata == metadata


def test_a_lost_description_costs_no_encoding(run_embed, tmp_path):
    expected, metadata, _ = run_embed(QUERIES)
    (description,) = tmp_path.glob("cache/embeddings/*/encoder.json")
    content = description.read_bytes()
    description.unlink()
    again, again_metadata, missing = run_embed(QUERIES)
    assert (again_metadata, missing) == (metadata, 0)
    assert torch.equal(again, expected)
    assert description.read_bytes() == content


def test_a_shard_of_another_encoder_is_skipped_and_left_there(run_embed, tmp_path, capsys):
    run_embed(QUERIES, pooling="last")
    (other,) = shards(tmp_path)
    run_embed(QUERIES[:1])
    (own,) = set(shards(tmp_path)) - {other}
    moved = own.with_name(other.name)
    shutil.copy(other, moved)
    capsys.readouterr()
    got, _, missing = run_embed(QUERIES)
    assert missing == 59
    assert f"{moved} cannot be used (it belongs to another encoder's part)" in capsys.readouterr().err
    assert moved.is_file()
    assert not torch.equal(got, run_embed(QUERIES, pooling="last")[0])


@pytest.mark.parametrize("content", [b"hello", save({"x": np.zeros(2)}), save({"x": np.zeros(2)}, metadata={"a": "b"})])
def test_an_undamaged_file_that_is_not_a_shard_is_skipped_and_left_there(run_embed, tmp_path, capsys, content):
    expected, _, _ = run_embed(QUERIES)
    (shard,) = shards(tmp_path)
    foreign = shard.with_name(f"000000-{hashlib.sha256(content).hexdigest()}.safetensors")
    for path in (foreign, shard.with_name("notes.safetensors")):
        path.write_bytes(content)
    got, _, missing = run_embed(QUERIES)
    assert missing == 0
    assert torch.equal(got, expected)
    assert capsys.readouterr().err.count("cannot be used") == 1
    assert foreign.read_bytes() == content


def test_a_full_disk_is_one_error_and_keeps_what_was_stored(run_embed, small_shards, tmp_path, monkeypatch):
    fsync = os.fsync

    def full(descriptor):
        if len(shards(tmp_path)) == 2:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"No space left on device.*--cache_dir.*--no_cache"):
            run_embed(QUERIES)
    folder = shards(tmp_path)[0].parent
    assert len(list(folder.iterdir())) == 3  # two shards and encoder.json, nothing half written
    expected, _, _ = run_embed(QUERIES, cache_dir=None)
    assert torch.equal(run_embed(QUERIES)[0], expected)


def test_an_encoder_is_known_by_its_content_and_not_by_its_path(run_embed, demo, tmp_path):
    shutil.copytree(demo / "encoder", tmp_path / "moved")
    expected, _, _ = run_embed(QUERIES)
    assert run_embed(QUERIES, model_path=tmp_path / "moved")[2] == 0
    network = AutoModel.from_pretrained(tmp_path / "moved")
    with torch.no_grad():
        network.norm.weight[0] += 1
    network.save_pretrained(tmp_path / "moved")
    other, _, missing = run_embed(QUERIES, model_path=tmp_path / "moved")
    assert missing == 60
    assert not torch.equal(other, expected)


@pytest.mark.parametrize("flag", [{"pooling": "last"}, {"max_length": 3}, {"dtype": "bfloat16"}])
def test_another_use_of_the_encoder_is_another_part(run_embed, flag):
    expected, _, _ = run_embed(QUERIES)
    other, metadata, missing = run_embed(QUERIES, **flag)
    assert missing == 60
    assert not torch.equal(other, expected)
    assert metadata | flag == metadata
    assert torch.equal(run_embed(QUERIES)[0], expected)
    assert run_embed(QUERIES, **flag)[2] == 0


def test_another_version_of_the_arithmetic_is_another_part(run_embed, monkeypatch):
    run_embed(QUERIES)
    monkeypatch.setattr(embedding_cache, "FORMAT_VERSION", embedding_cache.FORMAT_VERSION + 1)
    assert run_embed(QUERIES)[2] == 60


def test_the_maximum_length_of_the_encoder_is_known_without_loading_it(run_embed, forbid_encoder):
    assert run_embed(QUERIES, max_length=10**6)[1]["max_length"] == 1024
    forbid_encoder()
    assert run_embed(QUERIES, max_length=10**6)[1]["max_length"] == 1024


def test_what_another_run_stores_meanwhile_is_not_encoded(demo, run_embed, small_shards, tmp_path, monkeypatch):
    expected, _, _ = run_embed(QUERIES, cache_dir=None)
    passes, hidden_states = [], query_representation.hidden_states
    encoder = QueryEncoder(
        str(demo / "encoder"), CPU, dtype="float32", tokens_per_batch=64, cache_dir=tmp_path / "cache"
    )

    def watched(network, ids, mask):
        passes.append(len(ids))
        other = EmbeddingCache(tmp_path / "cache", encoder.usage)
        other.store(query_keys(QUERIES), expected)
        return hidden_states(network, ids, mask)

    monkeypatch.setattr(query_representation, "hidden_states", watched)
    got, num_encoded = encoder.embed(QUERIES)
    assert len(passes) == 1
    assert num_encoded == passes[0]
    assert torch.equal(got, expected)


def test_of_two_runs_that_store_the_same_query_the_first_counts_for_all(tmp_path):
    keys = query_keys(["x", "y", "z"])
    one, two = open_caches(tmp_path)
    one.describe(METADATA)
    one.store(keys[:2], vectors(2))
    refresh, two.refresh = two.refresh, Mock()

    def later():  # it sees the first too late
        assert not two.names
        two.refresh.side_effect = refresh

    two.refresh.side_effect = later
    two.store(keys[1:], vectors(2, 100))
    assert [path.name[:6] for path in shards(tmp_path)] == ["000000", "000000"]
    three, four = open_caches(tmp_path)
    assert look_up(three, keys).all()
    assert look_up(four, keys[::-1]).all()
    assert torch.equal(three.read(keys), four.read(keys[::-1]).flip(0))
    assert torch.equal(three.read(keys)[[0, 2]], torch.tensor([[0.0, 1, 2], [103, 104, 105]]))
    first_by_name = load_file(shards(tmp_path)[0])
    (row,) = np.flatnonzero([bytes(key) == keys[1] for key in first_by_name["keys"]])
    np.testing.assert_array_equal(three.read(keys)[1], first_by_name["embeddings"][row])


def test_a_later_shard_never_overrules_an_earlier_one(tmp_path):
    keys = query_keys([f"{i}" for i in range(20)])
    cache, fresh = open_caches(tmp_path)
    cache.describe(METADATA)
    for i in range(20):
        cache.store(keys[: i + 1], vectors(i + 1, 100 * i))
    expected = torch.stack([vectors(i + 1, 100 * i)[i] for i in range(20)])
    assert look_up(fresh, keys).all()
    for reader in (cache, fresh):
        assert torch.equal(reader.read(keys), expected)
        assert look_up(reader, keys).all()
        assert len(reader.shards) == len(shards(tmp_path)) == 20  # each mapped once


def test_added_embeddings_are_stored_together_by_flush(tmp_path):
    keys = query_keys(["x", "y", "z"])
    cache, other = open_caches(tmp_path)
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

    def written(*_):
        raise AssertionError("something was written")

    for name in ("atomic_write", "make_folder"):
        monkeypatch.setattr(embedding_cache, name, written)
    keys, cache = query_keys(["x", "y", "z"]), EmbeddingCache(None, USAGE)
    cache.describe(METADATA)
    cache.store(keys[:2], vectors(2))
    cache.add(keys, vectors(3, 100))
    cache.flush()
    cache.refresh()
    assert cache.has(keys).all()
    assert torch.equal(cache.read(keys), torch.cat([vectors(2), vectors(3, 100)[2:]]))  # the earlier ones stay
    assert not EmbeddingCache(None, USAGE).has(keys).any()
    for _ in range(2):
        assert run_embed(QUERIES, cache_dir=None)[2] == 60  # nor does it outlive the call
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


def test_many_processes_fill_one_cache_together(demo, run_embed, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from query_representation import QueryEncoder
from support.encoding import cache as embedding_cache
embedding_cache.SECONDS_PER_SHARD = 0
torch.set_num_threads(1)
queries = {QUERIES!r}[int(sys.argv[1]):]
options = dict(device=torch.device("cpu"), dtype="float32", tokens_per_batch=64)
got, _ = QueryEncoder({str(demo / "encoder")!r}, cache_dir={str(tmp_path / "cache")!r}, **options).embed(queries)
plain, _ = QueryEncoder({str(demo / "encoder")!r}, **options).embed(queries)
torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-4)
"""
    started = [
        subprocess.Popen([sys.executable, "-c", code, start], stderr=subprocess.PIPE) for start in ("0", "0", "20")
    ]
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    assert not list(tmp_path.rglob("*.damaged"))
    assert run_embed(QUERIES)[2] == 0


def test_a_part_that_is_deleted_during_a_run_is_created_again(run_embed, small_shards, tmp_path, monkeypatch):
    write, written = EmbeddingCache._write, []

    def dropped(self, name, data):
        write(self, name, data)
        written.append(name)
        if len(written) == 4:
            shutil.rmtree(self.folder)

    monkeypatch.setattr(EmbeddingCache, "_write", dropped)
    got, _, _ = run_embed(QUERIES)
    assert torch.equal(got, run_embed(QUERIES, cache_dir=None)[0])


def test_a_shard_that_another_run_sets_aside_meanwhile_is_not_reported(run_embed, tmp_path, capsys):
    expected, _, _ = run_embed(QUERIES)
    (shard,) = shards(tmp_path)
    gone = shard.with_name(f"000000-{64 * '0'}.safetensors")
    gone.symlink_to("nowhere")  # listed, but not there when it is opened
    assert torch.equal(run_embed(QUERIES)[0], expected)
    assert gone.is_symlink()
    assert "damaged" not in capsys.readouterr().err


def test_a_cache_that_is_only_read_need_not_be_writable(run_embed, forbid_encoder, tmp_path, monkeypatch):
    expected, _, _ = run_embed(QUERIES)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    forbid_encoder()
    for name in ("utime", "fsync", "replace", "mkdir"):
        monkeypatch.setattr(os, name, refused)
    assert torch.equal(run_embed(QUERIES)[0], expected)


def test_shards_are_named_by_their_content_and_hold_the_keys_of_the_texts(run_embed, tmp_path):
    embeddings, _, _ = run_embed(["b", "\u4f60\u597d"])
    (shard,) = shards(tmp_path)
    assert shard.stem == f"000000-{hashlib.sha256(shard.read_bytes()).hexdigest()}"
    content = load_file(shard)
    stored = {bytes(key): vector for key, vector in zip(content["keys"], content["embeddings"], strict=True)}
    for text, vector in zip(("b", "\u4f60\u597d"), embeddings, strict=True):
        np.testing.assert_array_equal(stored[hashlib.sha256(text.encode()).digest()], vector.numpy())


def listing(capsys, *flags):
    embedding_cache.main(list(flags))
    return capsys.readouterr().out.splitlines()


def test_the_command_lists_and_deletes(run_embed, small_shards, tmp_path, capsys):
    flags = ("--cache_dir", str(tmp_path / "cache"))
    assert listing(capsys, *flags) == [f"{tmp_path / 'cache' / 'embeddings'}: 0 encoders"]
    run_embed(QUERIES)
    run_embed(QUERIES[:7], pooling="last")
    parts = {part["metadata"]["pooling"]: part for part in embedding_cache.parts(tmp_path / "cache")}
    assert {pooling: part["queries"] for pooling, part in parts.items()} == {"mean": 60, "last": 7}
    folder = tmp_path / "cache" / "embeddings" / parts["mean"]["name"]
    assert parts["mean"]["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    os.utime(folder / "encoder.json", (0, 0))
    lines = listing(capsys, *flags)
    assert [line.split()[:2] for line in lines[2:]] == [[parts["last"]["name"][:8], "7"], [folder.name[:8], "60"]]
    assert "1970-01-01" in lines[3]
    assert lines[3].endswith("encoder")
    assert listing(capsys, *flags, "--drop", folder.name[:8])[0].startswith("dropped 60 queries")
    assert not folder.exists()
    assert run_embed(QUERIES[:7], pooling="last")[2] == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[1]", b"7", b'{"dtype": null}'])
def test_the_command_lists_what_is_damaged_too(run_embed, tmp_path, capsys, content):
    run_embed(QUERIES)
    (shard,) = shards(tmp_path)
    shard.with_name("encoder.json").write_bytes(content)
    shard.with_name("000001-x.safetensors").write_bytes(b"")
    (line,) = listing(capsys, "--cache_dir", str(tmp_path / "cache"))[2:]
    assert line.split()[:2] == [shard.parent.name[:8], "60"]


def test_the_command_touches_only_its_own_folders(run_embed, tmp_path, capsys):
    run_embed(QUERIES)
    folder = shards(tmp_path)[0].parent
    (folder.parent / "photos").mkdir()
    (folder.parent / ("a" * 32)).symlink_to(folder)
    assert [part["name"] for part in embedding_cache.parts(tmp_path / "cache")] == [folder.name]
    with pytest.raises(UserError, match="fits 0"):
        embedding_cache.main(["--cache_dir", str(tmp_path / "cache"), "--drop", "photos"])


def test_a_part_that_cannot_be_deleted_is_reported_in_one_line(run_embed, tmp_path, monkeypatch):
    run_embed(QUERIES)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refused)
    name = shards(tmp_path)[0].parent.name
    with pytest.raises(UserError, match=f"cannot delete all of .*{name}: Permission denied"):
        embedding_cache.main(["--cache_dir", str(tmp_path / "cache"), "--drop", name])


@pytest.mark.parametrize("name", ["", "zz", "../x"])
def test_the_command_deletes_nothing_that_is_not_named_exactly(run_embed, tmp_path, capsys, name):
    run_embed(QUERIES)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: embedding_cache.main(["--cache_dir", str(tmp_path / "cache"), "--drop", name]))
    assert stopped.value.code == 2
    assert "fits 0 of the cached encoders" in capsys.readouterr().err
    assert run_embed(QUERIES)[2] == 0


def test_a_cached_run_imports_no_transformers(demo, demo_dir, tmp_path):
    flags = ["--demo", "--demo_dir", str(demo_dir), "--output_dir", str(tmp_path / "out"), "--limit", "300"]
    flags += ["--epochs", "1", "--num_clusters", "4", "--cache_dir", str(tmp_path / "cache")]
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
train.main({flags!r})
print(sorted({{"transformers", "tokenizers"}} & set(sys.modules)))
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert "0 from the cache" in runs[0].stdout
    assert "transformers" in runs[0].stdout.splitlines()[-1]
    history = json.loads((tmp_path / "out" / "training_history.json").read_text())
    queries = sum(size["queries"] for size in history["data"]["split"].values())
    timing = history["timing"]
    assert (timing["queries_encoded"], timing["queries_from_cache"]) == (0, queries)
    assert f"{queries} from the cache, 0 encoded" in runs[1].stdout
    assert runs[1].stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["encoder.json", "shard"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, name):
    cache = EmbeddingCache(tmp_path, {"fingerprint": "x"})
    cache.describe({"tokens_read": 5})
    cache.store([b"k" * 32], torch.ones(1, 3))
    path = cache.folder / name if name == "encoder.json" else next(cache.folder.glob("*.safetensors"))
    path.unlink()
    os.mkfifo(path)
    again = EmbeddingCache(tmp_path, {"fingerprint": "x"})
    again.refresh()
    if name == "encoder.json":
        assert again.has([b"k" * 32]).all()
        with pytest.raises(UserError, match="is not a file"):
            again.describe({"tokens_read": 5})
    else:
        again.store([b"k" * 32], torch.ones(1, 3))
        assert torch.equal(again.read([b"k" * 32]), torch.ones(1, 3))
