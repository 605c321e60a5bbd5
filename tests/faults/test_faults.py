"""Full disks, read-only folders, damaged files, clocks that jump, too little memory, data without information."""

import fnmatch
import functools
import itertools
import json
import os
import resource
import signal
import time
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import after_step, assert_same, every_step, kill, result, same

import route
import support.encoding.encoder as encoder_module
import train
from rankrouter import RankRouter
from support.system import files
from support.system.errors import UserError
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
WHEN_FULL = (HISTORY, 2), (BEST, 1), (LAST, 9), ("*.safetensors", 3)
WHEN_READ_ONLY = (HISTORY, 1), (LAST, 1), ("encoder.json", 1)


@pytest.mark.parametrize(
    ("fault", "message", "rows"),
    [(full_disk, "File too large", WHEN_FULL), (read_only, "Permission denied", WHEN_READ_ONLY)],
)
def test_a_file_that_cannot_be_written_is_one_line_and_the_run_can_continue(
    small, tiny_run, forked, tmp_path, monkeypatch, fault, message, rows
):
    every_step(monkeypatch.setattr)
    for number, (name, nth) in enumerate(rows):
        folder = tmp_path / str(number)
        flags = [*small, "--output_dir", str(folder / "out"), "--cache_dir", str(folder / "cache")]
        code, _, _, errors = forked(train.main, flags, patch=fault_at(name, fault, nth))
        assert (code, len(errors)) == (2, 1), (name, nth, errors)
        assert errors[0].startswith("error: cannot write ")
        assert message in errors[0]
        for written in (folder / "out", *folder.glob("cache/embeddings/*")):
            written.chmod(0o700)
        assert not list(folder.rglob("*.partial")) or fault is read_only
        assert forked(train.main, [*flags, "--resume"])[0] == 0, (name, nth)
        assert_same(folder / "out", result(tiny_run[1]))
        assert not list(folder.rglob("*.partial")), (name, nth)


def test_the_first_error_is_reported_where_the_history_cannot_be_written_either(small, fails, tmp_path, monkeypatch):
    def first(*_):
        monkeypatch.setattr(History, "write", second)
        raise UserError("the first")

    def second(*_):
        raise UserError("the second")

    monkeypatch.setattr(train, "train_step", first)
    assert "the first" in fails(*small, "--output_dir", str(tmp_path))


def test_a_replacing_run_that_cannot_write_promises_nothing_and_can_be_started_again(small, tiny_run, forked, tmp_path):
    for name in (BEST, LAST):
        output = tmp_path / name
        flags = [*small, "--output_dir", str(output)]
        assert forked(train.main, flags, after_step(9), kill)[0] == -signal.SIGKILL
        patch = fault_at(name, full_disk, 1)
        code, _, _, errors = forked(train.main, [*flags, "--lr", "0.1", "--overwrite"], patch=patch)
        assert (code, len(errors)) == (2, 1), name
        assert ("the checkpoint of epoch 0 is kept" in errors[0]) == (output / BEST).is_file() == (name == LAST)
        assert not (output / LAST).exists()
        code, _, printed, _ = forked(train.main, [*flags, "--resume"])
        assert code == 0, name
        assert "resume   nothing to resume" in printed
        assert_same(output, result(tiny_run[1]))


def test_a_demo_that_does_not_fit_is_one_line_and_leaves_nothing(small, demo, forked, tmp_path):
    flags = ["--demo", "--demo_dir", str(tmp_path / "demo"), "--output_dir", str(tmp_path / "out"), *small[4:]]
    for name in ("battles.parquet", "encoder/model.safetensors"):  # the first of its files, and the largest
        size = (demo / name).stat().st_size
        code, _, _, errors = forked(train.main, flags, patch=functools.partial(limit, size - 1))
        assert (code, len(errors)) == (2, 1), errors
        assert "cannot write" in errors[0]
        assert not list((tmp_path / "demo").iterdir()), name


@pytest.fixture
def ranking(tiny_run, tmp_path):
    """Flags of a ranking, and the file that it writes."""
    path = tmp_path / "ranked" / "rankings.jsonl"
    path.parent.mkdir()
    return ["a query", "--checkpoint", str(tiny_run[1] / BEST), "--no_cache", "--output", str(path)], path


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


