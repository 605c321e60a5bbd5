"""Metrics of pairwise routing, and of quality and cost on score tables, computed from plain arrays.

Of battles, `d` (N,) is score of a - score of b, `outcome` (N,) is 1 where a won and 0 where b won, and a battle with
d = 0 counts one half. Metrics are floats, or None where they are undefined (N = 0).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

# scipy is imported inside the functions: `route.py` needs only a probability from this file.

SAMPLES_AT_ONCE = 128  # bootstrap samples whose weights are there as float64
SUMS = ("battles", "correct", "log_loss", "log_loss_calibrated")  # of `Totals`, by query
CLASS_SUMS = ("hits", "wins", "chosen")  # by query and model; a hit is a battle whose model was chosen and won
GAP_SHARES = (0.2, 0.5, 0.8)  # of CPT
CERTAIN = 1000.0  # log-odds by which a fallback leads at a confidence of 1: finite, so that prices still count
LEAD_BINS = 4096  # bins of the winner's lead on each side of 0, for the AUC of bootstrap samples

Metric = float | None


def is_correct(d: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Whether the winner of each battle is scored higher, (N,): 1, 0, or 0.5 where d = 0."""
    return np.where(d == 0, 0.5, (d > 0) == (outcome == 1))  # (N,)


def auc(d: np.ndarray, outcome: np.ndarray) -> Metric:
    """ROC AUC of d against the outcome, over both orientations (d, y) and (-d, 1 - y) of each battle.

    The winner of battle i leads by l_i, so the positives are the l_i and the negatives the -l_j: the AUC is
    P(l_i > -l_j) + P(l_i = -l_j) / 2 over all pairs (i, j). It does not depend on which of the two models is a, and
    both classes are always present. Raises `ValueError` where a d is not finite.
    """
    return auc_of_leads(np.where(outcome == 1, d, -d))


