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
from data_loader import load_battles, query_ids, split_battles
from rankrouter import RankRouter
from support.routing.new_model import battles_of
from support.system.command_line import run_command
from support.system.errors import UserError

ROOT = Path(__file__).parent.parent.parent
QUERIES = ["How do I invert a matrix?", "What is in lentil soup?", "Who ruled Rome?"]


@pytest.fixture(scope="session")
def checkpoint(default_run):
    return str(default_run[1] / "best_model.pt")


@pytest.fixture(scope="session")
def profiled(run_demo, tmp_path_factory):
    """A run with a table of benchmarks for all models but two, which it had not seen; its folder and the table."""
    path = tmp_path_factory.mktemp("profiles") / "profiles.csv"
    rng = np.random.default_rng(0)
    names = [f"demo-model-{letter}" for letter in "abcdefghijkl"]
    pd.DataFrame({"model": [*names, "new"], **dict(zip("xyz", rng.normal(size=(3, 13)), strict=True))}).to_csv(path)
    quick = ("--limit", "500", "--epochs", "1", "--num_clusters", "5", "--embedding_dim", "32", "--baselines", "none")
    _, output = run_demo(*quick, "--capability_file", str(path))
    return str(output / "best_model.pt"), str(path)


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


def jsonl(text):
    return [json.loads(line) for line in text.splitlines()]


def test_models_are_ranked_by_the_scores_of_the_towers(checkpoint):
    router = RankRouter.load(checkpoint)
    rankings = router.rank(QUERIES, top_k=3)
    embeddings, _ = router.encoder.embed(QUERIES)
    x = router.query_tower.standardize(embeddings)
    scores = router(x, router.query_tower.assign(x)).detach().numpy()  # (Q, M)
    for row, ranking in zip(scores, rankings, strict=True):
        assert [name for name, _ in ranking] == [router.model_names[i] for i in np.argsort(-row)[:3]]
        np.testing.assert_allclose([score for _, score in ranking], np.sort(row)[::-1][:3], atol=1e-4)
    assert [len(ranking) for ranking in router.rank(QUERIES)] == [12] * 3
    some = router.rank(QUERIES, models=["demo-model-c", "demo-model-a"])
    assert all({name for name, _ in ranking} == {"demo-model-a", "demo-model-c"} for ranking in some)


def test_queries_may_repeat_and_be_any_number(checkpoint):
    router = RankRouter.load(checkpoint)
    once = router.rank(QUERIES)
    again = router.rank([QUERIES[1], QUERIES[0], f"  {QUERIES[1]}\n", QUERIES[2]])
    assert again[0] == again[2]
    for ranking, expected in zip(again, [once[i] for i in (1, 0, 1, 2)], strict=True):
        assert [name for name, _ in ranking] == [name for name, _ in expected]
    assert router.rank([]) == []
    assert len(router.rank(["\ud800 lone"])) == 1


def test_scores_and_their_probabilities_are_printed(checkpoint, routed):
    router = RankRouter.load(checkpoint)
    temperature = router.temperature
    printed = routed("--checkpoint", checkpoint, QUERIES[0], "--no_cache", "--top_k", "4").splitlines()
    assert printed[0] == QUERIES[0]
    single = router.metadata.best_single_model
    assert printed[1].split() == f"model score beats the next beats {single}, the best single model".split()
    (ranking,) = router.rank(QUERIES[:1])
    of_single = dict(ranking)[single]

    def beats(lead):
        return f"{1 / (1 + np.exp(-lead / temperature)):.0%}"

    for place, line in enumerate(printed[2:6]):
        name, score = ranking[place]
        expected = [str(place + 1), name, f"{score:.4f}", beats(score - ranking[place + 1][1])]
        assert line.split() == expected + ([] if name == single else [beats(score - of_single)])
    assert printed[6:] == [""]


