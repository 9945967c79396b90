"""Notebooks are the source: in sync with the package, clean, executed, and executable."""
import ast
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
import pytest
from conftest import BENCHMARKS, MODULES, NOTEBOOKS, REPORTS, ROOT, code_cells, notebook_id
from fmnb.config import Config, parameter_table
from execnb.shell import CaptureShell
from fmnb.run.parameters import read_parameters

BIN = Path(sys.executable).parent
DEBRIS = re.compile(r"Warning:|Traceback|it/s\]|\r")
MACHINE_PATH = re.compile(r"/(root|home|work|tmp|Users)/\w")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of what nbdev reads and writes."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "nbs", "fmnb"):
        source = ROOT / name
        shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*", "runs")) if source.is_dir() else shutil.copy(source, copy / name)
    return copy


def texts(folder: Path, pattern: str) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob(pattern)) if "__pycache__" not in path.parts}


def test_export_is_in_sync(checkout):
    subprocess.run([BIN / "nbdev_export"], cwd=checkout, check=True, capture_output=True)
    assert texts(checkout / "fmnb", "*.py") == texts(ROOT / "fmnb", "*.py"), "run `make export`"


def test_notebooks_are_clean(checkout):
    before = {path: (checkout / path.relative_to(ROOT)).read_text() for path in NOTEBOOKS}
    subprocess.run([BIN / "nbdev_clean"], cwd=checkout, check=True, capture_output=True)
    changed = [notebook_id(path) for path in NOTEBOOKS if json.loads((checkout / path.relative_to(ROOT)).read_text()) != json.loads(before[path])]
    assert changed == [], "run `make export`"


def test_readme_is_in_sync(tmp_path):
    subprocess.run(["make", "-s", "readme", f"README={tmp_path / 'README.md'}"], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run `make readme`"


def outputs(notebook) -> list[tuple[str, str]]:
    """Kind and text of every output, images left out."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image")}
            found.append((output.output_type, output.get("text", "") + json.dumps(data)))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=notebook_id)
def test_committed_outputs_are_evidence(path):
    found = outputs(nbformat.read(path, as_version=4))
    assert found, "the notebook was never executed"
    for kind, text in found:
        assert kind != "error" and not DEBRIS.search(text) and not MACHINE_PATH.search(text), text[:300]
    for cell in code_cells(path):
        size = sum(len(image) for output in cell.outputs for kind, image in output.get("data", {}).items() if kind.startswith("image"))
        assert size * 3 / 4 <= 100_000, f"a figure of {size * 3 / 4 / 1000:.0f} kB"
        assert not re.search(r"eval:\s*false|skip_exec", cell.source)


@pytest.fixture(scope="session")
def warm_processes(cache):
    """Each task gets a process of its own, forked from one that has imported what takes long and has done nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastai.vision.all", "nbdev", "scipy.stats", "seaborn", "sklearn.linear_model", "torch._dynamo"])
    return context


def execute(path: Path) -> str:
    """Execute a notebook as `nbdev_test` does; what it wrote to stderr. Raises the error of the cell that fails."""
    os.chdir(path.parent)
    os.environ["IN_TEST"] = "1"  # nbdev's word for: do not export
    if path.stem in ("42_run.kernel", "43_run.sweep"):  # they are about kernels
        os.environ.pop("JUPYTER_PATH", None)
    multiprocessing.process._parent_process = None  # what a notebook forks is to be as in a kernel
    shell, said = CaptureShell(path.parent), ""
    for cell in code_cells(path):
        done = shell.run_cell(cell.source)
        if error := done.exception:
            raise RuntimeError(f"{type(error).__name__}: {error}, in the cell\n{cell.source}")
        said += done.stderr
    return said


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path not in REPORTS + BENCHMARKS], ids=notebook_id)
def test_executes(path, warm_processes):
    with ProcessPoolExecutor(1, mp_context=warm_processes) as pool:
        assert pool.submit(execute, path).result(timeout=600) == ""


@pytest.mark.parametrize("path", MODULES, ids=notebook_id)
def test_imports_have_cells_of_their_own(path):
    """nbdev executes every cell with an import when it makes the documentation, and no other."""
    for cell in code_cells(path):
        body = ast.parse(cell.source).body
        imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in body]
        assert all(imports) or not any(imports) or cell.source.endswith("nbdev_export()"), cell.source


@pytest.mark.parametrize("path", REPORTS, ids=notebook_id)
def test_report_parameters(path):
    """At most 14, drawn from the vocabulary, with its types and defaults; papermill's help comes from the comments."""
    declared = read_parameters(path)
    source = next(cell.source for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", []))
    types = {row["name"]: row["type"] for row in parameter_table()}
    assert 0 < len(declared) <= 14 and set(declared) <= set(types)
    for name, parameter in declared.items():
        assert parameter.default == getattr(Config(), name)
    for node in ast.parse(source).body:
        assert node.annotation.id == types[node.target.id]
    assert all("#" in line for line in source.splitlines() if line.strip())


def test_reports_share_their_headings():
    """Every report has the first two and the last two; those that train have all."""
    shared = ["## Parameters", "## Data", "## Training", "## Evaluation", "## Findings", "## Run folder"]
    for path in REPORTS:
        prose = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
        headings = [line for line in prose.splitlines() if line.startswith("## ")]
        wanted = shared if {"family", "families"} & set(read_parameters(path)) else [*shared[:2], *shared[-2:]]
        assert [heading for heading in headings if heading in shared] == wanted, path.name
