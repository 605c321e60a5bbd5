"""README and docs: their commands and examples run, their links lead somewhere, their tables are complete."""

import json
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import report
import route
import train
from rankrouter import RankRouter

ROOT = Path(__file__).parent.parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
QUICK = "--epochs 1 --limit 150 --num_clusters 2 --embedding_dim 8 --dtype float32".split()  # noqa: SIM905
QUERIES = ["How do I invert a matrix?", "Which spices go with lentil soup?"]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


RECORD = r"""
record() { printf '%s\x1f' "$@" >> commands.log; printf '\x1e' >> commands.log; }
python() { record "$@"; }
torchrun() { while [[ $1 == -* ]]; do shift; done; record "$@"; }
python3() { :; }; pip() { :; }; hf() { :; }; ruff() { :; }
"""


def commands(page, folder):
    """The arguments of each Python command of a page's shell blocks, as bash expands them, in their order."""
    script = RECORD + "".join(blocks(PAGES[page], "bash"))
    subprocess.run(["bash", "-euc", script], cwd=folder, check=True)
    log = folder / "commands.log"
    return [command.split("\x1f")[:-1] for command in log.read_text().split("\x1e")[:-1]] if log.exists() else []


@pytest.fixture(scope="module")
def project(demo, tiny_run, tmp_path_factory):
    """A folder with every file that the pages name, beside the data and the encoder that `train.py` looks for."""
    here = tmp_path_factory.mktemp("docs") / "project"
    table = pd.read_parquet(demo / "battles.parquet")
    prompts = table["conversation_a"].map(lambda turns: turns[0]["content"])
    own = table[["model_a", "model_b", "winner"]].assign(prompt=prompts).replace("demo-model-a", "gpt-4")
    for folder in ("docs", "outputs", "shards", ".venv/bin", "../data/chatbot_arena/data", "../model"):
        (here / folder).mkdir(parents=True)
    (here / ".venv/bin/activate").touch()
    arena = here / "../data/chatbot_arena/data" / Path(train.parse_args([]).data_path).name
    for path in (here / "battles.parquet", here / "shards/1.parquet", arena):
        table.to_parquet(path)
    own.to_csv(here / "battles.csv", index=False)
    own.assign(split=["train", "train", "test"] * (len(own) // 3) + ["test"] * (len(own) % 3)).to_csv(
        here / "official.csv", index=False
    )
    pd.concat([table[:40].assign(model_a="new-model"), table[40:60]]).to_parquet(here / "new_battles.parquet")
    scores = {f"model-{i}": (prompts.str.len() * i % 7 / 7) for i in (1, 2, 3)}
    tasks = [("math", "law", "gpqa", "natural_qa", "human_eval")[i % 5] for i in range(len(own))]
    pd.DataFrame({"prompt": prompts, "task": tasks, "latency": 1.0, **scores}).to_csv(here / "scores.csv", index=False)
    costs = {"model": ["model-1", "model-2", "model-3"], "price_per_million_tokens": [0.1, 0.2, 0.9]}
    pd.DataFrame(costs).to_csv(here / "model_prices.csv", index=False)
    benchmarks = {"model": own["model_a"].unique(), "mmlu": range(own["model_a"].nunique())}
    pd.DataFrame(benchmarks).to_csv(here / "benchmarks.csv", index=False)
    prices = {"model": (names := RankRouter.load(tiny_run[1] / "best_model.pt").model_names)}
    rng = np.random.default_rng(0)
    own_costs = {name: rng.random(len(own)) for name in names} | {f"{name}_cost": 1 for name in names}
    pd.DataFrame({"prompt": "New: " + prompts, **own_costs}).to_csv(here / "scores_with_costs.csv", index=False)
    pd.DataFrame(prices).assign(price_per_query=lambda t: 0.001 * (1 + t.index)).to_csv(
        here / "prices.csv", index=False
    )
    queries = [f"How do I invert matrix {i}?" for i in range(20)]
    (here / "queries.txt").write_text("".join(f"{query}\n" for query in queries))
    chats = [{"messages": [{"role": "user", "content": query}] * 2} for query in queries]
    (here / "chats.jsonl").write_text("".join(f"{json.dumps(chat)}\n" for chat in chats))
    embedded = pd.DataFrame({"prompt": [*prompts.unique(), *queries]})
    embedded.assign(embedding=[*rng.normal(size=(len(embedded), 6))]).to_parquet(here / "embeddings.parquet")
    shutil.copytree(demo / "encoder", here / "../model/Qwen2-0.5B")
    return here


@pytest.fixture
def folder(project, tiny_run, tmp_path, monkeypatch):
    """A copy of the project with the outputs of a run, as the current folder."""
    shutil.copytree(project.parent, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tiny_run[1], tmp_path / "project/outputs", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_and_examples_of_a_page_run(page, folder, demo, demo_dir, capsys):
    places = ["--model_path", str(demo / "encoder"), "--demo_dir", str(demo_dir), "--device", "cpu"]
    once = {re.sub(r" --(seed|output_dir) \S+", "", " ".join(command)): command for command in commands(page, folder)}
    for script, *args in once.values():  # once for all seeds of a loop
        if script == "train.py" and "--help" not in args:
            layers = ["--layers", "1,2"] if "--layers" in args else []  # the demo's encoder has two
            layers += ["--cache_layers", "1,2"] if "--cache_layers" in args else []
            encoder = places[2:] if "--embeddings" in args else places
            train.main([*args, *QUICK, *encoder, *layers])
        elif script == "route.py" and "--help" not in args:
            route.main(args)
        elif script == "report.py" and "--help" not in args:
            report.main([path for word in args for path in sorted(glob(word)) or [word]])
        elif script == "-m":  # a module that exists and has these flags
            files = [ROOT / f"{args[0].replace('.', '/')}.py", ROOT / "benchmarks/common.py"]
            source = args[0] == "pytest" or "".join(file.read_text() for file in files)
            flags = [word.partition("=")[0] for word in args if word.startswith("--")]
            assert args[0] == "pytest" or all(f'"{flag}"' in source for flag in flags), args
            assert all((ROOT / word).exists() for word in args if word.startswith("tests/"))
    capsys.readouterr()
    for example in blocks(PAGES[page], "python"):
        exec(compile(example, page, "exec"), {})
        assert capsys.readouterr().out


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_to_a_page_and_a_heading():
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)]+)\)", text)]
    assert len(links) > 30
    for page, link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = str(((ROOT / page).parent / path).resolve().relative_to(ROOT)) if path else page
        assert (ROOT / target).exists(), (page, link)
        assert not anchor or anchor in anchors(PAGES[target]), (page, link)
    assert {page for page in PAGES if page.startswith("docs/")} <= {link for page, link in links if page == "README.md"}


