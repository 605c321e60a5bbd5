"""What `train.py` refuses, in one line and with exit code 2: flags, data, encoders, folders, and runs that explode."""

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
from transformers import AutoModel

import loss
import train
from rankrouter import RankRouter
from support.system.command_line import run_command

ROOT = Path(__file__).parent.parent.parent

OUT_OF_RANGE = f"""
    --batch_size 0 | --batch_size ten | --batch_size 1{24 * "0"} | --epochs 0 | --epochs 1.5 | --lr 0 | --lr nan
    --lr inf | --lr -1 | --embedding_dim 0 | --embedding_dim 99999999 | --capability_dim -3 | --cluster_dim 0
    --num_clusters -1 | --margin -0.1 | --dropout 1 | --id_dropout 1 | --weight_decay -1 | --max_length 0 | --limit 0
    --seed -1 | --seed 4294967296 | --loss_type BPR | --similarity_metric euclid | --capability_init zeros
    --score_columns , | --no_such_flag 1 | --loss bce | --finetune_layers 0 --finetune_encoder
""".strip().replace("\n", "|")  # --loss is no abbreviation

EXCLUDING = {
    "--no_model_id --no_capability": "without input",
    "--capability_init win_rate --num_clusters 0": "is per cluster; it needs --num_clusters of at least 1",
    "--capability_init win_rate --capability_dim 64": "--capability_dim is for random vectors",
    "--capability_file x --capability_dim 2": "--capability_dim is for random vectors",
    "--capability_file x --capability_init win_rate": "exclude each other",
    "--no_capability --capability_init win_rate": "--no_capability leaves no capability vectors",
    "--no_capability --freeze_capabilities": "--no_capability leaves no capability vectors",
    "--no_capability --hold_out_model x": "--no_capability leaves no capability vectors",
    "--allow_missing_profiles": "--allow_missing_profiles needs --capability_file",
    "--lora_rank 4": "--lora_rank needs --finetune_encoder",
    "--warmup 0.2": "--warmup needs --finetune_encoder",
    "--gradient_checkpointing": "--gradient_checkpointing needs --finetune_encoder",
    "--finetune_encoder --dtype float16": "float16 does not train",
}


@pytest.fixture
def demo_flags(demo_dir, tmp_path):
    return ("--demo", "--demo_dir", str(demo_dir), "--output_dir", str(tmp_path / "out"))


def test_flags_out_of_range_or_that_exclude_each_other_are_refused_before_anything_is_written(fails, demo_flags):
    out_of_range = {row: row.split()[0] for row in map(str.strip, OUT_OF_RANGE.split("|"))}
    assert len(out_of_range) == 29
    for flags, expected in (out_of_range | EXCLUDING).items():
        assert expected in fails(*demo_flags, *flags.split()), flags
        assert not Path(demo_flags[-1]).exists(), flags


def test_flags_that_do_not_fit_the_data_or_the_machine_are_refused_before_anything_is_encoded(
    fails, demo_flags, tmp_path, monkeypatch
):
    monkeypatch.setattr("support.encoding.encoder.load_encoder", None)
    names = [f"demo-model-{letter}" for letter in "abcdefghijk"]
    pd.DataFrame({"model": names, "mmlu": np.arange(11.0)}).to_csv(tmp_path / "profiles.csv", index=False)
    for flags, expected in (
        *((("--device", device), "--device") for device in ("gpu", "cuda:99", "meta", "hpu", "")),
        (("--limit", "40"), "--num_clusters 50 is more than the 3"),
        (("--loss_type", "pointwise"), "pointwise learns from the scores of a score table; "),
        (("--hold_out_model", "gpt-4"), "no model is named 'gpt-4'; found demo-model-a, demo-model-b"),
        (("--capability_file", str(tmp_path / "profiles.csv")), "has no row for demo-model-l; add it"),
        (("--capability_file", "/nowhere"), "cannot read /nowhere"),
    ):
        assert expected in fails(*demo_flags, "--no_cache", *flags), flags
        assert not (tmp_path / "out" / "training_history.json").exists(), flags


