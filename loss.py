"""Losses of a battle from the scores of its two models: BPR, BCE and hinge; and the pointwise one, of a single score.

Those of a battle take float tensors of one shape, whatever that is: `score_a`, `score_b`, and `outcome`, P(a is
better): 1, 0, or 0.5 for a tie, half a win for each; and `margin` >= 0, in units of the score. Each returns the loss of
every battle, a tensor of that shape; training takes the mean. d stands for score_a - score_b. A new one is written here
alone.
"""

import torch
import torch.nn.functional as F


def bpr(score_a: torch.Tensor, score_b: torch.Tensor, outcome: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """Bayesian personalized ranking: -log sigmoid(s_winner - s_loser - margin).

    y softplus(margin - d) + (1 - y) softplus(margin + d); ln 2 at d = 0 and margin 0. The margin is the lead that a
    winner should have.
    Source: Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009; the margin is
    RankRouter's.
    """
    d = score_a - score_b
    return outcome * F.softplus(margin - d) + (1 - outcome) * F.softplus(margin + d)


def bce(score_a: torch.Tensor, score_b: torch.Tensor, outcome: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """Pointwise binary cross-entropy: each score is the logit of "this model wins"; mean over the two models.

    The winner's label is 1, the loser's 0, both 0.5 in a tie. A label has no margin: `margin` is ignored.
    """
    loss_a = F.binary_cross_entropy_with_logits(score_a, outcome, reduction="none")
    loss_b = F.binary_cross_entropy_with_logits(score_b, 1 - outcome, reduction="none")
    return (loss_a + loss_b) / 2


def hinge(score_a: torch.Tensor, score_b: torch.Tensor, outcome: torch.Tensor, margin: float = 1.0) -> torch.Tensor:
    """Margin ranking loss: y max(0, margin - d) + (1 - y) max(0, margin + d); zero once the winner leads by it.

    Source: Joachims, "Optimizing Search Engines using Clickthrough Data", KDD 2002.
    """
    d = score_a - score_b
    return outcome * F.relu(margin - d) + (1 - outcome) * F.relu(margin + d)


def pointwise(score: torch.Tensor, label: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """Binary cross-entropy of single scores: the logits of labels in [0, 1], such as "this model answers right".

    It takes one score and its label, from the score table, in tensors of one shape; `margin` is ignored.
    """
    return F.binary_cross_entropy_with_logits(score, label, reduction="none")


LOSSES = {"bpr": bpr, "bce": bce, "hinge": hinge, "pointwise": pointwise}  # what --loss_type names


def link_margin(loss_type: str, margin: float) -> float:
    """The margin that `metrics.log_win_probability` needs before calibration: that of BPR shifts its minimum by it."""
    return margin if loss_type == "bpr" else 0.0
