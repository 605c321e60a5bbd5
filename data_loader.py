"""Battles between models and score tables, loaded from files in the public layouts and split by query."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.data.battles import Battles, Pairs, ScoreTable
from support.data.columns import odd_scores
from support.data.formats import SUFFIXES, find_files, open_table
from support.data.layouts import find_layouts, listed
from support.data.rows import Rows, read_and_dropped
from support.system.errors import UserError, one_line
from support.system.files import content_hash

SIDES = np.array(["train", "val", "test"])  # of an official split, by number
VAL_BATTLES = 2**18  # validation uses all battles up to this many, and about this many of more


@dataclass(frozen=True)
class Split:
    """Training, validation and test battles, which share their lists of queries (used) and models (trained)."""

    train: Battles
    val: Battles  # no ties
    test: Battles  # no ties
    val_pairs: Pairs  # the battles of `val` on which training and baselines are validated: all, or a fixed sample


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
    battles, outside_limit = _as_battles(rows, limit, seed, split_column is not None)
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
    if not len(battles):
        is_file_of_model = len(battles.model_names) == 1 and len(rows.cells[0]) > 0
        advice = "; give the folder where each model has a file" if is_file_of_model else ""
        found = f"{read_and_dropped(counts)}; models found: {listed(map(one_line, battles.model_names))}"
        raise UserError(f"no usable battle in {path}: {found}; expected battles between at least two models{advice}")
    odd = None if battles.table is None else odd_scores(battles.table.scores, battles.model_names)
    if odd and "wide" in counts["layouts"] and not score_columns:
        raise UserError(f"{path}: {odd}; name the columns of the models with --score_columns")
    return battles, counts | {
        "scores_odd": odd,
        "battles": len(battles),
        "ties": battles.num_ties,
        "queries": len(battles.unique_queries),
        "models": len(battles.unique_models),
    }


def _as_battles(rows: Rows, limit: int | None, seed: int, has_sides: bool) -> tuple[Battles, int]:
    """The rows that were read, with models sorted by name, and the number of queries that `limit` leaves out."""
    single, table = rows.battles_read(), rows.table_read()
    model_names = sorted(rows.model_idx)
    order = np.array([rows.model_idx[name] for name in model_names], np.int64)  # (M,)
    query_idx, model_a_idx, model_b_idx = single[:, :3].astype(np.int64).T  # (N,) each
    place = np.argsort(order)  # (M,) index -> place among the sorted names
    battles = Battles(
        queries=[text for _, text in rows.queries.values()],
        model_names=model_names,
        query_idx=query_idx,
        model_a_idx=place[model_a_idx],
        model_b_idx=place[model_b_idx],
        outcome=single[:, 3].astype(np.float32),  # (N,)
        table=None if table is None else ScoreTable(*table).select(slice(None), order),
        side=single[:, 4].astype(np.int8) if has_sides else None,  # (N,)
    )
    outside_limit = max(0, len(battles.unique_queries) - limit) if limit else 0
    if outside_limit:
        kept = np.random.default_rng(seed).choice(battles.unique_queries, limit, replace=False)  # (limit,)
        battles = battles.select(*(np.isin(part, kept) for part in battles.query_columns()))
    return battles, outside_limit


def split_battles(
    battles: Battles,
    seed: int,
    by: str = "query",
    ties: str = "drop",
    hold_out: str | None = None,
    equal_rows: bool = False,
) -> tuple[Split, dict]:
    """Split battles 80/10/10 into training, validation and test.

    seed: alone decides which queries (or battles) are on which side, and the battles of `val_pairs`.
    by: "query" keeps all battles of a query on one side; "battle" draws single battles, as published code does, and
        rows of a score table.
    ties: "drop" leaves ties out of training, "half" keeps them; validation and test never have any.
    hold_out: the name of a model to leave out, with all its battles.
    equal_rows: whether training and validation keep all rows of a score table, also those that hold no battle.

    Returns the split and its counts. Raises `UserError` where a side is empty or no model is named `hold_out`.
    """
    # 1. The side of each single battle, and of each row of a score table.
    side, row_side = _sides(battles, by, seed)  # (N,), (R,)
    sides = {name: battles.select(side == name, row_side == name) for name in ("train", "val", "test")}

    # 2. Training battles: ties dropped, a model held out, each if requested.
    candidates = sides["train"].usable(ties == "half", equal_rows)
    models = np.flatnonzero([name != hold_out for name in battles.model_names])  # (m,)
    if hold_out is not None and len(models) == len(battles.model_names):
        raise UserError(f"no model is named {hold_out!r}; found {listed(battles.model_names)}")
    train = candidates if hold_out is None else candidates.among(models).usable(ties == "half", equal_rows)

    # 3. Validation and test battles: no ties, and only models that training saw.
    trained = train.usable(ties == "half").unique_models  # (M,), those with battles
    train = train.among(trained).usable(ties == "half", equal_rows)
    val, test = sides["val"].usable(equal_rows=equal_rows), sides["test"].usable()
    num_decisive = len(val) + len(test)
    val, test = val.among(trained).usable(equal_rows=equal_rows), test.among(trained).usable()
    parts = {"train": train, "val": val, "test": test}
    if empty := [name for name, part in parts.items() if not len(part)]:
        found = f"{len(battles)} battles, {battles.num_ties} of them ties, over {len(battles.unique_queries)} queries"
        found += "" if hold_out is None else f", of which those of {one_line(hold_out)} are held out"
        raise UserError(f"the split leaves no battle for {listed(empty)}: found {found}; more battles are needed")

    # 4. Only the queries and models in use, renumbered; these models are `trained`.
    used = np.unique(np.concatenate([part.unique_queries for part in parts.values()]))  # (Q,)
    parts = {name: part.renumbered(used, trained) for name, part in parts.items()}
    split = Split(**parts, val_pairs=parts["val"].sample(VAL_BATTLES, seed))

    ties_in_train = sides["train"].num_ties if ties == "half" or equal_rows else 0
    return split, _counts(split, battles, trained) | {
        "ties_left_out": battles.num_ties - ties_in_train,
        "training_battles_held_out": len(candidates) - len(train),
        "unseen_model_battles": num_decisive - len(val) - len(test),
    }


def _counts(split: Split, battles: Battles, trained: np.ndarray) -> dict:
    """Sizes of a split of battles, with models of the indices `trained` (M,), for the history."""
    parts, table_rows = {"train": split.train, "val": split.val, "test": split.test}, None
    if battles.table is not None:
        tables = {name: part.table for name, part in parts.items()}
        table_rows = {name: 0 if table is None else int(table.differs().sum()) for name, table in tables.items()}
        table_rows["without_a_difference"] = int((~battles.table.select(slice(None), trained).differs()).sum())
    return {
        "split": {name: {"battles": len(b), "queries": len(b.unique_queries)} for name, b in parts.items()},
        "validation_battles": len(split.val_pairs.row),
        "table_rows": table_rows,
        "test_queries_in_train": len(np.intersect1d(split.train.unique_queries, split.test.unique_queries)),
    }


def _sides(battles: Battles, by: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The sides (N,) of single battles and (R,) of table rows: the official ones, or drawn by query or by battle."""
    of_battle, of_row = battles.query_columns()  # (N,), (R,)
    if battles.side is not None:
        return _official_sides(battles, seed)
    if by == "battle":
        return np.split(_draw_sides(len(of_battle) + len(of_row), seed), [len(of_battle)])
    side_of_query = _draw_sides(len(battles.unique_queries), seed)  # (Qd,)
    return tuple(side_of_query[np.searchsorted(battles.unique_queries, part)] for part in (of_battle, of_row))


