"""The cache of embeddings survives kills, damage, full disks and concurrent runs; nothing stored is encoded again."""

import hashlib
import multiprocessing
import os
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import kill
from safetensors.numpy import save

import support.encoding.encoder as encoder_module
from support.encoding import cache as embedding_cache
from support.encoding.cache import EmbeddingCache
from support.encoding.encoder import QueryEncoder
from support.system.errors import UserError

QUERIES = [f"{'tell me more about ' * (i % 7)}number {i}" for i in range(60)]
REFUSED = Mock(side_effect=PermissionError(13, "Permission denied"))


@pytest.fixture
def run_embed(demo, tmp_path):
    """Embeddings by the demo's encoder in batches of 64 tokens, cached for this test, and how many are new."""

    def run(queries, cache_dir=tmp_path / "cache", **flags):
        options = {"dtype": "float32", "tokens_per_batch": 64, "cache_dir": cache_dir} | flags
        return QueryEncoder(str(demo / "encoder"), torch.device("cpu"), **options).embed(queries)

    return run


@pytest.fixture
def small_shards(monkeypatch):
    """Every batch becomes a shard."""
    monkeypatch.setattr(embedding_cache, "SECONDS_PER_SHARD", 0)


def shards(tmp_path, cache="cache"):
    return sorted((tmp_path / cache).glob("embeddings/*/*.safetensors"))


def list_parts(capsys, cache_dir):
    """The lines of the command that lists the cache."""
    embedding_cache.main(["--cache_dir", str(cache_dir)])
    return capsys.readouterr().out.splitlines()


def test_a_run_killed_after_any_shard_continues_to_the_same_bits(run_embed, forked, tmp_path, monkeypatch):
    expected, _ = run_embed(QUERIES, None)
    passes, hidden_states = [], encoder_module.hidden_states

    def watched(network, ids, *others):
        passes.append(len(ids))
        return hidden_states(network, ids, *others)

    monkeypatch.setattr(encoder_module, "hidden_states", watched)
    for stored in (1, 3, 7):
        folder = tmp_path / str(stored)
        code, *_ = forked(
            lambda _, folder=folder: run_embed(QUERIES, folder),
            [],
            lambda events, stored=stored: events.count("after-replace") == 1 + stored,  # encoder.json, and the shards
            kill,
        )
        assert code == -9
        assert len(shards(tmp_path, str(stored))) == stored
        passes.clear()
        got, num_encoded = run_embed(QUERIES[::-1], folder)
        assert torch.equal(got.flip(0), expected), stored
        assert sum(passes) == num_encoded < 60  # whole batches were stored, so none is encoded for a part of it


def test_an_error_while_encoding_keeps_what_was_encoded(run_embed, monkeypatch):
    hidden_states, left = encoder_module.hidden_states, iter(range(5))

    def fails(*args):
        if next(left, None) is None:
            raise UserError("out of memory")
        return hidden_states(*args)

    with monkeypatch.context() as patch:
        patch.setattr(encoder_module, "hidden_states", fails)
        with pytest.raises(UserError, match="out of memory"):
            run_embed(QUERIES)
    assert 0 < run_embed(QUERIES)[1] < 60


def test_a_damaged_shard_is_reported_set_aside_and_encoded_again(run_embed, small_shards, tmp_path, capsys):
    expected, _ = run_embed(QUERIES)
    for damage in (
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        lambda content: b"hello" * 99,
    ):
        chosen = shards(tmp_path)[2]
        chosen.write_bytes(content := damage(chosen.read_bytes()))
        capsys.readouterr()
        got, num_encoded = run_embed(QUERIES)
        assert 0 < num_encoded < 30, content
        assert torch.equal(got, expected), content
        warning = capsys.readouterr().err.splitlines()[0]
        assert f"{chosen} is damaged" in warning
        assert "set aside" in warning
        assert chosen.with_suffix(".damaged").read_bytes() == content
        assert run_embed(QUERIES)[1] == 0
        assert "damaged" not in capsys.readouterr().err


def test_control_characters_in_the_name_of_the_folder_are_not_printed(run_embed, small_shards, tmp_path, capsys):
    folder = tmp_path / "\x1b[31mred\rcache\n\x9b"
    expected, _ = run_embed(QUERIES, folder)
    damaged, foreign, *_ = shards(tmp_path, folder.name)
    damaged.write_bytes(b"damaged")
    foreign.write_bytes(b"foreign")
    foreign.rename(foreign.with_stem(f"000000-{hashlib.sha256(b'foreign').hexdigest()}"))
    assert torch.equal(run_embed(QUERIES, folder)[0], expected)
    embedding_cache.main(["--cache_dir", str(folder)])
    out, err = capsys.readouterr()
    assert "is damaged" in err
    assert "cannot be used" in err
    assert out.count("[31mred cache") == 1
    assert all(line.isprintable() for line in [*out.split("\n"), *err.split("\n")])


