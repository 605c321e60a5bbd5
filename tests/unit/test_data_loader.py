"""Every native form of the data with what it comes to, the split, and files that are broken."""

import csv
import gzip
import io
import json
import math
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import mixed_battles

from data_loader import load_battles, query_ids, shuffled, split_battles
from support.data.layouts import Layout
from support.data.rows import Rows
from support.system.errors import UserError


def as_csv(rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows):
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), content)
    return content.getvalue()


WRITERS = {
    ".csv": as_csv,
    ".csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    ".parquet": as_parquet,
}


def write(path, content):
    """Write rows (dicts) in the format that the suffix of `path` names, or bytes as they are; returns the path."""
    if not isinstance(content, bytes):
        content = next(writer for suffix, writer in WRITERS.items() if path.name.endswith(suffix))(content)
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content)
    return str(path)


def as_rows(battles):
    """Battles as readable tuples: query, model a, model b, outcome."""
    names, queries = battles.model_names, [battles.queries[i] for i in battles.unique_queries]
    rows = (row for pairs in battles.chunks() for row in zip(*pairs, strict=True))
    return [(queries[q], names[a], names[b], float(y)) for q, a, b, y in rows]


def sides_of(split):
    return {name: getattr(split, name) for name in ("train", "val", "test")}


def unordered(rows):
    """Tuples of `as_rows` in an order, and with an order of the two models, that do not depend on the file's."""
    return sorted((q, a, b, y) if a < b else (q, b, a, 1 - y) for q, a, b, y in rows)


def turns(query, *parts):
    """A conversation of Arena 33K; with parts, the list of parts that Arena 140K has as content."""
    content = [{"type": "text", "text": part, "image": None} for part in parts] if parts else query
    answer = [{"type": "text", "text": "an answer", "image": None}] if parts else "an answer"
    return [{"content": content, "role": "user"}, {"content": answer, "role": "assistant"}]


def arena(query, a, b, winner, **more):
    unused = {"question_id": "q1", "judge": "arena_user_1", "turn": 1, "anony": True, "language": "English"}
    battle = {"model_a": a, "model_b": b, "winner": winner, "conversation_a": turns(query)}
    return unused | {"tstamp": 1682351591.0, "conversation_b": turns(query)} | battle | more


def arena_140k(conversation, winner):
    return {"id": "1", "model_a": "x", "model_b": "y", "winner": winner, "conversation_a": conversation}


def kaggle(prompt, *one_hot):
    flags = dict(zip(("winner_model_a", "winner_model_b", "winner_tie"), one_hot, strict=True))
    models = {"model_a": "gpt-4", "model_b": "claude-1"}
    return {"id": 1, **models, "prompt": prompt, "response_a": "[]", "response_b": "[]"} | flags


def routerbench(prompt, gpt, claude, mixtral):
    scores = {"gpt-4": gpt, "claude-2": claude, "mixtral": mixtral}
    more = {f"{name}|model_response": "text" for name in scores} | {f"{name}|total_cost": 0.1 for name in scores}
    return {"sample_id": "a", "prompt": prompt, "eval_name": "mmlu"} | scores | more | {"oracle": "gpt-4"}


def embedllm(prompt_id, prompt, model, label):
    head = {"prompt_id": prompt_id, "model_id": 4, "category_id": 1, "label": label}
    return head | {"prompt": prompt, "model_name": model, "category": "mmlu"}


def nested(content, depth):
    return nested([content], depth - 1) if depth else content


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
SYSTEM = [{"role": "system", "content": [{"type": "text", "text": "be brief", "image": None}]}]
KAGGLE = [
    kaggle('["first\\nturn", "second"]', 1, 0, 0),
    kaggle('["NA"]', 0, 1, 0),
    kaggle("null", 0, 0, 1),
    kaggle("[not a list", 0, 0, 1),
    kaggle('[null, "x"]', 0, 0, 1),
    kaggle('["broken \\ud83d emoji"]', 0, 1, 0),
    kaggle('["nobody"]', 0, 0, 0),
    kaggle('["both"]', 1, 1, 0),
]
KAGGLE_READ = [
    (query, "gpt-4", "claude-1", outcome)
    for query, outcome in (
        ("first\nturn", 1),
        ("NA", 0),
        ("null", 0.5),
        ("[not a list", 0.5),
        ("broken \ufffd emoji", 0),
    )
]
KAGGLE_DROPPED = {"without query text": 1, "with an unknown winner": 2}
ROUTERBENCH = [
    routerbench("p1", 1.0, 0.25, 1.0),
    routerbench("p2", 0.0, None, 0.5),
    routerbench("p3", None, 0.5, None),
    routerbench(" ", 1.0, 0.0, 0.0),
]
NESTED = [
    {"question": "q1", "scores": {"org/m1": 0.9, "org/m2": 0.1, "org/m3": None}, "cluster_id": 3},
    {"question": "q2", "scores": {"org/m3": 0.5, "org/m2": 0.5}, "cluster_id": 1},
]
NESTED_AS_TEXT = [{"question": row["question"], "scores": json.dumps(row["scores"])} for row in NESTED]
NESTED_READ = [("q1", "org/m1", "org/m2", 1.0), ("q2", "org/m3", "org/m2", 0.5)]
NUMBERED = [{"prompt": 12 + i, "A": i, "B": 0} for i in range(2)]  # the prompts are numbers and no model's scores
NUMBERED_READ = [("12", "A", "B", 0.5), ("13", "A", "B", 1.0)]
NAMES = ["org/model-7b", "a, b", "line\nbreak", "\U0001f999 llama", "padded"]


def prompt_battle(prompt, winner="model_a"):
    return {"prompt": prompt, "model_a": "x", "model_b": "y", "winner": winner}


def pa_table(**columns):
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content)
    return content.getvalue()


# The outcomes of model_1, which scores 0, phi, which scores 1, and o1, by the score of the last.
THREE = [
    [("model_1", "o1", y), ("model_1", "phi-3-mini-4k", 0.0), ("o1", "phi-3-mini-4k", y_phi)]
    for y, y_phi in ((0.5, 0.0), (0.0, 0.5))
]
LONG_READ = "long: query query; of llm, effect; costs cost; not read: label, latency"
TIE = [("q, r", "x", "y", 0.5)]
# Labels of the winner that mean model a, model b and a tie, and some that mean none of them.
LABELS = {
    1.0: ["model_a", "Model_A", "MODEL A", "A", " a ", "x", "X", "left", "leftvote", "assistant_a"],
    0.0: ["model_b", "B", "y", "right vote", "model-b"],
    0.5: ["tie", "Tie", "bothbad", "both bad", "tie (both bad)", "tie (inconsistent)", "draw"],
    None: ["model_c", "", "0", "neither nor"],
}
OTHER_LABELS = [
    (
        f"winner_{number}.jsonl",
        [prompt_battle("q"), *(prompt_battle("q", label) for label in labels)],
        [("q", "x", "y", 1.0)] + [("q", "x", "y", outcome)] * (0 if outcome is None else len(labels)),
        {"with an unknown winner": len(labels)} if outcome is None else {},
        {"unknown_winners": dict.fromkeys(labels, 1) if outcome is None else {}},
    )
    for number, (outcome, labels) in enumerate(LABELS.items())
]

