"""`training_history.json`, and the learning curves in it: what is appended, which validation is best, when to stop."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rankrouter import Metadata
from support.encoding.encoder import QueryEncoder
from support.system import distributed
from support.system.device import Timing, environment
from support.system.errors import UserError
from support.system.files import atomic_write
from support.system.signals import Stopped
from support.training.options import with_defaults

FILE = "training_history.json"
PHASES = ("towers", "encoder", "ceiling", "ceiling_encoder")  # the trainings of a run, in their order


@dataclass
class Best:
    """The router at the validation with the highest AUC."""

    weights: dict  # its state_dict
    metadata: Metadata


@dataclass
class LearningCurves:
    """The losses and validations of one training, the best validation so far, and the seconds that it took."""

    train_losses: list[float] = field(default_factory=list)  # per epoch
    val_metrics: list[dict] = field(default_factory=list)  # at the end of each epoch
    validations: list[dict] = field(default_factory=list)  # within epochs, with "epoch" and "step"
    best: Best | None = None
    timing: Timing = field(default_factory=Timing)

    def add(self, epoch: int, step: int | None, loss: float, val: dict) -> bool:
        """Append a validation after `step` steps of an epoch, or at its end (None); returns whether it is the best.

        Of equal ones the earliest is the best. `loss` is the epoch's mean training loss so far.
        """
        is_best = all(val["auc"] > earlier["auc"] for _, _, earlier in self.in_order())
        if step is None:
            self.train_losses.append(loss)
            self.val_metrics.append(val)
        else:
            self.validations.append({"epoch": epoch, "step": step} | val)
        return is_best

    def end_epoch_early(self, loss: float) -> None:
        """Let the last validation within the epoch count as the one at its end."""
        self.train_losses.append(loss)
        last = self.validations[-1]
        self.val_metrics.append({name: last[name] for name in last if name not in ("epoch", "step")})

    def in_order(self) -> list[tuple[int, int | None, dict]]:
        """Each validation in its order: epoch, steps taken in it (None: all), metrics."""
        ends = [(epoch, None, val) for epoch, val in enumerate(self.val_metrics)]
        within = [(val["epoch"], val["step"], val) for val in self.validations]
        return sorted(ends + within, key=lambda entry: (entry[0], math.inf if entry[1] is None else entry[1]))

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether the last `patience` validations were not the best; never without patience."""
        aucs = [val["auc"] for *_, val in self.in_order()]
        return patience is not None and bool(aucs) and len(aucs) - 1 - aucs.index(max(aucs)) >= patience

    def as_dict(self) -> dict:
        """The lists, as the history has them."""
        return {name: getattr(self, name) for name in ("train_losses", "val_metrics", "validations")}

    def state_dict(self) -> dict:
        """What a resumed training continues from: plain Python types and tensors."""
        best = None if self.best is None else {"weights": self.best.weights, "metadata": vars(self.best.metadata)}
        return self.as_dict() | {"best": best, "seconds": dict(self.timing.update())}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`; the seconds add to those spent since. Raises anything where it is damaged."""
        json.dumps([state[name] for name in self.as_dict()], allow_nan=False)  # it will be written
        for name, values in self.as_dict().items():
            values[:] = state[name]
        self.out_of_patience(1)  # raises where a validation has no AUC
        if state["best"] is not None:
            self.best = Best(state["best"]["weights"], Metadata(**state["best"]["metadata"]))
        seconds = self.timing.update()
        for name, spent in state["seconds"].items():
            seconds[name] = seconds.get(name, 0.0) + float(spent)


class History:
    """`training_history.json` of a run, rewritten after each validation by rank 0.

    Args:
        folder: the output folder.
        args: the flags.
        data: the counts of the data.
        timing: the seconds of the run, but for its trainings.
    """

    def __init__(self, folder: str | Path, args: dict, data: dict, timing: Timing):
        self.path, self.best_path = Path(folder) / FILE, Path(folder) / "best_model.pt"
        self.args, self.data, self.timing, self.status = args, data, timing, "running"
        self.counts = {}  # of queries and tokens, part of `timing` in the file
        self.results = {}  # encoder, environment, clusters, the test and what it is compared with
        self.curves = {phase: LearningCurves() for phase in PHASES}
        # The training whose best validation is `best_model.pt`; before the encoder's is that of the towers.
        self.main_phase = "encoder" if args["finetune_encoder"] else "towers"
        self.main = self.curves[self.main_phase]

    def as_dict(self) -> dict:
        """The content of the file; docs/outputs.md explains its keys."""
        best, timing = self.main.best, self.timing.update() | self.counts
        for name, seconds in self.main.timing.update().items():
            timing[name] = timing.get(name, 0.0) + seconds
        history = {"status": self.status, "args": self.args, **self.main.as_dict()}
        history |= {"best_epoch": best and best.metadata.epoch, "best_step": best and best.metadata.step}
        if self.main_phase == "encoder":
            seconds = dict(self.curves["towers"].timing.update())
            timing["cluster"] = seconds.pop("cluster", 0.0)
            if self.args["tower_epochs"]:
                history["towers_alone"] = self.curves["towers"].as_dict()
                timing["towers_alone"] = sum(seconds.values())
        empty = {"test_metrics": None, "test_intervals": None, "baselines": {}}
        return history | empty | {"data": self.data, "timing": timing} | self.results

    def add_encoding(
        self, encoder: QueryEncoder, num_encoded: int, embeddings: torch.Tensor, tower_threads: int
    ) -> None:
        """Record the encoder, its device, and the embeddings (Q, H), of which `num_encoded` were not cached."""
        self.counts = {"queries_encoded": num_encoded, "queries_from_cache": len(embeddings) - num_encoded}
        used = environment(encoder.device, encoder.dtype) | {"tower_threads": tower_threads}
        self.results |= {"encoder": encoder.metadata, "environment": used}
        self.data["embeddings_hash"] = hashlib.sha256(embeddings.numpy()).hexdigest()

    def add_clusters(self, sizes: list[int]) -> None:
        """Record the number of training queries of each cluster (K,), until the test describes them."""
        self.results.setdefault("clusters", [{"size": size} for size in sizes])

    def write(self) -> None:
        """Replace the file, so that a running or killed run can be read. Raises `UserError` where that fails."""
        if distributed.rank() == 0:
            atomic_write(self.path, json.dumps(self.as_dict(), indent=1, allow_nan=False).encode())

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Write the history at both ends of the block, with its status; an error then says what is kept."""
        try:
            self.write()
            yield
            self.status = "finished"
            self.write()
        except BaseException as error:
            self.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(UserError):  # the disk may be full, which the first error says already
                self.write()
            if isinstance(error, Stopped):
                message = f"interrupted after {len(self.main.train_losses)} of {self.args['epochs']} epochs"
                raise Stopped(error.number, f"{message}; the same command with --resume continues it") from error
            if isinstance(error, UserError) and self.main.best is not None:
                epoch = self.main.best.metadata.epoch
                raise UserError(f"{error}; the checkpoint of epoch {epoch} is kept") from error
            raise


def is_history_of(history: dict, metadata: Metadata) -> bool:
    """Whether a history is that of the finished run which wrote a checkpoint with this metadata."""
    try:
        best = history["best_epoch"], history["best_step"]
        same_args = with_defaults(history["args"]) == with_defaults(metadata.args)
        same_data = history["data"]["content_hash"] == metadata.content_hash
        return history["status"] == "finished" and best == (metadata.epoch, metadata.step) and same_args and same_data
    except (LookupError, TypeError):  # damaged
        return False


def read_history(folder: str | Path) -> dict:
    """The history in an output folder; empty where there is none, or a damaged one."""
    try:
        history = json.loads((Path(folder) / FILE).read_bytes())
        return history if isinstance(history, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}
