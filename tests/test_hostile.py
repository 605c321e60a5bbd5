"""Inputs by somebody who means no good, or whose disk does not: data, checkpoints, names, encoders."""

import csv
import io
import json
import pickle
import re
import shutil
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import report
import route
import train
from data_loader import load_battles, split_battles
from rankrouter import RankRouter
from support.checkpoints import read_checkpoint
from support.encoder import find_encoder, load_encoder
from support.files import UserError
from support.tables import open_table

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
    """Cells that are as they should be, and now and then are not."""
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
    """Write the rows, as far as the format can hold them; a cell that it cannot is a text there."""
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
        (found,) = counts["layouts"]
        assert counts["rows_read"] == num_rows(path)
        if found in ("conversations", "prompts"):
            assert len(battles) + dropped == counts["rows_read"]
        elif found == "long":
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
def test_a_checkpoint_with_a_call_a_bomb_or_a_path_is_refused_and_nothing_of_it_runs(
    small, trained, tmp_path, fails, change, name
):
    from pathlib import Path

    output = tmp_path / "out"
    shutil.copytree(trained, output)
    (output / name).write_bytes(rewritten(trained / name, change))
    if name == "best_model.pt":
        with pytest.raises(UserError, match="is no RankRouter checkpoint") as error:
            RankRouter.load(output / name)
        assert "\n" not in str(error.value)
    else:
        assert "is no RankRouter checkpoint" in fails(*small, "--output_dir", str(output), "--resume")
    assert not Path("/tmp/rankrouter-payload-ran").exists()


def huge(facts):
    facts["args"] |= {"embedding_dim": 2**40}


def many(facts):
    facts["model_names"] = [str(i) for i in range(200_000)]


def thin(facts):
    for name, tensor in facts["model_state_dict"].items():
        facts["model_state_dict"][name] = torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)


def seen_forever(facts):
    facts["seen_queries"] = torch.zeros(1, dtype=torch.int64).expand(10**15)


def doubled(facts):
    weights = facts["model_state_dict"]
    weights["query_tower.mean"] = weights["query_tower.mean"].double()


@pytest.mark.parametrize("change", [huge, many, thin, seen_forever, doubled])
def test_a_checkpoint_that_claims_more_than_it_holds_is_refused_without_the_memory(trained, tmp_path, change):
    facts = torch.load(trained / "best_model.pt", weights_only=True)
    change(facts)
    torch.save(facts, tmp_path / "c.pt")
    with pytest.raises(UserError, match="RankRouter checkpoint"):
        RankRouter.load(tmp_path / "c.pt")


def put(*path, value):
    """A change of one place in a checkpoint."""

    def change(checkpoint):
        *way, last = path
        for key in way:
            checkpoint = checkpoint[key]
        if value is None:
            del checkpoint[last]
        else:
            checkpoint[last] = value

    return change


def shorter(checkpoint):
    order, losses = checkpoint["begun"]
    checkpoint["begun"] = (order[:-1], losses)


def swapped(checkpoint):
    moment = checkpoint["optimiser"]["state"][0]
    moment["exp_avg"] = torch.zeros(1).expand(10**6, 10**6)


NAN = float("nan")
LAST_DAMAGES = [
    *(put(name, value=None) for name in ("router", "best", "seconds", "history", "random", "begun", "optimiser")),
    *(put("router", value=value) for value in ([], "x", {})),
    *(put("router", "query_tower.mean", value=value) for value in (torch.zeros(3), torch.full((128,), NAN), 5)),
    put("router", "query_tower.mean", value=torch.zeros(128, dtype=torch.complex64)),
    *(put("best", value=value) for value in ("x", {}, {"weights": {}, "facts": {}})),
    *(put("best", "facts", "epoch", value=value) for value in (7, "x")),
    *(put("best", "facts", "val_metrics", "auc", value=value) for value in (NAN, "x")),
    *(put("history", name, value=[value]) for name in ("train_losses", "val_metrics") for value in (NAN, 5, {})),
    *(put("seconds", "train", value=value) for value in (NAN, "x", torch.zeros(2))),
    *(put("optimiser", "state", 0, "exp_avg", value=value) for value in (torch.zeros(3), "x")),
    *(put("optimiser", "param_groups", value=value) for value in ([], "x")),
    *(
        put("begun", value=value)
        for value in ([], {}, (1, 2, 3), (torch.zeros(236, dtype=torch.int64), torch.zeros(2)))
    ),
    *(put("random", "python", value=value) for value in ("x", (3, -torch.ones(625).long(), None))),
    *(put("experiment", "--lr", value=value) for value in (torch.ones(2), "x" * 10**6)),
    put("embeddings_hash", value=3),
    put("format_version", value=torch.zeros(2)),
    put("best", "facts", "epoch", value=-1),
    shorter,
    swapped,
]


