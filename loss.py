"""Losses of a battle from the scores of its two models: BPR, BCE and hinge.

All take `score_a` and `score_b`, float tensors (B,), and `outcome`, a float tensor (B,) with P(a is better):
1, 0, or 0.5 for a tie. All return the mean over the batch as a scalar tensor, and treat a tie as half a win of
each side. d stands for score_a - score_b.
"""

import torch
import torch.nn.functional as F


def bpr_loss(score_a: torch.Tensor, score_b: torch.Tensor, outcome: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """Bayesian personalised ranking: -log sigmoid(s_winner - s_loser - margin).

    y softplus(margin - d) + (1 - y) softplus(margin + d); ln 2 at d = 0 and margin 0. `margin` is in units of
    the score and is the lead that a winner is asked to have.
    Source: Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009; the margin is
    RankRouter's.
    """
    d = score_a - score_b
    return (outcome * F.softplus(margin - d) + (1 - outcome) * F.softplus(margin + d)).mean()


def bce_loss(score_a: torch.Tensor, score_b: torch.Tensor, outcome: torch.Tensor) -> torch.Tensor:
    """Pointwise binary cross-entropy: each score is the logit of "this model wins"; mean over the two.

    The winner's label is 1, the loser's 0, both 0.5 in a tie.
    """
    return (
        F.binary_cross_entropy_with_logits(score_a, outcome) + F.binary_cross_entropy_with_logits(score_b, 1 - outcome)
    ) / 2


def hinge_loss(
    score_a: torch.Tensor, score_b: torch.Tensor, outcome: torch.Tensor, margin: float = 1.0
) -> torch.Tensor:
    """Margin ranking loss: y max(0, margin - d) + (1 - y) max(0, margin + d); zero once the winner leads by it.

    Source: Joachims, "Optimizing Search Engines using Clickthrough Data", KDD 2002.
    """
    d = score_a - score_b
    return (outcome * F.relu(margin - d) + (1 - outcome) * F.relu(margin + d)).mean()
