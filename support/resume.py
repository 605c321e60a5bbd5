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
from support import processes
from support.adapters import set_learned
from support.checkpoints import is_plain, not_ours, parse_checkpoint, read_content, write_checkpoint
from support.files import UserError
from support.history import NO_EXPERIMENT
from support.runs import set_aside
from support.selection import best_moment

FORMAT_VERSION = 3
SPARED = 20  # times what a write takes, that pass without another

# Flags that may change when a run goes on: where things lie, how fast it goes, what is compared in the end. Data,
# profiles, encoder and its dtype are compared by what they are.
FREE = NO_EXPERIMENT - {"seed", "split_seed"} | {"epochs", "capability_file"}
HISTORY = ("train_losses", "val_metrics", "validations")  # what a training adds to a history
TIMED = ("cluster", "train", "evaluate", "towers_alone")  # of a training, in the `timing` of its history


def experiment(args: dict, data: dict, encoder: dict) -> dict:
    """What a run that goes on must have in common with the one that began, by the names that a user knows.

    From the flags, the `data` of the history, and the fingerprint and dtype of the encoder. Where that is trained,
    learning rates depend on the number of epochs.
    """
    free = FREE - {"epochs"} if args["finetune_encoder"] else FREE
    return {f"--{name}": value for name, value in args.items() if name not in free} | {
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
        resume: whether to go on from the file, where it is there. `saved` is then what it holds, else None. All
            processes of a run go on from that of rank 0.
        alone: whether only this process asks.
        tower_epochs: of a training of the towers alone before this one. `towers` is the last checkpoint of that, while
            there is none of this one.

    Raises `UserError` where the file is damaged, is of another experiment, or has more epochs behind it.
    """

    def __init__(
        self,
        path: Path,
        experiment: dict,
        epochs: int,
        minutes: float,
        resume: bool,
        alone: bool = False,
        tower_epochs: int = 0,
    ):
        self.path, self.experiment, self.epochs, self.minutes = path, experiment, epochs, minutes
        self.how, self.tower_epochs = (experiment, epochs, minutes, resume), tower_epochs
        self.saved, self.beginning = self._read(alone) if resume else None, None
        self.history = {"train_losses": [], "val_metrics": [], "validations": [], "best_epoch": None, "best_step": None}
        self.told, self.cost = "nothing to go on from", 0.0  # seconds that the last write took
        if self.saved:
            try:
                self._check()
                facts = self.saved["best"]["facts"]
                best = {f"best_{name}": facts[name] if facts else None for name in ("epoch", "step")}
                self.history = self.saved["history"] | best
                if self.saved["towers_alone"]:
                    self.history["towers_alone"] = self.saved["towers_alone"]
            except UserError:
                raise
            except Exception as error:  # whatever a file raises that is whole, and not what training writes
                raise not_ours(path, error) from error
        self.towers = None
        if tower_epochs and not self.saved:
            before = experiment, tower_epochs, minutes, resume
            self.towers = LastCheckpoint(path.with_suffix(".towers.pt"), *before)
            if self.towers.saved:
                self.told = f"in the training of the towers, {self.towers.told}"
        self.since = time.monotonic()

    def _read(self, alone: bool) -> dict | None:
        content = problem = None
        if alone or processes.rank() == 0:
            earlier = self.path.with_suffix(".earlier.pt")
            if earlier.exists() and not self.path.exists():
                self._bring_back(earlier)
            try:
                content = read_content(self.path) if self.path.exists() else None
            except UserError as error:  # which the others must not wait for
                problem = error
        if not alone:
            content = processes.content_from_main(content)
        if problem:
            raise problem
        return None if content is None else parse_checkpoint(self.path, content, FORMAT_VERSION)

    def _bring_back(self, earlier: Path) -> None:
        """Take what a run of other flags has set aside, if it is of this experiment."""
        with suppress(UserError, OSError):
            LastCheckpoint(earlier, *self.how, alone=True)
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
        losses, vals, within = (self.saved["history"][name] for name in HISTORY)
        if not all(type(loss) is float and 0 <= val["auc"] <= 1 for loss, val in zip(losses, vals, strict=True)):
            raise ValueError("its history is none")
        if not all(0 <= val["auc"] <= 1 and type(val["epoch"]) is type(val["step"]) is int for val in within):
            raise ValueError("its history is none")
        json.dumps([losses, vals, within, self.saved["towers_alone"]], allow_nan=False)  # is to be written
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
            LastCheckpoint(self.path, *self.how[:3], True, alone=True)
        except UserError:
            set_aside(self.path)
        if self.towers:
            self.towers.make_room()

    def is_finished(self, earlier: dict, args: dict) -> bool:
        """Whether the history in the folder is of this run, to its end, and `best_model.pt` is the one it tells of."""
        if earlier.get("status") != "finished" or earlier["args"] != args:
            return False
        if earlier["data"]["content_hash"] != self.experiment["the content of --data_path"]:
            return False
        try:
            facts = RankRouter.load(self.path.with_name("best_model.pt")).facts
            return (facts["epoch"], facts["step"]) == (earlier["best_epoch"], earlier["best_step"])
        except (UserError, KeyError):
            return False

    def of(self, training: str) -> "LastCheckpoint":
        """That of another training of the same run; where it is of another run, or damaged, from the beginning."""
        path, (*how, resume) = self.path.with_suffix(f".{training}.pt"), self.how
        try:
            return LastCheckpoint(path, *how, resume, tower_epochs=self.tower_epochs)
        except UserError:
            return LastCheckpoint(path, *how, False, tower_epochs=self.tower_epochs)

    def begin_again(self, tower) -> None:
        """Give a query tower the statistics and clusters that the training began with. Raises as `verify` does."""
        try:
            if not _is_like(self.saved["beginning"], dict(tower.named_buffers())):
                raise ValueError("what it began with is not what training writes")
            tower.load_state_dict(tower.state_dict() | self.saved["beginning"])
        except Exception as error:  # as above
            raise not_ours(self.path, error) from error

    def verify(self, router, batches, embeddings_hash: str) -> None:
        """Raise `UserError` where `saved` is not what `write` has written for such a router and such batches.

        Warns on stderr where the embeddings are others, in their last bits, than those that the run began with.
        """
        try:
            wrong = [what for what, holds in self._promises(router.state_dict(), batches) if not holds]
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

    def _promises(self, weights: dict, batches) -> Iterator[tuple[str, bool]]:
        saved, moment = self.saved, best_moment(self.history)
        best, begun = saved["best"], saved["begun"]
        yield "a weight", _is_like(saved["router"], weights)
        yield "a weight of the encoder", _is_like(saved["encoder"], batches.learned)
        if moment:
            epoch, step, val = moment
            facts, place = best["facts"], {"epoch": epoch, "step": step}
            yield "the best epoch", {name: facts[name] for name in place} == place
            yield "the best epoch", place | facts["val_metrics"] == place | val
            yield "a best weight", _is_like(best["weights"], weights)
            yield "the temperature", 0 < facts["temperature"] < math.inf
            if batches.learned:
                asked = [saved["experiment"][f"--{name}"] for name in ("finetune_layers", "lora_rank")]
                found = [facts["trained"][name] for name in ("layers", "lora_rank")]
                yield "what was trained of the encoder", found == asked
                yield "a best weight of the encoder", _is_like(facts["trained"]["weights"], batches.learned)
        else:
            yield "the best epoch", best == {"weights": None, "facts": None}
        if begun is not None:
            order, taken = begun  # (units,), (n,)
            yield "the order of the battles", torch.equal(order.sort().values, torch.arange(batches.count))
            yield "a step's loss", taken.dtype == torch.float32 and taken.ndim == 1 and bool(taken.isfinite().all())
            yield "a step's loss", len(taken) <= len(batches.plan(order))
        yield "the embeddings' hash", type(saved["embeddings_hash"]) is str
        yield "a time", all(name in TIMED and 0 <= seconds < math.inf for name, seconds in saved["seconds"].items())

    def is_due(self) -> bool:
        """Whether so many minutes have gone by since the last write, and so much more time than that took."""
        return time.monotonic() - self.since >= 60 * self.minutes and (
            not self.minutes or time.monotonic() - self.since >= SPARED * self.cost
        )

    def write(
        self, router, batches, optimiser, averaged, history: dict, best: dict, begun: tuple | None = None
    ) -> None:
        """Keep the state after an epoch; or in one: `begun` are its order (N,) and the losses of the steps taken (n,).

        `best` is what belongs into `best_model.pt`: weights and facts.
        """
        state = {
            "format_version": FORMAT_VERSION,
            "experiment": self.experiment,
            "router": router.state_dict(),
            "encoder": {name: weight.detach() for name, weight in batches.learned.items()},
            "beginning": self.beginning,
            "optimiser": optimiser.state_dict(),
            "averaged": {"means": averaged.means, "steps": averaged.steps},
            "random": _random_states(),
            "history": {name: history[name] for name in HISTORY},
            "towers_alone": history.get("towers_alone"),
            "embeddings_hash": history["data"]["embeddings_hash"],
            "seconds": {name: seconds for name, seconds in history["timing"].items() if name in TIMED},
            "best": best,
            "begun": begun,
        }
        if processes.rank() == 0:
            since = time.monotonic()
            write_checkpoint(self.path, state)
            for no_longer in (".earlier.pt", ".towers.pt"):
                self.path.with_suffix(no_longer).unlink(missing_ok=True)
            self.since = time.monotonic()
            self.cost = self.since - since

    def restore(self, router, batches, optimiser, averaged, timing: dict) -> None:
        """Bring weights, their means, optimiser, random states and the seconds spent to where `saved` was written."""
        try:
            moments, groups = (self.saved["optimiser"][part] for part in ("state", "param_groups"))
            expected = [weight for group in optimiser.param_groups for weight in group["params"]]
            kept = [
                _is_like(moment, {"step": torch.tensor(0.0), "exp_avg": expected[i], "exp_avg_sq": expected[i]})
                for i, moment in moments.items()
            ]
            rates = [group["lr"] for group in optimiser.param_groups]
            now = optimiser.state_dict()["param_groups"]
            for group, rate in zip(groups, rates, strict=True):  # it may have risen or fallen; each step sets it anew
                group["lr"] = rate
            if groups != now or not all(kept):
                raise ValueError("the optimiser's state is not that of this run")
            router.load_state_dict(self.saved["router"])
            set_learned(batches.learned, self.saved["encoder"])
            optimiser.load_state_dict(self.saved["optimiser"])
            means, steps = (self.saved["averaged"][part] for part in ("means", "steps"))
            taken = max(int(moment["step"]) for moment in moments.values())
            if not _is_like(dict(enumerate(means)), dict(enumerate(averaged.means))) or steps != taken:
                raise ValueError("the mean weights are not those of this run")
            averaged.restore(means, steps)
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
    """Those of Python and numpy, and of torch in each process and on its device."""
    version, keys, gauss = random.getstate()
    kind, numpy_keys, *rest = np.random.get_state()
    on_device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else torch.empty(0, dtype=torch.uint8)
    return {
        "python": (version, torch.tensor(keys), gauss),
        "numpy": (kind, torch.from_numpy(numpy_keys.astype(np.int64)), *rest),
        "torch": processes.gathered(torch.get_rng_state()),
        "cuda": processes.gathered(on_device),
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def _set_random_states(states: dict) -> None:
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys.tolist()), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if len(states["torch"]) <= processes.rank():  # there were fewer processes, and this one has none to go on from
        return
    torch.set_rng_state(states["torch"][processes.rank()])
    on_device = states["cuda"][processes.rank()]
    if len(on_device) and torch.cuda.is_initialized():  # else it goes on another machine
        torch.cuda.set_rng_state(on_device)
    if states["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