def test_the_last_model_has_no_probability_of_beating_the_next(checkpoint, routed):
    printed = routed("--checkpoint", checkpoint, QUERIES[0], "--no_cache", "--models", "demo-model-a").splitlines()
    assert len(printed[2].split()) in (3, 4)  # without the column of the next
    assert printed[3:] == [""]


@pytest.mark.parametrize("form", ["txt", "crlf", "jsonl", "prompts.jsonl", "parquet", "csv", "json", "stdin"])
def test_a_batch_is_the_same_in_every_form_and_in_order(checkpoint, routed, tmp_path, monkeypatch, form):
    path = tmp_path / f"queries.{form}"
    queries = [*QUERIES, "日本の首都は? “quoted, with a comma”", QUERIES[0]]
    if form in ("txt", "stdin", "crlf"):
        text = ("\r\n" if form == "crlf" else "\n").join(queries)
        path.write_bytes(text.encode("utf-8-sig" if form == "crlf" else "utf-8"))
    elif form.endswith("jsonl"):
        field = "prompt" if form.startswith("prompts") else "query"
        path.write_text("".join(json.dumps({"id": i, field: query}) + "\n" for i, query in enumerate(queries)))
    elif form == "json":
        path.write_text(json.dumps([{"query": query} for query in queries]))
    else:
        table = pd.DataFrame({"number": range(len(queries)), "prompt": queries})
        table.to_parquet(path) if form == "parquet" else table.to_csv(path)
    if form == "stdin":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    target = tmp_path / "out.jsonl"
    source = "-" if form == "stdin" else str(path)
    flags = ("--checkpoint", checkpoint, "--no_cache", "--top_k", "2")
    assert routed(*flags, "--input", source, "--output", str(target)) == ""
    rows = jsonl(target.read_text())
    assert [row["query"] for row in rows] == queries
    expected = RankRouter.load(checkpoint).rank(queries, top_k=2)
    for row, ranking in zip(rows, expected, strict=True):
        assert list(row) == ["query", "ranking", "scores"]
        assert row["ranking"] == [name for name, _ in ranking]
        np.testing.assert_allclose(row["scores"], [score for _, score in ranking], atol=1e-4)


