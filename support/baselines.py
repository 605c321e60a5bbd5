"""What RankRouter must beat on the same split: rankings that know no query, and routers that need no gradient descent.

All are fitted on training battles; what has to be chosen is chosen by AUC on validation, as RankRouter's epoch is.
"""

from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_array, csr_array, hstack, vstack
from scipy.special import expit

import metrics

INVERSE_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)  # C of the logistic regressions
NEIGHBOURS = (8, 32, 128, 512, 2048)
DAMPINGS = (0.3, 1.0, 3.0, 10.0, 30.0)  # prior weight of "no correction", in units of p (1 - p) of a battle
GLOBAL_SCALE = 10.0  # shared strengths are penalised by its square less than a cluster's deviations from them


def differences(scores: np.ndarray, row: np.ndarray, battles) -> np.ndarray:
    """Margins d (N,) of battles from scores (R, M), each battle's row of which is `row` (N,)."""
    return scores[row, battles.model_a_idx] - scores[row, battles.model_b_idx]


def sum_by_model(for_a: np.ndarray, for_b: np.ndarray, row: np.ndarray, battles, num_rows: int) -> csr_array:
    """Sums (R, M), by row and model, of what each battle gives its model a and its model b, (N,) each."""
    rows, columns = np.concatenate([row, row]), np.concatenate([battles.model_a_idx, battles.model_b_idx])  # (2N,)
    shape = num_rows, len(battles.model_names)
    return coo_array((np.concatenate([for_a, for_b]), (rows, columns)), shape).tocsr()


def bradley_terry(battles, inverse_penalty: float, cluster_idx: np.ndarray, num_clusters: int = 0) -> np.ndarray:
    """Strengths (M,) by regularised logistic regression; with clusters (K, M), shrunk to those of all battles.

    `cluster_idx` (N,) is each battle's. A tie is half a win of each side.
    Source: Bradley and Terry, "Rank analysis of incomplete block designs", Biometrika 1952.
    """
    from sklearn.linear_model import LogisticRegression

    one, num_models = np.ones(len(battles)), len(battles.model_names)
    shared = sum_by_model(one, -one, np.arange(len(battles)), battles, len(battles))  # (N, M)
    own = [shared * (cluster_idx == cluster)[:, None] for cluster in range(num_clusters)]  # (N, M) each
    design = hstack([GLOBAL_SCALE * shared, *own], format="csr")  # (N, M + K M)
    model = LogisticRegression(fit_intercept=False, C=inverse_penalty, solver="newton-cg").fit(
        vstack([design, design], format="csr"),
        np.concatenate([one, 0 * one]),
        sample_weight=np.concatenate([battles.outcome, 1 - battles.outcome]),
    )
    strengths = model.coef_[0].reshape(1 + num_clusters, num_models)  # (1 + K, M)
    return GLOBAL_SCALE * strengths[0] + (strengths[1:] if num_clusters else 0)  # (K, M) or (M,)


def neighbours(split, strengths: np.ndarray, points: np.ndarray) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
    """Bradley-Terry's strengths (M,), corrected by the residuals of the nearest training battles of a query.

    The correction is one Newton step from those strengths, on the battles of the k training queries whose standardised
    embeddings, of `points` (Q, H), have the highest cosine, against a prior that there is none. Yields, for each k and
    each weight of the prior, what was chosen and the margins of the validation and test battles, (N,) each.
    """
    from sklearn.neighbors import NearestNeighbors

    train_queries, row = np.unique(split.train.query_idx, return_inverse=True)  # (Qt,), (N,)
    p = expit(differences(strengths[None], 0 * row, split.train))  # (N,)
    residual, variance, place = split.train.outcome - p, p * (1 - p), (row, split.train, len(train_queries))
    residuals = sum_by_model(residual, -residual, *place)  # (Qt, M)
    information = sum_by_model(variance, variance, *place)  # (Qt, M)
    index = NearestNeighbors(metric="cosine", algorithm="brute").fit(points[train_queries])
    held = [np.unique(side.query_idx, return_inverse=True) for side in (split.val, split.test)]  # (Qh,), (N,) each
    numbers = sorted({min(k, len(train_queries)) for k in NEIGHBOURS})
    nearest = [index.kneighbors(points[queries], numbers[-1], return_distance=False) for queries, _ in held]  # (Qh, k)
    for k in numbers:
        sums = []
        for order in nearest:
            ends = k * np.arange(len(order) + 1)  # (Qh + 1,)
            near = csr_array((np.ones(ends[-1]), order[:, :k].ravel(), ends), (len(order), len(train_queries)))
            sums.append(((near @ residuals).toarray(), (near @ information).toarray()))  # (Qh, M) each
        for damping in DAMPINGS:
            d = [
                differences(strengths + gradient / (curvature + damping), row, side)  # (N,)
                for (gradient, curvature), (_, row), side in zip(sums, held, (split.val, split.test), strict=True)
            ]
            yield {"neighbours": k, "damping": damping}, *d


