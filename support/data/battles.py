"""Battles and score tables as arrays: their pairs of models listed in chunks, sampled, and counted."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from support.data.cells import outcome_of_label
from support.data.layouts import Layout
from support.data.queries import as_query
from support.data.rows import Rows
from support.system.errors import UserError, one_line

TUPLES = Layout("prompts", "query", ("model_a", "model_b", "winner"), outcome_of_label)  # of `Battles.from_tuples`
COLUMNS = ("query_idx", "model_a_idx", "model_b_idx", "outcome")  # of Battles, (N,) each
PAIRS_AT_ONCE = 2**20  # pairs of models of a score table that are listed at once


def outcomes(a: np.ndarray, b: np.ndarray, ties: bool) -> np.ndarray:
    """P(a is better) from scores of any shapes: 1, 0, or 0.5 where they are equal; NaN where they make no battle.

    That is where one is missing, or without `ties` where they are equal. Scores are compared and not subtracted, since
    a very small difference may be flushed to 0.
    """
    outcome = np.where(a > b, 1.0, np.where(a < b, 0.0, 0.5 if ties else np.nan))
    return np.where(np.isnan(a) | np.isnan(b), np.nan, outcome)


def rows_differ(scores: np.ndarray) -> np.ndarray:
    """Which rows of scores (R, M), NaN where missing, have scores that differ: (R,)."""
    return np.fmax.reduce(scores, axis=1) > np.fmin.reduce(scores, axis=1)  # NaN is ignored


@dataclass(frozen=True)
class ScoreTable:
    """R rows of score tables: a query and what each of the M models scored on it. Each pair of models is a battle."""

    query_idx: np.ndarray  # (R,) int64 into the queries of the battles
    scores: np.ndarray  # (R, M) float64, higher is better, NaN where missing
    costs: np.ndarray | None = None  # (R, M) float64, NaN where missing; None where the files have none
    side: np.ndarray | None = None  # (R,) as of Battles
    group: np.ndarray | None = None  # (R,) as of Battles

    def __len__(self) -> int:
        return len(self.query_idx)

    def select(self, rows: np.ndarray, models: np.ndarray | slice = slice(None)) -> "ScoreTable":
        """The rows of a mask or indices (r,), with the models of indices (m,)."""
        costs = None if self.costs is None else self.costs[rows][:, models]
        side, group = (None if each is None else each[rows] for each in (self.side, self.group))
        return ScoreTable(self.query_idx[rows], self.scores[rows][:, models], costs, side, group)

    def differs(self) -> np.ndarray:
        """Which rows have scores that differ, (R,): the others hold no decisive battle."""
        return rows_differ(self.scores)

    def mean_costs(self) -> np.ndarray:
        """The mean cost of each model over its rows with one, (M,); NaN where it has none."""
        if self.costs is None:
            return np.full(self.scores.shape[1], np.nan)
        count = (~np.isnan(self.costs)).sum(0)  # (M,)
        return np.divide(np.nansum(self.costs, 0), count, out=np.full(len(count), np.nan), where=count > 0)

    def labels(self, label_range: list[float]) -> np.ndarray:
        """The scores as labels (R, M), 0 and 1 at the ends of the range and beyond them; NaN where missing."""
        low, high = label_range
        return ((self.scores - low) / (high - low)).clip(0, 1)

    def ranks(self) -> np.ndarray:
        """The place of each score among the different ones of its row, from 0 for the lowest: float32 (R, M).

        They compare as the scores do, and in float32 without rounding. NaN where a score is missing.
        """
        order = np.argsort(self.scores, axis=1)  # (R, M), NaN last
        in_order = np.take_along_axis(self.scores, order, axis=1)  # (R, M)
        steps = in_order[:, 1:] > in_order[:, :-1]  # (R, M - 1)
        ranks = np.zeros(self.scores.shape, np.float32)  # (R, M)
        np.put_along_axis(ranks, order[:, 1:], steps.cumsum(1, dtype=np.float32), axis=1)
        ranks[np.isnan(self.scores)] = np.nan
        return ranks


def pairs_and_ties(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of pairs of scores (R, M) in each row, without NaN, and that of ties among them: int64 (R,) each."""
    pairs, ties, place = [], [], np.arange(scores.shape[1])  # (M,)
    for some in np.array_split(scores, len(scores) // 2**14 + 1):  # (r, M) each
        in_order = np.sort(some, axis=1)  # (r, M), NaN last
        starts = np.full(some.shape, True)  # (r, M), where another score starts
        starts[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
        first = np.maximum.accumulate(np.where(starts, place, 0), axis=1)  # (r, M), place of the first of equals
        known = (~np.isnan(some)).sum(1)  # (r,)
        pairs.append(known * (known - 1) // 2)
        ties.append(np.where(np.isnan(in_order), 0, place - first).sum(1))
    return np.concatenate(pairs), np.concatenate(ties)


class Pairs(NamedTuple):
    """A list of N battles over the Q queries of `Battles.unique_queries`."""

    row: np.ndarray  # int64 (N,), of each battle's query in `unique_queries`
    model_a_idx: np.ndarray  # int64 (N,)
    model_b_idx: np.ndarray  # int64 (N,)
    outcome: np.ndarray  # float32 (N,), P(a is better)

    def margins(self, scores: np.ndarray) -> np.ndarray:
        """Margins d = s_a - s_b of the battles (N,), from scores (Q, M), or (1, M) where they ignore the query."""
        row = self.row if len(scores) > 1 else 0
        return scores[row, self.model_a_idx] - scores[row, self.model_b_idx]


class WinCounts(NamedTuple):
    """Wins of one model against another in a cluster of queries, for the C such cells that have battles; (C,) each."""

    cluster: np.ndarray  # int64, zeros where there are no clusters
    model_a_idx: np.ndarray  # int64
    model_b_idx: np.ndarray  # int64
    won: np.ndarray  # float64, battles that a won; a tie is half a win of each
    lost: np.ndarray  # float64


def count_wins(
    cluster: np.ndarray, model_a_idx: np.ndarray, model_b_idx: np.ndarray, outcome: np.ndarray, num_models: int
) -> WinCounts:
    """The win counts of a list of battles, (N,) each."""
    keys = (cluster * num_models + model_a_idx) * num_models + model_b_idx  # (N,)
    cells, cell = np.unique(keys, return_inverse=True)  # (C,), (N,)
    won, lost = np.bincount(cell, outcome, len(cells)), np.bincount(cell, 1 - outcome, len(cells))  # (C,) each
    return WinCounts(cells // num_models**2, cells // num_models % num_models, cells % num_models, won, lost)


@dataclass(frozen=True)
class Battles:
    """Battles over Q distinct queries and M models: N single ones, and the pairs of models in rows of a score table."""

    queries: list[str]  # (Q,) texts
    model_names: list[str]  # (M,) sorted
    query_idx: np.ndarray  # (N,) int64 into queries
    model_a_idx: np.ndarray  # (N,) int64 into model_names
    model_b_idx: np.ndarray  # (N,) int64 into model_names
    outcome: np.ndarray  # (N,) float32, P(a is better): 1, 0, or 0.5 for a tie
    table: ScoreTable | None = None
    ties: bool = True  # whether equal scores of the table are battles, too
    side: np.ndarray | None = None  # (N,) int8, of an official split: 0 training, 1 validation, 2 test
    group: np.ndarray | None = None  # (N,) int64 into group_names, -1 for none
    group_names: tuple[str, ...] = ()  # of tasks, or of other groups of queries

    @classmethod
    def from_tuples(cls, battles: Iterable[tuple[str | list[dict], str, str, str]]) -> "Battles":
        """Battles from (query, model a, model b, winner): `Battles.from_tuples([("Hi", "gpt-4", "llama", "gpt-4")])`.

        The query is a text, or chat messages, of which the user's first turn counts. The winner is "model_a",
        "model_b", "tie", or the name of the better model where that is not ambiguous. Queries that differ only in white
        space are the same. Raises `UserError` where a tuple is no battle, or there is none.
        """
        rows = Rows()
        for number, battle in enumerate(battles, start=1):
            shown = f"battle {number}, {one_line(battle)[:80]},"
            if not isinstance(battle, (tuple, list)) or len(battle) != 4:
                raise UserError(f"{shown} is no tuple of query, model a, model b and winner")
            query, *others = battle
            text = as_query(query, "first", f"the query of battle {number}")
            if problem := rows.add_battle(text, (-1, -1), TUPLES, *others):
                raise UserError(
                    f"{shown} is {problem}; expected as winner model_a, model_b, tie, or one of the two names"
                )
        if not rows.battles:
            raise UserError("there is no battle; expected tuples of query, model a, model b and winner")
        return cls.from_rows(rows, has_sides=False)

    @classmethod
    def from_rows(cls, rows: Rows, has_sides: bool) -> "Battles":
        """The battles and score tables of rows that were read, with models sorted by name.

        has_sides: whether the rows say on which side of the split they are.
        """
        single, table = rows.battles_read(), rows.table_read()
        model_names = sorted(rows.model_idx)
        order = np.array([rows.model_idx[name] for name in model_names], np.int64)  # (M,)
        query_idx, model_a_idx, model_b_idx = single[:, :3].astype(np.int64).T  # (N,) each
        place = np.argsort(order)  # (M,) index -> place among the sorted names
        return cls(
            queries=[text for _, text in rows.queries.values()],
            model_names=model_names,
            query_idx=query_idx,
            model_a_idx=place[model_a_idx],
            model_b_idx=place[model_b_idx],
            outcome=single[:, 3].astype(np.float32),  # (N,)
            table=None if table is None else ScoreTable(*table).select(slice(None), order),
            side=single[:, 4].astype(np.int8) if has_sides else None,  # (N,)
            group=single[:, 5].astype(np.int64),  # (N,)
            group_names=tuple(rows.groups),
        )

    def content_hash(self) -> str:
        """SHA-256 (hex) of the battles, for those that are not from a file."""
        digest = hashlib.sha256(repr((self.queries, self.model_names, self.group_names)).encode())
        for part in (self,) if self.table is None else (self, self.table):
            for column in (getattr(part, each.name) for each in fields(part)):
                digest.update(np.ascontiguousarray(column) if isinstance(column, np.ndarray) else b"none")
        return digest.hexdigest()

    def query_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """The queries of single battles (N,), and those of the table's rows (R,), none without a table."""
        return self.query_idx, np.empty(0, np.int64) if self.table is None else self.table.query_idx

    @cached_property
    def _pairs_and_ties(self) -> tuple[int, int]:
        return (0, 0) if self.table is None else tuple(int(n.sum()) for n in pairs_and_ties(self.table.scores))

    @property
    def num_ties(self) -> int:
        """The number of ties among the battles."""
        return int((self.outcome == 0.5).sum()) + (self._pairs_and_ties[1] if self.ties else 0)

    def __len__(self) -> int:
        """The number of battles: single ones, and pairs in the table."""
        pairs, ties = self._pairs_and_ties
        return len(self.outcome) + pairs - (0 if self.ties else ties)

    @cached_property
    def unique_queries(self) -> np.ndarray:
        """The distinct queries of battles and table, sorted: int64 (Qd,) into `queries`."""
        return np.unique(np.concatenate(self.query_columns()))

    @cached_property
    def query_rows(self) -> np.ndarray:
        """The row in `unique_queries` of each single battle's query: int64 (N,)."""
        return np.searchsorted(self.unique_queries, self.query_idx)

    @cached_property
    def table_query_rows(self) -> np.ndarray:
        """The row in `unique_queries` of each table row's query: int64 (R,)."""
        return np.searchsorted(self.unique_queries, self.query_columns()[1])

    @cached_property
    def unique_models(self) -> np.ndarray:
        """The distinct models of battles and table, sorted: int64 into `model_names`."""
        models = np.union1d(self.model_a_idx, self.model_b_idx)
        return models if self.table is None else np.union1d(models, np.flatnonzero(~np.isnan(self.table.scores).all(0)))

    def chunks(self) -> Iterator[Pairs]:
        """All battles in lists: the single ones, then those of the table, at most about `PAIRS_AT_ONCE` at a time."""
        if len(self.outcome):
            yield Pairs(self.query_rows, self.model_a_idx, self.model_b_idx, self.outcome)
        if self.table is None:
            return
        first, second = np.triu_indices(len(self.model_names), 1)  # (P,) each
        at_once = max(1, PAIRS_AT_ONCE // max(1, len(first)))
        for low in range(0, len(self.table), at_once):
            scores = self.table.scores[low : low + at_once]  # (r, M)
            outcome = outcomes(scores[:, first], scores[:, second], self.ties)  # (r, P)
            row, pair = (~np.isnan(outcome)).nonzero()  # (n,) each
            yield Pairs(
                self.table_query_rows[low:][row], first[pair], second[pair], outcome[row, pair].astype(np.float32)
            )

    def sample(self, most: int, seed: int) -> Pairs:
        """All battles in one list, or where there are more than `most`, about that many, drawn with `seed`."""
        share, rng, parts = most / max(1, len(self)), np.random.default_rng(seed), []
        for part in self.chunks():
            drawn = slice(None) if share >= 1 else rng.random(len(part.row)) < share  # (n,)
            parts.append([column[drawn] for column in part])
        return Pairs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def win_counts(self, cluster_idx: np.ndarray | None = None) -> WinCounts:
        """Wins per pair of models; with `cluster_idx` (Q,), the cluster of each of `queries`, in each cluster."""
        cluster_idx = np.zeros(len(self.queries), np.int64) if cluster_idx is None else cluster_idx  # (Q,)
        num_models = len(self.model_names)
        columns = self.model_a_idx, self.model_b_idx, self.outcome  # (N,) each
        parts = [count_wins(cluster_idx[self.query_idx], *columns, num_models)]
        if self.table is not None:
            of_row = cluster_idx[self.table.query_idx]  # (R,)
            for cluster in np.unique(of_row):
                parts.append(self._wins_in_rows(np.flatnonzero(of_row == cluster), cluster))
        return WinCounts(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _wins_in_rows(self, rows: np.ndarray, cluster: int) -> WinCounts:
        a, b = np.triu_indices(len(self.model_names), 1)  # (P,) each
        won, lost = np.zeros(len(a)), np.zeros(len(a))  # (P,) each
        for some in np.array_split(rows, len(rows) * len(a) // PAIRS_AT_ONCE + 1):  # (r,) each
            scores = self.table.scores[some]  # (r, M)
            outcome = outcomes(scores[:, a], scores[:, b], self.ties)  # (r, P)
            won, lost = won + np.nansum(outcome, 0), lost + np.nansum(1 - outcome, 0)
        had = won + lost > 0  # (P,)
        return WinCounts(np.full(had.sum(), cluster), a[had], b[had], won[had], lost[had])

    def select(self, keep: np.ndarray, rows: np.ndarray | slice | None) -> "Battles":
        """The single battles of a mask or indices, and the table's rows of another; None for no table."""
        side, group = (None if each is None else each[keep] for each in (self.side, self.group))
        table = None if self.table is None or rows is None else self.table.select(rows)
        table = None if table is None or not len(table) else table
        columns = {name: getattr(self, name)[keep] for name in COLUMNS}
        return replace(self, side=side, group=group, table=table, **columns)

    def usable(self, ties: bool = False, equal_rows: bool = False) -> "Battles":
        """These battles with or without ties, and of the table the rows that then hold battles.

        equal_rows: keeps all rows with a score, also where they hold no battle.
        """
        rows = None
        if self.table is not None:
            known = (~np.isnan(self.table.scores)).sum(1)  # (R,)
            rows = known > 0 if equal_rows else known > 1 if ties else self.table.differs()  # (R,)
        single = np.full(len(self.outcome), True) if ties else self.outcome != 0.5  # (N,)
        return replace(self.select(single, rows), ties=ties)

    def among(self, models: np.ndarray) -> "Battles":
        """The battles between models of these indices (m,); in the table the other models have no score."""
        kept = self.select(np.isin(self.model_a_idx, models) & np.isin(self.model_b_idx, models), slice(None))
        if kept.table is None or len(models) == len(self.model_names):
            return kept
        scores = np.full_like(kept.table.scores, np.nan)  # (R, M)
        scores[:, models] = kept.table.scores[:, models]
        return replace(kept, table=replace(kept.table, scores=scores))

    def renumbered(self, queries: np.ndarray, models: np.ndarray) -> "Battles":
        """The same battles over only the queries and models of these sorted indices, which include all in use."""
        table = self.table
        if table is not None:
            table = replace(table.select(slice(None), models), query_idx=np.searchsorted(queries, table.query_idx))
        return replace(
            self,
            queries=[self.queries[i] for i in queries],
            model_names=[self.model_names[i] for i in models],
            query_idx=np.searchsorted(queries, self.query_idx),
            model_a_idx=np.searchsorted(models, self.model_a_idx),
            model_b_idx=np.searchsorted(models, self.model_b_idx),
            table=table,
            side=None,
            group=None,
        )

    def concatenate(self, other: "Battles") -> "Battles":
        """These battles followed by the single ones of `other`, a selection from the same queries and models."""
        columns = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in COLUMNS}
        return replace(self, side=None, group=None, **columns)
