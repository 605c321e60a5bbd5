"""The processes of a run that `torchrun` started: who each is, what they add up, share out and tell each other."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from support.files import UserError, is_out_of_memory, reason

ALONE = timedelta(hours=3)  # that one process may take for what it does alone, such as K-means and baselines
BUCKET = 2**24  # numbers in one message at most


_joined = False  # whether this process is within `joined`


def _started() -> int:
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def size() -> int:
    """How many processes the run has."""
    return _started() if _joined else 1


def rank() -> int:
    """The number of this one, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def name() -> str:
    """What an error of one of several begins with."""
    return f"process {os.environ['RANK']} of {_started()}: " if _started() > 1 else ""


@contextmanager
def joined() -> Iterator[None]:
    """Within the block, the processes of the run reach each other; only that of rank 0 prints."""
    global _joined
    if _started() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    with _reached():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=ALONE)
    printed, _joined = sys.stdout, True
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays for the block
    try:
        yield
    finally:
        sys.stdout, _joined = printed, False
    dist.destroy_process_group()  # not where an error leaves the block: the others may be beyond reach


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the common base of what torch raises here
        if is_out_of_memory(error):
            raise
        told = "lost another process of this run, which has ended or cannot be reached"
        raise UserError(f"{told} ({reason(error)}); start all of them again, with --resume to go on") from error


def add_up(tensors: list) -> None:
    """Replace each tensor by its sum over the processes; those of one device and dtype go in few messages."""
    if size() == 1:
        return
    import torch
    import torch.distributed as dist

    for kind in dict.fromkeys((tensor.device, tensor.dtype) for tensor in tensors):  # in one order everywhere
        bucket, waiting = [], [tensor for tensor in tensors if (tensor.device, tensor.dtype) == kind]
        while waiting:
            bucket.append(waiting.pop(0))
            if waiting and sum(map(torch.numel, bucket)) + waiting[0].numel() <= BUCKET:
                continue
            message = torch.cat([tensor.reshape(-1) for tensor in bucket])  # (numbers,)
            with _reached():
                dist.all_reduce(message)
            for tensor, part in zip(bucket, message.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))
            bucket = []


def broadcast(tensors: list, source: int = 0) -> None:
    """Replace each tensor by that of the process `source`."""
    if size() == 1:
        return
    import torch.distributed as dist

    with _reached():
        for tensor in tensors:
            dist.broadcast(tensor, source)


def content_from_main(content: bytes | None) -> bytes | None:
    """What the process of rank 0 has."""
    if size() == 1:
        return content
    import torch

    length = torch.tensor(-1 if content is None else len(content))
    broadcast([length])
    if length < 0:
        return None
    message = torch.empty(int(length), dtype=torch.uint8)
    if rank() == 0:
        message.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    broadcast([message])
    return message.numpy().tobytes()


def from_main(value):
    """What the process of rank 0 has: a number, a text, or whatever else JSON takes."""
    return value if size() == 1 else json.loads(content_from_main(json.dumps(value).encode()))


def total(number: int) -> int:
    """The sum of the processes' numbers."""
    if size() == 1:
        return number
    import torch

    message = torch.tensor(number)
    add_up([message])
    return int(message)


def gathered(rows) -> list:
    """The tensors (n, ...) of all processes, in their order; n may differ, and be 0."""
    if size() == 1:
        return [rows]
    import torch

    lengths = torch.zeros(size(), dtype=torch.int64)
    lengths[rank()] = len(rows)
    add_up([lengths])
    found = [rows if place == rank() else rows.new_empty(int(n), *rows.shape[1:]) for place, n in enumerate(lengths)]
    for place, part in enumerate(found):
        broadcast([part], place)
    return found


def share(costs):
    """Which of some tasks, by their costs (n,), are this process's: indices, in order; the sums are near each other.

    Each task, the dearest first, goes to the process that has least to do.
    """
    import numpy as np

    load, owner = np.zeros(size()), np.empty(len(costs), np.int64)
    for task in np.argsort(-costs, kind="stable"):
        owner[task] = load.argmin()
        load[owner[task]] += costs[task]
    return np.flatnonzero(owner == rank())
