"""Trackers: what TensorBoard and MLflow hold afterwards, and that no training is changed or ended by them."""
import importlib.util
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from fmnb.config import RECIPES, make_config
from fmnb.core import ConfigError, RunError
from fmnb.data.load import make_dataloaders
from fmnb.data.prepare import Preprocessing, prepare
from fmnb.data.source import load_items
from fmnb.data.split import split_items
from fmnb.data.stream import make_stream
from fmnb.model.head import build_backbone, build_model
from fmnb.train.finetune import train
from fmnb.train.learner import make_learner
from fmnb.train.objective import make_objective
from fmnb.train.pretrain import PretrainSettings, pretrain
from fmnb.train.track import MLflowTracker, TensorBoardTracker, Tracker, run_trackers, track_metrics, trackers

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed: pip install 'fmnb[track]'")
needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed: pip install 'fmnb[track]'")
each_tracker = pytest.mark.parametrize("kind", ["lists", pytest.param("tensorboard", marks=needs_tensorboard), pytest.param("mlflow", marks=needs_mlflow)])
STAGES = "gradual, precision=float32, checkpoint_minutes=0"  # several stages, a checkpoint after each epoch


class ListTracker(Tracker):
    """Points in a list that outlives it, and random draws at every turn."""

    def __init__(self, log):
        super().__init__(every=3)
        self.log = log

    def open(self, parameters, step):
        assert isinstance(parameters, dict)
        set_seed(99)

    def write(self, points):
        self.log += points
        torch.rand(5), np.random.rand(3)


def made(kind, folder, every=3):
    if kind == "lists":
        return ListTracker([])
    return TensorBoardTracker(folder, every) if kind == "tensorboard" else MLflowTracker(f"sqlite:///{folder}/mlflow.db", "fmnb", "run", every)


def found(kind, folder, tracker=None) -> pd.DataFrame:
    """What a tracker's store holds: name, step, value."""
    if kind == "lists":
        rows = [(name, step, value) for name, value, step in tracker.log]
    elif kind == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        rows = [(name, event.step, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)]
    else:
        client, runs = mlflow_runs(folder)
        assert len(runs) == 1
        rows = [(name, point.step, point.value) for name in runs[0].data.metrics for point in client.get_metric_history(runs[0].info.run_id, name)]
    table = pd.DataFrame(rows, columns=["name", "step", "value"]).sort_values(["name", "step"], ignore_index=True)
    assert not table.duplicated(["name", "step"]).any()
    return table


def mlflow_runs(folder):
    from mlflow import MlflowClient
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return client, client.search_runs([client.get_experiment_by_name("fmnb").experiment_id])


@pytest.fixture(scope="module")
def digits(cache):
    return prepare(split_items(load_items("digits")).groupby("split").head(120))


def trained(digits, callbacks=(), recipe=STAGES, folder=None, epochs=4):
    set_seed(0)
    learn = make_learner(make_dataloaders(digits, 16), build_model("cnn", digits.input_spec, digits.classes), callbacks=callbacks)
    return train(learn, make_config({"recipe": recipe, "epochs": epochs, "learning_rate": 3e-3}), folder=folder)


def same(first, second) -> bool:
    states = [learn.model.state_dict() for learn in (first, second)]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@each_tracker
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tracked_training_is_the_same_training(recipe, kind, digits, tmp_path):
    """With every recipe: the same weights to the last bit, and the whole history in the store."""
    recipe = f"{recipe}, precision=float32"
    tracker, alone = made(kind, tmp_path), trained(digits, recipe=recipe)
    learn = trained(digits, [tracker], recipe)
    assert same(learn, alone) and learn.notes == alone.notes
    log, rounds = found(kind, tmp_path, tracker).set_index("name"), pd.DataFrame(learn.state.rounds)
    for name in ("train_loss", "valid_loss", "metric", "learning_rate", "seconds", "stage"):
        np.testing.assert_allclose(log.loc[f"history/{name}", "value"], rounds[name], rtol=1e-6)
    assert log.loc["step/loss", "step"].tolist() == list(range(3, learn.state.step + 1, 3))
    assert log.loc["history/metric", "step"].max() == learn.state.step


