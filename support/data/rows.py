"""Rows of battles and score tables, collected as numbers; each row that is dropped is counted under one reason."""

import math
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

    def __init__(self):
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
        self.battles = []  # (query, model a, model b, outcome, side)
        self.scores = {}  # (table row, query, model, side) -> its first score
        self.costs = {}  # the same -> its first cost
        self.repeats = {}  # ("score" or "cost", cell) -> all of its values, where there are several
        self.table_row_idx = {}  # a row of a wide or nested table, or a prompt of a long one -> index

    def add(self, chunk: Chunk, layout: Layout) -> None:
        """Add the rows of a chunk with the layout's columns."""
        num_rows, is_conversation = len(chunk[layout.query]), layout.is_conversation
        others = [chunk[name] for name in layout.others]
        costs = [chunk[name] if name else [None] * num_rows for name in layout.costs]
        for i, query in enumerate(chunk[layout.query]):
            text = self.clean(as_text(query, is_conversation)).strip()
            self.parsed += not is_conversation and bool(text) and text != str(query).strip()
            side = -1 if layout.split is None else SIDES.get(fold(str(chunk[layout.split][i])))
            cells, row_costs = [column[i] for column in others], [column[i] for column in costs]
            if not text:
                reason = "without query text"
            elif side is None:
                reason = "on an unknown side of the split"
            elif layout.outcome:
                reason = self.add_battle(text, side, layout, *cells)
            elif layout.kind == "long":
                named = cells if layout.model is None else [layout.model, *cells]
                reason = self.add_score(text, side, *named, costs=row_costs)
            else:
                nested = layout.kind == "nested"
                pairs = as_scores(cells[0]) if nested else list(zip(layout.models, cells, strict=True))
                reason = self.add_scores(text, side, pairs, row_costs or [cost_in(cell) for _, cell in pairs])
            if reason:
                self.dropped[reason] += 1
            self.num_read += 1

    def add_battle(
        self, text: str, side: int, layout: Layout, model_a: object, model_b: object, *winner: object
    ) -> str | None:
        """Add a battle; returns the reason if it is dropped."""
        a, b = self.name(model_a), self.name(model_b)
        if not a or not b:
            return "without a model name"
        if a == b:
            return "model against itself"
        outcome = layout.outcome(*winner, a, b)
        if outcome is None:
            self._count(self.unknown_winners, ", ".join(map(str, winner)))
            return "with an unknown winner"
        self.battles.append((self.query(text), self.model(a), self.model(b), outcome, side))
        return None

    def add_score(
        self, text: str, side: int, model: object, score: object, prompt_id: object = None, *, costs: Sequence = ()
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
        table_row = self.table_row_idx.setdefault((str(prompt_id), query, side), len(self.table_row_idx))
        self._keep((table_row, query, self.model(name), side), value, self._cost(costs[0] if costs else cost_in(score)))
        return None

    def add_scores(
        self, text: str, side: int, scores: Sequence[tuple[str, object]], costs: Sequence[object]
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
        # A key of its own for each row; those of long tables start with a string.
        table_row = self.table_row_idx.setdefault((None, self.num_read), len(self.table_row_idx))
        query = self.query(text)
        for name, score, cost in valid:
            self._keep((table_row, query, self.model(name), side), score, cost)
        return None

    def _keep(self, cell: tuple[int, int, int, int], score: float, cost: float | None) -> None:
        self.scores_averaged += cell in self.scores
        for kind, values, value in (("score", self.scores, score), ("cost", self.costs, cost)):
            if value is not None and cell in values:
                self.repeats.setdefault((kind, cell), [values[cell]]).append(value)
            elif value is not None:
                values[cell] = value

    def _cost(self, cell: object) -> float | None:
        cost = as_cost(cell)
        self.costs_missing += cost is None and cell is not None and cell not in NO_NUMBER and cell == cell
        return cost

    def _count_text(self, cell: object) -> None:
        if isinstance(cell, str) and cell.strip() not in NO_NUMBER and as_score(cell) is None:
            self._count(self.not_numbers, cell)

    @staticmethod
    def _count(texts: Counter, text: str) -> None:
        shown = one_line(valid_unicode(text[:40]))
        if shown in texts or len(texts) < NUM_LABELS:
            texts[shown] += 1

    def _mean(self, kind: str, cell: tuple[int, int, int, int]) -> float:
        """The mean of a cell's scores or costs, NaN without one. It does not depend on their order: equal means tie."""
        several = self.repeats.get((kind, cell))
        if several is None:
            return (self.scores if kind == "score" else self.costs).get(cell, math.nan)
        return math.fsum(several) / len(several)

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

    def finish(self, limit: int | None, seed: int) -> tuple[list[str], np.ndarray, np.ndarray, int]:
        """All rows as arrays, with scores paired into battles and models sorted by name.

        limit: keep this many queries with battles, drawn with `seed`; None keeps all.

        Returns model names (M,), battles (N, 5) as query, model a, model b, outcome, side, scores (S, 6) as table row,
        query, model, side, score, cost, and the number of queries with battles that `limit` leaves out.
        """
        battles = np.array(self.battles, np.float64).reshape(-1, 5)  # (N, 5)
        cells = [(*cell, self._mean("score", cell), self._mean("cost", cell)) for cell in self.scores]
        scores = np.array(cells, np.float64).reshape(-1, 6)  # (S, 6)
        # A score that is alone in its row makes no battle.
        alone = (np.bincount(scores[:, 0].astype(np.int64)) == 1)[scores[:, 0].astype(np.int64)]  # (S,)
        self.dropped += Counter({"alone with their query": int(alone.sum())})
        scores = scores[~alone]
        # The limit is applied before scores are paired: the pairs of a large table may not fit into memory.
        queries = np.union1d(battles[:, 0], scores[:, 1])  # those with battles
        outside_limit = max(0, len(queries) - limit) if limit else 0
        if outside_limit:
            kept = np.random.default_rng(seed).choice(queries, limit, replace=False)
            battles, scores = battles[np.isin(battles[:, 0], kept)], scores[np.isin(scores[:, 1], kept)]
        battles = np.concatenate([battles, _pair(scores)])  # (N, 5)
        model_names = sorted(self.model_idx)
        rank = np.argsort([self.model_idx[name] for name in model_names])  # (M,) index -> place in sorted names
        battles[:, 1:3] = rank[battles[:, 1:3].astype(np.int64)]
        scores[:, 2] = rank[scores[:, 2].astype(np.int64)]
        return model_names, battles, scores, outside_limit


def _pair(scores: np.ndarray) -> np.ndarray:
    """Battles (N, 5) of all pairs of scores in a table row: the higher score wins, equal scores tie."""
    scores = scores[np.argsort(scores[:, 0], kind="stable")]  # (S, 6): table row, query, model, side, score, cost
    _, starts, sizes = np.unique(scores[:, 0], return_index=True, return_counts=True)  # (R,) each
    battles = [np.empty((0, 5))]
    for size in np.unique(sizes):  # the r rows of the same size at once
        places = starts[sizes == size, None] + np.arange(size)  # (r, size)
        first, second = np.triu_indices(size, 1)  # (pairs,) each
        a, b = scores[places[:, first].ravel()], scores[places[:, second].ravel()]  # (r * pairs, 6) each
        outcome = (1 + np.sign(a[:, 4] - b[:, 4])) / 2  # (r * pairs,)
        battles.append(np.column_stack([a[:, 1], a[:, 2], b[:, 2], outcome, a[:, 3]]))  # (r * pairs, 5)
    return np.concatenate(battles)  # (N, 5)


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
