"""The README says what the code does: its flags, its files, its example."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_flag_stands_there_with_its_default():
    rows = re.findall(r"^\| `--(\w+)` \| (?:`(.*?)`)? ?\|", section("Flags"), re.MULTILINE)
    defaults = {name: value for name, value in vars(train.parse_args([])).items() if name != "split_seed"}
    expected = {name: "" if value is None or value is False else str(value) for name, value in defaults.items()}
    assert dict(rows) == expected | {"split_seed": ""}


def test_the_file_map_is_complete():
    listed = set(re.findall(r"^\| `([\w/]+\.py)`", section("Files"), re.MULTILINE))
    files = [path for folder in (ROOT, ROOT / "support") for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert listed == {str(path.relative_to(ROOT)) for path in files}


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
        text = re.sub(r" {2}best$", "", text, flags=re.MULTILINE).replace(str(tmp_path), "outputs")
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


def test_the_two_commands_are_the_first_two_blocks():
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert blocks[0].strip().endswith("python train.py --demo")
    assert blocks[1].strip().endswith("python -m pytest")
