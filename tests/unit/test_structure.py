"""Imports point one way, by package, as the README's tree says; nothing runs on import."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "support").rglob("*.py")])
# Each may import what stands before it, and its own package.
ORDER = [
    *("support.system", "support.data", "support.encoding"),
    *("loss", "metrics", "data_loader", "query_representation", "model_profiling", "rankrouter"),
    *("support.training", "support.routing", "support.reporting", "support.evaluation"),
    *("train", "route", "report"),
]
COMMANDS = {"train", "route", "report"}


def package(module: str) -> str:
    return ".".join(module.split(".")[:2]) if module.startswith("support.") else module.split(".")[0]


def imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "relative imports"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {package(name) for name in names} & set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    name = package(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if name in ("support", "support.__init__"):
        return
    found = imports(ast.parse(path.read_text())) - {name}
    assert all(ORDER.index(other) < ORDER.index(name) for other in found), found
    assert not found & COMMANDS


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_runs_on_import_and_the_first_line_says_what_the_file_is_for(path):
    tree = ast.parse(path.read_text())
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    rest = [node for node in tree.body if not isinstance(node, definitions)]
    if tree.body:
        assert ast.get_docstring(tree).splitlines()[0].strip()
        rest = rest[1:]  # the docstring
    for node in rest:  # and what runs of a command
        assert isinstance(node, ast.If)
        assert ast.unparse(node.test) == "__name__ == '__main__'"
