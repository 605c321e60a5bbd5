"""Each file imports what its row of the README's file map allows, and nothing runs on import."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUPPORT = {f"support.{path.stem}" for path in (ROOT / "support").glob("*.py")} - {"support.__init__"}
ALLOWED = {
    "loss": set(),
    "metrics": set(),
    "data_loader": {"support.files", "support.layouts", "support.tables"},
    "query_representation": {"support.embedding_cache", "support.files"},
    "model_profiling": set(),
    "rankrouter": {"query_representation", "model_profiling", "support.files"},
    "train": {"data_loader", "query_representation", "rankrouter", "loss", "metrics", "model_profiling"} | SUPPORT,
    "support.__init__": set(),
    "support.files": set(),
    "support.command_line": {"support.files"},
    "support.tables": {"support.files"},
    "support.layouts": {"support.files", "support.tables"},
    "support.demo": {"support.files"},
    "support.runs": {"support.files"},
}
# Packages that a file must not know at all, wherever in it the import stands.
FORBIDDEN = {
    "metrics": {"torch", "transformers"},
    "data_loader": {"torch", "transformers", "sklearn"},
    "loss": {"numpy", "transformers", "sklearn"},
    "support.files": {"torch", "numpy", "pandas", "transformers"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py")])
MODULES = {module_name(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path):
    name = module_name(path)
    names = imported(ast.parse(path.read_text()))
    assert names & MODULES <= ALLOWED[name]
    assert not {imported_name.split(".")[0] for imported_name in names} & FORBIDDEN.get(name, set())


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_runs_on_import_and_the_first_line_says_what_the_file_is_for(path):
    tree = ast.parse(path.read_text())
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    rest = [node for node in tree.body if not isinstance(node, allowed)]
    if tree.body:
        assert ast.get_docstring(tree).splitlines()[0].strip()
        rest = rest[1:]  # the docstring
    for node in rest:  # and a command's last lines
        assert isinstance(node, ast.If)
        assert ast.unparse(node.test) == "__name__ == '__main__'"
