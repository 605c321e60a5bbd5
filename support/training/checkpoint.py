"""`last_checkpoint.pt`: everything that a training needs to continue after a kill as if nothing had happened."""

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rankrouter import RankRouter
from support.encoding.lora import load_weights
from support.system import distributed, signals
from support.system.errors import UserError
from support.system.safe_torch import not_ours, parse_checkpoint, read_content, write_checkpoint
from support.training.batches import BattleBatches, QueryBatches
from support.training.history import PHASES, History, LearningCurves, is_history_of, read_history
from support.training.optimization import EMA
from support.training.options import NO_EXPERIMENT, with_defaults

FORMAT_VERSION = 4
FILE = "last_checkpoint.pt"
TIME_SHARE = 20  # saving within an epoch takes at most 1/20 of the time

# Flags that may change on resume: places, speed, and what is compared in the end. Data, profiles, encoder and its dtype
# are compared by content.
FREE = NO_EXPERIMENT - {"seed", "split_seed"} | {"epochs", "capability_file"}


def experiment(args: dict, data: dict, encoder: dict) -> dict:
    """What a resumed run must have in common with the one that started, by names that the user knows.

    From the flags, the counts of the data, and the usage of the encoder. Where the encoder is trained, learning rates
    depend on the number of epochs.
    """
    free = FREE - {"epochs"} if args["finetune_encoder"] else FREE
    return {f"--{name}": value for name, value in args.items() if name not in free} | {
        "the content of --data_path": data["content_hash"],
        "the content of --capability_file": data.get("capability_file_hash"),
        "the list of surface features": data["surface_features"] or None,
        "the encoder's fingerprint": encoder["fingerprint"],
        "the encoder's dtype": encoder["dtype"],
        "the encoder's include_prompt": encoder.get("include_prompt"),
    }


