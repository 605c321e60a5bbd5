"""Malicious and damaged inputs: data, checkpoints, names, encoders."""

import csv
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

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
from query_representation import QueryEncoder
from rankrouter import RankRouter
from support.data.formats import open_table
from support.system.errors import UserError
from support.system.safe_torch import read_checkpoint

ROOT = Path(__file__).parent.parent.parent

# --- the loader: any table in or near the layouts ------------------------------------------------------------

ODD = [
    "\0",
    "\x1b[31m",
    "\u202eright to left",
    "\ud800",
    "a\r\nb",
    "\u2028",
    "🦙" * 3,
    " padded ",
    "NA",
    "null",
    "1e400",
]
texts = st.one_of(st.text(max_size=6), st.sampled_from(ODD), st.text(st.characters(), max_size=3))
names = st.one_of(st.sampled_from(["gpt", "claude", "llama/7b", "a, b"]), texts)
numbers = st.one_of(st.floats(), st.integers(-(2**80), 2**80), st.integers(0, 3), st.sampled_from([10**400, -0.0]))
anything = st.one_of(
    st.none(),
    texts,
    numbers,
    st.booleans(),
    st.lists(st.one_of(texts, numbers), max_size=3),
    st.dictionaries(texts, numbers, max_size=2),
)
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
LAYOUTS = {
    "conversations": table_of(
        {**sides, "winner": winner, "conversation_a": st.lists(mostly(turn), max_size=3)}, {"x": anything}
    ),
    "prompts": table_of({**sides, "winner": winner, "prompt": texts}, {"prompt_id": anything}),
    "one-hot": table_of({**sides, "prompt": texts, **{f"winner_{w}": flag for w in ("model_a", "model_b", "tie")}}, {}),
    "wide": table_of({"prompt": texts, "gpt": numbers, "claude": numbers}, {"llama": numbers, "cost|x": anything}),
    "nested": table_of({"question": texts, "scores": st.dictionaries(names, numbers, max_size=3)}, {}),
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_any_table_loads_with_counts_that_add_up_or_ends_in_one_line(tmp_path_factory, layout, kind):
    path = tmp_path_factory.mktemp("any") / f"a.{kind}"
    loaded = []

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(rows=LAYOUTS[layout])
    def check(rows):
        write(kind, rows, path)
        try:
            battles, counts = load_battles(str(path))
        except UserError as error:
            assert str(error)
            return
        loaded.append(len(battles))
        dropped = sum(counts["rows_dropped"].values())
        (layout_read,) = counts["layouts"]
        assert counts["rows_read"] == num_rows(path)
        if layout_read in ("conversations", "prompts"):
            assert len(battles) + dropped == counts["rows_read"]
        elif layout_read == "long":
            assert np.isfinite(battles.table.scores).sum() + dropped == counts["rows_read"]
        else:
            assert len(battles.table.scores) + dropped == counts["rows_read"]
        assert all(query.strip() and query.encode() for query in battles.queries)
        assert all(name.strip() and name.encode() for name in battles.model_names)
        assert (battles.model_a_idx != battles.model_b_idx).all()
        assert set(battles.outcome) <= {0, 0.5, 1}
        json.dumps(counts, allow_nan=False)
        try:
            split_battles(battles, 0, ties="half")
        except UserError as error:
            assert "the split leaves no battle" in str(error)

    check()
    assert len(loaded) >= 5 or layout == "near"


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


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    train.main([*small, "--output_dir", str(output)])
    return output


def rewritten(path, change):
    """The records of a checkpoint's archive, changed, as an archive whose checksums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        change(new, {record: old.read(record) for record in old.namelist()})
    return buffer.getvalue()


class Payload:
    def __reduce__(self):
        return exec, ("open('/tmp/rankrouter-payload-ran', 'w')",)


def with_a_call(new, records):
    for name, content in records.items():
        new.writestr(name, pickle.dumps(Payload(), protocol=2) if name.endswith("data.pkl") else content)


def bomb(new, records):
    for name, content in records.items():
        new.writestr(name, content)
    new.writestr("archive/data/bomb", bytes(10**8), zipfile.ZIP_DEFLATED)


def with_a_path(new, records):
    for name, content in records.items():
        new.writestr(name, content)
    new.writestr("archive/../../../tmp/rankrouter-payload-ran", b"x")


@pytest.mark.parametrize("change", [with_a_call, bomb, with_a_path])
@pytest.mark.parametrize("name", ["best_model.pt", "last_checkpoint.pt"])
def test_a_checkpoint_with_a_call_a_bomb_or_a_path_is_refused_and_none_of_it_runs(
    small, trained, tmp_path, fails, change, name
):
    output = tmp_path / "out"
    shutil.copytree(trained, output)
    (output / name).write_bytes(rewritten(trained / name, change))
    if name == "best_model.pt":
        with pytest.raises(UserError, match="is not a RankRouter checkpoint") as error:
            RankRouter.load(output / name)
        assert "\n" not in str(error.value)
    else:
        assert "is not a RankRouter checkpoint" in fails(*small, "--output_dir", str(output), "--resume")
    assert not Path("/tmp/rankrouter-payload-ran").exists()


def huge(checkpoint):
    checkpoint["config"]["embedding_dim"] = 2**40


def many(checkpoint):
    checkpoint["model_names"] = [str(i) for i in range(200_000)]


def thin(checkpoint):
    for name, tensor in checkpoint["model_state_dict"].items():
        checkpoint["model_state_dict"][name] = torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)


def seen_forever(checkpoint):
    checkpoint["seen_queries"] = torch.zeros(1, dtype=torch.int64).expand(10**15)


def doubled(checkpoint):
    weights = checkpoint["model_state_dict"]
    weights["query_tower.mean"] = weights["query_tower.mean"].double()


@pytest.mark.parametrize("change", [huge, many, thin, seen_forever, doubled])
def test_a_checkpoint_that_claims_more_than_it_holds_is_refused_without_using_the_memory(trained, tmp_path, change):
    checkpoint = torch.load(trained / "best_model.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "c.pt")
    with pytest.raises(UserError, match="RankRouter checkpoint"):
        RankRouter.load(tmp_path / "c.pt")


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
TRAINING = ("router", "encoder", "optimizer", "ema", "random", "order", "losses")
CURVES = ("train_losses", "val_metrics", "validations", "best", "seconds")
LAST_DAMAGES = [
    *(put(name, value=None) for name in ("experiment", "embeddings_hash", "phase", "curves", "training")),
    *(put("training", name, value=None) for name in TRAINING),
    *(put("curves", "towers", name, value=None) for name in CURVES),
    put("format_version", value=None),
    *(put("format_version", value=value) for value in (3, torch.zeros(2))),
    *(put("phase", value=value) for value in ("ablation", 3)),
    *(put("training", "router", value=value) for value in ([], "x", {})),
    *(put("training", "router", "query_tower.mean", value=value) for value in (None, torch.zeros(3), 5)),
    put("training", "router", "another", value=torch.zeros(3)),
    put("training", "encoder", "another", value=torch.zeros(3)),
    *(put("training", "optimizer", "param_groups", value=value) for value in ([], "x")),
    *(
        put("training", "optimizer", "state", 0, "exp_avg", value=value)
        for value in (torch.zeros(3), "x", torch.zeros(1).expand(10**6, 10**6))
    ),
    put("training", "ema", "averages", 0, value=torch.zeros(3)),
    put("training", "ema", "averages", value=[]),
    *(put("training", "random", "python", value=value) for value in ("x", (3, -torch.ones(625).long(), None))),
    *(put("curves", "towers", "best", value=value) for value in ("x", {}, {"weights": {}, "metadata": {}})),
    put("curves", "towers", "best", "weights", "query_tower.mean", value=torch.zeros(3)),
    put("curves", "towers", "train_losses", value=[NAN]),
    put("curves", "towers", "seconds", "train", value="x"),
    *(put("experiment", "--lr", value=value) for value in (torch.ones(2), "x" * 10**6)),
]


@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """The folder of a run that was stopped within its second epoch."""
    output = tmp_path_factory.mktemp("stopped")
    train_step, calls = train.train_step, []

    def stops(*args):
        calls.append(None)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return train_step(*args)

    with pytest.MonkeyPatch.context() as patch:
        every_step(patch.setattr)
        patch.setattr(train, "train_step", stops)
        with pytest.raises(KeyboardInterrupt):
            train.main([*small, "--output_dir", str(output)])
    return output


def test_a_damaged_last_checkpoint_is_refused_and_costs_no_best_checkpoint(small, stopped, tmp_path, fails):
    path, best, history = (tmp_path / name for name in ("last_checkpoint.pt", "best_model.pt", "training_history.json"))
    flags, expected = [*small, "--output_dir", str(tmp_path)], RankRouter.load(stopped / "best_model.pt").state_dict()
    for number, change in enumerate(LAST_DAMAGES):
        checkpoint = torch.load(stopped / "last_checkpoint.pt", weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)
        shutil.copy(stopped / "best_model.pt", best)
        history.unlink(missing_ok=True)
        message = fails(*flags, "--resume")
        assert len(message) < 1500, number
        refused = "is not a RankRouter checkpoint|of another experiment|has checkpoint format|do not fit its encoder"
        assert re.search(refused, message), number
        assert same(RankRouter.load(best).state_dict(), expected), number
    shutil.copy(stopped / "last_checkpoint.pt", path)
    train.main([*flags, "--resume"])


def protocol_4(new, records):
    """torch's unpickler warns of this protocol, and then fails."""
    for name, content in records.items():
        new.writestr(name, pickle.dumps(Payload(), protocol=4) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("command", ["route.py", "train.py"])
def test_the_message_of_a_damaged_checkpoint_is_all_that_stderr_has(small, trained, tmp_path, command):
    name = {"route.py": "best_model.pt", "train.py": "last_checkpoint.pt"}[command]
    (tmp_path / name).write_bytes(rewritten(trained / name, protocol_4))
    flags = {
        "route.py": ["a query", "--checkpoint", str(tmp_path / name), "--no_cache"],
        "train.py": [*small, "--output_dir", str(tmp_path), "--resume"],
    }[command]
    # A process of its own: pytest would catch the warning, also in a forked one.
    ended = subprocess.run([sys.executable, command, *flags], cwd=ROOT, capture_output=True, text=True)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2
    assert line.startswith(f"error: {tmp_path / name} is not a RankRouter checkpoint")


@pytest.mark.parametrize(
    "change",
    [
        put("encoder", "dtype", value="load"),
        put("config", "dropout", value=NAN),
        put("config", "embedding_dim", value=0),
        put("config", "similarity_metric", value="zz"),
        put("config", "scale_dot", value=5),
        put("config", "use_model_id", value="yes"),
        put("config", "another", value=1),
        put("config", value=None),
        put("args", "pooling", value="zzz"),
        put("args", "max_length", value=0),
    ],
)
def test_a_best_checkpoint_with_an_invalid_value_is_refused(trained, tmp_path, capfd, change):
    checkpoint = torch.load(trained / "best_model.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "c.pt")
    capfd.readouterr()
    with pytest.raises(UserError, match="RankRouter checkpoint"):
        RankRouter.load(tmp_path / "c.pt")
    assert capfd.readouterr().err == ""


def test_a_checkpoint_is_a_file(tmp_path):
    for path in ("/dev/zero", tmp_path):
        with pytest.raises(UserError, match="is not a file"):
            read_checkpoint(path, 2)


def test_a_checkpoint_does_not_make_us_download(trained, tmp_path, monkeypatch):
    checkpoint = torch.load(trained / "best_model.pt", weights_only=True)
    checkpoint["encoder"] |= {"path": "somebody/elses"}
    torch.save(checkpoint, tmp_path / "c.pt")
    requested = []

    def snapshot_download(hub_id, local_files_only, **_):
        requested.append((hub_id, local_files_only))
        raise FileNotFoundError(hub_id)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="has not been downloaded; --model_path somebody/elses"):
        RankRouter.load(tmp_path / "c.pt").rank(["a query"])
    assert requested == [("somebody/elses", True)]


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


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_of_an_encoder_is_one_line_or_does_no_harm(small, demo, tmp_path, capfd, file):
    content, rng = (demo / "encoder" / file).read_bytes(), np.random.default_rng(0)
    cuts = [content[: rng.integers(len(content))] for _ in range(5)]
    flips = []
    for _ in range(15):
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        flips.append(bytes(flipped))
    shutil.copytree(demo / "encoder", tmp_path / "encoder")
    refused = 0
    for damaged in [*WRONG, *cuts, *flips]:
        (tmp_path / "encoder" / file).write_bytes(damaged)
        capfd.readouterr()
        try:
            QueryEncoder(tmp_path / "encoder", torch.device("cpu"), progress=False).embed(["a query", "another one"])
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        assert capfd.readouterr().err == ""
    assert refused >= 10 or file == "tokenizer_config.json"