def test_a_stream_is_answered_as_it_arrives(checkpoint):
    command = [sys.executable, str(ROOT / "route.py"), "--checkpoint", checkpoint, "--input", "-", "--no_cache"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for query in QUERIES:
            process.stdin.write(query.encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["query"] == query  # before the next is written
        process.stdin.close()
        assert process.stdout.read() == b""
    assert process.returncode == 0


def test_a_record_that_arrives_in_pieces_is_one_record(checkpoint):
    command = [sys.executable, str(ROOT / "route.py"), "--checkpoint", checkpoint, "--input", "-", "--no_cache"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(b'{"query": ' + b" " * 2**16)  # more than a pipe holds, so it is read before the rest
        process.stdin.flush()
        out, _ = process.communicate(b'"hello"}\n')
    assert [row["query"] for row in jsonl(out.decode())] == ["hello"]


def test_a_malformed_line_is_reported_by_its_number_and_left_out(checkpoint, tmp_path, capfdbinary):
    path, target = tmp_path / "queries.jsonl", tmp_path / "out.jsonl"
    lines = ['{"query": "first"}', "{broken", '{"text": 1}', '{"query": " "}', "", '{"query": 7}', '{"query": "last"}']
    path.write_text("\n".join(lines) + "\n")
    flags = ["--checkpoint", checkpoint, "--no_cache", "--input", str(path), "--output", str(target)]
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: route.main(flags))
    assert stopped.value.code == 1
    assert [row["query"] for row in jsonl(target.read_text())] == ["first", "last"]
    reported = capfdbinary.readouterr().err.decode().splitlines()
    assert [line.split(", line ")[1].split(":")[0] for line in reported] == ["2", "3", "4", "5", "6"]
    assert all(line.endswith("; left out") for line in reported)
    target.unlink()
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: route.main([*flags, "--strict"]))
    assert stopped.value.code == 2
    assert b"line 2: no JSON" in capfdbinary.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["queries.jsonl"]  # no output of a part


def test_a_closed_pipe_ends_it_quietly(checkpoint, tmp_path):
    (tmp_path / "many.txt").write_text("".join(f"query {i}\n" for i in range(3000)))
    command = (
        f"{sys.executable} {ROOT / 'route.py'} --checkpoint {checkpoint} --no_cache --input {tmp_path / 'many.txt'}"
    )
    ended = subprocess.run(f"{command} | head -1", shell=True, capture_output=True, text=True)
    assert ended.stderr == ""
    assert json.loads(ended.stdout)["query"] == "query 0"


def test_a_second_run_reads_the_cache_and_imports_neither_transformers_nor_sklearn(checkpoint, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import route; route.main(sys.argv[1:]); "
        "print([name for name in ('transformers', 'sklearn', 'pandas') if name in sys.modules])"
    )
    flags = ["--checkpoint", checkpoint, "--cache_dir", str(tmp_path), *QUERIES]
    first, second = (
        subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert second.splitlines()[-1] == "[]"
    assert "transformers" in first.splitlines()[-1]
    assert second.splitlines()[:-1] == first.splitlines()[:-1]


def prices_of(tmp_path, checkpoint, **changes):
    names = RankRouter.load(checkpoint).model_names
    prices = {name: 0.001 * (i + 1) for i, name in enumerate(names)} | changes
    pd.DataFrame({"model": prices.keys(), "price_per_query": prices.values()}).to_csv(tmp_path / "prices.csv")
    return str(tmp_path / "prices.csv"), prices


def test_a_cost_weight_ranks_by_score_minus_weighted_price(checkpoint, routed, tmp_path, capsys):
    path, prices = prices_of(tmp_path, checkpoint)
    (tmp_path / "q.txt").write_text("\n".join(QUERIES))
    flags = ("--checkpoint", checkpoint, "--no_cache", "--prices", path, "--input", str(tmp_path / "q.txt"))
    rows = jsonl(routed(*flags, "--cost_weight", "200"))
    scores = RankRouter.load(checkpoint).rank(QUERIES)
    for row, ranking in zip(rows, scores, strict=True):
        utility = {name: score - 200 * prices[name] for name, score in ranking}
        assert row["ranking"] == sorted(utility, key=utility.get, reverse=True)
        np.testing.assert_allclose(row["scores"], [dict(ranking)[name] for name in row["ranking"]], atol=1e-4)
        assert row["prices"] == [prices[name] for name in row["ranking"]]


def test_a_budget_holds_for_the_mean_of_the_batch(checkpoint, tmp_path, capsys):
    path, prices = prices_of(tmp_path, checkpoint)
    queries = [f"{query} {i}" for i in range(30) for query in QUERIES]
    (tmp_path / "q.txt").write_text("\n".join(queries))
    flags = ["--checkpoint", checkpoint, "--no_cache", "--prices", path, "--input", str(tmp_path / "q.txt")]
    route.main([*flags, "--budget", "0.004"])
    printed = capsys.readouterr()
    spent = np.mean([prices[row["ranking"][0]] for row in jsonl(printed.out)])
    assert 0.003 < spent <= 0.004
    assert f"mean {spent:.6g} of at most 0.004 per query" in printed.err


def test_the_curve_leaves_out_what_the_router_was_trained_on(checkpoint, demo, routed, tmp_path, monkeypatch):
    path, prices = prices_of(tmp_path, checkpoint)
    source, target = str(demo / "battles.parquet"), str(tmp_path / "curve.jsonl")
    flags = ("--checkpoint", checkpoint, "--no_cache", "--prices", path, "--curve")
    printed = routed(*flags, source)
    assert "on 904 battles" in printed
    assert "left out 977 ties, 0 battles of other models, 8130 on queries that the router was trained on" in printed
    routed(*flags, source, "--output", target)
    points = jsonl(Path(target).read_text())
    router, test = RankRouter.load(checkpoint), split_battles(load_battles(source)[0], 42)[0].test
    queries = test.unique_queries
    d = test.margins(router.scores_of([test.queries[i] for i in queries]))
    assert points[0]["worth"] == pytest.approx(np.mean((d > 0) == test.outcome))  # accuracy
    assert points[0]["cost_weight"] == 0
    pair = np.array([prices[name] for name in test.model_names])[np.column_stack([test.model_a_idx, test.model_b_idx])]
    assert points[-1]["mean_price"] == pytest.approx(pair.min(1).mean())
    assert points[-1]["worth"] == pytest.approx(np.mean((pair[:, 0] < pair[:, 1]) == test.outcome))
    costs = [point["mean_price"] for point in points]
    assert costs == sorted(costs, reverse=True)
    np.testing.assert_allclose(costs, np.linspace(costs[0], costs[-1], 11), atol=1e-5)
    printed = routed(*flags, source, "--models", "demo-model-a,demo-model-b")
    pair = [test.model_names.index(f"demo-model-{letter}") for letter in "ab"]
    both = np.isin(test.model_a_idx, pair) & np.isin(test.model_b_idx, pair)
    assert f"on {both.sum()} battles" in printed
    pd.read_parquet(source)[::-1].to_parquet(tmp_path / "other.parquet", compression="gzip")  # the same in other bytes
    assert "on 904 battles" in routed(*flags, str(tmp_path / "other.parquet"))


def test_the_curve_on_a_score_table_shows_the_chosen_models_scores(checkpoint, routed, tmp_path):
    path, _ = prices_of(tmp_path, checkpoint)
    names = ["demo-model-a", "demo-model-b", "demo-model-c", "stranger"]
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"prompt": [f"prompt {i}" for i in range(50)], **{name: rng.random(50) for name in names}})
    table.loc[0, "demo-model-b"] = np.nan
    table.loc[50] = ["prompt 50", 0.5, np.nan, np.nan, 0.1]  # one model of the router alone
    table.to_parquet(tmp_path / "table.parquet")
    target = str(tmp_path / "curve.jsonl")
    flags = ("--checkpoint", checkpoint, "--no_cache", "--prices", path, "--curve", str(tmp_path / "table.parquet"))
    printed = routed(*flags)
    assert "on 50 rows of a score table" in printed
    assert "left out 1 rows without two of these models" in printed
    table = table[:50]
    routed(*flags, "--output", target)
    points = jsonl(Path(target).read_text())
    router = RankRouter.load(checkpoint)
    ranked = router.rank(list(table["prompt"]), models=names[:3])
    best = [
        next(name for name, _ in ranking if not np.isnan(row[name]))
        for ranking, (_, row) in zip(ranked, table.iterrows(), strict=True)
    ]
    assert points[0]["worth"] == pytest.approx(np.mean([table.loc[i, name] for i, name in enumerate(best)]))
    assert points[-1]["worth"] == pytest.approx(table["demo-model-a"].mean())  # the cheapest
    assert points[-1]["mean_price"] == pytest.approx(0.001)