def test_missing_data_and_encoders_are_reported_with_how_to_get_them(fails, demo, tmp_path):
    fresh, output = str(tmp_path / "demo"), ("--output_dir", str(tmp_path))
    missing, data = ("--data_path", "no/such.parquet"), ("--data_path", str(demo / "battles.parquet"))
    no_data = ("no data at no/such.parquet", "accept", "hf download lmsys/chatbot_arena_conversations", "--demo")
    for flags, parts in (
        ((*missing, "--demo", "--demo_dir", fresh), no_data),
        ((*missing, "--model_path", "a/b"), no_data),  # no hub is requested
        ((*data, "--model_path", "../no/model"), ("no model folder at ../no/model", "hf download Qwen/Qwen2-0.5B")),
        ((*data, "--model_path", str(tmp_path)), ("is not a Hugging Face model",)),
    ):
        message = fails(*output, *flags)
        assert all(part in message for part in parts), flags
    assert not Path(fresh).exists()


def test_paths_that_are_empty_or_cannot_be_written_are_refused(fails, demo_flags, tmp_path):
    (tmp_path / "file").write_text("")
    inside = str(tmp_path / "file" / "folder")
    for flag, value, *expected in (
        *((flag, "", "is empty") for flag in ("--output_dir", "--demo_dir", "--cache_dir")),
        ("--model_path", "", "no model folder at"),
        ("--data_path", "", "no data at"),
        ("--output_dir", inside, "choose another with --output_dir"),
        ("--demo_dir", inside, "choose another with --demo_dir"),
    ):
        assert expected[0] in fails(*demo_flags, flag, value), (flag, value)


