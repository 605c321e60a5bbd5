"""The layouts of battles and score tables, recognized by their columns; rows.py reads the rows.

A new layout of battles is one more line of `PAIRS`; new names of columns are one more word of `QUERIES`, `MODELS` and
`SCORES` in cells.py; a table whose cells hold several scores is one more word of `NESTED`.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice

from support.data.cells import (
    CONVERSATIONS,
    COSTS,
    GROUPS,
    MODELS,
    QUERIES,
    SCORES,
    as_list,
    as_number,
    as_scores,
    outcome_of_flags,
    outcome_of_label,
    outcome_of_preference,
)
from support.data.columns import ANSWERS, COMPARED, Column, is_model_column, read_columns
from support.data.formats import Table, stem
from support.system.errors import UserError, one_line

VERDICTS = ("label", "verdict", "outcome", "preferred", "result", "judgment", "preference")  # not read as a winner
NESTED = ("scores", "records", "completions", "results", "model_scores")
ONE_HOT = ("winner_model_a", "winner_model_b", "winner_tie")
# Model a, model b, the columns of the winner, and P(a is better) from their cells and the two names.
PAIRS = (
    ("model_a", "model_b", ("winner",), outcome_of_label),
    ("model_a", "model_b", ONE_HOT, outcome_of_flags),
    ("generator_1", "generator_2", ("preference",), outcome_of_preference),
)
PARTS = re.compile(  # names of files that are parts of a table, not models
    r"(train|test|val|valid|validation|dev|data|part|shard|chunk|run|results?|samples?|outputs?|scores?|table|file)?"
    r"([-_. ]?\d+[a-z]?)*([-_]of[-_]\d+)?"
)


@dataclass(frozen=True)
class Layout:
    """Which columns of a file hold its battles or scores.

    kind: "conversations" or "prompts" (battles), "wide", "nested" or "long" (score tables).
    query: the column of the query.
    others: model a, model b and the columns of the winner, for battles; the models for "wide"; the one column of all
        scores for "nested"; model and score for "long", with `prompt_id` if there is one.
    outcome: of `PAIRS`, for battles.
    costs: the cost column of each model of a wide table, None where it has none; that of a long table, if any.
    model: that of the whole file, where no column names it; then `others` of "long" lacks it.
    split: the column that says on which side of the split a row is, if any.
    group: the column of the row's group, such as its task, if any.
    group_name: the group of the whole file, where no column has it.
    left_out: the columns that are not read.
    """

    kind: str
    query: str
    others: tuple[str, ...]
    outcome: Callable[..., float | None] | None = None
    costs: tuple[str | None, ...] = ()
    model: str | None = None
    split: str | None = None
    group: str | None = None
    group_name: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys([self.query, *self.others, *filter(None, (*self.costs, self.split, self.group))]))

    @property
    def is_conversation(self) -> bool:
        return self.query.strip().lower() in CONVERSATIONS

    @property
    def described(self) -> str:
        """What was taken for what, for the screen and the history."""
        named = {"models" if self.models else "of": self.others, "costs": filter(None, self.costs)}
        named |= {"model, by the file's name,": filter(None, [self.model]), "split": filter(None, [self.split])}
        named |= {"groups": filter(None, [self.group]), "group, by the file's name,": filter(None, [self.group_name])}
        shown = {what: ", ".join(names) for what, names in named.items()} | {"not read:": listed(self.left_out, "")}
        parts = [f"{what} {names}" for what, names in shown.items() if names]
        return f"{self.kind}: " + "; ".join([f"query {self.query}", *parts])

    @property
    def models(self) -> tuple[str, ...]:
        """The models of a wide score table, each a column."""
        return self.others if self.kind == "wide" else ()


def find_layouts(
    tables: list[Table],
    score_columns: list[str] | None,
    query_column: str | None,
    split_column: str | None,
    group_column: str | None,
) -> dict[Table, Layout]:
    """The layout of each table; tables with the same columns have the same one, or a model each.

    score_columns: the models of a wide score table; by default every numeric column that can be one.
    query_column: the column of the query; by default the first of `QUERIES`.
    split_column: the column that says on which side of the split a row is, if any.
    group_column: the column of a row's group, such as its task; by default the first of `GROUPS`, or the file where
        several files have different columns.

    Raises `UserError` where a table has no known layout, or could have two, or the tables do not fit together.
    """
    layouts, named = {}, (score_columns, query_column, split_column, group_column)
    kinds = dict.fromkeys(tuple(sorted(table.columns)) for table in tables)
    for columns in kinds:
        alike = [table for table in tables if tuple(sorted(table.columns)) == columns]
        layout = _find_layout(alike, *named, num_files=len(tables))
        layouts |= dict.fromkeys(alike, layout)
    of_one_model = [table for table, layout in layouts.items() if layout.model]
    for table, model in zip(of_one_model, models_by_file(of_one_model), strict=True):
        layouts[table] = replace(layouts[table], model=model)
    stems = [stem(table.file) for table in tables]
    for table, layout in layouts.items():
        if len(kinds) > 1 and not of_one_model and layout.group is None:
            name = stem(table.file)
            is_unique = stems.count(name) == 1
            layouts[table] = replace(layout, group_name=name if is_unique else f"{table.file.parent.name}/{name}")
    first = next(iter(layouts.values()))
    for table, layout in layouts.items():
        if layout.kind == first.kind == "long" and (layout.query, layout.others) != (first.query, first.others):
            one, other = (f"{', '.join(each.others)} by {each.query}" for each in (first, layout))
            raise UserError(f"{tables[0].file} has {one}, {table.file} has {other}; expected the same in all files")
    return layouts


def _find_layout(
    tables: list[Table],
    score_columns: list[str] | None,
    query_column: str | None,
    split_column: str | None,
    group_column: str | None,
    num_files: int,
) -> Layout:
    """The layout of tables with the same columns, of `num_files`; the others as of `find_layouts`."""
    table = tables[0]
    if missing := {*(score_columns or ()), query_column, split_column, group_column} - {*table.columns, None}:
        raise UserError(f"{table.file} has no column {listed(missing)}; found {listed(table.columns)}")
    query = query_column or _query_column(table)
    group = group_column or table.first(*GROUPS)
    if group_column is None and group in (query, split_column, *(score_columns or ()), *table.unreadable):
        group = None
    if score_columns:
        layout = Layout("wide", query, tuple(score_columns), costs=_costs_of_models(table, score_columns))
    else:
        layout = _battles(tables, query) or _long(tables, query) or _nested(table, query)
        layout = layout or _wide(tables, query, group, num_files)
    layout = replace(layout, split=split_column)
    if group_column in layout.columns:
        raise UserError(f"--group_column {group_column}: {table.file} has something else there ({layout.described})")
    layout = replace(layout, group=None if group in layout.columns else group)
    return replace(layout, left_out=tuple(name for name in table.columns if name not in layout.columns))


def _query_column(table: Table) -> str:
    """The first of `QUERIES` that is a column; one of numbers, such as ids, only where there is no other."""
    found = [column for name in QUERIES if (column := table.first(name))]
    if not found:
        raise _unknown(table, "no column of the query: name it with --query_column")
    context = table.first("input")
    if len(found) > 1 or (context and found[0].lower() == "instruction"):
        columns = [*found, *filter(None, [context])]
        chunk = next(table.read(columns), {name: [] for name in columns})
        texts = [name for name in found if not all(as_number(cell) is not None for cell in chunk[name])]
        found = texts or found
        if found[0].lower() == "instruction" and context and any(chunk[context]):
            advice = "join them in one column, or name one by --query_column"
            raise UserError(f"{table.file} has `{context}` beside `{found[0]}`; {advice}")
    return found[0]


def _battles(tables: list[Table], query: str) -> Layout | None:
    table = tables[0]
    for name_a, name_b, winner, outcome in PAIRS:
        others = [table.first(name) for name in (name_a, name_b, *winner)]
        if None in others:
            continue
        chunk = next(table.read(others[:2]), {})
        numbers = [as_number(cell) for cells in chunk.values() for cell in cells]
        if numbers and not any(number is None or number.is_integer() for number in numbers):
            raise UserError(f"{table.file}: `{others[0]}` and `{others[1]}` hold numbers; expected names of models")
        if outcome is outcome_of_preference:
            values = read_columns(tables, others[2:])[others[2]]
            if values.low < 1 or values.high > 2:
                found = f"`{others[2]}` from {values.low:g} to {values.high:g}"
                raise UserError(f"{table.file} has {found}; expected 1 for the first, 2 for the second, 1.5 for a tie")
        return Layout("conversations" if query.lower() in CONVERSATIONS else "prompts", query, tuple(others), outcome)
    compared = [name for name in table.columns if COMPARED.fullmatch(name.strip().lower())]
    verdict = any(table.first(name) for name in VERDICTS)
    if len(compared) > 1 and (verdict or not any(each.is_score for each in read_columns(tables, compared).values())):
        raise _unknown(table, f"{listed(compared)} to compare, and no column of the winner")
    return None


def _long(tables: list[Table], query: str) -> Layout | None:
    """A table with a row per query and model."""
    table = tables[0]
    model = table.first(*MODELS)
    if model is None:
        return None
    score, costs = _score_and_costs(tables, query)
    if score is None:
        raise _unknown(table, f"a column `{model}` of models, and no numeric column of scores ({', '.join(SCORES)})")
    id_column = [column for column in ("prompt_id",) if column in table.columns]
    return Layout("long", query, (model, score, *id_column), costs=costs)


def _score_and_costs(tables: list[Table], query: str) -> tuple[str | None, tuple[str, ...]]:
    """The first columns of `SCORES` and of `COSTS` that are mostly numbers."""
    table = tables[0]
    found = {name: column for name in (*SCORES, *COSTS) if (column := table.first(name)) not in (None, query)}
    columns = read_columns(tables, list(found.values()))
    scores = [found[name] for name in SCORES if name in found]
    usable = [name for name in scores if columns[name].is_score]
    preferred = scores[: scores.index(usable[0])] if usable else scores
    _refuse_other_numbers(table, {name: columns[name] for name in preferred})
    costs = [found[name] for name in COSTS if name in found and columns[found[name]].is_cost]
    return usable[0] if usable else None, tuple(costs[:1])


def _refuse_other_numbers(table: Table, columns: dict[str, Column]) -> None:
    for name, column in columns.items():
        if column.is_other_numbers:
            found = f"{table.file}: `{name}` holds {one_line(column.example)!r}"
            raise UserError(f"{found}; expected numbers such as 0.85, or the models' columns in --score_columns")


def _nested(table: Table, query: str) -> Layout | None:
    """A table in which one cell holds the scores of several models."""
    column = table.first(*NESTED)
    if column is None:
        return None
    cells = [as_list(cell) for chunk in islice(table.read([column]), 1) for cell in chunk[column]]
    pairs = [pair for cell in cells if isinstance(cell, (list, dict)) for pair in as_scores(cell)]
    if not pairs:
        return None
    _refuse_answers(table, column)
    names = {name for name, _ in pairs if name}
    if odd := sorted(name for name in names if not is_model_column(name)):
        raise UserError(f"{table.file}: `{column}` has {listed(odd)} among {listed(names)}; expected names of models")
    if column.lower() == "completions" and not all(isinstance(value, dict) for _, value in pairs):
        raise UserError(f"{table.file}: `{column}` holds answers; expected mappings with a model and a score")
    return Layout("nested", query, (column,))


def _refuse_answers(table: Table, scores: str | None = None) -> None:
    if answers := [name for name in table.columns if name != scores and ANSWERS.fullmatch(name.strip().lower())]:
        raise _unknown(table, f"`{answers[0]}`, an answer, and no column that names its model ({', '.join(MODELS)})")


def _wide(tables: list[Table], query: str, group: str | None, num_files: int) -> Layout:
    """A table with a column per model, or with the scores of one model, which the file's name then tells."""
    table = tables[0]
    columns = read_columns(tables, [name for name in table.columns if name not in (query, group)])
    named = {name: column for name, column in columns.items() if is_model_column(name)}
    models = [name for name, column in named.items() if column.is_score]
    score, costs = _score_and_costs(tables, query)
    if score is not None and num_files > 1 and not models:
        return Layout("long", query, (score,), costs=costs, model="?")
    _refuse_answers(table)
    _refuse_other_numbers(table, named)
    if len(models) < 2:
        found = f"the columns of models {listed(models)}" if models else "no column of a model"
        numbers = [name for name, column in columns.items() if column.numbers and name not in models]
        raise _unknown(table, f"{found}; columns with numbers that do not look like models: {listed(numbers)}")
    doubts = [(name, problem) for name, column in named.items() if (problem := _doubt(name, column, named))]
    if score is not None and score.lower() != "label":
        doubts.append((score, "is a score, and not that of a model"))
    if doubts:
        found = "; ".join(f"`{name}` {problem}" for name, problem in doubts[:3])
        raise UserError(f"{table.file}: {found}; name the columns of the models with --score_columns")
    return Layout("wide", query, tuple(models), costs=_costs_of_models(table, models))


