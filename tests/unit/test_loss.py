"""Losses against values and gradients worked out by hand."""

import itertools
import math

import pytest
import torch

from loss import LOSSES, bce, bpr, hinge, link_margin

LN2 = math.log(2)


def value_and_gradient(loss, a, b, outcome, **options):
    a, b = torch.tensor([a], requires_grad=True), torch.tensor([b], requires_grad=True)
    value = loss(a, b, torch.tensor([outcome]), **options)
    value.sum().backward()
    return value.item(), a.grad.item(), b.grad.item()


@pytest.mark.parametrize(
    ("a", "b", "outcome", "margin", "value", "slope"),
    [
        (0.0, 0.0, 1.0, 0.0, LN2, -0.5),  # softplus(0); -sigmoid(0)
        (2.0, 2.0, 0.0, 0.0, LN2, 0.5),
        (LN2, 0.0, 1.0, 0.0, math.log(1.5), -1 / 3),  # log(1 + 1/2); -sigmoid(-ln 2)
        (LN2, 0.0, 0.0, 0.0, math.log(3), 2 / 3),  # log(1 + 2); sigmoid(ln 2)
        (0.0, 0.0, 1.0, LN2, math.log(3), -2 / 3),  # the margin counts against the winner
        (0.0, 0.0, 0.0, LN2, math.log(3), 2 / 3),  # whichever side it is
        (LN2, 0.0, 0.5, 0.0, (math.log(1.5) + math.log(3)) / 2, 1 / 6),
        (1.0, 1.0, 0.5, 1.0, math.log(1 + math.e), 0.0),
    ],
)
def test_bpr(a, b, outcome, margin, value, slope):
    got = value_and_gradient(bpr, a, b, outcome, margin=margin)
    assert got == pytest.approx((value, slope, -slope), abs=1e-6)


@pytest.mark.parametrize("margin", [0.0, 2.0])  # which has no effect
@pytest.mark.parametrize(
    ("a", "b", "outcome", "value", "slope_a", "slope_b"),
    [
        (0.0, 0.0, 1.0, LN2, -0.25, 0.25),  # each score is a logit of its own
        (LN2, 0.0, 1.0, (math.log(1.5) + LN2) / 2, -1 / 6, 0.25),
        (LN2, LN2, 0.0, (math.log(3) + math.log(1.5)) / 2, 1 / 3, -1 / 6),
        (LN2, 0.0, 0.5, (math.log(3) - LN2 / 2 + LN2) / 2, 1 / 12, 0.0),  # labels of 0.5: softplus(ln 2) - ln 2 / 2
    ],
)
def test_bce(a, b, outcome, margin, value, slope_a, slope_b):
    got = value_and_gradient(bce, a, b, outcome, margin=margin)
    assert got == pytest.approx((value, slope_a, slope_b), abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "outcome", "margin", "value", "slope"),
    [
        (0.5, 0.0, 1.0, 1.0, 0.5, -1.0),
        (2.0, 0.0, 1.0, 1.0, 0.0, 0.0),  # the winner leads by more than the margin
        (2.0, 0.0, 0.0, 1.0, 3.0, 1.0),
        (0.5, 0.0, 0.5, 1.0, 1.0, 0.0),  # (0.5 + 1.5) / 2
    ],
)
def test_hinge(a, b, outcome, margin, value, slope):
    got = value_and_gradient(hinge, a, b, outcome, margin=margin)
    assert got == pytest.approx((value, slope, -slope), abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 3)])  # (2, 3, 3): all pairs of three models for two queries
def test_a_loss_is_that_of_each_battle_alone_in_any_shape(name, shape):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, *shape, generator=generator)
    outcome = torch.randint(3, shape, generator=generator) / 2
    losses = LOSSES[name](a, b, outcome, margin=0.7)
    assert losses.shape == shape
    for place in itertools.product(*map(range, shape)):
        alone = LOSSES[name](a[place], b[place], outcome[place], margin=0.7)
        assert losses[place].item() == pytest.approx(alone.item(), abs=1e-6)
    assert len(shape) == 0 or losses.numel() == 1 or losses.unique().numel() > 1


def test_bpr_is_finite_and_not_flat_far_from_zero():
    value, slope, _ = value_and_gradient(bpr, -200.0, 200.0, 1.0, margin=1.0)
    assert (value, slope) == pytest.approx((401.0, -1.0))


def test_the_loss_flag_offers_exactly_the_table_of_losses(fails):
    assert {"bpr": bpr, "bce": bce, "hinge": hinge} == LOSSES
    assert fails("--loss_type", "nothing").endswith(f"expected one of {', '.join(LOSSES)}")


def test_the_margin_is_part_of_the_probability_of_bpr_alone():
    assert {name: link_margin(name, 0.7) for name in LOSSES} == {"bpr": 0.7, "bce": 0.0, "hinge": 0.0}
