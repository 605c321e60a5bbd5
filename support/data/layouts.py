"""The layouts of battles and score tables, recognized by their columns; rows.py reads the rows.

A new layout of battles is one more line of `PAIRS`; new names of columns are one more word of `QUERIES`, or of `MODELS`
and `SCORES` in cells.py; a table whose cells hold several scores is one more word of `NESTED`.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from support.data.cells import (
    COSTS,
    MODELS,
    SCORES,
    as_score,
    outcome_of_flags,
    outcome_of_label,
    outcome_of_preference,
)
from support.data.formats import NO_NUMBER, Table, as_number
from support.system.errors import UserError

CONVERSATIONS = ("conversation_a", "messages_a", "conversation", "messages")  # the first user's turn is the query
QUERIES = ("conversation_a", "messages_a", "prompt", "question", "query", "instruction", "messages", "conversation")
NESTED = ("scores", "records", "completions", "results", "model_scores")
ONE_HOT = ("winner_model_a", "winner_model_b", "winner_tie")
# Model a, model b, the columns of the winner, and P(a is better) from their cells and the two names.
PAIRS = (
    ("model_a", "model_b", ("winner",), outcome_of_label),
    ("model_a", "model_b", ONE_HOT, lambda *cells: outcome_of_flags(*cells[:3])),
    ("generator_1", "generator_2", ("preference",), lambda cell, *_: outcome_of_preference(cell)),
)
ANSWERS = ("chosen", "rejected", "response", "completion", "responses", "prediction")  # of one model that has no column
# Numeric columns of wide tables that are no model, by whole names, and by what names begin or end with.
IDS = {"", "id", "index", "idx", "key", "prompt_id", "question_id", "sample_id", "cluster_id", "turn", "tstamp"}
INDEX = ("unnamed:", "__index_level_")  # what pandas names an index
NO_MODEL = {
    *(
        "latency",
        "difficulty",
        "level",
        "turns",
        "timestamp",
        "time",
        "duration",
        "seed",
        "split",
        "fold",
        "row",
        "line",
    ),
    *("step", "epoch", "year", "weight", "length", "size", "count", "rank", "tokens", "temperature", "top_p", "oracle"),
    *("helpfulness", *SCORES, *COSTS),
}
NO_MODEL_PARTS = re.compile(
    r"^((n|num|nb|number|count|total|max|min|mean|avg|batch)_)|\|"
    r"|[_ ](id|idx|index|cost|price|tokens?|latency|time|seconds|ms|len|length|chars|words|count|size|num|rank)$"
)
OTHER_SCALE = 20  # times the scale of the other columns: hardly the same metric


@dataclass(frozen=True)
class Layout:
    """Which columns of a file hold its battles or scores.

    kind: "conversations" or "prompts" (battles), "wide", "nested" or "long" (score tables).
    query: the column of the query.
    others: model a, model b and the columns of the winner, for battles; the models for "wide"; the one column of all
        scores for "nested"; model and score for "long", with `prompt_id` if there is one.
    outcome: of `PAIRS`, for battles.
    costs: the cost column of each model of a wide table, None where it has none; that of a long table, if any.
    model: that of the whole file, where no column names it.
    left_out: the columns with numbers of a wide table that are no models.
    split: the column that says on which side of the split a row is, if any.
    """

    kind: str
    query: str
    others: tuple[str, ...]
    outcome: Callable[..., float | None] | None = None
    costs: tuple[str | None, ...] = ()
    model: str | None = None
    left_out: tuple[str, ...] = ()
    split: str | None = None

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys([self.query, *self.others, *filter(None, (*self.costs, self.split))]))

    @property
    def described(self) -> str:
        """What was taken for what, for the screen and the history."""
        named = {"models": self.models} if self.models else {"of": self.others}
        named |= {"model by file name": (self.model,) if self.model else (), "costs": tuple(filter(None, self.costs))}
        named |= {"split": (self.split,) if self.split else (), "no models": self.left_out}
        parts = [f"query {self.query}"] + [f"{what} {', '.join(names)}" for what, names in named.items() if names]
        return f"{self.kind}: " + "; ".join(parts)

    @property
    def models(self) -> tuple[str, ...]:
        """The models of a wide score table, each a column."""
        return self.others if self.kind == "wide" else ()


def find_layout(
    table: Table,
    score_columns: list[str] | None = None,
    query_column: str | None = None,
    split_column: str | None = None,
    is_part: bool = False,
) -> Layout:
    """The layout of a file by its columns. Raises `UserError` where it is none, or could be two.

    score_columns: the models of a wide score table; by default every numeric column that can be one.
    query_column: the column of the query; by default the first of `QUERIES`.
    split_column: the column that says on which side of the split a row is, if any.
    is_part: whether the file is one of several; then its name can be that of its model.
    """
    if missing := {*(score_columns or ()), query_column, split_column} - {*table.columns, None}:
        raise UserError(f"{table.file} has no column {listed(missing)}; found {listed(table.columns)}")
    query = query_column or table.first(*QUERIES)
    if query is None:
        raise _unknown(table, "no column of the query: name it with --query_column")
    return replace(_layout_of(table, query, score_columns, is_part), split=split_column)


def _layout_of(table: Table, query: str, score_columns: list[str] | None, is_part: bool) -> Layout:
    if score_columns:
        return Layout("wide", query, tuple(score_columns), costs=_costs(table, score_columns))
    for name_a, name_b, winner, outcome in PAIRS:
        others = [table.first(name) for name in (name_a, name_b, *winner)]
        if None not in others:
            return Layout("conversations" if query in CONVERSATIONS else "prompts", query, tuple(others), outcome)
    model = table.first(*MODELS)
    if model is not None or (nested := table.first(*NESTED)) is None:
        return _table_of_scores(table, query, model, is_part)
    return Layout("nested", query, (nested,))


def _table_of_scores(table: Table, query: str, model: str | None, is_part: bool) -> Layout:
    """The layout of a long table, of a file per model, or of a wide table."""
    numbers = {name: column for name, column in _numbers(table, query).items() if name != model}
    usable = [name for name in numbers if numbers[name].is_mostly_numbers]
    score = next((column for name in SCORES if (column := table.first(name)) in usable), None)
    if model is not None and score is not None:
        id_column = [column for column in ("prompt_id",) if column in table.columns]
        cost = table.first(*COSTS)
        return Layout("long", query, (model, score, *id_column), costs=() if cost is None else (cost,))
    if model is not None:
        raise _unknown(table, f"a column `{model}` of models, and no numeric column of scores ({', '.join(SCORES)})")
    if score is not None and is_part:
        name = table.file.name.split(".")[0]
        return Layout("long", query, (score,), costs=(cost,) if (cost := table.first(*COSTS)) else (), model=name)
    if compared := [column for name_a, *_ in PAIRS if (column := table.first(name_a))]:
        raise _unknown(table, f"`{compared[0]}`, one of two compared models, and no column of the winner")
    if answers := [column for name in ANSWERS if (column := table.first(name))]:
        raise _unknown(table, f"`{answers[0]}`, an answer, and no column that names its model ({', '.join(MODELS)})")
    models = [name for name in usable if is_model_column(name) and not numbers[name].is_counter]
    models = _varying(models, numbers)
    if len(models) < 2:
        found = f"the columns of models {listed(models)}" if models else "no column of a model"
        raise _unknown(
            table, f"{found}; numeric columns that do not look like models: {listed(set(numbers) - {*models})}"
        )
    scales = {name: max(abs(numbers[name].low), abs(numbers[name].high)) for name in models}
    usual = sorted(filter(None, scales.values()))[: (len(models) + 1) // 2][-1:] or [0.0]
    if odd := [name for name, scale in scales.items() if scale > OTHER_SCALE * usual[0]]:
        found = f"{listed(odd)} (up to {scales[odd[0]]:g}) beside {listed(set(models) - {*odd})} (up to {usual[0]:g})"
        raise UserError(f"{table.file}: are these all scores of models? {found}; name the models with --score_columns")
    left_out = tuple(name for name in numbers if name not in models)
    return Layout("wide", query, tuple(models), costs=_costs(table, models), left_out=left_out)


@dataclass
class Numbers:
    """The numbers of a column: how many of its filled cells are some, their range, and whether they count the rows."""

    filled: int = 0
    count: int = 0
    low: float = math.inf
    high: float = -math.inf
    is_counter: bool = True  # whole numbers that rise with every row

    def add(self, cells: list) -> None:
        for cell in cells:
            if cell is None or (isinstance(cell, (str, float)) and (cell in NO_NUMBER or cell != cell)):
                continue
            self.filled += 1
            score = as_score(cell)
            self.count += score is not None or as_number(cell) is not None  # also an infinite one
            if score is not None:
                self.is_counter &= score > self.high and score == int(score)
                self.low, self.high = min(self.low, score), max(self.high, score)

    @property
    def is_mostly_numbers(self) -> bool:
        return 2 * self.count > self.filled and self.low <= self.high


def _numbers(table: Table, query: str) -> dict[str, Numbers]:
    """The columns in which some cells are numbers, or mappings with a score. Reads the whole file."""
    columns = {name: Numbers() for name in table.columns if name != query}
    for chunk in table.read(list(columns)):
        for name, column in columns.items():
            column.add(chunk[name])
    for column in columns.values():
        column.is_counter &= column.count > 2
    return {name: column for name, column in columns.items() if column.count}


def _varying(models: list[str], numbers: dict[str, Numbers]) -> list[str]:
    """The columns that can be models: a constant one only if its value lies in the range of those that vary."""
    varying = [name for name in models if numbers[name].low < numbers[name].high]
    low = min((numbers[name].low for name in varying), default=-math.inf)
    high = max((numbers[name].high for name in varying), default=math.inf)
    return [name for name in models if name in varying or low <= numbers[name].low <= high]


def is_model_column(column: str) -> bool:
    """Whether a numeric column can be a model, by its name: it is no id, counter, cost, metric or detail of a model."""
    name = column.strip().lower()
    return not (is_id_column(column) or name in NO_MODEL or NO_MODEL_PARTS.search(name))


def is_id_column(column: str) -> bool:
    """Whether a column numbers rows or queries, by its name."""
    name = column.strip().lower()
    return name in IDS or name.startswith(INDEX)


def _costs(table: Table, models: list[str]) -> tuple[str | None, ...]:
    """The cost column of each model of a wide table: `model|total_cost`, `model|cost` or `model_cost`."""
    forms = ("{}|total_cost", "{}|cost", "{}_cost", "{}_total_cost")
    names = ([form.format(model) for form in forms] for model in models)
    costs = [next((name for name in some if name in table.columns), None) for some in names]
    return tuple(costs) if any(costs) else ()


def _unknown(table: Table, lacks: str) -> UserError:
    """The error about a file of no known layout, with what the nearest one lacks."""
    roles = {
        "battles": {"query": QUERIES, "model_a": ("model_a",), "model_b": ("model_b",), "winner": ("winner",)},
        "a long score table": {"query": QUERIES, "model_name": MODELS, "score": SCORES},
    }
    absent = {
        layout: [role for role, names in columns.items() if table.first(*names) is None]
        for layout, columns in roles.items()
    }
    nearest = min(absent, key=lambda layout: len(absent[layout]) / len(roles[layout]))
    lacking = f"nearest is {nearest}, which needs {', '.join(absent[nearest]) or 'other cells'} too"
    expected = "expected a query and model_a, model_b, winner; or model_name, score; or a numeric column per model"
    return UserError(f"{table.file} has the columns {listed(table.columns)}: {lacks}; {expected}; {lacking}")


def listed(names: Iterable[str]) -> str:
    """The first twenty names in sorted order, for a message."""
    names = sorted(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"
