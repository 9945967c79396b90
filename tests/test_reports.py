"""The reports at their default size, as `make demo` runs them."""
import nbformat
import pytest
from conftest import BENCHMARKS, REPORTS, notebook_id
from fmnb.config import FAMILIES
from fmnb.model.store import read_description
from fmnb.run.execute import run


@pytest.mark.parametrize("path", REPORTS, ids=notebook_id)
def test_report_at_default_size(path, tmp_path):
    done = run(path, out=tmp_path / "run", progress=False)
    assert done.status["status"] == "finished"
    notebook = nbformat.read(done.folder / "report.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type in ("error", "stream")]
    assert (done.folder / "report.html").stat().st_size < 3_000_000
    if not (done.folder / "metrics.json").exists():
        assert path.stem == "10_prepare"
        return
    if path.stem == "25_select":
        assert done.metrics["parameters"]["family"] in FAMILIES and done.metrics["advice"][0]["score"] > 0.9 and len(done.history) >= 2
        return
    if path.stem == "20_pretrain":
        assert done.metrics["valid"]["probe"] > 0.9 and [row["share"] for row in done.metrics["gain"]] == [0.01, 0.05, 0.2, 1.0]
        assert read_description(done.folder, "foundation")["objective"]["name"] == "contrastive"
        return
    models = done.metrics.get("models", {"model": done.metrics})
    for name, metrics in models.items():
        floor = 0.90 if name == "baseline" else 0.97
        assert all(metrics["test"][metric]["value"] > floor for metric in ("accuracy", "precision_macro", "recall_macro", "f1_macro")), name


SMALL = {"10_loading": {"n_images": 800, "repeats": 1}, "20_shakespeare": {"data": "nowhere", "steps": 10, "peer_steps": 20, "repeats": 1},
         "21_families": {"data": "nowhere", "minutes": 0.02, "repeats": 1, "context": 32, "width": 96},
         "26_selection": {"data": "nowhere", "only": "digits", "search_minutes": 0.15, "budget": 0.25, "families": "cnn"},
         "36_tuning": {"data": "nowhere", "only": "digits, CNN", "trials": 2, "search_minutes": 0.02, "epochs": 1},
         "30_finetuning": {"data": "nowhere", "epochs": 1, "repeats": 1, "at_most": 48},
         "31_tasks": {"data": "nowhere", "minutes": 0.02},
         "32_photographs": {"data": "nowhere", "budget": 0.02, "quick": 0.01, "rates": "0.003"},
         "33_sentences": {"data": "nowhere", "epochs": 1, "rates": "0.01", "budgets": "0.02", "seeds": 1},
         "42_sweep": {"n_runs": 2, "seconds": 0.1, "n_trainings": 1, "epochs": 1, "repeats": 1, "n_listed": 20}, "50_coverage": {"trials": 6, "resamples": 100}, "51_gallery": {"data": "nowhere", "minutes": 0.02, "n_seeds": 2},
         "60_overhead": {"n_steps": 20, "repeats": 1, "starts": 1, "n_single": 6, "n_batch": 40}, "61_scaling": {"largest": 600, "repeats": 1}}


@pytest.mark.parametrize("path", BENCHMARKS, ids=notebook_id)
def test_benchmark_at_small_size(path, tmp_path):
    """It runs and says something; the figures that count are those of a quiet machine."""
    done = run(path, SMALL[path.stem], out=tmp_path / "run", progress=False)
    notebook = nbformat.read(done.folder / "report.ipynb", as_version=4)
    assert any("were clean" in output.get("data", {}).get("text/markdown", "") for cell in notebook.cells for output in cell.get("outputs", []))
