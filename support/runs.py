"""What a run records of itself, and where it computes."""

import json
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from support.files import UserError, atomic_write


def write_history(output_dir: str, history: dict) -> None:
    """Replace `training_history.json` in the output folder, so that a running or killed run can be read."""
    atomic_write(Path(output_dir) / "training_history.json", json.dumps(history, indent=1, allow_nan=False).encode())


@contextmanager
def timed(timing: dict, name: str) -> Iterator[None]:
    """Add the seconds that the block takes to `timing[name]`."""
    start = time.perf_counter()
    yield
    timing[name] = timing.get(name, 0.0) + time.perf_counter() - start


def pick_device(name: str):
    """The torch device that `--device` names."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); try auto or cpu") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is not supported; expected auto, cpu, cuda, cuda:N or mps")
    return device


def environment(device, dtype: str) -> dict:
    """What the numbers of a run may depend on."""
    import torch

    packages = ("torch", "transformers", "scikit-learn", "pandas", "pyarrow", "numpy")
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
        "commit": commit,
    }
