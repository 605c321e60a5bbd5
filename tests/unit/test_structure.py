"""Imports point one way, by package, as the README's tree says; nothing runs on import."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "support").rglob("*.py")])
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in FILES}
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


def test_imports_point_one_way():
    for path, tree in TREES.items():
        name = package(".".join(path.with_suffix("").parts))
        if name not in ("support", "support.__init__"):
            imported = imports(tree) - {name}
            assert all(ORDER.index(other) < ORDER.index(name) for other in imported), (path, imported)
            assert not imported & COMMANDS, path


def test_nothing_runs_on_import_and_every_file_has_a_docstring():
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for path, tree in TREES.items():
        assert ast.get_docstring(tree) or not tree.body, path
        for node in tree.body[1:]:  # after the docstring
            is_command = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
            assert isinstance(node, definitions) or is_command, (path, node.lineno)
