"""The running mean of the weights, by hand and in a training."""

import numpy as np
import pytest
import torch

import train
from rankrouter import RankRouter
from support.averaging import RunningMean


def test_it_is_the_mean_that_one_computes_by_hand():
    weight = torch.nn.Parameter(torch.tensor([0.0]))
    mean = RunningMean([weight], 0.3)
    found = []
    for value in (11.0, 0.0, 10.0):
        weight.data.fill_(value)
        mean.update()
        found.append(mean.means[0].item())
    # Decays of 2/11, 3/12, and 0.3 where 4/13 is more.
    assert found == pytest.approx([9.0, 2.25, 0.3 * 2.25 + 0.7 * 10])


def test_within_it_the_weights_are_their_means_and_after_it_they_are_themselves():
    weight = torch.nn.Parameter(torch.ones(3))
    mean = RunningMean([weight], 0.5)
    weight.data.zero_()
    mean.update()
    with pytest.raises(RuntimeError), mean.in_place():
        assert torch.equal(weight, torch.full((3,), 2 / 11))
        assert torch.equal(mean.means[0], torch.zeros(3))
        raise RuntimeError
    assert torch.equal(weight, torch.zeros(3))


@pytest.mark.parametrize("eval_every", ["0", "9"])
def test_what_is_kept_is_the_mean_of_the_weights_of_all_steps_until_then(small, tmp_path, monkeypatch, eval_every):
    seen, update = [], RunningMean.update

    def watched(self):
        seen.append([weight.detach().clone() for weight in self.weights])
        update(self)

    monkeypatch.setattr(RunningMean, "update", watched)
    flags = ["--ema_decay", "0.4", "--eval_every", eval_every, "--epochs", "1", "--batch_size", "8", "--lr", "0.3"]
    train.main([*small, *flags, "--output_dir", str(tmp_path)])
    router = RankRouter.load(tmp_path / "best_model.pt")
    step = router.facts["step"]
    assert (step is None) == (eval_every == "0")
    seen = seen[:step]
    shares = np.array([0.6] * len(seen))  # of each step: (1 - decay) times the decays of all that follow
    shares[:5] = [1 - (1 + t) / (10 + t) for t in range(1, 6)]  # while these decays are below 0.4
    weights = [share * np.prod(1 - shares[t + 1 :]) for t, share in enumerate(shares)]
    assert sum(weights) == pytest.approx(1, abs=1e-4)  # next to nothing is left of the beginning
    for place, kept in enumerate(router.parameters()):
        expected = sum(weight * step[place] for weight, step in zip(weights, seen, strict=True))
        torch.testing.assert_close(kept, expected, atol=2e-4, rtol=0)


def test_no_decay_keeps_the_weights_themselves(small, tmp_path):
    flags = [*small, "--output_dir", str(tmp_path), "--ema_decay", "0", "--epochs", "1", "--eval_every", "0"]
    train.main(flags)
    kept = RankRouter.load(tmp_path / "best_model.pt").state_dict()
    last = torch.load(tmp_path / "last_checkpoint.pt")["router"]
    assert all(torch.equal(kept[name], last[name]) for name in last)


def test_a_mean_that_is_none_is_not_gone_on_from(small, fails, tmp_path):
    train.main([*small, "--output_dir", str(tmp_path)])
    path = tmp_path / "last_checkpoint.pt"
    content = torch.load(path)
    content["averaged"]["means"][0] = content["averaged"]["means"][0][:-1]
    torch.save(content, path)
    message = fails(*small, "--output_dir", str(tmp_path), "--resume", "--epochs", "3")
    assert "is no RankRouter checkpoint" in message
