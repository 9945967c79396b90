"""Runs that can be trusted: one writer, nothing lost by a kill, nothing believed that was edited, bad input told in a sentence."""
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
from fmnb.core import ConfigError, RunError, write_json
from fmnb.run.cli import main
from fmnb.run.execute import resume, run
from fmnb.run.project import new_project
from fmnb.run.record import FORMAT, Run, changed_files, open_run
from fmnb.run.rerun import same_results
from fmnb.run.stage import stage
from fmnb.train.step import is_memory_error

PARAMETERS = 'seed: int = 0\nout: str = ""\noverwrite: bool = False'
START = "from fmnb.config import config_from_notebook\nfrom fmnb.run.record import start_run\nconfig = config_from_notebook(globals())\nrun = start_run(config, 'small')"


def report(folder: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A small report."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (parameters, START, *cells)])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    path = folder / "01_small.ipynb"
    nbformat.write(notebook, path)
    return path


def begin(*words) -> subprocess.Popen:
    """`fmnb run` in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "FMNB_RUN"} | {"OMP_NUM_THREADS": "1"}
    code = "import sys; from fmnb.run.cli import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", code, "run", *map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_four_processes_on_one_folder(tmp_path):
    """One works, three are told so."""
    path = report(tmp_path, "import time; time.sleep(4)", "run.finish()")
    processes = [begin(path, "--out", tmp_path / "run") for _ in range(4)]
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    assert sorted(status for _, status in ends) == [0, 2, 2, 2]
    for said, status in ends:
        assert status == 0 or "is being written by another process" in said or "exists" in said
    assert open_run(tmp_path / "run") and not list((tmp_path / "run").glob(".*"))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and /proc")
def test_killed_and_gone_on(tmp_path):
    """`kill -9` of the command or of its kernel, at four moments; tests/kill_runs.py does the same as often as wanted."""
    said = subprocess.run([sys.executable, Path(__file__).with_name("kill_runs.py"), tmp_path, "4"], capture_output=True, text=True, timeout=600)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout.splitlines()[-1])
    assert (found["different_predictions"], found["unfinished_but_believed"], found["left_over"]) == (0, 0, 0) and found["kills"] >= 4


def test_stages_follow_what_they_depend_on(tmp_path):
    """A change upstream makes again what depends on it, and nothing else."""
    made = []

    def make(name, value):
        made.append(name)
        return {"value": value}

    def once(data, rate):
        loaded = stage(run, "loaded", lambda: make("loaded", data), data)
        counted = stage(run, "counted", lambda: make("counted", len(loaded["value"])), loaded)
        trained = stage(run, "trained", lambda: make("trained", counted["value"] * rate), counted, rate)
        return trained["value"]

    run = Run(tmp_path)
    assert [once("abc", 2), once("abc", 2), once("abc", 3), once("xyz", 3), once("wxyz", 3)] == [6, 6, 9, 9, 12]
    assert made == ["loaded", "counted", "trained", "trained", "loaded", "counted", "loaded", "counted", "trained"]


def test_the_report_goes_on_with_its_stages(tmp_path):
    """What was finished before the error is not done again."""
    counter, switch = tmp_path / "counter", tmp_path / "switch"
    path = report(tmp_path, "from fmnb.run.stage import stage\nfrom pathlib import Path",
                  f"def slow():\n    Path({str(counter)!r}).open('a').write('x')\n    return {{'score': 0.5}}\nslowly = stage(run, 'slow', slow)",
                  f"assert Path({str(switch)!r}).exists(), 'not yet'", "run.write_metrics(slowly)\nrun.finish()")
    with pytest.raises(RunError, match="not yet"):
        run(path, out=tmp_path / "run", progress=False)
    switch.touch()
    done = resume(tmp_path / "run", progress=False)
    assert counter.read_text() == "x" and done.metrics == {"score": 0.5} and not done.stages_folder.exists()


def small_run(folder: Path) -> Run:
    """A finished run of a small report."""
    return run(report(folder, "run.write_metrics({'test': {'accuracy': {'value': 0.5}}})\nrun.finish()"), out=folder / "run", progress=False)


@pytest.mark.parametrize("edit", ["metrics.json", "config.json", "model/model.json", "removed"])
def test_an_edited_run_is_not_believed(edit, tmp_path):
    done = small_run(tmp_path)
    assert changed_files(done) == []
    if edit == "removed":
        (done.folder / "metrics.json").unlink()
    else:
        (done.folder / edit).parent.mkdir(exist_ok=True)
        write_json(done.folder / edit, {"test": {"accuracy": {"value": 0.99}}})
    with pytest.raises(RunError, match="changed after it had finished"):
        open_run(done.folder)
    (done.folder / "notes.txt").touch()
    assert "notes.txt" in changed_files(done)


@pytest.mark.parametrize("status, message", [
    ({"format": FORMAT + 1}, "made by a newer fmnb"),
    ({"artifacts": {"../../etc/passwd": "00", "metrics.json": "00"}}, "metrics.json"),
    ({"status": "running", "host": "another-machine", "process": 1}, "is running"),
    ({"status": "<script>alert(1)</script>"}, "is <script>"),
])
def test_strange_run_folders(status, message, tmp_path):
    done = small_run(tmp_path)
    write_json(done.folder / "status.json", done.status | status)
    with pytest.raises(RunError, match=message):
        open_run(done.folder)


@pytest.mark.parametrize("text, message", [("[1, 2]", "does not say what it was asked for"), ("{" * 100_000, "is not valid JSON"), ('{"asked": {"notebook": "no"}}', "does not say what"),
                                           (json.dumps({"asked": {"notebook": "../../gone.ipynb", "source": "", "parameters": {}, "working_folder": "/no/such"}}), "There is no report")])
def test_a_run_that_cannot_be_gone_on_with(text, message, tmp_path):
    done = small_run(tmp_path)
    done.folder.joinpath("config.json").write_text(text)
    write_json(done.folder / "status.json", done.status | {"status": "interrupted"})
    with pytest.raises((RunError, ConfigError), match=message):
        resume(done.folder, progress=False)


def test_a_huge_file_is_not_read(tmp_path):
    done = small_run(tmp_path)
    with (done.folder / "config.json").open("wb") as file:
        file.truncate(200_000_000)
    with pytest.raises(RunError, match="more than the 100 MB that are read"):
        Run(done.folder).config


def test_a_full_disk(tmp_path, monkeypatch):
    """The error is told, the run has failed, and goes on when there is room."""
    path = report(tmp_path, "run.finish()")
    monkeypatch.setattr("fmnb.run.execute.write_html", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match="No space left on device"):
        run(path, out=tmp_path / "run", progress=False)
    assert Run(tmp_path / "run").status["status"] == "failed"
    monkeypatch.undo()
    assert resume(tmp_path / "run", progress=False).status["status"] == "finished"


@pytest.mark.parametrize("parameters, given, message", [
    ("seed: int = 0  # from 1 to 9", {}, "must be from 1 to 9|must be from 1.0 to 9.0"), ("seed = 0", {}, "may only hold lines like"), ("epochs: int = 3", {"epoch": 4}, "Did you mean 'epochs'"),
    ("share: float = 0.5  # from 0 to 1", {"share": "much"}, "must be of type float"), ("share: float = 0.5  # from 0 to 1", {"share": 7}, "must be from 0.0 to 1.0"),
])
def test_parameters_are_refused_before_anything_is_made(parameters, given, message, tmp_path):
    if parameters.startswith("seed: int"):
        parameters = parameters.replace("seed", "turns")
    path = report(tmp_path, parameters=parameters)
    with pytest.raises(ConfigError, match=message):
        run(path, given, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, given", [("evaluate", {"runs": "{run}"}), ("compare", {"runs": "{run},elsewhere"}), ("prepare", {"decisions": "{run}/decisions.jsonl"}), ("select", {"start_from": "elsewhere, {run}"})])
def test_what_a_run_reads_is_not_replaced(name, given, tmp_path):
    """Whichever parameter names it."""
    finished = run(report(tmp_path), {}, tmp_path / "run", progress=False)
    (finished.folder / "decisions.jsonl").touch()
    with pytest.raises(RunError, match="from which it reads"):
        run(name, {key: value.format(run=finished.folder) for key, value in given.items()}, finished.folder, overwrite=True, progress=False)
    assert (finished.folder / "config.json").exists()


@pytest.mark.parametrize("words", [["finetune"], ["-p", "epochs", "3"], ["--out", "elsewhere"], ["--overwrite"]])
def test_to_go_on_takes_no_other_parameters(words, tmp_path, capsys):
    assert main(["run", *words, "--resume", str(tmp_path)]) == 2
    assert "--resume goes on with the parameters that the run was begun with" in capsys.readouterr().err


def test_two_notebooks_of_one_name_do_not_go_on_with_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, source in (("one", "1 / 0"), ("two", "2")):
        (tmp_path / name).mkdir()
        path = report(tmp_path / name, source)
        with pytest.raises(RunError, match="ZeroDivisionError" if name == "one" else "exists and holds a run with other parameters"):
            run(path, {}, progress=False)


def test_going_on_with_a_changed_notebook_is_said(tmp_path):
    path = report(tmp_path, "1 / 0")
    with pytest.raises(RunError):
        run(path, {}, tmp_path / "run", progress=False)
    report(tmp_path, "2")
    with pytest.warns(RuntimeWarning, match="has changed since this run began"):
        assert resume(tmp_path / "run", progress=False).status["status"] == "finished"


def test_papermill_with_our_engine_refuses_too(tmp_path, monkeypatch):
    """Before there is a kernel: the client that would start one is not asked."""
    started = []
    monkeypatch.setattr("fmnb.run.engine.BoundedClient.execute", lambda client: started.append(client))
    path, settings = report(tmp_path, "1 / 0"), dict(engine_name="fmnb", kernel_name="python3", language="python", progress_bar=False)
    with pytest.raises(ConfigError, match="Did you mean 'seed'"):
        papermill.execute_notebook(str(path), str(tmp_path / "out.ipynb"), {"sed": 1}, **settings)
    assert not started
    papermill.execute_notebook(str(path), str(tmp_path / "out.ipynb"), {"seed": 1}, **settings)
    assert len(started) == 1


def test_a_flood_of_output(tmp_path):
    """500 MB printed by one cell: the report stays small, and says so."""
    path = report(tmp_path, "for _ in range(500):\n    print('x' * 1_000_000)", "run.finish()")
    done = run(path, out=tmp_path / "run", progress=False)
    assert (done.folder / "report.ipynb").stat().st_size < 25_000_000 and "was cut here" in (done.folder / "report.ipynb").read_text()


def test_what_a_run_was_made_with_is_kept(tmp_path):
    done = small_run(tmp_path)
    config = done.config
    assert {"asked", "code", "git", "packages", "hardware", "determinism", "parameters", "report", "format"} <= set(config)
    assert config["asked"]["notebook"].endswith("01_small.ipynb") and Path(config["asked"]["working_folder"]) == Path.cwd()
    assert set(done.status["artifacts"]) - {"changes.diff"} == {"config.json", "metrics.json", "report.html", "report.ipynb"}
    assert pd.Timestamp(done.status["started"]) <= pd.Timestamp(done.status["updated"])


def test_what_prepare_and_select_leave_is_compared(tmp_path):
    """Not their times and costs, and not their sentences; and a run that leaves nothing is not called the same."""
    def made(name, items=b"", **metrics):
        folder = tmp_path / name
        folder.mkdir()
        if items:
            (folder / "items.arrow").write_bytes(items)
        if metrics:
            write_json(folder / "metrics.json", metrics)
        return Run(folder)
    assert same_results(made("a", b"1"), made("b", b"1")) == (True, "All 1 files are identical.")
    assert same_results(made("c", b"1"), made("d", b"2"))[0] is False and same_results(made("e"), made("f"))[0] is False
    first, second, third = (made(name, advice=[{"score": score, "seconds": seconds, "reason": f"{seconds}"}], costs=[{"low": seconds}], findings=[f"{seconds} s"])
                            for name, score, seconds in (("g", 0.9, 1.0), ("h", 0.9, 2.0), ("i", 0.8, 1.0)))
    assert same_results(first, second)[0] and not same_results(first, third)[0]


def test_a_project_of_a_notebook_stays_in_its_folder(tmp_path):
    path = report(tmp_path, parameters='data: str = "digits"\n' + PARAMETERS)
    folder = new_project(tmp_path / "project", report=str(path))
    assert {file.name for file in folder.iterdir()} == {"small.ipynb", "Makefile", "README.md", ".gitignore"}
    assert {file.name for file in tmp_path.iterdir()} == {"01_small.ipynb", "project"}


@pytest.mark.parametrize("words", ["CUDNN_STATUS_ALLOC_FAILED", "MPS backend out of memory", "unable to find an engine to execute this computation"])
def test_memory_errors_are_known_by_their_words(words):
    assert is_memory_error(RuntimeError(words)) and not is_memory_error(ValueError(words)) and not is_memory_error(RuntimeError("shapes differ"))