def new_battles(demo, tmp_path, renamed="demo-model-c", name="new", rows=400):
    """Battles of a known model under a new name, and some of others."""
    table = pd.read_parquet(demo / "battles.parquet")
    of_model = (table["model_a"] == renamed) | (table["model_b"] == renamed)
    table = pd.concat([table[of_model][:rows], table[~of_model][:20]])
    for column in ("model_a", "model_b"):
        table[column] = table[column].replace({renamed: name})
    table.to_parquet(tmp_path / "new.parquet")
    return str(tmp_path / "new.parquet")


@pytest.mark.parametrize("init", ["random", "win_rate"])
def test_a_model_is_added_from_battles_and_the_others_keep_their_scores(run_demo, demo, routed, tmp_path, init):
    quick = ("--limit", "600", "--epochs", "1", "--num_clusters", "6", "--baselines", "none")
    _, output = run_demo(*quick, "--capability_init", init)
    source, target = str(output / "best_model.pt"), str(tmp_path / "wider.pt")
    battles = new_battles(demo, tmp_path)
    flags = ("--no_cache", "--add_model", "new", "--battles", battles)
    printed = routed("--checkpoint", source, *flags, "--save", target)
    assert "20 others left out" in printed
    assert "13 models" in printed
    narrow, wide = RankRouter.load(source), RankRouter.load(target)
    assert wide.model_names == [*narrow.model_names, "new"]
    queries = [f"{query} {i}" for i in range(20) for query in QUERIES]
    assert np.array_equal(wide.scores_of(queries)[:, :12], narrow.scores_of(queries))
    assert torch.equal(wide.query_tower.mean, narrow.query_tower.mean)
    (added,) = wide.metadata.added_models
    assert (added["model"], added["from"]) == ("new", "battles")
    # And a model more after it.
    more = new_battles(demo, tmp_path, name="newer")
    routed("--checkpoint", target, "--no_cache", "--add_model", "newer", "--battles", more, "--save", source + ".2")
    again = RankRouter.load(source + ".2")
    assert np.array_equal(again.scores_of(queries)[:, :13], wide.scores_of(queries))
    assert [added["model"] for added in again.metadata.added_models] == ["new", "newer"]
    assert [added["battles"] for added in again.metadata.added_models] == [400, 400]
    own = load_battles(battles)[0]
    own = battles_of(own, "newer", narrow.model_names)
    ids = query_ids([own.queries[i] for i in own.unique_queries])
    assert set(ids) <= set(wide.metadata.seen_queries.tolist())
    assert not set(ids) <= set(narrow.metadata.seen_queries.tolist())


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
    add = ("--checkpoint", checkpoint, "--no_cache", "--save", target)
    assert "knows demo-model-c already" in refused(*add, "--add_model", "demo-model-c", "--battles", battles)
    line = refused(*add, "--add_model", "newest", "--battles", battles)
    assert "no battle of newest against a model of the router; it has demo-model-a" in line
    assert "use --battles" in refused(*add, "--add_model", "new", "--profile", profiled[1])
    same = ("--checkpoint", checkpoint, "--no_cache", "--add_model", "new", "--battles", battles, "--save", checkpoint)
    assert f"--save {checkpoint} would replace an input" in refused(*same)
    assert "--save" in refused(
        "--checkpoint", checkpoint, "--add_model", "new", "--battles", battles, "--save", battles
    )
    surrogate = ("--checkpoint", checkpoint, "--no_cache", "--save", target, "--add_model", "new\ud800")
    assert "cannot name a model" in refused(*surrogate, "--battles", battles)
    add = ("--checkpoint", profiled[0], "--no_cache", "--save", target)
    assert "no row for newest" in refused(*add, "--add_model", "newest", "--profile", profiled[1])
    for row, expected in {
        "model,x,y\nnew,1,2": "lacks z",
        "model,x,y,z\nnew,1,2,500": "z of new lies more than 10 standard deviations from the models of training",
        "model,x,y,z\nnew,1,2,-500": "z of new lies more than 10 standard deviations from the models of training",
        "model,x,y,z\nnew,,,": "has no number for new; expected at least one benchmark",
    }.items():
        (tmp_path / "new.csv").write_text(row + "\n")
        assert expected in refused(*add, "--add_model", "new", "--profile", str(tmp_path / "new.csv"))
    assert not Path(target).exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "expected one of queries, --input, --curve, --add_model, got none"),
        (("q", "--input", "x"), "got queries and --input"),
        (("",), "query 1 is empty"),
        (("good", " \n"), "query 2 is empty"),
        (("q", "--top_k", "0"), "--top_k"),
        (("q", "--models", "demo-model-a,gpt-5"), "gpt-5: not among the models that the router knows"),
        (("q", "--models", "demo-model-a,,b"), "expected names separated by commas"),
        (("q", "--cost_weight", "1"), "need --prices"),
        (("q", "--budget", "0"), "need --prices"),
        (("q", "--prices", "p", "--cost_weight", "1", "--budget", "1"), "exclude each other"),
        (("q", "--prices", "/nowhere"), "cannot read /nowhere"),
        (("--curve", "x"), "need --prices"),
        (("--add_model", "x"), "--add_model needs --save"),
        (("q", "--save", "x"), "--save: no effect with queries"),
        (("q", "--strict"), "--strict: no effect with queries"),
        (("--curve", "x", "--top_k", "2", "--budget", "1"), "--budget, --top_k: no effect with --curve"),
        (("--add_model", "x", "--models", "a"), "--models: no effect with --add_model"),
        (("q", "--output", ""), "--output: expected a path, got ''"),
        (("--add_model", " ", "--battles", "x", "--save", "y"), "--add_model: expected a name, got ' '"),
        (("q", "--models", "a\nb"), "expected names separated by commas"),
        (("q", "--prices", "p", "--cost_weight", "1e300"), "expected a number from 0 to 1e15"),
        (("q", "--model_path", "/nowhere"), "no model folder at /nowhere"),
        (("q", "--device", "tpu"), "--device 'tpu'"),
        (("--input", "/nowhere"), "cannot read /nowhere: No such file"),
        (("--input", str(ROOT)), "cannot read"),
        (("q", "--output", "/nowhere/out"), "--output /nowhere/out: its folder does not exist"),
        (("q", "--output", str(ROOT)), f"cannot write {ROOT}"),
        (("q", "--nonsense"), "unrecognized arguments"),
    ],
)
def test_bad_flags_end_in_one_line(checkpoint, refused, flags, expected):
    assert expected in refused("--checkpoint", checkpoint, "--no_cache", *flags)


