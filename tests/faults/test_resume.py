"""A run that was killed, stopped or refused loses nothing, and continues to the same result."""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Forked, after_step, assert_same, every_step, kill, result

import loss
import support.encoding.encoder as encoder_module
import train
from rankrouter import RankRouter
from support.system import files
from support.system.command_line import run_command
from support.system.files import locked

FILES = {"training_history.json", "best_model.pt", "last_checkpoint.pt"}
FINETUNED = [
    "--finetune_encoder",
    "--batch_tokens",
    "300",
    "--tower_epochs",
    "1",
    "--eval_every",
    "2",
    "--surface_features",
]
HELD_OUT = ["--hold_out_model", "demo-model-a"]
WIN_RATES = ["--capability_init", "win_rate"]


def folders(tmp_path, name=""):
    return ["--output_dir", str(tmp_path / f"out{name}"), "--cache_dir", str(tmp_path / f"cache{name}")]


def send(number):
    return lambda: os.kill(os.getpid(), number)


def nth(name, number=1):
    """An event for `forked`: the event of this name, from 1."""
    return lambda events: events[-1] == name and events.count(name) == number


def history_of(folder):
    return json.loads((folder / "training_history.json").read_text())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES}


def resume_line(printed):
    return next(line for line in printed if line.startswith("resume "))


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A run that nothing interrupted: its events and its result."""
    tmp_path = tmp_path_factory.mktemp("whole")
    code, events, _, errors = Forked(tmp_path)(train.main, [*small, *folders(tmp_path)], patch=every_step)
    assert (code, errors) == (0, [])
    return events, result(tmp_path / "out")


@pytest.fixture
def unfinished(small, forked, tmp_path):
    """Flags and folder of a run that was killed in its second epoch."""
    flags = [*small, *folders(tmp_path)]
    assert forked(train.main, flags, after_step(9), kill)[0] == -signal.SIGKILL
    return flags, tmp_path / "out"


@pytest.fixture
def finished(small, tmp_path):
    """Flags and folder of a finished run."""
    flags = [*small, "--output_dir", str(tmp_path / "out")]
    train.main(flags)
    return flags, tmp_path / "out"


# --- killed --------------------------------------------------------------------------------------------------


SAVED_EVERY_STEP = {  # what a kill leaves: the event at which it comes, and which one of that name, from 1
    "the history is not in place": ("before-fsync", 1),
    "the cache has its encoder.json and nothing else": ("after-replace", 2),
    "a shard of the cache is not in place": ("before-replace", 5),
    "clusters are fitted and not saved": ("after-clusters", 1),
    "a step is taken and not saved": ("after-step", 3),
    "the state within the first epoch is not in place": ("before-replace", 11),
    "the best checkpoint is newer than history and state": ("after-replace", 14),
    "the history is newer than the state": ("after-replace", 15),
    "the state within the second epoch is not flushed": ("before-fsync", 19),
    "trained and not tested": ("after-fit", 1),
    "tested, and the history of it is not in place": ("before-replace", 25),
    "finished, and the lock is left": ("before-unlink", 3),
}
SAVED_EVERY_EPOCH = {
    "while encoding": ("after-pass", 3),
    "within the first epoch": ("before-step", 4),
    "best checkpoint and history without a state": ("after-replace", 9),
    "within the second epoch": ("after-step", 9),
    "the state of the second epoch is flushed and not in place": ("after-fsync", 12),
}


@pytest.mark.parametrize(
    ("patch", "kills"),
    [(every_step, SAVED_EVERY_STEP), (None, SAVED_EVERY_EPOCH)],  # a minute is longer than this run
    ids=["saved every step", "saved every epoch"],
)
def test_a_run_killed_at_any_event_continues_to_the_same_bits(small, whole, forked, tmp_path, patch, kills):
    events, expected = whole
    for row, event in kills.items():
        here = folders(tmp_path, row)
        output, cache = (Path(path) for path in here[1::2])
        code, before, _, _ = forked(train.main, [*small, *here], nth(*event), kill, patch)
        assert code == -signal.SIGKILL, row
        assert_consistent(output)
        code, after, _, errors = forked(train.main, [*small, *here, "--resume"], patch=patch)
        assert (code, errors) == (0, []), row
        assert_same(output, expected)
        assert {path.name for path in output.iterdir()} == FILES, row
        assert not list(cache.rglob("*.partial")), row
        at_most = {"pass": 1, "step": 1 if patch else events.count("after-step") // 2}  # one epoch of two
        for kind, repeated in at_most.items():
            done = [names.count(f"after-{kind}") for names in (before, after, events)]
            assert done[0] + done[1] <= done[2] + repeated, (row, kind)


def assert_consistent(output):
    """A killed run leaves a history that can be read, and a best checkpoint, if there is one, of the same run."""
    if (output / "training_history.json").is_file():
        history = history_of(output)
        assert history["status"] in ("running", "finished")
        if history["best_epoch"] is not None:
            metadata = RankRouter.load(output / "best_model.pt").metadata
            assert metadata.args == history["args"]
            assert metadata.epoch >= history["best_epoch"]


def test_a_run_killed_again_and_again_finishes(small, whole, forked, tmp_path):
    codes = []
    while (not codes or codes[-1]) and len(codes) < 12:
        flags = [*small, *folders(tmp_path), "--resume"]
        codes.append(forked(train.main, flags, 50, kill, every_step)[0])
    assert set(codes) == {0, -signal.SIGKILL}
    assert len(codes) > 3
    assert_same(tmp_path / "out", whole[1])


@pytest.mark.parametrize(
    ("data", "more", "kills"),
    [
        (
            "small_table",
            HELD_OUT,
            {"after 1 epochs and 2 steps of the next": 13, "ceiling: after 0 epochs and 3 steps of the next": 4},
        ),
        (
            "small",
            [*FINETUNED, *HELD_OUT],
            {
                "towers: after 0 epochs and 2 steps of the next": 3,
                "after 1 epochs and 3 steps of the next": 10,
                "ceiling: after 0 epochs and 4 steps of the next": 5,
                "ceiling_encoder: after 0 epochs and 3 steps of the next": 4,
            },
        ),
        (
            "small_table",
            [*FINETUNED, "--lora_rank", "2", "--accumulate", "2", *WIN_RATES],
            {"towers: after 0 epochs and 5 steps of the next": 6, "after 0 epochs and 1 steps of the next": 2},
        ),
    ],
    ids=["frozen, rows", "finetuned, battles", "lora, rows"],
)
def test_a_run_killed_once_in_each_phase_continues_there_to_the_same_bits(
    request, forked, fails, tmp_path, data, more, kills
):
    flags = [*request.getfixturevalue(data), *more]
    if WIN_RATES[0] in more:  # which need no width
        width = flags.index("--capability_dim")
        del flags[width : width + 2]
    assert forked(train.main, [*flags, *folders(tmp_path, "whole")], patch=every_step)[0] == 0
    for phase, step in enumerate(kills.values()):
        when = after_step(step, phase)  # this step is not saved yet
        code, _, printed, _ = forked(train.main, [*flags, *folders(tmp_path), "--resume"], when, kill, every_step)
        assert code == -signal.SIGKILL
        line = ["nothing to resume", *kills][phase]
        assert resume_line(printed) == f"resume   {line}"
    if HELD_OUT[0] in more:  # the last phase is that of the ceiling: the epochs of the router cannot change any more
        before = contents(tmp_path / "out")
        message = fails(*flags, *folders(tmp_path), "--resume", "--epochs", "4")
        assert ("--epochs 4 is too late" if more == HELD_OUT else "--epochs was 2, is 4") in message
        assert contents(tmp_path / "out") == before
    code, _, printed, errors = forked(train.main, [*flags, *folders(tmp_path), "--resume"], patch=every_step)
    assert (code, errors) == (0, [])
    assert resume_line(printed) == f"resume   {list(kills)[-1]}"
    assert_same(tmp_path / "out", result(tmp_path / "outwhole"))


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(small, fails, tmp_path, monkeypatch):
    calls = []

    def breaks(*args):
        calls.append(None)
        return loss.bpr(*args) * (float("nan") if len(calls) == 4 else 1)

    every_step(monkeypatch.setattr)
    flags = [*small, "--output_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setitem(loss.LOSSES, "bpr", breaks)
        assert "the loss is nan at step 3" in fails(*flags)
    assert len(torch.load(tmp_path / "last_checkpoint.pt", weights_only=True)["training"]["losses"]) == 3
    train.main([*flags, "--resume"])


def test_all_random_states_are_restored(tmp_path):
    import random

    from support.training.checkpoint import _random_states, _set_random_states

    states = _random_states()
    torch.save(states, tmp_path / "states.pt")
    drawn = [random.random(), np.random.random(), torch.rand(1).item()]
    _set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert [random.random(), np.random.random(), torch.rand(1).item()] == drawn


# --- stopped by a signal -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "where"),
    [
        (signal.SIGINT, 130, "before-pass"),
        (signal.SIGTERM, 143, "before-clusters"),
        (signal.SIGHUP, 129, "before-step"),
    ],
)
def test_a_signal_ends_the_step_and_the_message_says_how_to_continue(
    small, whole, forked, tmp_path, number, code, where
):
    events, expected = whole
    flags = [*small, *folders(tmp_path)]
    when = nth(where, max(1, events.count(where) - 1))
    ended, before, _, errors = forked(train.main, flags, when, send(number))
    assert ended == code
    epochs = 1 if where == "before-step" else 0
    assert errors == [f"interrupted after {epochs} of 2 epochs; the same command with --resume continues it"]
    history = history_of(tmp_path / "out")
    assert (history["status"], len(history["train_losses"])) == ("interrupted", epochs)
    assert before.count("before-step") == before.count("after-step")
    if epochs:
        ended, _, _, errors = forked(train.main, [*flags, "--resume", "--epochs", "1"])
        assert (ended, len(errors)) == (2, 1)
        assert "has 1 epochs and a part of the next; --epochs 1 is too few" in errors[0]
    ended, after, printed, _ = forked(train.main, [*flags, "--resume"])
    assert ended == 0
    assert_same(tmp_path / "out", expected)
    assert before.count("after-step") + after.count("after-step") == events.count("after-step")
    assert after.count("before-clusters") == (0 if epochs else 1)  # centroids are restored, not fitted again
    done = before.count("after-step") - events.count("after-step") // 2
    line = f"after 1 epochs and {done} steps of the next" if epochs else "nothing to resume"
    assert resume_line(printed) == f"resume   {line}"


def test_a_second_signal_stops_at_once_and_leaves_valid_files(small, whole, forked, tmp_path):
    def twice():
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    flags = [*small, *folders(tmp_path)]
    code, before, _, errors = forked(train.main, flags, nth("before-step", 11), twice)
    assert (code, len(errors)) == (130, 1)
    assert before.count("before-step") == before.count("after-step") + 1
    assert history_of(tmp_path / "out")["status"] == "interrupted"
    assert forked(train.main, [*flags, "--resume"])[0] == 0
    assert_same(tmp_path / "out", whole[1])


def test_a_signal_before_anything_is_written_is_one_line(small, forked, tmp_path):
    def patch():
        train.device.pick_device = lambda *_: send(signal.SIGTERM)()

    code, _, _, errors = forked(train.main, [*small, *folders(tmp_path)], patch=patch)
    assert (code, errors) == (143, ["interrupted"])


def test_a_signal_that_is_ignored_stays_ignored(small, forked, tmp_path):
    def ignore():  # as nohup does
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    flags = [*small, *folders(tmp_path)]
    assert forked(train.main, flags, after_step(5), send(signal.SIGHUP), ignore)[0] == 0


def test_a_signal_is_forgotten_when_its_run_has_ended(small, forked, tmp_path):
    def patch():
        run, calls = train.train, []

        def interrupted_once(*args):
            calls.append(None)
            if len(calls) == 1:
                send(signal.SIGTERM)()
            run(*args)

        train.train = interrupted_once

    def both(flags):
        with pytest.raises(SystemExit):
            run_command(lambda: train.main(flags))
        train.main(flags)

    assert forked(both, [*small, *folders(tmp_path)], patch=patch)[0] == 0


# --- unfinished runs: --resume or --overwrite ----------------------------------------------------------------


def test_an_unfinished_run_is_replaced_with_overwrite_only(unfinished, whole, forked, fails):
    flags, output = unfinished
    before = contents(output)
    for changed in ([], ["--lr", "0.1"]):
        message = fails(*flags, *changed)
        assert f"{output} holds an unfinished run; continue it with --resume, replace it with --overwrite" in message
    assert "--resume and --overwrite exclude each other" in fails(*flags, "--resume", "--overwrite")
    (output / "training_history.json").rename(output / "lost")
    assert "holds an unfinished run" in fails(*flags)
    (output / "lost").rename(output / "training_history.json")
    assert contents(output) == before
    code, events, printed, errors = forked(train.main, [*flags, "--overwrite"])
    assert (code, errors) == (0, [])
    assert not any(line.startswith("resume ") for line in printed)
    assert events.count("after-step") == whole[0].count("after-step")
    assert_same(output, whole[1])
    assert {path.name for path in output.iterdir()} == FILES


def test_nothing_of_a_replaced_run_passes_for_the_new_one(unfinished, whole, forked):
    flags, output = unfinished
    replace = [*flags, "--lr", "0.1", "--overwrite"]
    assert forked(train.main, replace, nth("before-clusters"), kill)[0] == -signal.SIGKILL
    assert {path.name for path in output.iterdir()} == {"training_history.json", ".rankrouter.lock"}
    history = history_of(output)
    assert (history["status"], history["args"]["lr"], history["best_epoch"]) == ("running", 0.1, None)
    # The flags of the replaced run have nothing to resume from, and start it again.
    code, _, printed, _ = forked(train.main, [*flags, "--resume"])
    assert code == 0
    assert resume_line(printed) == "resume   nothing to resume"
    assert_same(output, whole[1])
    assert {path.name for path in output.iterdir()} == FILES


def test_a_finished_run_is_replaced_without_a_flag(finished):
    flags, output = finished
    before = result(output)
    train.main([*flags, "--epochs", "1"])
    assert history_of(output)["args"]["epochs"] == 1
    assert len(torch.load(output / "last_checkpoint.pt")["curves"]["towers"]["train_losses"]) == 1
    train.main(flags)
    assert_same(output, before)


# --- what may change between a run and its continuation ------------------------------------------------------


def test_resuming_another_experiment_is_refused_and_touches_nothing(small, fails, tmp_path):
    flags, width = list(small), small.index("--capability_dim")
    data, encoder, table = tmp_path / "battles.parquet", tmp_path / "encoder", tmp_path / "profiles.csv"
    shutil.copy(flags[1], data)
    shutil.copytree(flags[3], encoder)
    table.write_text("model,x\n" + "".join(f"demo-model-{letter},{ord(letter)}\n" for letter in "abcdefghijkl"))
    flags[1], flags[3], flags[width : width + 2] = str(data), str(encoder), ["--capability_file", str(table)]
    flags += ["--output_dir", str(tmp_path / "out")]
    train.main(flags)
    before = contents(tmp_path / "out")
    for changed, *expected in (
        (["--lr", "0.001"], "--lr was 0.0001, is 0.001"),
        (["--seed", "7"], "--seed was 42, is 7", "--split_seed was 42, is 7"),
        (["--no_model_id", "--ties", "half"], "--no_model_id was False, is True", "--ties was drop, is half"),
        (["--dtype", "bfloat16"], "the encoder's dtype was float32, is bfloat16"),
        (["--epochs", "1"], "has 2 epochs; --epochs 1 is too few"),
    ):
        message = fails(*flags, *changed, "--resume")
        assert all(part in message for part in expected), (changed, message)
    fewer = pd.read_parquet(data)[:-1].to_parquet()
    config, profiles = (encoder / "config.json").read_bytes(), table.read_bytes()
    for path, content, name in (
        (data, fewer, "the content of --data_path"),
        (encoder / "config.json", config + b" ", "the encoder's fingerprint"),
        (table, profiles.replace(b"97", b"96"), "the content of --capability_file"),
    ):
        old = path.read_bytes()
        path.write_bytes(content)
        message = fails(*flags, "--resume")
        assert f"of another experiment: {name} was " in message
        assert message.count(" was ") == 1
        path.write_bytes(old)
    assert contents(tmp_path / "out") == before


def test_what_does_not_change_the_result_may_change(finished, tmp_path):
    flags, output = finished
    moved = tmp_path / "moved"
    output.rename(moved)
    fresh = ["--output_dir", str(moved), "--cache_dir", str(tmp_path / "cache")]
    data = tmp_path / "elsewhere.parquet"
    shutil.copy(flags[flags.index("--data_path") + 1], data)
    before = RankRouter.load(moved / "best_model.pt").state_dict()
    train.main([*flags, *fresh, "--data_path", str(data), "--baselines", "fast", "--threads", "1", "--resume"])
    history = history_of(moved)
    assert "bradley_terry" in history["baselines"]
    router = RankRouter.load(moved / "best_model.pt")
    assert router.metadata.args == history["args"]
    after = router.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_more_epochs_continue_as_if_the_run_had_them_from_the_start(finished, small, tmp_path):
    flags, output = finished
    train.main([*flags, "--epochs", "4", "--resume"])
    train.main([*small, "--output_dir", str(tmp_path / "long"), "--epochs", "4"])
    assert_same(output, result(tmp_path / "long"))
    assert len(history_of(output)["train_losses"]) == 4


def test_different_embeddings_are_reported(finished, capsys, monkeypatch):
    flags, output = finished
    (output / "training_history.json").unlink()
    embed = encoder_module.QueryEncoder.embed

    def elsewhere(encoder, queries):
        embeddings, encoded = embed(encoder, queries)
        return embeddings * (1 + 2**-22), encoded

    monkeypatch.setattr(encoder_module.QueryEncoder, "embed", elsewhere)
    train.main([*flags, "--resume"])
    assert "warning: the embeddings are not bit for bit" in capsys.readouterr().err


# --- finished runs, and files that are lost ------------------------------------------------------------------


def test_a_finished_run_has_nothing_to_do(finished, monkeypatch, capsys):
    flags, output = finished
    monkeypatch.setattr(train, "Run", None)
    for line in ("after 2 epochs", "nothing to resume"):
        before = contents(output)
        train.main([*flags, "--resume"])
        printed = capsys.readouterr().out
        assert resume_line(printed.splitlines()) == f"resume   {line}"
        auc = json.loads(before["training_history.json"])["test_metrics"]["auc"]
        assert f"finished already, with a test AUC of {auc:.4f}" in printed
        assert contents(output) == before
        (output / "last_checkpoint.pt").unlink(missing_ok=True)


def test_a_finished_run_of_other_data_does_not_count(finished):
    flags, output = finished
    (output / "last_checkpoint.pt").unlink()
    data = output.parent / "battles.parquet"
    pd.read_parquet(flags[1])[:-20].to_parquet(data)
    before = history_of(output)
    history = before | {"args": before["args"] | {"data_path": str(data)}}
    (output / "training_history.json").write_text(json.dumps(history))
    train.main([flags[0], str(data), *flags[2:], "--resume"])
    assert history_of(output)["data"]["content_hash"] != before["data"]["content_hash"]


def test_a_lost_or_damaged_file_of_a_finished_run_is_written_again(finished):
    flags, output = finished
    expected = result(output)
    best, history = (output / name for name in ("best_model.pt", "training_history.json"))
    bare = json.dumps({"status": "running", "args": history_of(output)["args"]}).encode()
    damages = (b"", b"[]", b"{", b"\xff", b'{"status": "finished"}', b'{"status": 3}', bare)
    for path, content in [(best, None), (best, b"x"), (history, None), *((history, damage) for damage in damages)]:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        train.main([*flags, "--resume"])
        assert_same(output, expected)


def test_an_output_that_is_not_a_file_is_neither_waited_for_nor_replaced(small, fails, tmp_path):
    for make in (os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path)):
        for name in sorted(FILES):
            output = Path(tempfile.mkdtemp(dir=tmp_path))
            make(output / name)
            for flags in ([], ["--resume"], ["--overwrite"]):
                assert f"{output / name} is not a file" in fails(*small, "--output_dir", str(output), *flags)
            assert os.listdir(output) == [name]


# --- one run in a folder -------------------------------------------------------------------------------------


def test_a_run_waits_for_the_lock_of_one_that_is_dying(tmp_path, monkeypatch):
    dying = locked(tmp_path, "--output_dir")
    dying.__enter__()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            dying.__exit__(None, None, None)

    monkeypatch.setattr(files.time, "sleep", sleep)
    with locked(tmp_path, "--output_dir"):
        assert len(waits) == 3


def test_a_lock_is_not_written_through_a_link(small, fails, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".rankrouter.lock").symlink_to(tmp_path / "precious")
    assert "cannot lock" in fails(*small, "--output_dir", str(tmp_path / "out"))
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_second_run_in_a_folder_is_refused_unless_the_first_is_dead(small, fails, forked, tmp_path, monkeypatch):
    flags = [*small, *folders(tmp_path)]
    monkeypatch.setattr(files, "SECONDS_TO_DIE", 0)
    with locked(tmp_path, "--output_dir"):
        message = fails(*small, "--output_dir", str(tmp_path))
        assert f"{tmp_path} is in use by another run, process {os.getpid()} on " in message
    assert not (tmp_path / ".rankrouter.lock").exists()
    assert not (tmp_path / "training_history.json").exists()
    assert forked(train.main, flags, 9, kill)[0] == -signal.SIGKILL
    assert (tmp_path / "out" / ".rankrouter.lock").exists()
    assert forked(train.main, flags)[0] == 0
    assert not (tmp_path / "out" / ".rankrouter.lock").exists()