def test_a_damaged_or_lost_description_of_the_encoder_is_listed_and_written_again(run_embed, tmp_path, capsys):
    expected, _ = run_embed(QUERIES)
    (shard,) = shards(tmp_path)
    description = shard.with_name("encoder.json")
    written = description.read_bytes()
    shard.with_name("000001-x.safetensors").write_bytes(b"")
    for content in (None, b"", b"{", b"[]", b"[1]", b"7", b'{"dtype": null}', b'{"tokens_read": "x"}', b'{"path": 1}'):
        if content is None:
            description.unlink()
        else:
            description.write_bytes(content)
        (line,) = list_parts(capsys, tmp_path / "cache")[2:]
        assert line.split()[:2] == [shard.parent.name[:8], "60"], content
        again, num_encoded = run_embed(QUERIES)
        assert num_encoded == 0, content
        assert torch.equal(again, expected), content
        assert description.read_bytes() == written, content


def test_an_undamaged_file_that_is_no_shard_of_this_encoder_is_skipped_and_left_there(run_embed, tmp_path, capsys):
    run_embed(QUERIES, pooling="last")
    (other,) = shards(tmp_path)
    expected, _ = run_embed(QUERIES[:1])
    (own,) = set(shards(tmp_path)) - {other}
    tensor = {"x": np.zeros(2)}
    contents = [b"hello", save(tensor), save(tensor, metadata={"a": "b"}), other.read_bytes()]
    for content in contents:
        foreign = own.with_name(f"000000-{hashlib.sha256(content).hexdigest()}.safetensors")
        for path in (foreign, own.with_name("notes.safetensors")):
            path.write_bytes(content)
        capsys.readouterr()
        got, num_encoded = run_embed(QUERIES[:1])
        assert num_encoded == 0, content
        assert torch.equal(got, expected), content
        lines = capsys.readouterr().err.splitlines()
        assert [f"{foreign} cannot be used" in line for line in lines].count(True) == 1, content
        assert foreign.read_bytes() == content
        foreign.unlink()
    shutil.copy(other, own.with_name(other.name))
    got, num_encoded = run_embed(QUERIES)
    assert num_encoded == 59
    assert (
        f"{own.with_name(other.name)} cannot be used (it belongs to another encoder's part)" in capsys.readouterr().err
    )
    assert not torch.equal(got, run_embed(QUERIES, pooling="last")[0])


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
    assert torch.equal(run_embed(QUERIES)[0], run_embed(QUERIES, None)[0])


def test_many_processes_fill_one_cache_together(run_embed, small_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # else it warns of the fork

    def fill(start):
        (got, _), (plain, _) = run_embed(QUERIES[start:]), run_embed(QUERIES[start:], None)
        torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-4)

    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=fill, args=(start,)) for start in (0, 0, 20)]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0
    assert not list(tmp_path.rglob("*.damaged"))
    assert run_embed(QUERIES)[1] == 0


def test_a_part_that_is_deleted_during_a_run_is_created_again(run_embed, small_shards, monkeypatch):
    write, written = EmbeddingCache._write, []

    def dropped(self, name, data):
        write(self, name, data)
        written.append(name)
        if len(written) == 4:
            shutil.rmtree(self.folder)

    monkeypatch.setattr(EmbeddingCache, "_write", dropped)
    got, _ = run_embed(QUERIES)
    assert torch.equal(got, run_embed(QUERIES, None)[0])


def test_a_shard_that_another_run_sets_aside_meanwhile_is_not_reported(run_embed, tmp_path, capsys):
    expected, _ = run_embed(QUERIES)
    (shard,) = shards(tmp_path)
    gone = shard.with_name(f"000000-{64 * '0'}.safetensors")
    gone.symlink_to("nowhere")  # listed, but not there when it is opened
    assert torch.equal(run_embed(QUERIES)[0], expected)
    assert gone.is_symlink()
    assert "damaged" not in capsys.readouterr().err


def test_a_cache_that_is_only_read_need_not_be_writable_but_says_what_it_cannot_delete(
    run_embed, tmp_path, monkeypatch
):
    expected, _ = run_embed(QUERIES)
    for name in ("utime", "fsync", "replace", "mkdir"):
        monkeypatch.setattr(os, name, REFUSED)
    assert torch.equal(run_embed(QUERIES)[0], expected)
    monkeypatch.setattr(shutil, "rmtree", REFUSED)
    name = shards(tmp_path)[0].parent.name
    with pytest.raises(UserError, match=f"cannot delete all of .*{name}: Permission denied"):
        embedding_cache.main(["--cache_dir", str(tmp_path / "cache"), "--drop", name])


def test_what_is_no_file_in_the_place_of_one_is_not_waited_for_but_set_aside(run_embed, tmp_path, capsys):
    expected, _ = run_embed(QUERIES)
    for put in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
        for name, again in (("encoder.json", 0), (shards(tmp_path)[0].name, 60)):
            (path,) = tmp_path.glob(f"cache/embeddings/*/{name}")
            path.unlink()
            put(path)
            capsys.readouterr()
            got, num_encoded = run_embed(QUERIES)
            assert torch.equal(got, expected), name
            assert num_encoded == again, name
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"warning: {path} is not a file; set aside, "), name
            aside = path.with_suffix(".damaged")
            assert not aside.is_file(), name
            aside.rename(tmp_path / f"{len(list(tmp_path.iterdir()))}")
    (path,) = tmp_path.glob("cache/embeddings/*/encoder.json")
    path.unlink()
    os.mkfifo(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", REFUSED)
        with pytest.raises(UserError, match="is not a file"):
            run_embed([*QUERIES, "new"])
    assert "is not a file; not set aside (Permission denied)" in capsys.readouterr().err
