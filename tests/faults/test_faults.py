"""Full disks, read-only folders, damaged files, clocks that jump, too little memory, data without information."""

import fnmatch
import itertools
import json
import os
import resource
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import after_step, assert_same, every_step, kill, result, same

import query_representation
import rankrouter
import route
import train
from rankrouter import RankRouter
from support.data.demo import FILES
from support.system import files
from support.system.errors import UserError
from support.system.safe_torch import read_checkpoint
from support.training.checkpoint import FORMAT_VERSION
from support.training.history import History

UNLIMITED = resource.RLIM_INFINITY


def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, UNLIMITED))


def full_disk(folder):
    limit(20)


def read_only(folder):
    os.chmod(folder, 0o500)
    if os.geteuid() == 0:
        os.seteuid(65534)  # the superuser may write anywhere, "nobody" may not


def repair():
    limit(UNLIMITED)
    os.seteuid(os.getuid())


def fault_at(pattern, fault, nth):
    """For `patch=` of a forked run: the fault occurs when a file of such a name is written for the nth time."""

    def patch():
        remove_leftovers, unlink, left = files.remove_leftovers, os.unlink, [nth]

        def begins(folder, name=None):
            remove_leftovers(folder, name)
            if name and fnmatch.fnmatch(name, pattern):
                left[0] -= 1
                if not left[0]:
                    fault(folder)

        def ends(path):  # the file is given up; other files fit again, such as the logs of the test
            limit(UNLIMITED)
            unlink(path)

        files.remove_leftovers, os.unlink = begins, ends
        init = files.UserError.__init__

        def repaired(error, *args):
            repair()
            init(error, *args)

        files.UserError.__init__ = repaired

    return patch


HISTORY, BEST, LAST = "training_history.json", "best_model.pt", "last_checkpoint.pt"
OF_CACHE = ("encoder.json", 1), ("*.safetensors", 1), ("*.safetensors", 3)


@pytest.mark.parametrize("fault", [full_disk, read_only])
@pytest.mark.parametrize(("name", "nth"), [(HISTORY, 1), (HISTORY, 2), (BEST, 1), (LAST, 1), (LAST, 9), *OF_CACHE])
def test_a_file_that_cannot_be_written_is_one_line_and_the_run_can_continue(
    small, forked, tmp_path, monkeypatch, name, fault, nth
):
    every_step(monkeypatch.setattr)
    flags = small
    here = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    code, _, _, errors = forked(train.main, [*flags, *here], patch=fault_at(name, fault, nth))
    assert (code, len(errors)) == (2, 1), errors
    assert errors[0].startswith("error: cannot write ")
    assert ("File too large" if fault is full_disk else "Permission denied") in errors[0]
    for folder in (tmp_path / "out", *tmp_path.glob("cache/embeddings/*")):
        folder.chmod(0o700)
    assert not list(tmp_path.rglob("*.partial")) or fault is read_only
    assert forked(train.main, [*flags, *here, "--resume"])[0] == 0
    whole = ["--output_dir", str(tmp_path / "whole"), "--cache_dir", str(tmp_path / "cache")]
    assert forked(train.main, [*flags, *whole])[0] == 0
    assert_same(tmp_path / "out", result(tmp_path / "whole"))
    assert not list(tmp_path.rglob("*.partial"))


def test_the_first_error_is_reported_where_the_history_cannot_be_written_either(small, fails, tmp_path, monkeypatch):
    def first(*_):
        monkeypatch.setattr(History, "write", second)
        raise UserError("the first")

    def second(*_):
        raise UserError("the second")

    monkeypatch.setattr(train, "train_step", first)
    assert "the first" in fails(*small, "--output_dir", str(tmp_path))


@pytest.mark.parametrize("name", [BEST, LAST])
def test_a_replacing_run_that_cannot_write_promises_nothing_and_can_be_started_again(small, forked, tmp_path, name):
    here = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    whole = ["--output_dir", str(tmp_path / "whole"), "--cache_dir", str(tmp_path / "another")]
    assert forked(train.main, [*small, *whole])[0] == 0
    assert forked(train.main, [*small, *here], after_step(9), kill)[0] == -signal.SIGKILL
    patch = fault_at(name, full_disk, 1)
    code, _, _, errors = forked(train.main, [*small, *here, "--lr", "0.1", "--overwrite"], patch=patch)
    assert (code, len(errors)) == (2, 1)
    assert ("the checkpoint of epoch 0 is kept" in errors[0]) == (tmp_path / "out" / BEST).is_file() == (name == LAST)
    assert not (tmp_path / "out" / LAST).exists()
    code, _, printed, _ = forked(train.main, [*small, *here, "--resume"])
    assert code == 0
    assert "resume   nothing to resume" in printed
    assert_same(tmp_path / "out", result(tmp_path / "whole"))


