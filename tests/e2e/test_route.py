"""The routing command: rankings, batches, prices, new models, and everything that it refuses."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import route
import support.data.queries
import train
from data_loader import load_battles, query_ids, split_battles
from query_representation import query_features
from rankrouter import RankRouter
from support.routing.new_model import battles_of
from support.system.command_line import run_command
from support.system.errors import UserError

ROOT = Path(__file__).parent.parent.parent
QUERIES = ["How do I invert a matrix?", "What is in lentil soup?", "Who ruled Rome?"]


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """A function that trains a router of which the scores differ, with some flags, and returns its checkpoint."""

    def run(*flags):
        output, at = tmp_path_factory.mktemp("outputs"), small.index("--capability_dim")  # for random vectors only
        better = ["--epochs", "12", "--lr", "0.003", "--output_dir", str(output)]
        train.main([*small[:at], *small[at + 2 :], *better, *flags])
        return str(output / "best_model.pt")

    return run


@pytest.fixture(scope="module")
def checkpoint(trained):
    return trained()


@pytest.fixture(scope="module")
def profiled(trained, tmp_path_factory):
    """A checkpoint by a table of benchmarks that has one model more, and the table."""
    path = tmp_path_factory.mktemp("profiles") / "profiles.csv"
    rng = np.random.default_rng(0)
    names = [f"demo-model-{letter}" for letter in "abcdefghijkl"]
    pd.DataFrame({"model": [*names, "new"], **dict(zip("xyz", rng.normal(size=(3, 13)), strict=True))}).to_csv(path)
    return trained("--capability_file", str(path)), str(path)


@pytest.fixture
def routed(capsys):
    """Run `route.py` with some flags; returns what it wrote to stdout."""

    def run(*flags: str) -> str:
        route.main(list(flags))
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys):
    """Run `route.py` with flags that must fail: exit code 2, one line on stderr; returns that line."""

    def run(*flags: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: route.main(list(flags)))
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2
        assert line.startswith("error: ")
        return line

    return run


@pytest.fixture
def prices(checkpoint, tmp_path):
    """A file of prices of all models, and the prices by model."""
    by_name = {name: 0.001 * (i + 1) for i, name in enumerate(RankRouter.load(checkpoint).model_names)}
    path = tmp_path / "prices.csv"
    pd.DataFrame({"model": by_name.keys(), "price_per_query": by_name.values()}).to_csv(path)
    return str(path), by_name


def jsonl(text):
    return [json.loads(line) for line in text.splitlines()]


def new_battles(demo, tmp_path, renamed="demo-model-c", name="new", rows=400):
    """Battles of a known model under a new name, and some of others."""
    table = pd.read_parquet(demo / "battles.parquet")
    of_model = (table["model_a"] == renamed) | (table["model_b"] == renamed)
    table = pd.concat([table[of_model][:rows], table[~of_model][:20]])
    for column in ("model_a", "model_b"):
        table[column] = table[column].replace({renamed: name})
    table.to_parquet(tmp_path / "new.parquet")
    return str(tmp_path / "new.parquet")


def test_models_are_ranked_by_the_scores_of_the_towers(checkpoint):
    router = RankRouter.load(checkpoint)
    rankings = router.rank(QUERIES, top_k=3)
    features = query_features(QUERIES, router.encoder.embed(QUERIES)[0], router.config.surface_features)
    scores = router(*router.query_tower.inputs(features)).detach().numpy()  # (Q, M)
    for row, ranking in zip(scores, rankings, strict=True):
        assert [name for name, _ in ranking] == [router.model_names[i] for i in np.argsort(-row)[:3]]
        np.testing.assert_allclose([score for _, score in ranking], np.sort(row)[::-1][:3], atol=1e-4)
    assert [len(ranking) for ranking in router.rank(QUERIES)] == [12] * 3
    some = router.rank(QUERIES, models=["demo-model-c", "demo-model-a"])
    assert all({name for name, _ in ranking} == {"demo-model-a", "demo-model-c"} for ranking in some)


def test_rank_takes_any_iterable_of_queries_and_refuses_a_single_text(checkpoint):
    router = RankRouter.load(checkpoint)
    once = router.rank(QUERIES)
    again = router.rank(query for query in [QUERIES[1], QUERIES[0], f"  {QUERIES[1]}\n", QUERIES[2]])
    for ranking, expected in zip(again, [once[i] for i in (1, 0, 1, 2)], strict=True):
        assert [name for name, _ in ranking] == [name for name, _ in expected]
        np.testing.assert_allclose([score for _, score in ranking], [score for _, score in expected], atol=1e-6)
    assert router.rank([]) == []
    assert len(router.rank(["\ud800 lone"])) == 1
    assert len(router.rank(QUERIES, models=iter(["demo-model-a", "demo-model-a"]))[0]) == 1
    assert router.train().rank(QUERIES) == once  # without dropout
    for arguments, message in (
        (("one text",), "expected a list of texts"),
        ((["a", 3],), "query 2 is 3"),
        ((QUERIES, 0), "top_k is 0"),
        ((QUERIES, -1), "top_k is -1"),
    ):
        with pytest.raises(UserError, match=message):
            router.rank(*arguments)


CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " How do I invert a matrix? "},
    {"role": "assistant", "content": "With a solver."},
    {"role": "user", "content": [{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "Who ruled Rome?"}]},
]
READ = {"first": QUERIES[0], "last": QUERIES[2], "all": f"{QUERIES[0]} \n\n{QUERIES[2]}"}


@pytest.mark.parametrize("read", READ)
def test_of_a_conversation_the_turns_of_the_user_are_read(read, checkpoint, routed, tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    (line,) = jsonl(routed("--checkpoint", checkpoint, "--input", str(tmp_path / "chats.jsonl"), "--read", read))
    assert line["query"] == READ[read]
    router = RankRouter.load(checkpoint)
    assert router.rank([CHAT], read=read) == router.rank([READ[read]])
    assert np.array_equal(router.scores_of([CHAT], read=read), router.scores_of([READ[read]]))


def test_a_line_that_is_a_list_of_messages_is_a_conversation(checkpoint, routed, tmp_path):
    for name in ("chats.txt", "chats.jsonl"):
        (tmp_path / name).write_text(json.dumps(CHAT) + "\n")
        (line,) = jsonl(routed("--checkpoint", checkpoint, "--input", str(tmp_path / name), "--read", "last"))
        assert line["query"] == QUERIES[2]


def test_the_first_turn_is_read_by_default_as_in_training(checkpoint, routed, tmp_path):
    pd.DataFrame({"conversation": [CHAT[:3], CHAT[1:2]]}).to_parquet(tmp_path / "chats.parquet")
    lines = jsonl(routed("--checkpoint", checkpoint, "--input", str(tmp_path / "chats.parquet")))
    assert [line["query"] for line in lines] == [QUERIES[0]] * 2
    router = RankRouter.load(checkpoint)
    assert router.rank([CHAT]) == router.rank([QUERIES[0]])


@pytest.mark.parametrize(
    ("queries", "read", "message"),
    [
        (CHAT, "first", "queries is one list of chat messages, expected a list of such lists"),
        ([CHAT[:1]], "last", r"query 1 is without text in the user's turn \(last\) of its 1 messages"),
        (["text", []], "first", "query 2 is \\[\\], expected text or a list of chat messages"),
        ([["text"]], "first", "expected text or a list of chat messages"),
        (["text"], "second", "read is 'second', expected one of first, last, all"),
    ],
)
def test_what_is_no_conversation_is_refused(queries, read, message, checkpoint):
    with pytest.raises(UserError, match=message):
        RankRouter.load(checkpoint).rank(queries, read=read)


def test_scores_and_their_probabilities_are_printed(checkpoint, routed):
    router = RankRouter.load(checkpoint)
    printed = routed("--checkpoint", checkpoint, QUERIES[0], "--no_cache", "--top_k", "4").splitlines()
    assert printed[0] == QUERIES[0]
    single = router.metadata.best_single_model
    assert printed[1].split() == f"model score beats the next beats {single}, the best single model".split()
    (ranking,) = router.rank(QUERIES[:1])
    of_single = dict(ranking)[single]

    def beats(lead):
        return f"{1 / (1 + np.exp(-lead / router.temperature)):.0%}"

    for place, line in enumerate(printed[2:6]):
        name, score = ranking[place]
        expected = [str(place + 1), name, f"{score:.4f}", beats(score - ranking[place + 1][1])]
        assert line.split() == expected + ([] if name == single else [beats(score - of_single)])
    assert printed[6:] == [""]
    alone = routed("--checkpoint", checkpoint, QUERIES[0], "--no_cache", "--models", "demo-model-a").splitlines()
    assert len(alone[2].split()) == 4  # the last model beats no next one
    assert alone[3:] == [""]


def turns_of(query):
    return [{"role": "system", "content": "be brief"}, {"role": "User", "content": [{"type": "text", "text": query}]}]


def test_a_batch_is_the_same_in_every_form_and_in_order(checkpoint, routed, tmp_path, monkeypatch):
    queries = [*QUERIES, "日本の首都は? “quoted, with a comma”", QUERIES[0]]
    text = "\n".join(queries).encode()
    lines = "".join(json.dumps({"id": i, "query": query}) + "\n" for i, query in enumerate(queries)).encode()
    contents = {
        "queries.txt": text,
        "crlf.txt": "\r\n".join(queries).encode("utf-8-sig"),
        "queries.jsonl": lines,
        "prompts.jsonl": lines.replace(b'"query"', b'"prompt"'),
        "queries": lines,
        "queries.gz": gzip.compress(lines),
        "queries.json": b"[" + lines.strip().replace(b"\n", b",") + b"]",
        "Prompts.jsonl": lines.replace(b'"query"', b'"Prompt"'),
        "turns": "".join(json.dumps({"messages": turns_of(query)}) + "\n" for query in queries).encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    table = pd.DataFrame({"number": range(len(queries)), "prompt": queries})
    table.to_parquet(tmp_path / "queries.parquet")
    table.to_csv(tmp_path / "queries.csv")
    table.to_csv(tmp_path / "queries.tsv", sep="\t")
    table.rename(columns={"prompt": "text"}).assign(prompt="no").to_csv(tmp_path / "text.csv")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    expected = RankRouter.load(checkpoint).rank(queries, top_k=2)
    target = tmp_path / "out.jsonl"
    for name in (*contents, "queries.parquet", "queries.csv", "queries.tsv", "text.csv", "-"):
        source = name if name == "-" else str(tmp_path / name)
        flags = ["--checkpoint", checkpoint, "--no_cache", "--top_k", "2"]
        flags += ["--query_column", "text"] if name == "text.csv" else []
        assert routed(*flags, "--input", source, "--output", str(target)) == "", name
        rows = jsonl(target.read_text())
        assert [row["query"] for row in rows] == queries, name
        for row, ranking in zip(rows, expected, strict=True):
            assert list(row) == ["query", "ranking", "scores"]
            assert row["ranking"] == [name for name, _ in ranking]
            np.testing.assert_allclose(row["scores"], [score for _, score in ranking], atol=1e-4)


def test_a_stream_is_answered_as_it_arrives_and_ends_quietly_where_nobody_reads_on(checkpoint):
    command = [sys.executable, str(ROOT / "route.py"), "--checkpoint", checkpoint, "--input", "-", "--no_cache"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        for query in QUERIES:
            process.stdin.write(json.dumps({"query": query}).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["query"] == query  # before the next is written
        for piece in (b'{"query": ' + b" " * 2**16, b'"in pieces"}\n{"query": "whole"}\n'):  # more than a pipe holds
            process.stdin.write(piece)
            process.stdin.flush()
        for query in ("in pieces", "whole"):
            assert json.loads(process.stdout.readline())["query"] == query
        process.stdout.close()
        process.stdin.write(b'{"query": "to nobody"}\n')
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_malformed_line_is_reported_by_its_number_and_left_out(checkpoint, tmp_path, capsys):
    first, last = '{"query": "first"}', '{"query": "last \\ud800"}'
    target = tmp_path / "out.jsonl"
    for name, lines, malformed in (
        ("lines.jsonl", [first, "{broken", '{"text": 1}', '{"query": " "}', "", '{"query": [7]}', last], "23456"),
        ("lines", ["oops", first, last], "1"),
        ("lines.NDJSON", ["[1]", first, last], "1"),
    ):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        flags = ["--checkpoint", checkpoint, "--no_cache", "--input", str(tmp_path / name), "--output", str(target)]
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda flags=flags: route.main(flags))
        assert stopped.value.code == 1, name
        assert [row["query"] for row in jsonl(target.read_text())] == ["first", "last \ufffd"], name
        reported = capsys.readouterr().err.splitlines()
        assert [line.split(", line ")[1].split(":")[0] for line in reported] == list(malformed), name
        assert all(line.endswith("; left out") for line in reported)
        target.unlink()
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda flags=flags: route.main([*flags, "--strict"]))
        assert stopped.value.code == 2, name
        assert f"line {malformed[0]}: " in capsys.readouterr().err
        assert not list(tmp_path.glob("*out*")), name  # no output of a part


def test_with_all_queries_cached_neither_routing_nor_training_imports_transformers(checkpoint, small, routed, tmp_path):
    routing, training = ["--checkpoint", checkpoint, *QUERIES], [*small, "--output_dir", str(tmp_path)]
    expected = routed(*routing).splitlines()  # after this the cache has what either needs
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import route, train
route.main({routing!r})
print([name for name in ("transformers", "tokenizers", "sklearn", "pandas") if name in sys.modules])
train.main({training!r})
print([name for name in ("transformers", "tokenizers") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *printed, last = run.stdout.splitlines()
    assert printed[: len(expected) + 1] == [*expected, "[]"]
    assert last == "[]"
    history = json.loads((tmp_path / "training_history.json").read_text())
    queries = sum(size["queries"] for size in history["data"]["split"].values())
    assert (history["timing"]["queries_encoded"], history["timing"]["queries_from_cache"]) == (0, queries)
    assert f"{queries} from the cache, 0 encoded" in run.stdout


def test_a_cost_weight_ranks_by_score_minus_weighted_price(checkpoint, routed, prices, tmp_path):
    path, by_name = prices
    (tmp_path / "q.txt").write_text("\n".join(QUERIES))
    flags = ("--checkpoint", checkpoint, "--no_cache", "--prices", path, "--input", str(tmp_path / "q.txt"))
    rows = jsonl(routed(*flags, "--cost_weight", "200"))
    scores = RankRouter.load(checkpoint).rank(QUERIES)
    for row, ranking in zip(rows, scores, strict=True):
        utility = {name: score - 200 * by_name[name] for name, score in ranking}
        assert row["ranking"] == sorted(utility, key=utility.get, reverse=True)
        np.testing.assert_allclose(row["scores"], [dict(ranking)[name] for name in row["ranking"]], atol=1e-4)
        assert row["prices"] == [by_name[name] for name in row["ranking"]]


def test_a_budget_holds_for_the_mean_of_the_batch(checkpoint, prices, tmp_path, capsys):
    path, by_name = prices
    (tmp_path / "q.txt").write_text("\n".join(f"{query} {i}" for i in range(30) for query in QUERIES))
    flags = ["--checkpoint", checkpoint, "--no_cache", "--prices", path, "--budget", "0.004", "--input"]
    route.main([*flags, str(tmp_path / "q.txt")])
    printed = capsys.readouterr()
    spent = np.mean([by_name[row["ranking"][0]] for row in jsonl(printed.out)])
    assert 0.003 < spent < 0.004 + 1e-12
    assert f"mean {spent:.6g} of at most 0.004 per query" in printed.err
    (tmp_path / "none.txt").write_text("")
    route.main([*flags, str(tmp_path / "none.txt")])
    assert capsys.readouterr().out == ""


def test_the_curve_leaves_out_what_the_router_was_trained_on(checkpoint, demo, small, prices, routed, tmp_path):
    path, by_name = prices
    source, target = str(tmp_path / "battles.parquet"), str(tmp_path / "curve.jsonl")
    table = pd.read_parquet(demo / "battles.parquet")[:600]  # training and validation are among the first 320
    table.to_parquet(source)
    known, battles = load_battles(small[small.index("--data_path") + 1])[0], load_battles(source)[0]
    test = split_battles(known, 42)[0].test
    seen = set(known.queries) - {test.queries[i] for i in test.unique_queries}
    new, tie = np.array([query not in seen for query in battles.queries])[battles.query_idx], battles.outcome == 0.5
    unseen = battles.select(new & ~tie, None)
    flags = ("--checkpoint", checkpoint, "--no_cache", "--prices", path, "--curve")
    printed = routed(*flags, source)
    assert f"on {len(unseen)} battles" in printed
    left_out = f"{tie.sum()} ties, 0 battles of other models, {(~new & ~tie).sum()} on queries that the router was"
    assert f"left out {left_out} trained on" in printed
    routed(*flags, source, "--output", target)
    points = jsonl(Path(target).read_text())
    queries = unseen.unique_queries
    (pairs,) = unseen.chunks()
    d = pairs.margins(RankRouter.load(checkpoint).scores_of([unseen.queries[i] for i in queries]))
    assert points[0]["worth"] == pytest.approx(np.mean((d > 0) == unseen.outcome))  # accuracy
    assert points[0]["cost_weight"] == 0
    models = np.column_stack([unseen.model_a_idx, unseen.model_b_idx])
    pair = np.array([by_name[name] for name in unseen.model_names])[models]
    assert points[-1]["mean_price"] == pytest.approx(pair.min(1).mean())
    assert points[-1]["worth"] == pytest.approx(np.mean((pair[:, 0] < pair[:, 1]) == unseen.outcome))
    costs = [point["mean_price"] for point in points]
    assert costs == sorted(costs, reverse=True)
    np.testing.assert_allclose(
        costs, np.linspace(costs[0], costs[-1], 21), atol=0.022 / len(unseen)
    )  # two more choices
    worth = np.interp(
        costs, *zip(*((point["mean_price"], point["worth"]) for point in (points[-1], points[0])), strict=True)
    )
    np.testing.assert_allclose([point["random_mix"] for point in points], worth)
    both = np.isin(models, [unseen.model_names.index(f"demo-model-{letter}") for letter in "ab"]).all(1)
    assert f"on {both.sum()} battles" in routed(*flags, source, "--models", "demo-model-a,demo-model-b")
    table[::-1].to_parquet(tmp_path / "other.parquet", compression="gzip")  # the same in other bytes
    assert f"on {len(unseen)} battles" in routed(*flags, str(tmp_path / "other.parquet"))


def test_a_fallback_is_left_only_with_confidence(checkpoint, demo, routed, refused, tmp_path):
    router = RankRouter.load(checkpoint)
    single, queries = router.metadata.best_single_model, load_battles(str(demo / "battles.parquet"))[0].queries[:60]
    Path(tmp_path / "queries.txt").write_text("\n".join(queries))
    flags = ("--checkpoint", checkpoint, "--no_cache", "--input", str(tmp_path / "queries.txt"))
    scores = router.scores_of(queries)
    i = int(np.argsort(scores.mean(0))[-3])
    fallback = router.model_names[i]
    p = 1 / (1 + np.exp(-(scores.max(1) - scores[:, i]) / router.temperature))
    left = []
    for confidence in (0.5, float(np.median(p)), 1.0):
        guard = ("--fallback", fallback, "--confidence", repr(confidence))
        lines, expected = jsonl(routed(*flags, *guard)), []
        for row, sure in zip(scores, p, strict=True):
            expected.append(router.model_names[row.argmax()] if sure > confidence else fallback)
        assert [line["ranking"][0] for line in lines] == expected
        ranked = router.rank(queries, fallback=fallback, confidence=confidence)
        assert [ranking[0][0] for ranking in ranked] == expected
        assert lines[0]["scores"] == pytest.approx([score for _, score in ranked[0]], abs=1e-6)  # not raised
        left.append(sum(name != fallback for name in expected))
    assert left[0] > left[1] > left[2] == 0
    # By default training's confidence for the best single model, and for no other one.
    chosen = routed(*flags, "--fallback", single)
    assert chosen == routed(*flags, "--fallback", "best", "--confidence", str(router.metadata.confidence))
    other = next(name for name in router.model_names if name != single)
    assert "expected a confidence from 0.5 to 1" in refused(*flags, "--fallback", other)
    assert "not among the models" in refused(*flags, "--fallback", "stranger", "--confidence", "0.7")
    assert "--confidence needs --fallback" in refused(*flags, "--confidence", "0.7")
    assert "from 0.5 to 1" in refused(*flags, "--fallback", "best", "--confidence", "0.4")


def test_a_cheap_fallback_is_left_where_that_pays(checkpoint, demo, routed, prices, tmp_path):
    path, by_name = prices
    router, cheap = RankRouter.load(checkpoint), min(by_name, key=by_name.get)
    queries = load_battles(str(demo / "battles.parquet"))[0].queries[:60]
    Path(tmp_path / "queries.txt").write_text("\n".join(queries))
    flags = ("--checkpoint", checkpoint, "--no_cache", "--input", str(tmp_path / "queries.txt"), "--prices", path)
    guard, scores = ("--fallback", cheap, "--confidence", "0.55"), router.scores_of(queries)
    scores[:, router.model_names.index(cheap)] += router.temperature * np.log(0.55 / 0.45)
    all_prices = np.array([by_name[name] for name in router.model_names])
    lead = scores - scores[:, [router.model_names.index(cheap)]]
    ratios = np.divide(lead, all_prices - by_name[cheap], out=np.zeros_like(lead), where=all_prices > by_name[cheap])
    weight = float(np.median(ratios.max(1)))  # half of the queries leave the cheap model
    scores -= weight * all_prices
    lines = jsonl(routed(*flags, *guard, "--cost_weight", str(weight)))
    assert [line["ranking"][0] for line in lines] == [router.model_names[i] for i in scores.argmax(1)]
    assert 0 < sum(line["ranking"][0] == cheap for line in lines) < 60
    budget = np.mean(sorted(by_name.values())[:2])
    lines = jsonl(routed(*flags, *guard, "--budget", str(budget)))
    assert np.mean([line["prices"][0] for line in lines]) <= budget * (1 + 1e-9)


def test_the_curve_by_the_costs_of_a_table(checkpoint, routed, refused, tmp_path):
    single, rng = RankRouter.load(checkpoint).metadata.best_single_model, np.random.default_rng(0)
    names = [*sorted({"demo-model-a", "demo-model-b", "demo-model-c"} - {single})[:2], single]
    table = pd.DataFrame({"prompt": [f"prompt {i}" for i in range(50)]} | {name: rng.random(50) for name in names})
    for i, name in enumerate(names):
        table[f"{name}_cost"] = rng.random(50) + 3 * i
    table.loc[0, f"{names[1]}_cost"] = np.nan
    table[single] += 0.5
    table.loc[1, names] = 0.5
    table.to_parquet(tmp_path / "table.parquet")
    flags = (
        "--checkpoint",
        checkpoint,
        "--no_cache",
        "--models",
        ",".join(names),
        "--curve",
        str(tmp_path / "table.parquet"),
    )
    printed = routed(*flags)
    assert "left out 0 rows without two of these models, 1 rows whose scores do not differ, 1 rows without" in printed
    assert f"{table[f'{names[0]}_cost'][2:].mean():.6g}" in printed.split("random mix\n")[1]  # at the cheap end
    for number in ("aiq_beyond_models", "apgr", "cpt_50", "perf_gain", "cost_save"):
        assert f"\n{number} " in printed
    table.assign(**{f"{name}_cost": 1 for name in names}).to_parquet(tmp_path / "table.parquet")
    printed = routed(*flags)  # of equal costs nothing is to be summarized
    assert "\ncost_save " in printed
    assert "\naiq " not in printed
    battles = pd.DataFrame([{"prompt": "q", "model_a": names[0], "model_b": names[1], "winner": "model_a"}])
    battles.to_csv(tmp_path / "battles.csv")
    assert "has no costs; give --prices" in refused(*flags[:-1], str(tmp_path / "battles.csv"))


def test_the_curve_on_a_score_table_shows_the_chosen_models_scores(checkpoint, routed, prices, tmp_path):
    names = ["demo-model-a", "demo-model-b", "demo-model-c", "stranger"]
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"prompt": [f"prompt {i}" for i in range(50)], **{name: rng.random(50) for name in names}})
    table.loc[0, "demo-model-b"] = np.nan
    table.loc[50] = ["prompt 50", 0.5, np.nan, np.nan, 0.1]  # one model of the router alone
    table.to_parquet(tmp_path / "table.parquet")
    target = str(tmp_path / "curve.jsonl")
    flags = ("--no_cache", "--prices", prices[0], "--curve", str(tmp_path / "table.parquet"), "--output", target)
    printed = routed("--checkpoint", checkpoint, *flags)
    assert "on 50 rows of a score table" in printed
    assert "left out 1 rows without two of these models" in printed
    points = jsonl(Path(target).read_text())
    table = table[:50]
    ranked = RankRouter.load(checkpoint).rank(list(table["prompt"]), models=names[:3])
    best = [
        next(row[name] for name, _ in ranking if not np.isnan(row[name]))
        for ranking, (_, row) in zip(ranked, table.iterrows(), strict=True)
    ]
    assert points[0]["worth"] == pytest.approx(np.mean(best))
    assert points[-1]["worth"] == pytest.approx(table["demo-model-a"].mean())  # the cheapest
    assert points[-1]["mean_price"] == pytest.approx(0.001)


@pytest.mark.parametrize("init", ["random", "win_rate"])
def test_a_model_is_added_from_battles_and_the_others_keep_their_scores(
    checkpoint, trained, demo, routed, tmp_path, init
):
    narrow_path = checkpoint if init == "random" else trained("--capability_init", init)
    wide_path, wider_path = str(tmp_path / "wide.pt"), str(tmp_path / "wider.pt")
    battles = new_battles(demo, tmp_path)
    flags = ("--no_cache", "--add_model", "new", "--battles", battles)
    printed = routed("--checkpoint", narrow_path, *flags, "--save", wide_path)
    assert "20 others left out" in printed
    assert "13 models" in printed
    narrow, wide = RankRouter.load(narrow_path), RankRouter.load(wide_path)
    assert wide.model_names == [*narrow.model_names, "new"]
    queries = [f"{query} {i}" for i in range(20) for query in QUERIES]
    assert np.array_equal(wide.scores_of(queries)[:, :12], narrow.scores_of(queries))
    assert torch.equal(wide.query_tower.mean, narrow.query_tower.mean)
    (added,) = wide.metadata.added_models
    assert (added["model"], added["from"]) == ("new", "battles")
    # And a model more after it.
    more = new_battles(demo, tmp_path, name="newer")
    routed("--checkpoint", wide_path, "--no_cache", "--add_model", "newer", "--battles", more, "--save", wider_path)
    wider = RankRouter.load(wider_path)
    assert np.array_equal(wider.scores_of(queries)[:, :13], wide.scores_of(queries))
    assert [(added["model"], added["battles"]) for added in wider.metadata.added_models] == [
        ("new", 400),
        ("newer", 400),
    ]
    own = battles_of(load_battles(battles)[0], "newer", narrow.model_names)
    ids = set(query_ids([own.queries[i] for i in own.unique_queries]))
    assert ids <= set(wide.metadata.seen_queries.tolist())
    assert not ids <= set(narrow.metadata.seen_queries.tolist())


def test_a_model_is_added_by_its_row_of_benchmarks(profiled, routed, tmp_path):
    source, path = profiled
    routed("--checkpoint", source, "--add_model", "new", "--profile", path, "--save", str(tmp_path / "wider.pt"))
    narrow, wide = RankRouter.load(source), RankRouter.load(tmp_path / "wider.pt")
    assert np.array_equal(wide.scores_of(QUERIES)[:, :12], narrow.scores_of(QUERIES))
    table = pd.read_csv(path)[["x", "y", "z"]].to_numpy()
    expected = (table[12] - table[:12].mean(0)) / table[:12].std(0)
    vector = wide.model_tower.capability.weight[12]
    torch.testing.assert_close(vector.double(), torch.from_numpy(expected), atol=1e-5, rtol=0)
    pd.read_csv(path)[["z", "y", "x", "model"]].to_csv(tmp_path / "turned.csv")  # in another order
    again = str(tmp_path / "again.pt")
    routed("--checkpoint", source, "--add_model", "new", "--profile", str(tmp_path / "turned.csv"), "--save", again)
    assert torch.equal(RankRouter.load(again).model_tower.capability.weight[12], vector)


def test_a_new_model_that_cannot_be_added_is_refused(checkpoint, profiled, refused, demo, tmp_path):
    target = str(tmp_path / "wider.pt")
    battles = new_battles(demo, tmp_path)
    for name, source, save, expected in (
        ("demo-model-c", ("--battles", battles), target, "knows demo-model-c already"),
        (
            "newest",
            ("--battles", battles),
            target,
            "no battle of newest against a model of the router; models in the battles: demo-",
        ),
        ("new\ud800", ("--battles", battles), target, "cannot name a model"),
        ("new", ("--profile", profiled[1]), target, "use --battles"),
        ("new", ("--battles", battles), checkpoint, f"--save {checkpoint} would replace an input"),
        ("new", ("--battles", battles), battles, f"--save {battles} would replace an input"),
    ):
        flags = ("--checkpoint", checkpoint, "--no_cache", "--add_model", name, *source, "--save", save)
        assert expected in refused(*flags), (name, source, save)
    far = "z of new lies more than 10 standard deviations from the models of training"
    for name, row, expected in (
        ("newest", "model,x,y,z\nnew,1,2,3", "no row for newest"),
        ("new", "model,x,y\nnew,1,2", "lacks z"),
        ("new", "model,x,y,z\nnew,1,2,500", far),
        ("new", "model,x,y,z\nnew,1,2,-500", far),
        ("new", "model,x,y,z\nnew,,,", "has no number for new; expected at least one benchmark"),
    ):
        (tmp_path / "new.csv").write_text(row + "\n")
        add = ("--add_model", name, "--profile", str(tmp_path / "new.csv"), "--save", target)
        assert expected in refused("--checkpoint", profiled[0], *add), row
    assert not Path(target).exists()


def test_rows_of_new_battles_that_cannot_be_used_are_counted(checkpoint, demo, tmp_path, routed):
    path = new_battles(demo, tmp_path, rows=30)
    table = pd.read_parquet(path)
    table.loc[table.index[:7], "winner"] = "nobody"
    table.to_parquet(path)
    flags = ("--add_model", "new", "--battles", path, "--save", str(tmp_path / "wider.pt"))
    printed = routed("--checkpoint", checkpoint, "--no_cache", *flags)
    assert "50 rows, dropped: 7 with an unknown winner" in printed
    assert "unknown winners: 7 x 'nobody'" in printed
    assert "battles  23 of new" in printed


def test_bad_flags_end_in_one_line(checkpoint, refused):
    for flags, expected in (
        ((), "expected one of queries, --input, --curve, --add_model, --export, got none"),
        (("q", "--input", "x"), "got queries and --input"),
        (("",), "query 1 is empty"),
        (("good", " \n"), "query 2 is empty"),
        (("q", "--top_k", "0"), "--top_k"),
        (("q", "--models", "demo-model-a,gpt-5"), "gpt-5: not among the models that the router knows"),
        (("q", "--models", "demo-model-a,,b"), "expected names separated by commas"),
        (("q", "--models", "a\nb"), "expected names separated by commas"),
        (("q", "--cost_weight", "1"), "need --prices"),
        (("q", "--budget", "0"), "need --prices"),
        (("--budget", "1", "q"), "need --prices"),
        (("q", "--prices", "p", "--cost_weight", "1", "--budget", "1"), "exclude each other"),
        (("q", "--prices", "p", "--cost_weight", "1e300"), "expected a number from 0 to 1e15"),
        (("q", "--prices", "/nowhere"), "cannot read /nowhere"),
        (("--add_model", "x"), "--add_model needs --save"),
        (("--add_model", "x", "--models", "a"), "--models: no effect with --add_model"),
        (("--add_model", " ", "--battles", "x", "--save", "y"), "--add_model: expected a name, got ' '"),
        (("q", "--save", "x"), "--save: no effect with queries"),
        (("q", "--strict"), "--strict: no effect with queries"),
        (("--curve", "x", "--top_k", "2", "--budget", "1"), "--budget, --top_k: no effect with --curve"),
        (("q", "--model_path", "/nowhere"), "no model folder at /nowhere"),
        (("q", "--device", "tpu"), "--device 'tpu'"),
        (("--input", "/nowhere"), "cannot read /nowhere: No such file"),
        (("--input", str(ROOT)), "cannot read"),
        (("q", "--output", ""), "--output: expected a path, got ''"),
        (("q", "--output", "/nowhere/out"), "--output /nowhere/out: its folder does not exist"),
        (("q", "--output", str(ROOT)), f"cannot write {ROOT}"),
        (("q", "--nonsense"), "unrecognized arguments"),
        (("q", "--checkpoint", "/nowhere"), "cannot read the checkpoint"),
        (("q", "--checkpoint", __file__), "is not a RankRouter checkpoint"),
    ):
        assert expected in refused("--checkpoint", checkpoint, "--no_cache", *flags), flags


def test_a_file_without_queries_is_refused(checkpoint, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(support.data.queries, "LONGEST_LINE", 5000)
    for name, content, expected in (
        ("queries", b"good\n\xff\xfe bad\n", "is not UTF-8 in line 2; convert it"),
        ("queries", "caf\u00e9\n".encode("latin-1"), "is not UTF-8 in line 1"),
        ("queries", b"good\nq\0uery\n", "holds binary data in line 2"),
        ("queries", "hello".encode("utf-16"), "line 1"),
        ("queries", bytes(range(256)) * 10, "line 1"),
        ("queries", b"PAR1 but no table", "cannot read"),
        ("queries.csv", b"id,text\n1,hello\n", "has the columns id, text; expected one of "),
        ("queries", b"good\n" + b"x" * 5001, "line 2 of "),  # as an endless stream starts
    ):
        (tmp_path / name).write_bytes(content)
        flags = ("--checkpoint", checkpoint, "--no_cache", "--input", str(tmp_path / name))
        assert expected in refused(*flags), content


def test_an_output_does_not_replace_what_is_read(checkpoint, refused, tmp_path):
    (tmp_path / "q.txt").write_text("hello\n")
    (tmp_path / "link").symlink_to("q.txt")
    for output in (str(tmp_path / "q.txt"), str(tmp_path / "link"), checkpoint):
        line = refused("--checkpoint", checkpoint, "--input", str(tmp_path / "q.txt"), "--output", output)
        assert "would replace an input" in line, output
    assert (tmp_path / "q.txt").read_text() == "hello\n"


def test_a_pipe_or_a_link_as_output_is_written_through(checkpoint, routed, tmp_path):
    flags = ["--checkpoint", checkpoint, "--no_cache", QUERIES[0], "--output"]
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)  # a reader, so that the writer need not wait
    routed(*flags, str(tmp_path / "pipe"))
    assert json.loads(os.read(pipe, 2**16))["query"] == QUERIES[0]
    os.close(pipe)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o600)
    (tmp_path / "link").symlink_to("file")
    routed(*flags, str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "file").read_text())["query"] == QUERIES[0]
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_closed_streams_are_reported_in_one_line(checkpoint, refused, tmp_path, monkeypatch):
    (tmp_path / "q.txt").write_text("hello\n")
    for closed, source in (("stdin", "-"), ("stdout", str(tmp_path / "q.txt"))):
        with monkeypatch.context() as patch:
            patch.setattr(sys, closed, None)  # as Python starts without the stream
            assert "is closed" in refused("--checkpoint", checkpoint, "--no_cache", "--input", source), closed


def test_another_encoder_than_that_of_training_is_recognized_by_its_content(
    checkpoint, refused, routed, demo, tmp_path
):
    shutil.copytree(demo / "encoder", tmp_path / "moved")
    flags = ("--checkpoint", checkpoint, "--no_cache", "--model_path", str(tmp_path / "moved"))
    assert QUERIES[0] in routed(*flags, QUERIES[0])
    weights = tmp_path / "moved" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "is not the one that the router was trained with" in refused(*flags, QUERIES[0])


def test_control_characters_in_file_names_are_not_printed(checkpoint, demo, tmp_path, capfd):
    folder = tmp_path / "\x1b[31mred\rfolder\n\x9b"
    folder.mkdir()
    (folder / "not.pt").write_bytes(b"not a checkpoint")
    shutil.copy(checkpoint, folder / "best.pt")
    (folder / "q.jsonl").write_text('{"query": "first"}\n{broken\n')
    shutil.copy(new_battles(demo, tmp_path, rows=30), folder / "new.parquet")
    (folder / "prices.csv").write_text("model,price_per_query\nstranger,1\n")
    names = ("not.pt", "best.pt", "q.jsonl", "new.parquet", "prices.csv")
    damaged, best, queries, battles, prices = (str(folder / name) for name in names)
    for code, flags in (
        (2, ("--checkpoint", damaged, "q")),
        (2, ("--checkpoint", str(folder / "missing.pt"), "q")),
        (1, ("--checkpoint", best, "--input", queries)),
        (2, ("--checkpoint", best, "--input", queries, "--strict")),
        (2, ("--checkpoint", best, "--input", queries, "--output", queries)),
        (2, ("--checkpoint", best, "--prices", prices, "q")),
        (2, ("--checkpoint", best, "--prices", prices, "--curve", battles)),
        (2, ("--checkpoint", best, "--model_path", str(folder), "q")),
        (0, ("--checkpoint", best, "--add_model", "new", "--battles", battles, "--save", str(folder / "wider.pt"))),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda flags=flags: route.main([*flags, "--no_cache"]))
            sys.exit(0)
        assert stopped.value.code == code, flags
        out, err = capfd.readouterr()
        assert "[31mred folder" in out + err, flags
        assert all(line.isprintable() for line in [*out.split("\n"), *err.split("\n")]), flags