def test_an_output_does_not_replace_what_is_read(checkpoint, refused, tmp_path):
    (tmp_path / "q.txt").write_text("hello\n")
    (tmp_path / "link").symlink_to("q.txt")
    for output in (str(tmp_path / "q.txt"), str(tmp_path / "link"), checkpoint):
        line = refused("--checkpoint", checkpoint, "--input", str(tmp_path / "q.txt"), "--output", output)
        assert "would replace an input" in line
    assert (tmp_path / "q.txt").read_text() == "hello\n"


def test_a_pipe_or_a_link_as_output_is_written_through(checkpoint, routed, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    flags = ["--checkpoint", checkpoint, "--no_cache", QUERIES[0], "--output", str(tmp_path / "pipe")]
    with subprocess.Popen([sys.executable, ROOT / "route.py", *flags], cwd=ROOT) as process:
        assert json.loads((tmp_path / "pipe").read_text())["query"] == QUERIES[0]
    assert process.returncode == 0
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o600)
    (tmp_path / "link").symlink_to("file")
    routed(*flags[:-1], str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "file").read_text())["query"] == QUERIES[0]
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("redirect", [">&-", "<&-"])
def test_closed_streams_are_reported_in_one_line(checkpoint, tmp_path, redirect):
    (tmp_path / "q.txt").write_text("hello\n")
    source = "-" if redirect == "<&-" else tmp_path / "q.txt"
    command = f"{sys.executable} route.py --checkpoint {checkpoint} --no_cache --input {source} {redirect}"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "is closed" in line


