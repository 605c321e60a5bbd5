"""Cost beside quality on score tables: curves, their summary numbers, and settings chosen on validation."""

from dataclasses import dataclass

import numpy as np

import metrics
from support.data.battles import ScoreTable
from support.data.layouts import listed
from support.routing.cost import cheapest, mean_price, read_prices, weight_for_budget
from support.system.errors import UserError, one_line

STEPS = 20  # of a curve, evenly spaced in mean price on the data on which its cost weights are chosen


@dataclass(frozen=True)
class Settings:
    """Cost weights of a curve, and the two of them that were chosen on validation."""

    cost_weights: np.ndarray  # (L,), ascending from 0 to one at which the cheapest model is chosen
    accurate: int  # index of the highest mean score, the cheapest of equals
    saving: int | None  # that of the least cost at the best single model's mean score or above; None: at none of them


def find_prices(path: str, tokens_per_query: float | None, split) -> dict[str, float]:
    """`read_prices` for the models of a split; raises `UserError` where one has none, or the test is on battles."""
    if split.test.table is None:
        raise UserError(f"--prices {path}: the data are battles; costs are evaluated on score tables, or by route.py")
    prices, names = read_prices(path, tokens_per_query), split.train.model_names
    if missing := [name for name in names if name not in prices]:
        models = listed(map(one_line, names))
        raise UserError(f"{path} has no price of {listed(map(one_line, missing))}; expected one of each of {models}")
    return prices


def expected_prices(train: ScoreTable, model_names: list[str], prices: dict[str, float] | None) -> np.ndarray | None:
    """What a query costs with each model (M,), as known before it is answered; None where that is not known.

    It is the price in `prices`, or the model's mean cost in the training table (R, M).
    """
    if prices is not None:
        return np.array([prices[name] for name in model_names])
    known = None if train.costs is None else ~np.isnan(train.costs)  # (R, M)
    if known is None or not known.any(0).all():
        return None
    return np.where(known, train.costs, 0).sum(0) / known.sum(0)  # (M,)