# Each native form: a file, whose suffix is its format, with rows or bytes; the battles that it comes to, in any order;
# the rows dropped; some more counts. A further form is a further row.
FORMS = [
    (
        "arena_33k.parquet",
        ARENA,
        ARENA_READ,
        {},
        {"layouts": ["conversations"], "rows_read": 4, "battles": 4, "ties": 2, "queries": 3, "models": 3},
    ),
    (
        "arena_33k_with_rows_that_cannot_be_used.parquet",
        [
            *ARENA,
            *(arena(text, "x", "y", "model_a") for text in ("", " \n\t", None)),
            *(arena("q", "x", "y", "model_a", conversation_a=empty) for empty in ([], None)),
            *(arena("q", *names, "model_a") for names in ((None, "y"), ("x", " "))),
            arena("q", "x", "x", "model_a"),
            *(arena("q", "x", "y", winner) for winner in ("model_c", None)),
        ],
        ARENA_READ,
        {"without query text": 5, "without a model name": 2, "model against itself": 1, "with an unknown winner": 2},
        {"rows_read": 14},
    ),
    (
        "arena_33k_with_content_nested_too_deep.jsonl",
        [*ARENA, arena("", "x", "y", "tie", conversation_a=[{"role": "user", "content": nested("q", 400)}])],
        ARENA_READ,
        {"without query text": 1},
        {},
    ),
    (
        "arena_33k_with_odd_names.parquet",  # they stay as they are, but for white space around them
        [arena("q", f" {name}", "other", "model_a") for name in NAMES],
        [("q", name, "other", 1.0) for name in NAMES],
        {},
        {"models": 6},
    ),
    (
        "arena_33k_with_white_space.parquet",  # queries that differ in it alone are one, with the first spelling
        [arena(text, "x", "y", "model_a") for text in ("  for x:\n  f(x) ", "for x: f(x)", "For x: f(x)")],
        [*[("for x:\n  f(x)", "x", "y", 1.0)] * 2, ("For x: f(x)", "x", "y", 1.0)],
        {},
        {},
    ),
    (
        "arena_140k.parquet",  # parts, and a first user turn that comes later
        [
            arena_140k(turns("", "one", "two"), "both_bad"),
            arena_140k(SYSTEM + turns("", "three"), "model_b"),
            arena_140k(turns("", ""), "model_b"),
        ],
        [("one\ntwo", "x", "y", 0.5), ("three", "x", "y", 0.0)],
        {"without query text": 1},
        {"layouts": ["conversations"]},
    ),
    ("kaggle_55k.csv", KAGGLE, KAGGLE_READ, KAGGLE_DROPPED, {"layouts": ["prompts"], "queries_repaired": 1}),
    ("kaggle_55k.csv.gz", KAGGLE, KAGGLE_READ, KAGGLE_DROPPED, {"layouts": ["prompts"], "queries_repaired": 1}),
    (
        "prompts_with_winner.jsonl",
        [{"prompt": "hi", "model_a": "x", "model_b": "y", "winner": "model_a"}],
        [("hi", "x", "y", 1.0)],
        {},
        {"layouts": ["prompts"]},
    ),
    (
        "prompts_that_are_odd_numbers.jsonl",
        [
            {"prompt": prompt, "model_a": "x", "model_b": "y", "winner": "tie"}
            for prompt in (10**400, float("nan"), float("inf"), True, 1.5)
        ],
        [(str(10**400), "x", "y", 0.5), ("1.5", "x", "y", 0.5)],
        {"without query text": 3},
        {},
    ),
    (
        "prompts_as_bytes.parquet",
        [{"prompt": b"caf\xc3\xa9", "model_a": b"x", "model_b": b"y", "winner": b"tie"}],
        [("caf\u00e9", "x", "y", 0.5)],
        {},
        {},
    ),
    ("blank_lines.csv", b"\n\nprompt,model_a,model_b,winner\n\nq,x,y,tie\n", [("q", "x", "y", 0.5)], {}, {}),
    (
        "routerbench_wide.parquet",
        ROUTERBENCH,
        [
            *(("p1", "claude-2", "mixtral", 0.0), ("p1", "gpt-4", "claude-2", 1.0), ("p1", "gpt-4", "mixtral", 0.5)),
            ("p2", "gpt-4", "mixtral", 0.0),
        ],
        {"with fewer than two scores": 1, "without query text": 1},
        {"layouts": ["wide"], "score_columns": ["claude-2", "gpt-4", "mixtral"], "scores_missing": 1},
    ),
    (
        "wide_with_cells_that_are_no_score.csv",  # these do not exclude their model
        [{"prompt": f"{c} {i}", "a": 1, "b": 0, "c": c} for i, c in enumerate(["1", "NA", "", "inf", "null", "0"])],
        [
            *((query, "a", "b", 1.0) for query in ("1 0", "NA 1", "2", "inf 3", "null 4", "0 5")),
            *(("1 0", "a", "c", 0.5), ("1 0", "b", "c", 0.0), ("0 5", "a", "c", 1.0), ("0 5", "b", "c", 0.5)),
        ],
        {},
        {"score_columns": ["a", "b", "c"], "scores_missing": 4},
    ),
    (
        "wide_with_scores_too_large_to_sum.parquet",
        [{"prompt": "p", "a": 1e308, "b": 0.5, "c": -0.5}],
        [("p", "b", "c", 1.0)],
        {},
        {"models": 2, "columns": ["wide: query prompt; models b, c; not read: a"]},
    ),
    ("wide_with_numbered_prompts.csv", NUMBERED, NUMBERED_READ, {}, {"score_columns": ["A", "B"]}),
    ("wide_with_numbered_prompts.jsonl", NUMBERED, NUMBERED_READ, {}, {"score_columns": ["A", "B"]}),
    ("wide_with_numbered_prompts.parquet", NUMBERED, NUMBERED_READ, {}, {"score_columns": ["A", "B"]}),
    ("routerdc_nested.json", NESTED, NESTED_READ, {}, {"layouts": ["nested"]}),
    ("routerdc_nested.parquet", NESTED, NESTED_READ, {}, {"layouts": ["nested"]}),
    ("routerdc_nested_as_text.csv", NESTED_AS_TEXT, NESTED_READ, {}, {"layouts": ["nested"]}),
    (
        "embedllm_long.csv",
        [
            *(embedllm(7, "p7", "m1", 1), embedllm(8, "p8", "m1", 0), embedllm(7, "p7", "m2", 0)),
            *(embedllm(8, "p8", "m2", 0), embedllm(8, "p8", "m3", 1)),
            embedllm(7, "p7", "m2", 1),  # scored before: 0.5
            embedllm(7, "p7", "m3", ""),
            embedllm(9, "p9", "m3", 1),  # alone, so no battle
        ],
        [("p7", "m1", "m2", 1.0), ("p8", "m1", "m2", 0.5), ("p8", "m1", "m3", 0.0), ("p8", "m2", "m3", 0.0)],
        {"without a score": 1, "alone with their query": 1},
        {"layouts": ["long"], "scores_averaged": 1},
    ),
    (
        "long_without_ids.csv",  # an empty one does not mix prompts
        [embedllm("", text, model, label) for text in "xy" for model, label in (("m1", 1), ("m2", 0))],
        [("x", "m1", "m2", 1.0), ("y", "m1", "m2", 1.0)],
        {},
        {},
    ),
    *OTHER_LABELS,
    (
        "alpaca_eval.json",
        [
            {"instruction": f"q{i}", "generator_1": "x", "generator_2": "y", "output_1": "a", "preference": preference}
            for i, preference in enumerate((1.0, 2, 1.5, 1.49, 1.51, None))
        ],
        [(f"q{i}", "x", "y", outcome) for i, outcome in enumerate((1, 0, 0.5, 1, 0))],
        {"with an unknown winner": 1},
        {"unknown_winners": {"None": 1}},
    ),
    (
        "search_arena.jsonl",
        [{"model_a": "x", "model_b": "y", "winner": "model_b", "messages_a": turns("hi"), "messages_b": turns("hi")}],
        [("hi", "x", "y", 0.0)],
        {},
        {"layouts": ["conversations"]},
    ),
    ("prompt_as_turns.parquet", [prompt_battle(turns("hi"))], [("hi", "x", "y", 1.0)], {}, {}),
    (
        "prompt_as_shared_turns.jsonl",
        [prompt_battle([{"from": "human", "value": "hi"}])],
        [("hi", "x", "y", 1.0)],
        {},
        {},
    ),
    (
        "prompt_as_python_lists.csv",  # as pandas writes lists and arrays
        [
            prompt_battle(text)
            for text in (
                "['one']",
                "[\"it's\", 'two']",
                "[{'role': 'user', 'content': 'three'}\n {'role': 'assistant'}]",
            )
        ],
        [(text, "x", "y", 1.0) for text in ("one", "it's", "three")],
        {},
        {},
    ),
    (
        "prompt_as_lists_that_python_would_join.csv",  # 'a' 'b' is no list of two; it stays as it is
        [prompt_battle("['a' 'b']"), prompt_battle("['a'\n 'b']")],
        [("['a' 'b']", "x", "y", 1.0)] * 2,
        {},
        {},
    ),
    (
        "arena_33k_through_pandas.csv",
        [row | {"conversation_a": str(row["conversation_a"])} for row in ARENA]
        + [ARENA[0] | {"conversation_a": "[cut"}],
        ARENA_READ,
        {"without query text": 1},
        {"layouts": ["conversations"]},
    ),
    *(
        (f"arena_33k_{orient}.json", pd.DataFrame(ARENA).to_json(orient=orient).encode(), ARENA_READ, {}, {})
        for orient in ("columns", "index", "split", "table", "records")
    ),
    ("one_object_a_file.json", json.dumps({"data": ARENA}, indent=1).encode(), ARENA_READ, {}, {}),
    *(
        (
            f"delimited_by_{name}.csv",
            f"question{d}model_a{d}model_b{d}winner\nq, r{d}x{d}y{d}tie\n".encode(),
            TIE,
            {},
            {},
        )
        for name, d in (("tabs", "\t"), ("semicolons", ";"))
    ),
    (
        "long_with_costs_and_more_numbers.csv",
        [
            {"query": "q", "llm": llm, "latency": 0.1 * i, "effect": i % 2, "label": "text", "cost": 0.01}
            for i, llm in enumerate(("m1", "m2", "m2 "))
        ],
        [("q", "m1", "m2", 0.0)],  # the mean of m2 is 0.5
        {},
        {
            "layouts": ["long"],
            "columns": ["long: query query; of llm, effect; costs cost; not read: label, latency"],
            "scores_averaged": 1,
        },
    ),
    (
        "long_with_scores_in_mappings.jsonl",
        [
            {"question": "q", "llm_selected": name, "evaluation_result": {"score": score, "inference_cost": 0.1}}
            for name, score in (("m1", 0.5), ("m2", 1))
        ],
        [("q", "m1", "m2", 0.0)],
        {},
        {"layouts": ["long"]},
    ),
    (
        "sprout_of_mappings.parquet",
        [{"key": 7, "prompt": "q", "m1": {"score": 1.0, "num_output_tokens": 3}, "m2": {"score": 0.0, "cost": 2.0}}],
        [("q", "m1", "m2", 1.0)],
        {},
        {"layouts": ["wide"], "score_columns": ["m1", "m2"]},
    ),
    *(
        (
            f"nested_{number}.jsonl",
            [{"query": "q", column: cell}],
            [("q", "m1", "m2", 1.0)],
            {},
            {"layouts": ["nested"]},
        )
        for number, (column, cell) in enumerate(
            (
                ("scores", [{"model": "m1", "score": 1}, {"model": "m2", "score": 0}]),
                ("records", {"m1": {"performance": 1, "cost": 0.1}, "m2": {"performance": 0, "cost": 0.2}}),
                ("completions", [{"model": "m1", "overall_score": 9.0}, {"model": "m2", "overall_score": "8.5"}]),
            )
        )
    ),
    (
        "one_hot_with_votes.jsonl",  # 2 to 1 is no flag
        [kaggle("q", *votes) for votes in ((1, 0, 0), (2, 1, 0), (4, 0, 1), (3, 0, 0))],
        [("q", "gpt-4", "claude-1", 1.0)],
        {"with an unknown winner": 3},
        {"unknown_winners": {"2, 1, 0": 1, "4, 0, 1": 1, "3, 0, 0": 1}},
    ),
    (
        "winner_by_names_that_are_much_alike.csv",  # and by one that is a label of the other side
        [
            {"prompt": "q", "model_a": a, "model_b": b, "winner": winner}
            for a, b, winner in (
                ("gpt-4", "gpt4", "gpt4"),
                ("gpt-4", "gpt4", "GPT 4"),
                ("b", "a", "a"),
                ("b", "a", "model_a"),
            )
        ],
        [("q", "gpt-4", "gpt4", 0.0), ("q", "b", "a", 1.0)],
        {"with an unknown winner": 2},
        {},
    ),
    (
        "winner_that_may_be_a_code.csv",  # or the id of a model
        [{"prompt": "q", "model_a": "0", "model_b": "1", "winner": winner} for winner in ("1", "model_a")],
        [("q", "0", "1", 1.0)],
        {"with an unknown winner": 1},
        {},
    ),
    (
        "ids_with_gaps.parquet",  # which pandas writes as 1.0
        [{"prompt": "q", "model_id": i, "score": i} for i in (1.0, 2.0, None)],
        [("q", "1", "2", 0.0)],
        {"without a model name": 1},
        {},
    ),
    (
        "records_of_one_query.json",  # and not of one model
        b'{"query": "q", "score": 1, "records": [{"model": "a", "correct": 1}, {"model": "b", "correct": 0}]}',
        [("q", "a", "b", 1.0)],
        {},
        {"layouts": ["nested"]},
    ),
    (
        "question_beside_a_numbered_prompt.csv",
        [prompt_battle("17") | {"question": "q"}],
        [("q", "x", "y", 1.0)],
        {},
        {"columns": ["prompts: query question; of model_a, model_b, winner; not read: prompt"]},
    ),
    (
        "long_with_a_gold_label.csv",
        [
            {"prompt": "q", "model": m, "label": 3, "accuracy": i, "cost": c}
            for m, i, c in (("a", 1, "$2"), ("b", 0, "0.5"), ("c", 0, "?"))
        ],
        [("q", "a", "b", 1.0), ("q", "a", "c", 1.0), ("q", "b", "c", 0.5)],
        {},
        {"costs_missing": 1},
    ),
    (
        "dictionary_of_bytes.parquet",
        pa_table(prompt=["q"], model_a=pa.array([b"x"]).dictionary_encode(), model_b=["y"], winner=[b"A"]),
        [("q", "x", "y", 1.0)],
        {},
        {},
    ),
    (
        "wide_with_names_like_counters.csv",  # o1 and model_1 are models; the ids all differ, the answer is gold
        [
            {
                "prompt": f"p{i}",
                "o1": i % 2,
                "model_1": 0,
                "phi-3-mini-4k": 1,
                "gpt-4-cost": 0.5,
                "cost.gpt": 0.1,
                "ppl_gpt": 1,
            }
            | {"answer": i % 4, "latency_s": 0.4, "is_code": 0, "average": 0.5, "score_gpt": 1}
            for i in range(8)
        ],
        [(f"p{i}", a, b, y) for i in range(8) for a, b, y in THREE[i % 2]],
        {},
        {"score_columns": ["model_1", "o1", "phi-3-mini-4k"]},
    ),
    (
        "wide_with_a_text_among_the_scores.csv",
        [{"prompt": f"p{i}", "m1": i % 2, "m2": score} for i, score in enumerate(("0", "timeout", "3", " - ", "1"))],
        [("p0", "m1", "m2", 0.5), ("p2", "m1", "m2", 0.0), ("p4", "m1", "m2", 0.0)],
        {"with fewer than two scores": 2},
        {"score_columns": ["m1", "m2"], "scores_not_numbers": {"timeout": 1, "-": 1}},
    ),
    (
        "wide_with_numbers_that_are_no_scores.csv",
        [
            {
                "prompt": f"p{i}",
                "m1": i % 2,
                "m2": 0,
                "m1_cost": 0.1,
                "n_tokens": 5,
                "latency": 3.5,
            }
            for i in range(4)
        ],
        [(f"p{i}", "m1", "m2", 0.5 + i % 2 / 2) for i in range(4)],
        {},
        {
            "score_columns": ["m1", "m2"],
            "columns": ["wide: query prompt; models m1, m2; costs m1_cost; not read: latency, n_tokens"],
        },
    ),
]