@pytest.mark.parametrize("form", ["first line bad", "surrogate", "gzip", "ndjson"])
def test_json_lines_are_recognized_also_where_the_first_is_bad(checkpoint, tmp_path, capsys, form):
    lines = ['{"query": "alpha \\ud800"}' if form == "surrogate" else '{"query": "alpha"}', '{"query": "beta"}']
    if form in ("first line bad", "ndjson"):
        lines.insert(0, "oops" if form == "first line bad" else "[1]")
    path = tmp_path / ("q.NDJSON" if form == "ndjson" else "q.gz" if form == "gzip" else "q")
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if form == "gzip" else content)
    flags = ["--checkpoint", checkpoint, "--no_cache", "--input", str(path), "--top_k", "1"]
    if len(lines) == 3:
        with pytest.raises(SystemExit) as stopped:
            route.main(flags)
        assert stopped.value.code == 1
    else:
        route.main(flags)
    queries = [row["query"] for row in jsonl(capsys.readouterr().out)]
    assert queries == ["alpha \ufffd" if form == "surrogate" else "alpha", "beta"]


def test_rows_of_new_battles_that_cannot_be_used_are_counted(checkpoint, demo, tmp_path, routed):
    table = pd.read_parquet(new_battles(demo, tmp_path, rows=30))
    table.loc[table.index[:7], "winner"] = "MODEL_B"
    table.to_parquet(tmp_path / "new.parquet")
    flags = ("--add_model", "new", "--battles", str(tmp_path / "new.parquet"), "--save", str(tmp_path / "wider.pt"))
    printed = routed("--checkpoint", checkpoint, "--no_cache", *flags)
    assert "50 rows, dropped: 7 with an unknown winner" in printed
    assert "battles  23 of new" in printed


