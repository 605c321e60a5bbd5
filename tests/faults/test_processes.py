"""Several processes of one run give the result of one: encoding, training, evaluation, interruption."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import after_step, assert_same, every_step, kill, result

import train
from support.system import distributed

ROOT = Path(__file__).parent.parent.parent
PLAIN = ["--dropout", "0", "--id_dropout", "0", "--batch_size", "4"]
FINETUNED = ["--finetune_encoder", "--batch_tokens", "300", "--tower_epochs", "1", "--eval_every", "2"]


def history_of(output):
    return json.loads((output / "training_history.json").read_text())


def run(forked, flags, output, count, *more, acts=None, patch=None):
    flags = [*flags, "--output_dir", str(output), "--cache_dir", str(output / "cache"), *more]
    if count == 1:
        return [forked(train.main, flags, patch=patch)]
    return forked.together(train.main, flags, count, acts, patch)


def assert_finished(runs):
    assert [code for code, *_ in runs] == [0] * len(runs), "\n".join(line for *_, err in runs for line in err)
    assert not any(err for *_, err in runs)


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    """The folder of a run with one process and without dropout; `losses.json` has the loss of each step."""
    output = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        record_losses(output, patch.setattr)
        train.main([*small, *PLAIN, "--output_dir", str(output), "--cache_dir", str(output / "cache")])
    return output


def record_losses(output, set_attribute=setattr):
    """Let rank 0 write the loss of each step to `losses.json`."""
    record, losses = train.TrainingState.record, []

    def recorded(state, loss):
        record(state, loss)
        losses.append(loss.item())
        if distributed.rank() == 0:
            (output / "losses.json").write_text(json.dumps(losses))

    set_attribute(train.TrainingState, "record", recorded)


def test_processes_give_the_losses_and_metrics_of_one_and_rank_0_alone_writes_and_prints(
    small, alone, forked, tmp_path
):
    runs = run(forked, [*small, *PLAIN], tmp_path, 3, "--no_cache", patch=lambda: record_losses(tmp_path))
    assert_finished(runs)
    expected, found = (json.loads((output / "losses.json").read_text()) for output in (alone, tmp_path))
    assert len(expected) == 2 * 59
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    (one, weights, _), (several, others, _) = result(alone), result(tmp_path)
    assert several["environment"].pop("processes") == 3
    assert one["environment"].pop("processes") == 1
    for name in ("data", "best_epoch", "status"):
        assert several[name] == one[name]
    for name in ("accuracy", "auc", "log_loss"):
        assert several["test_metrics"][name] == pytest.approx(one["test_metrics"][name], abs=1e-6)
    for name, tensor in weights.items():  # an Adam step is as large as the learning rate, however small a gradient
        torch.testing.assert_close(others[name], tensor, atol=1e-3, rtol=0)
    for rank, (_, events, printed, _) in enumerate(runs):
        assert (events.count("after-replace") > 4) == (rank == 0)
        assert rank == 0 or events.count("after-replace") == events.count("after-unlink") == 0
        assert printed[-1].startswith("saved ") if rank == 0 else printed == []


def test_rows_of_a_score_table_also_fewer_than_processes_lose_no_battle(small_table, forked, tmp_path):
    for count in (1, 2):
        output, flags = tmp_path / str(count), [*small_table, *PLAIN, "--batch_size", "8", "--epochs", "1"]
        assert_finished(run(forked, flags, output, count, patch=lambda output=output: record_losses(output)))
    one, two = (history_of(tmp_path / name) for name in "12")
    losses = [json.loads((tmp_path / name / "losses.json").read_text()) for name in "12"]
    assert (len(losses[0]), one["data"]["table_rows"]["train"] % 8) == (25, 1)  # the last step has one row
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert two["val_metrics"][0]["auc"] == pytest.approx(one["val_metrics"][0]["auc"], abs=1e-6)


def test_a_finetuned_encoder_and_the_clusters_that_follow_it_are_those_of_one_process(small, forked, tmp_path):
    for count in (1, 2):
        flags = [*small, *PLAIN, *FINETUNED, "--epochs", "1"]
        assert_finished(run(forked, flags, tmp_path / str(count), count))
    (one, weights, _), (two, others, _) = result(tmp_path / "1"), result(tmp_path / "2")
    assert two["train_losses"] == pytest.approx(one["train_losses"], rel=1e-5)
    torch.testing.assert_close(others["query_tower.centroids"], weights["query_tower.centroids"], atol=1e-3, rtol=0)


def test_each_process_encodes_a_share_and_all_get_everything(small, alone, forked, tmp_path):
    runs = run(forked, [*small, *PLAIN], tmp_path, 2)
    assert_finished(runs)
    passes = [events.count("after-pass") for _, events, _, _ in runs]
    whole = history_of(alone)["timing"]["queries_encoded"]
    assert min(passes) > 0
    assert max(passes) - min(passes) <= 1
    assert history_of(tmp_path)["timing"]["queries_encoded"] == whole
    assert history_of(tmp_path)["data"]["embeddings_hash"] == history_of(alone)["data"]["embeddings_hash"]
    again = run(forked, [*small, *PLAIN], tmp_path, 2)
    assert_finished(again)
    assert [events.count("after-pass") for _, events, _, _ in again] == [0, 0]
    assert history_of(tmp_path)["timing"]["queries_from_cache"] == whole


def test_machines_without_a_common_cache_give_the_same(small, alone, forked, tmp_path):
    def apart():
        os.environ["XDG_CACHE_HOME"] = str(tmp_path / f"machine {os.environ['RANK']}")

    assert small[-2] == "--cache_dir"
    flags = [*small[:-2], *PLAIN, "--output_dir", str(tmp_path / "out"), "--cache_layers", "1,2"]
    assert_finished(forked.together(train.main, flags, 2, patch=apart))
    assert all((tmp_path / f"machine {rank}" / "rankrouter/embeddings").is_dir() for rank in range(2))
    assert history_of(tmp_path / "out")["data"]["embeddings_hash"] == history_of(alone)["data"]["embeddings_hash"]
    # The cache of the first process now has the other's part, too, of all candidate layers.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine 0"))
        for layers in (["--layers", "1", "--pooling", "mean+last"], ["--layers", "2", "--pooling", "last"], []):
            train.main([*flags, *layers])
            assert history_of(tmp_path / "out")["timing"]["queries_encoded"] == 0, layers


def test_a_process_that_dies_ends_the_run_with_a_line_and_it_continues_to_the_same_bits(
    small, forked, tmp_path, monkeypatch
):
    every_step(monkeypatch.setattr)
    flags = [*small, *FINETUNED]
    assert_finished(run(forked, flags, tmp_path / "whole", 2))
    kills = {"towers: after 0 epochs and 2 steps of the next": 3, "after 1 epochs and 3 steps of the next": 10}
    for phase, step in enumerate(kills.values()):
        victim, survivor = phase % 2, 1 - phase % 2
        runs = run(forked, flags, tmp_path / "died", 2, "--resume", acts={victim: (after_step(step, phase), kill)})
        assert runs[victim][0] == -signal.SIGKILL
        code, _, _, errors = runs[survivor]
        assert (code, len(errors)) == (2, 1)
        assert errors[0].startswith(f"process {survivor} of 2: error: lost another process of this run")
        assert "--resume" in errors[0]
        assert f"resume   {['nothing to resume', *kills][phase]}" in runs[0][2]
    runs = run(forked, flags, tmp_path / "died", 2, "--resume")
    assert_finished(runs)
    assert f"resume   {list(kills)[-1]}" in runs[0][2]
    assert_same(tmp_path / "died", result(tmp_path / "whole"))


def test_a_run_continues_with_fewer_and_with_more_processes(small, alone, forked, tmp_path):
    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    runs = run(forked, [*small, *PLAIN], tmp_path / "1", 2, acts={1: (after_step(20), stop)})
    assert {code for code, *_ in runs} == {128 + signal.SIGTERM}
    assert "interrupted after 0 of 2 epochs; the same command with --resume continues it" in runs[0][3][0]
    assert history_of(tmp_path / "1")["status"] == "interrupted"
    shutil.copytree(tmp_path / "1", tmp_path / "3")
    expected = history_of(alone)
    for count in (1, 3):
        runs = run(forked, [*small, *PLAIN], tmp_path / str(count), count, "--resume")
        assert_finished(runs)
        assert "resume   after 0 epochs and 20 steps of the next" in runs[0][2]
        found = history_of(tmp_path / str(count))
        assert found["train_losses"] == pytest.approx(expected["train_losses"], rel=1e-5)
        assert found["test_metrics"]["auc"] == pytest.approx(expected["test_metrics"]["auc"], abs=1e-6)


def test_a_wrong_flag_under_torchrun_is_one_line_of_each_process(small, forked, tmp_path):
    runs = run(forked, [*small, "--num_clusters", "100000"], tmp_path, 2)
    assert {code for code, *_ in runs} == {2}
    assert all("--num_clusters 100000 is more than" in "".join(err) and len(err) == 1 for _, _, _, err in runs)


def test_shares_of_the_work_are_complete_and_of_similar_cost(monkeypatch):
    costs = np.random.default_rng(0).integers(1, 500, 101)
    monkeypatch.setattr(distributed, "size", lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.assign(costs))
    assert sorted(np.concatenate(shares)) == list(range(101))
    sums = [costs[share].sum() for share in shares]
    assert max(sums) - min(sums) <= 20
    assert distributed.assign(costs[:0]).tolist() == []


def test_torchrun_itself_starts_it_and_the_connection_ends_with_it(small, alone, tmp_path):
    script = tmp_path / "then.py"
    script.write_text(
        "import os, pathlib, runpy\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
        "names = [path.read_text().strip() for path in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        f"pathlib.Path({str(tmp_path)!r}, 'threads' + os.environ['RANK']).write_text(' '.join(names))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    flags = [*small, *PLAIN, "--output_dir", str(tmp_path), "--epochs", "1", "--cache_dir", str(alone / "cache")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("saved ") == 1
    for rank in "01":
        names = (tmp_path / f"threads{rank}").read_text()
        assert "python" in names
        assert "gloo" not in names
    assert history_of(tmp_path)["train_losses"] == pytest.approx(history_of(alone)["train_losses"][:1], rel=1e-5)
