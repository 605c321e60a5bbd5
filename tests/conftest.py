"""What the tests share: a demo in a temporary folder, and commands run in this process."""

import json

import pytest
import torch

import train
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
