"""A run that was killed, stopped or refused loses nothing, and continues to the same result."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Forked, after_step, assert_same, every_step, kill, result

import loss
import query_representation
import train
from rankrouter import RankRouter
from support.system import files
from support.system.command_line import run_command
from support.system.files import locked

FILES = {"training_history.json", "best_model.pt", "last_checkpoint.pt"}
EVENTS = 24
FINETUNED = ["--finetune_encoder", "--batch_tokens", "300", "--tower_epochs", "1", "--eval_every", "2"]
HELD_OUT = ["--hold_out_model", "demo-model-a"]


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


def chosen(events, rng):
    """Numbers of events: one of every kind, and some others."""
    kinds = sorted(set(events))
    numbers = [int(rng.choice([i for i, event in enumerate(events) if event == kind])) for kind in kinds]
    others = np.setdiff1d(np.arange(len(events)), numbers)
    return sorted(numbers + rng.choice(others, EVENTS - len(numbers), replace=False).tolist())


@pytest.mark.parametrize("patch", [every_step, None], ids=["saved every step", "saved every epoch"])
def test_a_run_killed_at_any_event_continues_to_the_same_bits(small, whole, forked, tmp_path, patch):
    events, expected = whole
    if patch is None:  # a minute is longer than this run
        code, events, _, _ = forked(train.main, [*small, *folders(tmp_path)])
        assert code == 0
        assert_same(tmp_path / "out", expected)
    for event in chosen(events, np.random.default_rng(0)):
        here = folders(tmp_path, event)
        output, cache = (Path(path) for path in here[1::2])
        code, before, _, _ = forked(train.main, [*small, *here], event, kill, patch)
        assert code == -signal.SIGKILL
        assert_consistent(output)
        code, after, _, errors = forked(train.main, [*small, *here, "--resume"], patch=patch)
        assert (code, errors) == (0, [])
        assert_same(output, expected)
        assert {path.name for path in output.iterdir()} == FILES
        assert not list(cache.rglob("*.partial"))
        at_most = {"pass": 1, "step": 1 if patch else events.count("after-step") // 2}  # one epoch of two
        for kind, repeated in at_most.items():
            done = [names.count(f"after-{kind}") for names in (before, after, events)]
            assert done[0] + done[1] <= done[2] + repeated, kind


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
    ("more", "kills"),
    [
        (HELD_OUT, {"after 1 epochs and 2 steps of the next": 8, "ceiling: after 0 epochs and 3 steps of the next": 4}),
        (
            [*FINETUNED, *HELD_OUT],
            {
                "towers: after 0 epochs and 2 steps of the next": 3,
                "after 1 epochs and 3 steps of the next": 10,
                "ceiling: after 0 epochs and 4 steps of the next": 5,
                "ceiling_encoder: after 0 epochs and 3 steps of the next": 4,
            },
        ),
        (
            [*FINETUNED, "--lora_rank", "2", "--accumulate", "2"],
            {"towers: after 0 epochs and 5 steps of the next": 6, "after 0 epochs and 1 steps of the next": 2},
        ),
    ],
    ids=["frozen", "finetuned", "lora"],
)
def test_a_run_killed_once_in_each_phase_continues_there_to_the_same_bits(small, forked, tmp_path, more, kills):
    flags = [*small, *more]
    assert forked(train.main, [*flags, *folders(tmp_path, "whole")], patch=every_step)[0] == 0
    for phase, step in enumerate(kills.values()):
        when = after_step(step, phase)  # this step is not saved yet
        code, _, printed, _ = forked(train.main, [*flags, *folders(tmp_path), "--resume"], when, kill, every_step)
        assert code == -signal.SIGKILL
        line = ["nothing to resume", *kills][phase]
        assert resume_line(printed) == f"resume   {line}"
    code, _, printed, errors = forked(train.main, [*flags, *folders(tmp_path), "--resume"], patch=every_step)
    assert (code, errors) == (0, [])
    assert resume_line(printed) == f"resume   {list(kills)[-1]}"
    assert_same(tmp_path / "out", result(tmp_path / "outwhole"))


def test_epochs_cannot_change_once_the_ceiling_is_trained(small, forked, fails, tmp_path):
    flags = [*small, *HELD_OUT, *folders(tmp_path)]
    assert forked(train.main, flags, after_step(3, fit=1), kill, every_step)[0] == -signal.SIGKILL
    before = contents(tmp_path / "out")
    message = fails(*flags, "--resume", "--epochs", "4")
    assert "has finished the 2 epochs of the router" in message
    assert "--epochs 4 is too late" in message
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("vectors", ["win_rate", "file"])
def test_a_run_killed_in_the_first_epoch_keeps_its_trained_capability_vectors(small, forked, tmp_path, vectors):
    flags, width = list(small), small.index("--capability_dim")
    table = pd.DataFrame({"model": [f"demo-model-{letter}" for letter in "abcdefghijkl"], "x": range(12)})
    table.to_csv(tmp_path / "profiles.csv", index=False)
    flags[width : width + 2] = {
        "win_rate": ["--capability_init", "win_rate"],
        "file": ["--capability_file", str(tmp_path / "profiles.csv")],
    }[vectors]
    assert forked(train.main, [*flags, *folders(tmp_path, "whole")], patch=every_step)[0] == 0
    assert forked(train.main, [*flags, *folders(tmp_path)], after_step(3), kill, every_step)[0] == -signal.SIGKILL
    assert forked(train.main, [*flags, *folders(tmp_path), "--resume"], patch=every_step)[0] == 0
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("where", ["before-pass", "before-clusters", "before-step"])
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

        def interrupted_once(args):
            calls.append(None)
            if len(calls) == 1:
                send(signal.SIGTERM)()
            run(args)

        train.train = interrupted_once

    def both(flags):
        with pytest.raises(SystemExit):
            run_command(lambda: train.main(flags))
        train.main(flags)

    assert forked(both, [*small, *folders(tmp_path)], patch=patch)[0] == 0


# --- unfinished runs: --resume or --overwrite ----------------------------------------------------------------


@pytest.mark.parametrize("changed", [[], ["--lr", "0.1"]])
def test_a_new_run_does_not_replace_an_unfinished_one(unfinished, whole, fails, changed):
    flags, output = unfinished
    before = contents(output)
    message = fails(*flags, *changed)
    assert f"{output} holds an unfinished run; continue it with --resume, replace it with --overwrite" in message
    assert contents(output) == before
    train.main([*flags, "--resume"])
    assert_same(output, whole[1])


def test_a_run_whose_history_is_lost_counts_as_unfinished(finished, fails):
    flags, output = finished
    (output / "training_history.json").unlink()
    before = contents(output)
    assert "holds an unfinished run" in fails(*flags)
    assert contents(output) == before


def test_overwrite_replaces_an_unfinished_run(unfinished, whole, small, forked, tmp_path):
    flags, output = unfinished
    code, events, printed, errors = forked(train.main, [*flags, "--overwrite"])
    assert (code, errors) == (0, [])
    assert not any(line.startswith("resume ") for line in printed)
    assert events.count("after-step") == whole[0].count("after-step")
    assert_same(output, whole[1])
    assert {path.name for path in output.iterdir()} == FILES


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_nothing_of_a_replaced_run_passes_for_the_new_one(state, request, whole, forked):
    flags, output = request.getfixturevalue(state)
    replace = [*flags, "--lr", "0.1", *(["--overwrite"] if state == "unfinished" else [])]
    assert forked(train.main, replace, nth("before-clusters"), kill)[0] == -signal.SIGKILL
    assert {path.name for path in output.iterdir()} == {"training_history.json", ".rankrouter.lock"}
    history = history_of(output)
    assert (history["status"], history["args"]["lr"], history["best_epoch"]) == ("running", 0.1, None)
    # The flags of the replaced run have nothing to resume from, and start it again.
    code, _, printed, _ = forked(train.main, [*flags, "--resume"])
    assert code == 0
    assert resume_line(printed) == "resume   nothing to resume"
    if state == "unfinished":
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


def test_resume_and_overwrite_exclude_each_other(small, fails, tmp_path):
    message = fails(*small, "--output_dir", str(tmp_path), "--resume", "--overwrite")
    assert "--resume and --overwrite exclude each other" in message


# --- what may change between a run and its continuation ------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["--lr", "0.001"], ["--lr was 0.0001, is 0.001"]),
        (["--seed", "7"], ["--seed was 42, is 7", "--split_seed was 42, is 7"]),
        (["--no_model_id", "--ties", "half"], ["--no_model_id was False, is True", "--ties was drop, is half"]),
        (["--dtype", "bfloat16"], ["the encoder's dtype was float32, is bfloat16"]),
        (["--epochs", "1"], ["has 2 epochs; --epochs 1 is too few"]),
    ],
)
def test_resuming_another_experiment_is_refused_and_touches_nothing(finished, fails, changed, expected):
    flags, output = finished
    before = contents(output)
    message = fails(*flags, *changed, "--resume")
    assert all(part in message for part in expected)
    assert contents(output) == before


def test_fewer_epochs_than_a_run_has_started_are_refused(unfinished, forked):
    flags, _ = unfinished
    assert forked(train.main, [*flags, "--resume"], nth("before-step"), send(signal.SIGTERM))[0] == 143
    code, _, _, errors = forked(train.main, [*flags, "--resume", "--epochs", "1"])
    assert (code, len(errors)) == (2, 1)
    assert "has 1 epochs and a part of the next; --epochs 1 is too few" in errors[0]


def test_what_does_not_change_the_result_may_change(finished, tmp_path):
    flags, output = finished
    moved = tmp_path / "moved"
    output.rename(moved)
    fresh = ["--output_dir", str(moved), "--cache_dir", str(tmp_path / "cache")]
    data = tmp_path / "elsewhere.parquet"
    shutil.copy(flags[flags.index("--data_path") + 1], data)
    before = RankRouter.load(moved / "best_model.pt").state_dict()
    train.main([*flags, *fresh, "--data_path", str(data), "--baselines", "fast", "--resume"])
    history = history_of(moved)
    assert "bradley_terry" in history["baselines"]
    router = RankRouter.load(moved / "best_model.pt")
    assert router.metadata.args == history["args"]
    after = router.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


@pytest.mark.parametrize("what", ["data", "encoder", "profiles"])
def test_files_replaced_between_run_and_resume_are_refused_by_their_content(small, fails, tmp_path, what):
    flags = list(small)
    data, encoder, table = tmp_path / "battles.parquet", tmp_path / "encoder", tmp_path / "profiles.csv"
    shutil.copy(flags[1], data)
    shutil.copytree(flags[3], encoder)
    models = [f"demo-model-{letter}" for letter in "abcdefghijkl"]
    pd.DataFrame({"model": models, "x": range(12)}).to_csv(table, index=False)
    flags[1], flags[3] = str(data), str(encoder)
    width = flags.index("--capability_dim")
    flags[width : width + 2] = ["--capability_file", str(table)]
    flags += ["--output_dir", str(tmp_path / "out")]
    train.main(flags)
    if what == "data":
        pd.read_parquet(data)[:-1].to_parquet(data)
    elif what == "encoder":
        (encoder / "config.json").write_text((encoder / "config.json").read_text() + " ")
    else:
        pd.DataFrame({"model": models, "x": range(1, 13)}).to_csv(table, index=False)
    expected = {"data": "--data_path", "encoder": "the encoder's fingerprint", "profiles": "--capability_file"}
    message = fails(*flags, "--resume")
    assert "of another experiment" in message
    assert expected[what] in message


def test_more_epochs_continue_as_if_the_run_had_them_from_the_start(finished, small, tmp_path):
    flags, output = finished
    train.main([*flags, "--epochs", "4", "--resume"])
    train.main([*small, "--output_dir", str(tmp_path / "long"), "--epochs", "4"])
    assert_same(output, result(tmp_path / "long"))
    assert len(history_of(output)["train_losses"]) == 4


def test_different_embeddings_are_reported(finished, capsys, monkeypatch):
    flags, output = finished
    (output / "training_history.json").unlink()
    embed = query_representation.QueryEncoder.embed

    def elsewhere(encoder, queries):
        embeddings, encoded = embed(encoder, queries)
        return embeddings * (1 + 2**-22), encoded

    monkeypatch.setattr(query_representation.QueryEncoder, "embed", elsewhere)
    train.main([*flags, "--resume"])
    assert "warning: the embeddings are not bit for bit" in capsys.readouterr().err


# --- finished runs, and files that are lost ------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
def test_a_finished_run_has_nothing_to_do(finished, monkeypatch, capsys, kept):
    flags, output = finished
    if not kept:
        (output / "last_checkpoint.pt").unlink()
    before = contents(output)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(train, "Run", None)
        train.main([*flags, "--resume"])
    printed = capsys.readouterr().out
    assert resume_line(printed.splitlines()) == f"resume   {'after 2 epochs' if kept else 'nothing to resume'}"
    auc = json.loads(before["training_history.json"])["test_metrics"]["auc"]
    assert f"finished already, with a test AUC of {auc:.4f}" in printed
    assert contents(output) == before


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


def test_a_history_without_its_data_is_not_a_finished_run(finished):
    flags, output = finished
    expected = result(output)
    bare = {"status": "running", "args": history_of(output)["args"]}
    (output / "training_history.json").write_text(json.dumps(bare))
    train.main([*flags, "--resume"])
    assert_same(output, expected)


def test_without_anything_to_resume_a_run_starts(small, tmp_path, capsys):
    train.main([*small, "--output_dir", str(tmp_path), "--resume"])
    assert "resume   nothing to resume" in capsys.readouterr().out
    assert history_of(tmp_path)["status"] == "finished"


@pytest.mark.parametrize("lost", ["best_model.pt", "training_history.json", "damaged"])
def test_a_lost_best_checkpoint_comes_back(finished, lost):
    flags, output = finished
    expected = RankRouter.load(output / "best_model.pt").state_dict()
    if lost == "damaged":
        (output / "best_model.pt").write_bytes(b"x")
    else:
        (output / lost).unlink()
    train.main([*flags, "--resume"])
    found = RankRouter.load(output / "best_model.pt").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path)])
def test_an_output_that_is_not_a_file_is_neither_waited_for_nor_replaced(small, fails, tmp_path, name, make):
    make(tmp_path / name)
    for flags in ([], ["--resume"], ["--overwrite"]):
        assert f"{tmp_path / name} is not a file" in fails(*small, "--output_dir", str(tmp_path), *flags)
    assert os.listdir(tmp_path) == [name]


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
