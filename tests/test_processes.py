"""Several processes of one run give what one gives: encoding, training, evaluation, interruption."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same, result

import train
from support import processes

ROOT = Path(__file__).parent.parent
PLAIN = ["--dropout", "0", "--id_dropout", "0", "--batch_size", "4"]
FINETUNED = ["--finetune_encoder", "--batch_tokens", "300", "--tower_epochs", "0"]


def history_of(output):
    return json.loads((output / "training_history.json").read_text())


def run(forked, flags, output, count, *more, acts=None):
    flags = [*flags, "--output_dir", str(output), "--cache_dir", str(output / "cache"), *more]
    return forked.together(train.main, flags, count, acts) if count > 1 else [forked(train.main, flags)]


def ended(runs):
    assert [code for code, *_ in runs] == [0] * len(runs), "\n".join(line for *_, err in runs for line in err)
    assert not any(err for *_, err in runs)


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    """The history of one process, without dropout, of whose steps each loss is kept."""
    output = tmp_path_factory.mktemp("alone")
    with steps_kept(output / "losses.json"):
        train.main([*small, *PLAIN, "--output_dir", str(output), "--no_cache"])
    return output


class steps_kept:
    """Within the block, or in a forked child, write the loss of every step that an epoch took."""

    def __init__(self, path):
        self.path, self.real, self.losses = path, train.mean_loss, []

    def __enter__(self):
        def watched(epoch, batches):
            self.losses.append((epoch.losses / 4).tolist())
            if processes.rank() == 0:
                self.path.write_text(json.dumps(self.losses))
            return self.real(epoch, batches)

        train.mean_loss = watched

    def __exit__(self, *_):
        train.mean_loss = self.real


@pytest.mark.parametrize("count", [2, 3])
def test_processes_give_the_losses_and_metrics_of_one(small, alone, forked, tmp_path, count):
    with steps_kept(tmp_path / "losses.json"):
        ended(run(forked, [*small, *PLAIN], tmp_path, count))
    expected, found = (json.loads((output / "losses.json").read_text()) for output in (alone, tmp_path))
    assert np.shape(expected) == (2, 59)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    (one, weights), (several, others) = result(alone), result(tmp_path)
    assert several["environment"].pop("processes") == count
    assert one["environment"].pop("processes") == 1
    for name in ("data", "best_epoch", "status"):
        assert several[name] == one[name]
    for name in ("accuracy", "auc", "log_loss"):
        assert several["test_metrics"][name] == pytest.approx(one["test_metrics"][name], abs=1e-6)
    for name, tensor in weights.items():  # an Adam step is as large as the learning rate, however small a gradient
        torch.testing.assert_close(others[name], tensor, atol=1e-3, rtol=0)


def test_a_batch_smaller_than_the_number_of_processes_loses_no_battle(small, forked, tmp_path):
    for count in (1, 3):
        ended(run(forked, [*small, *PLAIN, "--batch_size", "47", "--epochs", "1"], tmp_path / str(count), count))
    one, three = (history_of(tmp_path / name) for name in "13")
    assert one["data"]["split"]["train"]["battles"] % 47 == 1  # the last step has one battle, for three processes
    assert three["train_losses"] == pytest.approx(one["train_losses"], rel=1e-5)
    assert three["val_metrics"][0]["auc"] == pytest.approx(one["val_metrics"][0]["auc"], abs=1e-6)


def test_each_process_encodes_a_share_and_all_get_everything(small, alone, forked, tmp_path):
    runs = run(forked, [*small, *PLAIN], tmp_path, 2)
    ended(runs)
    passes = [events.count("after-pass") for _, events, _, _ in runs]
    whole = history_of(alone)["timing"]["queries_encoded"]
    assert min(passes) > 0
    assert max(passes) - min(passes) <= 1
    assert history_of(tmp_path)["timing"]["queries_encoded"] == whole
    assert history_of(tmp_path)["data"]["embeddings_hash"] == history_of(alone)["data"]["embeddings_hash"]
    again = run(forked, [*small, *PLAIN], tmp_path, 2)
    ended(again)
    assert [events.count("after-pass") for _, events, _, _ in again] == [0, 0]
    assert history_of(tmp_path)["timing"]["queries_from_cache"] == whole


def test_machines_without_a_common_cache_give_the_same(small, alone, forked, tmp_path):
    def apart():
        os.environ["XDG_CACHE_HOME"] = str(tmp_path / f"machine {processes.rank()}")

    flags = [*small, *PLAIN, "--output_dir", str(tmp_path / "out")]
    ended(forked.together(train.main, flags, 2, patch=apart))
    assert history_of(tmp_path / "out")["data"]["embeddings_hash"] == history_of(alone)["data"]["embeddings_hash"]
    # That of the first process has all of it now, its own part and the other's.
    apart()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine 0"))
        train.main(flags)
    assert history_of(tmp_path / "out")["timing"]["queries_encoded"] == 0


def test_one_process_writes_and_prints(small, forked, tmp_path):
    (_, first, out, _), (_, second, silent, _) = run(forked, [*small, *PLAIN], tmp_path, 2, "--no_cache")
    assert first.count("after-replace") > 4
    assert second.count("after-replace") == second.count("after-unlink") == 0
    assert out[-1].startswith("saved ")
    assert silent == []


@pytest.mark.parametrize(
    "finetuned",
    [[], ["--finetune_encoder", "--batch_tokens", "300", "--tower_epochs", "0"]],
    ids=["frozen", "finetuned"],
)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run_with_a_line_and_the_rest_goes_on(small, forked, tmp_path, victim, finetuned):
    flags = [*small, *finetuned, "--checkpoint_minutes", "0"]
    whole = run(forked, flags, tmp_path / "whole", 2)
    ended(whole)
    expected = result(tmp_path / "whole")

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    # Some step: how many shards of the cache come before it depends on which process is faster.
    moment = [number for number, name in enumerate(whole[victim][1]) if name == "after-step"][3]
    runs = run(forked, flags, tmp_path / "died", 2, acts={victim: (moment, kill)})
    assert runs[victim][0] == -signal.SIGKILL
    code, _, _, err = runs[1 - victim]
    assert code == 2
    assert len(err) == 1
    assert err[0].startswith(f"process {1 - victim} of 2: error: ")
    assert "lost another process of this run" in err[0]
    assert "--resume" in err[0]
    runs = run(forked, flags, tmp_path / "died", 2, "--resume")
    ended(runs)
    told = " ".join(line for line in runs[0][2] if line.startswith("resume "))
    assert re.fullmatch(r"resume   after 0 epochs and [1-9] steps of the next", told)
    assert_same(tmp_path / "died", expected)


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_goes_on_with_another_number_of_processes(small, alone, forked, tmp_path, count):
    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    runs = run(forked, [*small, *PLAIN], tmp_path, 2, acts={1: (60, stop)})
    assert {code for code, *_ in runs} == {128 + signal.SIGTERM}
    assert "interrupted after 0 of 2 epochs; the same command with --resume goes on from there" in runs[0][3][0]
    assert history_of(tmp_path)["status"] == "interrupted"
    ended(run(forked, [*small, *PLAIN], tmp_path, count, "--resume"))
    found, expected = history_of(tmp_path), history_of(alone)
    assert found["train_losses"] == pytest.approx(expected["train_losses"], rel=1e-5)
    assert found["test_metrics"]["auc"] == pytest.approx(expected["test_metrics"]["auc"], abs=1e-6)


def test_a_wrong_flag_under_torchrun_is_said(small, forked, tmp_path):
    runs = run(forked, [*small, "--num_clusters", "100000"], tmp_path, 2)
    assert {code for code, *_ in runs} == {2}
    assert all("--num_clusters 100000 is more than" in err[0] for _, _, _, err in runs)


def test_shares_are_whole_and_near_each_other(monkeypatch):
    costs = np.random.default_rng(0).integers(1, 500, 101)
    monkeypatch.setattr(processes, "size", lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(processes.share(costs))
    assert sorted(np.concatenate(shares)) == list(range(101))
    sums = [costs[share].sum() for share in shares]
    assert max(sums) - min(sums) <= 20
    assert processes.share(costs[:0]).tolist() == []


@pytest.mark.slow
def test_torchrun_itself_starts_it(small, alone, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    flags = [*small, *PLAIN, "--output_dir", str(tmp_path), "--no_cache"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("saved ") == 1
    assert history_of(tmp_path)["train_losses"] == pytest.approx(history_of(alone)["train_losses"], rel=1e-5)
