"""Routing by cost: prices from a file, the cost weight that meets a budget, and the curve of quality by cost."""

from pathlib import Path

import numpy as np

from data_loader import query_ids
from support.data.battles import rows_differ
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
    if battles.table is None or battles.table.costs is None:
        raise UserError(f"{path} has no costs; give --prices, or a score table with columns of costs")
    costs = zip(battles.model_names, battles.table.mean_costs().tolist(), strict=True)
    return {name: cost for name, cost in costs if not np.isnan(cost)}


def known_outcomes(
    battles, names: list[str], prices: np.ndarray, router, own_costs: bool = False
) -> tuple[tuple[np.ndarray, ...], dict]:
    """What a curve is drawn on: (queries (Q,), row of each outcome's query (n,), outcomes (n, m), costs (n, m)).

    From a score table the outcomes are its rows, over the models `names` (m,); from battles, the decisive ones between
    two of these models, 1 for the winner and 0 for the loser. They are NaN where a model is unavailable. Costs are the
    prices (m,), or with `own_costs` those of the table. Queries on which the router was trained or chosen are left out.
    Returns also what was left out, counted by reason. Raises `UserError` where nothing is left.
    """
    is_table = battles.table is not None
    query_idx, outcomes, left_out = _of_rows(battles, names) if is_table else _of_battles(battles, names)
    usable = rows_differ(outcomes)  # (N,)
    costs = _columns(battles.table.costs, battles, names) if own_costs else np.broadcast_to(prices, outcomes.shape)
    without = usable & (np.isnan(costs) & ~np.isnan(outcomes)).any(1)  # (N,)
    if without.any():
        left_out["rows without a cost"], usable = int(without.sum()), usable & ~without
    seen = np.isin(query_ids(battles.queries), router.metadata.seen_queries.numpy())[query_idx]  # (N,)
    left_out["on queries that the router was trained on"] = int((usable & seen).sum())
    usable = usable & ~seen  # (N,)
    if not usable.any():
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        expected = "others, between models with a price"
        raise UserError(f"no outcome is left to draw a curve on: {counts}; expected {expected}")
    queries, row = np.unique(query_idx[usable], return_inverse=True)  # (Q,), (n,)
    return (queries, row, outcomes[usable], costs[usable]), left_out


def _columns(cells: np.ndarray, battles, names: list[str]) -> np.ndarray:
    """The columns of these models (R, m) from cells of a score table (R, M), NaN for models that are not in it."""
    number = {name: i for i, name in enumerate(battles.model_names)}
    return np.pad(cells, ((0, 0), (0, 1)), constant_values=np.nan)[:, [number.get(name, -1) for name in names]]


def _of_rows(battles, names: list[str]) -> tuple[np.ndarray, np.ndarray, dict]:
    """The rows of a score table as query (R,) and outcomes (R, m), and what cannot be used of them."""
    outcomes = _columns(battles.table.scores, battles, names)  # (R, m)
    of_two = (~np.isnan(outcomes)).sum(1) > 1  # (R,)
    equal = of_two & ~rows_differ(outcomes)  # (R,)
    left_out = {"rows without two of these models": int((~of_two).sum())}
    return battles.table.query_idx, outcomes, left_out | {"rows whose scores do not differ": int(equal.sum())}


def _of_battles(battles, names: list[str]) -> tuple[np.ndarray, np.ndarray, dict]:
    """Decisive battles between two of the models as query (N,) and outcomes (N, m), and what is left out."""
    number = np.array([names.index(name) if name in names else -1 for name in battles.model_names])  # (M,)
    which = number[np.column_stack([battles.model_a_idx, battles.model_b_idx])]  # (N, 2)
    known, tie = (which >= 0).all(1), battles.outcome == 0.5  # (N,) each
    kept = known & ~tie  # (N,)
    outcomes = np.full((kept.sum(), len(names)), np.nan)  # (n, m)
    won = battles.outcome[kept, None].astype(np.float64)  # (n, 1)
    np.put_along_axis(outcomes, which[kept], np.hstack([won, 1 - won]), axis=1)
    left_out = {"ties": int(tie.sum()), "battles of other models": int((~known & ~tie).sum())}
    return battles.query_idx[kept], outcomes, left_out
