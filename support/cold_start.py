"""A model that training did not see: what its scores are worth from no battle, from few, and had it been there."""

import copy

import numpy as np
import torch

import metrics
from support.baselines import best, bradley_terry, rankings
from support.files import UserError, one_line
from support.new_models import battles_of, in_view_of, vector_from_battles
from support.profiles import standardise

CALIBRATION = (10, 50, 200)  # battles of the new model that are known
DRAWS = 20  # of them, over which metrics are means
METRICS = ("auc", "accuracy", "log_loss_calibrated")


def held_out_battles(name: str, split, whole) -> tuple:
    """The battles of a model that `split` holds out, against models that it knows: calibration and test.

    `whole` is the split with the model. Raises `UserError` where there is no test battle.
    """
    pool, test = (battles_of(side, name, split.train.model_names) for side in (whole.train, whole.test))
    if not len(test):
        raise UserError(
            f"--hold_out_model {one_line(name)}: it has {len(pool)} training battles and no decisive test battle "
            "against the other models; expected some of both"
        )
    return pool, test


def cold_start(name: str, split, whole, trained: tuple, ceiling: tuple, profiles, seed: int) -> dict:
    """RankRouter and Bradley-Terry on the test battles of a model that was held out, given the same battles of it.

    AUC, accuracy and calibrated log loss, with paired intervals over the test queries.

    Args:
        split, whole: without the model's battles, and with them; `whole` gives calibration battles from its training
            side, and the test battles.
        trained, ceiling: a router, standardised embeddings (Q, H) and clusters (Q,) of `whole`'s queries; one trained
            on each split.
        profiles: those of `--capability_file`, or None.
        seed: of the calibration battles' draws, and of the bootstrap.
    """
    (router, *columns), (pool, test) = trained, held_out_battles(name, split, whole)
    weights = metrics.bootstrap_weights(test.query_idx, seed)  # (R, n)
    weights = np.concatenate([np.ones_like(weights[:1]), weights])  # (1 + R, n), the test set itself before its samples
    number = whole.train.model_names.index(name)
    others = whole.train.select((whole.train.model_a_idx != number) & (whole.train.model_b_idx != number))

    def judge(scores: np.ndarray, temperature: float) -> np.ndarray:  # (3, 1 + R)
        sides = test.outcome, test.model_a_idx, test.model_b_idx
        found = metrics.evaluate_resamples(test.margins(scores), *sides, weights, temperature=temperature)
        return np.array([found[metric] for metric in METRICS])

    def judge_router(router, *columns: torch.Tensor) -> np.ndarray:
        scores = np.full((len(test.fought[0]), len(whole.train.model_names)), np.nan)  # (Q, M)
        place = [whole.train.model_names.index(model) for model in router.model_names]
        scores[:, place] = router.score(*(column[test.fought[0]] for column in columns))
        return judge(scores, router.temperature)

    def judge_with(vector: torch.Tensor) -> np.ndarray:
        wider = copy.deepcopy(router)
        wider.add_model(name, vector)
        return judge_router(wider, *columns)

    chosen, strengths, _ = best(rankings(split), split)
    temperature = metrics.fit_temperature(split.val.margins(strengths), split.val.outcome)
    _, with_all, _ = best(rankings(whole), whole)
    temperature_with_all = metrics.fit_temperature(whole.val.margins(with_all), whole.val.outcome)

    def judge_ranking(battles) -> np.ndarray:
        return judge(bradley_terry(battles, **chosen), temperature)

    rows, rng = [], np.random.default_rng(seed)
    for count in [0, *(count for count in CALIBRATION if count <= len(pool))]:
        routed, ranked = [], []
        for _ in range(DRAWS if count else 1):
            drawn = pool.select(np.sort(rng.permutation(len(pool))[:count]))
            query, opponents, outcome = in_view_of(name, drawn, router)  # (count,) each
            points, cluster_idx = (column[query.to(column.device)] for column in columns)
            routed.append(judge_with(vector_from_battles(router, points, cluster_idx, opponents, outcome)))
            ranked.append(judge_ranking(others.joined(drawn)))
        rows.append({"battles": count, "from": "battles"} | _compared(routed, ranked))
    if profiles is not None and name in profiles.rows:
        vector = torch.from_numpy(standardise(profiles.of([name], True), router.facts["profiles"])[0])  # (C,)
        rows.insert(1, {"battles": 0, "from": "profile"} | _compared([judge_with(vector)], [judge_ranking(others)]))
    ends = _compared([judge_router(*ceiling)], [judge(with_all, temperature_with_all)])
    rows.append({"battles": len(pool), "from": "training"} | ends)
    size = {"test_battles": len(test), "test_queries": len(test.fought[0]), "calibration_battles": len(pool)}
    return {"model": name, **size, "draws": DRAWS, "rows": rows}


def _compared(routed: list[np.ndarray], ranked: list[np.ndarray]) -> dict:
    """Means over draws of metrics (3, 1 + R), on the test set and on its samples: points, intervals, differences."""
    router, ranking = np.mean(routed, axis=0), np.mean(ranked, axis=0)  # (3, 1 + R) each
    found = {}
    for name, values in (("rank_router", router), ("bradley_terry", ranking), ("difference", router - ranking)):
        found[name] = {metric: float(row[0]) for metric, row in zip(METRICS, values, strict=True)}
        found[name]["intervals"] = {
            metric: metrics.interval(row[1:]) for metric, row in zip(METRICS, values, strict=True)
        }
    return found
