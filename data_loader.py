"""Battles between models, loaded from files in the public layouts and split by query."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from support.files import UserError, content_hash
from support.layouts import Rows, find_layout, listed
from support.tables import SUFFIXES, find_files, open_table

COLUMNS = ("query_idx", "model_a_idx", "model_b_idx", "outcome")  # of Battles, (N,) each
DOWNLOAD = (
    "for Chatbot Arena 33K accept its terms at https://huggingface.co/datasets/lmsys/chatbot_arena_conversations, "
    "log in with `hf auth login`, and run `hf download lmsys/chatbot_arena_conversations --repo-type dataset "
    "--local-dir ../data/chatbot_arena`; or use --demo, which needs neither data nor weights"
)


@dataclass(frozen=True)
class ScoreTable:
    """The R rows of score tables, with what each of M models scored on a query."""

    query_idx: np.ndarray  # (R,) int64 into the queries of the battles
    scores: np.ndarray  # (R, M) float64, higher is better, NaN where a model has none


@dataclass(frozen=True)
class Battles:
    """N battles over Q distinct queries and M models."""

    queries: list[str]  # (Q,) texts
    model_names: list[str]  # (M,) sorted
    query_idx: np.ndarray  # (N,) int64 into queries
    model_a_idx: np.ndarray  # (N,) int64 into model_names
    model_b_idx: np.ndarray  # (N,) int64 into model_names
    outcome: np.ndarray  # (N,) float32, P(a is better): 1, 0, or 0.5 for a tie
    table: ScoreTable | None = None  # the score tables that battles come from

    def __len__(self) -> int:
        return len(self.outcome)

    @cached_property
    def fought(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct queries of the battles, into `queries` (Qd,), and each battle's place among them (N,)."""
        return np.unique(self.query_idx, return_inverse=True)

    def margins(self, scores: np.ndarray) -> np.ndarray:
        """Margins d (N,) of the battles from scores (Qd, M) of their distinct queries, as `fought` orders them.

        Scores that are the same for every query may be one row (1, M).
        """
        queries, row = self.fought
        scores = np.broadcast_to(scores, (len(queries), len(self.model_names)))  # (Qd, M)
        return scores[row, self.model_a_idx] - scores[row, self.model_b_idx]

    def select(self, keep: np.ndarray) -> "Battles":
        """The battles of a boolean mask (N,) or of indices; queries, models and the table stay as they are."""
        return replace(self, **{name: getattr(self, name)[keep] for name in COLUMNS})

    def joined(self, other: "Battles") -> "Battles":
        """These battles and those of another selection of the same ones."""
        return replace(self, **{name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in COLUMNS})


@dataclass(frozen=True)
class Split:
    """Training, validation and test battles over one list of queries, those in use, and of models, those trained."""

    train: Battles
    val: Battles  # no ties
    test: Battles  # no ties


def data_files(path: str) -> list[Path]:
    """The files at `path`. Raises `UserError`, with the way to get Chatbot Arena, where there are none."""
    files = find_files(path)
    if not files:
        raise UserError(f"no data at {path}: expected a file, a glob, or a folder of {listed(SUFFIXES)}; {DOWNLOAD}")
    return files