def test_each_native_form_comes_to_its_battles_and_counts(tmp_path):
    for file, content, expected, dropped, more in FORMS:
        battles, counts = load_battles(write(tmp_path / file, content))
        assert unordered(as_rows(battles)) == unordered(expected), file
        assert battles.model_names == sorted({name for _, a, b, _ in expected for name in (a, b)}), file
        assert counts["rows_dropped"] == dropped, file
        assert {name: counts[name] for name in more} == more, file
        assert counts["queries"] == len({query for query, *_ in expected}), file


def test_battles_keep_the_order_of_the_file_and_its_model_a(tmp_path):
    assert as_rows(load_battles(write(tmp_path / "a.parquet", ARENA))[0]) == ARENA_READ


def test_named_score_columns_are_the_models(tmp_path):
    path = write(tmp_path / "wide.parquet", ROUTERBENCH)
    battles, _ = load_battles(path, score_columns=["gpt-4", "mixtral"])
    assert battles.model_names == ["gpt-4", "mixtral"]
    assert as_rows(battles) == [("p1", "gpt-4", "mixtral", 0.5), ("p2", "gpt-4", "mixtral", 0.0)]
    with pytest.raises(UserError, match="has no column gpt-5; found"):
        load_battles(path, score_columns=["gpt-5"])


