"""Losses against values and gradients worked out by hand."""

import math

import pytest
import torch

from loss import bce_loss, bpr_loss, hinge_loss

LN2 = math.log(2)


def value_and_gradient(loss, a, b, outcome, **options):
    a, b = torch.tensor([a], requires_grad=True), torch.tensor([b], requires_grad=True)
    value = loss(a, b, torch.tensor([outcome]), **options)
    value.backward()
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
    got = value_and_gradient(bpr_loss, a, b, outcome, margin=margin)
    assert got == pytest.approx((value, slope, -slope), abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "outcome", "value", "slope_a", "slope_b"),
    [
        (0.0, 0.0, 1.0, LN2, -0.25, 0.25),  # each score is a logit of its own
        (LN2, 0.0, 1.0, (math.log(1.5) + LN2) / 2, -1 / 6, 0.25),
        (LN2, LN2, 0.0, (math.log(3) + math.log(1.5)) / 2, 1 / 3, -1 / 6),
        (LN2, 0.0, 0.5, (math.log(3) - LN2 / 2 + LN2) / 2, 1 / 12, 0.0),  # labels of 0.5: softplus(ln 2) - ln 2 / 2
    ],
)
def test_bce(a, b, outcome, value, slope_a, slope_b):
    assert value_and_gradient(bce_loss, a, b, outcome) == pytest.approx((value, slope_a, slope_b), abs=1e-6)


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
    got = value_and_gradient(hinge_loss, a, b, outcome, margin=margin)
    assert got == pytest.approx((value, slope, -slope), abs=1e-6)


def test_losses_are_means_over_the_batch():
    a, b, outcome = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, 0.5], [1.0, 0.0, 0.5]])
    for loss in (bpr_loss, bce_loss, hinge_loss):
        each = [loss(a[i : i + 1], b[i : i + 1], outcome[i : i + 1]).item() for i in range(3)]
        assert loss(a, b, outcome).item() == pytest.approx(sum(each) / 3, abs=1e-6)


def test_bpr_is_finite_and_not_flat_far_from_zero():
    value, slope, _ = value_and_gradient(bpr_loss, -200.0, 200.0, 1.0, margin=1.0)
    assert (value, slope) == pytest.approx((401.0, -1.0))
