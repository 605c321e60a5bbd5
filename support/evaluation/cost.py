"""Cost beside quality on score tables: curves, their summary numbers, and settings chosen on validation."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

import metrics
from support.data.battles import ScoreTable, rows_differ
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
    costs = train.mean_costs()  # (M,)
    return None if np.isnan(costs).any() else costs


class CostEvaluation:
    """Evaluates routers by quality and cost, on R rows of a score table and on weighted samples of them.

    A router chooses by its scores and the expected prices; the cost of its choice is the row's own. All numbers are
    arrays (S,), of which the first is that of all rows, and the others are those of the samples. Rows that lack a cost
    beside a score, or whose scores do not differ, are left out.

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
        differs = rows_differ(scores)  # (R,)
        kept = differs & (np.isnan(scores) | ~np.isnan(costs)).all(1)  # (R,)
        self.num_left_out = int((differs & ~kept).sum())
        scores, costs, self.query_rows, self.weights = scores[kept], costs[kept], query_rows[kept], weights[:, kept]
        self.prices, self.available = prices, ~np.isnan(scores)  # (M,), (R, M)
        self.scores, self.costs = (np.where(self.available, cells, 0) for cells in (scores, costs))  # (R, M) each
        best = scores == np.nanmax(scores, 1, keepdims=True)  # (R, M)
        self.optimal = metrics.choices(-costs, best)  # (R, M), the cheapest of the best
        by_price = np.lexsort((-ranks[0], prices))  # (M,), of equal prices the best first
        self.by_price = by_price[self.available.any(0)[by_price]]  # (m,), those that have a row
        self.strong, self.weak = int(ranks.argmax()), int(self.by_price[0])
        # Each model for all rows, and where it is unavailable the next best one: all on the same rows.
        preferred = (ranks + len(prices) * (np.arange(len(prices)) == model) for model in range(len(prices)))
        models = (metrics.choices(scores, self.available) for scores in preferred)  # M times (R, M)
        self.model_scores, self.model_costs = self.means(models)  # (S, M) each
        self.single_score, self.single_cost = self.model_scores[:, [self.strong]], self.model_costs[:, [self.strong]]
        self.low, self.high = self.model_costs[:, self.by_price[0]], self.model_costs[:, self.by_price[-1]]  # (S,) each
        self.aiq_of_models = self.aiq(self.model_scores[:, self.by_price], self.model_costs[:, self.by_price])  # (S,)

    def of_rows(self, scores: np.ndarray) -> np.ndarray:
        """A router's scores by row, (R, M), from those of the distinct queries (Q, M), or (1, M) for all."""
        return scores if len(scores) == 1 else scores[self.query_rows]

    def means(self, choices: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Mean scores and mean costs (S, L) of L choices (R, M), as `metrics.choices` returns them."""
        pairs = [((chosen * self.scores).sum(1), (chosen * self.costs).sum(1)) for chosen in choices]  # L of 2 (R,)
        return tuple(metrics.weighted_means(np.stack(each, axis=1), self.weights) for each in zip(*pairs, strict=True))

    def aiq(self, scores: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """`metrics.aiq` (S,) of points (S, P), between the mean costs of the cheapest and the most expensive model."""
        return np.array([metrics.aiq(*sample) for sample in zip(costs, scores, self.low, self.high, strict=True)])

    def choose_settings(self, scores: np.ndarray) -> Settings:
        """The settings of a router with scores (Q, M), or (1, M), to be chosen on validation."""
        scores = self.of_rows(scores)  # (R, M)
        weights = self._cost_weights(scores)  # (L,)
        score, cost = (each[0] for each in self.means(self.choose(scores, weight) for weight in weights))  # (L,)
        reached = np.flatnonzero(score >= self.single_score[0])
        accurate = len(score) - 1 - int(score[::-1].argmax())
        return Settings(weights, accurate, int(reached[cost[reached].argmin()]) if len(reached) else None)

    def _cost_weights(self, scores: np.ndarray) -> np.ndarray:
        order = np.argsort(self.prices, kind="stable")  # (M,): of equals the cheapest is then chosen
        scores, prices = np.where(self.available, scores, -np.inf)[:, order], self.prices[order]  # (R, M), (M,)
        budgets = np.linspace(mean_price(scores, prices, 0.0), cheapest(scores, prices), STEPS + 1).tolist()
        weights = np.unique([0.0, *(weight_for_budget(scores, prices, budget) for budget in budgets)])  # (L,)
        # Where the cheapest models have the highest scores, any weight chooses them, from equal scores, too.
        return weights if len(weights) > 1 or prices[0] == prices[-1] else np.array([0.0, 1.0])

    def choose(self, scores: np.ndarray, cost_weight: float) -> np.ndarray:
        """Choices (R, M) of the highest score - cost_weight * price; if prices count, the cheapest of equals."""
        chosen = metrics.choices(scores - cost_weight * self.prices, self.available)  # (R, M)
        return chosen if cost_weight == 0 else metrics.choices(-self.prices[None], chosen > 0)  # (R, M)

    def evaluate(self, scores: np.ndarray, settings: Settings | None) -> tuple[dict[str, np.ndarray], dict]:
        """The summary numbers (S,) of a router with scores (Q, M), or (1, M), and its curve for the history.

        Without settings from validation, the curve is drawn at cost weights of these rows, and only numbers that need
        no chosen setting are returned. `docs/method.md` defines all.
        """
        scores = self.of_rows(scores)  # (R, M)
        weights = self._cost_weights(scores) if settings is None else settings.cost_weights  # (L,)
        score, cost = self.means(self.choose(scores, weight) for weight in weights)  # (S, L) each
        gain, saved = score - self.single_score, 1 - ratio(cost, self.single_cost)  # (S, L) each
        numbers = {"aiq": self.aiq(score, cost)}  # (S,)
        numbers["aiq_beyond_models"] = numbers["aiq"] - self.aiq_of_models
        numbers |= self._strong_calls(scores)
        if settings is not None:
            accurate, saving = settings.accurate, settings.saving
            numbers["perf_gain"] = gain[:, accurate]
            # Where no setting reaches the best single model on validation, that model is used.
            nothing = np.zeros(len(gain))  # (S,)
            numbers["cost_save"] = nothing if saving is None else saved[:, saving]
            numbers["cost_save_gain"] = nothing if saving is None else gain[:, saving]
            is_optimal = (self.choose(scores, weights[accurate]) * self.optimal).sum(1)  # (R,)
            numbers["optimal_selection"] = metrics.weighted_means(is_optimal, self.weights)
            numbers["optimal_cost"] = ratio(self.means([self.optimal])[1][:, 0], cost[:, accurate])
        reached = saved[0][gain[0] >= 0]  # (l,)
        save = float(reached.max(initial=0.0))
        details = {"curve": self._points(weights, score, cost)}
        details["test_chosen"] = {"perf_gain": float(gain[0].max()), "cost_save": None if np.isnan(save) else save}
        return numbers, details

    def _strong_calls(self, scores: np.ndarray) -> dict[str, np.ndarray]:
        """`metrics.strong_calls` of scores (R, M), or (1, M), on the rows that both models have."""
        pair = self.available[:, [self.strong, self.weak]].all(1)  # (R,)
        lead = np.broadcast_to(scores[:, self.strong] - scores[:, self.weak], len(pair))  # (R,)
        gain = self.scores[:, self.strong] - self.scores[:, self.weak]  # (R,)
        return metrics.strong_calls(lead[pair], gain[pair], self.weights[:, pair])

    def _points(self, weights: np.ndarray, score: np.ndarray, cost: np.ndarray) -> list[dict]:
        """The curve for the history, from cost weights (L,), mean scores and mean costs (S, L)."""
        names = ("cost_weight", "mean_cost", "mean_score", "interval")
        columns = weights.tolist(), cost[0].tolist(), score[0].tolist(), map(metrics.interval, score[1:].T)
        return [dict(zip(names, point, strict=True)) for point in zip(*columns, strict=True)]

    def describe(self, model_names: list[str]) -> dict:
        """For the history: the rows, the strong and the weak model, each model with its point, and their hull's AIQ."""
        columns = {"price": self.prices, "mean_cost": self.model_costs[0], "mean_score": self.model_scores[0]}
        return {
            "rows": len(self.query_rows),
            "rows_left_out": self.num_left_out,
            "strong": model_names[self.strong],
            "weak": model_names[self.weak],
            "models": {
                model_names[model]: {name: float(values[model]) for name, values in columns.items()}
                for model in sorted(self.by_price)
            },
        }


def ratio(part: np.ndarray, of: np.ndarray) -> np.ndarray:
    """part / of, NaN where that is not defined."""
    return np.divide(part, of, out=np.full(part.shape, np.nan), where=np.broadcast_to(of > 0, part.shape))


def row_costs(table: ScoreTable, expected: np.ndarray, prices: dict[str, float] | None) -> np.ndarray:
    """The costs of a table's cells (R, M): its own, or with `prices` the expected ones (M,)."""
    return table.costs if prices is None else np.broadcast_to(expected, table.scores.shape)


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
        costs = row_costs(side.table, expected, prices)  # (R, M)
        both.append(CostEvaluation(scores, costs, side.table_query_rows, expected, ranks, row_weights))
    return tuple(both) if all(len(each.query_rows) for each in both) else None