def test_prompt_ids_that_repeat_do_not_mix_prompts(tmp_path):
    write(tmp_path / "a.csv", [embedllm(0, "x", "m1", 1), embedllm(0, "x", "m2", 0)])
    write(tmp_path / "b.csv", [embedllm(0, "y", "m1", 0), embedllm(0, "y", "m3", 1)])
    assert as_rows(load_battles(str(tmp_path))[0]) == [("x", "m1", "m2", 1.0), ("y", "m1", "m3", 0.0)]
    # A wide table among the shards: its rows are groups of their own, whatever an id may be called.
    write(tmp_path / "0.csv", [{"prompt": "x", "m1": 1, "m2": 0}])
    write(tmp_path / "a.csv", [embedllm("row", "x", "m3", 1), embedllm("row", "x", "m4", 0)])
    battles, _ = load_battles(str(tmp_path))
    assert as_rows(battles) == [("x", "m1", "m2", 1.0), ("x", "m3", "m4", 1.0), ("y", "m1", "m3", 0.0)]


def test_a_file_per_model_has_its_model_in_a_field_or_in_its_name(tmp_path):
    for model, score in (("m1", 1), ("m2", 0)):
        records = [{"prompt": "q", "score": score, "cost": 0.1}]
        write(tmp_path / f"{model}.jsonl", records)
        result = {"performance": 0.5, "model_name": model, "records": [*records, {"prompt": "p", "score": 0}]}
        write(tmp_path / "fields" / f"results_{score}.json", json.dumps(result, indent=1).encode())
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("# data")
    fields, _ = load_battles(str(tmp_path / "fields"))
    assert unordered(as_rows(fields)) == [("p", "m1", "m2", 0.5), ("q", "m1", "m2", 1.0)]
    shutil.rmtree(tmp_path / "fields")
    battles, counts = load_battles(str(tmp_path))
    assert as_rows(battles) == [("q", "m1", "m2", 1.0)]
    described = "long: query prompt; of score; costs cost; model, by the file's name, {}"
    assert counts["columns"] == [described.format(model) for model in ("m1", "m2")]
    assert [path.split("/")[-1] for path in counts["files_skipped"]] == ["README.md", "dataset_infos.json"]


def test_names_of_files_are_those_of_models_only_where_nothing_speaks_against_it(tmp_path):
    row = {"prompt": "q", "score": 1}
    for model in ("Qwen2.5-7B", "Qwen2.5-72B", "claude-3.5", "claude-3.7"):
        write(tmp_path / "dots" / f"{model}.jsonl", [row])
    battles, _ = load_battles(str(tmp_path / "dots"))
    assert battles.model_names == ["Qwen2.5-72B", "Qwen2.5-7B", "claude-3.5", "claude-3.7"]
    for names, found in (
        (("train-00000-of-00002.csv", "train-00001-of-00002.csv"), "names such as train-00000-of-00002"),
        (("gpt.csv", "average.csv"), "names such as average"),
        (("gpt/mmlu.csv", "llama/mmlu.csv"), "several folders"),
    ):
        folder = tmp_path / found.replace(" ", "_")
        folder.mkdir()
        for name in names:
            write(folder / name, [row])
        with pytest.raises(UserError, match=f"no column of the model, and 2 files with {found}, so not one per model"):
            load_battles(str(folder))
    write(tmp_path / "two" / "a.csv", [row])
    write(tmp_path / "two" / "b.csv", [{"prompt": "q", "correct": 1}])
    with pytest.raises(UserError, match=r"a.csv has score by prompt, .*b.csv has correct by prompt; expected the same"):
        load_battles(str(tmp_path / "two"))
    write(tmp_path / "means" / "a.json", b'{"model": "a", "score": 0.9, "records": [{"prompt": "q", "correct": 0}]}')
    write(tmp_path / "means" / "b.json", b'{"model": "b", "score": 0.1, "records": [{"prompt": "q", "correct": 1}]}')
    assert as_rows(load_battles(str(tmp_path / "means"))[0]) == [("q", "a", "b", 0.0)]


def test_the_models_of_a_wide_table_are_those_of_all_its_shards_together(tmp_path):
    for shard, scores in enumerate(
        ((0, 1, 2, 3), (3, 3, 3, 3), (2, 1, 0, 2))
    ):  # the first rises, the second is constant
        rows = [{"prompt": f"q{shard}{i}", "m1": s, "m2": 1, "label": 0, "m3": 3 - s} for i, s in enumerate(scores)]
        write(tmp_path / f"s{shard}.csv", rows)
    battles, counts = load_battles(str(tmp_path))
    assert (len(battles), counts["score_columns"]) == (36, ["m1", "m2", "m3"])


def test_scores_of_several_metrics_are_noted(tmp_path):
    rows = [{"prompt": f"q{i}", "model": m, "score": s * i} for i in range(1, 4) for m, s in (("a", 0.3), ("b", 20))]
    _, counts = load_battles(write(tmp_path / "long.csv", rows))
    assert counts["scores_odd"] == "scores on several scales, a up to 0.9 and b up to 60"


def test_costs_are_kept_beside_the_scores_and_repeated_scores_are_means(tmp_path):
    rows = [("q", "m1", 1, 0.5), ("q", "m2", 0.7, 2), ("q", "m2", 0.1, 4), ("q", "m2", 0.3, 3)]
    rows.append(("q", "m3", math.fsum((0.7, 0.1, 0.3)) / 3, -1))  # a plain sum depends on the order
    for order in (rows, rows[::-1]):
        table = pd.DataFrame(order, columns=["prompt", "model", "score", "cost"])
        battles, _ = load_battles(write(tmp_path / "long.csv", table.to_dict("records")))
        np.testing.assert_allclose(battles.table.scores, table.groupby("model")["score"].mean().to_numpy()[None])
        np.testing.assert_array_equal(battles.table.costs, [[0.5, 3, np.nan]])  # none below 0
        assert ("q", "m2", "m3", 0.5) in unordered(as_rows(battles))


