"""Losses against values and gradients worked out by hand."""

import itertools
import math

import pytest
import torch

from loss import LOSSES, bce, bpr, hinge, link_margin, pointwise

LN2 = math.log(2)


def value_and_gradient(loss, a, b, outcome, **options):
    a, b = torch.tensor([a], requires_grad=True), torch.tensor([b], requires_grad=True)
    value = loss(a, b, torch.tensor([outcome]), **options)
    value.sum().backward()
    return value.item(), a.grad.item(), b.grad.item()


def test_bpr():
    table = [
        (0.0, 0.0, 1.0, 0.0, LN2, -0.5),  # softplus(0); -sigmoid(0)
        (2.0, 2.0, 0.0, 0.0, LN2, 0.5),
        (LN2, 0.0, 1.0, 0.0, math.log(1.5), -1 / 3),  # log(1 + 1/2); -sigmoid(-ln 2)
        (LN2, 0.0, 0.0, 0.0, math.log(3), 2 / 3),  # log(1 + 2); sigmoid(ln 2)
        (0.0, 0.0, 1.0, LN2, math.log(3), -2 / 3),  # the margin counts against the winner
        (0.0, 0.0, 0.0, LN2, math.log(3), 2 / 3),  # whichever side it is
        (LN2, 0.0, 0.5, 0.0, (math.log(1.5) + math.log(3)) / 2, 1 / 6),
        (1.0, 1.0, 0.5, 1.0, math.log(1 + math.e), 0.0),
        (-200.0, 200.0, 1.0, 1.0, 401.0, -1.0),  # finite and not flat far from zero
    ]
    for a, b, outcome, margin, value, slope in table:
        got = value_and_gradient(bpr, a, b, outcome, margin=margin)
        assert got == pytest.approx((value, slope, -slope), abs=1e-6), (a, b, outcome, margin)


def test_bce():
    table = [
        (0.0, 0.0, 1.0, LN2, -0.25, 0.25),  # each score is a logit of its own
        (LN2, 0.0, 1.0, (math.log(1.5) + LN2) / 2, -1 / 6, 0.25),
        (LN2, LN2, 0.0, (math.log(3) + math.log(1.5)) / 2, 1 / 3, -1 / 6),
        (LN2, 0.0, 0.5, (math.log(3) - LN2 / 2 + LN2) / 2, 1 / 12, 0.0),  # labels of 0.5: softplus(ln 2) - ln 2 / 2
    ]
    for a, b, outcome, *expected in table:
        for margin in (0.0, 2.0):  # which has no effect
            got = value_and_gradient(bce, a, b, outcome, margin=margin)
            assert got == pytest.approx(tuple(expected), abs=1e-6), (a, b, outcome, margin)


def test_hinge():
    table = [
        (0.5, 0.0, 1.0, 1.0, 0.5, -1.0),
        (2.0, 0.0, 1.0, 1.0, 0.0, 0.0),  # the winner leads by more than the margin
        (2.0, 0.0, 0.0, 1.0, 3.0, 1.0),
        (0.5, 0.0, 0.5, 1.0, 1.0, 0.0),  # (0.5 + 1.5) / 2
    ]
    for a, b, outcome, margin, value, slope in table:
        got = value_and_gradient(hinge, a, b, outcome, margin=margin)
        assert got == pytest.approx((value, slope, -slope), abs=1e-6), (a, b, outcome, margin)


def test_pointwise():
    for label, value, slope in (
        (1.0, math.log(1.5), -1 / 3),  # the score ln 2 is a probability of 2/3
        (0.0, math.log(3), 2 / 3),
        (0.75, (3 * math.log(1.5) + math.log(3)) / 4, -1 / 12),
    ):
        score = torch.tensor(LN2, requires_grad=True)
        loss = pointwise(score, torch.tensor(label), margin=2.0)  # which has no effect
        loss.backward()
        assert (loss.item(), score.grad.item()) == pytest.approx((value, slope), abs=1e-6), label


def test_a_loss_is_that_of_each_battle_alone_in_any_shape():
    generator = torch.Generator().manual_seed(0)
    for name, shape in itertools.product(LOSSES, [(), (1,), (7,), (2, 3, 3)]):  # the last: all pairs for two queries
        a, b = torch.randn(2, *shape, generator=generator)
        outcome = torch.randint(3, shape, generator=generator) / 2
        columns = [a, outcome] if name == "pointwise" else [a, b, outcome]
        losses = LOSSES[name](*columns, margin=0.7)
        assert losses.shape == shape, name
        for place in itertools.product(*map(range, shape)):
            alone = LOSSES[name](*(column[place] for column in columns), margin=0.7)
            assert losses[place].item() == pytest.approx(alone.item(), abs=1e-6), (name, shape)
        assert losses.numel() == 1 or losses.unique().numel() > 1, (name, shape)


def test_the_margin_is_part_of_the_probability_of_bpr_alone():
    assert (LOSSES["bpr"], LOSSES["bce"], LOSSES["hinge"]) == (bpr, bce, hinge)
    assert {name: link_margin(name, 0.7) for name in LOSSES} == dict.fromkeys(LOSSES, 0.0) | {"bpr": 0.7}
