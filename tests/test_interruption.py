"""Ctrl-C and SIGTERM: a run ends as `interrupted`, and the same command goes on where it stopped."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from fmnb.core import RunError
from fmnb.run.execute import run
from fmnb.run.record import Run, open_run
from fmnb.run.table import runs_table
from fmnb.train.checkpoint import CHECKPOINT, read_checkpoint
from safetensors.torch import load_file

PARAMETERS = 'epochs: int = 4\nseed: int = 0\nout: str = ""\noverwrite: bool = False'
START = """from dataclasses import replace
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from fmnb.config import config_from_notebook
from fmnb.data.load import make_dataloaders
from fmnb.data.prepare import prepare
from fmnb.data.source import load_items
from fmnb.data.split import split_items
from fmnb.model.head import build_model
from fmnb.model.store import save_model
from fmnb.run.record import start_run
from fmnb.train.finetune import train
from fmnb.train.learner import make_learner
config = config_from_notebook(globals())
run = start_run(config, "training")"""
TRAIN = """import time
set_seed(config.seed)
digits = prepare(split_items(load_items("digits")))
class Slow(Callback):
    def after_batch(self): time.sleep(0.03)
learn = make_learner(make_dataloaders(digits), build_model("cnn", digits.input_spec, digits.classes), callbacks=[Slow()])
learn = train(learn, replace(config, recipe="scratch, precision=float32, checkpoint_minutes=0", learning_rate=3e-3), folder=run.training_folder)
save_model(learn.model, run.model_folder)
run.finish()"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report that only trains, slowly."""
    cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, START, TRAIN)]
    cells[0].metadata["tags"] = ["parameters"]
    path = tmp_path_factory.mktemp("report") / "01_training.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def begin(report: Path, out: Path) -> subprocess.Popen:
    """`fmnb run` in a process of its own."""
    code = "import sys; from fmnb.run.cli import main; sys.exit(main())"
    environment = {name: value for name, value in os.environ.items() if name != "FMNB_RUN"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, "run", report, "--out", out], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def epochs_done(folder: Path) -> int:
    file = Run(folder).training_folder / CHECKPOINT
    return len(read_checkpoint(file, tensors=False)["state"]["rounds"]) if file.exists() else 0


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_interrupted_and_gone_on(report, tmp_path):
    """Once by Ctrl-C, once by SIGTERM; the weights are in the end those of the run that was left alone."""
    whole, folder = begin(report, tmp_path / "whole"), tmp_path / "run"
    for number in (signal.SIGINT, signal.SIGTERM):
        before, process = epochs_done(folder), begin(report, folder)
        while process.poll() is None and epochs_done(folder) <= before:
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
        process.send_signal(number)
        assert process.communicate(timeout=60)[1].endswith("fmnb: interrupted; the same command goes on from there\n") and process.returncode == 130
        assert runs_table(tmp_path).set_index("run").loc["run", "status"] == "interrupted" and epochs_done(folder) > before
    with pytest.raises(RunError, match="only a finished run can be read"):
        open_run(folder)
    with pytest.raises(RunError, match="holds a run with other parameters that was interrupted"):
        run(report, {"seed": 1}, folder, progress=False)
    for process in (begin(report, folder), whole):
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert open_run(folder).status["started"] < open_run(folder).status["updated"] and not Run(folder).training_folder.exists()
    assert run(report, {}, folder, progress=False, reuse=True).folder == folder
    with pytest.raises(RunError, match="set overwrite"):
        run(report, {}, folder, progress=False)