def _doubt(name: str, column: Column, columns: dict[str, Column]) -> str | None:
    """What speaks against a column with numbers, which is named as a model can be; None where nothing does."""
    if not column.is_score:
        return f"holds {column.finite} numbers in {column.filled} cells" if column.finite else None
    if column.numbers_rows:
        return f"numbers the rows, from {column.low:g} to {column.high:g}"
    others = [other for each, other in columns.items() if each != name and other.is_score and other.low < other.high]
    low, high = min((other.low for other in others), default=0.0), max((other.high for other in others), default=1.0)
    low, high = (0.0, 1.0) if 0 <= low <= high <= 1 else (low, high)
    if column.low == column.high and others and not low <= column.low <= high:
        return f"is always {column.low:g}, beside scores from {low:g} to {high:g}"
    return None


def _costs_of_models(table: Table, models: list[str]) -> tuple[str | None, ...]:
    """The cost column of each model of a wide table: `model|total_cost`, `model|cost` or `model_cost`."""
    forms = ("{}|total_cost", "{}|cost", "{}_cost", "{}_total_cost")
    names = ([form.format(model) for form in forms] for model in models)
    costs = [next((name for name in some if name in table.columns), None) for some in names]
    return tuple(costs) if any(costs) else ()


def models_by_file(tables: list[Table]) -> list[str]:
    """The model of each file, from its name. Raises `UserError` where the names are not those of models."""
    if not tables:
        return []
    names, folders = [stem(table.file) for table in tables], {table.file.parent for table in tables}
    odd = [name for name in names if PARTS.fullmatch(name.lower()) or not is_model_column(name)]
    if odd or len(folders) > 1 or len(set(names)) < len(names):
        found = f"names such as {odd[0]}" if odd else "several folders" if len(folders) > 1 else "equal names"
        raise _unknown(tables[0], f"no column of the model, and {len(names)} files with {found}, so not one per model")
    return names


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
    lacking = f"nearest is {nearest}, which needs {', '.join(absent[nearest]) or 'numbers as scores'} too"
    expected = "expected a query and model_a, model_b, winner; or model_name, score; or a numeric column per model"
    return UserError(f"{table.file} has the columns {listed(table.columns)}: {lacks}; {expected}; {lacking}")


def listed(names: Iterable[str], none: str = "none") -> str:
    """The first twenty names in sorted order, for a message."""
    names = sorted(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or none
