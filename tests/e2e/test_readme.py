"""The README says what the code does: its flags, its files, its example."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import train
from rankrouter import RankRouter

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_tree_names_every_file():
    tree = re.search(r"```text\n(.*?)```", section("Files"), re.DOTALL)[1]
    rows = {line.split()[0]: line for line in tree.splitlines()}
    assert {name for name in rows if name.endswith(".py")} == {path.name for path in ROOT.glob("*.py")}
    for folder in (path for path in (ROOT / "support").iterdir() if (path / "__init__.py").is_file()):
        for path in folder.glob("[a-z]*.py"):
            assert re.search(rf"\b{path.stem}\b", rows[f"{folder.name}/"]), path


def test_every_key_of_the_outputs_is_explained(default_run):
    history, _ = default_run
    explained = set(re.findall(r"`(\w+)`", section("Outputs")))
    assert set(history) | set(history["test_metrics"]) <= explained


def test_the_output_to_expect_is_what_a_run_prints(demo_dir, tmp_path, capsys):
    flags = ("--limit", "300", "--epochs", "10", "--num_clusters", "4")
    train.main(["--demo", "--demo_dir", str(demo_dir), "--output_dir", str(tmp_path), *flags])
    printed = capsys.readouterr().out
    expected = re.search(r"It ends with.*?```text\n(.*?)```", README, re.DOTALL)[1]

    def shape(text):
        text = re.sub(r" {2}best$| at step \d+", "", text, flags=re.MULTILINE).replace(str(tmp_path), "outputs")
        text = re.sub(r"(better|worse) than [\w -]+$|no (difference|verdict) .*$", "verdict", text, flags=re.MULTILINE)
        return re.sub(r"[+-]?\d+(\.\d+)?", "0", text).split()

    assert shape(printed)[-len(shape(expected)) :] == shape(expected)


@pytest.fixture
def outputs(run_demo, tmp_path):
    """A folder with `outputs/` of a few runs, one of which is the README's."""
    for name, seed in (("bce", "1"), ("bce-2", "2"), ("bpr", "1")):
        loss = ("--loss_type", name[:3], "--seed", seed)
        _, output = run_demo("--limit", "300", "--epochs", "1", "--num_clusters", "4", *loss)
        shutil.copytree(output, tmp_path / "outputs" / name)
    return tmp_path


def test_the_example_that_reads_a_history_runs(outputs):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    ended = subprocess.run([sys.executable, "-c", code], cwd=outputs, capture_output=True, text=True, check=True)
    history = json.loads((outputs / "outputs/bce/training_history.json").read_text())
    auc, interval = history["test_metrics"]["auc"], history["test_intervals"]["auc"]
    assert ended.stdout.splitlines()[0] == f"{auc} {interval}"


def test_the_lines_that_report_on_runs_run(outputs):
    (block,) = re.findall(r"```bash\n(.*?)```", section("Reading the results"), re.DOTALL)
    lines = [line.replace("python report.py", f"{sys.executable} {ROOT / 'report.py'}") for line in block.splitlines()]
    ended = subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=outputs, capture_output=True, text=True, check=True)
    header, *rows = ended.stdout.split("\n\n")[0].splitlines()
    assert header.split()[:3] == ["run", "loss_type", "seeds"]
    assert sorted(row.split()[:3] for row in rows) == [["outputs/bce*", "bce", "2"], ["outputs/bpr", "bpr", "1"]]
    assert len((outputs / "runs.csv").read_text().splitlines()) == 3
    assert "pictures/baselines.png" in ended.stderr
    assert (outputs / "pictures/clusters-outputs-bpr.png").is_file()


@pytest.fixture
def routing(default_run, demo, tmp_path):
    """A folder with all that the README's lines on routing name."""
    shutil.copytree(default_run[1], tmp_path / "outputs")
    (tmp_path / "queries.txt").write_text("".join(f"How do I invert matrix {i}?\n" for i in range(20)))
    names = RankRouter.load(tmp_path / "outputs/best_model.pt").model_names
    prices = pd.DataFrame({"model": names, "price_per_query": [0.001 * (1 + i) for i in range(len(names))]})
    prices.to_csv(tmp_path / "prices.csv", index=False)
    table = pd.read_parquet(demo / "battles.parquet")[:60]
    table.to_parquet(tmp_path / "battles.parquet")
    table.loc[:40, "model_a"] = "new-model"
    table.to_parquet(tmp_path / "new_battles.parquet")
    return tmp_path


def run_lines(block, folder):
    lines = [line.replace("python route.py", f"{sys.executable} {ROOT / 'route.py'}") for line in block.splitlines()]
    return subprocess.run(
        ["bash", "-ec", "\n".join(lines)], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def test_the_lines_that_route_run_and_print_what_is_shown(routing):
    (block,) = re.findall(r"```bash\n(.*?)```", section("Routing"), re.DOTALL)
    printed = run_lines(block, routing)
    shown = re.search(r"```text\n(.*?)```", section("Routing"), re.DOTALL)[1]

    def shape(text):  # but for the last column, which the best single model leaves empty
        text = re.sub(r"demo-model-\w|-?\d+(\.\d+)?(e-\d+)?", "_", text)
        return [line.split()[:4] for line in text.splitlines() if line]

    assert shape(printed)[:10] == shape(shown)[:10]
    rankings = [json.loads(line) for line in (routing / "rankings.jsonl").read_text().splitlines()]
    assert len(rankings) == 20
    assert sum(ranking["prices"][0] for ranking in rankings) / 20 <= 0.002 + 1e-12


def test_the_example_that_ranks_runs(routing):
    code = re.search(r"```python\n(.*?)```", section("Routing"), re.DOTALL)[1]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=routing, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"(\['demo-model-\w -?\d+\.\d\d'(, 'demo-model-\w -?\d+\.\d\d'){2}\]\n){2}", ended.stdout)


def test_the_line_that_adds_a_model_runs(routing):
    (block,) = re.findall(r"```bash\n(.*?)```", section("A model that was not there"), re.DOTALL)
    run_lines(block, routing)
    assert RankRouter.load(routing / "wider.pt").model_names[-1] == "new-model"


def test_the_two_commands_are_the_first_two_blocks():
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert blocks[0].strip().endswith("python train.py --demo")
    assert blocks[1].strip().endswith("python -m pytest")
