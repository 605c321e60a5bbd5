"""Where a run goes on after it was stopped: `last_checkpoint.pt`, with all that the rest of the run depends on."""

import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

from support.checkpoints import not_ours, read_checkpoint, write_checkpoint
from support.files import UserError
from support.history import NO_EXPERIMENT

FORMAT_VERSION = 1

# Flags that may change when a run goes on: where things lie, how fast it goes, what is compared in the end. Data,
# encoder and its dtype are compared by what they are.
FREE = NO_EXPERIMENT - {"seed", "split_seed"} | {"epochs"}
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
        self.path, self.how = path, (experiment, epochs, minutes, resume)
        self.saved = read_checkpoint(path, FORMAT_VERSION) if resume and path.is_file() else None
        self.history, self.told = {"train_losses": [], "val_metrics": [], "best_epoch": None}, "nothing to go on from"
        if self.saved:
            try:
                self._check()
                self.history = {name: self.saved["history"][name] for name in self.history}
            except (LookupError, TypeError, AttributeError) as error:
                raise not_ours(path, error) from error
        self.since = time.monotonic()

    def _check(self) -> None:
        then, (now, epochs, *_), begun = self.saved["experiment"], self.how, self.saved["begun"]
        changed = [
            f"{name} was {then.get(name)}, is {now.get(name)}" for name in then | now if then.get(name) != now.get(name)
        ]
        if changed:
            raise UserError(
                f"--resume: {self.path} is of another experiment: {'; '.join(changed)}; restore that, choose another "
                "--output_dir, or leave out --resume to train anew"
            )
        done = len(self.saved["history"]["train_losses"])
        if epochs < done + (begun is not None):
            more = " and a part of the next" if begun else ""
            raise UserError(f"--resume: {self.path} has {done} epochs{more} behind it; --epochs {epochs} is too few")
        steps = f" and {len(begun[1])} steps of the next" if begun else ""
        self.told = f"after {done} epochs{steps}"

    def of(self, training: str) -> "LastCheckpoint":
        """That of another training of the same run."""
        return LastCheckpoint(self.path.with_name(f"last_checkpoint.{training}.pt"), *self.how)

    def compare(self, embeddings_hash: str) -> None:
        """Warn on stderr where the run goes on with other embeddings, in their last bits, than it began with."""
        if self.saved and self.saved["embeddings_hash"] != embeddings_hash:
            print(
                "warning: the embeddings are not bit for bit those that the run began with: they were made on another "
                "machine or in other batches; the result may differ in its last digits from one never stopped",
                file=sys.stderr,
            )

    def is_due(self) -> bool:
        """Whether so many minutes have gone by since the last write."""
        return time.monotonic() - self.since >= 60 * self.how[2]

    def write(self, router, optimiser, history: dict, best: dict, begun: tuple | None = None) -> None:
        """Keep the state after an epoch; or in one: `begun` are its order (N,) and the losses of the steps taken (n,).

        `best` is what belongs into `best_model.pt`: weights and facts.
        """
        state = {
            "format_version": FORMAT_VERSION,
            "experiment": self.how[0],
            "router": router.state_dict(),
            "optimiser": optimiser.state_dict(),
            "random": _random_states(),
            "history": {name: history[name] for name in self.history},
            "embeddings_hash": history["data"]["embeddings_hash"],
            "seconds": {name: seconds for name, seconds in history["timing"].items() if name in TIMED},
            "best": best,
            "begun": begun,
        }
        write_checkpoint(self.path, state)
        self.since = time.monotonic()

    def restore(self, router, optimiser, timing: dict) -> None:
        """Bring router, optimiser, random states and the seconds spent to where `saved` was written."""
        try:
            router.load_state_dict(self.saved["router"])
            optimiser.load_state_dict(self.saved["optimiser"])
            _set_random_states(self.saved["random"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise not_ours(self.path, error) from error
        for name, seconds in self.saved["seconds"].items():
            timing[name] = timing.get(name, 0.0) + seconds


def _random_states() -> dict:
    version, keys, gauss = random.getstate()
    kind, numpy_keys, *rest = np.random.get_state()
    return {
        "python": (version, torch.tensor(keys), gauss),
        "numpy": (kind, torch.from_numpy(numpy_keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def _set_random_states(states: dict) -> None:
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys.tolist()), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():  # else it goes on another machine
        torch.cuda.set_rng_state_all(states["cuda"])
    if states["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
