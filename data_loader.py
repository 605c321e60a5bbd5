"""Battles between models, loaded from files in the public layouts and split by query."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from support.data.columns import odd_scores
from support.data.formats import SUFFIXES, find_files, open_table
from support.data.layouts import find_layouts, listed
from support.data.rows import Rows, read_and_dropped
from support.system.errors import UserError, one_line
from support.system.files import content_hash

COLUMNS = ("query_idx", "model_a_idx", "model_b_idx", "outcome")  # of Battles, (N,) each
SIDES = np.array(["train", "val", "test"])  # of an official split


@dataclass(frozen=True)
class ScoreTable:
    """R rows of score tables: a query and what each of the M models scored on it."""

    query_idx: np.ndarray  # (R,) int64 into the queries of the battles
    scores: np.ndarray  # (R, M) float64, higher is better, NaN where missing
    costs: np.ndarray | None = None  # (R, M) float64, NaN where missing; None where the files have none
    side: np.ndarray | None = None  # (R,) as of Battles

    def select(self, rows: np.ndarray, models: np.ndarray | slice = slice(None)) -> "ScoreTable":
        """The rows of a mask or indices (r,), with the models of indices (m,)."""
        costs = None if self.costs is None else self.costs[rows][:, models]
        side = None if self.side is None else self.side[rows]
        return ScoreTable(self.query_idx[rows], self.scores[rows][:, models], costs, side)


@dataclass(frozen=True)
class Battles:
    """N battles over Q distinct queries and M models."""

    queries: list[str]  # (Q,) texts
    model_names: list[str]  # (M,) sorted
    query_idx: np.ndarray  # (N,) int64 into queries
    model_a_idx: np.ndarray  # (N,) int64 into model_names
    model_b_idx: np.ndarray  # (N,) int64 into model_names
    outcome: np.ndarray  # (N,) float32, P(a is better): 1, 0, or 0.5 for a tie
    table: ScoreTable | None = None  # the score tables from which battles were made
    side: np.ndarray | None = None  # (N,) int8 into SIDES, where the files have an official split

    def __len__(self) -> int:
        return len(self.outcome)

    @cached_property
    def unique_queries(self) -> np.ndarray:
        """The distinct queries of the battles, sorted: int64 (Qd,) into `queries`."""
        return np.unique(self.query_idx)

    @cached_property
    def query_rows(self) -> np.ndarray:
        """Each battle's row in `unique_queries`: int64 (N,)."""
        return np.searchsorted(self.unique_queries, self.query_idx)

    @cached_property
    def unique_models(self) -> np.ndarray:
        """The distinct models of the battles, sorted: int64 into `model_names`."""
        return np.union1d(self.model_a_idx, self.model_b_idx)

    def margins(self, scores: np.ndarray) -> np.ndarray:
        """Margins d = s_a - s_b of the battles, (N,).

        scores: (Qd, M), a row per query of `unique_queries`; or (1, M), where scores ignore the query.
        """
        scores = np.broadcast_to(scores, (len(self.unique_queries), len(self.model_names)))  # (Qd, M)
        return scores[self.query_rows, self.model_a_idx] - scores[self.query_rows, self.model_b_idx]

    def select(self, keep: np.ndarray) -> "Battles":
        """The battles that `keep`, a boolean mask (N,) or indices, selects; queries, models and table are shared."""
        side = None if self.side is None else self.side[keep]
        return replace(self, side=side, **{name: getattr(self, name)[keep] for name in COLUMNS})

    def concatenate(self, other: "Battles") -> "Battles":
        """These battles followed by those of `other`, a selection from the same queries and models."""
        columns = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in COLUMNS}
        return replace(self, side=None, **columns)


@dataclass(frozen=True)
class Split:
    """Training, validation and test battles, which share their lists of queries (used) and models (trained)."""

    train: Battles
    val: Battles  # no ties
    test: Battles  # no ties