def test_a_clock_that_jumps_changes_nothing(small, tiny_run, forked, tmp_path):
    def patch():
        steps = itertools.cycle([0, 1e6, -1e6, 3e9, -5])
        time.time = lambda: 1.7e9 + next(steps)

    flags = [*small, "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    code, _, _, errors = forked(train.main, flags, patch=patch)
    assert (code, errors) == (0, [])
    assert_same(tmp_path / "out", result(tiny_run[1]))


def memory_for(tokens):
    hidden_states = encoder_module.hidden_states

    def bounded(network, ids, *others):
        if ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has none.")
        return hidden_states(network, ids, *others)

    return bounded


def test_out_of_memory_halves_the_batch_and_is_reported_once(small, tiny_run, tmp_path, monkeypatch, capsys):
    capsys.readouterr()
    monkeypatch.setattr(encoder_module, "hidden_states", memory_for(130))
    train.main([*small, "--no_cache", "--output_dir", str(tmp_path)])
    errors = capsys.readouterr().err.splitlines()
    assert errors == ["warning: out of memory with 512 tokens per batch; continuing with --encode_tokens 126"]
    means = [RankRouter.load(output / BEST).query_tower.mean for output in (tiny_run[1], tmp_path)]  # (H,) each
    torch.testing.assert_close(*means, atol=1e-5, rtol=1e-4)


def test_out_of_memory_for_a_single_query_is_one_line(small, fails, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_module, "hidden_states", memory_for(3))
    message = fails(*small, "--no_cache", "--output_dir", str(tmp_path))
    assert "out of memory with one query of " in message
    assert "--max_length" in message


def test_out_of_memory_elsewhere_is_one_line(small, fails, tmp_path, monkeypatch):
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(cublas)):
        monkeypatch.setattr(train, "train_step", Mock(side_effect=error))
        assert "out of memory" in fails(*small, "--output_dir", str(tmp_path)), error
        assert json.loads((tmp_path / HISTORY).read_text())["status"] == "failed"


# --- data ----------------------------------------------------------------------------------------------------


def battles(rows):
    return pd.DataFrame(rows, columns=["prompt", "model_a", "model_b", "winner"])


def rows_of(count=120, models="xyz", winner=None, seed=0):
    rng = np.random.default_rng(seed)
    for number in range(count):
        a, b = rng.choice(list(models), 2, replace=False)
        yield f"what is {number}", a, b, winner or f"model_{'ab'[rng.integers(2)]}"


def train_on(table, small, tmp_path, *flags):
    table.to_parquet(tmp_path / "battles.parquet")
    train.main([*small, "--data_path", str(tmp_path / "battles.parquet"), "--output_dir", str(tmp_path), *flags])
    text = (tmp_path / "training_history.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_query_of_a_megabyte(small, tmp_path):
    rows = list(rows_of())
    rows[0] = ("word " * 80_000 + "x" * 400_000 + "é😀" * 34_000, *rows[0][1:])
    history = train_on(battles(rows), small, tmp_path)
    assert history["data"]["queries"] == 120


def test_twenty_thousand_battles_of_one_query(small, fails, tmp_path):
    table = battles([("the same", a, b, winner) for _, a, b, winner in itertools.islice(rows_of(), 100)] * 200)
    with pytest.raises(UserError, match="the split leaves no battle for "):
        train_on(table, small, tmp_path)
    history = train_on(pd.concat([table, battles(rows_of())]), small, tmp_path, "--batch_size", "4096")
    assert (history["data"]["queries"], history["data"]["battles"]) == (121, 20_120)


def test_outcomes_with_little_information_leave_a_valid_history(small, tmp_path):
    one_wins = [(query, a, b, {a: "model_a", b: "model_b"}.get("x", winner)) for query, a, b, winner in rows_of()]
    for kind, rows in (("one wins", one_wins), ("a wins", rows_of(winner="model_a")), ("no signal", rows_of())):
        history = train_on(battles(rows), small, tmp_path, "--baselines", "all")
        assert history["status"] == "finished", kind
        assert 0 <= history["test_metrics"]["auc"] <= 1, kind
        for row in history["baselines"].values():
            low, high = row["difference_intervals"]["auc"]
            assert low <= row["difference"]["auc"] <= high, kind
    with pytest.raises(UserError, match="the split leaves no battle for "):
        train_on(battles(rows_of(winner="tie")), small, tmp_path)


# --- determinism ---------------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_result_with_several_threads(small, tmp_path):
    histories = []
    for name, more in (("one", []), ("two", ["--deterministic"])):
        flags = [*small, "--no_cache", "--threads", "2", "--output_dir", str(tmp_path / name), *more]
        train.main(flags)  # not in a forked process, where threads of this one are missed
        histories.append(json.loads((tmp_path / name / HISTORY).read_text()))
        del histories[-1]["timing"], histories[-1]["args"]["output_dir"], histories[-1]["args"]["deterministic"]
    assert histories[0] == histories[1]
    assert same(*(RankRouter.load(tmp_path / name / BEST).state_dict() for name in ("one", "two")))
