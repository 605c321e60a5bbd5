"""What models cost: prices from a file, the trade-off that meets a budget, and the curve of quality by cost."""

from pathlib import Path

import numpy as np

import metrics
from data_loader import query_ids
from support.files import UserError, one_line, valid_unicode
from support.layouts import listed, model_column
from support.tables import as_number, open_table

MOST = 1e15  # of a price per query and of a cost weight: their products are exact enough to rank by
PER_QUERY, PER_TOKENS = "price_per_query", "price_per_million_tokens"


def read_prices(path: str, tokens_per_query: float | None) -> dict[str, float]:
    """Each model's price per query, from a file with a column `model` and one of the two of prices.

    A price per million tokens is that of a query with its answer, of `tokens_per_query` tokens together. Raises
    `UserError` where the columns are others, a price is no number of at least 0, or a model stands twice.
    """
    table = open_table(Path(path))
    name_column = model_column(table)
    found = [name for name in (PER_QUERY, PER_TOKENS) if name in table.columns]
    if name_column is None or len(found) != 1:
        raise UserError(
            f"{path} has the columns {listed(table.columns)}; expected `model` and one of `{PER_QUERY}`, `{PER_TOKENS}`"
        )
    if (found[0] == PER_TOKENS) != (tokens_per_query is not None):
        needed = "needs" if found[0] == PER_TOKENS else "takes no"
        raise UserError(f"{path} has the column {found[0]}, which {needed} --tokens_per_query")
    unit = 1.0 if tokens_per_query is None else tokens_per_query / 1e6
    prices = {}
    for chunk in table.read([name_column, found[0]]):
        for name, cell in zip(chunk[name_column], chunk[found[0]], strict=True):
            price = as_number(cell)
            if price is None or not 0 <= price * unit <= MOST:
                told = f"{path}: the price of {one_line(name)} is {cell!r}"
                raise UserError(f"{told}; expected a number of at least 0, and at most {MOST:g} per query")
            name = valid_unicode(str(name))
            if name in prices:
                raise UserError(f"{path} has two prices of {one_line(name)}; expected one")
            prices[name] = price * unit
    return prices


def cheapest_first(
    names: list[str], known: list[str], prices: dict[str, float], path: str
) -> tuple[list[str], np.ndarray]:
    """Models to choose from, the cheaper first, and their prices (m,); so the first of equals is the cheaper one.

    Raises `UserError` where one has no price, or a price is of no model in `known`.
    """
    lacking = [name for name in names if name not in prices]
    unknown = [name for name in prices if name not in known]
    if lacking or unknown:
        problem = f"has prices of {listed(map(one_line, unknown))}, which the router does not know"
        if lacking:
            problem = f"has no price of {listed(map(one_line, lacking))}"
        raise UserError(f"{path} {problem}; it knows {listed(map(one_line, known))}, of which --models can choose")
    names = sorted(names, key=prices.get)
    return names, np.array([prices[name] for name in names])


def choose(scores: np.ndarray, prices: np.ndarray, cost_weight: float) -> np.ndarray:
    """The model (Q,) of the highest score - cost_weight * price, of scores (Q, m) and prices (m,) or (Q, m)."""
    return np.argmax(scores - cost_weight * prices, axis=1)  # (Q,)


def mean_price(scores: np.ndarray, prices: np.ndarray, cost_weight: float) -> float:
    """The mean price of the models chosen at a cost weight."""
    chosen = choose(scores, prices, cost_weight)[:, None]  # (Q, 1)
    return float(np.take_along_axis(np.broadcast_to(prices, scores.shape), chosen, 1).mean())


def cheapest(scores: np.ndarray, prices: np.ndarray) -> float:
    """The mean price of the cheapest models that are to be had, those whose score is not -inf."""
    return float(np.where(np.isfinite(scores), prices, np.inf).min(1).mean())


def weight_for_budget(scores: np.ndarray, prices: np.ndarray, budget: float) -> float:
    """The least cost weight at which the mean price of the chosen models is at most `budget`.

    As one weight trades score for price alike on all queries, no other choice within the budget has a higher sum of
    scores, but for what one query more would cost. Raises `UserError` where even the cheapest models cost more.
    """
    least = cheapest(scores, prices)
    if budget < least * (1 - 1e-9):
        raise UserError(f"--budget {budget:g} is less than the cheapest models cost, {least:g} per query; give more")

    def is_met(cost_weight: float) -> bool:
        return mean_price(scores, prices, cost_weight) <= budget * (1 + 1e-9)  # a mean has rounding of its own

    low, high = 0.0, 1.0
    if is_met(low):
        return low
    while not is_met(high) and high < 1e300:  # where prices differ by less than numbers can tell
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:  # until they are neighbours
        low, high = (low, middle) if is_met(middle) else (middle, high)
    return high


