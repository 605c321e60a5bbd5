"""Shared by the tests: a demo in a temporary folder, and commands run in this process or in forked ones."""

import functools
import itertools
import json
import os
import signal
import socket
import sys
import traceback
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import query_representation
import support.encoding.cache
import support.encoding.encoder as encoder_module
import train
from rankrouter import RankRouter
from support.data.battles import Battles, ScoreTable
from support.data.demo import demo_folder
from support.system.command_line import run_command
from support.training.checkpoint import Checkpoint

torch.set_num_threads(1)  # the tests' networks are tiny, and threads that wait for a busy core cost minutes
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same in the processes that tests start


def pytest_collection_modifyitems(items):
    """The mark of a test is the folder it lies in: `unit`, `e2e` or `faults`."""
    for item in items:
        item.add_marker(item.path.parent.name)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """No test reads or writes the user's own cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def denormals():
    """A run flushes denormal numbers to zero in its whole process; this is undone after each test."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="session")
def demo(demo_dir):
    """The folder of the demo: battles.parquet, truth.json, encoder/."""
    return demo_folder(str(demo_dir))


@pytest.fixture(scope="session")
def run_demo(demo_dir, demo, tmp_path_factory):
    """Train on the demo with some flags; returns the history and the output folder."""

    def run(*flags: str):
        output = tmp_path_factory.mktemp("outputs")
        same = ("--demo", "--demo_dir", str(demo_dir), "--dtype", "float32")  # the same on every machine
        train.main([*same, "--output_dir", str(output), *flags])
        return json.loads((output / "training_history.json").read_text()), output

    return run


@pytest.fixture(scope="session")
def default_run(run_demo):
    """`python train.py --demo`: for tests that look for the planted truth; `tiny_run` takes a tenth of the time."""
    return run_demo("--no_cache")


@pytest.fixture
def fails(capsys):
    """Run `train.py` with flags that must fail: exit code 2, one line on stderr; returns that line."""

    def run(*flags: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: train.main(list(flags)))
        lines = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


def every_step(set_attribute=setattr):
    """Let runs save their state after each step instead of each minute.

    For `patch=every_step` of a forked run, or `every_step(monkeypatch.setattr)` in this process and those it forks.
    """
    set_attribute(train, "Checkpoint", functools.partial(Checkpoint, interval=0.0))


def after_step(step, fit=None):
    """An event for `forked`: after a step (from 1) of the current or the given call of `train.fit` (from 0)."""

    def reached(events):
        if events[-1] != "after-step" or fit not in (None, events.count("before-fit") - 1):
            return False
        return events[::-1][: events[::-1].index("before-fit")].count("after-step") == step

    return reached


