"""Battles and score tables as arrays, against naive loops over rows and pairs of models."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from conftest import mixed_battles, written_out

from support.data import battles as module
from support.data.battles import Pairs, count_wins, pairs_and_ties


def columns_of(battles):
    """A list of single battles as `Pairs`."""
    return Pairs(battles.query_rows, battles.model_a_idx, battles.model_b_idx, battles.outcome)


def assert_equal(pairs, expected):
    for column, other in zip(pairs, expected, strict=True):
        np.testing.assert_array_equal(column, other)
        assert column.dtype == other.dtype


@pytest.fixture(params=[True, False], ids=["ties", "no ties"])
def battles(request, monkeypatch):
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 50)  # of the 21 pairs of a row: two rows at once
    return mixed_battles(ties=request.param)


def test_pairs_and_ties_of_each_row_are_counted():
    scores = np.random.default_rng(0).integers(3, size=(2**15 + 5, 4)) / 2  # more than are counted at once
    scores[np.random.default_rng(1).random(scores.shape) < 0.4] = np.nan
    counts = [list(Counter(row[~np.isnan(row)].tolist()).values()) for row in scores]
    pairs, ties = pairs_and_ties(scores)
    assert pairs.tolist() == [sum(row) * (sum(row) - 1) // 2 for row in counts]
    assert ties.tolist() == [sum(n * (n - 1) // 2 for n in row) for row in counts]


def test_a_rank_is_the_place_among_the_different_scores_of_the_row():
    table = mixed_battles().table
    table.scores[0] = [1, 1 + 1e-12, np.nan, -1e300, 1e300, 1e300, 1]  # the first two are equal in float32
    assert table.ranks().dtype == np.float32
    for row, ranks in zip(table.scores, table.ranks(), strict=True):
        places = {score: place for place, score in enumerate(sorted(set(row[~np.isnan(row)])))}
        np.testing.assert_array_equal(ranks, [places.get(score, np.nan) for score in row])


def test_chunks_hold_the_single_battles_and_then_the_pairs_of_each_row(battles):
    chunks, expected = list(battles.chunks()), written_out(battles)
    assert len(chunks) == 1 + 20
    assert_equal(Pairs(*map(np.concatenate, zip(*chunks, strict=True))), columns_of(expected))
    assert len(battles) == len(expected)
    assert battles.num_ties == (expected.outcome == 0.5).sum()
    assert (battles.num_ties > 0) == battles.ties


def test_a_sample_is_all_battles_or_about_as_many_as_requested(battles):
    everything = columns_of(written_out(battles))
    for most in (len(battles), 10**9):
        assert_equal(battles.sample(most, seed=0), everything)
    some, again, other = (battles.sample(200, seed) for seed in (1, 1, 2))
    assert 160 < len(some.row) < 240 < len(battles)
    assert_equal(some, again)
    assert set(zip(*some, strict=True)) != set(zip(*other, strict=True))
    # Each battle is drawn at most once, and those of all rows alike.
    assert not Counter(zip(*some, strict=True)) - Counter(zip(*everything, strict=True))
    shares = np.bincount(some.row, minlength=15) / np.bincount(everything.row)
    assert (shares > 0).all()


def summed(wins):
    """Wins and losses of each cell."""
    cells = defaultdict(lambda: np.zeros(2))
    for *cell, won, lost in zip(*wins, strict=True):
        cells[tuple(cell)] += won, lost
    return {cell: counts.tolist() for cell, counts in cells.items()}


def test_wins_are_counted_by_cluster_and_pair_of_models(battles):
    battles.table.scores[:, 6] = np.nan  # a model without a battle in the table
    every, cluster_idx = written_out(battles), np.arange(15) % 3
    for clusters, of_battle in ((None, np.zeros_like(every.query_idx)), (cluster_idx, cluster_idx[every.query_idx])):
        expected = defaultdict(lambda: [0.0, 0.0])
        for k, a, b, y in zip(of_battle, every.model_a_idx, every.model_b_idx, every.outcome, strict=True):
            expected[k, a, b][0] += y
            expected[k, a, b][1] += 1 - y
        assert summed(battles.win_counts(clusters)) == expected
        assert summed(every.win_counts(clusters)) == expected
        columns = every.model_a_idx, every.model_b_idx, every.outcome, 7
        assert summed(count_wins(of_battle, *columns)) == expected


def test_usable_battles_are_those_between_two_scores_that_differ_unless_ties_are_kept():
    battles = mixed_battles(rows=4)
    nan = np.nan
    battles.table.scores[:, :3] = [[1, 0, nan], [1, 1, nan], [1, nan, nan], [nan, nan, nan]]
    battles.table.scores[:, 3:] = nan
    for options, rows in (({}, 1), ({"ties": True}, 2), ({"equal_rows": True}, 3)):
        usable = battles.usable(**options)
        assert len(usable.table) == rows, options
        assert usable.ties == ("ties" in options), options
        assert len(usable) == (usable.outcome != 0.5).sum() + usable.num_ties + 1, options
        assert (usable.num_ties == 1 + (battles.outcome == 0.5).sum()) == usable.ties, options
    assert battles.select(slice(None), np.zeros(4, bool)).table is None  # rather than a table without rows


def test_battles_among_some_models_keep_their_numbers_until_they_are_renumbered():
    battles, models = mixed_battles(), np.array([1, 3, 6])
    among, every = battles.among(models), written_out(battles)
    kept = every.select(np.isin(every.model_a_idx, models) & np.isin(every.model_b_idx, models), None)
    found = written_out(among)
    for name in ("query_idx", "model_a_idx", "model_b_idx", "outcome"):
        np.testing.assert_array_equal(getattr(found, name), getattr(kept, name))
    assert among.unique_models.tolist() == models.tolist()
    few = written_out(among.renumbered(among.unique_queries, models))
    assert few.model_names == ["m1", "m3", "m6"]
    assert few.queries == [battles.queries[i] for i in among.unique_queries]
    np.testing.assert_array_equal(models[few.model_b_idx], kept.model_b_idx)
    np.testing.assert_array_equal(among.unique_queries[few.query_idx], kept.query_idx)
    assert not np.isnan(battles.table.scores[:, 0]).all()  # `among` changes a copy


def test_scores_closer_than_the_smallest_number_differ_also_where_it_is_flushed_to_zero():
    a, b = 2.3e-308, 2.4e-308
    torch.set_flush_denormal(True)  # as training does
    try:
        table = module.ScoreTable(np.zeros(1, np.int64), np.array([[a, b, b]]))
        assert table.ranks().tolist() == [[0, 1, 1]]
        assert [int(count) for (count,) in pairs_and_ties(table.scores)] == [3, 1]
        np.testing.assert_array_equal(module.outcomes(np.array([a, b, b]), np.array([b, a, b]), False), [0, 1, np.nan])
    finally:
        torch.set_flush_denormal(False)