def _draw_sides(num_units: int, seed: int) -> np.ndarray:
    """The side of each unit, (U,): a tenth "test", a tenth "val", the rest "train"."""
    order = np.random.default_rng(seed).permutation(num_units)  # (U,)
    tenth = max(1, round(num_units / 10))
    side = np.full(num_units, "train")  # (U,)
    side[order[:tenth]], side[order[tenth : 2 * tenth]] = "test", "val"
    return side


def _official_sides(battles: Battles, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The sides (N,) of single battles and (R,) of table rows that the files state.

    Where they state no validation, a ninth of the training queries is drawn for it.
    """
    row_side = np.empty(0, np.int8) if battles.table is None else battles.table.side  # (R,)
    sides, queries = [SIDES[battles.side], SIDES[row_side]], battles.query_columns()  # (N,), (R,) each
    if not any("val" in side for side in sides):
        train_queries = np.unique(np.concatenate([q[side == "train"] for q, side in zip(queries, sides, strict=True)]))
        count = max(1, round(len(train_queries) / 9))
        drawn = np.random.default_rng(seed).permutation(train_queries)[:count]  # (Qv,)
        for side, query_idx in zip(sides, queries, strict=True):
            side[(side == "train") & np.isin(query_idx, drawn)] = "val"
    return tuple(sides)


def query_ids(queries: list[str]) -> np.ndarray:
    """An id for each query's text with white space folded: the first 64 bits of its SHA-256, int64 (Q,)."""
    digests = (hashlib.sha256(" ".join(query.split()).encode()).digest()[:8] for query in queries)
    return np.frombuffer(b"".join(digests), np.int64).copy()  # (Q,), writable, as torch expects
