"""Malicious and damaged inputs: data, checkpoints, names, encoders."""

import collections
import csv
import io
import json
import os
import re
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import every_step, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import report
import route
import train
from data_loader import load_battles, split_battles
from rankrouter import RankRouter
from support.data.cells import as_score
from support.data.formats import open_table
from support.encoding.encoder import QueryEncoder
from support.system.errors import UserError
from support.training.checkpoint import FORMAT_VERSION

# --- the loader: any table in or near the layouts ------------------------------------------------------------

ODD = ["\0", "\x1b[31m", "\u202eright", "\ud800", "a\r\nb", "\u2028", "🦙" * 3, " padded ", "NA", "null", "1e400"]
texts = st.one_of(st.text(max_size=6), st.sampled_from(ODD), st.text(st.characters(), max_size=3))
names = st.one_of(st.sampled_from(["gpt", "claude", "llama/7b", "a, b"]), texts)
numbers = st.one_of(st.floats(), st.integers(-(2**80), 2**80), st.integers(0, 3), st.sampled_from([10**400, -0.0]))
nested = st.lists(st.one_of(texts, numbers), max_size=3) | st.dictionaries(texts, numbers, max_size=2)
anything = st.one_of(st.none(), texts, numbers, st.booleans(), nested)
winner = st.sampled_from(["model_a", "model_b", "tie", "tie (bothbad)", "both_bad"])


def mostly(good):
    """Cells that are valid nine times of ten, and anything else once."""
    return st.integers(0, 9).flatmap(lambda draw: anything if draw == 9 else good)


turn = st.fixed_dictionaries({"role": st.sampled_from(["user", "user", "assistant"]), "content": mostly(texts)})


def table_of(columns, optional, least=0):
    row = st.fixed_dictionaries({name: mostly(cell) for name, cell in columns.items()}, optional=optional)
    return st.lists(row, min_size=least, max_size=9)


sides = {"model_a": names, "model_b": names}
flag = st.sampled_from([0, 1])
small = st.floats(-3, 3) | st.integers(0, 3)  # others are on several scales, which are refused
scored = st.fixed_dictionaries({"score": small}, optional={"cost": numbers})
LAYOUTS = {
    "conversations": table_of(
        {**sides, "winner": winner, "conversation_a": st.lists(mostly(turn), max_size=3)}, {"x": anything}
    ),
    "prompts": table_of({**sides, "winner": winner, "prompt": texts}, {"prompt_id": anything}),
    "one-hot": table_of({**sides, "prompt": texts, **{f"winner_{w}": flag for w in ("model_a", "model_b", "tie")}}, {}),
    "wide": table_of({"prompt": texts, "gpt": small, "claude": small}, {"llama": numbers, "cost|x": anything}),
    "nested": table_of({"question": texts, "scores": st.dictionaries(names, numbers, max_size=3)}, {}),
    "preference": table_of(
        {"instruction": texts, "generator_1": names, "generator_2": names, "preference": st.sampled_from([1, 1.5, 2])},
        {},
    ),
    "list": table_of(
        {
            "query": texts,
            "scores": st.lists(st.fixed_dictionaries({"model": names, "score": mostly(numbers)}), max_size=3),
        },
        {},
    ),
    "mappings": table_of({"prompt": texts, **dict.fromkeys(("gpt", "claude"), scored)}, {}),
    "long": table_of(
        {"prompt": st.sampled_from(["q", " q"]), "model_name": names, "label": numbers}, {"prompt_id": flag}, 4
    ),
    "near": st.lists(
        st.dictionaries(st.sampled_from(["prompt", "winner", "model", "score", "", "\0"]), anything), max_size=4
    ),
}


def write(kind, rows, path):
    """Write the rows; a cell that the format cannot hold is written as text."""
    if kind == "jsonl":
        path.write_bytes("\n".join(map(json.dumps, rows)).encode())
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if kind == "csv":
        text = io.StringIO(newline="")
        csv.writer(text).writerows([columns, *([as_text(row.get(name)) for name in columns] for row in rows)])
        path.write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))
        return
    table = {name.encode("utf-8", "replace").decode(): column([row.get(name) for row in rows]) for name in columns}
    pq.write_table(pa.table(table), path)