class TrainingState:
    """What must survive a kill: weights, optimizer, averages, curves, random states, and the place within an epoch.

    Args:
        router, batches, optimizer, ema, curves: of one training.
        epochs: of that training.
    """

    def __init__(
        self,
        router: RankRouter,
        batches: BattleBatches | QueryBatches,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        curves: LearningCurves,
        epochs: int,
    ):
        self.router, self.batches, self.optimizer, self.ema, self.curves = router, batches, optimizer, ema, curves
        self.epochs, self.epoch, self.step_in_epoch = epochs, len(curves.train_losses), 0
        self.order = None  # of this epoch's battles or queries, once it has started
        self.planned = []  # its batches
        self.losses = torch.empty(0)  # summed over each batch's battles (steps,)

    def remaining_batches(self) -> Iterator:
        """The batches of this epoch that are left, in random order, the same in all processes."""
        if self.order is None:
            order = torch.randperm(self.batches.count)  # (count,)
            distributed.broadcast([order])
            self._plan(order, self.losses)
        while not self.epoch_is_over:
            yield self.planned[self.step_in_epoch]

    def _plan(self, order: torch.Tensor, losses: torch.Tensor) -> None:
        """Plan the epoch with this order (count,), of which the steps with these losses (n,) are taken already."""
        self.order, self.planned, self.step_in_epoch = order, self.batches.plan(order), len(losses)
        self.losses = torch.zeros(len(self.planned), device=self.batches.device)  # (steps,)
        self.losses[: len(losses)] = losses

    def record(self, loss: torch.Tensor) -> None:
        """Count a step, with the mean loss of its battles."""
        self.losses[self.step_in_epoch] = loss * self.batches.num_battles(self.planned[self.step_in_epoch])
        self.step_in_epoch += 1

    @property
    def epoch_is_over(self) -> bool:
        """Whether no batch of this epoch is left."""
        return self.step_in_epoch == len(self.planned)

    @property
    def progress(self) -> float:
        """Fraction of the training done at the middle of the current step, from 0 to 1."""
        return (self.epoch + (self.step_in_epoch + 0.5) / len(self.planned)) / self.epochs

    def last_loss(self) -> float:
        """The mean loss of the battles of the last step."""
        last = self.step_in_epoch - 1
        return self.losses[last].item() / self.batches.num_battles(self.planned[last])

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """The router's scores (q, M), float64, of the split's queries (q,). Raises `UserError` where not finite."""
        x, cluster_idx = self.batches.inputs_for_evaluation(queries)  # (q, F), (q,)
        try:
            return self.router.score(x, cluster_idx)  # (q, M)
        except UserError as error:
            raise UserError(f"epoch {self.epoch}: {error}") from error

    def mean_loss(self) -> float:
        """The mean over the battles of this epoch so far. Raises `UserError` where a loss is not finite.

        Losses are looked at here and not after each step, because a GPU would have to wait.
        """
        losses = self.losses[: self.step_in_epoch].cpu()
        bad = (~losses.isfinite()).nonzero()[:, 0]  # (failed steps,)
        if len(bad):
            flags = "--encoder_lr, --lr" if self.batches.trains_encoder else "--lr"
            raise UserError(
                f"epoch {self.epoch}: the loss is {losses[bad[0]]} at step {bad[0]}; try a lower {flags} or --margin"
            )
        battles = sum(map(self.batches.num_battles, self.planned[: self.step_in_epoch]))
        return losses.double().sum().item() / battles

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self.step_in_epoch, self.order, self.planned = self.epoch + 1, 0, None, []
        self.losses = torch.empty(0)

    def state_dict(self) -> dict:
        """All of it as plain tensors and Python types; all processes must call it."""
        return {
            "router": self.router.state_dict(),
            "encoder": {name: parameter.detach() for name, parameter in self.batches.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "random": _random_states(),
            "order": self.order,
            "losses": self.losses[: self.step_in_epoch],
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`; the curves are restored already."""
        self.router.load_state_dict(state["router"])
        load_weights(self.batches.parameters, state["encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():  # the fused AdamW does not look at their shapes
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(parameter).copy_(moments[name])
        self.ema.load_state_dict(state["ema"])
        self.epoch = len(self.curves.train_losses)
        if state["order"] is not None:
            self._plan(state["order"], state["losses"])
        _set_random_states(state["random"])


class Checkpoint:
    """`last_checkpoint.pt` of a run: the curves of all its trainings (phases), and the state of the current one.

    Args:
        history: of the run, beside which the file is; its curves are saved and restored.
        experiment: see `experiment`.
        resume: whether to continue from the file, if it exists.
        interval: seconds between two saves within an epoch.

    Raises `UserError` where the file is damaged, or of another experiment, or has more epochs.
    """

    def __init__(self, history: History, experiment: dict, *, resume: bool, interval: float = 60.0):
        self.path, self.history, self.experiment = history.path.with_name(FILE), history, experiment
        self.epochs, self.interval, self.phase = history.args["epochs"], interval, None
        self.last_save, self.save_seconds = time.monotonic(), 0.0
        self.saved = self._read() if resume else None
        self.message = "nothing to resume"
        if self.saved is not None:
            with self._readable():
                self._check_experiment()
                for phase, curves in self.saved["curves"].items():
                    self.history.curves[phase].load_state_dict(curves)
                self._check_epochs()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Within the block, whatever a file that is not ours raises becomes a `UserError`."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise not_ours(self.path, error) from error

    def _read(self) -> dict | None:
        """The file as rank 0 has it, in all processes."""
        content = None
        if distributed.rank() == 0 and self.path.exists():
            content = read_content(self.path)
        content = distributed.broadcast_bytes(content)
        try:
            return None if content is None else parse_checkpoint(self.path, content, FORMAT_VERSION)
        except UserError as error:
            raise UserError(f"{error}; start again with --overwrite, or choose another --output_dir") from error

    def _check_experiment(self) -> None:
        defaults = {f"--{name}": value for name, value in with_defaults({}).items()}
        then, now = {name: defaults.get(name) for name in self.experiment} | self.saved["experiment"], self.experiment
        changed = [
            f"{name} was {str(then.get(name))[:80]}, is {str(now.get(name))[:80]}"
            for name in now | then
            if then.get(name) != now.get(name)
        ]
        if changed:
            raise UserError(
                f"--resume: {self.path} is of another experiment: {'; '.join(changed)}; restore that, choose another "
                "--output_dir, or start again with --overwrite"
            )

    def _check_epochs(self) -> None:
        phase, steps = self.saved["phase"], len(self.saved["training"]["losses"])
        done, past = len(self.history.curves[phase].train_losses), self._place(phase) - self._place()
        if past == 0 and self.epochs < done + (steps > 0):
            part = " and a part of the next" if steps else ""
            raise UserError(f"--resume: {self.path} has {done} epochs{part}; --epochs {self.epochs} is too few")
        if past > 0 and self.epochs != self.saved["epochs"]:
            raise UserError(
                f"--resume: {self.path} has finished the {self.saved['epochs']} epochs of the router and started the "
                f"training with the held-out model; --epochs {self.epochs} is too late"
            )
        within = f" and {steps} steps of the next" if steps else ""
        self.message = f"{f'{phase}: ' if past else ''}after {done} epochs{within}"

    def _place(self, phase: str | None = None) -> int:
        return PHASES.index(phase or self.history.main_phase)

    def finished_auc(self) -> float | None:
        """The test AUC of a finished run of these flags and data in the folder, with its best model; else None."""
        auc, history = None, read_history(self.path.parent)
        with suppress(UserError, LookupError, TypeError, ValueError):  # damaged, or not finished
            data = self.history.data
            metadata = RankRouter.load(self.history.best_path).metadata
            metadata = replace(metadata, args=self.history.args, content_hash=data["content_hash"])
            same_features = history["data"].get("surface_features", []) == data["surface_features"]
            if same_features and is_history_of(history, metadata):
                auc = float(history["test_metrics"]["auc"])
        return distributed.broadcast_from_rank0(auc)

    def start(self) -> None:
        """Delete the checkpoints of an earlier run that is not continued: they must not pass for those of this one."""
        if self.saved is None and distributed.rank() == 0:
            for path in (self.path, self.history.best_path):
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    message = f"cannot delete {path}: {error.strerror or error}"
                    raise UserError(f"{message}; choose another --output_dir") from error

    def load_router(self, router: RankRouter, phase: str) -> bool:
        """Load the weights and buffers that a router had in a phase; returns whether any were saved."""
        best = self.history.curves[phase].best
        is_current = self.saved is not None and self.saved["phase"] == phase
        if is_current or best is not None:
            with self._readable():
                router.load_state_dict(self.saved["training"]["router"] if is_current else best.weights)
        return is_current or best is not None

    def restore(self, state: TrainingState, phase: str) -> None:
        """Start a phase, or continue it where it was saved. Raises `UserError` where the file does not fit."""
        self.phase = phase
        if self.saved is None or self._place(self.saved["phase"]) < self._place(phase):
            return
        with self._readable():
            self._restore_best(state)
            if self.saved["phase"] != phase:  # which is finished
                return
            state.load_state_dict(self.saved["training"])
            self.saved["training"] = None  # frees its memory
            same_embeddings = self.saved["embeddings_hash"] == self.history.data["embeddings_hash"]
        if not same_embeddings:
            print(
                "warning: the embeddings are not bit for bit those of the run's start: they were made on another "
                "machine or in other batches; the last digits of the result may differ",
                file=sys.stderr,
            )

    def _restore_best(self, state: TrainingState) -> None:
        """Write `best_model.pt` again: it may be lost, or of the epoch after, and flags that are free may differ."""
        best, router = state.curves.best, state.router
        if state.curves is self.history.main and best is not None:
            best.metadata = replace(best.metadata, args=self.history.args, encoder=router.metadata.encoder)
            router.load_state_dict(best.weights)
            router.metadata = best.metadata
            if distributed.rank() == 0:
                router.save(self.history.best_path)

    def after_step(self, state: TrainingState) -> None:
        """Save the state when it is time, or when the run shall stop: raises `Stopped` then, in all processes."""
        pause = max(self.interval, TIME_SHARE * self.save_seconds) if self.interval else 0.0
        is_due = distributed.rank() == 0 and time.monotonic() - self.last_save >= pause
        number = signals.received()
        is_stopping, is_due = distributed.totals(number is not None, is_due)  # of all processes
        if (is_stopping or is_due) and state.losses.isfinite().all():  # a failed epoch is not saved
            self.save(state)
        if is_stopping:
            raise signals.Stopped(number or signal.SIGTERM)

    def save(self, state: TrainingState) -> None:
        """Replace the file by the current state; all processes must call it."""
        start = time.monotonic()
        checkpoint = {
            "format_version": FORMAT_VERSION,
            "experiment": self.experiment,
            "epochs": self.epochs,
            "embeddings_hash": self.history.data["embeddings_hash"],
            "phase": self.phase,
            "curves": {phase: curves.state_dict() for phase, curves in self.history.curves.items()},
            "training": state.state_dict(),
        }
        if distributed.rank() == 0:
            write_checkpoint(self.path, checkpoint)
        self.last_save = time.monotonic()
        self.save_seconds = self.last_save - start


def check_outputs(folder: str | Path, resume: bool, overwrite: bool) -> None:
    """Raise `UserError` where an output cannot be written, or a new run would replace an unfinished one."""
    for name in ("training_history.json", "best_model.pt", FILE):
        path = Path(folder) / name
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"{path} is not a file; move it away, or choose another --output_dir")
    is_finished = read_history(folder).get("status") == "finished"
    if (Path(folder) / FILE).is_file() and not (is_finished or resume or overwrite):
        raise UserError(
            f"{folder} holds an unfinished run; continue it with --resume, replace it with --overwrite, or choose "
            "another --output_dir"
        )


def _random_states() -> dict:
    """Those of Python and numpy, and of torch in each process and on its device."""
    version, keys, gauss = random.getstate()
    kind, numpy_keys, *rest = np.random.get_state()
    on_device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else torch.empty(0, dtype=torch.uint8)
    return {
        "python": (version, torch.tensor(keys), gauss),
        "numpy": (kind, torch.from_numpy(numpy_keys.astype(np.int64)), *rest),
        "torch": distributed.all_gather(torch.get_rng_state()),
        "cuda": distributed.all_gather(on_device),
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def _set_random_states(states: dict) -> None:
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys.tolist()), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if len(states["torch"]) <= distributed.rank():  # there were fewer processes, and this one has no state
        return
    torch.set_rng_state(states["torch"][distributed.rank()])
    on_device = states["cuda"][distributed.rank()]
    if len(on_device) and torch.cuda.is_initialized():  # else it continues on another machine
        torch.cuda.set_rng_state(on_device)
    if states["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