@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """The folder of a run that was stopped in its second epoch."""
    output = tmp_path_factory.mktemp("stopped")
    evaluate, calls = train.evaluate, []

    def stops(*args):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", stops)
        with pytest.raises(KeyboardInterrupt):
            train.main([*small, "--output_dir", str(output), "--checkpoint_minutes", "0"])
    return output


def test_a_last_checkpoint_of_odd_values_is_refused_before_anything_follows_from_it(small, stopped, tmp_path, fails):
    path = tmp_path / "last_checkpoint.pt"
    flags = [*small, "--output_dir", str(tmp_path), "--checkpoint_minutes", "0"]
    for number, change in enumerate(LAST_DAMAGES):
        checkpoint = torch.load(stopped / "last_checkpoint.pt", weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)
        shutil.copy(stopped / "best_model.pt", tmp_path)
        message = fails(*flags, "--resume")
        assert len(message) < 1500, number
        assert re.search("is no RankRouter checkpoint|of another experiment|has checkpoint format", message), number
        assert (tmp_path / "best_model.pt").read_bytes() == (stopped / "best_model.pt").read_bytes(), number
    shutil.copy(stopped / "last_checkpoint.pt", path)
    train.main([*flags, "--resume"])


@pytest.mark.parametrize(
    "change",
    [
        put("encoder", "dtype", value="load"),
        put("args", "dropout", value=NAN),
        put("args", "embedding_dim", value=0),
        put("args", "pooling", value="zzz"),
        put("args", "similarity_metric", value="zz"),
        put("args", "unscaled", value=5),
        put("args", "max_length", value=0),
    ],
)
def test_a_best_checkpoint_of_odd_values_is_refused(trained, tmp_path, capfd, change):
    facts = torch.load(trained / "best_model.pt", weights_only=True)
    change(facts)
    torch.save(facts, tmp_path / "c.pt")
    capfd.readouterr()
    with pytest.raises(UserError, match="RankRouter checkpoint"):
        RankRouter.load(tmp_path / "c.pt")
    assert capfd.readouterr().err == ""


def test_a_checkpoint_is_a_file(tmp_path):
    for path in ("/dev/zero", tmp_path):
        with pytest.raises(UserError, match="is no file"):
            read_checkpoint(path, 2)


def test_a_checkpoint_does_not_make_us_download(trained, tmp_path, monkeypatch):
    facts = torch.load(trained / "best_model.pt", weights_only=True)
    facts["encoder"] |= {"path": "somebody/elses"}
    torch.save(facts, tmp_path / "c.pt")
    asked = []

    def snapshot_download(hub_id, local_files_only, **_):
        asked.append((hub_id, local_files_only))
        raise FileNotFoundError(hub_id)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="has not been downloaded here; --model_path somebody/elses"):
        RankRouter.load(tmp_path / "c.pt").rank(["a query"])
    assert asked == [("somebody/elses", True)]


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
def test_a_corrupt_file_of_an_encoder_is_one_line_or_does_no_harm(small, demo, tmp_path, capfd, file):
    content, rng = (demo / "encoder" / file).read_bytes(), np.random.default_rng(0)
    cuts = [content[: rng.integers(len(content))] for _ in range(5)]
    flips = []
    for _ in range(15):
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        flips.append(bytes(flipped))
    shutil.copytree(demo / "encoder", tmp_path / "encoder")
    from query_representation import encode

    refused = 0
    for damaged in [*WRONG, *cuts, *flips]:
        (tmp_path / "encoder" / file).write_bytes(damaged)
        capfd.readouterr()
        try:
            folder = find_encoder(str(tmp_path / "encoder"))
            encode(["a query", "another one"], *load_encoder(folder, torch.device("cpu"), torch.float32))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        assert capfd.readouterr().err == ""
    assert refused >= 10 or file == "tokenizer_config.json"