def kill():
    """End this process at once, as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Forked:
    """Runs a command in a forked process, and calls a function there at an event, so that no test needs a clock.

    Events are calls of `train.fit`, steps of the optimizer, passes of the encoder, K-means, and each call that syncs,
    replaces or deletes a file, before and after it. `act` is called in the child at the event number `when` (from 0),
    or where `when` returns true for the names of the events so far.
    """

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def __call__(self, command, flags, when=None, act=None, patch=None):
        """Returns the exit code (negative: of a signal), the events' names, and the lines on stdout and stderr."""
        return self._wait(self._start(command, flags, when, act, patch, {}))

    def together(self, command, flags, count, acts=None, patch=None):
        """The same for several processes of one run, as `torchrun` starts them; `acts` has (when, act) by rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        where |= {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(count)}
        started = [
            self._start(command, flags, *(acts or {}).get(rank, (None, None)), patch, where | {"RANK": str(rank)})
            for rank in range(count)
        ]
        return [self._wait(one) for one in started]

    def _start(self, command, flags, when, act, patch, environment):
        self.count += 1
        files = [self.folder / f"{self.count}.{name}" for name in ("out", "err", "events")]
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._child(command, flags, when, act, patch, environment, files)
        return pid, files

    def _wait(self, started):
        pid, (out, err, seen) = started
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code, seen.read_text().split(), out.read_text().splitlines(), err.read_text().splitlines()

    def _child(self, command, flags, when, act, patch, environment, files):
        code = 99
        try:
            os.environ.update(environment)
            for descriptor, path in zip((1, 2), files, strict=False):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), descriptor)
            sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else it warns of the fork
            log, events = os.open(files[2], os.O_CREAT | os.O_WRONLY), []

            def event(name):
                os.write(log, f"{name}\n".encode())
                events.append(name)
                if when(events) if callable(when) else len(events) - 1 == when:
                    act()

            def watch(owner, name, called):
                real = getattr(owner, name)

                def watched(*args, **kwargs):
                    event(f"before-{called}")
                    result = real(*args, **kwargs)
                    event(f"after-{called}")
                    return result

                setattr(owner, name, watched)

            watch(train, "fit", "fit")
            watch(torch.optim.AdamW, "step", "step")
            watch(encoder_module, "hidden_states", "pass")
            watch(query_representation, "fit_centroids", "clusters")
            for name in ("fsync", "replace", "unlink"):
                watch(os, name, name)
            support.encoding.cache.SECONDS_PER_SHARD = 0  # a shard per batch
            if patch:
                patch()
            run_command(lambda: command(flags))
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


@pytest.fixture(scope="session")
def small(demo, tmp_path_factory):
    """Flags of a run that takes a second, on the first battles of the demo.

    Its embeddings have a cache of their own, so that no bit of a result depends on what other tests have encoded.
    """
    folder = tmp_path_factory.mktemp("small")
    pd.read_parquet(demo / "battles.parquet")[:320].to_parquet(folder / "battles.parquet")
    tiny = "--epochs 2 --num_clusters 3 --embedding_dim 8 --capability_dim 4 --batch_size 40 --encode_tokens 512"
    paths = ["--data_path", str(folder / "battles.parquet"), "--model_path", str(demo / "encoder")]
    return [*paths, "--dtype", "float32", *tiny.split(), "--baselines", "none", "--cache_dir", str(folder / "cache")]


@pytest.fixture(scope="session")
def small_table(small, tmp_path_factory):
    """The flags `small` on a score table instead: 241 rows in which the kind of query decides which model is best.

    Scores lie in [0, 1], in steps of 0.1, so that some tie; some are missing.
    """
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("small_table")
    kind = rng.integers(3, size=241)
    quality = np.array([[0.7, 0.4, 0.2, 0.1], [0.2, 0.6, 0.3, 0.2], [0.2, 0.3, 0.7, 0.2]])[kind]
    scores = (quality + rng.normal(0, 0.1, quality.shape)).clip(0, 1).round(1)
    table = pd.DataFrame(scores, columns=[f"demo-model-{letter}" for letter in "abcd"])
    table.insert(0, "prompt", [f"{['solve', 'write', 'sing'][k]} number {i}" for i, k in enumerate(kind)])
    table.loc[::7, "demo-model-c"] = np.nan
    table.to_parquet(folder / "scores.parquet")
    more = ["--cache_dir", str(folder / "cache"), "--batch_size", "20"]
    return ["--data_path", str(folder / "scores.parquet"), *small[2:], *more]


@pytest.fixture(scope="session")
def tiny_run(small, tmp_path_factory):
    """History and folder of a finished run of the flags `small`, for tests that need a checkpoint and not a good one.

    All tests share it: copy what a test changes.
    """
    output = tmp_path_factory.mktemp("tiny")
    train.main([*small, "--output_dir", str(output)])
    return json.loads((output / "training_history.json").read_text()), output


@pytest.fixture
def forked(tiny_run, tmp_path_factory):  # the tiny run has imported what forked runs need
    return Forked(tmp_path_factory.mktemp("forked"))


def result(output):
    """What a run leaves, without times and folders: history, weights of the best checkpoint, and the last checkpoint.

    The last checkpoint holds more than the history: the state of the optimizer, and the curves of the ceiling.
    """
    history = json.loads((output / "training_history.json").read_text())
    last = torch.load(output / "last_checkpoint.pt", weights_only=True)
    best = [curves["best"] for curves in last["curves"].values() if curves["best"] is not None]
    for args in (history["args"], *(each["metadata"]["args"] for each in best)):
        args.pop("output_dir", None), args.pop("cache_dir", None)  # some of these are one object
    for timed in (history.pop("timing"), *(curves.pop("seconds") for curves in last["curves"].values())):
        assert all(seconds >= 0 for seconds in timed.values())
    del last["training"]["random"]["python"], last["training"]["random"]["numpy"]  # those of the tests, in a fork
    router = RankRouter.load(output / "best_model.pt")
    encoder = {} if router.metadata.trained is None else router.metadata.trained["weights"]
    return history, router.state_dict() | encoder, last


def same(one, other):
    """Whether nested tensors and Python values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same(output, expected):
    """A run's folder holds a finished run that ended exactly as the `result` of another."""
    history, weights, last = result(output)
    assert history == expected[0]
    assert history["status"] == "finished"
    assert same(weights, expected[1])
    for name, value in expected[2].items():
        assert same(last[name], value), name


def mixed_battles(rows=40, models=7, single=30, queries=15, ties=True, seed=0):
    """Random single battles, and a score table with missing scores and ties, whose rows all hold a decisive pair."""
    rng, names = np.random.default_rng(seed), [f"m{i}" for i in range(models)]
    scores = rng.integers(4, size=(rows, models)) / 3
    scores[rng.random(scores.shape) < 0.25] = np.nan
    scores[:, :2] = rng.permuted(np.tile([0.2, 0.8], (rows, 1)), axis=1)
    query, of_row, a = (
        rng.integers(most, size=size) for most, size in ((queries, single), (queries, rows), (models, single))
    )
    b = (a + rng.integers(1, models, size=single)) % models
    outcome = (rng.integers(3, size=single) / 2 if ties else rng.integers(2, size=single)).astype(np.float32)
    return Battles(
        [f"q{i}" for i in range(queries)], names, query, a, b, outcome, ScoreTable(of_row, scores), ties=ties
    )


def written_out(battles):
    """The same battles, all as single ones, by a naive loop over the pairs of each row of the table."""
    found = list(zip(battles.query_idx, battles.model_a_idx, battles.model_b_idx, battles.outcome, strict=True))
    for query, scores in zip(battles.table.query_idx, battles.table.scores, strict=True):
        for a, b in itertools.combinations(np.flatnonzero(~np.isnan(scores)), 2):
            if battles.ties or scores[a] != scores[b]:
                found.append((query, a, b, 0.5 if scores[a] == scores[b] else float(scores[a] > scores[b])))
    query, a, b, outcome = map(np.array, zip(*found, strict=True))
    columns = {"query_idx": query, "model_a_idx": a, "model_b_idx": b, "outcome": outcome.astype(np.float32)}
    return replace(battles, table=None, **columns)
