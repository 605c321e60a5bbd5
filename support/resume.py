"""Where a run goes on after it was stopped: `last_checkpoint.pt`, with all that the rest of the run depends on."""

import json
import math
import random
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from rankrouter import RankRouter
from support.checkpoints import is_plain, not_ours, read_checkpoint, write_checkpoint
from support.files import UserError
from support.history import NO_EXPERIMENT
from support.runs import set_aside

FORMAT_VERSION = 1

# Flags that may change when a run goes on: where things lie, how fast it goes, what is compared in the end. Data,
# profiles, encoder and its dtype are compared by what they are.
FREE = NO_EXPERIMENT - {"seed", "split_seed"} | {"epochs", "capability_file"}
TIMED = ("cluster", "train", "evaluate")  # of a training, in the `timing` of its history


def experiment(args: dict, data: dict, encoder: dict) -> dict:
    """What a run that goes on must have in common with the one that began, by the names that a user knows.

    From the flags, the `data` of the history, and the fingerprint and dtype of the encoder.
    """
    return {f"--{name}": value for name, value in args.items() if name not in FREE} | {
        "the content of --data_path": data["content_hash"],
        "the content of --capability_file": data.get("capability_file_hash"),
        "the encoder's fingerprint": encoder["fingerprint"],
        "the encoder's dtype": encoder["dtype"],
    }


