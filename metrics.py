"""Metrics of pairwise routing, computed from plain arrays of decisive battles.

Throughout, `d` (N,) is score of a - score of b, `outcome` (N,) is 1 where a won and 0 where b won, and a battle with
d = 0 counts one half. `weights` (R, N) count how often each battle occurs in each of R bootstrap samples: with them
(N >= 1) a metric is an array (R,), without them a float, or None where it is undefined (N = 0).
"""

from collections.abc import Sequence

import numpy as np

# scipy is imported inside the functions: `route.py` needs only a probability from this file.

WEIGHTS_AT_ONCE = 2**18  # entries of the bootstrap weights: 2 MB as float64, about a core's cache

Metric = float | np.ndarray | None
Weights = np.ndarray | None


def accuracy(d: np.ndarray, outcome: np.ndarray, weights: Weights = None) -> Metric:
    """Share of battles whose winner is scored higher."""
    return _mean(_is_correct(d, outcome), weights)


def _is_correct(d: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    return np.where(d == 0, 0.5, (d > 0) == (outcome == 1))  # (N,)


def _mean(values: np.ndarray, weights: Weights) -> Metric:
    if weights is None:
        return float(values.mean()) if len(values) else None
    sums = [chunk.astype(np.float64) @ values for chunk in _chunks(weights)]  # (r,) each
    return np.concatenate(sums) / weights.sum(1)  # (R,)


def _chunks(weights: np.ndarray) -> list[np.ndarray]:
    """Weights (R, N) in parts (r, N), of which a float64 copy is small."""
    return np.array_split(weights, -(-weights.size // WEIGHTS_AT_ONCE))


def auc(d: np.ndarray, outcome: np.ndarray, weights: Weights = None) -> Metric:
    """ROC AUC of d against the outcome, over both orientations (d, y) and (-d, 1 - y) of each battle.

    The winner of battle i leads by l_i, so the positives are the l_i and the negatives the -l_j: the AUC is
    P(l_i > -l_j) + P(l_i = -l_j) / 2 over all pairs (i, j). It does not depend on which of the two models is a, and
    both classes are always present. Raises `ValueError` where a d is not finite.
    """
    if len(d) == 0:
        return None
    if not np.isfinite(d).all():
        raise ValueError("expected finite differences of scores")
    lead = np.where(outcome == 1, d, -d)  # (N,)
    order = np.argsort(lead)  # (N,)
    lead = lead[order]  # (N,)
    # Of the pairs with winner i, those with l_j < -l_i are lost; those with l_j = -l_i count one half.
    fewer, at_most = np.searchsorted(lead, -lead, "left"), np.searchsorted(lead, -lead, "right")  # (N,) each
    if weights is None:
        return float(1 - (fewer + at_most).sum() / (2 * len(lead) ** 2))
    parts = []
    for chunk in _chunks(weights):
        weight = chunk.take(order, axis=1).astype(np.float64)  # (r, N)
        cumulative = np.pad(weight.cumsum(1), ((0, 0), (1, 0)))  # (r, N + 1), weight of the first n battles
        twice_lost = cumulative.take(fewer, axis=1) + cumulative.take(at_most, axis=1)  # (r, N)
        lost = np.einsum("rn,rn->r", weight, twice_lost) / 2  # (r,)
        parts.append(1 - lost / cumulative[:, -1] ** 2)  # (r,)
    return np.concatenate(parts)  # (R,)


def precision_recall_f1(
    d: np.ndarray, outcome: np.ndarray, model_a_idx: np.ndarray, model_b_idx: np.ndarray, weights: Weights = None
) -> tuple[Metric, Metric, Metric]:
    """Macro precision, recall and F1 over models: the model chosen from the two, against the model that won.

    The classes are all models that won or were chosen; a division by zero counts as 0. A battle with d = 0
    chooses each of its models with weight one half.
    """
    from scipy.sparse import coo_array

    if len(d) == 0:
        return None, None, None
    won = np.where(outcome == 1, model_a_idx, model_b_idx)  # (N,)
    lost = np.where(outcome == 1, model_b_idx, model_a_idx)  # (N,)
    correct, battle, num_models = _is_correct(d, outcome), np.arange(len(d)), max(won.max(), lost.max()) + 1
    # What each battle adds to its models' hits (chosen and won), wins, and choices: three blocks of columns.
    columns = np.concatenate([won, num_models + won, 2 * num_models + won, 2 * num_models + lost])  # (4N,)
    values = np.concatenate([correct, np.ones(len(d)), correct, 1 - correct])  # (4N,)
    counts = coo_array((values, (np.tile(battle, 4), columns)), (len(d), 3 * num_models)).tocsr()  # (N, 3M)
    samples = np.ones((1, len(d))) if weights is None else weights  # (R, N)
    sums = np.concatenate([chunk.astype(np.float64) @ counts for chunk in _chunks(samples)])  # (R, 3M)
    hits, wins, chosen = np.split(sums, 3, axis=1)  # (R, M) each
    num_classes = (wins + chosen > 0).sum(1)  # (R,)
    results = []
    for numerator, denominator in ((hits, chosen), (hits, wins), (2 * hits, wins + chosen)):
        per_model = np.divide(numerator, denominator, out=np.zeros_like(hits), where=denominator > 0)  # (R, M)
        results.append(per_model.sum(1) / num_classes)  # (R,)
    return tuple(float(values[0]) if weights is None else values for values in results)


def log_win_probability(d: np.ndarray, margin: float = 0.0, temperature: float = 1.0) -> np.ndarray:
    """Log probability (N,) that a wins.

    p = sigmoid(margin + d/T) / (sigmoid(margin + d/T) + sigmoid(margin - d/T)), the probability at which the expected
    BPR loss with that margin is least. At margin 0 it is sigmoid(d/T): the right link for every other method, and for
    every calibrated one, since training that stops early does not reach that minimum and a fitted temperature alone
    predicts better.
    """
    for_a = -np.logaddexp(0, -(margin + d / temperature))  # log sigmoid, which does not overflow
    for_b = -np.logaddexp(0, -(margin - d / temperature))
    return for_a - np.logaddexp(for_a, for_b)


def log_loss(
    d: np.ndarray, outcome: np.ndarray, margin: float = 0.0, temperature: float = 1.0, weights: Weights = None
) -> Metric:
    """Mean -log probability of the winner, in nats; ln 2 where all scores are equal."""
    lead = np.where(outcome == 1, d, -d)  # (N,) of the winner
    return _mean(-log_win_probability(lead, margin, temperature), weights)


def log_odds(scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Each model's log-odds (M,) of beating another drawn at random, from scores (M,), M >= 2."""
    from scipy.special import logsumexp

    log_p = log_win_probability(scores[:, None] - scores, temperature=temperature)  # (M, M), row beats column
    np.fill_diagonal(log_p, -np.inf)  # no model meets itself
    return logsumexp(log_p, axis=1) - logsumexp(log_p, axis=0)  # (M,)


def fit_temperature(d: np.ndarray, outcome: np.ndarray) -> float:
    """The temperature T in [0.01, 100] with the least log loss on these battles, to be fitted on validation.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    from scipy.optimize import minimize_scalar

    best = minimize_scalar(lambda log_t: log_loss(d, outcome, temperature=np.exp(log_t)), bounds=np.log([0.01, 100]))
    return float(np.exp(best.x))


def reliability(
    d: np.ndarray, outcome: np.ndarray, margin: float = 0.0, temperature: float = 1.0, num_bins: int = 10
) -> dict:
    """Expected calibration error and reliability diagram of the probability that the chosen model wins; N >= 1.

    That probability lies in [0.5, 1], which is divided into `num_bins` bins of equal width. Returns the mean over
    battles of |probability - won| of their bin as `expected_calibration_error`, and `bins`, each with its bounds `low`
    and `high`, the number of its `battles`, their mean `probability`, and the share `won` by the chosen model. Bins
    without battles are left out.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    p = np.exp(log_win_probability(np.abs(d), margin, temperature))  # (N,)
    correct = _is_correct(d, outcome)  # (N,)
    edges = np.linspace(0.5, 1, num_bins + 1).round(6)  # (num_bins + 1,)
    bin_idx = np.digitize(p, edges[1:-1])  # (N,)
    bins = []
    for k in np.unique(bin_idx):
        inside = bin_idx == k  # (N,)
        means = {"probability": float(p[inside].mean()), "won": float(correct[inside].mean())}
        bins.append({"low": float(edges[k]), "high": float(edges[k + 1]), "battles": int(inside.sum())} | means)
    error = sum(part["battles"] * abs(part["probability"] - part["won"]) for part in bins) / len(d)
    return {"expected_calibration_error": float(error), "bins": bins}


def route(scores: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Routes each row of a score table to the model with the highest router score.

    `scores` (R, M) are the router's, or (1, M) for all rows; `table` (R, M) has NaN where a model is unavailable.
    Returns the table's score of the chosen model and whether it is a best one of the row, 1 or 0: (R,) each. Where
    several models have the highest router score, both are means over them.
    """
    available = np.where(np.isnan(table), -np.inf, scores)  # (R, M)
    chosen = available == available.max(1, keepdims=True)  # (R, M)
    is_best = table == np.nanmax(table, 1, keepdims=True)  # (R, M)
    num_chosen = chosen.sum(1)  # (R,)
    return np.where(chosen, table, 0).sum(1) / num_chosen, (chosen & is_best).sum(1) / num_chosen


def gap_closed(score: np.ndarray, single: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """(score - single) / (oracle - single), the share of the gap that routing closes; NaN where there is no gap.

    `score`, `single` and `oracle` are the mean scores of the router, the best single model and the oracle.
    """
    gain, gap = np.subtract(score, single), np.subtract(oracle, single)
    return np.divide(gain, gap, out=np.full(np.shape(gap), np.nan), where=gap > 0)


def evaluate(
    d: np.ndarray,
    outcome: np.ndarray,
    model_a_idx: np.ndarray,
    model_b_idx: np.ndarray,
    margin: float = 0.0,
    weights: Weights = None,
) -> dict[str, Metric]:
    """All metrics of N decisive battles: accuracy, precision, recall, f1, auc, log_loss (at temperature 1).

    `margin` is that of the BPR loss in training, and 0 for every other method (see `log_win_probability`).
    """
    d = np.asarray(d, dtype=np.float64)
    precision, recall, f1 = precision_recall_f1(d, outcome, model_a_idx, model_b_idx, weights)
    return {
        "accuracy": accuracy(d, outcome, weights),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "auc": auc(d, outcome, weights),
        "log_loss": log_loss(d, outcome, margin, weights=weights),
    }


def bootstrap_weights(query_idx: np.ndarray, seed: int, resamples: int = 1000) -> np.ndarray:
    """How often each of N battles occurs in each of R bootstrap samples of their queries: int (R, N).

    Queries are drawn rather than battles, because the battles of one query are not independent.
    """
    _, row = np.unique(query_idx, return_inverse=True)  # (N,), into the Q queries
    num_queries = row.max(initial=-1) + 1
    drawn = np.random.default_rng(seed).integers(num_queries, size=(resamples, num_queries))  # (R, Q)
    cells = drawn + num_queries * np.arange(resamples)[:, None]  # (R, Q), into the flattened counts
    counts = np.bincount(cells.ravel(), minlength=resamples * num_queries).reshape(resamples, num_queries)  # (R, Q)
    return counts.astype(np.min_scalar_type(counts.max(initial=0))).take(row, axis=1)  # (R, N)


def evaluate_resamples(
    d: np.ndarray,
    outcome: np.ndarray,
    model_a_idx: np.ndarray,
    model_b_idx: np.ndarray,
    weights: np.ndarray,
    margin: float = 0.0,
    temperature: float = 1.0,
) -> dict[str, np.ndarray]:
    """The metrics of `evaluate`, and log_loss_calibrated at the temperature, on each of R bootstrap samples: (R,) each.

    `weights` (R, N) are those of `bootstrap_weights`, N >= 1. Two methods evaluated with the same weights are paired.
    """
    calibrated = log_loss(d, outcome, temperature=temperature, weights=weights)
    return evaluate(d, outcome, model_a_idx, model_b_idx, margin, weights) | {"log_loss_calibrated": calibrated}


def interval(values: np.ndarray) -> list[float] | None:
    """The 95 % percentile interval [low, high] of a metric's values (R,) on bootstrap samples, without NaN."""
    values = values[~np.isnan(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else None


def intervals(samples: dict[str, np.ndarray]) -> dict[str, list[float] | None]:
    """The `interval` of each metric, from its values (R,)."""
    return {name: interval(values) for name, values in samples.items()}


def seeds_interval(differences: Sequence[float], test_by_train: float) -> list[float]:
    """The 95 % interval [low, high] of a mean difference over S >= 2 seeds, each with a split of its own.

    mean ± t s sqrt(1/S + n_test/n_train), where `test_by_train` is n_test/n_train: overlapping training sets make the
    S differences (S,) dependent, which the second term corrects.
    Source: Nadeau and Bengio, "Inference for the Generalization Error", Machine Learning 2003.
    """
    from scipy.special import stdtrit

    count = len(differences)
    half = stdtrit(count - 1, 0.975) * np.std(differences, ddof=1) * np.sqrt(1 / count + test_by_train)
    return (np.mean(differences) + half * np.array([-1, 1])).tolist()