@pytest.mark.parametrize("name", FILES)
def test_a_demo_that_does_not_fit_is_one_line_and_leaves_nothing(small, demo, forked, tmp_path, name):
    size = (demo / name).stat().st_size
    flags = ["--demo", "--demo_dir", str(tmp_path / "demo"), "--output_dir", str(tmp_path / "out"), *small[4:]]
    code, _, _, errors = forked(train.main, flags, patch=lambda: limit(size - 1))
    assert (code, len(errors)) == (2, 1), errors
    assert "cannot write" in errors[0]
    assert not list((tmp_path / "demo").iterdir())


@pytest.fixture
def finished(small, tmp_path):
    """Flags and folder of a finished run."""
    flags = [*small, "--output_dir", str(tmp_path / "out")]
    train.main(flags)
    return flags, tmp_path / "out"


@pytest.fixture
def ranking(finished, tmp_path):
    """Flags of a ranking, and the file that it writes."""
    path = tmp_path / "ranked" / "rankings.jsonl"
    path.parent.mkdir()
    flags = ["--checkpoint", str(finished[1] / "best_model.pt"), "--no_cache", "--output", str(path)]
    return ["a query", *flags], path


def test_a_rankings_file_that_does_not_fit_leaves_the_old_one(ranking, forked):
    flags, path = ranking
    path.write_text("old")
    code, _, _, errors = forked(route.main, flags, patch=fault_at("rankings.jsonl", full_disk, 1))
    assert (code, len(errors)) == (2, 1)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["rankings.jsonl"]


def test_a_signal_leaves_no_partial_file(ranking, forked):
    flags, path = ranking
    when = forked(route.main, flags)[1].index("before-fsync")
    path.unlink()
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    code, _, _, errors = forked(route.main, flags, when, stop)
    assert (code, errors) == (143, ["interrupted"])
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize(
    ("name", "version"), [("best_model.pt", rankrouter.FORMAT_VERSION), ("last_checkpoint.pt", FORMAT_VERSION)]
)
def test_a_flipped_bit_or_a_cut_is_refused_or_changes_nothing(finished, name, version):
    path = finished[1] / name
    content, whole = path.read_bytes(), read_checkpoint(path, version)
    rng, refused = np.random.default_rng(0), 0
    for position in rng.integers(0, len(content), 300):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            assert same(read_checkpoint(path, version), whole), position
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100
    for length in [0, 1, *rng.integers(0, len(content), 30)]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="is not a RankRouter checkpoint"):
            read_checkpoint(path, version)


@pytest.mark.parametrize("damage", ["cut", "empty", "another", "values"])
def test_a_damaged_last_checkpoint_is_refused_and_touches_nothing(finished, fails, damage):
    flags, output = finished
    path = output / "last_checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    if damage in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: 1000 * (damage == "cut")])
    elif damage == "another":
        torch.save({"format_version": FORMAT_VERSION, "weights": torch.zeros(3)}, path)
    else:
        torch.save(saved | {"curves": {"towers": {"train_losses": 3}}}, path)
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    assert "is not a RankRouter checkpoint" in fails(*flags, "--resume")
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"status": "finished"}', b'{"status": 3}'])
def test_a_damaged_history_is_written_again(finished, content):
    flags, output = finished
    expected = result(output)
    (output / "training_history.json").write_bytes(content)
    train.main([*flags, "--resume"])
    assert_same(output, expected)


def test_a_clock_that_jumps_changes_nothing(small, forked, tmp_path):
    def patch():
        steps = itertools.cycle([0, 1e6, -1e6, 3e9, -5])
        time.time = lambda: 1.7e9 + next(steps)

    for name, jumps in (("steady", None), ("jumps", patch)):
        here = ["--output_dir", str(tmp_path / name), "--cache_dir", str(tmp_path / f"{name}-cache")]
        code, _, _, errors = forked(train.main, [*small, *here], patch=jumps)
        assert (code, errors) == (0, [])
    assert_same(tmp_path / "jumps", result(tmp_path / "steady"))


def memory_for(tokens):
    hidden_states = query_representation.hidden_states

    def bounded(network, ids, mask):
        if ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has none.")
        return hidden_states(network, ids, mask)

    return bounded


def test_out_of_memory_halves_the_batch_and_is_reported_once(small, tmp_path, monkeypatch, capsys):
    train.main([*small, "--no_cache", "--output_dir", str(tmp_path / "whole")])
    capsys.readouterr()
    monkeypatch.setattr(query_representation, "hidden_states", memory_for(130))
    train.main([*small, "--no_cache", "--output_dir", str(tmp_path / "halved")])
    errors = capsys.readouterr().err.splitlines()
    assert errors == ["warning: out of memory with 512 tokens per batch; continuing with --encode_tokens 126"]
    embeddings = [
        RankRouter.load(tmp_path / name / "best_model.pt").query_tower.mean for name in ("whole", "halved")
    ]  # (H,) each
    torch.testing.assert_close(*embeddings, atol=1e-5, rtol=1e-4)


def test_out_of_memory_for_a_single_query_is_one_line(small, fails, tmp_path, monkeypatch):
    monkeypatch.setattr(query_representation, "hidden_states", memory_for(3))
    message = fails(*small, "--no_cache", "--output_dir", str(tmp_path))
    assert "out of memory with one query of " in message
    assert "--max_length" in message