class CostEvaluation:
    """Evaluates routers by quality and cost, on R rows of a score table and on weighted samples of them.

    A router chooses by its scores and the expected prices; the cost of its choice is the row's own. All numbers are
    arrays (S,), of which the first is that of all rows, and the others are those of the samples. Rows that lack a cost
    beside a score are left out.

    Args:
        scores: of the table, (R, M), NaN where a model is unavailable.
        costs: of the same cells, (R, M).
        query_rows: (R,), of each row's query in the scores of routers.
        prices: expected ones, (M,).
        ranks: (1, M), the highest for the model that is best by its mean score in training.
        weights: of the rows in each sample, (S, R), the first of them ones.
    """

    def __init__(
        self,
        scores: np.ndarray,
        costs: np.ndarray,
        query_rows: np.ndarray,
        prices: np.ndarray,
        ranks: np.ndarray,
        weights: np.ndarray,
    ):
        kept = (np.isnan(scores) | ~np.isnan(costs)).all(1)  # (R,)
        self.num_left_out = len(kept) - int(kept.sum())
        scores, costs, self.query_rows, weights = scores[kept], costs[kept], query_rows[kept], weights[:, kept]
        self.prices, self.available, self.weights = prices, ~np.isnan(scores), weights
        self.scores, self.costs = (np.where(self.available, cells, 0) for cells in (scores, costs))  # (R, M) each
        best = self.available & (scores == np.nanmax(scores, 1, keepdims=True))  # (R, M)
        self.optimal = metrics.choices(-costs, best)  # (R, M), the cheapest of the best
        self.single_score, self.single_cost = self.means(metrics.choices(ranks, self.available))  # (S,) each
        by_price = np.lexsort((-ranks[0], prices))  # (M,), of equal prices the best first
        by_price = by_price[self.available.any(0)[by_price]]  # (m,), those that have a row
        self.strong, self.weak = int(ranks.argmax()), int(by_price[0])
        share = metrics.weighted_means(self.available, weights)  # (S, M), of the rows that a model has
        share = np.where(share > 0, share, np.nan)  # (S, M)
        cells = self.scores, self.costs
        self.model_scores, self.model_costs = (metrics.weighted_means(each, weights) / share for each in cells)
        self.low, self.high = (self.model_costs[:, by_price[end]] for end in (0, -1))  # (S,) each
        self.zero_router = self.aiq(self.model_scores, self.model_costs)  # (S,)

    def of_rows(self, scores: np.ndarray) -> np.ndarray:
        """A router's scores by row, (R, M), from those of the distinct queries (Q, M), or (1, M) for all."""
        return scores if len(scores) == 1 else scores[self.query_rows]

    def means(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean score and mean cost (S,) of choices (R, M), as `metrics.choices` returns them."""
        columns = ((chosen * cells).sum(1) for cells in (self.scores, self.costs))  # (R,) each
        return tuple(metrics.weighted_means(column, self.weights) for column in columns)

    def aiq(self, scores: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """`metrics.aiq` (S,) of points (S, P), between the mean costs of the cheapest and the most expensive model."""
        points = zip(costs, scores, ~np.isnan(scores), self.low, self.high, strict=True)
        return np.array([metrics.aiq(cost[known], score[known], *ends) for cost, score, known, *ends in points])

    def choose_settings(self, scores: np.ndarray) -> Settings:
        """The settings of a router with scores (Q, M), or (1, M), to be chosen on validation."""
        scores = self.of_rows(scores)  # (R, M)
        weights = self._cost_weights(scores)  # (L,)
        score, cost = (each[0] for each in self.curve(scores, weights))  # (L,) each
        reached = np.flatnonzero(score >= self.single_score[0])
        accurate = len(score) - 1 - int(score[::-1].argmax())
        return Settings(weights, accurate, int(reached[cost[reached].argmin()]) if len(reached) else None)

    def _cost_weights(self, scores: np.ndarray) -> np.ndarray:
        order = np.argsort(self.prices, kind="stable")  # (M,): of equals the cheapest is then chosen
        scores, prices = np.where(self.available, scores, -np.inf)[:, order], self.prices[order]  # (R, M), (M,)
        gaps = np.diff(np.unique(prices))  # (m,)
        if not len(gaps):
            return np.zeros(1)
        last = 2 * np.ptp(scores[self.available[:, order]]) / gaps.min()  # above all that a score could outweigh
        budgets = np.linspace(mean_price(scores, prices, 0.0), cheapest(scores, prices), STEPS + 1)
        return np.unique([0.0, *(weight_for_budget(scores, prices, budget) for budget in budgets.tolist()), last])

    def choose(self, scores: np.ndarray, cost_weight: float) -> np.ndarray:
        """Choices (R, M) of the highest score - cost_weight * price, if prices count, the cheapest of equals."""
        chosen = metrics.choices(scores - cost_weight * self.prices, self.available)  # (R, M)
        return chosen if cost_weight == 0 else metrics.choices(-self.prices[None], chosen > 0)  # (R, M)

    def curve(self, scores: np.ndarray, cost_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean score and mean cost (S, L) of a router with scores (R, M), or (1, M), at cost weights (L,)."""
        means = [self.means(self.choose(scores, weight)) for weight in cost_weights]
        return tuple(np.stack(each, axis=1) for each in zip(*means, strict=True))  # (S, L) each

    def evaluate(self, scores: np.ndarray, settings: Settings | None) -> tuple[dict[str, np.ndarray], dict]:
        """The summary numbers (S,) of a router with scores (Q, M), or (1, M), and its curve for the history.

        Without settings from validation, the curve is drawn at cost weights of these rows, and only numbers that need
        no chosen setting are returned. `docs/method.md` defines all.
        """
        scores = self.of_rows(scores)  # (R, M)
        weights = self._cost_weights(scores) if settings is None else settings.cost_weights  # (L,)
        score, cost = self.curve(scores, weights)  # (S, L) each
        numbers = {"aiq": self.aiq(score, cost)}  # (S,)
        numbers["aiq_beyond_models"] = numbers["aiq"] - self.zero_router
        pair = self.available[:, [self.strong, self.weak]].all(1)  # (R,)
        lead = np.broadcast_to(scores[:, self.strong] - scores[:, self.weak], len(pair))  # (R,)
        gain = self.scores[:, self.strong] - self.scores[:, self.weak]  # (R,)
        if pair.any():
            numbers |= metrics.strong_calls(lead[pair], gain[pair], self.weights[:, pair])
        if settings is not None:
            numbers |= self._at_settings(scores, settings, score, cost)
        reached = score[0] >= self.single_score[0]  # (L,)
        saved = 1 - cost[0] / self.single_cost[0]  # (L,)
        columns = {"cost_weight": weights, "mean_cost": cost[0], "mean_score": score[0]}  # (L,) each
        points = [dict(zip(columns, map(float, point), strict=True)) for point in zip(*columns.values(), strict=True)]
        for point, samples in zip(points, score.T, strict=True):
            point["interval"] = metrics.interval(samples[1:])
        test_chosen = {
            "perf_gain": float(score[0].max() - self.single_score[0]),
            "cost_save": float(saved[reached].max()) if reached.any() else 0.0,
        }
        return numbers, {"curve": points, "test_chosen": test_chosen}

    def describe(self, model_names: list[str]) -> dict:
        """For the history: the rows, the strong and the weak model, and each model with its point and their hull."""
        aiq, columns = self.zero_router, {"price": self.prices, "mean_cost": self.model_costs[0]}
        columns["mean_score"] = self.model_scores[0]
        points = zip(*(values.tolist() for values in columns.values()), strict=True)
        return {
            "rows": len(self.query_rows),
            "rows_left_out": self.num_left_out,
            "strong": model_names[self.strong],
            "weak": model_names[self.weak],
            "models": {
                name: dict(zip(columns, point, strict=True)) for name, point in zip(model_names, points, strict=True)
            },
            "aiq_of_models": None if np.isnan(aiq[0]) else float(aiq[0]),
            "aiq_of_models_interval": metrics.interval(aiq[1:]),
        }

    def _at_settings(
        self, scores: np.ndarray, settings: Settings, score: np.ndarray, cost: np.ndarray
    ) -> dict[str, np.ndarray]:
        """What a router with a curve (S, L) reaches at the two settings of validation, (S,) each."""
        accurate, saving = settings.accurate, settings.saving
        chosen = self.choose(scores, settings.cost_weights[accurate])  # (R, M)
        optimal_cost = self.means(self.optimal)[1]  # (S,)
        numbers = {"perf_gain": score[:, accurate] - self.single_score}
        # Where no setting reaches the best single model on validation, that model is used.
        nothing = np.zeros_like(self.single_score)  # (S,)
        numbers["cost_save"] = nothing if saving is None else 1 - cost[:, saving] / self.single_cost
        numbers["cost_save_gain"] = nothing if saving is None else score[:, saving] - self.single_score
        numbers["optimal_selection"] = metrics.weighted_means((chosen * self.optimal).sum(1), self.weights)
        return numbers | {"optimal_cost": optimal_cost / cost[:, accurate]}


def cost_evaluations(split, prices: dict[str, float] | None, ranks: np.ndarray, weights: np.ndarray) -> tuple | None:
    """The `CostEvaluation` of validation, and that of the test with `weights` (1 + S, R); None without costs.

    Costs are those of `prices` by model, or the table's own.
    """
    expected = expected_prices(split.train.table, split.train.model_names, prices)  # (M,)
    if expected is None or split.val.table is None:
        return None
    both = []
    for side, row_weights in ((split.val, np.ones((1, len(split.val.table)))), (split.test, weights)):
        scores = side.table.scores  # (R, M)
        costs = side.table.costs if prices is None else np.broadcast_to(expected, scores.shape)  # (R, M)
        both.append(CostEvaluation(scores, costs, side.table_query_rows, expected, ranks, row_weights))
    return tuple(both) if all(len(each.query_rows) for each in both) else None
