"""What RankRouter must beat: rankings that know no query, and routers of the forms in use, on the same split.

All are fitted on training battles; what has to be chosen is chosen by AUC on validation, as RankRouter's epoch is.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import coo_array, csr_array, vstack
from scipy.special import expit

import metrics

INVERSE_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # C of the logistic regressions
NEIGHBOURS = (8, 32, 128, 512, 2048)
DAMPINGS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # prior of no correction, in p (1 - p) of a battle
GLOBAL_SCALE = 10.0  # shared strengths are penalised by its square less than deviations from them
PENALTIES = tuple(400 / 2**step for step in range(17))  # of the learned heads' weights, from strong to weak
CLEARLY_WORSE = 0.005  # than the best, in validation AUC: where a path of penalties is left
RANK = 16  # of the factorisation at most: the penalty of both its factors is one of the rank
MOST_STEPS = 300  # of L-BFGS

# What a baseline gives: what validation chose, and scores of the validation and test queries, (Q, M) each, as `fought`
# orders them; (1, M) where they are the same for every query.
Candidate = tuple[dict, np.ndarray, np.ndarray]


def sum_by_model(for_a: np.ndarray, for_b: np.ndarray, battles) -> csr_array:
    """Sums (Q, M), by query and model, of what each battle gives its model a and its model b, (N,) each."""
    queries, row = battles.fought  # (Q,), (N,)
    columns = np.concatenate([battles.model_a_idx, battles.model_b_idx])  # (2N,)
    values, shape = np.concatenate([for_a, for_b]), (len(queries), len(battles.model_names))
    return coo_array((values, (np.tile(row, 2), columns)), shape).tocsr()


def bradley_terry(
    battles, inverse_penalty: float, cluster_idx: np.ndarray | None = None, num_clusters: int = 0
) -> np.ndarray:
    """Strengths (1, M) by regularised logistic regression; with clusters (K, M), shrunk to those of all battles.

    `cluster_idx` (N,) is each battle's. A tie is half a win of each side.
    Source: Bradley and Terry, "Rank analysis of incomplete block designs", Biometrika 1952.
    """
    from sklearn.linear_model import LogisticRegression

    # Battles of the same models in the same cluster differ in nothing but their outcome: C cells are enough.
    num_models = len(battles.model_names)
    cluster = cluster_idx if num_clusters else np.zeros(len(battles), np.int64)  # (N,)
    numbers = (cluster * num_models + battles.model_a_idx) * num_models + battles.model_b_idx  # (N,)
    cells, cell = np.unique(numbers, return_inverse=True)  # (C,), (N,)
    cluster, a, b = cells // num_models**2, cells // num_models % num_models, cells % num_models  # (C,) each
    weights = [np.bincount(cell, outcome) for outcome in (battles.outcome, 1 - battles.outcome)]  # (C,) each

    own = num_models * (1 + cluster)  # (C,), the first column of a cluster's deviations
    columns = [a, b, own + a, own + b] if num_clusters else [a, b]
    values = np.array([GLOBAL_SCALE, -GLOBAL_SCALE, 1.0, -1.0])[: len(columns)].repeat(len(cells))
    places = np.tile(np.arange(len(cells)), len(columns)), np.concatenate(columns)
    design = coo_array((values, places), (len(cells), num_models * (1 + num_clusters))).tocsr()  # (C, M + K M)
    design = vstack([design, design], format="csr")  # (2C, M + K M): each cell as won by a, and as won by b
    won = np.repeat([1, 0], len(cells))  # (2C,)
    model = LogisticRegression(fit_intercept=False, C=inverse_penalty, solver="newton-cg", tol=1e-7, max_iter=1000)
    strengths = model.fit(design, won, np.concatenate(weights)).coef_[0].reshape(-1, num_models)  # (1 + K, M)
    return GLOBAL_SCALE * strengths[:1] + (strengths[1:] if num_clusters else 0)  # (K, M) or (1, M)


def rankings(split) -> Iterator[Candidate]:
    """One ranking for all queries, for each penalty."""
    for inverse_penalty in INVERSE_PENALTIES:
        strengths = bradley_terry(split.train, inverse_penalty)  # (1, M)
        yield {"inverse_penalty": inverse_penalty}, strengths, strengths


def rankings_by_cluster(split, cluster_idx: np.ndarray, num_clusters: int) -> Iterator[Candidate]:
    """One ranking for each of `num_clusters` clusters, for each penalty; `cluster_idx` (Q,) is each query's."""
    of_train = cluster_idx[split.train.query_idx]  # (N,)
    held = [cluster_idx[side.fought[0]] for side in (split.val, split.test)]  # (Q,) each
    for inverse_penalty in INVERSE_PENALTIES:
        strengths = bradley_terry(split.train, inverse_penalty, of_train, num_clusters)  # (K, M)
        yield {"inverse_penalty": inverse_penalty}, *(strengths[cluster] for cluster in held)