def test_every_flag_that_a_page_names_exists():
    sources = [path.read_text() for path in (*ROOT.glob("benchmarks/*.py"), ROOT / "support/encoding/cache.py")]
    known = "".join([PAGES["docs/options.md"], *sources, "--unscaled --random_start"])  # two of an earlier commit
    for page, text in PAGES.items():
        prose = re.sub(r"^```bash\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        for flag in set(re.findall(r"--[a-z_]+", "".join(re.findall(r"`[^`]+`", prose)))):
            assert re.search(rf"{flag}\b", known), (page, flag)


@pytest.mark.parametrize("command", [train, route, report])
def test_the_reference_of_flags_is_the_help(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        command.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(f"usage: {command.__name__}.py")
    assert printed in " ".join(PAGES["docs/options.md"].split())


def test_the_tree_names_every_file():
    (tree,) = (block for block in blocks(PAGES["README.md"], "text") if "support/" in block)
    rows = {line.split()[0]: line for line in re.sub(r"\n {20,}", " ", tree).splitlines()}
    assert {name for name in rows if name.endswith(".py")} == {path.name for path in ROOT.glob("*.py")}
    for folder in (path for path in (ROOT / "support").iterdir() if (path / "__init__.py").is_file()):
        for path in folder.glob("[a-z]*.py"):
            assert re.search(rf"\b{path.stem}\b", rows[f"{folder.name}/"]), path


def test_every_key_of_the_outputs_is_explained(tiny_run):
    history, output = tiny_run
    keys = {*history, *history["test_metrics"], *vars(RankRouter.load(output / "best_model.pt").metadata)}
    assert keys <= set(re.findall(r"`(\w+)`", PAGES["docs/outputs.md"] + PAGES["docs/method.md"]))


def shape(text):
    """The words of an output without its numbers, verdicts and marks of the best validation."""
    text = re.sub(r" {2}best$| at step \d+", "", text, flags=re.MULTILINE)
    text = re.sub(r"(better|worse) than [\w -]+$|no (difference|verdict) .*$", "verdict", text, flags=re.MULTILINE)
    text = re.sub(r"stays with (\S+) (always|unless .* P > [\d.]+),", r"stays with \1,", text)
    return re.sub(r"[+-]?\d+(\.\d+)?", "0", text).split()


def test_the_output_to_expect_is_what_a_run_prints(demo_dir, tmp_path, capsys):
    flags = ("--limit", "300", "--epochs", "2", "--num_clusters", "4")
    train.main(["--demo", "--demo_dir", str(demo_dir), "--output_dir", str(tmp_path), *flags])
    printed = shape(capsys.readouterr().out.replace(str(tmp_path), "outputs"))
    expected = shape(blocks(PAGES["README.md"], "text")[0])
    assert printed[-len(expected) :] == expected


def test_a_ranking_is_printed_as_shown(folder, demo_dir, capsys):
    route.main([*QUERIES, "--top_k", "3"])
    shown = blocks(PAGES["docs/routing.md"], "text")[0]

    def words(text):  # but for the last column, which the best single model leaves empty
        text = re.sub(r"demo-model-\w|-?\d+(\.\d+)?(e-\d+)?", "_", text)
        return [line.split()[:4] for line in text.splitlines() if line]

    assert words(capsys.readouterr().out) == words(shown)


def test_a_batch_meets_its_budget_and_an_added_model_is_in_the_checkpoint(folder):
    flags = ["--input", "queries.txt", "--output", "rankings.jsonl", "--prices", "prices.csv", "--budget", "0.002"]
    route.main(flags)
    rankings = [json.loads(line) for line in (folder / "rankings.jsonl").read_text().splitlines()]
    assert len(rankings) == 20
    assert sum(ranking["prices"][0] for ranking in rankings) / 20 <= 0.002 + 1e-12
    route.main(["--add_model", "new-model", "--battles", "new_battles.parquet", "--save", "wider.pt"])
    assert RankRouter.load("wider.pt").model_names[-1] == "new-model"


def test_the_two_commands_are_the_first_two_blocks():
    install, tests = blocks(PAGES["README.md"], "bash")[:2]
    assert install.strip().endswith("python train.py --demo")
    assert tests.strip().endswith("python -m pytest")