def data_files(path: str, advice: str = "") -> tuple[list[Path], list[Path]]:
    """The data files at `path`, and the other files there. Raises `UserError`, with the advice, if there are none."""
    files, others = find_files(path)
    if not files:
        found = f", found {listed(file.name for file in others)}" if others else ""
        expected = f"expected a file, a glob, or a folder of {listed(SUFFIXES)}{found}"
        raise UserError(f"no data at {path}: {expected}{advice}")
    return files, others


def load_battles(
    path: str,
    score_columns: list[str] | None = None,
    limit: int | None = None,
    seed: int = 42,
    query_column: str | None = None,
    split_column: str | None = None,
) -> tuple[Battles, dict]:
    """Load the battles at `path`, and count the rows that were dropped by reason.

    Queries that differ only in white space are the same, spelled as they first occur. Each pair of models scored in
    the same row of a score table becomes a battle.

    path: a file, a folder, or a glob.
    score_columns: the columns of a wide score table that are models; by default all that can be.
    limit: keep the battles of this many queries, drawn with `seed`; by default all.
    query_column: the column of the query; by default the first with one of the known names.
    split_column: the column that says on which side of the split a row is, if any.

    Returns the battles and the counts for the history. Raises `UserError` where a file cannot be read or has no known
    layout, or no battle is left.
    """
    (files, skipped), rows = data_files(path), Rows()
    layouts = find_layouts([open_table(file) for file in files], score_columns, query_column, split_column)
    for table, layout in layouts.items():
        for chunk in table.read(layout.columns):
            rows.add(chunk, layout)
    model_names, pairs, scores, outside_limit = rows.finish(limit, seed)
    counts = {
        "path": str(path),
        "content_hash": content_hash(files),
        "files_skipped": [str(file) for file in skipped],
        "layouts": sorted({layout.kind for layout in layouts.values()}),
        "columns": list(dict.fromkeys(layout.described for layout in layouts.values())),
        "score_columns": sorted({name for layout in layouts.values() for name in layout.models}),
        **rows.counts(),
        "queries_outside_limit": outside_limit,
    }
    if not len(pairs):
        is_file_of_model = len(model_names) == 1 and len(rows.scores) > 0
        advice = "; give the folder where each model has a file" if is_file_of_model else ""
        found = f"{read_and_dropped(counts)}; models found: {listed(map(one_line, model_names))}"
        raise UserError(f"no usable battle in {path}: {found}; expected battles between at least two models{advice}")
    battles = _as_battles([text for _, text in rows.queries.values()], model_names, pairs, scores, split_column)
    odd = None if battles.table is None else odd_scores(battles.table.scores, model_names)
    if odd and "wide" in counts["layouts"] and not score_columns:
        raise UserError(f"{path}: {odd}; name the columns of the models with --score_columns")
    return battles, counts | {
        "scores_odd": odd,
        "battles": len(battles),
        "ties": int((battles.outcome == 0.5).sum()),
        "queries": len(battles.unique_queries),
        "models": len(battles.unique_models),
    }


def _as_battles(
    queries: list[str], model_names: list[str], pairs: np.ndarray, scores: np.ndarray, split_column: str | None
) -> Battles:
    """The battles (N, 5) and scores (S, 6) that `Rows.finish` returns, over these queries and models."""
    query_idx, model_a_idx, model_b_idx = pairs[:, :3].astype(np.int64).T  # (N,) each
    outcome, side = pairs[:, 3].astype(np.float32), pairs[:, 4].astype(np.int8)  # (N,) each
    table = _score_table(scores, len(model_names)) if len(scores) else None
    return Battles(
        *(queries, model_names, query_idx, model_a_idx, model_b_idx, outcome, table), side if split_column else None
    )


