"""Capability profiles from a file: one row per model, one column per benchmark."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.files import UserError, one_line, valid_unicode
from support.layouts import as_score, is_score_column, listed, model_column
from support.tables import NO_NUMBER, as_number, open_table


@dataclass(frozen=True)
class Profiles:
    """What a file says of models, C benchmarks each."""

    path: str
    columns: list[str]  # (C,) the benchmarks
    rows: dict[str, np.ndarray]  # model -> its scores (C,), float64, NaN where one is missing

    def of(self, names: list[str], allow_missing: bool = False) -> np.ndarray:
        """Scores (M, C) of models by name. A model without a row has NaN, or raises `UserError`."""
        lacking = [name for name in names if name not in self.rows]
        if lacking and not allow_missing:
            raise UserError(
                f"{self.path} has no row for {listed(map(one_line, lacking))}; add it, or let such models have the "
                "mean, in training, with --allow_missing_profiles"
            )
        nothing = np.full(len(self.columns), np.nan)  # (C,)
        return np.array([self.rows.get(name, nothing) for name in names])  # (M, C)

    def facts(self, names: list[str]) -> dict:
        """What a checkpoint must know to standardise another model's scores as those of `names`: plain types."""
        scores = self.of(names, allow_missing=True)  # (M, C)
        known = ~np.isnan(scores)  # (M, C)
        empty = [column for column, filled in zip(self.columns, known.any(0), strict=True) if not filled]
        if empty:
            raise UserError(f"{self.path}: {listed(empty)} has no number for any model of the battles; leave it out")
        count = known.sum(0)  # (C,)
        mean = np.where(known, scores, 0).sum(0) / count  # (C,)
        scale = np.sqrt(np.square(np.where(known, scores - mean, 0)).sum(0) / count)  # (C,)
        highest, lowest = np.where(known, scores, -np.inf).max(0), np.where(known, scores, np.inf).min(0)  # (C,) each
        scale[highest == lowest] = np.inf  # on which all are equal: it says nothing, of a new model neither
        return {"kind": "file", "columns": self.columns, "mean": mean.tolist(), "scale": scale.tolist()}


def read_profiles(path: str) -> Profiles:
    """The profiles of a parquet, CSV or JSON file: a column `model` or `model_name`, and columns of numbers.

    An id or index is no benchmark, nor is a column of texts. An empty cell is missing. Raises `UserError` where the
    columns are others, one holds both numbers and texts, or a model has two rows.
    """
    table = open_table(Path(path))
    name_column = model_column(table)
    columns = [name for name in table.columns if name != name_column and is_score_column(name)]
    if name_column is None:
        raise UserError(f"{path} has the columns {listed(table.columns)}; expected `model` (or `model_name`)")
    rows, texts, numbers = {}, {}, set()
    for chunk in table.read([name_column, *columns]):
        for name, *cells in zip(*chunk.values(), strict=True):
            name = "" if name is None else valid_unicode(str(name))
            if not name.strip():
                raise UserError(f"{path} has a row without a model's name")
            if name in rows:
                raise UserError(f"{path} has two rows of {one_line(name)}; expected one row per model")
            rows[name] = {}
            for column, cell in zip(columns, cells, strict=True):
                number = as_number(cell)
                missing = cell is None or cell in NO_NUMBER or (number is not None and np.isnan(number))
                score = rows[name][column] = np.nan if missing else as_score(cell)
                if score is None:
                    texts.setdefault(column, f"{one_line(cell)!r} for {one_line(name)}")
                elif not np.isnan(score):
                    numbers.add(column)
    for column in numbers.intersection(texts):
        raise UserError(f"{path} has {texts[column]} in {one_line(column)}; expected a finite number, or an empty cell")
    benchmarks = [column for column in columns if column not in texts]
    if not benchmarks:
        raise UserError(
            f"{path} has the columns {listed(table.columns)}; expected a column of numbers, a benchmark each"
        )
    scores = {name: np.array([row[column] for column in benchmarks]) for name, row in rows.items()}  # (C,) each
    return Profiles(str(path), benchmarks, scores)


def standardise(scores: np.ndarray, facts: dict) -> np.ndarray:
    """Scores (M, C) in units of the standard deviation over the models of training, from their mean."""
    return (scores - np.array(facts["mean"])) / np.array(facts["scale"])  # (M, C)