@each_tracker
def test_test_metrics_come_last(kind, digits, tmp_path):
    tracker = made(kind, tmp_path)
    learn = trained(digits, [tracker])
    track_metrics(learn, {"test": {"accuracy": {"value": 0.75, "low": 0.7, "high": 0.8}, "spearman": {"value": None}}, "valid": {"loss": 0.5}, "n_parameters": 10})
    log = found(kind, tmp_path, tracker).set_index("name")
    assert log.loc["test/accuracy"].tolist() == [learn.state.step, 0.75] and log.loc["valid/loss", "value"] == 0.5 and "test/spearman" not in log.index
    assert learn.notes == []


class Interrupt(Callback):
    """Ctrl-C after some steps."""
    order = 90

    def __init__(self, step):
        self.step = step

    def after_batch(self):
        if self.training and self.learn.state.step == self.step:
            raise KeyboardInterrupt


@each_tracker
@pytest.mark.parametrize("epochs_done", [0, 1, 2.5])
def test_a_training_that_goes_on_goes_on_in_its_curves(epochs_done, kind, digits, tmp_path):
    whole_tracker, tracker = made(kind, tmp_path / "whole"), made(kind, tmp_path / "run")
    whole = trained(digits, [whole_tracker], folder=tmp_path / "training-whole")
    per_epoch = whole.state.step // len(whole.state.rounds)
    with pytest.raises(KeyboardInterrupt):
        trained(digits, [tracker, Interrupt(int(per_epoch * epochs_done) + 4)], folder=tmp_path / "training")
    if kind == "mlflow":
        assert mlflow_runs(tmp_path / "run")[1][0].info.status == "RUNNING"
    if kind == "tensorboard":
        time.sleep(1.1)  # it reads its files in the order of their names: the second, then a number that is not padded
    again = made(kind, tmp_path / "run")
    resumed = trained(digits, [again], folder=tmp_path / "training")
    assert same(resumed, whole)
    if kind == "lists":
        last = found(kind, None, again)["step"].min() - 1
        again.log = [point for point in tracker.log if point[2] <= last] + again.log
    if kind == "mlflow" and not epochs_done:  # nothing was done, so it is another run
        assert len(mlflow_runs(tmp_path / "run")[1]) == 2
        return
    first, second = found(kind, tmp_path / "whole", whole_tracker), found(kind, tmp_path / "run", again)
    if kind == "lists":  # points not yet written are lost with the process
        first, second = (log[log["name"].str.startswith("history/")].reset_index(drop=True) for log in (first, second))
    timed = first["name"] == "history/seconds"
    pd.testing.assert_frame_equal(first[~timed], second[second["name"] != "history/seconds"], check_exact=True)


@each_tracker
def test_a_training_that_ends_early_is_whole_in_its_curves(kind, digits, tmp_path):
    tracker = made(kind, tmp_path)
    learn = trained(digits, [tracker], "scratch, precision=float32, patience=1, keep=best", epochs=12)
    assert len(found(kind, tmp_path, tracker).query("name == 'history/metric'")) == len(learn.state.rounds)


def pretrained(callbacks=(), folder=None, settings=PretrainSettings(steps=60, learning_rate=4e-3, round_steps=20, precision="float32", checkpoint_steps=7)):
    set_seed(0)
    items = load_items(pd.DataFrame({"text": [f"the {word} sat on the {word} mat, number {number}" for number, word in enumerate(["cat", "dog", "cow", "hen"] * 40)]}))
    texts = prepare(split_items(items), Preprocessing(tokenizer="char"))
    streams = [make_stream(texts, split, 8, context=16, seed=0, training=split == "train") for split in ("train", "valid")]
    learn = make_learner(DataLoaders(*streams, device="cpu"), make_objective(build_backbone("transformer", texts.input_spec, {"name": "decoder", "width": 16, "depth": 1}), "transformer", "text"), callbacks=callbacks)
    return pretrain(learn, settings, folder)