class LastCheckpoint:
    """`last_checkpoint.pt` of a training, written after each epoch and, in long ones, every `minutes`.

    Args:
        path: of the file.
        experiment: see `experiment`.
        epochs: how many the run has now.
        minutes: between two writes within an epoch.
        resume: whether to go on from the file, where it is there. `saved` is then what it holds, else None.

    Raises `UserError` where the file is damaged, is of another experiment, or has more epochs behind it.
    """

    def __init__(self, path: Path, experiment: dict, epochs: int, minutes: float, resume: bool):
        self.path, self.experiment, self.epochs, self.minutes = path, experiment, epochs, minutes
        self.how = experiment, epochs, minutes, resume
        earlier = path.with_suffix(".earlier.pt")
        if resume and earlier.exists() and not path.exists():
            self._bring_back(earlier)
        self.saved = read_checkpoint(path, FORMAT_VERSION) if resume and path.exists() else None
        self.history, self.told = {"train_losses": [], "val_metrics": [], "best_epoch": None}, "nothing to go on from"
        if self.saved:
            try:
                self._check()
                facts = self.saved["best"]["facts"]
                self.history = self.saved["history"] | {"best_epoch": facts["epoch"] if facts else None}
            except UserError:
                raise
            except Exception as error:  # whatever a file raises that is whole, and not what training writes
                raise not_ours(path, error) from error
        self.since = time.monotonic()

    def _bring_back(self, earlier: Path) -> None:
        """Take what a run of other flags has set aside, if it is of this experiment."""
        with suppress(UserError, OSError):
            LastCheckpoint(earlier, *self.how)
            earlier.replace(self.path)

    def _check(self) -> None:
        then, now, begun = self.saved["experiment"], self.experiment, self.saved["begun"]
        changed = [
            f"{name} was {str(then.get(name))[:80]}, is {str(now.get(name))[:80]}"
            for name in now | then
            if then.get(name) != now.get(name)
        ]
        if changed:
            raise UserError(
                f"--resume: {self.path} is of another experiment: {'; '.join(changed)}; restore that, choose another "
                "--output_dir, or leave out --resume to train anew"
            )
        losses, vals = (self.saved["history"][name] for name in ("train_losses", "val_metrics"))
        if not all(type(loss) is float and 0 <= val["auc"] <= 1 for loss, val in zip(losses, vals, strict=True)):
            raise ValueError("its history is none")
        json.dumps([losses, vals], allow_nan=False)  # is to be written
        done = len(losses)
        if self.epochs < done + (begun is not None):
            more = " and a part of the next" if begun else ""
            raise UserError(
                f"--resume: {self.path} has {done} epochs{more} behind it; --epochs {self.epochs} is too few"
            )
        steps = f" and {len(begun[1])} steps of the next" if begun else ""
        self.told = f"after {done} epochs{steps}"

    def make_room(self) -> None:
        """Set aside what an earlier run left, unless `--resume` could go on from it; the first `write` deletes it."""
        try:
            LastCheckpoint(self.path, *self.how[:3], True)
        except UserError:
            set_aside(self.path)

    def is_finished(self, earlier: dict, args: dict) -> bool:
        """Whether the history in the folder is of this run, to its end, and `best_model.pt` is the one it tells of."""
        if earlier.get("status") != "finished" or earlier["args"] != args:
            return False
        if earlier["data"]["content_hash"] != self.experiment["the content of --data_path"]:
            return False
        try:
            return RankRouter.load(self.path.with_name("best_model.pt")).facts.get("epoch") == earlier["best_epoch"]
        except UserError:
            return False

    def of(self, training: str) -> "LastCheckpoint":
        """That of another training of the same run; where it is of another run, or damaged, from the beginning."""
        path, (*how, resume) = self.path.with_name(f"last_checkpoint.{training}.pt"), self.how
        try:
            return LastCheckpoint(path, *how, resume)
        except UserError:
            return LastCheckpoint(path, *how, False)

    def verify(self, router, num_steps: int, embeddings_hash: str) -> None:
        """Raise `UserError` where `saved` is not what `write` has written for such a router and so many steps an epoch.

        Warns on stderr where the embeddings are others, in their last bits, than those that the run began with.
        """
        try:
            wrong = [what for what, holds in self._promises(router.state_dict(), num_steps) if not holds]
        except Exception as error:  # as above
            raise not_ours(self.path, error) from error
        if wrong:
            raise UserError(f"{self.path} is no RankRouter checkpoint: {wrong[0]} is not what training writes")
        if self.saved["embeddings_hash"] != embeddings_hash:
            print(
                "warning: the embeddings are not bit for bit those that the run began with: they were made on another "
                "machine or in other batches; the result may differ in its last digits from one never stopped",
                file=sys.stderr,
            )

    def _promises(self, weights: dict, num_steps: int) -> Iterator[tuple[str, bool]]:
        saved, vals = self.saved, self.history["val_metrics"]
        best, begun = saved["best"], saved["begun"]
        yield "a weight", _is_like(saved["router"], weights)
        if vals:
            epoch = best["facts"]["epoch"]
            yield "the best epoch", type(epoch) is int and epoch >= 0 and best["facts"]["val_metrics"] == vals[epoch]
            yield "a best weight", _is_like(best["weights"], weights)
        else:
            yield "the best epoch", best == {"weights": None, "facts": None}
        if begun is not None:
            order, taken = begun  # (N,), (n,)
            size = saved["experiment"]["--batch_size"]
            yield "the order of the battles", torch.equal(order.sort().values, torch.arange(len(order)))
            yield "the number of battles", -(-len(order) // size) == num_steps
            yield "a step's loss", taken.dtype == torch.float32 and taken.ndim == 1 and len(taken) <= num_steps
        yield "the embeddings' hash", type(saved["embeddings_hash"]) is str
        yield "a time", all(name in TIMED and 0 <= seconds < math.inf for name, seconds in saved["seconds"].items())

    def is_due(self) -> bool:
        """Whether so many minutes have gone by since the last write."""
        return time.monotonic() - self.since >= 60 * self.minutes

    def write(self, router, optimiser, history: dict, best: dict, begun: tuple | None = None) -> None:
        """Keep the state after an epoch; or in one: `begun` are its order (N,) and the losses of the steps taken (n,).

        `best` is what belongs into `best_model.pt`: weights and facts.
        """
        state = {
            "format_version": FORMAT_VERSION,
            "experiment": self.experiment,
            "router": router.state_dict(),
            "optimiser": optimiser.state_dict(),
            "random": _random_states(),
            "history": {name: history[name] for name in ("train_losses", "val_metrics")},
            "embeddings_hash": history["data"]["embeddings_hash"],
            "seconds": {name: seconds for name, seconds in history["timing"].items() if name in TIMED},
            "best": best,
            "begun": begun,
        }
        write_checkpoint(self.path, state)
        self.path.with_suffix(".earlier.pt").unlink(missing_ok=True)
        self.since = time.monotonic()

    def restore(self, optimiser, timing: dict) -> None:
        """Bring optimiser, random states and the seconds spent to where `saved` was written, as its router is."""
        try:
            moments, groups = (self.saved["optimiser"][part] for part in ("state", "param_groups"))
            expected = [weight for group in optimiser.param_groups for weight in group["params"]]
            kept = [
                _is_like(moment, {"step": torch.tensor(0.0), "exp_avg": expected[i], "exp_avg_sq": expected[i]})
                for i, moment in moments.items()
            ]
            if groups != optimiser.state_dict()["param_groups"] or not all(kept):
                raise ValueError("the optimiser's state is not that of this run")
            optimiser.load_state_dict(self.saved["optimiser"])
            _set_random_states(self.saved["random"])
        except Exception as error:  # as above
            raise not_ours(self.path, error) from error
        for name, seconds in self.saved["seconds"].items():
            timing[name] = timing.get(name, 0.0) + seconds


def _is_like(found: dict, expected: dict) -> bool:
    """Whether tensors have the names, shapes and dtypes of others, and are finite."""
    return found.keys() == expected.keys() and all(
        is_plain(tensor)
        and tensor.shape == expected[name].shape
        and tensor.dtype == expected[name].dtype
        and bool(tensor.isfinite().all())
        for name, tensor in found.items()
    )


def _random_states() -> dict:
    version, keys, gauss = random.getstate()
    kind, numpy_keys, *rest = np.random.get_state()
    return {
        "python": (version, torch.tensor(keys), gauss),
        "numpy": (kind, torch.from_numpy(numpy_keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def _set_random_states(states: dict) -> None:
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys.tolist()), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():  # else it goes on another machine
        torch.cuda.set_rng_state_all(states["cuda"])
    if states["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