def neighbours(split, strengths: np.ndarray, points: np.ndarray) -> Iterator[Candidate]:
    """Bradley-Terry's strengths (1, M), corrected by the residuals of the nearest training battles of a query.

    The correction is one Newton step from those strengths, on the battles of the k training queries whose standardised
    embeddings, of `points` (Q, H), have the highest cosine, against a prior that there is none. For each k and each
    weight of the prior.
    """
    from sklearn.neighbors import NearestNeighbors

    train = split.train
    train_queries, _ = train.fought  # (Qt,)
    p = expit(train.margins(strengths))  # (N,)
    residual, variance = train.outcome - p, p * (1 - p)  # (N,) each
    residuals = sum_by_model(residual, -residual, train)  # (Qt, M)
    information = sum_by_model(variance, variance, train)  # (Qt, M)
    index = NearestNeighbors(metric="cosine", algorithm="brute").fit(points[train_queries])
    numbers = sorted({min(k, len(train_queries)) for k in NEIGHBOURS})
    nearest = [
        index.kneighbors(points[side.fought[0]], numbers[-1], return_distance=False)  # (Q, k)
        for side in (split.val, split.test)
    ]
    for k in numbers:
        sums = []
        for order in nearest:
            ends = k * np.arange(len(order) + 1)  # (Q + 1,)
            near = csr_array((np.ones(ends[-1]), order[:, :k].ravel(), ends), (len(order), len(train_queries)))
            sums.append(((near @ residuals).toarray(), (near @ information).toarray()))  # (Q, M) each
        for damping in DAMPINGS:
            scores = (strengths + gradient / (curvature + damping) for gradient, curvature in sums)  # (Q, M) each
            yield {"neighbours": k, "damping": damping}, *scores


