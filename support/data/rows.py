"""Rows of battles and score tables, collected as numbers; each row that is dropped is counted under one reason."""

import math
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np

from support.data.cells import NO_NUMBER, as_cost, as_name, as_score, as_scores, as_text, cost_in, fold
from support.data.formats import Chunk
from support.data.layouts import Layout
from support.system.errors import one_line, valid_unicode

NUM_LABELS = 20  # distinct unknown labels that are kept for messages
SIDES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2, "testing": 2}  # folded


class Rows:
    """Collects battles and scores from rows as they are read. Queries and models are indexed as they first occur."""

    def __init__(self, groups_apart: bool = False):
        self.groups_apart = groups_apart  # whether rows of a long table are of other prompts where their group differs
        self.num_read = 0
        self.dropped = Counter()  # reason -> rows
        self.unknown_winners = Counter()  # label -> rows
        self.not_numbers = Counter()  # text where a score is expected -> cells
        self.costs_missing = 0  # cells that hold something, and no cost
        self.parsed = 0  # queries in cells with lists or turns
        self.scores_missing = 0  # cells without a finite score, in rows of wide and nested tables that are kept
        self.scores_averaged = 0  # scores of a model that has another one in the same row
        self.repaired = 0  # texts in which lone surrogates were replaced
        self.queries = {}  # query with white space folded -> index, first spelling
        self.model_idx = {}  # name -> index
        self.names = {}  # cell -> name
        self.groups = {}  # name of a task or another group -> index
        self.battles = []  # (query, model a, model b, outcome, side, group)
        # The cells of score tables, one after the other: table row, model, score, and cost or NaN.
        self.cells = array("q"), array("q"), array("d"), array("d")
        self.table_rows = array("q"), array("b"), array("q")  # query, side and group of each table row, -1 for none
        self.row_of_prompt = {}  # a prompt of a long table -> its table row

    def add(self, chunk: Chunk, layout: Layout) -> None:
        """Add the rows of a chunk with the layout's columns."""
        num_rows, is_conversation = len(chunk[layout.query]), layout.is_conversation
        others = [chunk[name] for name in layout.others]
        costs = [chunk[name] if name else [None] * num_rows for name in layout.costs]
        groups = [layout.group_name] * num_rows if layout.group is None else chunk[layout.group]
        for i, query in enumerate(chunk[layout.query]):
            text = self.clean(as_text(query, is_conversation)).strip()
            self.parsed += not is_conversation and bool(text) and text != str(query).strip()
            side = -1 if layout.split is None else SIDES.get(fold(str(chunk[layout.split][i])))
            side_and_group = side, self.group(groups[i])
            cells, row_costs = [column[i] for column in others], [column[i] for column in costs]
            if not text:
                reason = "without query text"
            elif side is None:
                reason = "on an unknown side of the split"
            elif layout.outcome:
                reason = self.add_battle(text, side_and_group, layout, *cells)
            elif layout.kind == "long":
                named = cells if layout.model is None else [layout.model, *cells]
                reason = self.add_score(text, side_and_group, *named, costs=row_costs)
            else:
                nested = layout.kind == "nested"
                pairs = as_scores(cells[0]) if nested else list(zip(layout.models, cells, strict=True))
                reason = self.add_scores(text, side_and_group, pairs, row_costs or [cost_in(cell) for _, cell in pairs])
            if reason:
                self.dropped[reason] += 1
            self.num_read += 1

    def add_battle(
        self, text: str, side_and_group: tuple, layout: Layout, model_a: object, model_b: object, *winner: object
    ) -> str | None:
        """Add a battle with its side and group; returns the reason if it is dropped."""
        a, b = self.name(model_a), self.name(model_b)
        if not a or not b:
            return "without a model name"
        if a == b:
            return "model against itself"
        outcome = layout.outcome(*winner, a, b)
        if outcome is None:
            self._count(self.unknown_winners, ", ".join(map(str, winner)))
            return "with an unknown winner"
        self.battles.append((self.query(text), self.model(a), self.model(b), outcome, *side_and_group))
        return None

    def add_score(
        self,
        text: str,
        side_and_group: tuple,
        model: object,
        score: object,
        prompt_id: object = None,
        *,
        costs: Sequence = (),
    ) -> str | None:
        """Add a row of a long table; returns the reason if it is dropped."""
        name, value = self.name(model), as_score(score)
        if not name:
            return "without a model name"
        if value is None:
            self._count_text(score)
            return "without a score"
        query = self.query(text)
        # By the id alone, prompts would mix where each shard counts from 0, or where the id is empty.
        prompt = str(prompt_id), query, side_and_group[: 2 if self.groups_apart else 1]
        if prompt not in self.row_of_prompt:
            self.row_of_prompt[prompt] = self._start_table_row(query, side_and_group)
        cost = self._cost(costs[0] if costs else cost_in(score))
        self._keep(self.row_of_prompt[prompt], self.model(name), value, cost)
        return None

    def add_scores(
        self, text: str, side_and_group: tuple, scores: Sequence[tuple[str, object]], costs: Sequence[object]
    ) -> str | None:
        """Add a row of a wide or nested table; returns the reason if it is dropped."""
        pairs = zip(scores, costs, strict=True)
        read = [(self.name(name), as_score(cell), self._cost(cost)) for (name, cell), cost in pairs]
        valid = [(name, score, cost) for name, score, cost in read if name and score is not None]
        for _, cell in scores:
            self._count_text(cell)
        if len({name for name, *_ in valid}) < 2:
            return "with fewer than two scores"
        self.scores_missing += len(read) - len(valid)
        table_row = self._start_table_row(self.query(text), side_and_group)
        for name, score, cost in valid:
            self._keep(table_row, self.model(name), score, cost)
        return None

    def _start_table_row(self, query: int, side_and_group: tuple) -> int:
        for column, value in zip(self.table_rows, (query, *side_and_group), strict=True):
            column.append(value)
        return len(self.table_rows[0]) - 1

    def _keep(self, table_row: int, model: int, score: float, cost: float | None) -> None:
        rows, models, scores, costs = self.cells
        rows.append(table_row)
        models.append(model)
        scores.append(score)
        costs.append(math.nan if cost is None else cost)

    def _cost(self, cell: object) -> float | None:
        if cell is None:
            return None
        cost = as_cost(cell)
        self.costs_missing += cost is None and cell not in NO_NUMBER and cell == cell
        return cost

    def _count_text(self, cell: object) -> None:
        if isinstance(cell, str) and cell.strip() not in NO_NUMBER and as_score(cell) is None:
            self._count(self.not_numbers, cell)

    @staticmethod
    def _count(texts: Counter, text: str) -> None:
        shown = one_line(valid_unicode(text[:40]))
        if shown in texts or len(texts) < NUM_LABELS:
            texts[shown] += 1

    def counts(self) -> dict:
        """What was read, dropped and repaired, for the history."""
        return {
            "rows_read": self.num_read,
            "rows_dropped": dict(self.dropped),
            "unknown_winners": dict(self.unknown_winners.most_common()),
            "scores_missing": self.scores_missing,
            "scores_not_numbers": dict(self.not_numbers.most_common()),
            "scores_averaged": self.scores_averaged,
            "costs_missing": self.costs_missing,
            "queries_parsed": self.parsed,
            "queries_repaired": self.repaired,
        }

    def clean(self, text: str) -> str:
        repaired = valid_unicode(text)
        self.repaired += repaired != text
        return repaired

    def name(self, cell: object) -> str:
        name = self.names.get(cell) if isinstance(cell, str) else None
        if name is None:
            name = self.clean(as_name(cell))
            self.names |= {cell: name} if isinstance(cell, str) else {}
        return name

    def query(self, text: str) -> int:
        return self.queries.setdefault(" ".join(text.split()), (len(self.queries), text))[0]

    def model(self, name: str) -> int:
        return self.model_idx.setdefault(name, len(self.model_idx))

    def group(self, cell: object) -> int:
        name = self.name(cell)
        return self.groups.setdefault(name, len(self.groups)) if name else -1

    def battles_read(self) -> np.ndarray:
        """The single battles, float (N, 6): query, model a, model b, outcome, side, group."""
        return np.array(self.battles, np.float64).reshape(-1, 6)  # (N, 6)

    def table_read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray, np.ndarray] | None:
        """The score tables: query (R,), scores (R, M), costs (R, M) or None, side (R,), group (R,); None without any.

        Missing scores and costs are NaN. Several scores of a model in a row are averaged, and counted. Rows with a
        single score make no battle: they are dropped, and counted.
        """
        row, model, score, cost = (np.frombuffer(column, column.typecode) for column in self.cells)  # (S,) each
        query, side, group = (np.frombuffer(column, column.typecode) for column in self.table_rows)  # (R,) each
        if not len(row):
            return None
        num_models = len(self.model_idx)
        scores = _as_matrix(row, model, score, (len(query), num_models))  # (R, M)
        scores[np.abs(scores) < np.finfo(np.float64).tiny] = 0  # as training would read them
        costs = None if np.isnan(cost).all() else _as_matrix(row, model, cost, scores.shape)  # (R, M)
        known = (~np.isnan(scores)).sum(1)  # (R,)
        self.scores_averaged = len(score) - int(known.sum())
        if alone := int((known == 1).sum()):
            self.dropped["alone with their query"] = alone
        kept = known > 1  # (R,)
        costs = None if costs is None else costs[kept]
        return (query[kept], scores[kept], costs, side[kept], group[kept]) if kept.any() else None