@each_tracker
def test_a_pretraining_is_tracked_too_and_goes_on(kind, tmp_path):
    whole_tracker, tracker = made(kind, tmp_path / "whole"), made(kind, tmp_path / "run")
    alone, whole = pretrained(), pretrained([whole_tracker])
    assert same(alone, whole)
    with pytest.raises(KeyboardInterrupt):
        pretrained([tracker, Interrupt(45)], tmp_path / "training")
    again = made(kind, tmp_path / "run")
    assert same(pretrained([again], tmp_path / "training"), alone)
    log = found(kind, tmp_path / "whole", whole_tracker).set_index("name")
    assert log.loc["history/valid_loss", "step"].tolist() == [20, 40, 60] and log.loc["step/loss", "step"].tolist() == list(range(3, 61, 3))
    if kind != "lists":
        assert found(kind, tmp_path / "run").set_index("name").loc["history/valid_loss"].equals(log.loc["history/valid_loss"])


@needs_mlflow
def test_mlflow_has_parameters_status_and_leaves_nothing_elsewhere(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "a 'b'").mkdir()
    run = SimpleNamespace(folder=tmp_path / "a 'b'")
    learn = trained(digits, trackers("mlflow", run))
    track_metrics(learn, {"test": {"accuracy": {"value": 0.5}}})
    _, (only,) = mlflow_runs(run.folder / "tracking")
    assert only.info.status == "FINISHED" and only.info.run_name == "a 'b'"
    assert only.data.params["epochs"] == "4" and only.data.params["name of the recipe"] == "gradual" and only.data.params["seed"] == "0"
    assert sorted(os.listdir(tmp_path)) == ["a 'b'"] and os.listdir(run.folder) == ["tracking"] and learn.notes == []


@needs_tensorboard
@needs_mlflow
def test_both_together_say_nothing(tmp_path):
    """What a report would show on stderr: neither messages nor warnings."""
    code = f"""
import sys, fmnb  # first, as it silences a warning of fastai's import
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_track as t
run = t.SimpleNamespace(folder=t.Path({str(tmp_path)!r}))
digits = t.prepare(t.split_items(t.load_items("digits")).groupby("split").head(120))
learn = t.trained(digits, t.trackers("tensorboard,mlflow", run))
t.track_metrics(learn, {{"test": {{"accuracy": {{"value": 0.5}}}}}})
print(learn.notes, sorted({{path.parent.name for path in run.folder.rglob("*") if path.is_file()}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "[] ['tracking']\n", done.stdout + done.stderr
    assert done.stderr == ""


@needs_tensorboard
def test_tensorboard_has_parameters(digits, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2
    trained(digits, trackers("tensorboard", SimpleNamespace(folder=tmp_path)))
    events = EventAccumulator(str(tmp_path / "tracking")).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["epochs"].number_value == 4 and start.hparams["name of the recipe"].string_value == "gradual"


@needs_mlflow
def test_a_locked_store_is_a_note(digits, tmp_path, monkeypatch):
    """Locked from the second epoch on by another program; MLflow waits twenty seconds each time, so it is left alone after the first."""
    monkeypatch.setattr("fmnb.train.track.PATIENCE", 1)
    tracker, alone = made("mlflow", tmp_path), trained(digits)

    class Lock(Callback):
        order = 64

        def after_epoch(self):
            if len(self.learn.state.rounds) == 2:
                self.learn.lock = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
                self.learn.lock.execute("BEGIN EXCLUSIVE")

    learn = trained(digits, [tracker, Lock()])
    assert same(learn, alone) and "MLflowTracker failed at step" in learn.notes[0] and "locked" in learn.notes[0] and "\n" not in learn.notes[0]
    learn.lock.close()
    assert len(found("mlflow", tmp_path).query("name == 'history/metric'")) >= 1


@needs_tensorboard
@pytest.mark.skipif(os.name != "posix", reason="needs limits on the size of files")
def test_a_full_disk_is_a_note(tmp_path):
    """In a process of its own, whose files may grow to a few kilobytes: the training comes to its end, and so does the process."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_track as t
