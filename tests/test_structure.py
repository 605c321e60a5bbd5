"""Each file imports what its row of the README's file map allows, and nothing runs on import."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py")])
ROWS = re.findall(r"^\| `([\w/]+)\.py` \|.*\| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
ALLOWED = {name.replace("/", "."): set(re.findall(r"`([\w.]+)`", imports)) for name, imports in ROWS} | {
    "support.__init__": set()
}
# Packages that a file must not know at all, wherever in it the import stands.
FORBIDDEN = {
    "metrics": {"torch", "transformers"},
    "data_loader": {"torch", "transformers", "sklearn"},
    "rankrouter": {"transformers", "sklearn", "pandas"},
    "model_profiling": {"numpy", "transformers", "sklearn"},
    "loss": {"numpy", "transformers", "sklearn"},
    "support.files": {"torch", "numpy", "pandas", "transformers"},
    "support.baselines": {"torch", "transformers"},
    "support.inputs": {"torch", "numpy", "pandas", "transformers"},
    "support.printing": {"torch", "numpy", "pandas", "transformers"},
    "support.signals": {"torch", "numpy", "pandas", "transformers"},
    "support.history": {"torch", "numpy", "pandas", "transformers"},
    "support.plots": {"torch", "pandas", "transformers"},
    "support.profiles": {"torch", "pandas", "transformers"},
    "support.prices": {"torch", "pandas", "transformers"},
    "support.query_files": {"torch", "numpy", "pandas", "transformers"},
    "report": {"torch", "pandas", "transformers"},
}

# What takes seconds to import stands in the functions that need it.
LAZY = {
    "metrics": {"scipy", "sklearn"},
    "query_representation": {"transformers", "sklearn", "tokenizers", "tqdm"},
    "support.encoder": {"transformers", "huggingface_hub"},
    "support.checkpoints": {"torch"},
    "support.embedding_cache": {"torch", "safetensors"},
    "train": {"torch", "numpy", "sklearn"},
    "route": {"torch", "numpy", "metrics", "rankrouter", "data_loader"},
    "report": {"numpy", "metrics"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "relative imports"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = {module_name(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path):
    name = module_name(path)
    names = imported(ast.parse(path.read_text()))
    assert names & MODULES <= ALLOWED[name]
    assert not {imported_name.split(".")[0] for imported_name in names} & FORBIDDEN.get(name, set())


@pytest.mark.parametrize("name", LAZY)
def test_what_is_slow_is_imported_where_it_is_needed(name):
    tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())
    top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    assert not {imported_name.split(".")[0] for imported_name in imported(top)} & LAZY[name]


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
