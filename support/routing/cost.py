"""Routing by cost: prices from a file, the cost weight that meets a budget, and the curve of quality by cost."""

from pathlib import Path

import numpy as np

import metrics
from data_loader import query_ids
from support.data.cells import MODELS, as_number
from support.data.formats import open_table
from support.data.layouts import listed
from support.system.errors import UserError, one_line, valid_unicode

MAX_PRICE = 1e15  # per query; also the largest cost weight: their products are exact enough to rank by
PER_QUERY, PER_TOKENS = "price_per_query", "price_per_million_tokens"


def read_prices(path: str, tokens_per_query: float | None) -> dict[str, float]:
    """Each model's price per query, from a file with a column `model` and one of the two of prices.

    A price per million tokens becomes that of a query with its answer, together `tokens_per_query` tokens. Raises
    `UserError` on other columns, on a price that is not a number of at least 0, and on a model with two rows.
    """
    table = open_table(Path(path))
    name_column, price_column = table.first(*MODELS), table.first(PER_QUERY, PER_TOKENS)
    if name_column is None or price_column is None or {PER_QUERY, PER_TOKENS}.issubset(table.columns):
        expected = f"`model` and one of `{PER_QUERY}`, `{PER_TOKENS}`"
        raise UserError(f"{path} has the columns {listed(table.columns)}; expected {expected}")
    if (price_column == PER_TOKENS) != (tokens_per_query is not None):
        needed = "needs" if price_column == PER_TOKENS else "takes no"
        raise UserError(f"{path} has the column {price_column}, which {needed} --tokens_per_query")
    unit = 1.0 if tokens_per_query is None else tokens_per_query / 1e6
    prices = {}
    for chunk in table.read([name_column, price_column]):
        for name, cell in zip(chunk[name_column], chunk[price_column], strict=True):
            price = as_number(cell)
            if price is None or not 0 <= price * unit <= MAX_PRICE:
                expected = f"a number of at least 0, and at most {MAX_PRICE:g} per query"
                raise UserError(f"{path}: the price of {one_line(name)} is {cell!r}; expected {expected}")
            name = valid_unicode(str(name))
            if name in prices:
                raise UserError(f"{path} has two prices of {one_line(name)}; expected one")
            prices[name] = price * unit
    return prices


def cheapest_first(
    names: list[str], known: list[str], prices: dict[str, float], path: str
) -> tuple[list[str], np.ndarray]:
    """Candidate models sorted by price, and their prices (m,): of equal scores, argmax then takes the cheapest.

    Raises `UserError` where one of `names` has no price, or a price belongs to no model of `known`.
    """
    missing = [name for name in names if name not in prices]
    unknown = [name for name in prices if name not in known]
    if missing or unknown:
        needless = f"has prices of {listed(map(one_line, unknown))}, which the router does not know"
        problem = f"has no price of {listed(map(one_line, missing))}" if missing else needless
        routed = listed(map(one_line, known))
        raise UserError(f"{path} {problem}; the router knows {routed}, of which --models can choose")
    names = sorted(names, key=prices.get)
    return names, np.array([prices[name] for name in names])


def choose(scores: np.ndarray, prices: np.ndarray, cost_weight: float) -> np.ndarray:
    """The model (Q,) of the highest score - cost_weight * price, of scores (Q, m) and prices (m,) or (Q, m)."""
    return np.argmax(scores - cost_weight * prices, axis=1)  # (Q,)


def mean_price(scores: np.ndarray, prices: np.ndarray, cost_weight: float) -> float:
    """The mean price of the models chosen at a cost weight."""
    chosen = choose(scores, prices, cost_weight)  # (Q,)
    return float(np.broadcast_to(prices, scores.shape)[np.arange(len(scores)), chosen].mean())


def cheapest(scores: np.ndarray, prices: np.ndarray) -> float:
    """The mean price of the cheapest available models; a score of -inf marks a model as unavailable."""
    return float(np.where(scores > -np.inf, prices, np.inf).min(1).mean())