def test_equal_scores_of_a_model_each_count_in_its_mean():
    rows, high = Rows(), 0.75  # the same object twice
    chunk = {"prompt": ["q"] * 4, "model": ["a", "a", "a", "b"], "score": [high, high, 0.0, 0.5]}
    rows.add(chunk, Layout("long", "prompt", ("model", "score")))
    _, scores, *_ = rows.table_read()
    assert (scores.tolist(), rows.counts()["scores_averaged"]) == ([[0.5, 0.5]], 2)


def test_an_official_split_is_kept_and_validation_drawn_from_training_where_it_lacks(tmp_path):
    sides = ["train"] * 60 + ["Test"] * 20 + ["dev"] * 10 + ["unknown"]
    rows = [prompt_battle(f"q{i}", "AB"[i % 2]) | {"part": side} for i, side in enumerate(sides)]
    battles, counts = load_battles(write(tmp_path / "a.csv", rows), split_column="part")
    assert counts["rows_dropped"] == {"on an unknown side of the split": 1}
    split, _ = split_battles(battles, 0)
    assert [len(side) for side in sides_of(split).values()] == [60, 10, 20]
    assert {split.test.queries[i] for i in split.test.unique_queries} == {f"q{i}" for i in range(60, 80)}
    without = [row for row in rows if row["part"] != "dev"]
    leaking = [*without, prompt_battle("q0") | {"part": "test"}]
    battles, _ = load_battles(write(tmp_path / "b.csv", leaking), split_column="part")
    split, counts = split_battles(battles, 0)
    assert [len(side) for side in sides_of(split).values()] == [53, 7, 21]
    in_val = any(split.val.queries[i] == "q0" for i in split.val.unique_queries)
    assert counts["test_queries_in_train"] == 1 - in_val
    table = [{"prompt": f"q{i}", "m1": i % 2, "m2": i % 3, "split": side} for i, side in enumerate(sides[:90])]
    battles, _ = load_battles(write(tmp_path / "wide.csv", table), split_column="split")
    rows_of_test = split_battles(battles, 0)[0].test.table
    assert {battles.queries[0][:1], len(rows_of_test.scores)} == {"q", sum(i % 2 != i % 3 for i in range(60, 80))}


def test_a_named_column_is_that_of_the_query(tmp_path):
    rows = [prompt_battle("no") | {"text": "yes"}]
    assert load_battles(write(tmp_path / "a.csv", rows), query_column="text")[0].queries == ["yes"]
    with pytest.raises(UserError, match="has no column texts; found model_a, model_b, prompt, text, winner"):
        load_battles(str(tmp_path / "a.csv"), query_column="texts")


def test_wide_scores_as_booleans_with_gaps_and_an_index(tmp_path):
    nan = float("nan")
    rows = [
        {"Unnamed: 0": i, "__index_level_0__": i, "prompt": f"p{i}", "org/m.1": i % 2 == 0, "m2": i % 3 == 0, "m3": nan}
        for i in range(5000)
    ]
    rows[4999]["m3"] = 0.5  # the only score of m3, in another chunk than the first
    late = [*({name: row[name] for name in row if name != "m3"} for row in rows[:4999]), rows[4999]]  # its column, too
    for file, content in (("a.csv", rows), ("a.jsonl", rows), ("a.parquet", rows), ("late.jsonl", late)):
        battles, counts = load_battles(write(tmp_path / file, content))
        assert counts["score_columns"] == ["m2", "m3", "org/m.1"], file
        assert counts["scores_missing"] == 4999, file
        assert counts["battles"] == 4999 + 3
        assert as_rows(battles)[:4] == [(f"p{i}", "m2", "org/m.1", y) for i, y in enumerate((0.5, 0.5, 0.0, 1.0))], file


