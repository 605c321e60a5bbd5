"""The device of a run, its settings and environment, and the seconds that its parts take."""

import ctypes
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from support.system import distributed
from support.system.errors import UserError, reason


def tune_cpu() -> None:
    """Two settings of this process that save a CPU much time; to be made before torch starts its threads.

    Denormals are flushed to zero: Adam's moments of dead units decay into denormal numbers, which double the time of
    late steps. And glibc keeps freed memory for the next operation: large blocks, such as hidden states and gradients,
    are otherwise mapped and zeroed page by page each time.
    """
    torch.set_flush_denormal(True)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, the highest that glibc accepts
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def tower_threads(requested: int | None) -> int:
    """The threads that train towers on frozen embeddings: `requested`, or what OMP_NUM_THREADS says, or one.

    Their matrix products are so small that more threads gain little, and cost a multiple where other runs use the same
    cores, since threads wait for each other after each product.
    """
    is_set = re.match(r"[1-9]", os.environ.get("OMP_NUM_THREADS", ""))
    return requested or (torch.get_num_threads() if is_set else 1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block torch and numpy compute with this many threads."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic(is_enabled: bool) -> Iterator[None]:
    """Within the block, use only algorithms that give the same bits each time, on a GPU too, before it is first used.

    Raises `UserError` in an operation that has no such algorithm.
    """
    if not is_enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UserError(f"--deterministic is not possible: {reason(error)}; leave it out") from error
    finally:
        torch.use_deterministic_algorithms(False)


class Timing:
    """Seconds by name. A block inside another block counts for its own name only."""

    def __init__(self):
        self.seconds, self._names, self._since = {}, [], 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to `name`."""
        self.update()
        self._names.append(name)
        try:
            yield
        finally:
            self.update()
            self._names.pop()

    def update(self) -> dict[str, float]:
        """The seconds by name, those of a block that has not ended yet included."""
        now = time.perf_counter()
        if self._names:
            self.seconds[self._names[-1]] = self.seconds.get(self._names[-1], 0.0) + now - self._since
        self._since = now
        return self.seconds


def pick_device(name: str) -> torch.device:
    """The torch device that `--device` names."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if distributed.size() > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({reason(error)}); try auto or cpu") from error
    return device


def environment(device: torch.device, dtype: str) -> dict:
    """What the numbers of a run may depend on: versions, device, dtype, threads, processes, commit."""
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
        "processes": distributed.size(),
        "commit": commit,
    }
