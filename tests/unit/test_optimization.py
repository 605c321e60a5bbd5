"""The moving average of the weights, the learning rates, and the optimizer: by hand and in a training."""

import numpy as np
import pytest
import torch

import train
from rankrouter import RankRouter
from support.training.optimization import EMA, make_optimizer, warmup_then_decay


def test_averages_computed_by_hand():
    weight = torch.nn.Parameter(torch.tensor([0.0]))
    ema = EMA([weight], 0.3)
    found = []
    for value in (11.0, 0.0, 10.0):
        weight.data.fill_(value)
        ema.update()
        found.append(ema.averages[0].item())
    # Decays of 2/11, 3/12, and 0.3 where 4/13 is more.
    assert found == pytest.approx([9.0, 2.25, 0.3 * 2.25 + 0.7 * 10])


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


@pytest.mark.parametrize("eval_every", ["0", "9"])
def test_the_kept_weights_are_the_average_over_all_steps_until_then(small, tmp_path, monkeypatch, eval_every):
    seen, update = [], EMA.update

    def watched(self):
        seen.append([weight.detach().clone() for weight in self.weights])
        update(self)

    monkeypatch.setattr(EMA, "update", watched)
    flags = ["--ema_decay", "0.4", "--eval_every", eval_every, "--epochs", "1", "--batch_size", "8", "--lr", "0.3"]
    train.main([*small, *flags, "--output_dir", str(tmp_path)])
    router = RankRouter.load(tmp_path / "best_model.pt")
    step = router.metadata.step
    assert (step is None) == (eval_every == "0")
    seen = seen[:step]
    shares = np.array([0.6] * len(seen))  # of each step: (1 - decay) times the decays of all that follow
    shares[:5] = [1 - (1 + t) / (10 + t) for t in range(1, 6)]  # while these decays are below 0.4
    weights = [share * np.prod(1 - shares[t + 1 :]) for t, share in enumerate(shares)]
    assert sum(weights) == pytest.approx(1, abs=1e-4)  # almost nothing is left of the initial weights
    for i, kept in enumerate(router.parameters()):
        expected = sum(weight * step[i] for weight, step in zip(weights, seen, strict=True))
        torch.testing.assert_close(kept, expected, atol=2e-4, rtol=0)


def test_without_decay_the_weights_themselves_are_kept(small, tmp_path):
    flags = [*small, "--output_dir", str(tmp_path), "--ema_decay", "0", "--epochs", "1", "--eval_every", "0"]
    train.main(flags)
    kept = RankRouter.load(tmp_path / "best_model.pt").state_dict()
    last = torch.load(tmp_path / "last_checkpoint.pt")["training"]["router"]
    assert all(torch.equal(kept[name], last[name]) for name in last)


def test_averages_of_another_shape_are_not_restored(small, fails, tmp_path):
    train.main([*small, "--output_dir", str(tmp_path)])
    path = tmp_path / "last_checkpoint.pt"
    checkpoint = torch.load(path)
    averages = checkpoint["training"]["ema"]["averages"]
    averages[0] = averages[0][:-1]
    torch.save(checkpoint, path)
    message = fails(*small, "--output_dir", str(tmp_path), "--resume", "--epochs", "3")
    assert "is not a RankRouter checkpoint" in message


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