def options(battles, names: list[str], prices: np.ndarray, router) -> tuple[tuple[np.ndarray, ...], dict]:
    """What there is to choose from, as `curve` takes it: query (n,), scores, prices and worth (n, m) of each model.

    Of a score table, its rows, with the models `names`; of battles, the decisive ones between two of these. Queries
    that the router was trained on or chosen by are left out; returns also what was left out, counted by reason.
    """
    columns, place = router.indices(names), {name: i for i, name in enumerate(names)}  # (m,)
    if battles.table is not None:
        worth = np.full((len(battles.table.scores), len(names)), np.nan)  # (R, m)
        for i, name in enumerate(battles.model_names):
            if name in place:
                worth[:, place[name]] = battles.table.scores[:, i]
        query_idx, usable = battles.table.query_idx, (~np.isnan(worth)).sum(1) > 1  # (R,) each
        left_out = {"rows without two of these models": int((~usable).sum())}
        which = np.broadcast_to(np.arange(len(names)), worth.shape)  # (R, m), into the names
    else:
        number = np.array([place.get(name, -1) for name in battles.model_names])  # (M,)
        which = number[np.column_stack([battles.model_a_idx, battles.model_b_idx])]  # (N, 2), into the names
        worth = np.column_stack([battles.outcome, 1 - battles.outcome]).astype(np.float64)  # (N, 2)
        known, tie = (which >= 0).all(1), battles.outcome == 0.5  # (N,) each
        query_idx, usable = battles.query_idx, known & ~tie  # (N,) each
        left_out = {"ties": int(tie.sum()), "battles of other models": int((~known & ~tie).sum())}
    seen = np.isin(query_ids(battles.queries), router.facts["seen_queries"].numpy())[query_idx]  # (N,)
    left_out["on queries that the router was trained on"] = int((usable & seen).sum())
    usable &= ~seen
    if not usable.any():
        told = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise UserError(f"no outcome is left to draw a curve on: {told}; expected others, between models with a price")
    query_idx, which, worth = query_idx[usable], which[usable], worth[usable]  # (n,), (n, m) each
    queries, row = np.unique(query_idx, return_inverse=True)  # (Q,), (n,)
    scores = router.scores_of([battles.queries[i] for i in queries])[:, columns]  # (Q, m)
    scores = np.take_along_axis(scores[row], which, axis=1)  # (n, m)
    choices = query_idx, np.where(np.isnan(worth), -np.inf, scores), prices[which], np.nan_to_num(worth)
    return choices, left_out


def curve(
    scores: np.ndarray, prices: np.ndarray, worth: np.ndarray, query_idx: np.ndarray, seed: int, steps: int = 10
) -> list[dict]:
    """What the chosen models are worth at mean prices from the least to that of a router that knows no price.

    Args:
        scores: (n, m), -inf where a model is not to be had.
        prices: (n, m), of the same models.
        worth: (n, m), what each is worth there: 1 for the winner of a battle and 0 for its loser, or a table's scores.
        query_idx: int (n,), which the bootstrap draws, by `seed`.
        steps: between the two ends, in mean price.

    Each point has `cost_weight`, `mean_price`, `worth` with its 95 % `interval`, and `random_mix`, the worth of the
    same money spent by chance: a share of queries at the dear end of the curve, the rest at its cheap end.
    """
    weights = metrics.bootstrap_weights(query_idx, seed)  # (R, n)
    shares = weights / weights.sum(1, keepdims=True)  # (R, n)
    order = np.argsort(prices, axis=1, kind="stable")  # (n, m), so that the cheaper of equals is taken
    scores, prices, worth = (np.take_along_axis(array, order, axis=1) for array in (scores, prices, worth))  # (n, m)
    dear, cheap, points = mean_price(scores, prices, 0.0), cheapest(scores, prices), []
    for budget in np.linspace(dear, cheap, steps + 1 if dear > cheap else 1):
        weight = weight_for_budget(scores, prices, float(budget))
        chosen = choose(scores, prices, weight)[:, None]  # (n, 1)
        won = np.take_along_axis(worth, chosen, 1)[:, 0]  # (n,)
        point = {"cost_weight": weight, "mean_price": mean_price(scores, prices, weight), "worth": float(won.mean())}
        points.append(point | {"interval": metrics.interval(shares @ won)})
    for point in points:
        share = (point["mean_price"] - points[-1]["mean_price"]) / max(dear - points[-1]["mean_price"], 1e-300)
        point["random_mix"] = points[-1]["worth"] + share * (points[0]["worth"] - points[-1]["worth"])
    return points