def test_only_the_needed_columns_of_a_parquet_file_are_read(tmp_path, monkeypatch):
    requested = []
    plain = pq.ParquetFile.iter_batches

    def watched(self, *args, columns=None, **options):
        requested.append(columns)
        return plain(self, *args, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    load_battles(write(tmp_path / "a.parquet", ARENA))
    assert {name for columns in requested for name in columns} == {"conversation_a", "model_a", "model_b", "winner"}


def test_shards_in_a_folder_and_a_glob(tmp_path):
    (tmp_path / "data" / ".cache").mkdir(parents=True)
    write(tmp_path / "data" / "a.parquet", ARENA[:2])
    write(tmp_path / "data" / "b.jsonl", ARENA[2:])
    write(tmp_path / "data" / ".cache" / "c.jsonl", ARENA)
    (tmp_path / "data" / "README.md").write_text("# not data")
    for path in (tmp_path / "data", tmp_path / "data" / "[ab].*"):
        battles, counts = load_battles(str(path))
        assert as_rows(battles) == ARENA_READ
        assert counts["rows_read"] == 4


def many_battles(tmp_path, queries=200):
    rng = np.random.default_rng(0)
    rows = []
    for number in rng.permutation(np.repeat(np.arange(queries), 3)):
        winner = ["model_a", "model_b", "tie"][rng.integers(3)]
        a, b = rng.choice(["m1", "m2", "m3"], 2, replace=False)
        rows.append({"prompt": f"query {' ' * rng.integers(3)} {number}", "model_a": a, "model_b": b, "winner": winner})
    return load_battles(write(tmp_path / "many.jsonl", rows))[0]


def query_sets(split):
    return {name: {part.queries[i] for i in part.unique_queries} for name, part in sides_of(split).items()}


def test_the_split_never_shares_a_query_unless_it_is_by_battle(tmp_path):
    battles = many_battles(tmp_path)
    for seed in range(5):
        split, counts = split_battles(battles, seed, ties="half")
        train, val, test = query_sets(split).values()
        assert not (train & val or train & test or val & test), seed
        assert len(train) == 160
        assert counts["test_queries_in_train"] == 0
        assert counts["split"]["train"]["battles"] == 480
        everything = len(split.train) + len(split.val) + len(split.test) + counts["ties_left_out"]
        assert everything == len(battles) == 600
    split, counts = split_battles(battles, 0, by="battle")
    queries = query_sets(split)
    assert counts["test_queries_in_train"] == len(queries["train"] & queries["test"]) > 10


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


def test_models_that_training_never_saw_are_left_out_and_counted(tmp_path):
    battles = many_battles(tmp_path)
    held_out = split_battles(battles, 0)[0].test
    rare = as_rows(held_out)[0]
    rows = [
        {"prompt": q, "model_a": a if (q, a) != rare[:2] else "rare", "model_b": b, "winner": "model_a"}
        for q, a, b, _ in as_rows(battles)
    ]
    renamed, _ = load_battles(write(tmp_path / "rare.jsonl", rows))
    split, counts = split_battles(renamed, 0)
    assert "rare" in renamed.model_names
    assert split.train.model_names == split.test.model_names == ["m1", "m2", "m3"]
    assert counts["unseen_model_battles"] == sum("rare" in row for row in as_rows(renamed)) > 0
    kept = {row for row in as_rows(renamed) if "rare" not in row}
    assert {row for part in sides_of(split).values() for row in as_rows(part)} == kept


def test_battles_keep_their_score_table(tmp_path):
    rows = [
        {"prompt": "p", "b": 0.5, "a": 1.0, "c": None},
        {"prompt": "q", "b": 0.25, "a": 0.25, "c": 0.25},
        {"prompt": "p", "b": 0.0, "a": None, "c": None},  # one score makes no battle, and so no row
        {"prompt": "p", "b": 0.0, "a": 0.125, "c": 1.0},
    ]
    battles, _ = load_battles(write(tmp_path / "t.parquet", rows))
    assert battles.model_names == ["a", "b", "c"]
    assert [battles.queries[i] for i in battles.table.query_idx] == ["p", "q", "p"]
    expected = [[1.0, 0.5, np.nan], [0.25, 0.25, 0.25], [0.125, 0.0, 1.0]]
    np.testing.assert_array_equal(battles.table.scores, expected)
    assert load_battles(write(tmp_path / "b.parquet", ARENA))[0].table is None


def long_table(tmp_path, queries=100, models=6, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        {"prompt": f"p{i}", "model_name": f"m{j}", "score": float(rng.integers(3))}
        for i in range(queries)
        for j in range(models)
    ]
    return load_battles(write(tmp_path / "long.parquet", rows))[0]


def test_table_rows_follow_their_queries_and_rows_without_a_difference_are_left_out(tmp_path):
    battles = long_table(tmp_path, models=3)
    split, counts = split_battles(battles, 3)
    text_of_row = [battles.queries[i] for i in battles.table.query_idx]
    scores = dict(zip(text_of_row, battles.table.scores, strict=True))
    sides = {name: [part.queries[i] for i in part.table.query_idx] for name, part in sides_of(split).items()}
    differing = {text for text, row in scores.items() if len(set(row)) > 1}
    assert set().union(*sides.values()) == differing
    assert sum(map(len, sides.values())) == len(differing) < 100
    assert counts["table_rows"] == {name: len(texts) for name, texts in sides.items()} | {
        "without_a_difference": 100 - len(differing)
    }
    for name, part in sides_of(split).items():
        assert set(sides[name]) == {part.queries[i] for i in part.unique_queries}
        np.testing.assert_array_equal(part.table.scores, [scores[text] for text in sides[name]])
    # A row with a missing score is kept.
    rows = [{"prompt": f"p{i}", "a": i % 2, "b": 0.5, "c": None if i % 3 else 1} for i in range(30)]
    counts = split_battles(load_battles(write(tmp_path / "t.parquet", rows))[0], 0)[1]["table_rows"]
    assert (sum(counts.values()), counts["without_a_difference"]) == (30, 0)


def test_models_that_training_never_saw_are_left_out_of_the_table(tmp_path):
    rows = [{"prompt": f"p{i}", "a": i % 2, "b": 1 - i % 2, "c": None} for i in range(40)]
    battles, _ = load_battles(write(tmp_path / "t.parquet", rows))
    split, _ = split_battles(battles, 0)
    test_text = split.test.queries[split.test.unique_queries[0]]
    rows[int(test_text[1:])] = {"prompt": test_text, "a": 1, "b": 1, "c": 0}  # they differ by c alone
    battles, _ = load_battles(write(tmp_path / "t.parquet", rows))
    split, counts = split_battles(battles, 0)
    assert split.train.model_names == ["a", "b"]
    assert test_text not in split.test.queries
    assert split.test.table.scores.shape == (3, 2)
    assert counts["table_rows"]["without_a_difference"] == 1
    assert counts["unseen_model_battles"] == 2


def test_a_row_of_a_score_table_is_on_one_side_and_its_query_too_unless_the_split_is_by_battle():
    scores = np.arange(400.0).reshape(200, 2)  # by which a row is known
    battles = mixed_battles(rows=200, models=2, single=100, queries=50)
    battles = replace(battles, table=replace(battles.table, scores=scores))
    for by in ("query", "battle"):
        split, counts = split_battles(battles, 0, by=by)
        rows = np.concatenate([part.table.scores[:, 0] for part in sides_of(split).values()])
        assert sorted(rows) == scores[:, 0].tolist(), by
        for part in sides_of(split).values():
            known = battles.table.query_idx[(part.table.scores[:, 0] / 2).astype(int)]
            assert [part.queries[i] for i in part.table.query_idx] == [battles.queries[i] for i in known], by
        assert (counts["test_queries_in_train"] > 5) == (by == "battle")


def test_rows_without_a_difference_are_kept_for_a_pointwise_loss_alone():
    battles = mixed_battles(rows=100, single=0)
    battles.table.scores[::2] = 1.0
    for ties, equal_rows, kept in (("drop", False, False), ("drop", True, True), ("half", False, True)):
        split, counts = split_battles(battles, 0, ties=ties, equal_rows=equal_rows)
        assert (~split.train.table.differs()).any() == kept, (ties, equal_rows)
        assert (~split.val.table.differs()).any() == equal_rows
        assert split.test.table.differs().all()  # the same test set with every loss
        assert counts["table_rows"]["without_a_difference"] == 50


def tasks(tmp_path):
    """A score table of three tasks, of which 40, 90 and 180 queries; one query is of two tasks, one of none."""
    names, rng = ["math"] * 40 + ["law"] * 90 + ["code"] * 180, np.random.default_rng(0)
    rows = [
        {"prompt": f"q{i}", "eval_name": name, "m1": rng.random(), "m2": rng.random()} for i, name in enumerate(names)
    ]
    rows += [
        {"prompt": "q0", "eval_name": "law", "m1": 1, "m2": 0},
        {"prompt": "new", "eval_name": "", "m1": 1, "m2": 0},
    ]
    return load_battles(write(tmp_path / "t.csv", rows))


def test_whole_tasks_are_tested_that_training_never_saw(tmp_path):
    battles, counts = tasks(tmp_path)
    assert counts["columns"] == ["wide: query prompt; models m1, m2; groups eval_name"]
    split, counts = split_battles(battles, 1, by="task", test_groups=["math"])
    names = np.array([*battles.group_names, "none"])
    groups = {side: set(names[getattr(split, side).table.group]) for side in ("train", "val", "test")}
    assert groups == {"train": {"law", "code"}, "val": {"law", "code"}, "test": {"math"}}
    # q0 is tested as a query of math, and left out of law; validation has a ninth of the queries of the others.
    assert counts["groups"] == {"test": ["math"], "train": ["code", "law"], "left_out": 2}
    train, val, test = query_sets(split).values()
    assert [len(train), len(val), len(test)] == [240, 30, 40]
    assert not test & (train | val)
    # Drawn tasks have a tenth of the queries, and at least one task is left to train on; the seed draws.
    drawn = [tuple(split_battles(battles, seed, by="task")[1]["groups"]["test"]) for seed in range(20)]
    assert set(drawn) == {("math",), ("law",), ("code",)}
    sizes = {
        name: len(split_battles(battles, 0, by="task", test_groups=[name])[0].test.unique_queries) for name in names[:3]
    }
    assert sizes == {"math": 40, "law": 91, "code": 180}
    with pytest.raises(UserError, match=r"no group is named art; found code, law, math"):
        split_battles(battles, 1, by="task", test_groups=["art"])
    with pytest.raises(UserError, match="needs two groups of queries or more"):
        split_battles(many_battles(tmp_path), 1, by="task")


def test_a_prompt_of_two_tasks_in_a_long_table_is_two_rows_where_tasks_count(tmp_path):
    rows = [
        {"prompt": "q", "model": model, "score": score, "task": task}
        for task, scores in (("math", (1, 0)), ("law", (0, 1)))
        for model, score in zip(("m1", "m2"), scores, strict=True)
    ]
    path = write(tmp_path / "t.csv", rows)
    battles, counts = load_battles(path)
    assert (len(battles.table), counts["scores_averaged"]) == (1, 2)  # a column of that name may say anything
    battles, counts = load_battles(path, groups_apart=True)
    assert (battles.table.scores.tolist(), battles.table.group.tolist()) == ([[1, 0], [0, 1]], [0, 1])


def test_battles_are_split_by_task_too(tmp_path):
    rows = [
        {"prompt": f"q{i}", "model_a": "a", "model_b": "b", "winner": "model_a", "kind": "xyz"[i % 3]}
        for i in range(60)
    ]
    path = write(tmp_path / "b.csv", rows)
    assert load_battles(path)[0].group_names == ()
    battles, _ = load_battles(path, group_column="kind")
    split, counts = split_battles(battles, 0, by="task", test_groups=["y", "z"])
    assert query_sets(split)["test"] == {f"q{i}" for i in range(60) if i % 3}
    assert counts["groups"]["train"] == ["x"]


def test_tables_with_different_models_are_one_training_set_of_groups(tmp_path):
    for name, models in (("arc", "m1 m2 m3"), ("mmlu", "m2 m3 m4"), ("other", "m5 m1")):
        rows = [
            {"prompt": f"{name} {i}"} | {model: (i + j) % 3 for j, model in enumerate(models.split())}
            for i in range(30)
        ]
        write(tmp_path / "all" / f"{name}.csv", rows)
    battles, counts = load_battles(str(tmp_path / "all"))
    assert (battles.model_names, battles.group_names) == (["m1", "m2", "m3", "m4", "m5"], ("arc", "mmlu", "other"))
    of = {
        battles.queries[query]: group for query, group in zip(battles.table.query_idx, battles.table.group, strict=True)
    }
    assert of == {f"{name} {i}": group for group, name in enumerate(battles.group_names) for i in range(30)}
    assert np.isnan(battles.table.scores).sum(0).tolist() == [30, 30, 30, 60, 60]
    assert "group, by the file's name, mmlu" in counts["columns"][1]
    write(tmp_path / "shards" / "part-1.csv", rows)
    write(tmp_path / "shards" / "part-2.csv", rows)
    assert load_battles(str(tmp_path / "shards"))[0].group_names == ()


def test_a_column_with_the_name_of_a_group_that_cannot_be_read_is_none(tmp_path):
    scores = {"prompt": ["q1", "q2"], "m1": [1.0, 0.0], "m2": [0.0, 1.0]}
    pq.write_table(pa.table(scores | {"category": pa.array([b"\xff", b"\xfe"])}), tmp_path / "t.parquet")
    battles, counts = load_battles(str(tmp_path / "t.parquet"))
    assert (len(battles), battles.group_names) == (2, ())
    assert counts["columns"] == ["wide: query prompt; models m1, m2; not read: category"]


def test_shuffled_outcomes_keep_the_wins_of_each_pair_and_forget_the_queries():
    battles = mixed_battles(rows=200, single=3000, queries=100)
    # The outcome says the query: odd ones are won by the model of the lower index.
    odd, is_low = battles.query_idx % 2 == 1, battles.model_a_idx < battles.model_b_idx
    battles = replace(battles, outcome=np.where(odd == is_low, 1.0, 0.0))
    after = shuffled(battles, seed=3)
    for name in ("query_idx", "model_a_idx", "model_b_idx"):
        assert np.array_equal(getattr(after, name), getattr(battles, name))
    wins = []
    for each in (battles, after):
        _, a, b, won, lost = each.win_counts()
        wins.append(np.zeros((7, 7)))
        np.add.at(wins[-1], (a, b), won)
        np.add.at(wins[-1], (b, a), lost)
    np.testing.assert_allclose(*wins)
    assert abs(np.mean(after.outcome == battles.outcome) - 0.5) < 0.05
    assert sorted(map(str, after.table.scores)) == sorted(map(str, battles.table.scores))
    rows = zip(after.table.scores, battles.table.scores, strict=True)
    assert np.mean([np.array_equal(one, other, equal_nan=True) for one, other in rows]) < 0.1
    # In a split, training and validation are shuffled, and the test is not.
    real, fake = (split_battles(battles, 0, shuffle=shuffle)[0] for shuffle in (False, True))
    assert np.array_equal(real.test.outcome, fake.test.outcome)
    assert np.array_equal(real.test.table.scores, fake.test.table.scores, equal_nan=True)
    for side in ("train", "val"):
        assert not np.array_equal(getattr(real, side).outcome, getattr(fake, side).outcome)
        assert not np.array_equal(getattr(real, side).table.scores, getattr(fake, side).table.scores, equal_nan=True)


def test_a_held_out_model_leaves_no_trace_in_the_rows_of_a_table():
    battles = mixed_battles(rows=100, single=60)
    battles.table.scores[:10, 2:] = np.nan  # with m0 held out, a single score is left
    full, split = (split_battles(battles, 0, hold_out=name)[0] for name in (None, "m0"))
    for name, part in sides_of(split).items():
        assert part.model_names == ["m1", "m2", "m3", "m4", "m5", "m6"]
        expected = [row for row in as_rows(getattr(full, name)) if "m0" not in row]
        assert as_rows(part) == expected, name
        assert ((~np.isnan(part.table.scores)).sum(1) > 1).all(), name
        assert part.table.differs().all(), name


def test_a_split_with_an_empty_side_is_an_error(tmp_path):
    for rows, message in (
        ([arena(f"q{i}", "x", "y", "tie") for i in range(30)], "test, train, val: found 30 battles, 30 of them ties"),
        ([{"prompt": "p", "a": 1, "b": 1}] * 30, "test, train, val"),
        ([{"prompt": "p", "a": 1, "b": 0}], ""),
    ):
        battles, _ = load_battles(write(tmp_path / "a.parquet", rows))
        with pytest.raises(UserError, match=f"the split leaves no battle for {message}"):
            split_battles(battles, 0)


def test_a_side_has_a_table_only_where_it_has_rows(tmp_path):
    write(tmp_path / "battles.parquet", [arena(f"q{i}", "a", "b", "model_a") for i in range(50)])
    write(tmp_path / "table.parquet", [{"prompt": f"q{i}", "a": 1, "b": 0} for i in range(2)])
    battles, _ = load_battles(str(tmp_path))
    for seed in range(20):
        split, counts = split_battles(battles, seed)
        rows = {name: 0 if part.table is None else len(part.table) for name, part in sides_of(split).items()}
        assert counts["table_rows"] == rows | {"without_a_difference": 0}
        assert sum(rows.values()) == 2
        assert all(part.table is None or len(part.table) for part in sides_of(split).values())


def test_a_model_that_only_ties_in_training_is_not_seen_where_ties_are_dropped(tmp_path):
    models = (("b", "model_a"), ("c", "tie"))
    rows = [arena(f"q{i}", "a", name, winner) for name, winner in models for i in range(40)]
    battles, _ = load_battles(write(tmp_path / "b.parquet", rows))
    assert split_battles(battles, 0)[0].train.model_names == ["a", "b"]
    assert split_battles(battles, 0, ties="half")[0].train.model_names == ["a", "b", "c"]


def test_margins_read_the_scores_of_the_unique_queries(tmp_path):
    battles = many_battles(tmp_path).select(np.array([570, 3, 571, 40, 3]), None)
    ((pairs,), queries) = battles.chunks(), battles.unique_queries
    scores = np.random.default_rng(0).normal(size=(len(queries), 3))
    for d, query, a, b in zip(
        pairs.margins(scores), battles.query_idx, battles.model_a_idx, battles.model_b_idx, strict=True
    ):
        place = list(queries).index(query)
        assert d == scores[place, a] - scores[place, b]
    np.testing.assert_array_equal(pairs.margins(scores[:1]), pairs.margins(scores[:1].repeat(len(queries), 0)))
    assert list(queries[pairs.row]) == list(battles.query_idx)


def test_concatenated_selections_are_the_selection_of_both(tmp_path):
    battles = many_battles(tmp_path)
    both = battles.select(np.array([7, 3]), None).concatenate(battles.select(np.array([3, 40]), None))
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
    table, _ = load_battles(
        write(tmp_path / "t.parquet", [{"prompt": f"p{i}", "a": 1, "b": 0} for i in range(30)]), limit=7
    )
    assert len(table.table) == len(set(table.table.query_idx)) == len(table) == 7


HEADER = b"prompt,model_a,model_b,winner\n"
SERIAL = b"prompt,m1,m2,serial\n" + b"".join(b"p%d,0,%d,%d\n" % (i, i % 2, i) for i in range(5))
BROKEN = [
    ("empty.parquet", b"", "it is empty"),
    ("cut.parquet", b"PAR1 and then something else", "cannot read"),
    ("photo.csv", b"\x89PNG\r\n\x1a\n\0\0", "binary data"),
    ("cut.csv.gz", gzip.compress(b"prompt,model_a\n" * 999)[:-20], "cannot read"),
    ("latin.csv", HEADER + b"caf\xe9,x,y,model_a\n", "utf-8"),
    ("open.csv", HEADER + b'"never closed,x,y,model_a\n', "cannot read"),
    ("ragged.csv", HEADER + b"q,x,y,model_a,more\n", "line 2 has 5 cells, the header 4"),
    ("header.csv", HEADER, "it has the columns prompt, model_a, model_b, winner and no row"),
    ("twice.csv", b"prompt,prompt\na,b\n", "several columns are named prompt"),
    ("cut.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
    ("list.jsonl", b"[1, 2]", "record 1 is '1', expected a JSON object"),
    ("deep.json", b"[" * 100000, "cannot read"),
    ("other.csv", b"name,age\nx,3\n", "has the columns age, name: no column of the query"),
    ("no_winner.csv", b"prompt,model_a,model_b\nq,x,y\n", "nearest is battles, which needs winner too"),
    (
        "ratings.csv",
        b"prompt,model_a,model_b,rating_a,rating_b\nq,x,y,1,2\n",
        "model_a, model_b to compare, and no column of the winner",
    ),
    ("preferences.csv", b"prompt,chosen,rejected,score_chosen,score_rejected\nq,x,y,5.2,4.9\n", "`chosen`, an answer"),
    ("rubrics.jsonl", b'{"prompt": "q", "response": "r", "correctness": 3, "coherence": 4}\n', "`response`, an answer"),
    ("no_score.csv", b"prompt,model,latency\nq,x,3.5\nq,y,3.1\n", "a column `model` of models, and no numeric column"),
    (
        "counters.csv",
        b"prompt,correct,batch_index,batch_size\nq,1,0,8\np,0,0,8\n",
        "do not look like models: batch_index",
    ),
    (
        "scales.csv",
        b"prompt,m1,m2,letters\nq,1,0,300\np,0,1,20\n",
        "scores on several scales, m1 up to 1 and letters up to 300; name",
    ),
    ("serial.csv", SERIAL, "`serial` numbers the rows, from 0 to 4; name the columns of the models"),
    ("always.csv", b"prompt,m1,m2\nq,10,7\np,10,6\n", "`m1` is always 10, beside scores from 6 to 7; name"),
    ("few.csv", b"prompt,m1,m2,m3\nq,1,0,-\np,0,0,-\nr,1,1,1\n", "`m3` holds 1 numbers in 3 cells"),
    ("means.csv", b"prompt,m1,m2,score\nq,1,0,0.5\np,0,0,0\n", "`score` is a score, and not that of a model"),
    ("ties.csv", b"prompt,m1,m2,m3\nq,1,2,2\np,1,3,2\nr,2,2,1\n", "each row is a ranking from 1, and the"),
    ("zero.csv", b"prompt,m1,m2,m3\nq,0,1,2\np,2,1,0\nr,0,2,1\n", "each row is a ranking from 0, and the"),
    ("two.csv", b"prompt,m1,m2\nq,1,2\np,2,1\n", "each row is a ranking from 1, and the"),
    ("numbers.csv", HEADER + b"q,.5,.7,model_b\np,.5,.2,model_a\n", "`model_a` and `model_b` hold numbers"),
    ("verdict.csv", b"prompt,model_a,model_b,verdict\nq,1,2,A\n", "model_a, model_b to compare, and no column of"),
    (
        "ranks.csv",
        b"prompt,m1,m2,m3\nq,1,2,3\np,2,3,1\n",
        "each row is a ranking from 1, and the highest score wins",
    ),
    ("percent.csv", b"prompt,m1,m2\nq,85%,1\np,70%,0\n", "`m1` holds '70%'; expected numbers"),
    ("comma.csv", b"prompt;m1;m2;m3\nq;0,5;1;1\np;0,7;0;0\n", "`m1` holds '0,7'; expected numbers"),
    (
        "metrics.jsonl",
        b'{"prompt": "q", "scores": {"gpt-4": 1, "cost": 3, "average": 2}}\n',
        "`scores` has average, cost among",
    ),
    (
        "answers.jsonl",
        b'{"prompt": "q", "completions": {"gpt-4": "42", "llama": "49"}}\n',
        "`completions` holds answers",
    ),
    (
        "likert.csv",
        b"instruction,generator_1,generator_2,preference\nq,x,y,7\n",
        "`preference` from 7 to 7; expected 1",
    ),
    (
        "context.csv",
        b"instruction,input,model_a,model_b,winner\nq,i,x,y,tie\n",
        "has `input` beside `instruction`; join",
    ),
    (
        "swallowed.tsv",
        b'prompt\tmodel_a\tmodel_b\twinner\n"q\tx\ty\tA\nr"\tx\ty\tB\n',
        "makes one cell of several lines",
    ),
    (
        "twice.jsonl",
        b'{"prompt": "q", "a": 1, "a": 0}\n{"prompt": "p", "a": 1}\n',
        "line 1: an object has several values of a",
    ),
    ("lists.json", b'{"data": [{"a": 1}], "records": [{"a": 2}]}', "both `records` and `data`"),
    ("pointer.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "run `git lfs pull`"),
    ("table.pkl", pickle.dumps([1]), "if you trust it, convert it: pd.read_pickle("),
    ("escaped.csv", HEADER + b'"say \\"hi\\"",x,y,tie\n', "line 2 is no CSV"),
    (
        "one_model.csv",
        b"prompt,model,score\nq,x,1\np,x,0\n",
        "models found: x; expected battles between at least two models; give",
    ),
    (
        "one.csv",
        HEADER + b"q,x,x,model_a\n",
        "against itself; read as prompts: query prompt; of model_a, model_b, winner; models found: none",
    ),
    (
        "none.csv",
        HEADER + b"q,x,y,?\n,x,y,tie\n,x,y,tie\n",
        "no usable battle in {}: 3 rows read, rows dropped: 1 with an unknown winner, 2 without query text; unknown "
        "winners (expected model_a, model_b, tie, or a model's name): 1 x '?'",
    ),
]


def test_a_file_that_is_broken_or_holds_no_battle_is_one_clear_error(tmp_path):
    for file, content, message in BROKEN:
        path = write(tmp_path / file, content)
        with pytest.raises(UserError) as error:
            load_battles(path)
        assert message.format(path) in str(error.value), file


def test_a_path_without_files_is_an_error(tmp_path):
    for path in ("x" * 5000, "~nosuchuser/x", "nul\0byte", "/dev/null", "", str(tmp_path)):
        with pytest.raises(UserError, match="no data at"):
            load_battles(path)


def test_holding_out_a_model_removes_its_battles_and_nothing_else(tmp_path):
    battles = many_battles(tmp_path)
    full, _ = split_battles(battles, 42)
    split, counts = split_battles(battles, 42, hold_out="m2")
    assert split.train.model_names == ["m1", "m3"]
    for name, side in sides_of(split).items():
        assert as_rows(side) == [row for row in as_rows(getattr(full, name)) if "m2" not in row], name
    assert counts["training_battles_held_out"] == len(full.train) - len(split.train) > 50
    with pytest.raises(UserError, match="no model is named 'gpt-4'; found m1, m2, m3"):
        split_battles(battles, 42, hold_out="gpt-4")


def test_the_id_of_a_query_ignores_white_space():
    one, same, other = query_ids(["a  b\n c", "a b c", "a b d"])
    assert one == same != other
    assert query_ids([]).shape == (0,)