def _as_matrix(row: np.ndarray, column: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The matrix of single values (S,), NaN where there is none; the mean where there are several.

    A mean does not depend on their order: equal means tie.
    """
    there = ~np.isnan(values)  # (S,)
    cell, values = (row * shape[1] + column)[there], values[there]  # (s,) each
    matrix = np.full(shape[0] * shape[1], np.nan)  # (R M,)
    matrix[cell] = values
    repeated = np.bincount(cell, minlength=1)[cell] > 1  # (s,)
    several = {}  # cell -> its values
    for one, value in zip(cell[repeated].tolist(), values[repeated].tolist(), strict=True):
        several.setdefault(one, []).append(value)
    for one, group in several.items():
        matrix[one] = math.fsum(group) / len(group)
    return matrix.reshape(shape)  # (R, M)


def read_and_dropped(counts: dict) -> str:
    """The rows read and dropped, and what was found instead of known winners and of numbers, for a message."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts["rows_dropped"].items()) or "none"
    found = f"{counts['rows_read']} rows read, rows dropped: {dropped}"
    if counts["scores_averaged"]:
        found += f", {counts['scores_averaged']} averaged"
    expected = "unknown winners (expected model_a, model_b, tie, or a model's name)"
    for key, what in (("unknown_winners", expected), ("scores_not_numbers", "scores that are no numbers")):
        if texts := counts[key]:
            found += f"; {what}: " + ", ".join(f"{count} x {text!r}" for text, count in list(texts.items())[:5])
    return f"{found}; read as {' and '.join(counts['columns'][:2])}"