def _score_table(scores: np.ndarray, num_models: int) -> ScoreTable:
    """The table of single scores (S, 6): table row, query, model, side, score, cost."""
    _, first, row = np.unique(scores[:, 0], return_index=True, return_inverse=True)  # (R,), (S,)
    table, costs = np.full((2, len(first), num_models), np.nan)  # (R, M) each
    table[row, scores[:, 2].astype(np.int64)] = scores[:, 4]
    costs[row, scores[:, 2].astype(np.int64)] = scores[:, 5]
    query_idx, side = scores[first, 1].astype(np.int64), scores[first, 3].astype(np.int8)  # (R,) each
    return ScoreTable(query_idx, table, None if np.isnan(costs).all() else costs, side)


def split_battles(
    battles: Battles,
    seed: int,
    by: str = "query",
    ties: str = "drop",
    pairs_per_query: int | None = None,
    hold_out: str | None = None,
) -> tuple[Split, dict]:
    """Split battles 80/10/10 into training, validation and test.

    seed: alone decides which queries (or battles) are on which side, and which battles `pairs_per_query` draws.
    by: "query" keeps all battles of a query on one side; "battle" draws single battles, as published code does.
    ties: "drop" leaves ties out of training, "half" keeps them; validation and test never have any.
    pairs_per_query: draw at most this many training battles of each query; by default all.
    hold_out: the name of a model to leave out, with all its battles.

    Returns the split and its counts. Raises `UserError` where a side is empty or no model is named `hold_out`.
    """
    # 1. The side of each battle, and of each row of a score table.
    side, row_side = _sides(battles, by, seed)  # (N,), (R,)

    # 2. Training battles: ties dropped, pairs drawn, a model held out, each if requested.
    is_tie = battles.outcome == 0.5  # (N,)
    candidates = (side == "train") & (~is_tie if ties == "drop" else True)  # (N,)
    drawn = _draw_battles(candidates, battles.query_idx, pairs_per_query, seed) if pairs_per_query else candidates
    in_train = drawn if hold_out is None else drawn & ~_has_model(battles, hold_out)  # (N,)

    # 3. Validation and test battles: no ties, and only models that training saw.
    trained = battles.select(in_train).unique_models  # (M,)
    is_trained = np.isin(battles.model_a_idx, trained) & np.isin(battles.model_b_idx, trained)  # (N,)
    decisive = (side != "train") & ~is_tie  # (N,)
    in_use = in_train | (decisive & is_trained)  # (N,)

    # 4. Only the queries and models in use, renumbered; these models are `trained`.
    kept = battles.select(in_use)
    renumbered = _renumber(kept)
    split = Split(**{name: renumbered.select(side[in_use] == name) for name in ("train", "val", "test")})
    if empty := [name for name, part in vars(split).items() if not len(part)]:
        found = f"{len(battles)} battles, {is_tie.sum()} of them ties, over {len(battles.unique_queries)} queries"
        raise UserError(f"the split leaves no battle for {listed(empty)}: found {found}; more battles are needed")

    # 5. The rows of a score table.
    table, table_rows = battles.table, None
    if row_side is not None:
        table = replace(
            table.select(slice(None), trained), query_idx=np.searchsorted(kept.unique_queries, table.query_idx)
        )
        split, table_rows = _with_tables(split, table, row_side)

    counts = {
        "split": {name: {"battles": len(b), "queries": len(b.unique_queries)} for name, b in vars(split).items()},
        "ties_left_out": int((is_tie & ((side != "train") | (ties == "drop"))).sum()),
        "training_battles_not_drawn": int((candidates & ~drawn).sum()),
        "training_battles_held_out": int((drawn & ~in_train).sum()),
        "table_rows": table_rows,
        "unseen_model_battles": int((decisive & ~is_trained).sum()),
        "test_queries_in_train": len(np.intersect1d(split.train.query_idx, split.test.query_idx)),
    }
    return split, counts


