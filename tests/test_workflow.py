"""Whole workflows as a user starts them: command line, Python, papermill, an installed wheel; and how they fail."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import REPORTS, ROOT
from fmnb.core import ConfigError, RunError
from fmnb.model.store import load_model
from fmnb.run.cli import main
from fmnb.run.execute import run
from fmnb.run.record import open_run, run_contents
from fmnb.run.table import runs_table

FINETUNE = next(path for path in REPORTS if path.stem == "30_finetune")
QUICK = {"epochs": 2, "learning_rate": 0.003}
RUN_FILES = {"config.json", "history.csv", "metrics.json", "model/README.md", "model/model.json", "model/model.safetensors", "predictions.parquet",
             "report.html", "report.ipynb", "status.json"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A table of 240 short texts of two classes."""
    rng = np.random.default_rng(0)
    words = {"sea": "wave salt ship gull tide sand".split(), "sky": "cloud wind star bird rain sun".split()}
    rows = [(" ".join(rng.choice(words[label], 8)) + f" {number}.", label) for number in range(120) for label in words]
    path = tmp_path_factory.mktemp("texts") / "places.csv"
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the CNN on the digits, made by the command line."""
    folder = tmp_path_factory.mktemp("runs") / "cnn"
    words = [word for name, value in QUICK.items() for word in ("-p", name, str(value))]
    assert main(["run", "finetune", "-p", "data", "digits", "-p", "family", "cnn", *words, "--out", str(folder)]) == 0
    return open_run(folder)


def files_of(done):
    """The files of a run, whether or not the working tree differs from its commit."""
    return set(run_contents(done).index) - {"changes.diff"}


def test_run_folder_is_as_promised(finished):
    assert files_of(finished) == RUN_FILES
    metrics = finished.metrics
    assert set(metrics) == {"test", "valid", "n_parameters", "flops_per_item", "n_trained", "train_seconds", "items_per_second", "peak_memory_bytes", "advice"}
    assert {"accuracy", "precision_macro", "recall_macro", "f1_macro", "matthews", "roc_auc", "log_loss"} <= set(metrics["test"])
    for metric in (metric for name, metric in metrics["test"].items() if name not in ("log_loss", "brier")):
        assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1 and metric["n_items"] == 373
    assert list(finished.predictions.columns[:4]) == ["item_id", "split", "target", "prediction"]
    assert [f"score_{digit}" for digit in range(10)] == list(finished.predictions.columns[4:])
    assert (finished.predictions.query("split == 'test'").eval("target == prediction").mean()) == pytest.approx(metrics["test"]["accuracy"]["value"])
    config = finished.config
    assert {"report", "parameters", "packages", "git", "hardware", "data"} <= set(config)
    assert config["parameters"]["batch_size"] == 64 and config["parameters"]["recipe"].startswith("scratch, precision=") and config["data"]["fingerprint"]
    assert finished.history.columns.tolist() == ["epoch", "stage", "train_loss", "valid_loss", "accuracy", "metric", "learning_rate", "seconds"]
    assert finished.status["status"] == "finished"


def test_report_reads_well(finished):
    """No errors, no warnings, no progress bars in what a reader gets."""
    notebook = nbformat.read(finished.folder / "report.ipynb", as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error" and output.get("name") != "stderr", output
    html = (finished.folder / "report.html").read_text()
    assert "Fine-tuning report" in html and len(html) < 3_000_000


def test_saved_model_predicts_the_same(finished):
    import torch
    from fmnb.data.load import make_loader
    from fmnb.data.prepare import prepare
    from fmnb.data.source import load_items
    from fmnb.data.split import split_items
    from fmnb.eval.predict import predict
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count())  # as the kernel had
    table = predict(load_model(finished.folder), make_loader(prepare(split_items(load_items("digits"))), "test"))
    saved = finished.predictions.query("split == 'test'").reset_index(drop=True)
    pd.testing.assert_frame_equal(table, saved, atol=1e-5)


def test_same_seed_same_predictions_other_seed_another_folder(finished, tmp_path, monkeypatch):
    again = run("finetune", QUICK, tmp_path / "again", progress=False)
    pd.testing.assert_frame_equal(again.predictions, finished.predictions, check_exact=True)
    monkeypatch.chdir(tmp_path)
    first, second = (run("finetune", {**QUICK, "seed": seed, "epochs": 1}, progress=False) for seed in (0, 1))
    assert first.folder != second.folder and first.folder.parent == second.folder.parent == Path("runs")
    assert not first.predictions.equals(second.predictions)
    listed = runs_table("runs")
    assert sorted(listed["seed"]) == [0, 1] and (listed["status"] == "finished").all() and listed["f1_macro"].notna().all()


@pytest.mark.parametrize("family", ["rnn", "transformer"])
def test_families_learn_digits(family, tmp_path):
    done = run("finetune", {"family": family, "epochs": 4, "learning_rate": 0.004}, tmp_path / family, progress=False)
    assert done.metrics["test"]["accuracy"]["value"] > 0.5


@pytest.mark.parametrize("family", ["cnn", "rnn", "transformer"])
def test_families_learn_texts(family, texts, tmp_path):
    done = run("finetune", {"data": str(texts), "family": family, "epochs": 6, "learning_rate": 0.003}, tmp_path / family, progress=False)
    assert done.metrics["test"]["accuracy"]["value"] > 0.9
    assert (done.model_folder / "tokenizer.json").exists()


def test_start_from_a_run(finished, tmp_path):
    """The backbone is taken over, so one epoch of the head alone does better than one epoch from scratch."""
    head = run("finetune", {"start_from": str(finished.folder), "recipe": "head_only", "epochs": 2, "learning_rate": 0.01}, tmp_path / "head", progress=False)
    backbone = load_model(finished.folder).backbone.state_dict()
    adapted = load_model(head.folder).backbone.state_dict()
    assert all((backbone[name] == adapted[name]).all() for name in backbone if "num_batches" not in name)
    full = run("finetune", {"start_from": str(finished.folder), "epochs": 1, "learning_rate": 0.003}, tmp_path / "full", progress=False)
    assert full.config["parameters"]["recipe"].startswith("full, precision=")
    assert full.metrics["test"]["accuracy"]["value"] > finished.metrics["test"]["accuracy"]["value"] - 0.05


def papermill(*words, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "FMNB_RUN"}
    return subprocess.run([Path(sys.executable).parent / "papermill", *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)


def test_papermill_directly(tmp_path):
    done = papermill(FINETUNE, "out.ipynb", "-p", "epochs", 1, "-p", "learning_rate", 0.003, "-p", "out", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert files_of(open_run(tmp_path / "mine")) == RUN_FILES - {"report.html", "report.ipynb"}


def test_papermill_directly_refuses_unknown_parameters(tmp_path):
    done = papermill(FINETUNE, "out.ipynb", "-p", "epoch", 1, cwd=tmp_path)
    assert done.returncode != 0 and "Did you mean 'epochs'" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_papermill_directly_marks_a_failure(tmp_path):
    done = papermill(FINETUNE, "out.ipynb", "-p", "data", "no/such/folder", "-p", "out", "mine", cwd=tmp_path)
    status = json.loads((tmp_path / "mine" / "status.json").read_text())
    assert done.returncode != 0 and status["status"] == "failed" and "neither an embedded data set nor an existing path" in status["error"]


@pytest.mark.parametrize("parameters,message", [
    ({"lerning_rate": 0.1}, "Did you mean 'learning_rate'"),
    ({"families": "cnn"}, "Unknown parameter 'families'"),
    ({"epochs": "many"}, "epochs must be of type int"),
    ({"epochs": -1}, "epochs must be from 0"),
    ({"test_frac": 0.95}, "test_frac must be from"),
    ({"family": "transfomer"}, "Did you mean 'transformer'"),
    ({"recipe": "magic"}, "recipe cannot begin with 'magic'"),
])
def test_bad_parameters_are_refused_before_a_kernel_starts(parameters, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run("finetune", parameters, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("parameters,message", [
    ({"data": "digit"}, "Did you mean 'digits'"),
    ({"data": "no/such/folder"}, "nor an existing path"),
    ({"start_from": "no/such/run"}, "There is no folder 'no/such/run' to start from"),
    ({"recipe": "lora, rank=many"}, "rank"),
])
def test_a_failure_half_way_keeps_error_and_notebook(parameters, message, tmp_path):
    with pytest.raises(RunError, match=message):
        run("finetune", parameters, tmp_path / "run", progress=False)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed" and status["error"]
    notebook = nbformat.read(tmp_path / "run" / "report.ipynb", as_version=4)
    assert any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", []))
    assert runs_table(tmp_path)["status"].tolist() == ["failed"]


def test_a_training_that_fails_half_way(tmp_path):
    """A loss that is no number ends the training; the error says where, and the notebook up to there is kept."""
    report = nbformat.read(FINETUNE, as_version=4)
    training = next(cell for cell in report.cells if "train(learn, config" in cell.source)
    training.source = "import torch\nmodel.head.linear.weight.data.fill_(torch.nan)\n" + training.source
    nbformat.write(report, tmp_path / "30_broken.ipynb")
    with pytest.raises(RunError, match="no number in 5 steps in a row, the last in epoch 1, step 5; set a learning_rate below"):
        run(tmp_path / "30_broken.ipynb", QUICK, tmp_path / "run", progress=False)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed" and "no number in 5 steps in a row" in status["error"]
    kept = nbformat.read(tmp_path / "run" / "report.ipynb", as_version=4)
    assert sum(bool(cell.get("outputs")) for cell in kept.cells) > 4


def test_an_existing_run_folder_is_refused(finished, tmp_path, capsys):
    with pytest.raises(RunError, match="set overwrite"):
        run("finetune", QUICK, finished.folder, progress=False)
    assert main(["run", "finetune", "--out", str(finished.folder)]) == 2
    assert "set overwrite" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(finished.folder, copy)
    replaced = run("finetune", {**QUICK, "epochs": 1}, copy, overwrite=True, progress=False)
    assert len(replaced.history) == 1
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(RunError, match="not a run folder"):
        run("finetune", QUICK, tmp_path / "thesis", overwrite=True, progress=False)


def test_compare_texts_with_baseline(texts, tmp_path):
    done = run("compare", {"data": str(texts), "families": "cnn,transformer", "epochs": 4, "learning_rate": 0.003}, tmp_path / "compare", progress=False)
    assert set(done.metrics["models"]) == {"cnn", "transformer", "baseline"}
    assert set(done.predictions["model"]) == {"cnn", "transformer", "baseline"}
    assert open_run(done.folder / "cnn").metrics == done.metrics["models"]["cnn"]
    assert "cannot be told apart" in done.metrics["findings"][0] or "macro F1" in done.metrics["findings"][0]


def test_installed_wheel_in_an_empty_folder(tmp_path, cold):
    """Source distribution, wheel, empty folder: the templates travel in the package, nothing of the repository is needed."""
    source, wheels, site, empty = (tmp_path / name for name in ("source", "wheels", "site", "empty"))
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "__pycache__"))
    empty.mkdir()
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], cwd=source, check=True, capture_output=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, *tmp_path.glob("*.tar.gz")], check=True, capture_output=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", site, *wheels.glob("*.whl")], check=True, capture_output=True)
    shutil.rmtree(source)
    environment = {name: value for name, value in os.environ.items() if name != "FMNB_RUN"} | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", "import sys; from fmnb.run.cli import main; sys.exit(main())"]
    where = subprocess.run([sys.executable, "-c", "import fmnb; print(fmnb.__file__)"], cwd=empty, env=environment, capture_output=True, text=True)
    assert str(site) in where.stdout
    done = subprocess.run([*command, "run", "finetune", "-p", "epochs", "1", "-p", "learning_rate", "0.003"], cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run([*command, "runs"], cwd=empty, env=environment, capture_output=True, text=True)
    assert "finished" in listed.stdout and "cnn" in listed.stdout
