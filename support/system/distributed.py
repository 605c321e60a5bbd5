"""The processes of a run that `torchrun` started: their ranks, sums, broadcasts and shares of the work."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

from support.system.errors import UserError, is_out_of_memory, reason

RANK0_TIMEOUT = timedelta(hours=3)  # for what one process does alone, such as K-means and baselines
BUCKET = 2**24  # numbers in one message at most

_initialized = False  # whether this process is within `init`


def _started() -> int:
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def size() -> int:
    """The number of processes of the run."""
    return _started() if _initialized else 1


def rank() -> int:
    """The rank of this process, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def name() -> str:
    """The prefix of an error message of one process of several."""
    return f"process {os.environ['RANK']} of {_started()}: " if _started() > 1 else ""


@contextmanager
def init() -> Iterator[None]:
    """Within the block, the processes of the run are connected; only rank 0 prints."""
    global _initialized
    if _started() == 1:
        yield
        return
    # torch.optim imports this module, and its functions' default arguments would keep the process group, unless there
    # is none yet: the connection would outlive the block, and a thread of it may abort a process that ends.
    import torch.distributed.nn.functional  # noqa: F401
    from torch import cuda, distributed

    with _connection():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda.is_available() else "gloo", timeout=RANK0_TIMEOUT)
    _initialized = True
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
            yield
    finally:
        _initialized = False
    distributed.destroy_process_group()  # not after an error: the others may be unreachable


@contextmanager
def _connection() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the common base of what torch raises here
        if is_out_of_memory(error):
            raise
        message = "lost another process of this run, which has ended or cannot be reached"
        raise UserError(f"{message} ({reason(error)}); start all of them again, with --resume to continue") from error


def all_reduce(tensors: list) -> None:
    """Replace each tensor by its sum over the processes; tensors of one device and dtype share messages."""
    if size() == 1:
        return
    import torch

    # In the same order in all processes.
    for kind in dict.fromkeys((tensor.device, tensor.dtype) for tensor in tensors):
        bucket, waiting = [], [tensor for tensor in tensors if (tensor.device, tensor.dtype) == kind]
        while waiting:
            bucket.append(waiting.pop(0))
            if waiting and sum(map(torch.numel, bucket)) + waiting[0].numel() <= BUCKET:
                continue
            message = torch.cat([tensor.reshape(-1) for tensor in bucket])  # (numbers,)
            with _connection():
                torch.distributed.all_reduce(message)
            for tensor, part in zip(bucket, message.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))
            bucket = []


def all_reduce_gradients(parameters: list, *others) -> None:
    """Replace the gradients of the parameters, and other tensors, by their sums over the processes."""
    if size() == 1:
        return
    for parameter in parameters:  # a process may have no part of a batch
        parameter.grad = parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad
    all_reduce([*(parameter.grad for parameter in parameters), *others])


def broadcast(tensors: list, source: int = 0) -> None:
    """Replace each tensor by that of rank `source`."""
    if size() == 1:
        return
    import torch.distributed as dist

    with _connection():
        for tensor in tensors:
            dist.broadcast(tensor, source)


def broadcast_bytes(content: bytes | None) -> bytes | None:
    """The bytes, or None, that rank 0 has."""
    if size() == 1:
        return content
    import torch

    length = torch.tensor(-1 if content is None else len(content))
    broadcast([length])
    if length < 0:
        return None
    message = torch.empty(int(length), dtype=torch.uint8)
    if rank() == 0 and content:
        message.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    broadcast([message])
    return message.numpy().tobytes()


def broadcast_from_rank0(value):
    """The value that rank 0 has: a number, a text, or anything else that JSON takes."""
    return value if size() == 1 else json.loads(broadcast_bytes(json.dumps(value).encode()))


def totals(*numbers: int) -> list[int]:
    """The sums of the processes' numbers."""
    if size() == 1:
        return [int(number) for number in numbers]
    import torch

    message = torch.tensor(numbers, dtype=torch.int64)  # (n,)
    all_reduce([message])
    return message.tolist()


def all_gather(rows) -> list:
    """The tensors (n, ...) of all processes, by rank; n may differ, and be 0."""
    parts = []
    for other in range(size()):
        (length,) = totals(len(rows) if other == rank() else 0)
        parts.append(rows if other == rank() else rows.new_empty(length, *rows.shape[1:]))
        broadcast([parts[-1]], other)
    return parts


def assign(costs):
    """The tasks of this process, given the costs (n,) of all: indices, ascending; the processes' sums are similar.

    Each task, the most expensive first, goes to the process with the least work.
    """
    import numpy as np

    load, owner = np.zeros(size()), np.empty(len(costs), np.int64)
    for task in np.argsort(-costs, kind="stable"):
        owner[task] = load.argmin()
        load[owner[task]] += costs[task]
    return np.flatnonzero(owner == rank())