def weight_for_budget(scores: np.ndarray, prices: np.ndarray, budget: float) -> float:
    """The smallest cost weight at which the mean price of the chosen models is at most `budget`.

    One weight for all queries maximizes the sum of scores among all choices that cost at most as much as its own.
    Raises `UserError` where even the cheapest models exceed the budget.
    """
    least = cheapest(scores, prices)
    if budget < least * (1 - 1e-9):
        raise UserError(f"--budget {budget:g} is less than the cheapest models cost, {least:g} per query; give more")

    def is_met(cost_weight: float) -> bool:
        return mean_price(scores, prices, cost_weight) <= budget * (1 + 1e-9)  # for the rounding of the mean

    low, high = 0.0, 1.0
    if is_met(low):
        return low
    while not is_met(high) and high < 1e300:  # prices that differ only by rounding may never meet it
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:  # until low and high are adjacent floats
        low, high = (low, middle) if is_met(middle) else (middle, high)
    return high


def mean_costs(battles, path: str) -> dict[str, float]:
    """The mean cost of each model that has costs in a score table from `path`. Raises `UserError` without any."""
    costs = None if battles.table is None else battles.table.costs  # (R, M)
    if costs is None:
        raise UserError(f"{path} has no costs; give --prices, or a score table with columns of costs")
    known = ~np.isnan(costs).all(0)  # (M,)
    return {name: float(np.nanmean(costs[:, i])) for i, name in enumerate(battles.model_names) if known[i]}


def options(
    battles, names: list[str], prices: np.ndarray, router, own_costs: bool = False
) -> tuple[tuple[np.ndarray, ...], dict]:
    """The choices that `curve` evaluates: query (n,); score, price, reward and cost (n, m) of each candidate model.

    Costs are the prices, or with `own_costs` those of the table's rows.

    From a score table these are its rows, with the models `names`; from battles, the decisive ones between two of these
    models. Queries on which the router was trained or chosen are left out. Returns also what was left out, counted by
    reason. Raises `UserError` where nothing is left.
    """
    columns = router.indices(names)  # (m,)
    outcomes = _table_rewards(battles, names) if battles.table is not None else _battle_rewards(battles, names)
    query_idx, which, reward, usable, left_out = outcomes
    costs = _columns(battles.table.costs, battles, names) if own_costs else prices[which]  # (N, m)
    without = usable & (np.isnan(costs) & ~np.isnan(reward)).any(1)  # (N,)
    if without.any():
        left_out["rows without a cost"], usable = int(without.sum()), usable & ~without
    seen = np.isin(query_ids(battles.queries), router.metadata.seen_queries.numpy())[query_idx]  # (N,)
    left_out["on queries that the router was trained on"] = int((usable & seen).sum())
    usable = usable & ~seen  # (N,)
    if not usable.any():
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        expected = "others, between models with a price"
        raise UserError(f"no outcome is left to draw a curve on: {counts}; expected {expected}")
    query_idx, which, reward, costs = (each[usable] for each in (query_idx, which, reward, costs))  # (n,), (n, m) each
    queries, row = np.unique(query_idx, return_inverse=True)  # (Q,), (n,)
    scores = router.scores_of([battles.queries[i] for i in queries])[:, columns]  # (Q, m)
    scores = np.take_along_axis(scores[row], which, axis=1)  # (n, m)
    scores = np.where(np.isnan(reward), -np.inf, scores)  # (n, m)
    return (query_idx, scores, prices[which], np.nan_to_num(reward), np.nan_to_num(costs)), left_out


def _columns(cells: np.ndarray, battles, names: list[str]) -> np.ndarray:
    """The columns of these models (R, m) from cells of a score table (R, M), NaN for models that are not in it."""
    number = {name: i for i, name in enumerate(battles.model_names)}
    return np.pad(cells, ((0, 0), (0, 1)), constant_values=np.nan)[:, [number.get(name, -1) for name in names]]


