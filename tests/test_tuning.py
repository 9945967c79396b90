"""Searches that are killed, shared and refused."""
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from fmnb.config import make_config
from fmnb.core import ConfigError, RunError
from fmnb.data.load import make_dataloaders
from fmnb.data.prepare import prepare
from fmnb.data.source import load_items
from fmnb.data.split import split_items
from fmnb.model.head import build_model
from fmnb.run.execute import run
from fmnb.train.finetune import train
from fmnb.train.learner import learner_history, make_learner
from fmnb.train.tune import Range, ReportEpochs, best_trials, cheapest_trial, defaults_trial, open_study, search, trials_table

SPACE = {"rate": Range(1e-4, 1e-1, log=True), "size": (8, 16)}
CODE = """
import os, sys, time
from pathlib import Path
from fmnb.train.tune import Range, open_study, search
space = {"rate": Range(1e-4, 1e-1, log=True), "size": (8, 16)}
file = Path(sys.argv[1])

def train_once(values, report):
    with open(file.with_suffix(".log"), "a") as log:
        log.write(f"{os.getpid()} {values['rate']}\\n")
    time.sleep(float(sys.argv[2]) if len(file.with_suffix(".log").read_text().splitlines()) != int(sys.argv[3]) else 60)
    return values["rate"], 1.0

search(open_study(file, space), file, space, train_once, {"rate": 0.01, "size": 8}, 8)
"""


def begin(file, seconds, hangs_at=0):
    """A process that makes trials until there are eight; it hangs in one of them."""
    return subprocess.Popen([sys.executable, "-c", CODE, file, str(seconds), str(hangs_at)], stderr=subprocess.PIPE, text=True)


def begun(file):
    log = file.with_suffix(".log")
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def kill_in(file, number):
    """Let a process begin so many trials, and kill it in the last."""
    process, until = begin(file, 0.05, hangs_at=number), time.monotonic() + 120
    while len(begun(file)) < number:
        assert process.poll() is None and time.monotonic() < until, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def finished(file):
    table = trials_table(open_study(file, SPACE))
    return table[table["state"].isin(["complete", "pruned"])]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_killed_search_loses_no_finished_trial(tmp_path):
    file = tmp_path / "study.db"
    kill_in(file, 4)
    before = finished(file)
    assert len(before) == 3
    search(open_study(file, SPACE), file, SPACE, lambda values, report: (values["rate"], 1.0), {"rate": 0.01, "size": 8}, 8)
    after = finished(file)
    assert len(after) == 8 and after[:3]["rate"].tolist() == before["rate"].tolist()
    assert after["rate"].tolist()[0] == 0.01  # the defaults
    assert after["rate"].tolist()[3] == pytest.approx(float(begun(file)[3][1]))  # what was being tried is tried again


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_killed_in_its_first_trial_it_keeps_the_defaults(tmp_path):
    """They are tried again under another number, and are known by it."""
    file = tmp_path / "study.db"
    kill_in(file, 1)
    search(study := open_study(file, SPACE), file, SPACE, lambda values, report: (values["rate"], 1.0), {"rate": 0.01, "size": 8}, 8)
    first = defaults_trial(study)
    assert first > 0 and trials_table(study).loc[first, "rate"] == 0.01 and trials_table(study).loc[first, "state"] == "complete"
    assert first not in best_trials(study, 9) and len(best_trials(study, 9)) == 7


def test_ctrl_c_in_a_notebook(tmp_path):
    """The process lives on, and what it was trying is tried again."""
    file, study = tmp_path / "study.db", None
    for train_once in (lambda values, report: (_ for _ in ()).throw(KeyboardInterrupt), lambda values, report: (values["rate"], 1.0)):
        try:
            search(study := open_study(file, SPACE), file, SPACE, train_once, {"rate": 0.01, "size": 8}, 1)
        except KeyboardInterrupt:
            assert trials_table(study)["state"].tolist() == ["running"]
    table = trials_table(study)
    assert table["state"].tolist() == ["fail", "complete"] and table["rate"].tolist() == [0.01, 0.01] and defaults_trial(study) == 1


@pytest.mark.parametrize("epochs", range(1, 10))
def test_no_trial_is_ended_at_its_end(epochs, tmp_path):
    """There is nothing left to save, and its score is known."""
    def train_once(values, report):
        for epoch in range(1, epochs + 1):
            seen.append(epoch)
            report(epoch, values["rate"] * epoch)
        return values["rate"] * epochs, 1.0
    file, seen = tmp_path / "study.db", []
    search(study := open_study(file, SPACE, epochs=epochs), file, SPACE, train_once, {"rate": 0.05, "size": 8}, 10)
    table = trials_table(study)
    assert len(seen) < 10 * epochs if epochs > 2 else len(seen) <= 10 * epochs
    ended = [max(trial.intermediate_values) for trial in study.get_trials() if trial.state.name == "PRUNED"]
    assert all(epoch < epochs for epoch in ended) and len(ended) == (table["state"] == "pruned").sum()


def test_two_processes_share_a_study(tmp_path):
    file = tmp_path / "study.db"
    processes = [begin(file, 0.4) for _ in range(2)]
    for process in processes:
        assert process.wait(120) == 0, process.stderr.read()
    table = finished(file)
    assert len(table) == 8 and table["rate"].nunique() == 8  # neither more than asked for, nor one twice
    assert len({process for process, _ in begun(file)}) == 2