ALLOCATION = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), ALLOCATION])
def test_out_of_memory_elsewhere_is_one_line(small, fails, tmp_path, monkeypatch, error):
    def fails_to_allocate(*_):
        raise error

    monkeypatch.setattr(train, "train_step", fails_to_allocate)
    assert "out of memory" in fails(*small, "--output_dir", str(tmp_path))
    assert json.loads((tmp_path / "training_history.json").read_text())["status"] == "failed"


# --- data ----------------------------------------------------------------------------------------------------


def battles(rows):
    return pd.DataFrame(rows, columns=["prompt", "model_a", "model_b", "winner"])


def rows_of(count=120, models="xyz", winner=None, seed=0):
    rng = np.random.default_rng(seed)
    for number in range(count):
        a, b = rng.choice(list(models), 2, replace=False)
        yield f"what is {number}", a, b, winner or f"model_{'ab'[rng.integers(2)]}"


def strongest(rows):
    for prompt, a, b, winner in rows:
        yield prompt, a, b, {a: "model_a", b: "model_b"}.get("x", winner)


def train_on(table, small, tmp_path, *flags):
    table.to_parquet(tmp_path / "battles.parquet")
    train.main([*small, "--data_path", str(tmp_path / "battles.parquet"), "--output_dir", str(tmp_path), *flags])
    text = (tmp_path / "training_history.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_query_of_five_megabytes(small, tmp_path):
    rows = list(rows_of())
    rows[0] = ("word " * 400_000 + "x" * 2_000_000 + "é😀" * 170_000, *rows[0][1:])
    history = train_on(battles(rows), small, tmp_path)
    assert history["data"]["queries"] == 120


def test_a_hundred_thousand_battles_of_one_query(small, fails, tmp_path):
    table = battles([("the same", a, b, winner) for _, a, b, winner in itertools.islice(rows_of(), 100)] * 1000)
    table.to_parquet(tmp_path / "battles.parquet")
    data = ("--data_path", str(tmp_path / "battles.parquet"), "--output_dir", str(tmp_path / "out"))
    assert "the split leaves no battle for " in fails(*small, *data)
    history = train_on(pd.concat([table, battles(rows_of())]), small, tmp_path, "--batch_size", "4096")
    assert (history["data"]["queries"], history["data"]["battles"]) == (121, 100_120)


@pytest.mark.parametrize("kind", ["one wins", "a wins", "all tie", "no signal"])
def test_outcomes_with_little_information_leave_a_valid_history(small, fails, tmp_path, kind):
    rows = {
        "one wins": strongest(rows_of()),
        "a wins": rows_of(winner="model_a"),
        "all tie": rows_of(winner="tie"),
        "no signal": rows_of(),
    }[kind]
    if kind == "all tie":
        battles(rows).to_parquet(tmp_path / "battles.parquet")
        data = ("--data_path", str(tmp_path / "battles.parquet"), "--output_dir", str(tmp_path / "out"))
        assert "the split leaves no battle for " in fails(*small, *data)
        return
    history = train_on(battles(rows), small, tmp_path, "--baselines", "all")
    assert history["status"] == "finished"
    assert 0 <= history["test_metrics"]["auc"] <= 1
    for row in history["baselines"].values():
        low, high = row["difference_intervals"]["auc"]
        assert low <= row["difference"]["auc"] <= high


def test_a_model_seen_only_in_test_is_left_out_and_counted(small, tmp_path):
    rows = list(rows_of())
    whole = train_on(battles(rows), small, tmp_path)
    from data_loader import load_battles, split_battles

    split, _ = split_battles(load_battles(str(tmp_path / "battles.parquet"))[0], 42)
    query = split.test.queries[split.test.query_idx[0]]
    rows = [(prompt, "late" if prompt == query else a, b, winner) for prompt, a, b, winner in rows]
    history = train_on(battles(rows), small, tmp_path)
    assert history["data"]["unseen_model_battles"] == 1
    assert history["data"]["split"]["test"]["battles"] == whole["data"]["split"]["test"]["battles"] - 1
    assert "late" not in RankRouter.load(tmp_path / "best_model.pt").model_names


# --- determinism ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_is_the_same_history_with_one_thread_and_with_several(small, forked, tmp_path, threads):
    def patch():
        torch.set_num_threads(threads)

    for name in ("one", "two"):
        flags = [*small, "--no_cache", "--output_dir", str(tmp_path / name)]
        flags += ["--cache_dir", "", "--deterministic"] if name == "two" else ["--cache_dir", ""]
        assert forked(train.main, flags, patch=patch)[0] == 0
    histories = [json.loads((tmp_path / name / "training_history.json").read_text()) for name in ("one", "two")]
    for history in histories:
        del history["timing"], history["args"]["output_dir"], history["args"]["deterministic"]
    assert histories[0] == histories[1]
    weights = [RankRouter.load(tmp_path / name / "best_model.pt").state_dict() for name in ("one", "two")]
    assert same(*weights)
