"""What keeps a run alive and what it records of itself, and the device it takes."""

import ctypes
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from support import processes
from support.files import UserError, atomic_write, reason
from support.history import NO_HISTORY, parse

OUTPUTS = (
    *("training_history.json", "best_model.pt", "last_checkpoint.pt", "last_checkpoint.towers.pt"),
    *("last_checkpoint.ceiling.pt", "last_checkpoint.ceiling.towers.pt"),
)


def write_history(output_dir: str, history: dict) -> None:
    """Replace `training_history.json` in the output folder, so that a running or killed run can be read.

    Of several processes, only that of rank 0 does.
    """
    if processes.rank():
        return
    atomic_write(Path(output_dir) / "training_history.json", json.dumps(history, indent=1, allow_nan=False).encode())


def check_outputs(output_dir: str) -> None:
    """Raise `UserError` where one of a run's files cannot be one: a folder or a pipe stands there, say."""
    for name in OUTPUTS:
        path = Path(output_dir) / name
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"{path} is no file; move it away, or choose another --output_dir")


def read_history(output_dir: str) -> dict:
    """The history in the output folder; empty where there is none, or none that can be relied on."""
    try:
        history = json.loads((Path(output_dir) / "training_history.json").read_bytes())
        if history["status"] == "finished":
            parse(output_dir, history)
    except (OSError, *NO_HISTORY):
        return {}
    return history


def set_aside(path: Path) -> None:
    """Take an earlier run's file, `name.pt`, out of the way of a new one, as `name.earlier.pt`."""
    try:
        if path.is_file():
            path.replace(path.with_suffix(".earlier.pt"))
    except OSError as error:
        raise UserError(f"cannot rename {path}: {error.strerror or error}; choose another --output_dir") from error


def tune_cpu() -> None:
    """Two settings of this process without which a CPU wastes much of its time; before torch starts its threads.

    Denormals are zero: the optimiser's moments of units that died decay into denormal numbers, which a CPU computes so
    slowly that steps come to take twice as long. And glibc keeps memory for the next operation: blocks of megabytes,
    such as hidden states and gradients, are otherwise mapped anew and zeroed page by page each time.
    """
    import torch

    torch.set_flush_denormal(True)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at the highest that glibc takes
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def make_deterministic() -> None:
    """Let torch take only algorithms that give the same bits each time, on a GPU too; before that is first used.

    Raises torch's `RuntimeError` in an operation for which there is none.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)


@contextmanager
def timed(timing: dict, name: str) -> Iterator[Callable[..., None]]:
    """Add the seconds that the block takes to `timing[name]`; what it gives adds those so far, there or to another."""
    since = time.perf_counter()

    def lap(to: str = name) -> None:
        nonlocal since
        now = time.perf_counter()
        timing[to], since = timing.get(to, 0.0) + now - since, now

    try:
        yield lap
    finally:
        lap()


def pick_device(name: str):
    """The torch device that `--device` names."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if processes.size() > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name!r} is none of ours; expected auto, cpu, cuda, cuda:N or mps")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({reason(error)}); try auto or cpu") from error
    return device


def environment(device, dtype: str) -> dict:
    """What the numbers of a run may depend on."""
    import torch

    packages = ("torch", "transformers", "tokenizers", "scikit-learn", "scipy", "pandas", "pyarrow", "numpy")
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "processes": processes.size(),
        "commit": commit,
    }
