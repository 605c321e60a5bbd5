"""Cold start: routing a model that was held out of training, with no, few and all of its battles known."""

import copy

import numpy as np
import torch

import metrics
from support.data.battles import WinCounts
from support.data.benchmarks import standardize
from support.evaluation.baselines import best, bradley_terry, rankings
from support.evaluation.comparison import all_and_samples, evaluate_samples
from support.routing.new_model import battles_of, in_view_of, vector_from_battles
from support.system.errors import UserError, one_line

CALIBRATION = (10, 50, 200)  # known battles of the new model
DRAWS = 20  # random selections of these battles; metrics are means over them
METRICS = ("auc", "accuracy", "log_loss_calibrated")


def held_out_battles(name: str, split, full_split) -> tuple:
    """The battles of a model that `split` holds out against the models that it knows: for calibration, and for testing.

    `full_split` is the same split with the model. Raises `UserError` where there is no test battle.
    """
    pool, test = (battles_of(side, name, split.train.model_names) for side in (full_split.train, full_split.test))
    if not len(test):
        found = f"it has {len(pool)} training battles and no decisive test battle against the other models"
        raise UserError(f"--hold_out_model {one_line(name)}: {found}; expected some of both")
    return pool, test


class ColdStartEvaluation:
    """Evaluates methods on the test battles of a held-out model, all on the same bootstrap samples of their queries.

    Each method of this class returns METRICS on the test set, and then on its S samples: float (3, 1 + S).
    """

    def __init__(self, test, seed: int):
        self.test = test
        self.weights = all_and_samples(len(test.unique_queries), seed)  # (1 + S, q)

    def of_scores(self, scores: np.ndarray, temperature: float) -> np.ndarray:
        """Evaluates scores (q, M) of the distinct test queries, or (1, M) for all of them."""
        (battles,) = self.test.chunks()
        bins = metrics.lead_bins(battles.margins(scores))
        numbers = evaluate_samples(self.test, scores, self.weights, bins, margin=0.0, temperature=temperature)
        return np.array([numbers[metric] for metric in METRICS])  # (3, 1 + S)

    def of_router(self, router, x: torch.Tensor, cluster_idx: torch.Tensor) -> np.ndarray:
        """Evaluates a router that knows all models of the test battles."""
        names, queries = self.test.model_names, self.test.unique_queries  # (q,)
        scores = np.full((len(queries), len(names)), np.nan)  # (q, M)
        scores[:, [names.index(name) for name in router.model_names]] = router.score(x[queries], cluster_idx[queries])
        return self.of_scores(scores, router.temperature)

    def of_new_model(self, name: str, vector: torch.Tensor, router, x, cluster_idx) -> np.ndarray:
        """Evaluates a router after adding the held-out model with a capability vector (C,); `router` is unchanged."""
        finetuned = router.metadata.trained  # not copied: it may be a whole encoder
        extended = copy.deepcopy(router, {id(finetuned): finetuned})
        extended.add_model(name, vector)
        return self.of_router(extended, x, cluster_idx)


def cold_start(name: str, split, full_split, trained: tuple, ceiling: tuple, profiles, seed: int) -> dict:
    """Compares RankRouter with Bradley-Terry on the test battles of a held-out model, given the same battles of it.

    AUC, accuracy and calibrated log loss, with paired intervals over the test queries.

    Args:
        split, full_split: without and with the model's battles; `full_split` gives the calibration battles, from its
            training side, and the test battles.
        trained, ceiling: (router, standardized features (Q, F), clusters (Q,)) for the queries of `full_split`, with
            a router trained on `split`, and one trained on `full_split`.
        profiles: those of `--capability_file`, or None.
        seed: of the draws of calibration battles, and of the bootstrap.
    """
    (router, x, cluster_idx), (pool, test) = trained, held_out_battles(name, split, full_split)
    evaluation, rng = ColdStartEvaluation(test, seed), np.random.default_rng(seed)
    train = full_split.train
    num_models, model_idx = len(train.model_names), train.model_names.index(name)
    others = train.among(np.delete(np.arange(num_models), model_idx)).win_counts()
    chosen, _, temperature = _best_ranking(split)
    _, full_strengths, full_temperature = _best_ranking(full_split)

    rows = []
    for count in [0, *(count for count in CALIBRATION if count <= len(pool))]:
        routed, ranked = [], []
        for _ in range(DRAWS if count else 1):
            drawn = pool.select(np.sort(rng.permutation(len(pool))[:count]), None)
            query, *battles = in_view_of(name, drawn, router)  # (count,) each
            query = query.to(x.device)
            vector = vector_from_battles(router, x[query], cluster_idx[query], *battles)  # (C,)
            routed.append(evaluation.of_new_model(name, vector, *trained))
            wins = WinCounts(*map(np.concatenate, zip(others, drawn.win_counts(), strict=True)))
            ranked.append(evaluation.of_scores(bradley_terry(wins, num_models, **chosen), temperature))
        rows.append({"battles": count, "from": "battles"} | _compare(routed, ranked))
    if profiles is not None and name in profiles.rows:
        scores = profiles.of([name], allow_missing=True)  # (1, C)
        vector = torch.from_numpy(standardize(scores, router.metadata.profiles)[0])  # (C,)
        routed = evaluation.of_new_model(name, vector, *trained)
        ranked = evaluation.of_scores(bradley_terry(others, num_models, **chosen), temperature)
        rows.insert(1, {"battles": 0, "from": "profile"} | _compare([routed], [ranked]))
    upper = _compare([evaluation.of_router(*ceiling)], [evaluation.of_scores(full_strengths, full_temperature)])
    rows.append({"battles": len(pool), "from": "training"} | upper)
    size = {"test_battles": len(test), "test_queries": len(test.unique_queries), "calibration_battles": len(pool)}
    return {"model": name, **size, "draws": DRAWS, "rows": rows}


def _best_ranking(split) -> tuple[dict, np.ndarray, float]:
    """The Bradley-Terry ranking of the best validation AUC: hyperparameters, strengths (1, M), and temperature."""
    chosen, strengths, _ = best(rankings(split), split)
    val = split.val_pairs
    return chosen, strengths, metrics.fit_temperature(val.margins(strengths), val.outcome)


def _compare(routed: list[np.ndarray], ranked: list[np.ndarray]) -> dict:
    """Means over draws of both methods' evaluations (3, 1 + S), and their difference, each with its intervals."""
    router, ranking = np.mean(routed, axis=0), np.mean(ranked, axis=0)  # (3, 1 + S) each
    compared = {}
    for name, values in (("rank_router", router), ("bradley_terry", ranking), ("difference", router - ranking)):
        samples = dict(zip(METRICS, values[:, 1:], strict=True))  # (R,) each
        compared[name] = dict(zip(METRICS, values[:, 0].tolist(), strict=True))
        compared[name]["intervals"] = metrics.intervals(samples)
    return compared