@pytest.mark.parametrize("contents", [b"this is no database", b"SQLite format 3\0" + b"\xff" * 5000, None])
def test_a_corrupt_file_is_named(contents, tmp_path):
    file = tmp_path / "study.db"
    if contents is None:  # cut in half
        search(open_study(file, SPACE), file, SPACE, lambda values, report: (values["rate"], 1.0), {}, 3)
        contents = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(contents)
    with pytest.raises(RunError, match="study.db holds no study that can be read"):
        search(open_study(file, SPACE), file, SPACE, lambda values, report: (values["rate"], 1.0), {}, 6)


def test_another_space_or_subject_is_refused(tmp_path):
    file = tmp_path / "study.db"
    open_study(file, SPACE, "digits")
    for space, subject in ((SPACE | {"size": (8, 32)}, "digits"), (SPACE, "docstrings")):
        with pytest.raises(ConfigError, match="study.db is a study of"):
            open_study(file, space, subject)
    open_study(file, dict(SPACE), "digits")


def test_the_budget_in_seconds_is_that_of_all_trials(tmp_path):
    file = tmp_path / "study.db"

    def slow(values, report):
        time.sleep(0.2)
        return values["rate"], 0.2
    search(open_study(file, SPACE), file, SPACE, slow, {}, seconds=1.0)
    first = len(finished(file))
    search(open_study(file, SPACE), file, SPACE, slow, {}, seconds=1.0)  # nothing is left of it
    assert 2 <= first <= 6 and len(finished(file)) == first


def test_pruned_trials_cost_less(tmp_path):
    """Successive halving ends what falls behind, and finds as good a rate."""
    def train_once(values, report):
        for epoch in range(1, 11):
            steps.append(epoch)
            report(epoch, good(values) - 0.7**epoch)
        return good(values), 1.0

    def good(values):
        return -abs(math.log10(values["rate"] / 0.01))
    spent, best = {}, {}
    for prune in (True, False):
        steps = []
        file = tmp_path / f"{prune}.db"
        search(open_study(file, SPACE, epochs=10 * prune), file, SPACE, train_once, {"rate": 0.05, "size": 8}, 20)
        table = finished(file)
        spent[prune], best[prune] = len(steps), table.loc[table["state"] == "complete", "score"].max()
    assert spent[True] < 0.8 * spent[False] and best[True] > best[False] - 0.05


def test_a_training_is_ended_early(tmp_path):
    """Through fastai, which looks into what a callback raises; the search goes on behind it."""
    prepared = prepare(split_items(load_items("digits")))

    def train_once(values, report):
        config = make_config({"recipe": "scratch, precision=float32", "epochs": 3, "batch_size": 64, "learning_rate": values["rate"], "family": "cnn"})
        model = build_model("cnn", prepared.input_spec, prepared.classes, prepared.preprocessing, {"base": 4})
        learn = train(make_learner(make_dataloaders(prepared, 64), model, callbacks=[ReportEpochs(report)]), config)
        return learner_history(learn)["metric"].iloc[-1], 1.0
    space, file = {"rate": (1e-6, 3e-3)}, tmp_path / "study.db"
    search(open_study(file, space, epochs=3), file, space, train_once, {"rate": 3e-3}, 12)
    table = trials_table(open_study(file, space))
    assert 1e-6 in set(table.loc[table["state"] == "pruned", "rate"]) and table["state"].isin(["complete", "pruned"]).sum() == len(table) == 12


def test_the_cheapest_of_the_good_trials_is_taken(tmp_path):
    """Within a margin of the best; the best are listed without the defaults, of equal ones the first before the others."""
    file, told = tmp_path / "study.db", iter([(0.80, 4.0), (0.90, 8.0), (0.89, 2.0), (0.90, 1.0), (0.70, 0.5)])
    search(study := open_study(file, SPACE, cost=True), file, SPACE, lambda values, report: next(told), {"rate": 0.01, "size": 8}, 5)
    assert list(trials_table(study)["seconds"]) == [4.0, 8.0, 2.0, 1.0, 0.5] and set(trials_table(study)["state"]) == {"complete"}
    assert [list(cheapest_trial(study, within)) for within in (0.0, 0.005, 0.1, 0.25)] == [[3], [3], [3], [4]]
    assert list(best_trials(study)) == [1, 3, 2] and list(best_trials(study, 9)) == [1, 3, 2, 4]  # never the defaults


def test_short_trainings_are_searched_for_too(tmp_path):
    """Passes and width are searched, no trial is ended, and a longer final training keeps the share of the passes."""
    done = run("tune", {"family": "cnn", "backbone": "residual, base=4", "epochs": 4, "trials": 5, "search_minutes": 0.0, "strategy": "pareto"}, tmp_path / "run", progress=False)
    table = done.history
    assert list(table["state"]) == ["complete"] * 5
    assert (table.loc[0, "epochs"], table.loc[0, "backbone.base"]) == (4, 4)  # the defaults first
    assert table["epochs"].between(1, 4).all() and set(table["backbone.base"]) <= {2, 4, 8} and table["epochs"].nunique() > 1
    assert any("The tuned training took" in finding or "The defaults stand" in finding for finding in done.metrics["findings"])
    shorter = done.metrics["models"]["tuned"]["train_seconds"] < done.metrics["models"]["defaults"]["train_seconds"]
    assert done.metrics["advised"] == "defaults" or shorter
    with pytest.raises(ConfigError, match="strategy"):
        make_config({"strategy": "fastest"})
