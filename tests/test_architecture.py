"""The layers hold: imports point to smaller numbers, rooms keep to themselves, import stays light."""
import ast
import re
import subprocess
import sys

import pytest
from conftest import MODULES, ROOT, code_cells


def number_of_modules(notebooks) -> dict[str, int]:
    """Module name -> the number of its notebook."""
    numbers = {}
    for path in notebooks:
        number, name = re.match(r"(\d\d)_(.+)", path.stem).groups()
        numbers[f"fmnb.{name}"] = int(number)
    return numbers


NUMBERS = number_of_modules(MODULES)


def imported(module: str, source: str) -> set[str]:
    """Every name that `source` may import as a module, absolute (nbdev writes relative imports)."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(filter(None, [package, node.module]))
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def upward_imports(module: str, source: str, numbers: dict[str, int]) -> list[str]:
    """The fmnb modules that `module` imports although their number is not smaller."""
    return sorted(name for name in imported(module, source) if numbers.get(name, -1) >= numbers[module])


def source_of(module: str) -> str:
    return (ROOT / (module.replace(".", "/") + ".py")).read_text()


def test_all_edges_are_seen():
    """Guards the tests below against seeing nothing: the modules import one another some thirty times."""
    assert sum(len(imported(module, source_of(module)) & set(NUMBERS)) for module in NUMBERS) >= 30


@pytest.mark.parametrize("module", NUMBERS)
def test_imports_point_to_smaller_numbers(module):
    assert upward_imports(module, source_of(module), NUMBERS) == []


@pytest.mark.parametrize("line", ["from ..run.record import open_run", "from ..run import record", "from fmnb.run.record import open_run", "import fmnb.eval.compare",
                                  "def f():\n    from ..train.learner import make_learner"])
def test_an_upward_import_is_found(line):
    assert upward_imports("fmnb.data.load", line, NUMBERS)


def room(module: str) -> str:
    """'data' for fmnb.data.load, 'core' for fmnb.core."""
    return module.split(".")[1]


ALLOWED = {"core": set(), "config": {"core"}, "flops": set(), "data": {"core"}, "model": {"core"}, "train": {"core", "config", "flops", "model"}, "run": {"core", "config"}, "eval": {"core", "flops"}}
JOINING = 56  # from this number on rooms of runs, widgets and deployment may join what lies below: what reads finished runs, measures the machine, shows things, or asks a model


@pytest.mark.parametrize("module", NUMBERS)
def test_rooms_keep_to_themselves(module):
    """Data, models and runs do not know each other, and evaluation knows none of them: training builds on models, and the reports join all."""
    rooms = {room(name) for name in imported(module, source_of(module)) & set(NUMBERS)}
    allowed = set(map(room, NUMBERS)) if room(module) in ("run", "deploy", "explore") and NUMBERS[module] >= JOINING else ALLOWED[room(module)]
    assert rooms <= allowed | {room(module)}


def test_every_module_has_a_notebook():
    written = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in (ROOT / "fmnb").rglob("*.py")}
    written = {name for name in written if not name.endswith(("__init__", "_modidx"))}
    assert written == set(NUMBERS)


def exported_cells():
    return [(path.stem, number, cell.source) for path in MODULES for number, cell in enumerate(code_cells(path)) if re.search(r"^#\|\s*export", cell.source, re.M)]


def test_exported_code_is_explicit_and_short():
    for name, number, source in exported_cells():
        assert not re.search(r"^\s*from \S+ import \*", source, re.M), f"{name}: star import in code cell {number}"
        assert "**kwargs" not in source and "store_attr" not in source and "@patch" not in source, f"{name}, code cell {number}"
        assert len(source.splitlines()) <= 45, f"{name}: code cell {number} has {len(source.splitlines())} lines"


def test_public_functions_are_documented():
    for name, number, source in exported_cells():
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name}: {node.name} has no docstring"
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                bare = [argument.arg for argument in node.args.args + node.args.kwonlyargs if argument.annotation is None]
                assert not bare, f"{name}: {node.name} has no type for {bare}"


LIGHT = {"fmnb": ("torch", "fastai", "pandas", "numpy"), "fmnb.core": ("torch", "fastai", "pandas"), "fmnb.run.cli": ("torch", "fastai", "pandas", "papermill")}


@pytest.mark.parametrize("module", LIGHT)
def test_imports_are_lazy(module):
    code = f"import sys, {module}; print([name for name in {LIGHT[module]!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
