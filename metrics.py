"""Metrics of pairwise routing, from plain arrays of decisive battles.

Throughout, `d` (N,) is score of a - score of b, `outcome` (N,) is 1 where a won and 0 where b won, and a
battle with d = 0 counts one half. A metric that is undefined on the data (N = 0) is None.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score


def accuracy(d: np.ndarray, outcome: np.ndarray) -> float | None:
    """Share of battles whose winner is scored higher."""
    if len(d) == 0:
        return None
    return float(np.mean(np.where(d == 0, 0.5, (d > 0) == (outcome == 1))))


def auc(d: np.ndarray, outcome: np.ndarray) -> float | None:
    """ROC AUC of d against the outcome, over both orientations (d, y) and (-d, 1 - y) of each battle.

    So it does not depend on which of the two was called a, and both classes are always present.
    """
    if len(d) == 0:
        return None
    both_outcomes = np.concatenate([outcome, 1 - outcome])  # (2N,)
    both_d = np.concatenate([d, -d])  # (2N,)
    return float(roc_auc_score(both_outcomes, both_d))


def precision_recall_f1(
    d: np.ndarray, outcome: np.ndarray, model_a_idx: np.ndarray, model_b_idx: np.ndarray
) -> tuple[float | None, float | None, float | None]:
    """Macro precision, recall and F1 over models: the model chosen of the two, against the model that won.

    The classes are all models that won or were chosen; a division by zero counts as 0. A battle with d = 0
    chooses each of its models with weight one half.
    """
    if len(d) == 0:
        return None, None, None
    won = np.where(outcome == 1, model_a_idx, model_b_idx)
    if_a_takes_ties = np.where(d >= 0, model_a_idx, model_b_idx)
    if_b_takes_ties = np.where(d > 0, model_a_idx, model_b_idx)
    precision, recall, f1, _ = precision_recall_fscore_support(
        np.concatenate([won, won]),  # (2N,)
        np.concatenate([if_a_takes_ties, if_b_takes_ties]),  # (2N,)
        sample_weight=np.full(2 * len(d), 0.5),
        average="macro",
        zero_division=0,
    )
    return float(precision), float(recall), float(f1)


def log_win_probability(d: np.ndarray, margin: float = 0.0, temperature: float = 1.0) -> np.ndarray:
    """Log probability (N,) that a wins, read off its lead d in score.

    p = sigmoid(margin + d/T) / (sigmoid(margin + d/T) + sigmoid(margin - d/T)): what the minimum of BPR with
    that margin means. It is sigmoid(d/T) at margin 0, the right link for every other method.
    """
    for_a = -np.logaddexp(0, -(margin + d / temperature))  # log sigmoid, which does not overflow
    for_b = -np.logaddexp(0, -(margin - d / temperature))
    return for_a - np.logaddexp(for_a, for_b)


def log_loss(d: np.ndarray, outcome: np.ndarray, margin: float = 0.0, temperature: float = 1.0) -> float | None:
    """Mean -log probability of the winner, in nats; ln 2 for a scorer that knows nothing."""
    if len(d) == 0:
        return None
    winner_lead = np.where(outcome == 1, d, -d)
    return float(-np.mean(log_win_probability(winner_lead, margin, temperature)))


def fit_temperature(d: np.ndarray, outcome: np.ndarray, margin: float = 0.0) -> float:
    """The temperature T in [0.01, 100] with the least log loss on these battles; fit it on validation.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    best = minimize_scalar(
        lambda log_t: log_loss(d, outcome, margin, np.exp(log_t)),
        bounds=np.log([0.01, 100]),
        method="bounded",
    )
    return float(np.exp(best.x))


def evaluate(
    d: np.ndarray,
    outcome: np.ndarray,
    model_a_idx: np.ndarray,
    model_b_idx: np.ndarray,
    margin: float = 0.0,
) -> dict[str, float | None]:
    """All metrics of N decisive battles: accuracy, precision, recall, f1, auc, log_loss (at temperature 1).

    `margin` is the one that BPR trained with, and 0 for every other method (see `log_win_probability`).
    """
    d = np.asarray(d, dtype=np.float64)
    precision, recall, f1 = precision_recall_f1(d, outcome, model_a_idx, model_b_idx)
    return {
        "accuracy": accuracy(d, outcome),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "auc": auc(d, outcome),
        "log_loss": log_loss(d, outcome, margin),
    }