def fit(split, points: np.ndarray, cluster_idx: np.ndarray, num_clusters: int) -> dict[str, tuple]:
    """Each baseline by name: what validation chose, and its margins d of the validation and test battles, (N,) each.

    `points` (Q, H) are standardised embeddings, `cluster_idx` (Q,) their clusters; without clusters, the ranking per
    cluster is left out.
    """
    sides = split.val, split.test
    of_train = cluster_idx[split.train.query_idx]  # (N,)

    def rankings(num_clusters):
        for inverse_penalty in INVERSE_PENALTIES:
            strengths = np.atleast_2d(bradley_terry(split.train, inverse_penalty, of_train, num_clusters))
            row = cluster_idx if num_clusters else 0 * cluster_idx  # (Q,), into strengths (1 or K, M)
            d = (differences(strengths, row[side.query_idx], side) for side in sides)
            yield {"inverse_penalty": inverse_penalty}, *d

    def best(candidates):  # by AUC on validation, the first where several are equal
        return max(candidates, key=lambda candidate: metrics.auc(candidate[1], split.val.outcome))

    fitted = {"random": ({}, *(np.zeros(len(side)) for side in sides)), "bradley_terry": best(rankings(0))}
    if num_clusters:
        fitted["cluster_bradley_terry"] = best(rankings(num_clusters))
    strengths = bradley_terry(split.train, fitted["bradley_terry"][0]["inverse_penalty"], of_train)  # (M,)
    fitted["neighbours"] = best(neighbours(split, strengths, points))
    return fitted


def judge(d: np.ndarray, battles, weights: np.ndarray, margin: float, temperature: float) -> tuple[dict, dict]:
    """Metrics of margins d (N,), calibrated log loss included, and the same on bootstrap samples (R,) of them."""
    columns = d, battles.outcome, battles.model_a_idx, battles.model_b_idx
    calibrated = metrics.log_loss(d, battles.outcome, margin, temperature)
    row = metrics.evaluate(*columns, margin) | {"log_loss_calibrated": calibrated}
    return row, metrics.evaluate_resamples(*columns, weights, margin, temperature)


def compare(fitted: dict[str, tuple], split, weights: np.ndarray, router: dict, router_samples: dict) -> dict:
    """Test metrics of each baseline, and RankRouter's `difference` to it, with paired 95 % intervals.

    `router` and `router_samples` are RankRouter's, from `judge` with the same `weights` (R, N).
    """
    rows = {}
    for name, (chosen, d_val, d_test) in fitted.items():
        temperature = metrics.fit_temperature(d_val, split.val.outcome)
        row, samples = judge(d_test, split.test, weights, 0.0, temperature)
        rows[name] = row | {
            "chosen": chosen,
            "difference": {metric: router[metric] - value for metric, value in row.items()},
            "difference_intervals": {
                metric: metrics.interval(router_samples[metric] - samples[metric]) for metric in row
            },
        }
    return rows


def compare_with_truth(battles, skills: np.ndarray, fixed_skills: np.ndarray, auc: float) -> dict:
    """Metrics of the demo's known truth on some battles, and the share of the gap in AUC that a router closes.

    `skills` (Q, M) are those of each query and model, `fixed_skills` (M,) the best that know no query; `auc` is the
    router's. The share is None where the truth gains nothing by knowing the query.
    """
    rows = {}
    for name, scores in (("fixed_ranking", np.broadcast_to(fixed_skills, skills.shape)), ("true_margins", skills)):
        score_a, score_b = (scores[battles.query_idx, idx] for idx in (battles.model_a_idx, battles.model_b_idx))
        rows[name] = metrics.evaluate(score_a - score_b, battles.outcome, battles.model_a_idx, battles.model_b_idx)
    fixed, true = rows["fixed_ranking"]["auc"], rows["true_margins"]["auc"]
    return rows | {"gap_closed": (auc - fixed) / (true - fixed) if true > fixed else None}
