"""Battles between models and score tables, loaded from files in the public layouts and split by query."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from support.data.battles import Battles, Pairs
from support.data.columns import odd_scores
from support.data.formats import SUFFIXES, find_files, open_table
from support.data.layouts import find_layouts, listed
from support.data.queries import query_hash
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
    group_column: str | None = None,
    groups_apart: bool = False,
) -> tuple[Battles, dict]:
    """Load the battles at `path`, and count the rows that were dropped by reason.

    Queries that differ only in white space are the same, spelled as they first occur. Each pair of models scored in
    the same row of a score table becomes a battle.

    path: a file, a folder, or a glob.
    score_columns: the columns of a wide score table that are models; by default all that can be.
    limit: keep the battles of this many queries, drawn with `seed`; by default all.
    query_column: the column of the query; by default the first with one of the known names.
    split_column: the column that says on which side of the split a row is, if any.
    group_column: the column of a row's group, such as its task; by default one with a usual name, if any.
    groups_apart: whether equal prompts of several groups in a long table are different rows.

    Returns the battles and the counts for the history. Raises `UserError` where a file cannot be read or has no known
    layout, or no battle is left.
    """
    (files, skipped), rows = data_files(path), Rows(groups_apart)
    tables = [open_table(file) for file in files]
    layouts = find_layouts(tables, score_columns, query_column, split_column, group_column)
    for table, layout in layouts.items():
        for chunk in table.read(layout.columns):
            rows.add(chunk, layout)
    battles, outside_limit = _limited(Battles.from_rows(rows, split_column is not None), limit, seed)
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
    return battles, counts | {"scores_odd": odd} | _sizes(battles)


def battles_in_memory(battles: Battles, limit: int | None = None, seed: int = 42) -> tuple[Battles, dict]:
    """What `load_battles` returns, of battles that are from no file."""
    counts = Rows().counts() | {"path": "memory", "content_hash": battles.content_hash(), "files_skipped": []}
    counts |= {"layouts": ["memory"], "columns": [], "score_columns": [], "scores_odd": None}
    counts["rows_read"] = len(battles)
    battles, counts["queries_outside_limit"] = _limited(battles, limit, seed)
    return battles, counts | _sizes(battles)


def _sizes(battles: Battles) -> dict:
    counts = {"battles": len(battles), "ties": battles.num_ties}
    return counts | {"queries": len(battles.unique_queries), "models": len(battles.unique_models)}


def _limited(battles: Battles, limit: int | None, seed: int) -> tuple[Battles, int]:
    """The battles of at most `limit` queries, drawn with `seed`, and the number of queries that are left out."""
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
    test_groups: list[str] | None = None,
    shuffle: bool = False,
) -> tuple[Split, dict]:
    """Split battles 80/10/10 into training, validation and test.

    seed: alone decides which queries (or battles) are on which side, and the battles of `val_pairs`.
    by: "query" keeps all battles of a query on one side; "battle" draws single battles, as published code does, and
        rows of a score table; "task" keeps groups together, and tests on some that training never saw.
    ties: "drop" leaves ties out of training, "half" keeps them; validation and test never have any.
    hold_out: the name of a model to leave out, with all its battles.
    equal_rows: whether training and validation keep all rows of a score table, also those that hold no battle.
    test_groups: the groups to test on with "task"; by default drawn, until they have a tenth of the queries.
    shuffle: permutes the outcomes of training and validation among queries, so that these say nothing of them.

    Returns the split and its counts. Raises `UserError` where a side is empty or no model is named `hold_out`.
    """
    # 1. The side of each single battle, and of each row of a score table.
    of_battle, of_row = _sides(battles, by, seed, test_groups)  # (N,), (R,)
    sides = {name: battles.select(of_battle == name, of_row == name) for name in ("train", "val", "test")}

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
    train, val, test = (part.renumbered(used, trained) for part in parts.values())
    train, val = (shuffled(part, seed) if shuffle else part for part in (train, val))
    split = Split(train, val, test, val.sample(VAL_BATTLES, seed))

    ties_in_train = sides["train"].num_ties if ties == "half" or equal_rows else 0
    return split, _counts(split, battles, trained) | {
        "groups": _group_counts(battles, of_battle, of_row) if by == "task" else None,
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


def _sides(battles: Battles, by: str, seed: int, test_groups: list[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """The sides (N,) of single battles and (R,) of table rows: official ones, or drawn by query, battle or group."""
    of_battle, of_row = battles.query_columns()  # (N,), (R,)
    if battles.side is not None:
        return _official_sides(battles, seed)
    if by == "task":
        return _sides_of_groups(battles, seed, test_groups)
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
    sides = SIDES[battles.side], SIDES[row_side]  # (N,), (R,)
    if not any("val" in side for side in sides):
        _draw_validation(sides, battles.query_columns(), seed)
    return sides


def _draw_validation(sides: tuple[np.ndarray, ...], queries: tuple[np.ndarray, ...], seed: int) -> None:
    """Move a ninth of the training queries to validation, in the sides of single battles (N,) and table rows (R,)."""
    train_queries = np.unique(np.concatenate([q[side == "train"] for q, side in zip(queries, sides, strict=True)]))
    count = max(1, round(len(train_queries) / 9))
    drawn = np.random.default_rng(seed).permutation(train_queries)[:count]  # (Qv,)
    for side, query_idx in zip(sides, queries, strict=True):
        side[(side == "train") & np.isin(query_idx, drawn)] = "val"


def _groups(battles: Battles) -> tuple[np.ndarray, np.ndarray]:
    """The groups of single battles (N,) and of the table's rows (R,), -1 for none."""
    return battles.group, np.empty(0, np.int64) if battles.table is None else battles.table.group


