"""Files are replaced completely or not at all, and hashed by their content."""

import hashlib
import os
from pathlib import Path

import pytest

from support.system.errors import UserError
from support.system.files import atomic_write, content_hash, make_folder, user_cache_folder


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "history.json"
    atomic_write(path, b"old")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def full(*_):
                raise OSError(28, "No space left on device")

            patch.setattr(os, step, full)
            with pytest.raises(UserError, match=r"history\.json: No space left on device"):
                atomic_write(path, b"new")
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["history.json"]
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["history.json"]


def test_the_hash_is_of_the_contents_in_order(tmp_path):
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"one")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (tmp_path / name for name in "abc")
    digests = hashlib.sha256(b"one").digest() + hashlib.sha256(b"two").digest()
    assert content_hash([a, b]) == content_hash([c, b]) == hashlib.sha256(digests).hexdigest()
    assert content_hash([b, a]) != content_hash([a, b])


def test_a_user_without_a_home_folder_learns_which_flags_to_give(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert user_cache_folder().name == "rankrouter"  # under XDG_CACHE_HOME
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(UserError, match=r"home directory.*--cache_dir and --demo_dir"):
        user_cache_folder()


def test_two_writers_with_the_same_process_id_do_not_share_a_file_and_readers_see_complete_ones(tmp_path, monkeypatch):
    path, fsync, names, contents = tmp_path / "history.json", os.fsync, [], []
    atomic_write(path, b"old")

    def look(descriptor):
        names.append(os.listdir(tmp_path))
        contents.append(path.read_bytes())
        if len(names) == 1:
            atomic_write(path, b"second")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    atomic_write(path, b"first")
    assert [len(seen) for seen in names] == [2, 3]
    assert contents == [b"old", b"old"]
    assert path.read_bytes() == b"first"


def test_what_is_no_file_or_folder_is_refused(tmp_path):
    for path, message in (("", "is empty"), ("\udcff", "is not valid UTF-8")):
        with pytest.raises(UserError, match=f"--demo_dir {message}; expected a folder"):
            make_folder(path, "--demo_dir")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a file"):
        content_hash([tmp_path / "pipe"])
