"""Baselines on the same split: rankings that ignore the query, and routers of the common forms.

All are fitted on training battles; hyperparameters are chosen by validation AUC, as RankRouter's epoch is.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import coo_array, csr_array, vstack
from scipy.special import expit

import metrics
from support.data.battles import PAIRS_AT_ONCE, Battles, Pairs, WinCounts, outcomes

INVERSE_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # C of the logistic regressions
NEIGHBORS = (8, 32, 128, 512, 2048)
DAMPINGS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # precision of the prior of no correction; p (1 - p) per battle
GLOBAL_SCALE = 10.0  # the prior's standard deviation of shared strengths, relative to that of deviations from them
PENALTIES = tuple(400 / 2**step for step in range(17))  # of the learned heads' weights, from strong to weak
CLEARLY_WORSE = 0.005  # below the best validation AUC: a path of penalties ends there
RANK = 16  # upper limit for the factorization; penalizing the squares of both factors also penalizes their rank
MAX_STEPS = 300  # of L-BFGS
FIT_SAMPLE = 2**20  # training battles that the two learned by gradient descent are given, about; all if fewer

# A fitted baseline: its hyperparameters, and its scores of the validation and of the test queries, each (Q, M) in the
# order of `unique_queries`, or (1, M) where they are the same for every query.
Candidate = tuple[dict, np.ndarray, np.ndarray]


def sum_by_model(for_a: np.ndarray, for_b: np.ndarray, battles: Pairs, shape: tuple[int, int]) -> csr_array:
    """Sums of battles' values for their model a and for their model b, (N,) each, by query and model: (Q, M)."""
    indices = np.tile(battles.row, 2), np.concatenate([battles.model_a_idx, battles.model_b_idx])  # (2N,) each
    return coo_array((np.concatenate([for_a, for_b]), indices), shape).tocsr()


def bradley_terry(wins: WinCounts, num_models: int, inverse_penalty: float, num_clusters: int = 0) -> np.ndarray:
    """Bradley-Terry strengths (1, M) by logistic regression with an L2 penalty; with clusters (K, M).

    With clusters, a strength is a shared one plus a deviation of the cluster, and the penalty shrinks deviations to 0.
    `inverse_penalty` is scikit-learn's C. A tie is half a win of each side.
    Source: Bradley and Terry, "Rank analysis of incomplete block designs", Biometrika 1952.
    """
    from sklearn.linear_model import LogisticRegression

    cluster, a, b, won, lost = wins  # (C,) each
    first = num_models * (1 + cluster)  # (C,), the first column of the cluster's deviations
    columns = [a, b, first + a, first + b] if num_clusters else [a, b]
    values = np.array([GLOBAL_SCALE, -GLOBAL_SCALE, 1.0, -1.0])[: len(columns)].repeat(len(a))
    indices = np.tile(np.arange(len(a)), len(columns)), np.concatenate(columns)
    design = coo_array((values, indices), (len(a), num_models * (1 + num_clusters))).tocsr()  # (C, M + K M)
    design = vstack([design, design], format="csr")  # (2C, M + K M): each cell as won by a, and as won by b
    labels = np.repeat([1, 0], len(a))  # (2C,)
    model = LogisticRegression(fit_intercept=False, C=inverse_penalty, solver="newton-cg", tol=1e-7, max_iter=1000)
    strengths = model.fit(design, labels, np.concatenate([won, lost])).coef_[0].reshape(-1, num_models)  # (1 + K, M)
    return GLOBAL_SCALE * strengths[:1] + (strengths[1:] if num_clusters else 0)  # (K, M) or (1, M)


def rankings(split) -> Iterator[Candidate]:
    """One ranking for all queries, for each penalty."""
    wins = split.train.win_counts()
    for inverse_penalty in INVERSE_PENALTIES:
        strengths = bradley_terry(wins, len(split.train.model_names), inverse_penalty)  # (1, M)
        yield {"inverse_penalty": inverse_penalty}, strengths, strengths


def rankings_by_cluster(split, cluster_idx: np.ndarray, num_clusters: int) -> Iterator[Candidate]:
    """One ranking for each of `num_clusters` clusters, for each penalty; `cluster_idx` (Q,) is each query's."""
    wins = split.train.win_counts(cluster_idx)
    held_out = [cluster_idx[side.unique_queries] for side in (split.val, split.test)]  # (Q,) each
    for inverse_penalty in INVERSE_PENALTIES:
        strengths = bradley_terry(wins, len(split.train.model_names), inverse_penalty, num_clusters)  # (K, M)
        yield {"inverse_penalty": inverse_penalty}, *(strengths[cluster] for cluster in held_out)


