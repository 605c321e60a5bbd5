"""A model that training did not see: what its scores are worth from no battle, from few, and had it been there."""

import copy

import numpy as np
import torch

import metrics
from support.baselines import best, bradley_terry, rankings
from support.files import UserError, one_line
from support.profiles import standardise

CALIBRATION = (10, 50, 200)  # battles of the new model that are known
DRAWS = 20  # of them, over which metrics are means
METRICS = ("auc", "accuracy", "log_loss_calibrated")


def battles_of(battles, name: str, known: list[str]):
    """The battles of a model against those of `known`; none where it has no battle."""
    number = battles.model_names.index(name) if name in battles.model_names else -1
    opponents = [place for place, other in enumerate(battles.model_names) if other in set(known) - {name}]
    a, b = battles.model_a_idx, battles.model_b_idx  # (N,) each
    return battles.select((a == number) & np.isin(b, opponents) | (b == number) & np.isin(a, opponents))


def in_view_of(name: str, battles, router) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, opponents and P(it is better) of a model's battles, (n,) each: for `RankRouter.vector_from_battles`."""
    is_a = battles.model_a_idx == battles.model_names.index(name)  # (n,)
    opponent_idx = np.where(is_a, battles.model_b_idx, battles.model_a_idx)  # (n,)
    opponents = router.indices([battles.model_names[i] for i in opponent_idx])  # (n,)
    outcome = np.where(is_a, battles.outcome, 1 - battles.outcome)  # (n,)
    return tuple(torch.from_numpy(column) for column in (battles.query_idx, opponents, outcome.astype(np.float64)))


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
    """AUC, accuracy and calibrated log loss on the test battles of a model that was held out, RankRouter's and
    Bradley-Terry's on the same battles, with paired intervals over the test queries.

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

    def judge(scores: np.ndarray, margin: float, temperature: float) -> np.ndarray:  # (3, 1 + R)
        sides = test.outcome, test.model_a_idx, test.model_b_idx
        found = metrics.evaluate_resamples(test.margins(scores), *sides, weights, margin, temperature)
        return np.array([found[metric] for metric in METRICS])

    def judge_router(router, *columns: torch.Tensor) -> np.ndarray:
        scores = np.full((len(test.fought[0]), len(whole.train.model_names)), np.nan)  # (Q, M)
        place = [whole.train.model_names.index(model) for model in router.model_names]
        scores[:, place] = router.score(*columns, test.fought[0])
        return judge(scores, *router.link)

    def judge_with(vector: torch.Tensor) -> np.ndarray:
        wider = copy.deepcopy(router)
        wider.add_model(name, vector)
        return judge_router(wider, *columns)

    chosen, strengths, _ = best(rankings(split), split)
    temperature = metrics.fit_temperature(split.val.margins(strengths), split.val.outcome)

    def judge_ranking(battles) -> np.ndarray:
        return judge(bradley_terry(battles, **chosen), 0.0, temperature)

    rows, order = [], np.random.default_rng(seed)
    for count in [0, *(count for count in CALIBRATION if count <= len(pool))]:
        routed, ranked = [], []
        for _ in range(DRAWS if count else 1):
            drawn = pool.select(np.sort(order.permutation(len(pool))[:count]))
            query, opponents, outcome = in_view_of(name, drawn, router)  # (count,) each
            points, cluster_idx = (column[query.to(column.device)] for column in columns)
            routed.append(judge_with(router.vector_from_battles(points, cluster_idx, opponents, outcome)))
            ranked.append(judge_ranking(others.joined(drawn)))
        rows.append({"battles": count, "from": "battles"} | _compared(routed, ranked))
    if profiles is not None and name in profiles.rows:
        vector = torch.from_numpy(standardise(profiles.of([name], True), router.facts["profiles"])[0])  # (C,)
        rows.insert(1, {"battles": 0, "from": "profile"} | _compared([judge_with(vector)], [judge_ranking(others)]))
    with_all = _compared([judge_router(*ceiling)], [judge_ranking(whole.train)])
    rows.append({"battles": len(pool), "from": "training"} | with_all)
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