def load_battles(
    path: str, score_columns: list[str] | None = None, limit: int | None = None, seed: int = 42
) -> tuple[Battles, dict]:
    """Read the battles at `path` (a file, a folder, or a glob of shards) and count what was left out and why.

    Queries are distinct up to white space and keep the first spelling seen. Every pair of models in a row of a
    score table is a battle. `score_columns` names the models of a wide score table outright; `limit` keeps the
    battles of that many queries, drawn by `seed`. Returns the battles and the counts for the history. Raises
    `UserError` where a file cannot be read, has no known layout, or leaves no battle.
    """
    files = data_files(path)
    rows, layouts = Rows(), set()
    for file in files:
        table = open_table(file)
        layout = find_layout(table, score_columns)
        layouts.add(layout)
        for chunk in table.read(layout.columns):
            rows.add(chunk, layout)
    queries, model_names, fights, scores, outside_limit = rows.finish(limit, seed)
    query_idx, model_a_idx, model_b_idx = fights[:, :3].astype(np.int64).T  # (N,) each
    outcome = fights[:, 3].astype(np.float32)  # (N,)
    table = _score_table(scores, len(model_names)) if len(scores) else None
    battles = Battles(queries, model_names, query_idx, model_a_idx, model_b_idx, outcome, table)
    if len(battles) == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rows.dropped.items()) or "none"
        raise UserError(
            f"no usable battle in {path}: {rows.read} rows read, rows dropped: {reasons}; "
            "expected battles between at least two models"
        )
    counts = {
        "path": str(path),
        "content_hash": content_hash(files),
        "layouts": sorted({layout.kind for layout in layouts}),
        "score_columns": sorted({name for layout in layouts for name in layout.models}),
        "rows_read": rows.read,
        "rows_dropped": dict(rows.dropped),
        "scores_missing": rows.scores_missing,
        "queries_repaired": rows.repaired,
        "queries_outside_limit": outside_limit,
        "battles": len(battles),
        "ties": int((battles.outcome == 0.5).sum()),
        "queries": len(np.unique(battles.query_idx)),
        "models": len(np.union1d(battles.model_a_idx, battles.model_b_idx)),
    }
    return battles, counts


def _score_table(scores: np.ndarray, num_models: int) -> ScoreTable:
    """Scores (S, 4) as row, query, model, score, with a line a row."""
    _, first, row = np.unique(scores[:, 0], return_index=True, return_inverse=True)  # (R,), (S,)
    table = np.full((len(first), num_models), np.nan)  # (R, M)
    table[row, scores[:, 2].astype(np.int64)] = scores[:, 3]
    return ScoreTable(scores[first, 1].astype(np.int64), table)