def column(cells):
    try:
        array = pa.array(cells)
        pq.write_table(pa.table({"": array}), io.BytesIO())
        return array
    except (pa.ArrowException, OverflowError, UnicodeError, ValueError, TypeError):
        return pa.array([None if cell is None else as_text(cell).encode("utf-8", "surrogatepass") for cell in cells])


def as_text(cell):
    return cell if isinstance(cell, str) else "" if cell is None else json.dumps(cell)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_any_table_loads_with_counts_that_add_up_or_ends_in_one_line(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    loaded = collections.Counter()

    def check(layout, rows):
        write(kind, rows, path)
        try:
            battles, counts = load_battles(str(path))
        except UserError as error:
            assert str(error)
            return
        loaded[layout] += 1
        dropped = sum(counts["rows_dropped"].values())
        (layout_read,) = counts["layouts"]
        assert counts["rows_read"] == num_rows(path)
        if layout_read in ("conversations", "prompts"):
            assert len(battles) + dropped == counts["rows_read"]
            unknown = counts["rows_dropped"].get("with an unknown winner", 0)
            assert sum(counts["unknown_winners"].values()) == unknown
        elif layout_read == "long":
            known = np.isfinite(battles.table.scores).sum() + counts["scores_averaged"]
            assert known + dropped == counts["rows_read"]
        else:
            assert len(battles.table.scores) + dropped == counts["rows_read"]
        if layout_read == "wide":  # each cell of the models is a score, averaged, or missing
            cells = len(battles.table.scores) * len(counts["score_columns"])
            known = np.isfinite(battles.table.scores).sum() + counts["scores_averaged"]
            assert known + counts["scores_missing"] == cells
            named = ", ".join(counts["columns"])
            assert all(name in named for name in ("gpt", "claude") if layout == "wide" and some_number(rows, name))
        assert all(query.strip() and query.encode() for query in battles.queries)
        assert all(name.strip() and name.encode() for name in battles.model_names)
        assert (battles.model_a_idx != battles.model_b_idx).all()
        assert set(battles.outcome) <= {0, 0.5, 1}
        json.dumps(counts, allow_nan=False)
        try:
            split_battles(battles, 0, ties="half")
        except UserError as error:
            assert "the split leaves no battle" in str(error)

    for layout, rows in LAYOUTS.items():
        any_rows = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        any_rows(given(st.just(layout), rows)(check))()
        assert loaded[layout] > 1 or layout == "near", layout


CELL = st.sampled_from([None, 0.0, 0.25, 0.5, 1.0])


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 12), CELL, CELL, CELL), max_size=40), st.sampled_from(["query", "battle"]))
def test_wide_nested_and_long_tables_of_the_same_scores_are_the_same(tmp_path, rows, by):
    names, found = ["a", "b", "c"], []
    rows = [(f"query {query}", dict(zip(names, row, strict=True))) for query, *row in [(0, 0.0, 0.5, 1.0), *rows]]
    rows = [(query, row) for query, row in rows if list(row.values()).count(None) < 2]  # else it is no row
    known = [(query, {name: score for name, score in row.items() if score is not None}) for query, row in rows]
    long = [(query, number, *cell) for number, (query, row) in enumerate(known) for cell in row.items()]
    tables = {
        "wide": [{"prompt": query, **row} for query, row in rows],
        "nested": [{"prompt": query, "scores": row} for query, row in known],
        "long": [dict(zip(("prompt", "prompt_id", "model", "score"), row, strict=True)) for row in long],
    }
    for layout, table in tables.items():
        (tmp_path / "a.json").write_text(json.dumps(table))
        battles, counts = load_battles(str(tmp_path / "a.json"))
        assert counts["layouts"] == [layout]
        loaded = [counts[name] for name in ("battles", "ties", "queries", "models")]
        try:
            split, of_split = split_battles(battles, 0, by, ties="half")
        except UserError as error:
            found.append((loaded, str(error)))
            continue
        parts = [(part.table.query_idx, part.table.scores) for part in (split.train, split.val, split.test)]
        found.append((loaded, of_split, split.train.queries, split.train.model_names, parts, tuple(split.val_pairs)))
    for other in found[1:]:
        np.testing.assert_equal(other, found[0])