def _sides_of_groups(battles: Battles, seed: int, test_groups: list[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """The sides (N,) of single battles and (R,) of table rows by group; validation is drawn by query from the others.

    A query of a test group that is in another group, too, is left out there, as is what has no group: "none".
    """
    groups, queries, names = _groups(battles), battles.query_columns(), battles.group_names  # (N,), (R,) each
    pairs = np.unique(np.stack([np.concatenate(groups), np.concatenate(queries)]), axis=1)  # (2, P), group and query
    sizes = np.bincount(pairs[0][pairs[0] >= 0], minlength=len(names))  # (G,) queries
    if (sizes > 0).sum() < 2:
        found = listed(map(one_line, names))
        raise UserError(f"--split_by task needs two groups of queries or more, found {found}; name --group_column")
    if test_groups is None:
        order = np.random.default_rng(seed).permutation(np.flatnonzero(sizes))  # (G,)
        count = 1 + int(np.searchsorted(sizes[order].cumsum(), sizes.sum() / 10))
        test = order[: min(count, len(order) - 1)]
    elif unknown := [name for name in test_groups if name not in names]:
        raise UserError(
            f"--test_groups: no group is named {listed(map(one_line, unknown))}; found {listed(map(one_line, names))}"
        )
    else:
        test = np.array([names.index(name) for name in test_groups])
    sides = tuple(np.where(np.isin(group, test), "test", np.where(group < 0, "none", "train")) for group in groups)
    tested = np.concatenate([query[side == "test"] for query, side in zip(queries, sides, strict=True)])
    for side, query in zip(sides, queries, strict=True):
        side[(side == "train") & np.isin(query, tested)] = "none"
    _draw_validation(sides, queries, seed)
    return sides


def _group_counts(battles: Battles, side: np.ndarray, row_side: np.ndarray) -> dict:
    """The groups on each side, and the battles or rows that are on none, from their sides (N,) and (R,)."""
    sides, group = np.concatenate([side, row_side]), np.concatenate(_groups(battles))  # (N + R,) each
    test, train = (sorted({battles.group_names[i] for i in set(group[sides == name])}) for name in ("test", "train"))
    return {"test": test, "train": train, "left_out": int((sides == "none").sum())}


def shuffled(battles: Battles, seed: int) -> Battles:
    """The battles with outcomes permuted within each pair of models, and the table with its rows permuted.

    A control: each pair of models keeps its wins, so a ranking learns the same, and the query says nothing.
    """
    rng, low = np.random.default_rng(seed), np.minimum(battles.model_a_idx, battles.model_b_idx)  # (N,)
    pair = low * len(battles.model_names) + np.maximum(battles.model_a_idx, battles.model_b_idx)  # (N,)
    is_low = battles.model_a_idx == low  # (N,)
    outcome_of_low = np.where(is_low, battles.outcome, 1 - battles.outcome)  # (N,)
    permuted = np.empty_like(outcome_of_low)  # (N,)
    permuted[np.argsort(pair, kind="stable")] = outcome_of_low[np.lexsort((rng.random(len(pair)), pair))]
    table = battles.table
    if table is not None:
        order = rng.permutation(len(table))  # (R,)
        table = replace(table, scores=table.scores[order], costs=None if table.costs is None else table.costs[order])
    return replace(battles, outcome=np.where(is_low, permuted, 1 - permuted), table=table)


def query_ids(queries: list[str]) -> np.ndarray:
    """An id for each query's text with white space folded: the first 64 bits of its SHA-256, int64 (Q,)."""
    digests = b"".join(query_hash(query)[:8] for query in queries)
    return np.frombuffer(digests, np.int64).copy()  # (Q,), writable, as torch expects