digits = t.prepare(t.split_items(t.load_items("digits")).groupby("split").head(120))
alone = t.trained(digits)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
learn = t.trained(digits, [t.TensorBoardTracker({str(tmp_path / 'tracking')!r}, 1, 0.0)])
print(t.same(learn, alone), len(learn.state.rounds), learn.notes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.startswith("True 4 ['TensorBoardTracker failed at step"), done.stdout + done.stderr[-2000:]
    assert "File too large" in done.stdout and "went on without it" in done.stdout


@needs_tensorboard
def test_a_folder_that_cannot_be_made_is_a_note(digits, tmp_path):
    (tmp_path / "tracking").write_text("a file")
    learn = trained(digits, trackers("tensorboard", SimpleNamespace(folder=tmp_path)))
    assert same(learn, trained(digits)) and learn.notes[0].startswith("TensorBoardTracker failed at step")


@pytest.mark.parametrize("failing", ["open", "write", "close", "reopen"])
def test_whatever_fails_the_training_goes_on(failing, digits):
    """Three times, then it is left alone; a tracker beside it goes on."""
    calls = []

    class Failing(ListTracker):
        pass

    def fail(self, *arguments):
        calls.append(failing)
        torch.rand(3)
        raise ValueError("two\nlines")

    setattr(Failing, failing, fail)
    beside = ListTracker([])
    learn = trained(digits, [Failing([]), beside])
    assert same(learn, trained(digits)) and 1 <= len(calls) <= 3
    note, = learn.notes
    assert note.startswith("Failing failed at step") and "ValueError: two lines" in note
    assert len([point for point in beside.log if point[0] == "history/metric"]) == len(learn.state.rounds)


def test_what_could_not_be_written_is_written_with_the_next(digits):
    class Sometimes(ListTracker):
        calls = 0

        def write(self, points):
            self.calls += 1
            if self.calls in (1, 2):
                raise OSError("busy")
            super().write(points)

    tracker = Sometimes([])
    learn = trained(digits, [tracker])
    assert [value for name, value, _ in tracker.log if name == "history/metric"] == [row["metric"] for row in learn.state.rounds]


def test_ctrl_c_in_a_tracker_is_ctrl_c(digits):
    class Slow(ListTracker):
        def write(self, points):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(digits, [Slow([])])


def test_trackers_by_name(tmp_path, monkeypatch):
    run = SimpleNamespace(folder=tmp_path)
    assert trackers("", run) == trackers(" , ", run) == []
    with pytest.raises(ConfigError, match="There is no tracker 'ml-flow'. Did you mean 'mlflow'"):
        trackers("ml-flow", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package tensorboard, which is not installed; install it with: pip install 'fmnb\[track\]'"):
        trackers("tensorboard", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    made = trackers("mlflow, TensorBoard,mlflow", run)
    assert [type(tracker) for tracker in made] == [MLflowTracker, TensorBoardTracker] and made[1].folder == tmp_path / "tracking"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert trackers("mlflow", run)[0].uri == "http://server"
    monkeypatch.setenv("FMNB_TRACK", "tensorboard")
    assert len(run_trackers(run)) == 1
    monkeypatch.delenv("FMNB_TRACK")
    assert run_trackers(run) == []


def test_a_diverging_training_still_says_so(digits):
    set_seed(0)
    learn = make_learner(make_dataloaders(digits, 16), build_model("cnn", digits.input_spec, digits.classes), callbacks=[ListTracker([])])
    with torch.no_grad():
        learn.model.head.linear.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="in 5 steps in a row"):
        train(learn, make_config({"recipe": "scratch, precision=float32", "epochs": 2, "learning_rate": 3e-3}))
