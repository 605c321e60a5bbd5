"""Capability profiles from a file: one row per model, one column per benchmark."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.data.cells import MODELS, NO_NUMBER, as_number, as_score
from support.data.columns import is_id_column
from support.data.formats import open_table
from support.data.layouts import listed
from support.system.errors import UserError, one_line, valid_unicode


@dataclass(frozen=True)
class Profiles:
    """Scores of models on C benchmarks."""

    path: str
    columns: list[str]  # (C,) the benchmarks
    rows: dict[str, np.ndarray]  # model name -> scores (C,), float64, NaN where missing

    def of(self, names: list[str], allow_missing: bool = False) -> np.ndarray:
        """Scores (M, C) of the named models. A model without a row gets NaN if allowed, else raises `UserError`."""
        missing = [name for name in names if name not in self.rows]
        if missing and not allow_missing:
            raise UserError(
                f"{self.path} has no row for {listed(map(one_line, missing))}; add it, or, in training, give such "
                "models the mean with --allow_missing_profiles"
            )
        no_scores = np.full(len(self.columns), np.nan)  # (C,)
        return np.array([self.rows.get(name, no_scores) for name in names])  # (M, C)

    def statistics(self, names: list[str]) -> dict:
        """Mean and standard deviation of each benchmark over the named models, in plain types for a checkpoint.

        The scale of a benchmark on which all these models are equal is infinite: it cannot tell a new model from them
        either. Raises `UserError` if a benchmark has no score for any of the models.
        """
        scores = self.of(names, allow_missing=True)  # (M, C)
        empty = [self.columns[i] for i in np.flatnonzero(np.isnan(scores).all(0))]
        if empty:
            raise UserError(f"{self.path}: {listed(empty)} has no number for any model of the battles; leave it out")
        scale = np.nanstd(scores, axis=0)  # (C,)
        scale[np.nanmax(scores, axis=0) == np.nanmin(scores, axis=0)] = np.inf
        mean = np.nanmean(scores, axis=0)  # (C,)
        return {"kind": "file", "columns": self.columns, "mean": mean.tolist(), "scale": scale.tolist()}


def read_profiles(path: str) -> Profiles:
    """Read the profiles in a parquet, CSV or JSON file: a column `model` or `model_name`, and columns of numbers.

    An id, an index or a column of texts is no benchmark. An empty cell is a missing score. Raises `UserError` if
    a column is lacking, a column mixes numbers and texts, or a model has no name or two rows.
    """
    table = open_table(Path(path))
    name_column = table.first(*MODELS)
    columns = [name for name in table.columns if name != name_column and not is_id_column(name)]
    if name_column is None:
        raise UserError(f"{path} has the columns {listed(table.columns)}; expected `model` (or `model_name`)")
    chunks = list(table.read([name_column, *columns]))
    cells = {column: [cell for chunk in chunks for cell in chunk[column]] for column in (name_column, *columns)}
    names = ["" if cell is None else valid_unicode(str(cell)) for cell in cells[name_column]]  # (M,)
    if not all(map(str.strip, names)):
        raise UserError(f"{path} has a row without a model's name")
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise UserError(f"{path} has two rows of {one_line(repeated)}; expected one row per model")
    benchmarks = {}  # column -> scores (M,)
    for column in columns:
        scores = [_score(cell) for cell in cells[column]]  # (M,)
        if None not in scores:
            benchmarks[column] = scores
        elif any(score is not None and not np.isnan(score) for score in scores):
            text = scores.index(None)
            found = f"{one_line(cells[column][text])!r} for {one_line(names[text])} in {one_line(column)}"
            raise UserError(f"{path} has {found}; expected a finite number, or an empty cell")
    if not benchmarks:
        expected = "a column of numbers, a benchmark each"
        raise UserError(f"{path} has the columns {listed(table.columns)}; expected {expected}")
    rows = np.array(list(benchmarks.values())).T  # (M, C)
    return Profiles(str(path), list(benchmarks), dict(zip(names, rows, strict=True)))


def standardize(scores: np.ndarray, statistics: dict) -> np.ndarray:
    """z = (scores - mean) / standard deviation of each benchmark, with the `Profiles.statistics` of training.

    scores: (M, C) float64, NaN where missing, and so is the result.
    """
    return (scores - np.array(statistics["mean"])) / np.array(statistics["scale"])  # (M, C)


def _score(cell: object) -> float | None:
    """The score in a cell; NaN if it is empty, None if it holds anything else than a finite number."""
    number = as_number(cell)
    is_missing = cell is None or cell in NO_NUMBER or (number is not None and np.isnan(number))
    return np.nan if is_missing else as_score(cell)
