"""What all tests share: a cache of their own, the repository's paths, and notebooks as data."""
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest

# Tests run side by side (`make test`): each worker, and what it starts, has its share of the processor's cores.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb")
                   if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts))
MODULES = [path for path in NOTEBOOKS if re.match(r"\d\d_", path.name) and path.parent.name == "nbs"]
REPORTS = [path for path in NOTEBOOKS if path.parent.name == "reports"]
BENCHMARKS = [path for path in NOTEBOOKS if path.parent.name == "benchmarks"]


def notebook_id(path: Path) -> str:
    return path.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def code_cells(path: Path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Prepared data are made once for all tests and workers, away from the user's cache; kernels inherit it."""
    side_by_side = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent / "cache" if side_by_side else tmp_path_factory.mktemp("cache")
    folder.mkdir(exist_ok=True)
    os.environ["FMNB_CACHE"] = str(folder)
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as `fmnb run` does: a busy machine does not stall the tests
    yield folder
    os.environ.pop("FMNB_CACHE")


@pytest.fixture(scope="session", autouse=True)
def warm(cache, tmp_path_factory):
    """Side by side, each worker forks the kernels of its reports from one process that has imported what they import."""
    if not os.environ.get("PYTEST_XDIST_WORKER") or sys.platform != "linux":
        yield
        return
    from fmnb.run.kernel import warm_kernels
    with warm_kernels(int(os.environ["OMP_NUM_THREADS"])):
        kernels = Path(os.environ["JUPYTER_PATH"].split(os.pathsep)[0]) / "kernels"
        spec = json.loads((kernels / "fmnb" / "kernel.json").read_text())
        spec["argv"] = [word for word in spec["argv"] if "hist_file" not in word]  # nbclient gives it to a kernel of this name
        (kernels / "python3").mkdir()
        (kernels / "python3" / "kernel.json").write_text(json.dumps(spec))
        yield


@pytest.fixture
def cold(monkeypatch):
    """Ordinary kernels, for tests of kernels."""
    monkeypatch.delenv("JUPYTER_PATH", raising=False)