def test_the_python_interface_takes_any_iterable_and_refuses_a_single_text(checkpoint):
    router = RankRouter.load(checkpoint)
    expected = router.rank(QUERIES, top_k=1)
    assert router.rank((query for query in QUERIES), top_k=1) == expected
    assert len(router.rank(QUERIES, models=iter(["demo-model-a", "demo-model-a"]))[0]) == 1
    router.train()
    assert router.rank(QUERIES, top_k=1) == expected
    for arguments, message in (
        (("one text",), "expected a list of texts"),
        ((["a", 3],), "query 2 is 3"),
        ((QUERIES, 0), "top_k is 0"),
        ((QUERIES, -1), "top_k is -1"),
    ):
        with pytest.raises(UserError, match=message):
            router.rank(*arguments)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"good\n\xff\xfe bad\n", "is not UTF-8 in line 2; convert it"),
        ("caf\u00e9\n".encode("latin-1"), "is not UTF-8 in line 1"),
        (b"good\nq\0uery\n", "holds binary data in line 2"),
        ("hello".encode("utf-16"), "line 1"),
        (bytes(range(256)) * 10, "line 1"),
        (b"PAR1 but no table", "cannot read"),
    ],
)
def test_a_file_that_is_not_text_is_refused(checkpoint, refused, tmp_path, content, expected):
    (tmp_path / "queries").write_bytes(content)
    assert expected in refused("--checkpoint", checkpoint, "--no_cache", "--input", str(tmp_path / "queries"))


def test_a_table_without_queries_is_refused(checkpoint, refused, tmp_path):
    (tmp_path / "queries.csv").write_text("id,text\n1,hello\n")
    line = refused("--checkpoint", checkpoint, "--no_cache", "--input", str(tmp_path / "queries.csv"))
    assert "has the columns id, text; expected one of query, prompt, question" in line


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut"])
def test_a_file_that_is_not_a_checkpoint_is_refused(refused, tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    assert "is not a RankRouter checkpoint" in refused("--checkpoint", str(tmp_path / "c.pt"), "q")
    assert "cannot read the checkpoint" in refused("--checkpoint", str(tmp_path / "none.pt"), "q")


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


def test_an_empty_input_gives_an_empty_output(checkpoint, routed, tmp_path):
    (tmp_path / "none.txt").write_text("")
    path, _ = prices_of(tmp_path, checkpoint)
    flags = ("--checkpoint", checkpoint, "--no_cache", "--input", str(tmp_path / "none.txt"))
    assert routed(*flags) == ""
    assert routed(*flags, "--prices", path, "--budget", "1") == ""


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
        assert stopped.value.code == code
        out, err = capfd.readouterr()
        assert "[31mred folder" in out + err
        assert all(line.isprintable() for line in [*out.split("\n"), *err.split("\n")])
