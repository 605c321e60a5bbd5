"""The moving average of the weights, the learning rates, and the optimizer: by hand and in the loop of training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from data_loader import Battles
from rankrouter import Metadata, RankRouter, RouterConfig
from support.system.device import Timing
from support.training import optimization
from support.training.batches import BattleBatches
from support.training.history import History
from support.training.items import BattleItems
from support.training.optimization import EMA, make_optimizer, warmup_then_decay


def test_averages_computed_by_hand(monkeypatch):
    monkeypatch.setattr(optimization, "STEPS_PER_UPDATE", 1)
    weight = torch.nn.Parameter(torch.tensor([0.0]))
    ema = EMA([weight], 0.3)
    found = []
    for value in (11.0, 0.0, 10.0):
        weight.data.fill_(value)
        ema.update()
        found.append(ema.averages[0].item())
    # Decays of 2/11, 3/12, and 0.3 where 4/13 is more.
    assert found == pytest.approx([9.0, 2.25, 0.3 * 2.25 + 0.7 * 10])
    # After every second step, and for a validation: with the product of the decays since, 1/22, then 0.3.
    monkeypatch.setattr(optimization, "STEPS_PER_UPDATE", 2)
    weight.data.zero_()
    ema, found = EMA([weight], 0.3), []
    for value in (11.0, 22.0, 10.0):
        weight.data.fill_(value)
        ema.update()
        found.append(ema.averages[0].item())
    assert found == pytest.approx([0.0, 21.0, 21.0])
    resumed = EMA([weight], 0.3)
    resumed.load_state_dict(ema.state_dict())
    for each in (ema, resumed):
        with each.applied():
            assert weight.item() == pytest.approx(0.3 * 21 + 0.7 * 10)


def test_the_weights_are_their_averages_only_within_the_block():
    weight = torch.nn.Parameter(torch.ones(3))
    ema = EMA([weight], 0.5)
    weight.data.zero_()
    ema.update()
    with pytest.raises(RuntimeError), ema.applied():
        assert torch.equal(weight, torch.full((3,), 2 / 11))
        assert torch.equal(ema.averages[0], torch.zeros(3))
        raise RuntimeError
    assert torch.equal(weight, torch.zeros(3))


def test_the_kept_weights_are_the_average_over_all_steps_until_the_best_validation(tmp_path, monkeypatch):
    """The loop of `train.fit`, with steps that set the weights at random instead of training them."""
    numbers = np.arange(120)
    outcome = (numbers % 2).astype(np.float32)
    battles = Battles([f"{i}" for i in numbers], ["x", "y", "z"], numbers, numbers % 3, (numbers + 1) % 3, outcome)
    x, zeros = torch.randn(120, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(120, dtype=torch.int64)
    nothing = SimpleNamespace(restore=lambda *_: None, after_step=lambda _: None, save=lambda _: None)
    seen, generator = [], torch.Generator()

    def set_weights(args, state, batch):
        seen.append([torch.randn(weight.shape, generator=generator) for weight in state.router.parameters()])
        for weight, value in zip(state.router.parameters(), seen[-1], strict=True):
            weight.data.copy_(value)
        return torch.tensor(0.0)

    monkeypatch.setattr(train, "train_step", set_weights)
    steps = set()
    monkeypatch.setattr(optimization, "STEPS_PER_UPDATE", 4)
    for decay, eval_every, seed in ((0.4, 9, 0), (0.4, 9, 1), (0.4, 0, 0), (0.0, 9, 0), (0.0, 0, 0)):
        args = train.parse_args(["--demo", "--ema_decay", str(decay), "--eval_every", str(eval_every)])
        history = History(tmp_path, vars(args), {}, Timing())
        torch.manual_seed(seed)
        generator.manual_seed(seed)
        seen.clear()
        router = RankRouter(battles.model_names, 4, RouterConfig(num_clusters=0, embedding_dim=8, zero_init=False))
        router.metadata = Metadata({}, {}, "", torch.zeros(0), {}, battles.model_names[0])
        batches = BattleBatches(x, zeros, BattleItems(battles, x.device), batch_size=8)
        split = SimpleNamespace(val=battles, val_pairs=battles.sample(120, seed=0))
        run = train.Run(args, None, None, history, nothing, tower_threads=1)
        train.fit(run, router, batches, split, phase="towers", epochs=1, patience=None)
        assert len(seen) == 15
        step = router.metadata.step
        steps.add(step)
        last, weights, pending = step or 15, np.zeros(15), 1.0  # of each step in the average
        for t in range(1, last + 1):
            pending *= min(decay, (1 + t) / (10 + t))
            if t % 4 == 0 or t == last or (eval_every and t % eval_every == 0):
                weights *= pending
                weights[t - 1], pending = 1 - pending, 1.0
        for i, kept in enumerate(router.parameters()):
            expected = sum(weight * values[i] for weight, values in zip(weights, seen, strict=False))
            torch.testing.assert_close(kept, expected, atol=2e-3, rtol=0)  # little is left of the initial weights
    assert steps == {9, None}  # the best validation lies within the epoch, or at its end


def test_learning_rates_rise_and_fall_linearly():
    found = [warmup_then_decay(progress, 0.25) for progress in (0.0, 0.05, 0.25, 0.625, 1.0)]
    assert found == pytest.approx([0.0, 0.2, 1.0, 0.5, 0.0])
    assert warmup_then_decay(0.0, 0.0) == 1.0
    assert warmup_then_decay(0.75, 0.0) == 0.25


def test_a_step_of_the_optimizer_computed_by_hand():
    tower, encoder = (torch.nn.Parameter(torch.tensor([2.0])) for _ in range(2))
    optimizer = make_optimizer([tower], [encoder], lr=0.1, encoder_lr=0.01, weight_decay=0.5)
    for weight in (tower, encoder):
        weight.grad = torch.tensor([3.0])
    optimizer.step()
    # AdamW: decoupled decay, then a first step of the size of the learning rate.
    assert tower.item() == pytest.approx(2 * (1 - 0.1 * 0.5) - 0.1)
    assert encoder.item() == pytest.approx(2 * (1 - 0.01 * 0.5) - 0.01)
    assert [group["peak_lr"] for group in optimizer.param_groups] == [0.1, 0.01]