def _table_rewards(battles, names: list[str]) -> tuple:
    """The rows of a score table as query (R,), candidates (R, m) into `names`, reward (R, m), usable (R,), left out."""
    reward = _columns(battles.table.scores, battles, names)  # (R, m), NaN where a model is unavailable
    of_two = (~np.isnan(reward)).sum(1) > 1  # (R,)
    usable = np.fmax.reduce(reward, axis=1) > np.fmin.reduce(reward, axis=1)  # (R,)
    which = np.broadcast_to(np.arange(len(names)), reward.shape)  # (R, m)
    return (
        battles.table.query_idx,
        which,
        reward,
        usable,
        {
            "rows without two of these models": int((~of_two).sum()),
            "rows whose scores do not differ": int((of_two & ~usable).sum()),
        },
    )


def _battle_rewards(battles, names: list[str]) -> tuple:
    """Battles as query (N,), candidates a and b (N, 2) into `names`, reward (N, 2), usable (N,), and left out."""
    number = np.array([names.index(name) if name in names else -1 for name in battles.model_names])  # (M,)
    which = number[np.column_stack([battles.model_a_idx, battles.model_b_idx])]  # (N, 2)
    reward = np.column_stack([battles.outcome, 1 - battles.outcome]).astype(np.float64)  # (N, 2)
    known, tie = (which >= 0).all(1), battles.outcome == 0.5  # (N,) each
    left_out = {"ties": int(tie.sum()), "battles of other models": int((~known & ~tie).sum())}
    return battles.query_idx, which, reward, known & ~tie, left_out


def curve(
    scores: np.ndarray,
    prices: np.ndarray,
    reward: np.ndarray,
    query_idx: np.ndarray,
    seed: int,
    steps: int = 10,
    costs: np.ndarray | None = None,
) -> list[dict]:
    """The mean reward of the chosen models, at mean prices from that of the router without prices to the least.

    Args:
        scores: (n, m), -inf where a model is unavailable.
        prices: (n, m), of the same models.
        reward: (n, m), 1 for the winner of a battle and 0 for its loser, or a table's scores.
        query_idx: int (n,); the bootstrap, with `seed`, draws queries.
        costs: (n, m), what the choices cost in the end; by default the prices.
        steps: between the two ends, evenly spaced in mean price.

    Each point has `cost_weight`, `mean_price`, the mean reward as `worth`, its 95 % `interval`, and `random_mix`: the
    reward at the same mean price of random routing between the two ends of the curve.
    """
    queries, row = np.unique(query_idx, return_inverse=True)  # (Q,), (n,)
    weights = metrics.bootstrap_weights(len(queries), seed)[:, row]  # (R, n)
    shares = weights / weights.sum(1, keepdims=True)  # (R, n)
    order = np.argsort(prices, axis=1, kind="stable")  # (n, m), so that argmax takes the cheapest of equals
    columns = scores, prices, reward, prices if costs is None else costs
    scores, prices, reward, costs = (np.take_along_axis(column, order, axis=1) for column in columns)  # (n, m) each
    most_expensive, least, points = mean_price(scores, prices, 0.0), cheapest(scores, prices), []
    for budget in np.linspace(most_expensive, least, steps + 1 if most_expensive > least else 1):
        weight = weight_for_budget(scores, prices, float(budget))
        chosen = np.arange(len(reward)), choose(scores, prices, weight)  # (n,), (n,)
        got, spent = reward[chosen], costs[chosen]  # (n,) each
        point = {"cost_weight": weight, "mean_price": float(spent.mean()), "worth": float(got.mean())}
        points.append(point | {"interval": metrics.interval(shares @ got)})
    first, last = points[0], points[-1]
    for point in points:
        expected = mean_price(scores, prices, point["cost_weight"])
        share = (expected - least) / max(most_expensive - least, 1e-300)
        point["random_mix"] = last["worth"] + share * (first["worth"] - last["worth"])
    return points
