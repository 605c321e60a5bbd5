"""Metrics of pairwise routing, from plain arrays of decisive battles.

Throughout, `d` (N,) is score of a - score of b, `outcome` (N,) is 1 where a won and 0 where b won, and a
battle with d = 0 counts one half. A metric that is undefined on the data (N = 0) is None.
"""

from collections.abc import Sequence

import numpy as np

# scikit-learn and scipy are imported inside the functions: `route.py` needs no more than a probability of us.

WEIGHTS_AT_ONCE = 2**22  # of bootstrap samples: 32 MB


def accuracy(d: np.ndarray, outcome: np.ndarray) -> float | None:
    """Share of battles whose winner is scored higher."""
    return float(np.mean(_right(d, outcome))) if len(d) else None


def _right(d: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    return np.where(d == 0, 0.5, (d > 0) == (outcome == 1))  # (N,)


def auc(d: np.ndarray, outcome: np.ndarray) -> float | None:
    """ROC AUC of d against the outcome, over both orientations (d, y) and (-d, 1 - y) of each battle.

    So it does not depend on which of the two was called a, and both classes are always present.
    """
    from sklearn.metrics import roc_auc_score

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
    from sklearn.metrics import precision_recall_fscore_support

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
    that margin means. It is sigmoid(d/T) at margin 0, the right link for every other method, and for any that is
    calibrated: training that stops early is not at that minimum, and a fitted temperature alone reads it better.
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


def log_odds(scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Each model's log-odds (M,) of beating another drawn at random, from scores (M,), M >= 2."""
    from scipy.special import logsumexp

    log_p = log_win_probability(scores[:, None] - scores, temperature=temperature)  # (M, M), row beats column
    np.fill_diagonal(log_p, -np.inf)  # nobody meets itself
    return logsumexp(log_p, axis=1) - logsumexp(log_p, axis=0)  # (M,)


def fit_temperature(d: np.ndarray, outcome: np.ndarray) -> float:
    """The temperature T in [0.01, 100] with the least log loss on these battles; fit it on validation.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    from scipy.optimize import minimize_scalar

    best = minimize_scalar(
        lambda log_t: log_loss(d, outcome, temperature=np.exp(log_t)),
        bounds=np.log([0.01, 100]),
        method="bounded",
    )
    return float(np.exp(best.x))


def reliability(
    d: np.ndarray, outcome: np.ndarray, margin: float = 0.0, temperature: float = 1.0, num_bins: int = 10
) -> dict:
    """`expected_calibration_error`, and `bins` of a reliability diagram, of the probability that the chosen model wins.

    N >= 1. That probability lies in [0.5, 1], which the bins divide evenly; each holds its bounds `low` and `high`,
    `battles`, their mean `probability`, and the share `won` by the chosen model. Bins without battles are left out. The
    error is the mean over battles of |probability - won| of their bins.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    p = np.exp(log_win_probability(np.abs(d), margin, temperature))  # (N,)
    right = _right(d, outcome)  # (N,)
    edges = np.linspace(0.5, 1, num_bins + 1).round(6)  # (num_bins + 1,)
    place = np.digitize(p, edges[1:-1])  # (N,)
    bins = []
    for k in np.unique(place):
        inside = place == k  # (N,)
        means = {"probability": float(p[inside].mean()), "won": float(right[inside].mean())}
        bins.append({"low": float(edges[k]), "high": float(edges[k + 1]), "battles": int(inside.sum())} | means)
    error = sum(part["battles"] * abs(part["probability"] - part["won"]) for part in bins) / len(d)
    return {"expected_calibration_error": float(error), "bins": bins}


def route(scores: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What choosing the highest-scored model gets on each row of a score table: its score, and whether none is better.

    `scores` (R, M), or (1, M) for all rows; `table` (R, M), NaN where a model is not to be had. Returns (R,) each, the
    second 1 or 0; where several scores are the highest, the mean over their models.
    """
    offered = np.where(np.isnan(table), -np.inf, scores)  # (R, M)
    chosen = offered == offered.max(1, keepdims=True)  # (R, M)
    is_best = table == np.nanmax(table, 1, keepdims=True)  # (R, M)
    num_chosen = chosen.sum(1)  # (R,)
    return np.where(chosen, table, 0).sum(1) / num_chosen, (chosen & is_best).sum(1) / num_chosen


def gap_closed(score: np.ndarray, single: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """Share of the way from what the best single model gets to what an oracle gets; NaN where that is no more."""
    way, whole = np.subtract(score, single), np.subtract(oracle, single)
    return np.divide(way, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


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


def bootstrap_weights(query_idx: np.ndarray, seed: int, resamples: int = 1000) -> np.ndarray:
    """How often each of N battles stands in each of R bootstrap samples of their queries: int (R, N).

    Queries are drawn and not battles, as the battles of one query are not independent.
    """
    _, row = np.unique(query_idx, return_inverse=True)  # (N,), into the Q queries
    num_queries = row.max(initial=-1) + 1
    drawn = np.random.default_rng(seed).integers(num_queries, size=(resamples, num_queries))  # (R, Q)
    cells = drawn + num_queries * np.arange(resamples)[:, None]  # (R, Q), into the flattened counts
    counts = np.bincount(cells.ravel(), minlength=resamples * num_queries).reshape(resamples, num_queries)  # (R, Q)
    return counts.astype(np.min_scalar_type(counts.max(initial=0)))[:, row]  # (R, N)


def evaluate_resamples(
    d: np.ndarray,
    outcome: np.ndarray,
    model_a_idx: np.ndarray,
    model_b_idx: np.ndarray,
    weights: np.ndarray,
    margin: float = 0.0,
    temperature: float = 1.0,
) -> dict[str, np.ndarray]:
    """The metrics of `evaluate`, and log_loss_calibrated at the temperature, on each of R samples: (R,) each.

    `weights` (R, N) are those of `bootstrap_weights`, N >= 1. Two methods on the same weights are paired.
    """
    from scipy.sparse import coo_array

    lead = np.where(outcome == 1, d, -d)  # (N,) of the winner
    order = np.argsort(lead)  # (N,)
    lead, won = lead[order], np.where(outcome == 1, model_a_idx, model_b_idx)[order]  # (N,) each
    lost = np.where(outcome == 1, model_b_idx, model_a_idx)[order]  # (N,)
    # The winner of battle i outscores the loser of battle j where lead j is above -lead i; an equality is one half.
    below, up_to = np.searchsorted(lead, -lead, "left"), np.searchsorted(lead, -lead, "right")  # (N,) each
    right = 0.5 * (1 + np.sign(lead))  # (N,), 1 where the winner is chosen
    means = {
        "accuracy": right,
        "log_loss": -log_win_probability(lead, margin),
        "log_loss_calibrated": -log_win_probability(lead, temperature=temperature),
    }
    shape = len(lead), max(won.max(), lost.max()) + 1
    rows = np.arange(len(lead))
    hits = coo_array((right, (rows, won)), shape)  # (N, M), as are the next two
    is_winner = coo_array((np.ones(len(lead)), (rows, won)), shape)
    chosen = hits + coo_array((1 - right, (rows, lost)), shape)

    parts = []
    for some in np.array_split(weights, -(-weights.size // WEIGHTS_AT_ONCE)):
        weight = some[:, order].astype(np.float64)  # (r, N)
        total = weight.sum(1)  # (r,)
        part = {name: weight @ value / total for name, value in means.items()}  # (r,) each
        cumulated = np.pad(weight.cumsum(1), ((0, 0), (1, 0)))  # (r, N + 1)
        losses = np.einsum("rn,rn->r", weight, cumulated[:, below] + cumulated[:, up_to])  # (r,)
        part["auc"] = 1 - losses / (2 * total**2)
        h, w, c = (weight @ matrix.tocsr() for matrix in (hits, is_winner, chosen))  # (r, M) each
        classes = np.maximum((w + c > 0).sum(1), 1)  # (r,)
        for name, numerator, denominator in (("precision", h, c), ("recall", h, w), ("f1", 2 * h, w + c)):
            per_model = np.divide(numerator, denominator, out=np.zeros_like(h), where=denominator > 0)  # (r, M)
            part[name] = per_model.sum(1) / classes  # (r,)
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def interval(values: np.ndarray) -> list[float] | None:
    """The 95 % percentile interval [low, high] of a metric's values (R,) on bootstrap samples, NaN left out."""
    values = values[~np.isnan(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else None


def seeds_interval(differences: Sequence[float], test_by_train: float) -> list[float]:
    """The 95 % interval [low, high] of a mean difference over S >= 2 seeds, each with a split of its own.

    mean ± t s sqrt(1/S + n_test/n_train): training sets that overlap make the S differences (S,) dependent, which the
    second term corrects; `test_by_train` is n_test/n_train.
    Source: Nadeau and Bengio, "Inference for the Generalization Error", Machine Learning 2003.
    """
    from scipy.special import stdtrit

    count = len(differences)
    half = stdtrit(count - 1, 0.975) * np.std(differences, ddof=1) * np.sqrt(1 / count + test_by_train)
    mean = np.mean(differences)
    return [float(mean - half), float(mean + half)]