def residuals_of(battles: Battles, strengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By query and model (Q, M): sums over the battles of wins - P(win), and of P (1 - P), at strengths (1, M)."""
    p = expit(strengths.T - strengths)  # (M, M), that the model of the row wins
    a, b, shape = battles.model_a_idx, battles.model_b_idx, (len(battles.unique_queries), len(p))
    single = Pairs(battles.query_rows, a, b, battles.outcome)
    residual, variance = battles.outcome - p[a, b], (p * (1 - p))[a, b]  # (N,) each
    residuals = sum_by_model(residual, -residual, single, shape).toarray()  # (Q, M)
    information = sum_by_model(variance, variance, single, shape).toarray()  # (Q, M)
    if battles.table is None:
        return residuals, information
    query_rows = battles.table_query_rows  # (R,)
    others = ~np.eye(len(p), dtype=bool)  # (M, M)
    for rows in np.array_split(np.arange(len(query_rows)), len(query_rows) * p.size // PAIRS_AT_ONCE + 1):  # (r,) each
        scores = battles.table.scores[rows]  # (r, M)
        outcome = outcomes(scores[:, :, None], scores[:, None, :], battles.ties)  # (r, M, M)
        counted = ~np.isnan(outcome) & others  # (r, M, M)
        np.add.at(residuals, query_rows[rows], np.where(counted, outcome - p, 0).sum(2))
        np.add.at(information, query_rows[rows], (counted * (p * (1 - p))).sum(2))
    return residuals, information


def neighbors(split, strengths: np.ndarray, x: np.ndarray) -> Iterator[Candidate]:
    """Bradley-Terry strengths (1, M) plus a correction by the battles of the nearest training queries.

    The correction is one Newton step from those strengths on the battles of the k training queries whose standardized
    embeddings, of `x` (Q, F), have the highest cosine, with a Gaussian prior around no correction: residuals / (sum of
    p (1 - p) + damping). Yields each k with each damping.
    """
    from sklearn.neighbors import NearestNeighbors

    train = split.train
    train_queries = train.unique_queries  # (Qt,)
    residuals, information = residuals_of(train, strengths)  # (Qt, M) each
    has_battles = information.any(1)  # (Qt,): a pointwise loss keeps rows without any
    train_queries, residuals, information = (each[has_battles] for each in (train_queries, residuals, information))
    index = NearestNeighbors(metric="cosine", algorithm="brute").fit(x[train_queries])
    counts = sorted({min(k, len(train_queries)) for k in NEIGHBORS})
    held_out = x[split.val.unique_queries], x[split.test.unique_queries]  # (Q, F) each
    nearest = [index.kneighbors(queries, counts[-1], return_distance=False) for queries in held_out]  # (Q, k) each
    for k in counts:
        sums = []
        for order in nearest:
            ends = k * np.arange(len(order) + 1)  # (Q + 1,)
            near = csr_array((np.ones(ends[-1]), order[:, :k].ravel(), ends), (len(order), len(train_queries)))
            sums.append((near @ residuals, near @ information))  # (Q, M) each
        for damping in DAMPINGS:
            scores = [strengths + gradient / (curvature + damping) for gradient, curvature in sums]  # (Q, M) each
            yield {"neighbours": k, "damping": damping}, *scores


def descend(battles: Pairs, penalty: float, forward: Callable, parameters: list[np.ndarray]) -> list[np.ndarray]:
    """Parameters that minimize the Bradley-Terry loss of the battles plus their penalized squares, by L-BFGS.

    Args:
        penalty: of all parameters but the last.
        forward: takes the parameters; returns the scores (Q, M) of the battles' distinct queries, and a function that
            takes the gradient of the loss by these scores and returns the gradients by the parameters.
        parameters: initial values. The last ones are the strengths (1, M) shared by all queries, penalized as in
            `bradley_terry` with C = 1.
    """
    penalties = [penalty] * (len(parameters) - 1) + [GLOBAL_SCALE**-2]
    ends = np.cumsum([parameter.size for parameter in parameters])[:-1]

    def unflatten(flat: np.ndarray) -> list[np.ndarray]:
        return [part.reshape(like.shape) for part, like in zip(np.split(flat, ends), parameters, strict=True)]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        current = unflatten(flat)
        scores, backward = forward(*current)  # (Q, M)
        d = battles.margins(scores)  # (N,)
        residual = expit(d) - battles.outcome  # (N,)
        gradients = backward(sum_by_model(residual, -residual, battles, scores.shape).toarray())
        total = (np.logaddexp(0, d) - battles.outcome * d).sum()
        total += sum(weight * (part**2).sum() / 2 for weight, part in zip(penalties, current, strict=True))
        parts = [g + weight * part for g, weight, part in zip(gradients, penalties, current, strict=True)]
        return total, np.concatenate([part.ravel() for part in parts])

    start = np.concatenate([parameter.ravel() for parameter in parameters])
    return unflatten(minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": MAX_STEPS}).x)


def scaled(split, x: np.ndarray) -> list[np.ndarray]:
    """Features (Q, F) of the training, validation and test queries, float64, so that penalties fit any width."""
    sides = split.train, split.val, split.test
    return [x[side.unique_queries].astype(np.float64) / x.shape[1] ** 0.5 for side in sides]


def linear_heads(split, strengths: np.ndarray, x: np.ndarray, seed: int) -> Iterator[Candidate]:
    """Strengths that are linear in the embedding, starting from Bradley-Terry's (1, M); yields each penalty.

    Source of the form: Frick et al., "Prompt-to-Leaderboard", 2025, there on top of a language model trained with it.
    """
    battles = split.train.sample(FIT_SAMPLE, seed)
    train, val, test = scaled(split, x)  # (Q, F) each
    parameters = [np.zeros((train.shape[1], strengths.shape[1])), strengths]  # (H, M), (1, M)

    def forward(weights, shared):
        return train @ weights + shared, lambda by_scores: (train.T @ by_scores, by_scores.sum(0, keepdims=True))

    for penalty in PENALTIES:
        parameters = weights, shared = descend(battles, penalty, forward, parameters)
        yield {"penalty": penalty}, val @ weights + shared, test @ weights + shared


def factorizations(split, strengths: np.ndarray, x: np.ndarray, seed: int) -> Iterator[Candidate]:
    """Inner product of a projected embedding and a vector of the model, plus shared strengths; yields each penalty.

    Source of the form: the matrix factorization of Ong et al., "RouteLLM", 2024, and of Zhuang et al., "EmbedLLM",
    2024; their weight of each dimension is part of the model's vector here.
    """
    battles = split.train.sample(FIT_SAMPLE, seed)
    train, val, test = scaled(split, x)  # (Q, F) each

    def forward(projection, factors, shared):
        projected = train @ projection  # (Q, r)

        def backward(by_scores):
            by_projection = train.T @ (by_scores @ factors)  # (H, r)
            return by_projection, by_scores.T @ projected, by_scores.sum(0, keepdims=True)

        return projected @ factors.T + shared, backward

    for penalty in PENALTIES:
        # Each penalty starts at random: a strong one leads to 0, where the gradient is 0 too.
        rng = np.random.default_rng(seed)
        start = [rng.normal(0, 0.1, (width, RANK)) for width in (train.shape[1], strengths.shape[1])]
        projection, factors, shared = descend(battles, penalty, forward, [*start, strengths])
        yield {"penalty": penalty}, *(side @ projection @ factors.T + shared for side in (val, test))


def ranking_by_mean(table) -> np.ndarray:
    """Ranks (1, M) of the models by their mean score in a table: M - 1 for the best, 0 for the worst, all distinct.

    The means are over rows whose scores differ. Models with scores on fewer than half as many of them as the most
    complete model rank below all others, since their means are not comparable.
    """
    scores = table.scores[table.differs()]  # (r, M)
    known = ~np.isnan(scores)  # (r, M)
    count = known.sum(0)  # (M,)
    means = np.where(known, scores, 0).sum(0) / np.maximum(count, 1)  # (M,)
    order = np.lexsort((-means, count < count.max() / 2))  # (M,)
    ranks = np.empty((1, len(order)))  # (1, M)
    ranks[0, order] = np.arange(len(order))[::-1]
    return ranks


def best_single_model(split) -> str:
    """The best model for all queries: by mean score in the training table, or by Bradley-Terry strength without one."""
    table = split.train.table
    scores = ranking_by_mean(table) if table is not None else best(rankings(split), split)[1]  # (1, M)
    return split.train.model_names[int(scores.argmax())]


def best(candidates: Iterable[Candidate], split, leave_early: bool = False) -> Candidate:
    """The candidate with the highest validation AUC, the first of equals.

    With `leave_early`, a path from strong to weak penalties ends at the first candidate clearly worse than the best.
    """
    chosen, highest = None, -1.0
    for candidate in candidates:
        auc = metrics.auc(split.val_pairs.margins(candidate[1]), split.val_pairs.outcome)
        if auc > highest:
            chosen, highest = candidate, auc
        elif leave_early and auc < highest - CLEARLY_WORSE:
            break
    return chosen


def fit(
    split, x: np.ndarray, cluster_idx: np.ndarray, num_clusters: int, learned: bool, seed: int
) -> dict[str, Candidate]:
    """All baselines by name, each with the hyperparameters of the highest validation AUC.

    Args:
        x: standardized features (Q, F).
        cluster_idx: int (Q,), the queries' clusters; with `num_clusters` 0 there is no ranking per cluster.
        learned: adds the two baselines that are trained by gradient descent, which take longer.
        seed: of the initial weights of these two, and of the training battles that they are given where there are many.
    """
    equal = np.zeros((1, len(split.train.model_names)))  # (1, M)
    fitted = {"random": ({}, equal, equal)}
    if split.train.table is not None:
        ranks = ranking_by_mean(split.train.table)  # (1, M)
        fitted["best_single"] = {"model": best_single_model(split)}, ranks, ranks
    fitted["bradley_terry"] = best(rankings(split), split)
    _, strengths, _ = fitted["bradley_terry"]  # (1, M)
    if num_clusters:
        fitted["cluster_bradley_terry"] = best(rankings_by_cluster(split, cluster_idx, num_clusters), split)
    fitted["neighbours"] = best(neighbors(split, strengths, x), split)
    if learned:
        fitted["linear_head"] = best(linear_heads(split, strengths, x, seed), split, leave_early=True)
        fitted["factorisation"] = best(factorizations(split, strengths, x, seed), split, leave_early=True)
    return fitted