def _sides(battles: Battles, by: str, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The sides (N,) of battles and (R,) of table rows: the official ones, or drawn by query or by battle.

    A split by battle has no side for a row.
    """
    if battles.side is not None:
        return _official_sides(battles, seed)
    if by == "battle":
        return _draw_sides(len(battles), seed), None
    side_of_query = _draw_sides(len(battles.unique_queries), seed)  # (Qd,)
    table = battles.table
    row_side = (
        None if table is None else side_of_query[np.searchsorted(battles.unique_queries, table.query_idx)]
    )  # (R,)
    return side_of_query[battles.query_rows], row_side


def _draw_sides(num_units: int, seed: int) -> np.ndarray:
    """The side of each unit, (U,): a tenth "test", a tenth "val", the rest "train"."""
    order = np.random.default_rng(seed).permutation(num_units)  # (U,)
    tenth = max(1, round(num_units / 10))
    side = np.full(num_units, "train")  # (U,)
    side[order[:tenth]], side[order[tenth : 2 * tenth]] = "test", "val"
    return side


def _official_sides(battles: Battles, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The sides (N,) of battles and (R,) of table rows that the files state.

    Where they state no validation, a ninth of the training queries is drawn for it.
    """
    side, table = SIDES[battles.side], battles.table  # (N,)
    row_side = None if table is None else SIDES[table.side]  # (R,)
    if "val" not in side:
        train_queries = np.unique(battles.query_idx[side == "train"])  # (Qt,)
        count = max(1, round(len(train_queries) / 9))
        drawn = np.random.default_rng(seed).permutation(train_queries)[:count]  # (Qv,)
        side[(side == "train") & np.isin(battles.query_idx, drawn)] = "val"
        if table is not None:
            row_side[(row_side == "train") & np.isin(table.query_idx, drawn)] = "val"
    return side, row_side


def _draw_battles(mask: np.ndarray, query_idx: np.ndarray, most: int, seed: int) -> np.ndarray:
    """A mask (N,) of at most `most` battles of each query, drawn from those of `mask` (N,)."""
    import pandas as pd

    shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(mask))  # (n,)
    place = pd.Series(query_idx[shuffled]).groupby(query_idx[shuffled]).cumcount()  # (n,) among those of its query
    return np.isin(np.arange(len(mask)), shuffled[place < most])  # (N,)


def _has_model(battles: Battles, name: str) -> np.ndarray:
    """Which battles the model takes part in, (N,)."""
    if name not in battles.model_names:
        raise UserError(f"no model is named {name!r}; found {listed(battles.model_names)}")
    model_idx = battles.model_names.index(name)
    return (battles.model_a_idx == model_idx) | (battles.model_b_idx == model_idx)


def _renumber(battles: Battles) -> Battles:
    """The battles over only the queries and models that occur in them, without their score table."""
    return Battles(
        queries=[battles.queries[i] for i in battles.unique_queries],
        model_names=[battles.model_names[i] for i in battles.unique_models],
        query_idx=battles.query_rows,
        model_a_idx=np.searchsorted(battles.unique_models, battles.model_a_idx),
        model_b_idx=np.searchsorted(battles.unique_models, battles.model_b_idx),
        outcome=battles.outcome,
    )


def _with_tables(split: Split, table: ScoreTable, row_side: np.ndarray) -> tuple[Split, dict[str, int]]:
    """Split the rows of a score table whose scores differ by `row_side` (R,), and count them.

    Training chooses the best single model on its rows and test evaluates it, so without rows on both no side has any.
    """
    differ = np.fmax.reduce(table.scores, axis=1) > np.fmin.reduce(table.scores, axis=1)  # (R,), NaN is ignored
    masks = {name: differ & (row_side == name) for name in vars(split)}  # (R,) each
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    if counts["train"] and counts["test"]:
        split = Split(**{name: replace(side, table=table.select(masks[name])) for name, side in vars(split).items()})
    return split, counts | {"without_a_difference": int((~differ).sum())}


def query_ids(queries: list[str]) -> np.ndarray:
    """An id for each query's text with white space folded: the first 64 bits of its SHA-256, int64 (Q,)."""
    digests = (hashlib.sha256(" ".join(query.split()).encode()).digest()[:8] for query in queries)
    return np.frombuffer(b"".join(digests), np.int64).copy()  # (Q,), writable, as torch expects
