"""Every layout from files in its public schema, the split, and files that are broken."""

import argparse
import csv
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loader import load_battles, query_ids, split_battles
from support.system.command_line import comma_separated
from support.system.errors import UserError


def turns(query, *parts):
    """A conversation of Arena 33K; with parts, the list of parts that Arena 140K has as content."""
    content = [{"type": "text", "text": part, "image": None} for part in parts] if parts else query
    answer = [{"type": "text", "text": "an answer", "image": None}] if parts else "an answer"
    return [{"content": content, "role": "user"}, {"content": answer, "role": "assistant"}]


def arena(query, a, b, winner, **more):
    return {
        "question_id": "q1",
        "model_a": a,
        "model_b": b,
        "winner": winner,
        "judge": "arena_user_1",
        "conversation_a": turns(query),
        "conversation_b": turns(query),
        "turn": 1,
        "anony": True,
        "language": "English",
        "tstamp": 1682351591.0,
    } | more


def as_rows(battles):
    """Battles as readable tuples: query, model a, model b, outcome."""
    rows = zip(battles.query_idx, battles.model_a_idx, battles.model_b_idx, battles.outcome, strict=True)
    names = battles.model_names
    return [(battles.queries[q], names[a], names[b], float(y)) for q, a, b, y in rows]


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_csv(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


ARENA = [
    arena("What is a monad?", "vicuna-13b", "koala-13b", "model_a"),
    arena("Bake bread", "koala-13b", "alpaca-13b", "model_b"),
    arena("Bake bread", "koala-13b", "vicuna-13b", "tie"),
    arena("Sing", "koala-13b", "vicuna-13b", "tie (bothbad)"),
]
ARENA_READ = [
    ("What is a monad?", "vicuna-13b", "koala-13b", 1.0),
    ("Bake bread", "koala-13b", "alpaca-13b", 0.0),
    ("Bake bread", "koala-13b", "vicuna-13b", 0.5),
    ("Sing", "koala-13b", "vicuna-13b", 0.5),
]


def test_arena_33k(tmp_path):
    battles, counts = load_battles(write_parquet(tmp_path / "train.parquet", ARENA))
    assert as_rows(battles) == ARENA_READ
    assert battles.model_names == ["alpaca-13b", "koala-13b", "vicuna-13b"]
    assert (counts["rows_read"], counts["battles"], counts["ties"], counts["queries"]) == (4, 4, 2, 3)
    assert counts["layouts"] == ["conversations"]


def test_arena_140k_parts_and_later_first_user_turn(tmp_path):
    system = [{"role": "system", "content": [{"type": "text", "text": "be brief", "image": None}]}]
    rows = [
        {"id": "1", "model_a": "x", "model_b": "y", "winner": "both_bad", "conversation_a": turns("", "one", "two")},
        {"id": "2", "model_a": "x", "model_b": "y", "winner": "model_b", "conversation_a": system + turns("", "three")},
        {"id": "3", "model_a": "x", "model_b": "y", "winner": "model_b", "conversation_a": turns("", "")},
    ]
    battles, counts = load_battles(write_parquet(tmp_path / "a.parquet", rows))
    assert as_rows(battles) == [("one\ntwo", "x", "y", 0.5), ("three", "x", "y", 0.0)]
    assert counts["rows_dropped"] == {"without query text": 1}


@pytest.mark.parametrize("gzipped", [False, True])
def test_kaggle_55k(tmp_path, gzipped):
    def row(prompt, a, b, one_hot):
        flags = dict(zip(("winner_model_a", "winner_model_b", "winner_tie"), one_hot, strict=True))
        return {"id": 1, "model_a": a, "model_b": b, "prompt": prompt, "response_a": "[]", "response_b": "[]"} | flags

    rows = [
        row('["first\\nturn", "second"]', "gpt-4", "claude-1", (1, 0, 0)),
        row('["NA"]', "gpt-4", "claude-1", (0, 1, 0)),
        row("null", "gpt-4", "claude-1", (0, 0, 1)),
        row("[not a list", "gpt-4", "claude-1", (0, 0, 1)),
        row('[null, "x"]', "gpt-4", "claude-1", (0, 0, 1)),
        row('["broken \\ud83d emoji"]', "gpt-4", "claude-1", (0, 1, 0)),
        row('["nobody"]', "gpt-4", "claude-1", (0, 0, 0)),
        row('["both"]', "gpt-4", "claude-1", (1, 1, 0)),
    ]
    file = tmp_path / ("train.csv.gz" if gzipped else "train.csv")
    battles, counts = load_battles(write_csv(file, rows, gzip.open if gzipped else open))
    assert as_rows(battles) == [
        ("first\nturn", "gpt-4", "claude-1", 1.0),
        ("NA", "gpt-4", "claude-1", 0.0),
        ("null", "gpt-4", "claude-1", 0.5),
        ("[not a list", "gpt-4", "claude-1", 0.5),
        ("broken \ufffd emoji", "gpt-4", "claude-1", 0.0),
    ]
    assert counts["rows_dropped"] == {"without query text": 1, "with an unknown winner": 2}
    assert counts["queries_repaired"] == 1


def test_prompts_with_winner(tmp_path):
    rows = [{"prompt": "hi", "model_a": "x", "model_b": "y", "winner": "model_a"}]
    battles, counts = load_battles(write_lines(tmp_path / "a.jsonl", rows))
    assert as_rows(battles) == [("hi", "x", "y", 1.0)]
    assert counts["layouts"] == ["prompts"]


def test_routerbench_wide(tmp_path):
    def row(prompt, gpt, claude, mixtral):
        scores = {"gpt-4": gpt, "claude-2": claude, "mixtral": mixtral}
        more = {f"{name}|model_response": "text" for name in scores} | {f"{name}|total_cost": 0.1 for name in scores}
        return {"sample_id": "a", "prompt": prompt, "eval_name": "mmlu"} | scores | more | {"oracle": "gpt-4"}

    rows = [row("p1", 1.0, 0.25, 1.0), row("p2", 0.0, None, 0.5), row("p3", None, 0.5, None), row(" ", 1.0, 0.0, 0.0)]
    battles, counts = load_battles(write_parquet(tmp_path / "wide.parquet", rows))
    assert counts["score_columns"] == ["claude-2", "gpt-4", "mixtral"]
    assert sorted(as_rows(battles)) == [
        ("p1", "claude-2", "mixtral", 0.0),
        ("p1", "gpt-4", "claude-2", 1.0),
        ("p1", "gpt-4", "mixtral", 0.5),
        ("p2", "gpt-4", "mixtral", 0.0),
    ]
    assert counts["rows_dropped"] == {"with fewer than two scores": 1, "without query text": 1}
    assert counts["scores_missing"] == 1

    named, counts = load_battles(str(tmp_path / "wide.parquet"), score_columns=["gpt-4", "mixtral"])
    assert named.model_names == ["gpt-4", "mixtral"]
    assert sorted(as_rows(named)) == [("p1", "gpt-4", "mixtral", 0.5), ("p2", "gpt-4", "mixtral", 0.0)]


def test_routerdc_nested_scores(tmp_path):
    rows = [
        {"question": "q1", "scores": {"org/m1": 0.9, "org/m2": 0.1, "org/m3": None}, "cluster_id": 3},
        {"question": "q2", "scores": {"org/m3": 0.5, "org/m2": 0.5}, "cluster_id": 1},
    ]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    read = [("q1", "org/m1", "org/m2", 1.0), ("q2", "org/m3", "org/m2", 0.5)]
    for path in (str(tmp_path / "array.json"), write_parquet(tmp_path / "nested.parquet", rows)):
        battles, _ = load_battles(path)
        assert [{*row[1:3], row[3]} for row in as_rows(battles)] == [{*row[1:3], row[3]} for row in read]
    named = {row["question"]: json.dumps(row["scores"]) for row in rows}
    as_text = write_csv(tmp_path / "a.csv", [{"question": q, "scores": scores} for q, scores in named.items()])
    assert as_rows(load_battles(as_text)[0]) == read


def test_embedllm_long(tmp_path):
    def row(prompt_id, prompt, model, label):
        head = {"prompt_id": prompt_id, "model_id": 4, "category_id": 1, "label": label}
        return head | {"prompt": prompt, "model_name": model, "category": "mmlu"}

    rows = [
        row(7, "p7", "m1", 1),
        row(8, "p8", "m1", 0),
        row(7, "p7", "m2", 0),
        row(8, "p8", "m2", 0),
        row(7, "p7", "m2", 1),  # scored before
        row(7, "p7", "m3", ""),
        row(9, "p9", "m3", 1),  # alone, so no battle
        row(8, "p8", "m3", 1),
    ]
    battles, counts = load_battles(write_csv(tmp_path / "train.csv", rows))
    assert sorted(as_rows(battles)) == [
        ("p7", "m1", "m2", 1.0),
        ("p8", "m1", "m2", 0.5),
        ("p8", "m1", "m3", 0.0),
        ("p8", "m2", "m3", 0.0),
    ]
    assert counts["rows_dropped"] == {"scoring a model again": 1, "without a score": 1, "alone with their query": 1}


def test_prompt_ids_that_repeat_or_are_empty_do_not_mix_prompts(tmp_path):
    def row(prompt_id, prompt, model, label):
        return {"prompt_id": prompt_id, "prompt": prompt, "model_name": model, "label": label}

    (tmp_path / "shards").mkdir()
    write_csv(tmp_path / "shards" / "a.csv", [row(0, "x", "m1", 1), row(0, "x", "m2", 0)])
    write_csv(tmp_path / "shards" / "b.csv", [row(0, "y", "m1", 0), row(0, "y", "m3", 1)])
    assert as_rows(load_battles(str(tmp_path / "shards"))[0]) == [("x", "m1", "m2", 1.0), ("y", "m1", "m3", 0.0)]
    # A wide table among the shards: its rows are groups of their own, whatever an id may be called.
    write_csv(tmp_path / "shards" / "0.csv", [{"prompt": "x", "m1": 1, "m2": 0}])
    write_csv(tmp_path / "shards" / "a.csv", [row("row", "x", "m3", 1), row("row", "x", "m4", 0)])
    battles, _ = load_battles(str(tmp_path / "shards"))
    assert as_rows(battles) == [("x", "m1", "m2", 1.0), ("x", "m3", "m4", 1.0), ("y", "m1", "m3", 0.0)]
    rows = [row("", prompt, model, label) for prompt in "xy" for model, label in (("m1", 1), ("m2", 0))]
    battles, counts = load_battles(write_csv(tmp_path / "empty.csv", rows))
    assert as_rows(battles) == [("x", "m1", "m2", 1.0), ("y", "m1", "m2", 1.0)]
    assert counts["rows_dropped"] == {}


@pytest.mark.parametrize("write", [write_csv, write_lines, write_parquet])
def test_wide_scores_as_booleans_with_gaps_and_an_index(tmp_path, write):
    nan = float("nan")
    rows = [
        {"Unnamed: 0": i, "__index_level_0__": i, "prompt": f"p{i}", "org/m.1": i % 2 == 0, "m2": i % 3 == 0, "m3": nan}
        for i in range(5000)
    ]
    rows[4999]["m3"] = 0.5  # the only score of m3, in another chunk than the first
    battles, counts = load_battles(write(tmp_path / "table", rows))
    assert counts["score_columns"] == ["m2", "m3", "org/m.1"]
    assert counts["scores_missing"] == 4999
    assert counts["battles"] == 4999 + 3
    assert as_rows(battles)[:4] == [(f"p{i}", "org/m.1", "m2", y) for i, y in enumerate((0.5, 0.5, 1.0, 0.0))]


def test_a_missing_score_does_not_exclude_its_model(tmp_path):
    rows = [
        {"prompt": f"p{i}", "a": 1, "b": 0, "c": cell} for i, cell in enumerate(["1", "NA", "", "inf", "null", "0"])
    ]
    battles, counts = load_battles(write_csv(tmp_path / "a.csv", rows))
    assert counts["score_columns"] == ["a", "b", "c"]
    assert counts["scores_missing"] == 4
    assert len(battles) == 2 * 3 + 4


def test_text_as_bytes_and_blank_lines_before_a_header(tmp_path):
    row = {"prompt": b"caf\xc3\xa9", "model_a": b"x", "model_b": b"y", "winner": b"tie"}
    assert as_rows(load_battles(write_parquet(tmp_path / "bytes.parquet", [row]))[0]) == [("caf\u00e9", "x", "y", 0.5)]
    (tmp_path / "a.csv").write_text("\n\nprompt,model_a,model_b,winner\n\nq,x,y,tie\n")
    assert as_rows(load_battles(str(tmp_path / "a.csv"))[0]) == [("q", "x", "y", 0.5)]


def test_content_nested_too_deep_is_not_text(tmp_path):
    content = "q"
    for _ in range(400):
        content = [content]
    rows = [*ARENA, arena("", "x", "y", "tie", conversation_a=[{"role": "user", "content": content}])]
    battles, counts = load_battles(write_lines(tmp_path / "deep.jsonl", rows))
    assert as_rows(battles) == ARENA_READ
    assert counts["rows_dropped"] == {"without query text": 1}


def test_a_prompt_column_of_numbers_is_not_a_model(tmp_path):
    rows = [{"prompt": 12 + i, "A": i, "B": 0} for i in range(2)]
    for number, write in enumerate((write_csv, write_lines, write_parquet)):
        battles, _ = load_battles(write(tmp_path / str(number), rows))
        assert as_rows(battles) == [("12", "A", "B", 0.5), ("13", "A", "B", 1.0)]


def test_prompts_that_are_odd_numbers(tmp_path):
    prompts = [10**400, float("nan"), float("inf"), True, 1.5]
    rows = [{"prompt": prompt, "model_a": "x", "model_b": "y", "winner": "tie"} for prompt in prompts]
    battles, counts = load_battles(write_lines(tmp_path / "a.jsonl", rows))
    assert battles.queries == [str(10**400), "1.5"]
    assert counts["rows_dropped"] == {"without query text": 3}


def test_a_column_that_starts_late_is_read(tmp_path):
    rows = [{"prompt": f"p{i}", "m1": 1, "m2": 0} for i in range(4500)] + [{"prompt": "late", "m1": 0, "m3": 1}]
    _, counts = load_battles(write_lines(tmp_path / "a.jsonl", rows))
    assert counts["score_columns"] == ["m1", "m2", "m3"]


def test_only_the_needed_columns_of_a_parquet_file_are_read(tmp_path, monkeypatch):
    requested = []
    plain = pq.ParquetFile.iter_batches

    def watched(self, *args, columns=None, **options):
        requested.append(columns)
        return plain(self, *args, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    load_battles(write_parquet(tmp_path / "a.parquet", ARENA))
    assert requested == [["conversation_a", "model_a", "model_b", "winner"]]


def test_shards_in_a_folder_and_a_glob(tmp_path):
    (tmp_path / "data" / ".cache").mkdir(parents=True)
    write_parquet(tmp_path / "data" / "a.parquet", ARENA[:2])
    write_lines(tmp_path / "data" / "b.jsonl", ARENA[2:])
    write_lines(tmp_path / "data" / ".cache" / "c.jsonl", ARENA)
    (tmp_path / "data" / "README.md").write_text("# not data")
    for path in (tmp_path / "data", tmp_path / "data" / "[ab].*"):
        battles, counts = load_battles(str(path))
        assert as_rows(battles) == ARENA_READ
        assert counts["rows_read"] == 4


def test_what_is_dropped_is_counted(tmp_path):
    rows = [
        *ARENA,
        arena("", "x", "y", "model_a"),
        arena(" \n\t", "x", "y", "model_a"),
        arena(None, "x", "y", "model_a"),
        arena("q", None, "y", "model_a"),
        arena("q", "x", " ", "model_a"),
        arena("q", "x", "x", "model_a"),
        arena("q", "x", "y", "model_c"),
        arena("q", "x", "y", None),
        arena("q", "x", "y", "model_a", conversation_a=[]),
        arena("q", "x", "y", "model_a", conversation_a=None),
    ]
    battles, counts = load_battles(write_parquet(tmp_path / "a.parquet", rows))
    assert as_rows(battles) == ARENA_READ
    assert counts["rows_dropped"] == {
        "without query text": 5,
        "without a model name": 2,
        "model against itself": 1,
        "with an unknown winner": 2,
    }
    assert counts["rows_read"] == len(rows)


def test_queries_that_differ_in_white_space_are_one_and_keep_the_first_spelling(tmp_path):
    rows = [arena(text, "x", "y", "model_a") for text in ("  for x:\n  f(x) ", "for x: f(x)", "For x: f(x)")]
    battles, _ = load_battles(write_parquet(tmp_path / "a.parquet", rows))
    assert battles.queries == ["for x:\n  f(x)", "For x: f(x)"]
    assert battles.query_idx.tolist() == [0, 0, 1]


def test_model_names_survive_unchanged(tmp_path):
    names = ["org/model-7b", "a, b", "line\nbreak", "\U0001f999 llama", " padded"]
    rows = [arena("q", name, "other", "model_a") for name in names]
    battles, _ = load_battles(write_parquet(tmp_path / "a.parquet", rows))
    assert battles.model_names == sorted([*names, "other"])


def many_battles(tmp_path, queries=200):
    rng = np.random.default_rng(0)
    rows = []
    for number in rng.permutation(np.repeat(np.arange(queries), 3)):
        winner = ["model_a", "model_b", "tie"][rng.integers(3)]
        a, b = rng.choice(["m1", "m2", "m3"], 2, replace=False)
        rows.append({"prompt": f"query {' ' * rng.integers(3)} {number}", "model_a": a, "model_b": b, "winner": winner})
    return load_battles(write_lines(tmp_path / "many.jsonl", rows))[0]


def query_sets(split):
    return {name: {part.queries[i] for i in part.query_idx} for name, part in vars(split).items()}


@pytest.mark.parametrize("seed", range(5))
def test_the_split_never_shares_a_query(tmp_path, seed):
    battles = many_battles(tmp_path)
    split, counts = split_battles(battles, seed, ties="half")
    train, val, test = query_sets(split).values()
    assert not (train & val or train & test or val & test)
    assert len(train) == 160
    assert counts["test_queries_in_train"] == 0
    assert counts["split"]["train"]["battles"] == 480
    everything = len(split.train) + len(split.val) + len(split.test) + counts["ties_left_out"]
    assert everything == len(battles) == 600


def test_the_split_depends_on_its_seed_and_not_on_ties(tmp_path):
    battles = many_battles(tmp_path)
    drop, counts = split_battles(battles, 0, ties="drop")
    half, _ = split_battles(battles, 0, ties="half")
    assert as_rows(drop.test) == as_rows(half.test)
    assert as_rows(drop.val) == as_rows(half.val)
    assert set(drop.train.outcome) == {0, 1}
    assert set(half.train.outcome) == {0, 0.5, 1}
    assert len(half.train) > len(drop.train)
    assert counts["ties_left_out"] == int((battles.outcome == 0.5).sum())
    assert as_rows(split_battles(battles, 1)[0].test) != as_rows(drop.test)


def test_a_split_by_battle_leaks_and_counts_it(tmp_path):
    split, counts = split_battles(many_battles(tmp_path), 0, by="battle")
    queries = query_sets(split)
    leaked = len(queries["train"] & queries["test"])
    assert counts["test_queries_in_train"] == leaked > 10


def test_models_that_training_never_saw_are_left_out_and_counted(tmp_path):
    battles = many_battles(tmp_path)
    held_out = split_battles(battles, 0)[0].test
    rare = as_rows(held_out)[0]
    rows = [
        {"prompt": q, "model_a": a if (q, a) != rare[:2] else "rare", "model_b": b, "winner": "model_a"}
        for q, a, b, _ in as_rows(battles)
    ]
    renamed, _ = load_battles(write_lines(tmp_path / "rare.jsonl", rows))
    split, counts = split_battles(renamed, 0)
    assert "rare" in renamed.model_names
    assert split.train.model_names == split.test.model_names == ["m1", "m2", "m3"]
    assert counts["unseen_model_battles"] == sum("rare" in row for row in as_rows(renamed)) > 0
    kept = {row for row in as_rows(renamed) if "rare" not in row}
    assert {row for part in vars(split).values() for row in as_rows(part)} == kept


def test_battles_keep_their_score_table(tmp_path):
    rows = [
        {"prompt": "p", "b": 0.5, "a": 1.0, "c": None},
        {"prompt": "q", "b": 0.25, "a": 0.25, "c": 0.25},
        {"prompt": "p", "b": 0.0, "a": None, "c": None},  # one score makes no battle, and so no row
        {"prompt": "p", "b": 0.0, "a": 0.125, "c": 1.0},
    ]
    battles, _ = load_battles(write_parquet(tmp_path / "t.parquet", rows))
    assert battles.model_names == ["a", "b", "c"]
    assert [battles.queries[i] for i in battles.table.query_idx] == ["p", "q", "p"]
    expected = [[1.0, 0.5, np.nan], [0.25, 0.25, 0.25], [0.125, 0.0, 1.0]]
    np.testing.assert_array_equal(battles.table.scores, expected)
    assert load_battles(write_parquet(tmp_path / "b.parquet", ARENA))[0].table is None


def long_table(tmp_path, queries=100, models=6, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        {"prompt": f"p{i}", "model_name": f"m{j}", "score": float(rng.integers(3))}
        for i in range(queries)
        for j in range(models)
    ]
    return load_battles(write_parquet(tmp_path / "long.parquet", rows))[0]


def test_table_rows_follow_their_queries_and_rows_without_a_difference_are_left_out(tmp_path):
    battles = long_table(tmp_path, models=3)
    split, counts = split_battles(battles, 3)
    text_of_row = [battles.queries[i] for i in battles.table.query_idx]
    scores = dict(zip(text_of_row, battles.table.scores, strict=True))
    sides = {name: [part.queries[i] for i in part.table.query_idx] for name, part in vars(split).items()}
    differing = {text for text, row in scores.items() if len(set(row)) > 1}
    assert set().union(*sides.values()) == differing
    assert sum(map(len, sides.values())) == len(differing) < 100
    assert counts["table_rows"] == {name: len(texts) for name, texts in sides.items()} | {
        "without_a_difference": 100 - len(differing)
    }
    for name, part in vars(split).items():
        assert set(sides[name]) == {part.queries[i] for i in part.query_idx}
        np.testing.assert_array_equal(part.table.scores, [scores[text] for text in sides[name]])
        for query, a, b, y in zip(part.query_idx, part.model_a_idx, part.model_b_idx, part.outcome, strict=True):
            row = scores[part.queries[query]]
            assert y == (row[a] > row[b])
    leaky, counts = split_battles(battles, 3, by="battle")
    assert counts["table_rows"] is leaky.test.table is None


def test_models_that_training_never_saw_are_left_out_of_the_table(tmp_path):
    rows = [{"prompt": f"p{i}", "a": i % 2, "b": 1 - i % 2, "c": None} for i in range(40)]
    battles, _ = load_battles(write_parquet(tmp_path / "t.parquet", rows))
    split, _ = split_battles(battles, 0)
    test_text = split.test.queries[split.test.query_idx[0]]
    rows[int(test_text[1:])] = {"prompt": test_text, "a": 1, "b": 1, "c": 0}  # they differ by c alone
    battles, _ = load_battles(write_parquet(tmp_path / "t.parquet", rows))
    split, counts = split_battles(battles, 0)
    assert split.train.model_names == ["a", "b"]
    assert test_text not in split.test.queries
    assert split.test.table.scores.shape == (3, 2)
    assert counts["table_rows"]["without_a_difference"] == 1


@pytest.mark.parametrize("ties", ["drop", "half"])
def test_pairs_per_query_are_drawn_and_change_only_training(tmp_path, ties):
    battles = long_table(tmp_path)
    (full, _), (drawn, counts) = (split_battles(battles, 5, ties=ties, pairs_per_query=most) for most in (None, 4))
    everything, some = as_rows(full.train), as_rows(drawn.train)
    assert set(some) <= set(everything)
    per_query = {text: sum(row[0] == text for row in everything) for text, *_ in everything}
    assert len(some) == sum(min(4, count) for count in per_query.values())
    assert all(sum(row[0] == text for row in some) == min(4, count) for text, count in per_query.items())
    assert counts["training_battles_not_drawn"] == len(everything) - len(some) > 0
    for side in ("val", "test"):
        assert as_rows(getattr(full, side)) == as_rows(getattr(drawn, side))
    for side in ("train", "val", "test"):
        np.testing.assert_array_equal(getattr(full, side).table.scores, getattr(drawn, side).table.scores)
    assert as_rows(split_battles(battles, 5, ties=ties, pairs_per_query=4)[0].train) == some
    pairs = {(a, b) for _, a, b, _ in some}
    assert len(pairs) == 15  # a draw, and not the first pairs of each query
    assert split_battles(battles, 5, pairs_per_query=99)[1]["training_battles_not_drawn"] == 0


@pytest.mark.parametrize("rows", [[{"prompt": "p", "a": 1, "b": 1}] * 30, [{"prompt": "p", "a": 1, "b": 0}]])
def test_a_table_without_differences_leaves_a_side_empty(tmp_path, rows):
    battles, _ = load_battles(write_parquet(tmp_path / "t.parquet", rows))
    with pytest.raises(UserError, match="leaves no battle for"):
        split_battles(battles, 0)


def test_a_table_without_rows_in_both_training_and_test_is_not_used(tmp_path):
    write_parquet(tmp_path / "battles.parquet", [arena(f"q{i}", "a", "b", "model_a") for i in range(50)])
    write_parquet(tmp_path / "table.parquet", [{"prompt": f"q{i}", "a": 1, "b": 0} for i in range(2)])
    battles, _ = load_battles(str(tmp_path))
    outcomes = set()
    for seed in range(60):
        split, counts = split_battles(battles, seed)
        rows = counts["table_rows"]
        used = rows["train"] > 0 < rows["test"]
        outcomes.add(used)
        assert all((part.table is not None) == used for part in vars(split).values())
        assert rows["train"] + rows["val"] + rows["test"] == 2
    assert outcomes == {True, False}


def test_rows_with_a_missing_score_are_kept(tmp_path):
    rows = [{"prompt": f"p{i}", "a": i % 2, "b": 0.5, "c": None if i % 3 else 1} for i in range(30)]
    counts = split_battles(load_battles(write_parquet(tmp_path / "t.parquet", rows))[0], 0)[1]
    assert sum(counts["table_rows"].values()) == 30
    assert counts["table_rows"]["without_a_difference"] == 0


def test_limit_leaves_out_the_rows_of_its_queries(tmp_path):
    rows = [{"prompt": f"p{i}", "a": 1, "b": 0} for i in range(30)]
    battles, _ = load_battles(write_parquet(tmp_path / "t.parquet", rows), limit=7)
    assert sorted(battles.table.query_idx) == sorted(battles.query_idx)
    assert len(battles.table.scores) == 7


def test_a_model_that_only_ties_in_training_is_not_seen_where_ties_are_dropped(tmp_path):
    rows = [arena(f"q{i}", "a", "b", "model_a") for i in range(40)] + [
        arena(f"q{i}", "a", "c", "tie") for i in range(40)
    ]
    battles, _ = load_battles(write_parquet(tmp_path / "b.parquet", rows))
    assert split_battles(battles, 0)[0].train.model_names == ["a", "b"]
    assert split_battles(battles, 0, ties="half")[0].train.model_names == ["a", "b", "c"]


def test_scores_too_large_to_sum_are_missing(tmp_path):
    rows = [{"prompt": f"p{i}", "a": 1e308, "b": 0.5, "c": -0.5} for i in range(3)]
    battles, counts = load_battles(write_parquet(tmp_path / "t.parquet", rows))
    assert (battles.model_names, counts["scores_missing"]) == (["b", "c"], 3)


def test_margins_read_the_scores_of_the_unique_queries(tmp_path):
    battles = long_table(tmp_path, queries=5).select(np.array([70, 3, 71, 40, 3]))
    queries, row = battles.unique_queries, battles.query_rows
    scores = np.random.default_rng(0).normal(size=(len(queries), 6))
    for d, query, a, b in zip(
        battles.margins(scores), battles.query_idx, battles.model_a_idx, battles.model_b_idx, strict=True
    ):
        place = list(queries).index(query)
        assert d == scores[place, a] - scores[place, b]
    np.testing.assert_array_equal(battles.margins(scores[:1]), battles.margins(scores[:1].repeat(len(queries), 0)))
    assert list(queries[row]) == list(battles.query_idx)


def test_concatenated_selections_are_the_selection_of_both(tmp_path):
    battles = long_table(tmp_path, queries=5)
    both = battles.select(np.array([7, 3])).concatenate(battles.select(np.array([3, 40])))
    assert as_rows(both) == [as_rows(battles)[i] for i in (7, 3, 3, 40)]
    assert both.unique_queries.tolist() == sorted(set(battles.query_idx[[7, 3, 40]]))


def test_limit_keeps_a_seeded_subset_of_the_queries(tmp_path):
    battles = many_battles(tmp_path)
    path = str(tmp_path / "many.jsonl")
    some, counts = load_battles(path, limit=50, seed=3)
    assert counts["queries"] == len(set(some.query_idx)) == 50
    assert counts["queries_outside_limit"] == 150
    assert counts["battles"] == len(some) == 150  # all three battles of each
    assert set(as_rows(some)) <= set(as_rows(battles))
    assert as_rows(some) == as_rows(load_battles(path, limit=50, seed=3)[0])
    assert as_rows(some) != as_rows(load_battles(path, limit=50, seed=4)[0])


def broken(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.parquet", b"", "it is empty"),
        ("cut.parquet", b"PAR1 and then something else", "cannot read"),
        ("photo.csv", b"\x89PNG\r\n\x1a\n\0\0", "binary data"),
        ("cut.csv.gz", gzip.compress(b"prompt,model_a\n" * 999)[:-20], "cannot read"),
        ("latin.csv", "prompt,model_a,model_b,winner\ncaf\xe9,x,y,model_a\n".encode("latin-1"), "utf-8"),
        ("open.csv", b'prompt,model_a,model_b,winner\n"never closed,x,y,model_a\n', "cannot read"),
        ("ragged.csv", b"prompt,model_a,model_b,winner\nq,x,y,model_a,more\n", "line 2 has 5 cells, the header 4"),
        (
            "header.csv",
            b"prompt,model_a,model_b,winner\n",
            "it has the columns prompt, model_a, model_b, winner and no row",
        ),
        ("twice.csv", b"prompt,prompt\na,b\n", "several columns are named prompt"),
        ("cut.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("list.jsonl", b"[1, 2]", "record 1 is '1', expected a JSON object"),
        ("deep.json", b"[" * 100000, "cannot read"),
        ("other.csv", b"name,age\nx,3\n", "has the columns age, name; expected model_a"),
        ("no_winner.csv", b"prompt,model_a,model_b\nq,x,y\n", "has the columns model_a, model_b, prompt; expected"),
        (
            "one.csv",
            b"prompt,model_a,model_b,winner\nq,x,x,model_a\n",
            "against itself; expected battles between at least two",
        ),
        ("none.csv", b"prompt,model_a,model_b,winner\nq,x,y,?\n,x,y,tie\n", "no usable battle"),
    ],
)
def test_broken_files_are_one_clear_error(tmp_path, name, content, message):
    with pytest.raises(UserError) as error:
        load_battles(broken(tmp_path, name, content))
    assert message in str(error.value)


def test_no_usable_battle_reports_the_counts_by_reason(tmp_path):
    file = broken(tmp_path, "a.csv", b"prompt,model_a,model_b,winner\nq,x,y,?\n,x,y,tie\n,x,y,tie\n")
    with pytest.raises(UserError, match="3 rows read, rows dropped: 1 with an unknown winner, 2 without query text"):
        load_battles(file)


@pytest.mark.parametrize("path", ["x" * 5000, "~nosuchuser/x", "nul\0byte", "/dev/null", ""])
def test_paths_without_files(path):
    with pytest.raises(UserError, match="no data at"):
        load_battles(path)


def test_a_name_with_a_comma_is_quoted_as_in_csv():
    assert comma_separated("a, b") == ["a", "b"]
    assert comma_separated('"b, c",a,"say ""hi"""') == ["b, c", "a", 'say "hi"']
    for text in ("", ",", "a,,b"):
        with pytest.raises(argparse.ArgumentTypeError, match="names separated by commas"):
            comma_separated(text)


def test_a_folder_without_data_and_missing_score_columns(tmp_path):
    with pytest.raises(UserError, match="no data at"):
        load_battles(str(tmp_path))
    with pytest.raises(UserError, match="has no column gpt-5; found"):
        load_battles(write_parquet(tmp_path / "a.parquet", ARENA), score_columns=["gpt-5"])


def test_a_split_with_an_empty_side_is_an_error(tmp_path):
    ties = [arena(f"q{i}", "x", "y", "tie") for i in range(30)]
    battles, _ = load_battles(write_parquet(tmp_path / "a.parquet", ties))
    with pytest.raises(UserError, match="no battle for test, train, val: found 30 battles, 30 of them ties"):
        split_battles(battles, 0)


@pytest.mark.parametrize("pairs_per_query", [None, 1])
def test_holding_out_a_model_removes_its_battles_and_nothing_else(demo, pairs_per_query):
    battles, _ = load_battles(str(demo / "battles.parquet"))
    full, _ = split_battles(battles, 42, pairs_per_query=pairs_per_query)
    split, counts = split_battles(battles, 42, pairs_per_query=pairs_per_query, hold_out="demo-model-c")
    assert split.train.model_names == [name for name in full.train.model_names if name != "demo-model-c"]

    def named(side, but=None):
        names = [side.model_names[i] for i in (*side.model_a_idx, *side.model_b_idx)]
        pairs = zip(side.query_idx, names[: len(side)], names[len(side) :], side.outcome, strict=True)
        return [(side.queries[query], a, b, float(y)) for query, a, b, y in pairs if but not in (a, b)]

    for name, side in vars(split).items():
        assert named(side) == named(getattr(full, name), but="demo-model-c")
    assert counts["training_battles_held_out"] == len(full.train) - len(split.train) > 100
    with pytest.raises(UserError, match="no model is named 'gpt-4'; found demo-model-a"):
        split_battles(battles, 42, hold_out="gpt-4")


def test_the_id_of_a_query_ignores_white_space():
    one, same, other = query_ids(["a  b\n c", "a b c", "a b d"])
    assert one == same != other
    assert query_ids([]).shape == (0,)
