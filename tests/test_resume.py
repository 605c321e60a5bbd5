"""A run that was killed, stopped or refused loses nothing, and goes on to the same result."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_same, result

import query_representation
import support.cached_encoder
import train
from rankrouter import RankRouter
from support import files
from support.command_line import run_command
from support.files import locked

MOMENTS = 20


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def folders(tmp_path, name):
    return ["--output_dir", str(tmp_path / f"out{name}"), "--cache_dir", str(tmp_path / f"cache{name}")]


def moments_of(events, rng):
    """Moments in which every kind of event is killed once, and some others."""
    kinds = sorted(set(events))
    chosen = [int(rng.choice([i for i, event in enumerate(events) if event == kind])) for kind in kinds]
    others = np.setdiff1d(np.arange(len(events)), chosen)
    return sorted(chosen[:MOMENTS] + rng.choice(others, MOMENTS - len(chosen), replace=False).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("minutes", ["0", "1"])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(small, forked, tmp_path, minutes):
    flags = [*small, "--checkpoint_minutes", minutes]
    code, events, _, _ = forked(train.main, [*flags, *folders(tmp_path, "")])
    assert code == 0
    expected = result(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    for moment in moments_of(events, np.random.default_rng(int(minutes))):
        here = folders(tmp_path, moment)
        output, cache = (Path(path) for path in here[1::2])
        code, before, _, _ = forked(train.main, [*flags, *here], moment, kill)
        assert code == -signal.SIGKILL
        belong_together(output)
        code, after, _, errors = forked(train.main, [*flags, *here, "--resume"])
        assert (code, errors) == (0, [])
        assert_same(output, expected)
        assert {path.name for path in output.iterdir()} == names
        assert not list(cache.rglob("*.partial"))
        lost = {"pass": 1, "step": 1 if minutes == "0" else events.count("after-step") // 2}  # one epoch of two
        for kind, most in lost.items():
            done = [list_of.count(f"after-{kind}") for list_of in (before, after, events)]
            assert done[0] + done[1] <= done[2] + most, kind


def belong_together(output):
    """What a killed run leaves: a history that can be read, and a checkpoint, if there is one, of the same run."""
    if (output / "training_history.json").is_file():
        history = json.loads((output / "training_history.json").read_text())
        assert history["status"] in ("running", "finished")
        best = output / "best_model.pt"
        if history["best_epoch"] is not None:
            facts = RankRouter.load(best).facts
            assert facts["args"] == history["args"]
            assert facts["epoch"] >= history["best_epoch"]


def test_killed_again_and_again_a_run_arrives(small, forked, tmp_path):
    flags = [*small, "--checkpoint_minutes", "0"]
    assert forked(train.main, [*flags, *folders(tmp_path, "")])[0] == 0
    here, codes = folders(tmp_path, "again"), []
    while not codes or codes[-1]:
        codes.append(forked(train.main, [*flags, *here, "--resume"], 45, kill)[0])
    assert set(codes) == {0, -signal.SIGKILL}
    assert len(codes) > 3
    assert_same(tmp_path / "outagain", result(tmp_path / "out"))


def test_killed_in_the_training_of_the_ceiling_a_run_goes_on_there(small, forked, tmp_path):
    flags = [*small, "--hold_out_model", "demo-model-a", "--checkpoint_minutes", "0"]
    code, events, _, _ = forked(train.main, [*flags, *folders(tmp_path, "")])
    assert code == 0
    steps = [i for i, event in enumerate(events) if event == "after-step"]
    here = folders(tmp_path, "killed")
    code, _, _, _ = forked(train.main, [*flags, *here], steps[-2], kill)
    assert code == -signal.SIGKILL
    code, after, _, _ = forked(train.main, [*flags, *here, "--resume"])
    assert code == 0
    assert after.count("after-step") == 2  # the one that was killed before it was kept, and the last
    assert_same(tmp_path / "outkilled", result(tmp_path / "out"))


@pytest.mark.parametrize("vectors", ["win_rate", "file"])
def test_killed_in_the_first_epoch_a_run_keeps_what_its_capability_vectors_learned(small, forked, tmp_path, vectors):
    flags, width = list(small), small.index("--capability_dim")
    table = pd.DataFrame({"model": [f"demo-model-{letter}" for letter in "abcdefghijkl"], "x": range(12)})
    table.to_csv(tmp_path / "profiles.csv", index=False)
    flags[width : width + 2] = {
        "win_rate": ["--capability_init", "win_rate"],
        "file": ["--capability_file", str(tmp_path / "profiles.csv")],
    }[vectors]
    flags += ["--checkpoint_minutes", "0"]
    code, events, _, _ = forked(train.main, [*flags, *folders(tmp_path, "")])
    assert code == 0
    third = [i for i, event in enumerate(events) if event == "after-step"][2]
    assert forked(train.main, [*flags, *folders(tmp_path, "killed")], third, kill)[0] == -signal.SIGKILL
    assert forked(train.main, [*flags, *folders(tmp_path, "killed"), "--resume"])[0] == 0
    assert_same(tmp_path / "outkilled", result(tmp_path / "out"))


def test_a_run_begun_by_mistake_does_not_hide_what_can_be_resumed(small, forked, tmp_path):
    here = folders(tmp_path, "")
    _, events, _, _ = forked(train.main, [*small, *folders(tmp_path, "whole")])
    step = [i for i, event in enumerate(events) if event == "after-step"][-1]
    assert forked(train.main, [*small, *here], step, kill)[0] == -signal.SIGKILL

    def patch():
        query_representation.fit_centroids = lambda *_: os.kill(os.getpid(), signal.SIGINT)

    assert forked(train.main, [*small, *here, "--lr", "0.1"], patch=patch)[0] == 130
    code, _, printed, _ = forked(train.main, [*small, *here, "--resume"])
    assert code == 0
    assert "resume   after 1 epochs" in printed
    assert_same(tmp_path / "out", result(tmp_path / "outwhole"))


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(small, fails, tmp_path, monkeypatch):
    import loss

    bpr_loss, calls = loss.bpr_loss, []

    def breaks(*args, margin):
        calls.append(None)
        return bpr_loss(*args, margin) * (float("nan") if len(calls) == 4 else 1)

    flags = [*small, "--output_dir", str(tmp_path), "--checkpoint_minutes", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(loss, "bpr_loss", breaks)
        assert "the loss is nan at step 3" in fails(*flags)
    _, losses = torch.load(tmp_path / "last_checkpoint.pt", weights_only=True)["begun"]
    assert len(losses) == 3
    train.main([*flags, "--resume"])


def test_a_signal_is_forgotten_when_its_run_has_ended(small, forked, tmp_path):
    def patch():
        run, calls = train.run, []

        def twice(*args):
            calls.append(None)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            run(*args)

        train.run = twice

    def both(flags):
        with pytest.raises(SystemExit):
            run_command(lambda: train.main(flags))
        train.main(flags)

    assert forked(both, [*small, *folders(tmp_path, "")], patch=patch)[0] == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("where", ["before-pass", "before-clusters", "before-step"])
def test_a_signal_ends_the_step_and_says_how_to_go_on(small, forked, tmp_path, number, code, where):
    code_of_run, events, _, _ = forked(train.main, [*small, *folders(tmp_path, "")])
    moment = [i for i, event in enumerate(events) if event == where][-1]
    here = folders(tmp_path, "stopped")
    ended, before, _, errors = forked(train.main, [*small, *here], moment, lambda: os.kill(os.getpid(), number))
    assert (code_of_run, ended) == (0, code)
    epochs = 1 if where == "before-step" else 0
    assert errors == [f"interrupted after {epochs} of 2 epochs; the same command with --resume goes on from there"]
    history = json.loads((tmp_path / "outstopped" / "training_history.json").read_text())
    assert (history["status"], len(history["train_losses"])) == ("interrupted", epochs)
    assert before.count("before-step") == before.count("after-step")
    ended, after, printed, _ = forked(train.main, [*small, *here, "--resume"])
    assert ended == 0
    assert_same(tmp_path / "outstopped", result(tmp_path / "out"))
    assert before.count("after-step") + after.count("after-step") == events.count("after-step")
    done = before.count("after-step") - events.count("after-step") // 2
    told = f"after 1 epochs and {done} steps of the next" if epochs else "nothing to go on from"
    assert f"resume   {told}" in printed


def test_a_second_signal_stops_at_once_and_leaves_valid_files(small, forked, tmp_path):
    _, events, _, _ = forked(train.main, [*small, *folders(tmp_path, "")])
    moment = [i for i, event in enumerate(events) if event == "before-step"][-2]

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    here = folders(tmp_path, "stopped")
    code, before, _, errors = forked(train.main, [*small, *here], moment, twice)
    assert (code, len(errors)) == (130, 1)
    assert before.count("before-step") == before.count("after-step") + 1
    belong = json.loads((tmp_path / "outstopped" / "training_history.json").read_text())
    assert belong["status"] == "interrupted"
    assert forked(train.main, [*small, *here, "--resume"])[0] == 0
    assert_same(tmp_path / "outstopped", result(tmp_path / "out"))


def test_a_signal_before_anything_is_written_is_one_line(small, forked, tmp_path):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    def patch():
        train.runs.pick_device = interrupted

    code, _, _, errors = forked(train.main, [*small, *folders(tmp_path, "")], patch=patch)
    assert (code, errors) == (143, ["interrupted"])


def test_a_signal_that_is_ignored_stays_ignored(small, forked, tmp_path):
    _, events, _, _ = forked(train.main, [*small, *folders(tmp_path, "")])
    flags = [*small, *folders(tmp_path, "again")]
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731, as nohup does
    hang_up = lambda: os.kill(os.getpid(), signal.SIGHUP)  # noqa: E731
    assert forked(train.main, flags, len(events) // 2, hang_up, ignore)[0] == 0


@pytest.fixture
def done(small, tmp_path):
    """A finished run: its flags and its folder."""
    flags = [*small, "--output_dir", str(tmp_path / "out")]
    train.main(flags)
    return flags, tmp_path / "out"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--lr", "0.001"], ["--lr was 0.0001, is 0.001"]),
        (["--seed", "7"], ["--seed was 42, is 7", "--split_seed was 42, is 7"]),
        (["--no_model_id", "--ties", "half"], ["--no_model_id was False, is True", "--ties was drop, is half"]),
        (["--dtype", "bfloat16"], ["the encoder's dtype was float32, is bfloat16"]),
        (["--epochs", "1"], ["has 2 epochs behind it; --epochs 1 is too few"]),
    ],
)
def test_resuming_another_experiment_is_refused_and_touches_nothing(done, fails, changed, told):
    flags, output = done
    before = contents(output)
    message = fails(*flags, *changed, "--resume")
    assert all(part in message for part in told)
    assert contents(output) == before


def test_what_does_not_make_the_result_may_change(done, tmp_path):
    flags, output = done
    moved = tmp_path / "moved"
    output.rename(moved)
    fresh = ["--output_dir", str(moved), "--cache_dir", str(tmp_path / "cache"), "--checkpoint_minutes", "9"]
    data = tmp_path / "elsewhere.parquet"
    shutil.copy(flags[flags.index("--data_path") + 1], data)
    before = RankRouter.load(moved / "best_model.pt").state_dict()
    train.main([*flags, *fresh, "--data_path", str(data), "--baselines", "fast", "--resume"])
    history = json.loads((moved / "training_history.json").read_text())
    assert "bradley_terry" in history["baselines"]
    router = RankRouter.load(moved / "best_model.pt")
    assert router.facts["args"] == history["args"]
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


def test_more_epochs_go_on_as_if_there_had_been_so_many(done, small, tmp_path):
    flags, output = done
    train.main([*flags, "--epochs", "4", "--resume"])
    train.main([*small, "--output_dir", str(tmp_path / "long"), "--epochs", "4"])
    histories = [json.loads((folder / "training_history.json").read_text()) for folder in (output, tmp_path / "long")]
    for history in histories:
        del history["timing"], history["args"]["output_dir"]
    assert histories[0] == histories[1]
    assert len(histories[0]["train_losses"]) == 4


@pytest.mark.parametrize("kept", [True, False])
def test_a_finished_run_has_nothing_to_do(done, monkeypatch, capsys, kept):
    flags, output = done
    if not kept:
        (output / "last_checkpoint.pt").unlink()
    before = contents(output)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(train, "run", None)
        train.main([*flags, "--resume"])
    printed = capsys.readouterr().out
    assert not kept or "resume   after 2 epochs" in printed
    auc = json.loads(before["training_history.json"])["test_metrics"]["auc"]
    assert f"finished already, with a test AUC of {auc:.4f}" in printed
    assert contents(output) == before


def test_a_finished_run_of_other_data_is_none(done):
    flags, output = done
    (output / "last_checkpoint.pt").unlink()
    data = output.parent / "battles.parquet"
    pd.read_parquet(flags[1])[:-20].to_parquet(data)
    before = json.loads((output / "training_history.json").read_text())
    history = before | {"args": before["args"] | {"data_path": str(data)}}
    (output / "training_history.json").write_text(json.dumps(history))
    train.main([flags[0], str(data), *flags[2:], "--resume"])
    after = json.loads((output / "training_history.json").read_text())
    assert after["data"]["content_hash"] != before["data"]["content_hash"]


def test_a_history_that_lacks_its_data_is_no_finished_run(done):
    flags, output = done
    history = json.loads((output / "training_history.json").read_text())
    bare = {"status": "running", "args": history["args"]}
    (output / "training_history.json").write_text(json.dumps(bare))
    train.main([*flags, "--resume"])
    del history["timing"]
    found = json.loads((output / "training_history.json").read_text())
    del found["timing"]
    assert found == history


def test_without_anything_to_resume_a_run_begins(small, tmp_path, capsys):
    train.main([*small, "--output_dir", str(tmp_path), "--resume"])
    assert "resume   nothing to go on from" in capsys.readouterr().out
    assert json.loads((tmp_path / "training_history.json").read_text())["status"] == "finished"


def test_all_random_states_come_back(tmp_path):
    import random

    from support.resume import _random_states, _set_random_states

    states = _random_states()
    torch.save(states, tmp_path / "states.pt")
    drawn = [random.random(), np.random.random(), torch.rand(1).item()]
    _set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert [random.random(), np.random.random(), torch.rand(1).item()] == drawn


@pytest.mark.parametrize("changed", [[], ["--lr", "0.1"]])
def test_an_unfinished_run_that_is_not_resumed_is_kept_until_the_new_one_has_a_checkpoint(
    small, forked, tmp_path, changed
):
    here = folders(tmp_path, "")
    _, events, _, _ = forked(train.main, [*small, *folders(tmp_path, "whole")])
    step = [i for i, event in enumerate(events) if event == "after-step"][-1]
    assert forked(train.main, [*small, *here], step, kill)[0] == -signal.SIGKILL
    left = (tmp_path / "out" / "last_checkpoint.pt").read_bytes()

    def patch():
        query_representation.fit_centroids = lambda *_: kill()

    code, _, printed, _ = forked(train.main, [*small, *here, *changed], patch=patch)
    assert code == -signal.SIGKILL
    assert [line for line in printed if line.startswith("aside ")]
    assert not (tmp_path / "out" / "best_model.pt").exists()
    kept = tmp_path / "out" / ("last_checkpoint.earlier.pt" if changed else "last_checkpoint.pt")
    assert kept.read_bytes() == left
    code, _, printed, _ = forked(train.main, [*small, *here, *changed, "--resume"])
    assert code == 0
    told = "nothing to go on from" if changed else "after 1 epochs"
    assert f"resume   {told}" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("training_history.json", "best_model.pt", "last_checkpoint.pt"),
    }
    if not changed:
        assert_same(tmp_path / "out", result(tmp_path / "outwhole"))


@pytest.mark.parametrize("name", ["training_history.json", "best_model.pt", "last_checkpoint.pt"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path)])
def test_what_is_no_file_is_not_waited_for_nor_replaced(small, fails, tmp_path, name, make):
    make(tmp_path / name)
    for flags in ([], ["--resume"]):
        assert f"{tmp_path / name} is no file" in fails(*small, "--output_dir", str(tmp_path), *flags)
    assert os.listdir(tmp_path) == [name]


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


@pytest.mark.parametrize("lost", ["best_model.pt", "training_history.json", "damaged"])
def test_a_lost_best_checkpoint_comes_back(done, lost):
    flags, output = done
    expected = RankRouter.load(output / "best_model.pt").state_dict()
    if lost == "damaged":
        (output / "best_model.pt").write_bytes(b"x")
    else:
        (output / lost).unlink()
    train.main([*flags, "--resume"])
    found = RankRouter.load(output / "best_model.pt").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_other_embeddings_are_told(done, capsys, monkeypatch):
    flags, output = done
    (output / "training_history.json").unlink()
    embed = support.cached_encoder.Encoder.embed

    def elsewhere(encoder, queries):
        embeddings, encoded = embed(encoder, queries)
        return embeddings * (1 + 2**-22), encoded

    monkeypatch.setattr(support.cached_encoder.Encoder, "embed", elsewhere)
    train.main([*flags, "--resume"])
    assert "warning: the embeddings are not bit for bit" in capsys.readouterr().err


def test_two_runs_in_one_folder_are_refused_and_a_dead_one_holds_nothing(small, fails, forked, tmp_path, monkeypatch):
    here = folders(tmp_path, "")
    monkeypatch.setattr(files, "SECONDS_TO_DIE", 0)
    with locked(tmp_path, "--output_dir"):
        message = fails(*small, "--output_dir", str(tmp_path))
        assert f"{tmp_path} is in use by another run, process {os.getpid()} on " in message
    assert not (tmp_path / ".rankrouter.lock").exists()
    assert not (tmp_path / "training_history.json").exists()
    assert forked(train.main, [*small, *here], 9, kill)[0] == -signal.SIGKILL
    assert (tmp_path / "out" / ".rankrouter.lock").exists()
    assert forked(train.main, [*small, *here])[0] == 0
    assert not (tmp_path / "out" / ".rankrouter.lock").exists()
