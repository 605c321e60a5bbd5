"""Training from Python: battles of tuples, the same result as the command, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import train
from data_loader import Battles, load_battles
from rankrouter import RankRouter
from support.routing.new_model import add_from_battles
from support.system.errors import UserError
from train import train_router

ROOT = Path(__file__).parent.parent.parent
TINY = {"num_clusters": 3, "embedding_dim": 8, "capability_dim": 4, "batch_size": 40, "dtype": "float32"}


@pytest.fixture(scope="module")
def rows(small):
    """The battles of the small run as tuples."""
    table = pd.read_parquet(small[small.index("--data_path") + 1])
    queries = table["conversation_a"].map(lambda turns: turns[0]["content"])
    return list(zip(queries, table["model_a"], table["model_b"], table["winner"], strict=True))


def test_battles_of_tuples_are_those_of_a_file(rows, small):
    one, (other, _) = Battles.from_tuples(rows), load_battles(small[small.index("--data_path") + 1])
    assert (one.queries, one.model_names) == (other.queries, other.model_names)
    for name in ("query_idx", "model_a_idx", "model_b_idx", "outcome"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_winners_are_sides_or_names_and_spellings_of_white_space_are_one_query():
    battles = [("a  b", "x", "y", "model_a"), (" a\nb", "x", "y", "y"), ("c", "y", "x", "tie"), ("c", "y", "x", "x")]
    result = Battles.from_tuples(battles)
    assert result.queries == ["a  b", "c"]
    assert result.outcome.tolist() == [1, 0, 0.5, 0]
    assert result.model_a_idx.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("battle", "message"),
    [
        (("q", "x", "y"), r"battle 2, \('q', 'x', 'y'\), is no tuple of query, model a, model b and winner"),
        ("text", "battle 2, text, is no tuple of query, model a, model b and winner"),
        ((" ", "x", "y", "x"), "the query of battle 2 is empty, expected text"),
        (("q", "x", "x", "x"), "battle 2, .*, is model against itself"),
        (("q", "x", "y", 1), "battle 2, .*, is with an unknown winner; expected as winner model_a, model_b, tie"),
        (("q", "b", "a", "a"), "battle 2, .*, is with an unknown winner; expected as winner model_a, model_b, tie"),
        (("q", "", "y", "y"), "battle 2, .*, is without a model name"),
    ],
)
def test_a_tuple_that_is_no_battle_is_named(battle, message):
    with pytest.raises(UserError, match=message):
        Battles.from_tuples([("q", "x", "y", "tie"), battle])


def test_the_hash_of_battles_is_of_their_content(rows):
    one, other = Battles.from_tuples(rows), Battles.from_tuples(rows[:-1])
    before = one.content_hash()
    assert len(one.unique_queries) > 0  # is then cached
    assert one.content_hash() == before == Battles.from_tuples(rows).content_hash()
    assert other.content_hash() != before
    renamed = [(f"{query}!", *others) for query, *others in rows]
    assert Battles.from_tuples(renamed).content_hash() != before


def test_no_battles_are_refused_and_chat_messages_are_queries():
    with pytest.raises(UserError, match="there is no battle; expected tuples"):
        Battles.from_tuples([])
    chat = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Bye"}]
    assert Battles.from_tuples([(chat, "x", "y", "x")]).queries == ["Hi"]


def test_a_router_of_python_is_that_of_the_command(rows, demo, tmp_path, capsys):
    encoder, cache = str(demo / "encoder"), str(tmp_path / "cache")
    router = train_router(
        Battles.from_tuples(rows), encoder, str(tmp_path / "python"), epochs=2, seed=3, cache_dir=cache, **TINY
    )
    pd.DataFrame(rows, columns=["prompt", "model_a", "model_b", "winner"]).to_csv(tmp_path / "battles.csv", index=False)
    flags = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    places = ["--data_path", str(tmp_path / "battles.csv"), "--model_path", encoder, "--cache_dir", cache]
    train.main([*places, *flags, "--epochs", "2", "--seed", "3", "--output_dir", str(tmp_path / "command")])
    one, other = (json.loads((tmp_path / name / "training_history.json").read_text()) for name in ("python", "command"))
    for key in ("train_losses", "val_metrics", "test_metrics", "test_intervals", "baselines"):
        assert one[key] == other[key], key
    assert (one["data"]["path"], one["data"]["rows_read"]) == ("memory", 320)
    loaded = RankRouter.load(tmp_path / "command/best_model.pt")
    assert router.rank(["A query"]) == loaded.rank(["A query"])

    again = train_router(
        tmp_path / "battles.csv", encoder, tmp_path / "file", epochs=2, seed=3, cache_dir=cache, **TINY
    )
    assert again.rank(["A query"]) == router.rank(["A query"])
    new = [(query, "new", b, "new") for query, _, b, _ in rows[:20]]
    own = add_from_battles(router, "new", Battles.from_tuples(new + rows[20:40]))
    assert len(own) == 20
    assert router.model_names[-1] == "new"
    assert router.metadata.added_models == [{"model": "new", "from": "battles", "battles": 20}]


def test_memory_resumes_only_with_the_same_battles(rows, demo, tmp_path, capsys):
    places = (str(demo / "encoder"), str(tmp_path))
    train_router(Battles.from_tuples(rows), *places, epochs=1, baselines="none", **TINY)
    train_router(Battles.from_tuples(rows), *places, epochs=1, baselines="none", resume=True, **TINY)
    assert "finished already" in capsys.readouterr().out
    for other in ([(query, b, a, "tie") for query, a, b, _ in rows[:1]], [(f"{rows[0][0]}!", *rows[0][1:])]):
        with pytest.raises(UserError, match="of another experiment: the content of --data_path"):
            battles = Battles.from_tuples(other + rows[1:])
            train_router(battles, *places, epochs=1, baselines="none", resume=True, **TINY)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"epoch": None}, "epoch: no flag of that name; expected some of data_path"),
        ({"epochs": 0}, "--epochs: expected a whole number of at least 1"),
        ({"loss_type": "nope"}, "'nope' is unknown; expected one of bpr"),
        (
            {"query_column": "prompt", "split_column": "x"},
            "query_column, split_column: columns of files; leave them out",
        ),
        ({"hold_out_model": ["gone"]}, "no model is named 'gone'"),
        ({"layers": np.array([7])}, "the encoder has the layers 1 to 2, not 7"),
        ({"split_by": "task"}, "needs two groups of queries or more"),
    ],
)
def test_what_does_not_fit_is_refused(flags, message, rows, demo, tmp_path):
    with pytest.raises(UserError, match=message):
        train_router(Battles.from_tuples(rows), str(demo / "encoder"), str(tmp_path), **TINY | flags)


def test_other_data_than_battles_and_paths_are_refused(rows, demo):
    for battles in (rows, None):
        with pytest.raises(UserError, match=r"battles are (list|NoneType); expected a path, or Battles, as of Battles"):
            train_router(battles, str(demo / "encoder"))


def test_a_limit_holds_in_memory(rows, demo, tmp_path):
    places, flags = (str(demo / "encoder"), str(tmp_path)), TINY | {"epochs": 1, "baselines": "none", "limit": 60}
    train_router(Battles.from_tuples(rows), *places, **flags)
    counts = json.loads((tmp_path / "training_history.json").read_text())["data"]
    assert (counts["queries"], counts["queries_outside_limit"]) == (60, 127 - 60)


def test_the_package_needs_no_command_line():
    code = "import sys, rankrouter; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "support.encoding.encoder" in result.split()
    assert not {"support.system.command_line", "support.training.options"} & set(result.split())