def descend(battles, penalty: float, scores_of: Callable, parameters: list[np.ndarray]) -> list[np.ndarray]:
    """Parameters that minimise the Bradley-Terry loss of the battles plus their penalised squares, by L-BFGS.

    `scores_of` takes the parameters, from which the descent starts, and returns the scores (Q, M) of the battles'
    distinct queries and a function from the loss's gradient by those to its gradients by the parameters. The last
    parameter is the strengths that all queries share (1, M), penalised as those of `bradley_terry` with C = 1.
    """
    penalties = [penalty] * (len(parameters) - 1) + [GLOBAL_SCALE**-2]
    ends = np.cumsum([parameter.size for parameter in parameters])[:-1]

    def unflatten(flat: np.ndarray) -> list[np.ndarray]:
        return [part.reshape(like.shape) for part, like in zip(np.split(flat, ends), parameters, strict=True)]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        current = unflatten(flat)
        scores, backward = scores_of(*current)  # (Q, M)
        d = battles.margins(scores)  # (N,)
        residual = expit(d) - battles.outcome  # (N,)
        gradients = backward(sum_by_model(residual, -residual, battles).toarray())
        total = (np.logaddexp(0, d) - battles.outcome * d).sum()
        total += sum(weight * (part**2).sum() / 2 for weight, part in zip(penalties, current, strict=True))
        parts = [g + weight * part for g, weight, part in zip(gradients, penalties, current, strict=True)]
        return total, np.concatenate([part.ravel() for part in parts])

    start = np.concatenate([parameter.ravel() for parameter in parameters])
    return unflatten(minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": MOST_STEPS}).x)


def scaled(split, points: np.ndarray) -> list[np.ndarray]:
    """Embeddings (Q, H) of the training, validation and test queries, float64, of mean square 1 / H."""
    sides = split.train, split.val, split.test
    return [points[side.fought[0]].astype(np.float64) / points.shape[1] ** 0.5 for side in sides]


def linear_heads(split, strengths: np.ndarray, points: np.ndarray) -> Iterator[Candidate]:
    """Strengths that are linear in the embedding, from those of Bradley-Terry (1, M), for each penalty.

    Source of the form: Frick et al., "Prompt-to-Leaderboard", 2025, there on top of a language model trained with it.
    """
    train, val, test = scaled(split, points)  # (Q, H) each
    found = [np.zeros((train.shape[1], strengths.shape[1])), strengths]  # (H, M), (1, M)

    def scores_of(weights, shared):
        return train @ weights + shared, lambda by_scores: (train.T @ by_scores, by_scores.sum(0, keepdims=True))

    for penalty in PENALTIES:
        found = weights, shared = descend(split.train, penalty, scores_of, found)
        yield {"penalty": penalty}, val @ weights + shared, test @ weights + shared


def factorisations(split, strengths: np.ndarray, points: np.ndarray, seed: int) -> Iterator[Candidate]:
    """The inner product of a projected embedding and a vector of the model, beside shared strengths, for each penalty.

    Source of the form: the matrix factorisation of Ong et al., "RouteLLM", 2024, and of Zhuang et al., "EmbedLLM",
    2024; their weight of each dimension is part of the model's vector here.
    """
    train, val, test = scaled(split, points)  # (Q, H) each

    def scores_of(projection, factors, shared):
        projected = train @ projection  # (Q, r)

        def backward(by_scores):
            by_projection = train.T @ (by_scores @ factors)  # (H, r)
            return by_projection, by_scores.T @ projected, by_scores.sum(0, keepdims=True)

        return projected @ factors.T + shared, backward

    for penalty in PENALTIES:
        rng = np.random.default_rng(seed)  # from the start each time: where all is zero, no gradient leads away
        start = [rng.normal(0, 0.1, (width, RANK)) for width in (train.shape[1], strengths.shape[1])]
        projection, factors, shared = descend(split.train, penalty, scores_of, [*start, strengths])
        yield {"penalty": penalty}, *(side @ projection @ factors.T + shared for side in (val, test))


def ranking_by_mean(table) -> np.ndarray:
    """Places (1, M) of the models by their mean score in a table, M - 1 for the best, and no two the same.

    A model with scores on fewer than half of the rows that another has comes after all others: nobody could rely on it.
    """
    known = ~np.isnan(table.scores)  # (R, M)
    count = known.sum(0)  # (M,)
    means = np.where(known, table.scores, 0).sum(0) / np.maximum(count, 1)  # (M,)
    order = np.lexsort((-means, count < count.max() / 2))  # (M,)
    places = np.empty((1, len(order)))  # (1, M)
    places[0, order] = np.arange(len(order))[::-1]
    return places


def best_single_model(split) -> str:
    """The model to choose if no query is known: of the highest mean score in training, or Bradley-Terry strength."""
    table = split.train.table
    places = ranking_by_mean(table) if table is not None else best(rankings(split), split)[1]  # (1, M)
    return split.train.model_names[int(places.argmax())]


def best(candidates: Iterable[Candidate], split, leave_early: bool = False) -> Candidate:
    """The candidate of the highest AUC on validation, the first where several are equal.

    A path from strong to weak penalties may be left early, at the first candidate that is clearly worse than the best.
    """
    chosen, highest = None, -1.0
    for candidate in candidates:
        _, scores, _ = candidate
        auc = metrics.auc(split.val.margins(scores), split.val.outcome)
        if auc > highest:
            chosen, highest = candidate, auc
        elif leave_early and auc < highest - CLEARLY_WORSE:
            break
    return chosen


def fit(
    split, points: np.ndarray, cluster_idx: np.ndarray, num_clusters: int, learned: bool, seed: int
) -> dict[str, Candidate]:
    """Each baseline by name, as validation chose it.

    `points` (Q, H) are standardised embeddings, `cluster_idx` (Q,) their clusters; without clusters, the ranking per
    cluster is left out. `learned` adds the two that descend a gradient, which takes longer; `seed` is theirs.
    """
    indifferent = np.zeros((1, len(split.train.model_names)))  # (1, M)
    fitted = {"random": ({}, indifferent, indifferent)}
    if split.train.table is not None:
        places = ranking_by_mean(split.train.table)  # (1, M)
        fitted["best_single"] = {"model": best_single_model(split)}, places, places
    fitted["bradley_terry"] = best(rankings(split), split)
    _, strengths, _ = fitted["bradley_terry"]  # (1, M)
    if num_clusters:
        fitted["cluster_bradley_terry"] = best(rankings_by_cluster(split, cluster_idx, num_clusters), split)
    fitted["neighbours"] = best(neighbours(split, strengths, points), split)
    if learned:
        fitted["linear_head"] = best(linear_heads(split, strengths, points), split, leave_early=True)
        fitted["factorisation"] = best(factorisations(split, strengths, points, seed), split, leave_early=True)
    return fitted
