"""What the tests share: a demo in a temporary folder, and commands run in this process."""

import json
import os
import socket
import sys
import traceback

import pandas as pd
import pytest
import torch

import query_representation
import support.embedding_cache
import train
from rankrouter import RankRouter
from support.command_line import run_command
from support.demo import demo_folder

torch.set_num_threads(1)  # the tests' networks are tiny, and threads that wait for a busy core cost minutes


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """No test reads or writes the user's own cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def denormals():
    """A run flushes denormal numbers to zero for its whole process; the next test has them again."""
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
        same = ("--demo", "--demo_dir", str(demo_dir), "--dtype", "float32")  # on every machine
        train.main([*same, "--output_dir", str(output), *flags])
        return json.loads((output / "training_history.json").read_text()), output

    return run


@pytest.fixture(scope="session")
def default_run(run_demo):
    """`python train.py --demo`, once for all tests that look at it; not mixed with what other runs have cached."""
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


class Killed:
    """A command run in a forked process that is stopped at a moment counted in events, not in seconds.

    Events are steps of the optimiser, passes of the encoder, K-means, and each call that makes, replaces or deletes a
    file, before and after it. `act` is called in the child at event number `moment` (from 0).
    """

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def __call__(self, command, flags, moment=None, act=None, patch=None):
        """Returns the exit code (minus a signal's number), the events' names, and the lines on stdout and stderr."""
        return self._wait(self._start(command, flags, moment, act, patch, {}))

    def together(self, command, flags, count, acts=None, patch=None):
        """The same of several processes of one run, as `torchrun` starts them; `acts` are moment and act by rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        where |= {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(count)}
        started = [
            self._start(command, flags, *(acts or {}).get(rank, (None, None)), patch, where | {"RANK": str(rank)})
            for rank in range(count)
        ]
        return [self._wait(one) for one in started]

    def _start(self, command, flags, moment, act, patch, environment):
        self.count += 1
        files = [self.folder / f"{self.count}.{name}" for name in ("out", "err", "events")]
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._child(command, flags, moment, act, patch, environment, files)
        return pid, files

    def _wait(self, started):
        pid, (out, err, seen) = started
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code, seen.read_text().split(), out.read_text().splitlines(), err.read_text().splitlines()

    def _child(self, command, flags, moment, act, patch, environment, files):
        code = 99
        try:
            os.environ.update(environment)
            for descriptor, path in zip((1, 2), files, strict=False):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), descriptor)
            sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else it warns of the fork
            events, number = os.open(files[2], os.O_CREAT | os.O_WRONLY), 0

            def event(name):
                nonlocal number
                os.write(events, f"{name}\n".encode())
                number += 1
                if number - 1 == moment:
                    act()

            def watch(owner, name, called):
                real = getattr(owner, name)

                def watched(*args, **kwargs):
                    event(f"before-{called}")
                    result = real(*args, **kwargs)
                    event(f"after-{called}")
                    return result

                setattr(owner, name, watched)

            watch(torch.optim.AdamW, "step", "step")
            watch(query_representation, "hidden_states", "pass")
            watch(query_representation, "fit_centroids", "clusters")
            for name in ("fsync", "replace", "unlink"):
                watch(os, name, name)
            support.embedding_cache.SECONDS_PER_SHARD = 0  # a shard per batch
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


@pytest.fixture
def forked(tmp_path_factory):
    return Killed(tmp_path_factory.mktemp("forked"))


@pytest.fixture(scope="session")
def small(demo, tmp_path_factory):
    """Flags of a run of a second, on the first battles of the demo."""
    data = tmp_path_factory.mktemp("small") / "battles.parquet"
    pd.read_parquet(demo / "battles.parquet")[:320].to_parquet(data)
    tiny = "--epochs 2 --num_clusters 3 --embedding_dim 8 --capability_dim 4 --batch_size 40 --encode_tokens 512"
    flags = ["--data_path", str(data), "--model_path", str(demo / "encoder"), "--dtype", "float32", *tiny.split()]
    flags += ["--baselines", "none"]
    folder = str(tmp_path_factory.mktemp("warm"))
    train.main([*flags, "--output_dir", folder, "--cache_dir", folder])  # imports what the forked ones need
    return flags


def result(output):
    """The history but for its timing and place, and the tensors of the best checkpoint."""
    history = json.loads((output / "training_history.json").read_text())
    del history["timing"], history["args"]["output_dir"], history["args"]["cache_dir"]
    return history, RankRouter.load(output / "best_model.pt").state_dict()


def assert_same(output, expected):
    history, weights = result(output)
    assert history == expected[0]
    assert history["status"] == "finished"
    assert weights.keys() == expected[1].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected[1].items())