def auc_of_leads(lead: np.ndarray) -> Metric:
    """The `auc` from the winners' leads (N,)."""
    if len(lead) == 0:
        return None
    if not np.isfinite(lead).all():
        raise ValueError("expected finite differences of scores")
    lead = np.sort(lead)  # (N,)
    # Of the pairs with winner i, those with l_j < -l_i are lost; those with l_j = -l_i count one half.
    lost = 0
    for some in np.array_split(lead, len(lead) // 2**20 + 1):  # (n,) each
        lost += int(np.searchsorted(lead, -some, "left").sum()) + int(np.searchsorted(lead, -some, "right").sum())
    return float(1 - lost / (2 * len(lead) ** 2))


def lead_bins(d: np.ndarray) -> np.ndarray:
    """Upper ends of bins of |d| > 0, for `Totals`: its values, or `LEAD_BINS` quantiles of them if there are more."""
    values = np.unique(np.abs(d[d != 0])) if d.any() else np.ones(1)
    return values if len(values) <= LEAD_BINS else np.unique(np.quantile(values, np.linspace(0, 1, LEAD_BINS + 1)[1:]))


class Totals:
    """Sums over decisive battles, in S weighted samples of their queries; all metrics follow from them.

    Battles are added list by list, so that those of a large score table are never listed at once.

    Args:
        weights: how often each of Q queries occurs in each sample, (S, Q).
        num_models: M.
        margin: that of the BPR loss in training, and 0 for every other method (see `log_win_probability`).
        temperature: at which scores are calibrated.
        bins: those of `lead_bins`, for the AUC; None leaves it out.
    """

    def __init__(
        self,
        weights: np.ndarray,
        num_models: int,
        margin: float = 0.0,
        temperature: float = 1.0,
        bins: np.ndarray | None = None,
    ):
        self.weights, self.num_models, self.bins = weights, num_models, bins
        self.margin, self.temperature = margin, temperature
        self.sums = {name: np.zeros(weights.shape[1]) for name in SUMS}  # (Q,) each
        self.by_model = {name: np.zeros((weights.shape[1], num_models)) for name in CLASS_SUMS}  # (Q, M) each
        # By sample: battles by their winner's lead, in bins from the most negative to the most positive one.
        self.leads = None if bins is None else np.zeros((2 * len(bins) + 1, len(weights)), np.float32)  # (bins, S)
        self.query_weights = None if bins is None else np.ascontiguousarray(weights.T, np.float32)  # (Q, S)

    def add(
        self, row: np.ndarray, model_a_idx: np.ndarray, model_b_idx: np.ndarray, outcome: np.ndarray, d: np.ndarray
    ) -> None:
        """Add battles (N,) of the queries `row` (N,), which index the Q columns of the weights."""
        correct, lead, ones = is_correct(d, outcome), np.where(outcome == 1, d, -d), np.ones(len(d))  # (N,) each
        loss = -log_win_probability(lead, self.margin)  # (N,)
        calibrated = -log_win_probability(lead, temperature=self.temperature)  # (N,)
        for total, values in zip(self.sums.values(), (ones, correct, loss, calibrated), strict=True):
            total += np.bincount(row, values, len(total))
        won = np.where(outcome == 1, model_a_idx, model_b_idx)  # (N,)
        lost = np.where(outcome == 1, model_b_idx, model_a_idx)  # (N,)
        chosen = ("chosen", won, correct), ("chosen", lost, 1 - correct)
        for name, model, values in (("hits", won, correct), ("wins", won, ones), *chosen):
            total = self.by_model[name]  # (Q, M)
            total += np.bincount(row * self.num_models + model, values, total.size).reshape(total.shape)
        if self.bins is not None:
            self._add_leads(lead, row)

    def _add_leads(self, lead: np.ndarray, row: np.ndarray) -> None:
        from scipy.sparse import coo_array

        size = 1 + np.minimum(np.searchsorted(self.bins, np.abs(lead)), len(self.bins) - 1)  # (N,)
        bin_idx = len(self.bins) + np.sign(lead).astype(np.int64) * size  # (N,)
        shape = len(self.leads), self.weights.shape[1]
        by_query = coo_array((np.ones(len(lead), np.float32), (bin_idx, row)), shape).tocsr()  # (bins, Q)
        self.leads += by_query @ self.query_weights  # (bins, S)

    def metrics(self) -> dict[str, np.ndarray]:
        """The metrics in each sample, (S,) each: those of `evaluate`, and log_loss_calibrated; auc only with bins."""
        parts = np.array_split(self.weights, -(-len(self.weights) // SAMPLES_AT_ONCE))  # (s, Q) each

        def weighted(values: np.ndarray) -> np.ndarray:
            return np.concatenate([part.astype(np.float64) @ values for part in parts])  # (S, ...)

        count, correct, loss, calibrated = (weighted(values) for values in self.sums.values())  # (S,) each
        precision, recall, f1 = macro(*(weighted(values) for values in self.by_model.values()))  # (S,) each
        results = {"accuracy": correct / count, "precision": precision, "recall": recall, "f1": f1}
        if self.bins is not None:
            results["auc"] = self._auc()
        return results | {"log_loss": loss / count, "log_loss_calibrated": calibrated / count}

    def _auc(self) -> np.ndarray:
        """The AUC (S,), in which leads of opposite sign in bins of the same size are equal.

        It is exact where every size has a bin of its own.
        """
        aucs = []
        for leads in np.array_split(self.leads, -(-len(self.weights) // SAMPLES_AT_ONCE), axis=1):  # (bins, s) each
            leads = leads.astype(np.float64)
            below = leads.cumsum(0) - leads / 2  # (bins, s), with half of the bin itself
            aucs.append(1 - (leads * below[::-1]).sum(0) / leads.sum(0) ** 2)  # (s,)
        return np.concatenate(aucs)  # (S,)


def macro(hits: np.ndarray, wins: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Macro precision, recall and F1 (S,) over models: the model chosen from the two, against the model that won.

    Each is given by sample and model (S, M). The classes are all models that won or were chosen; a division by zero
    counts as 0. A battle with d = 0 chooses each of its models with weight one half.
    """
    num_classes = (wins + chosen > 0).sum(1)  # (S,)
    results = []
    for numerator, denominator in ((hits, chosen), (hits, wins), (2 * hits, wins + chosen)):
        per_model = np.divide(numerator, denominator, out=np.zeros_like(hits), where=denominator > 0)  # (S, M)
        results.append(per_model.sum(1) / num_classes)  # (S,)
    return tuple(results)


def log_win_probability(d: np.ndarray, margin: float = 0.0, temperature: float = 1.0) -> np.ndarray:
    """Log probability (N,) that a wins.

    p = sigmoid(margin + d/T) / (sigmoid(margin + d/T) + sigmoid(margin - d/T)), the probability at which the expected
    BPR loss with that margin is least. At margin 0 it is sigmoid(d/T): the right link for every other method, and for
    every calibrated one, since training that stops early does not reach that minimum and a fitted temperature alone
    predicts better.
    """
    if margin == 0:
        return -np.logaddexp(0, -d / temperature)
    for_a = -np.logaddexp(0, -(margin + d / temperature))  # log sigmoid, which does not overflow
    for_b = -np.logaddexp(0, -(margin - d / temperature))
    return for_a - np.logaddexp(for_a, for_b)


def log_loss(d: np.ndarray, outcome: np.ndarray, margin: float = 0.0, temperature: float = 1.0) -> Metric:
    """Mean -log probability of the winner, in nats; ln 2 where all scores are equal."""
    lead = np.where(outcome == 1, d, -d)  # (N,) of the winner
    return float(-log_win_probability(lead, margin, temperature).mean()) if len(d) else None


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
    return _best_temperature(lambda temperature: log_loss(d, outcome, temperature=temperature))


def fit_label_temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """The temperature at which scores (R, M) are the logits of labels (R, M) in [0, 1], NaN where there is none."""
    known = ~np.isnan(labels)  # (R, M)
    score, label = scores[known], labels[known]  # (n,) each
    return _best_temperature(lambda t: (np.logaddexp(0, score / t) - label * score / t).mean())


def _best_temperature(loss_of: Callable[[float], float]) -> float:
    from scipy.optimize import minimize_scalar

    return float(np.exp(minimize_scalar(lambda log_t: loss_of(np.exp(log_t)), bounds=np.log([0.01, 100])).x))


class Reliability:
    """Expected calibration error and reliability diagram of the probability that the chosen model wins.

    That probability lies in [0.5, 1], which is divided into `num_bins` bins of equal width. Battles are added list by
    list; `margin` and `temperature` are those of `log_win_probability`.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """

    def __init__(self, margin: float = 0.0, temperature: float = 1.0, num_bins: int = 10):
        self.margin, self.temperature = margin, temperature
        self.edges = np.linspace(0.5, 1, num_bins + 1).round(6)  # (num_bins + 1,)
        self.sums = np.zeros((3, num_bins))  # by bin: battles, their probabilities, those that the chosen model won

    def add(self, d: np.ndarray, outcome: np.ndarray) -> None:
        """Add battles (N,)."""
        p = np.exp(log_win_probability(np.abs(d), self.margin, self.temperature))  # (N,)
        bin_idx = np.digitize(p, self.edges[1:-1])  # (N,)
        for total, values in zip(self.sums, (np.ones(len(d)), p, is_correct(d, outcome)), strict=True):
            total += np.bincount(bin_idx, values, len(total))

    def as_dict(self) -> dict:
        """The mean over battles of |probability - won| of their bin as `expected_calibration_error`, and `bins`.

        Each bin has its bounds `low` and `high`, the number of its `battles`, their mean `probability`, and the share
        `won` by the chosen model. Bins without battles are left out.
        """
        bins = []
        for low, high, (battles, p, won) in zip(self.edges[:-1], self.edges[1:], self.sums.T, strict=True):
            if battles:
                means = {"probability": float(p / battles), "won": float(won / battles)}
                bins.append({"low": float(low), "high": float(high), "battles": int(battles)} | means)
        error = sum(part["battles"] * abs(part["probability"] - part["won"]) for part in bins) / self.sums[0].sum()
        return {"expected_calibration_error": float(error), "bins": bins}


def choices(scores: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Each model's share in the choice of the highest score of a row, (R, M): 1, or equal shares where several have it.

    `scores` (R, M), or (1, M) for all rows; `available` (R, M) says which models can be chosen.
    """
    scores = np.where(available, scores, -np.inf)  # (R, M)
    chosen = scores == scores.max(1, keepdims=True)  # (R, M)
    return chosen / chosen.sum(1, keepdims=True)


def raise_fallback(scores: np.ndarray, fallback_idx: int, confidence: float, temperature: float) -> np.ndarray:
    """Scores (Q, M) with that of a fallback model raised by the lead that another model needs in order to be chosen.

    Another model then has a higher one where P(it beats the fallback) = sigmoid(d / temperature) > `confidence`, which
    is 0.5 to 1; at 1 none has.
    """
    raised = np.array(scores, np.float64)  # (Q, M)
    if confidence == 1:
        raised[:, fallback_idx] = raised.max(1) + temperature * CERTAIN
    else:
        raised[:, fallback_idx] += temperature * math.log(confidence / (1 - confidence))
        raised[:, fallback_idx] = np.nextafter(raised[:, fallback_idx], np.inf)  # of equal ones the fallback
    return raised


def hull(cost: np.ndarray, quality: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners (h,) of the non-decreasing convex hull over points (P,), by cost: random mixing reaches all of it.

    Source: Hu et al., "RouterBench", 2024, evaluation/AIQ.py.
    """
    corners = []
    for x, y in sorted(zip(cost, quality, strict=True), key=lambda point: (point[0], -point[1])):
        if corners and y <= corners[-1][1]:
            continue  # no better, and no cheaper
        while len(corners) > 1:
            (x0, y0), (x1, y1) = corners[-2:]
            if (y1 - y0) * (x - x0) > (y - y0) * (x1 - x0):
                break
            corners.pop()  # it lies below the line between its neighbors
        corners.append((x, y))
    return tuple(np.array(corners).T)


def aiq(cost: np.ndarray, quality: np.ndarray, low: float, high: float) -> float:
    """Mean height of the `hull` of points (P,) between two costs, flat beyond its ends; NaN where these are equal.

    RouterBench's AIQ of the same name is the area divided by the largest cost, with nothing left of the first point.
    """
    if not low < high:
        return math.nan
    x, y = hull(cost, quality)  # (h,) each
    at = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    return float(np.trapezoid(np.interp(at, x, y), at) / (high - low))


def strong_calls(lead: np.ndarray, gain: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """APGR and CPT of routing between a strong and a weak model, in S weighted samples of R rows: (S,) each.

    With k rows sent to the strong model, those of the highest leads, the performance gap recovered is PGR = (score of
    the router - of always weak) / (of always strong - of always weak). `apgr` is its mean over shares of strong calls
    from 0 to 1, `cpt_50` the least share with PGR >= 50 %. Rows of equal lead are sent in random order. NaN where the
    strong model is not better than the weak one.

    Args:
        lead: (R,), the router's score of the strong model - of the weak one.
        gain: (R,), what the strong model scored - the weak one.
        weights: (S, R).

    Source: Ong et al., "RouteLLM", 2024, routellm/evals/evaluate.py.
    """
    order = np.argsort(-lead, kind="stable")  # (R,)
    start = np.flatnonzero(np.diff(lead[order], prepend=np.inf))  # (U,), the first of each group of equal leads
    results = {name: [] for name in ("apgr", *(f"cpt_{round(100 * share)}" for share in GAP_SHARES))}
    if not len(lead):
        return {name: np.full(len(weights), np.nan) for name in results}
    for some in np.array_split(weights, -(-len(weights) // SAMPLES_AT_ONCE)):  # (s, R) each
        some = some[:, order].astype(np.float64)  # (s, R)
        x, y = (np.add.reduceat(each, start, axis=1).cumsum(1) for each in (some, some * gain[order]))  # (s, U) each
        undefined = y[:, -1] <= 0  # (s,)
        x[undefined] = y[undefined] = np.nan
        x, y = (np.pad(each / each[:, -1:], ((0, 0), (1, 0))) for each in (x, y))  # (s, 1 + U) each
        results["apgr"].append(np.trapezoid(y, x, axis=1))  # (s,)
        for name, share in zip(list(results)[1:], GAP_SHARES, strict=True):
            end = np.maximum((y >= share).argmax(1), 1)  # (s,), 1 where it is NaN
            (x0, x1), (y0, y1) = ([each[np.arange(len(each)), i] for i in (end - 1, end)] for each in (x, y))
            results[name].append(x0 + (x1 - x0) * (share - y0) / (y1 - y0))  # (s,)
    return {name: np.concatenate(values) for name, values in results.items()}


def route(scores: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Routes each row of a score table to the model with the highest router score.

    `scores` (R, M) are the router's, or (1, M) for all rows; `table` (R, M) has NaN where a model is unavailable.
    Returns the table's score of the chosen model and whether it is a best one of the row, 1 or 0: (R,) each. Where
    several models have the highest router score, both are means over them.
    """
    share = choices(scores, ~np.isnan(table))  # (R, M)
    is_best = table == np.nanmax(table, 1, keepdims=True)  # (R, M)
    return (share * np.nan_to_num(table)).sum(1), (share * is_best).sum(1)


def gap_closed(score: np.ndarray, single: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """(score - single) / (oracle - single), the share of the gap that routing closes; NaN where there is no gap.

    `score`, `single` and `oracle` are the mean scores of the router, the best single model and the oracle.
    """
    gain, gap = np.subtract(score, single), np.subtract(oracle, single)
    return np.divide(gain, gap, out=np.full(np.shape(gap), np.nan), where=gap > 0)


def evaluate(
    d: np.ndarray, outcome: np.ndarray, model_a_idx: np.ndarray, model_b_idx: np.ndarray, margin: float = 0.0
) -> dict[str, Metric]:
    """All metrics of N decisive battles: accuracy, precision, recall, f1, auc, log_loss (at temperature 1).

    `margin` is that of the BPR loss in training, and 0 for every other method (see `log_win_probability`).
    """
    d, names = np.asarray(d, dtype=np.float64), ("accuracy", "precision", "recall", "f1")
    if not len(d):
        return dict.fromkeys((*names, "auc", "log_loss"))
    totals = Totals(np.ones((1, 1)), 1 + int(max(model_a_idx.max(), model_b_idx.max())), margin)
    totals.add(np.zeros(len(d), np.int64), model_a_idx, model_b_idx, outcome, d)
    results = {name: float(value) for name, (value,) in totals.metrics().items()}
    return {name: results[name] for name in names} | {"auc": auc(d, outcome), "log_loss": results["log_loss"]}


def bootstrap_weights(num_queries: int, seed: int, resamples: int = 1000) -> np.ndarray:
    """How often each of Q queries occurs in each of S bootstrap samples of them: int (S, Q).

    Queries are drawn rather than battles, because the battles of one query are not independent.
    """
    rng, parts = np.random.default_rng(seed), []
    for low in range(0, resamples, SAMPLES_AT_ONCE):
        size = min(SAMPLES_AT_ONCE, resamples - low)
        drawn = rng.integers(num_queries, size=(size, num_queries))  # (s, Q)
        cells = drawn + num_queries * np.arange(size)[:, None]  # (s, Q), into the flattened counts
        counts = np.bincount(cells.ravel(), minlength=cells.size)  # (s Q,)
        parts.append(counts.astype(np.min_scalar_type(counts.max(initial=0))).reshape(cells.shape))  # (s, Q)
    return np.concatenate(parts)  # (S, Q)


def weighted_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means of values (R,) or (R, m) in S weighted samples of the rows, weights (S, R): (S,) or (S, m).

    NaN in a sample without any weight.
    """
    sums = weights @ np.asarray(values, np.float64)  # (S,) or (S, m); small integers would overflow
    size = weights.sum(1, dtype=np.float64).reshape(-1, *[1] * (sums.ndim - 1))  # (S,) or (S, 1)
    return np.divide(sums, size, out=np.full(sums.shape, np.nan), where=size > 0)


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