def test_a_read_only_output_folder_is_refused(fails, demo_flags, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # the superuser may write anywhere, "nobody" may not
    try:
        assert "choose another with --output_dir" in fails(*demo_flags)
    finally:
        os.seteuid(user)


def test_an_encoder_that_is_corrupt_or_not_finite_fails_the_run_and_its_history(fails, demo, small, tmp_path):
    network = AutoModel.from_pretrained(demo / "encoder")
    with torch.no_grad():
        network.embed_tokens.weight[:50] = float("nan")
    shutil.copytree(demo / "encoder", tmp_path / "encoder")
    flags = (*small, "--model_path", str(tmp_path / "encoder"), "--output_dir", str(tmp_path))
    for write, expected in (
        (network.save_pretrained, "are not finite in float32"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "could not be loaded"),
    ):
        write(tmp_path / "encoder")
        assert expected in fails(*flags)
        assert json.loads((tmp_path / "training_history.json").read_text())["status"] == "failed", expected


# --- runs that explode ----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(fails, small, tmp_path, monkeypatch):
    calls = 0

    def breaks(a, b, outcome, margin):
        nonlocal calls
        calls += 1
        return loss.hinge(a, b, outcome, margin) * (float("nan") if calls == 10 else 1)

    monkeypatch.setitem(loss.LOSSES, "bpr", breaks)
    message = fails(*small, "--output_dir", str(tmp_path))
    history = json.loads((tmp_path / "training_history.json").read_text())
    steps = -(-history["data"]["split"]["train"]["battles"] // 40)
    epoch, step = divmod(9, steps)
    assert f"epoch {epoch}: the loss is nan at step {step}" in message
    assert history["status"] == "failed"
    assert f"the checkpoint of epoch {history['best_epoch']} is kept" in message
    assert len(history["val_metrics"]) == epoch > 0
    assert RankRouter.load(tmp_path / "best_model.pt").metadata.epoch == history["best_epoch"]


def test_a_run_that_explodes_says_so_and_leaves_no_earlier_checkpoint_as_its_own(fails, small, tmp_path):
    flags = (*small, "--output_dir", str(tmp_path))
    finished = {"training_history.json", "best_model.pt", "last_checkpoint.pt"}
    for batch_size in ("32", "100000"):  # of one step an epoch, the loss itself is finite
        train.main(list(flags))
        assert {path.name for path in tmp_path.iterdir()} == finished
        message = fails(*flags, "--lr", "1e30", "--batch_size", batch_size)
        assert "epoch 0" in message
        assert "lower --lr" in message
        assert "is kept" not in message
        assert {path.name for path in tmp_path.iterdir()} == {"training_history.json"}


# --- what is printed, and where -------------------------------------------------------------------------------


def test_help_and_typos_import_nothing_heavy():
    for script in ("train.py", "route.py", "report.py"):
        for flag, code in (("--help", 0), ("--typo", 2)):
            program = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = [{script!r}, {flag!r}]
try:
    runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
finally:
    heavy = ("torch", "transformers", "sklearn", "pandas", "numpy", "scipy", "pyarrow")
    print("imported", [name for name in heavy if name in sys.modules])
"""
            ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
            assert ended.returncode == code, (script, flag)
            *shown, imported = ended.stdout.splitlines()
            assert imported == "imported []", (script, flag)
            assert len(ended.stderr.splitlines()) == code // 2, (script, flag)
            if flag == "--help":
                assert shown[0].startswith(f"usage: {script}")
            if (script, flag) == ("train.py", "--help"):
                assert "(default: 0.0001)" in "\n".join(shown)


def test_the_script_ends_without_a_traceback_also_where_standard_output_cannot_be_written(small, tmp_path, tiny_run):
    train_py = [sys.executable, "train.py", *small, "--epochs", "1", "--output_dir", str(tmp_path)]
    for more, redirect, code in (
        ((), ">&-", 0),
        ((), "> /dev/full", 2),
        (("--data_path", "no/such.parquet"), "", 2),
    ):
        command = [*train_py, *more]
        ended = subprocess.run(
            ["bash", "-c", f'"$@" {redirect}', *command[:1], *command], cwd=ROOT, capture_output=True
        )
        assert (ended.returncode, ended.stdout) == (code, b""), (more, redirect)
        assert len(ended.stderr.splitlines()) == code // 2, (more, redirect)


def test_control_characters_in_file_names_are_not_printed(small, demo, tmp_path, capfd):
    folder = tmp_path / "\x1b[31mred\rfolder\n\x9b"
    folder.mkdir()
    battles, profiles, output = folder / "battles.parquet", folder / "profiles.csv", folder / "out"
    shutil.copy(small[1], battles)
    rows = [f"demo-model-{letter},{number}" for number, letter in enumerate("abcdefghijkl")]
    profiles.write_text("\n".join(["model,score", *rows]))
    (folder / "bad.csv").write_text("model,score\n")
    (folder / "bad.parquet").write_bytes(b"PAR1")
    data = ["--data_path", str(battles), "--model_path", str(demo / "encoder"), "--output_dir", str(output)]
    data += ["--epochs", "1", "--num_clusters", "2", "--embedding_dim", "8", "--baselines", "none"]
    data += ["--capability_file", str(profiles), "--cache_dir", str(folder / "cache")]
    for code, flags in (
        (0, ()),
        (0, ("--resume",)),
        (2, ("--resume", "--lr", "1")),
        (2, ("--data_path", str(folder / "missing.parquet"))),
        (2, ("--data_path", str(folder / "bad.parquet"))),
        (2, ("--capability_file", str(folder / "missing.csv"))),
        (2, ("--capability_file", str(folder / "bad.csv"))),
        (2, ("--output_dir", str(battles))),
        (2, ("--cache_dir", str(battles))),
        (2, ("--model_path", str(folder))),
        (2, ("--device", "\x1b[31mred folder")),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda flags=flags: train.main([*data, *flags]))
            sys.exit(0)
        out, err = capfd.readouterr()
        assert stopped.value.code == code, err
        assert "[31mred folder" in (err if code else out), flags
        assert all(line.isprintable() for line in [*out.split("\n"), *err.split("\n")]), flags