def split_battles(
    battles: Battles,
    seed: int,
    by: str = "query",
    ties: str = "drop",
    pairs_per_query: int | None = None,
    hold_out: str | None = None,
) -> tuple[Split, dict]:
    """Split battles 80/10/10 into training, validation and test, by `seed`.

    `by` "query" puts all battles of a query on one side; "battle" draws single battles, as published code
    does. Ties are left out of validation and test, and of training where `ties` is "drop"; the sides themselves
    do not depend on it, nor on `hold_out`, a model whose battles are left out. Of a query's training battles at most
    `pairs_per_query` are drawn. Battles of a model that training never saw are left out of validation and test. A side
    holds those rows of a score table that are of its queries and whose scores differ; where single battles are drawn,
    it holds none, as no row is of one side.
    Returns the split and its counts. Raises `UserError` where a side is left empty, or no model is named `hold_out`.
    """
    units = battles.query_idx if by == "query" else np.arange(len(battles))
    distinct, unit_idx = np.unique(units, return_inverse=True)  # (U,), (N,)
    order = np.random.default_rng(seed).permutation(len(distinct))  # (U,)
    tenth = max(1, round(len(distinct) / 10))
    side_of_unit = np.full(len(distinct), "train")  # (U,)
    side_of_unit[order[:tenth]] = "test"
    side_of_unit[order[tenth : 2 * tenth]] = "val"
    side = side_of_unit[unit_idx]  # (N,)

    tie = battles.outcome == 0.5
    in_train = (side == "train") & (~tie if ties == "drop" else True)  # (N,)
    num_train = int(in_train.sum())
    if pairs_per_query:
        in_train = _draw(in_train, battles.query_idx, pairs_per_query, seed)  # (N,)
    num_drawn = int(in_train.sum())
    if hold_out is not None:
        if hold_out not in battles.model_names:
            raise UserError(f"no model is named {hold_out!r}; found {listed(battles.model_names)}")
        number = battles.model_names.index(hold_out)
        in_train &= (battles.model_a_idx != number) & (battles.model_b_idx != number)  # (N,)
    seen = np.union1d(battles.model_a_idx[in_train], battles.model_b_idx[in_train])  # (M,)
    known = np.isin(battles.model_a_idx, seen) & np.isin(battles.model_b_idx, seen)  # (N,)
    held_out = (side != "train") & ~tie & known  # (N,)
    used = np.unique(battles.query_idx[in_train | held_out])  # (Q,)
    renumbered = Battles(
        queries=[battles.queries[i] for i in used],
        model_names=[battles.model_names[i] for i in seen],
        query_idx=np.searchsorted(used, battles.query_idx),
        model_a_idx=np.searchsorted(seen, battles.model_a_idx),
        model_b_idx=np.searchsorted(seen, battles.model_b_idx),
        outcome=battles.outcome,
    )
    masks = {"train": in_train, "val": held_out & (side == "val"), "test": held_out & (side == "test")}  # (N,) each
    split = Split(**{name: renumbered.select(mask) for name, mask in masks.items()})
    sizes = {name: {"battles": len(part), "queries": len(part.fought[0])} for name, part in vars(split).items()}
    empty = [name for name, size in sizes.items() if size["battles"] == 0]
    if empty:
        raise UserError(
            f"the split leaves no battle for {listed(empty)}: found {len(battles)} battles, {int(tie.sum())} of "
            f"them ties, over {len(np.unique(battles.query_idx))} queries; more battles are needed"
        )
    table_rows = None
    if battles.table is not None and by == "query":
        scores = battles.table.scores[:, seen]  # (R, M)
        differ = np.fmax.reduce(scores, axis=1) > np.fmin.reduce(scores, axis=1)  # (R,), fmax and fmin pass NaN over
        row_side = side_of_unit[np.searchsorted(distinct, battles.table.query_idx)]  # (R,)
        rows_of = {name: differ & (row_side == name) for name in masks}  # (R,) each
        table_rows = {name: int(rows.sum()) for name, rows in rows_of.items()}
        table_rows["without_a_difference"] = int((~differ).sum())
        if table_rows["train"] and table_rows["test"]:  # one without the other says nothing
            query_idx = np.searchsorted(used, battles.table.query_idx)  # (R,)
            tables = {name: ScoreTable(query_idx[rows], scores[rows]) for name, rows in rows_of.items()}
            split = Split(**{name: replace(part, table=tables[name]) for name, part in vars(split).items()})
    counts = {
        "split": sizes,
        "ties_left_out": int((tie & ((side != "train") | (ties == "drop"))).sum()),
        "training_battles_not_drawn": num_train - num_drawn,
        "training_battles_held_out": num_drawn - int(in_train.sum()),
        "table_rows": table_rows,
        "unseen_model_battles": int(((side != "train") & ~tie & ~known).sum()),
        "test_queries_in_train": len(np.intersect1d(split.train.query_idx, split.test.query_idx)),
    }
    return split, counts


def query_ids(queries: list[str]) -> np.ndarray:
    """A number (Q,), int64, for each query, by its text with white space folded: 64 bits of its SHA-256."""
    digests = (hashlib.sha256(" ".join(query.split()).encode()).digest()[:8] for query in queries)
    return np.frombuffer(b"".join(digests), np.int64).copy()  # (Q,), to write to, as torch wants it


def _draw(mask: np.ndarray, query_idx: np.ndarray, most: int, seed: int) -> np.ndarray:
    """A mask (N,) of at most `most` battles of each query among those of `mask` (N,), drawn by `seed`."""
    shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(mask))  # (n,)
    shuffled = shuffled[np.argsort(query_idx[shuffled], kind="stable")]  # (n,), a query's battles side by side
    _, first, row = np.unique(query_idx[shuffled], return_index=True, return_inverse=True)  # (q,), (n,)
    drawn = np.zeros(len(mask), bool)  # (N,)
    drawn[shuffled[np.arange(len(shuffled)) - first[row] < most]] = True
    return drawn