def some_number(rows, name):
    return any(as_score(row.get(name)) is not None for row in rows)


def num_rows(path):
    table = open_table(path)
    return sum(len(next(iter(chunk.values()))) for chunk in table.read(table.columns[:1]))


def test_columns_of_one_name_are_refused(tmp_path):
    columns = ["prompt", "model_a", "model_b", "winner", "winner"]
    arrays = [pa.array(["q"]), pa.array(["x"]), pa.array(["y"]), pa.array(["tie"]), pa.array(["model_a"])]
    pq.write_table(pa.Table.from_arrays(arrays, columns), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(f"{','.join(columns)}\nq,x,y,tie,model_a\n")
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(UserError, match="several columns are named winner"):
            load_battles(str(tmp_path / name))


# --- checkpoints ---------------------------------------------------------------------------------------------


def put(*path, value):
    """A change of one value in a checkpoint; None deletes it."""

    def change(checkpoint):
        *parents, last = path
        for key in parents:
            checkpoint = checkpoint[key]
        if value is None:
            del checkpoint[last]
        else:
            checkpoint[last] = value

    return change


NAN = float("nan")
MEAN = "query_tower.mean"
DAMAGES = [
    *(put(name, value=None) for name in ("experiment", "embeddings_hash", "phase", "format_version")),
    *(put("training", name, value=None) for name in ("encoder", "random", "order", "losses")),
    *(put("curves", "towers", name, value=None) for name in ("val_metrics", "validations", "best", "seconds")),
    *(put("format_version", value=value) for value in (3, torch.zeros(2))),
    *(put("phase", value=value) for value in ("ablation", 3)),
    put("training", "router", value=[]),
    *(put("training", "router", MEAN, value=value) for value in (None, torch.zeros(3), 5)),
    *(put("training", part, "another", value=torch.zeros(3)) for part in ("router", "encoder")),
    put("training", "optimizer", "param_groups", value=[]),
    *(
        put("training", "optimizer", "state", 0, "exp_avg", value=value)
        for value in (torch.zeros(3), "x", torch.zeros(1).expand(10**6, 10**6))
    ),
    put("training", "ema", "averages", value=[]),
    put("training", "ema", "averages", 0, value=torch.zeros(3)),
    *(put("training", "random", "python", value=value) for value in ("x", (3, -torch.ones(625).long(), None))),
    *(put("curves", "towers", "best", value=value) for value in ("x", {"weights": {}, "metadata": {}})),
    put("curves", "towers", "best", "weights", MEAN, value=torch.zeros(3)),
    put("curves", "towers", "seconds", "train", value="x"),
    *(put("curves", "towers", "train_losses", value=value) for value in (3, [NAN])),
    *(put("experiment", "--lr", value=value) for value in (torch.ones(2), "x" * 10**6)),
]


def test_a_damaged_last_checkpoint_is_refused_and_costs_no_best_checkpoint(small, tmp_path, fails, monkeypatch):
    last, best, history = (tmp_path / name for name in ("last_checkpoint.pt", "best_model.pt", "training_history.json"))
    flags = [*small, "--output_dir", str(tmp_path)]
    train_step, calls = train.train_step, []

    def stops(*args):
        calls.append(None)
        if len(calls) == 9:  # within the second epoch
            raise KeyboardInterrupt
        return train_step(*args)

    with monkeypatch.context() as patch:
        every_step(patch.setattr)
        patch.setattr(train, "train_step", stops)
        with pytest.raises(KeyboardInterrupt):
            train.main(flags)
    saved, before, expected = last.read_bytes(), best.read_bytes(), RankRouter.load(best).state_dict()

    class Payload:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    files = [b"", saved[:1000], {"format_version": FORMAT_VERSION, "weights": torch.zeros(3)}, {"phase": Payload()}]
    for number, damage in enumerate([*files, *DAMAGES]):
        if isinstance(damage, bytes):
            last.write_bytes(damage)
        elif isinstance(damage, dict):
            torch.save(damage, last)
        else:
            checkpoint = torch.load(io.BytesIO(saved), weights_only=True)
            damage(checkpoint)
            torch.save(checkpoint, last)
        content = last.read_bytes()
        best.write_bytes(before)
        history.unlink(missing_ok=True)
        message = fails(*flags, "--resume")
        assert len(message) < 1500, number
        refused = "is not a RankRouter checkpoint|of another experiment|has checkpoint format|do not fit its encoder"
        assert re.search(refused, message), number
        assert same(RankRouter.load(best).state_dict(), expected), number
        assert last.read_bytes() == content, number
        if damage in files:  # nothing of it is used, and nothing else is touched
            assert sorted(os.listdir(tmp_path)) == [best.name, last.name], number
            assert best.read_bytes() == before, number
    last.write_bytes(saved)
    train.main([*flags, "--resume"])


# --- names ---------------------------------------------------------------------------------------------------

NAMES = ["org/model-7b", "a, b", "line\nbreak", "🦙 llama", 'with "quotes"', "../up", "\x1b[31mred", "gpt-4"]


def test_names_survive_history_checkpoint_report_and_route(small, tmp_path, capsys):
    rng = np.random.default_rng(0)
    pairs = [rng.choice(len(NAMES), 2, replace=False) for _ in range(400)]
    rows = [(f"what is {i}", NAMES[a], NAMES[b], f"model_{'ab'[i % 2]}") for i, (a, b) in enumerate(pairs)]
    table = pd.DataFrame(rows, columns=["prompt", "model_a", "model_b", "winner"])
    table.to_parquet(tmp_path / "battles.parquet")
    data = ["--data_path", str(tmp_path / "battles.parquet")]
    train.main([*small, *data, "--output_dir", str(tmp_path / "out"), "--baselines", "fast"])
    history = json.loads((tmp_path / "out" / "training_history.json").read_text())
    filled = [cluster["log_odds"] for cluster in history["clusters"] if cluster["log_odds"]]
    assert filled
    assert all(list(odds) == sorted(NAMES) for odds in filled)
    checkpoint = tmp_path / "out" / "best_model.pt"
    assert RankRouter.load(checkpoint).model_names == sorted(NAMES)
    capsys.readouterr()
    report.main([str(tmp_path / "out"), "--plots", str(tmp_path / "plots")])
    assert "\x1b" not in capsys.readouterr().out
    rankings = tmp_path / "rankings.jsonl"
    chosen = ",".join('"{}"'.format(name.replace('"', '""')) for name in NAMES[:-1])
    flags = ["--checkpoint", str(checkpoint), "--no_cache", "--output", str(rankings), "--models", chosen]
    route.main(["a query", *flags])
    assert sorted(json.loads(rankings.read_text())["ranking"]) == sorted(NAMES[:-1])
    table.loc[table.model_a == "gpt-4", "model_a"] = "new,\n🦙"
    table.to_parquet(tmp_path / "battles.parquet")
    wider = ["--battles", str(tmp_path / "battles.parquet"), "--save", str(tmp_path / "wider.pt"), "--no_cache"]
    route.main(["--add_model", "new,\n🦙", "--checkpoint", str(checkpoint), *wider])
    assert RankRouter.load(tmp_path / "wider.pt").model_names == [*sorted(NAMES), "new,\n🦙"]


# --- encoders ------------------------------------------------------------------------------------------------

WRONG = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b'"text"',
    b"{}",
    b"\xff\xfe\0",
    b'{"model_type": "qwen2", "hidden_size": "x"}',
]


def test_a_damaged_file_of_an_encoder_is_one_line_or_does_no_harm(demo, tmp_path, capfd):
    shutil.copytree(demo / "encoder", tmp_path / "encoder")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        content, rng, refused = (demo / "encoder" / file).read_bytes(), np.random.default_rng(0), 0
        cuts = [content[: rng.integers(len(content))] for _ in range(5)]
        flips = []
        for _ in range(15):
            flipped = bytearray(content)
            flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
            flips.append(bytes(flipped))
        for damaged in [*WRONG, *cuts, *flips]:
            (tmp_path / "encoder" / file).write_bytes(damaged)
            capfd.readouterr()
            try:
                encoder = QueryEncoder(tmp_path / "encoder", torch.device("cpu"), progress=False)
                encoder.embed(["a query", "another one"])
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
            assert capfd.readouterr().err == "", (file, damaged)
        (tmp_path / "encoder" / file).write_bytes(content)
        assert refused >= 10 or file == "tokenizer_config.json"
