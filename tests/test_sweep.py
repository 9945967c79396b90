"""Many runs: sweeps that are stopped, killed and gone on with; workers, kernels and servers that die; warm kernels like ordinary ones."""
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
from fmnb.core import ConfigError, RunError
from fmnb.run.cli import main
from fmnb.run.execute import run
from fmnb.run.kernel import notebook_imports, warm_kernels
from fmnb.run.parameters import find_report
from fmnb.run.record import open_run
from fmnb.run.sweep import _lock, plan_sweep, sweep
from jupyter_client.manager import start_new_kernel

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc"), pytest.mark.usefixtures("cold")]
PARAMETERS = 'number: int = 0\ntext: str = ""\nseed: int = 0\nout: str = ""\noverwrite: bool = False'
START = "import os, signal, time\nfrom pathlib import Path\nfrom fmnb.config import config_from_notebook\nfrom fmnb.run.record import start_run"
BEGIN = "run = start_run(config_from_notebook(globals()), 'small')"
SLOW = "Path(out, 'begun').touch()\ntime.sleep(0 if number == 0 else 3)\nPath(out, 'begun').unlink()"


@pytest.fixture
def small(tmp_path):
    """A function that writes a report of one step."""
    def write(step, *imports):
        cells = [nbformat.v4.new_code_cell(source) for source in (START, PARAMETERS, BEGIN, *imports, step, "run.write_metrics({'test': {'number': {'value': number}}})\nrun.finish()")]
        cells[1].metadata["tags"] = ["parameters"]
        path = tmp_path / "01_small.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return path
    return write


def begin(report: Path, out: Path, **settings) -> subprocess.Popen:
    """A sweep over number 0 to 2 in a process of its own."""
    code = f"from fmnb.run.sweep import sweep; sweep({str(report)!r}, {{}}, {{'number': [0, 1, 2]}}, out={str(out)!r}, jobs=2, **{settings!r})"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def go_on(report: Path, out: Path, **settings) -> pd.DataFrame:
    return sweep(report, {}, {"number": [0, 1, 2]}, out=out, jobs=2, progress=False, **settings)


def wait_for(condition, seconds=60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.05)


def half_way(process: subprocess.Popen, out: Path) -> list[psutil.Process]:
    """Wait until one run has finished and two are at work; all processes that the sweep has started."""
    def ready():
        assert process.poll() is None, process.stderr.read()
        states = [json.loads(path.read_text())["status"] for path in out.glob("*/status.json")]
        return "finished" in states and len(list(out.glob("*/begun"))) == 2
    wait_for(ready)
    return psutil.Process(process.pid).children(recursive=True)


def times(out: Path) -> dict[str, float]:
    return {path.parent.name: path.stat().st_mtime for path in out.glob("*/metrics.json")}


@pytest.mark.parametrize("warm", [True, False])
def test_killed_alone_leaves_nothing_behind_and_goes_on(small, tmp_path, warm):
    report, out = small(SLOW), tmp_path / "sweep"
    process = begin(report, out, warm=warm)
    started = half_way(process, out)
    assert len(started) >= (7 if warm else 4)  # two workers with a kernel each; a server, and clients
    process.kill()
    process.wait()
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in started), 30)
    before = times(out)
    table = go_on(report, out)
    assert table["status"].tolist() == ["finished"] * 3 and table["number"].tolist() == [0, 1, 2]
    assert before and before.items() <= times(out).items()


def test_killed_with_all_its_processes(small, tmp_path):
    report, out = small(SLOW), tmp_path / "sweep"
    process = begin(report, out)
    for one in [*half_way(process, out), psutil.Process(process.pid)]:
        one.kill()
    process.wait()
    before = times(out)
    assert go_on(report, out)["status"].tolist() == ["finished"] * 3
    assert before and before.items() <= times(out).items()


def test_control_c_interrupts_all(small, tmp_path):
    report, out = small(SLOW), tmp_path / "sweep"
    process = begin(report, out)
    started = half_way(process, out)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in started)
    states = pd.read_csv(out / "sweep.csv")["status"]
    assert set(states) <= {"finished", "interrupted", "waiting"} and "interrupted" in set(states)
    assert go_on(report, out)["status"].tolist() == ["finished"] * 3


def test_failures_are_kept_and_only_they_are_retried(small, tmp_path):
    out = tmp_path / "sweep"
    report = small("if number == 1: raise ValueError('one is\\nno number')")
    table = go_on(report, out)
    assert table["status"].tolist() == ["finished", "failed", "finished"] and table["error"][1].startswith("ValueError: one is")
    small("pass")
    before = times(out)
    assert go_on(report, out)["status"].tolist() == table["status"].tolist() and times(out) == before
    table = go_on(report, out, retry=True)
    assert table["status"].tolist() == ["finished"] * 3 and before.items() <= times(out).items()
    assert pd.read_csv(out / "sweep.csv")["number"].tolist() == [0, 1, 2]


def test_a_retried_run_goes_on_where_it_failed(small, tmp_path):
    """What its folder holds is kept, unless the notebook has changed."""
    out, switch = tmp_path / "sweep", tmp_path / "switch"
    step = f"with open(Path(out, 'count'), 'a') as file: file.write('x')\nassert number == 1 or Path({str(switch)!r}).exists()"
    assert go_on(small(step), out)["status"].tolist() == ["failed", "finished", "failed"]
    switch.touch()
    assert go_on(small(step), out, retry=True)["status"].tolist() == ["finished"] * 3
    assert sorted(path.read_text() for path in out.glob("*/count")) == ["x", "xx", "xx"]
    switch.unlink()
    assert "failed" in set(go_on(small(step), tmp_path / "other")["status"])
    switch.touch()
    assert go_on(small(step + "  # another notebook"), tmp_path / "other", retry=True)["status"].tolist() == ["finished"] * 3
    assert {path.read_text() for path in (tmp_path / "other").glob("*/count")} == {"x"}


def test_a_folder_of_something_else_is_left_alone(small, tmp_path):
    """Neither by the sweep nor by its repetition."""
    out, report = tmp_path / "sweep", small("pass")
    table = go_on(report, out)
    folder = next(path for path in sorted(out.iterdir()) if path.is_dir())
    for path in list(folder.iterdir()):
        path.unlink() if path.is_file() else None
    (folder / "thesis.txt").write_text("mine")
    for _ in range(2):
        assert go_on(report, out, retry=True)["status"].tolist().count("finished") == len(table) - 1
        assert (folder / "thesis.txt").read_text() == "mine"


def test_a_worker_dies(small, tmp_path):
    report = small("if number == 1: os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)")
    table = go_on(report, tmp_path / "sweep", warm=False)
    assert table["status"].tolist() == ["finished", "failed", "finished"]
    assert "ended without an answer (SIGKILL)" in table["error"][1]
    small("pass")
    assert go_on(report, tmp_path / "sweep", retry=True)["status"].tolist() == ["finished"] * 3


@pytest.mark.parametrize("warm", [True, False])
def test_a_kernel_dies(small, tmp_path, warm):
    report = small("if number == 1: os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)")
    table = go_on(report, tmp_path / "sweep", warm=warm)
    assert table["status"].tolist() == ["finished", "failed", "finished"] and "the kernel died" in table["error"][1]


def test_the_server_dies(small, tmp_path):
    """The run that killed it fails, the others have ordinary kernels, and it is said once."""
    report = small("if number == 0: os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)")
    with pytest.warns(RuntimeWarning, match="Kernels were ordinary ones") as said:
        table = sweep(report, {}, {"number": [0, 1, 2]}, out=tmp_path / "sweep", progress=False)
    assert table["status"].tolist() == ["failed", "finished", "finished"]
    assert len([warning for warning in said if "not warm" in str(warning.message)]) == 1


def test_threads_stand_in_the_way_of_a_fork(small, tmp_path, monkeypatch):
    (tmp_path / "threaded.py").write_text("import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    report = small("pass", "import threaded")
    with pytest.warns(RuntimeWarning, match="starts threads"):
        assert sweep(report, {}, {"number": [0, 1]}, out=tmp_path / "sweep", progress=False)["status"].tolist() == ["finished"] * 2


def test_two_at_a_time(small, tmp_path):
    """Each of two runs waits for the other to begin."""
    report = small("Path(out, 'begun').touch()\nuntil = time.monotonic() + 60\n"
                   "while len(list(Path(out).parent.glob('*/begun'))) < 2:\n    assert time.monotonic() < until\n    time.sleep(0.05)")
    table = sweep(report, {}, {"number": [0, 1]}, out=tmp_path / "sweep", jobs=2, progress=False)
    assert table["status"].tolist() == ["finished"] * 2


HOSTILE = ["", " ", "..", "../../escaped", "/tmp/x", "a/b", "a\\b", "it's", 'say "so"', "{number}", "{0}", "$(touch x)", "; rm", "line\nbreak", "tab\t", "ümläut", "日本", "a" * 3000, "A", "a",
           "null", "true", "1e3", "%s", "\u202e", "=cmd", "-", "CON", "a,b=c", "\r\n", "'''", '"""', "\\", "\\n"]


def test_hostile_values_arrive_and_stay_inside(small, tmp_path):
    plan = plan_sweep(small("pass"), {}, {"text": HOSTILE})
    names = [planned.name for planned in plan]
    assert len({name.casefold() for name in names}) == len(HOSTILE) and all(Path(name).name == name and len(name) <= 140 for name in names)
    report = small("run.write_history(__import__('pandas').DataFrame({'text': [text]}))")
    few = ["../../escaped", "{number}", "line\nbreak", "it's \"so\" \\n", "日本"]
    table = sweep(report, {}, {"text": few}, out=tmp_path / "deep" / "er" / "sweep", jobs=2, progress=False)
    assert table["status"].tolist() == ["finished"] * len(few), table["error"].tolist()
    assert [open_run(tmp_path / "deep" / "er" / "sweep" / name).history["text"][0] for name in table["run"]] == few == table["text"].tolist()
    assert not (tmp_path / "deep" / "escaped").exists() and pd.read_csv(tmp_path / "deep" / "er" / "sweep" / "sweep.csv")["text"].tolist() == few


@pytest.mark.parametrize("grid", [{"number": ["\ud800"]}, {"text": ["a\0"]}, {"text": ["\ud800"]}, {"text": [None]}, {"text": [["a"]]}, {"number": [float("nan")]}, {"number": [True]}, {"number": [1, 1.0]},
                                  {1: ["a"]}, {"run": [1]}, [[]], "number", 7, {"number": 7}, [{"number": 1}, "x"]])
def test_what_cannot_be_run_is_refused_before_anything_starts(small, tmp_path, grid):
    with pytest.raises(ConfigError):
        sweep(small("pass"), {}, grid, out=tmp_path / "sweep", progress=False)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("seeds", [0, -1, True, "3", [], [0, 0], ["x"], [-1], None])
def test_seeds_are_checked(small, seeds):
    with pytest.raises(ConfigError):
        plan_sweep(small("pass"), {}, {"number": [1]}, seeds)


def test_one_sweep_in_a_folder(tmp_path):
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    _lock(first, tmp_path)
    with pytest.raises(RunError, match="Another sweep is at work"):
        _lock(second, tmp_path, patience=0)
    os.close(first)
    _lock(second, tmp_path, patience=0)
    os.close(second)


def test_the_command(small, tmp_path, capsys):
    report = small("if number == 1: raise ValueError('no')")
    file = tmp_path / "asked.yaml"
    file.write_text(json.dumps({"report": str(report), "grid": {"number": [0, 1]}, "seeds": [5]}))
    arguments = ["sweep", str(file), "--out", str(tmp_path / "sweep"), "-n", "2"]
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert "finished" in said.out and "ValueError: no" in said.out
    small("pass")
    assert main(arguments) == 1 and main([*arguments, "--retry"]) == 0


def test_a_warm_kernel_is_interrupted_and_ends_with_its_client():
    """Ctrl-C reaches it by way of the client; when the client is killed, nothing that it stood for lives on."""
    with warm_kernels(1, []) as name:
        manager, client = start_new_kernel(kernel_name=name)
        reply = client.execute("import os, subprocess, time; child = subprocess.Popen(['sleep', '600'])", user_expressions={"own": "os.getpid()", "child": "child.pid"}, reply=True, timeout=60)
        own, child = (int(reply["content"]["user_expressions"][key]["data"]["text/plain"]) for key in ("own", "child"))
        client.execute("print('begun'); time.sleep(60)")
        while client.get_iopub_msg(timeout=60)["content"].get("text") != "begun\n":
            pass
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=30)["content"]["ename"] == "KeyboardInterrupt"
        assert own != manager.provisioner.process.pid and psutil.pid_exists(own) and psutil.pid_exists(child)
        manager.provisioner.process.kill()
        wait_for(lambda: not psutil.pid_exists(own) and not psutil.pid_exists(child), 30)
        client.stop_channels()
        manager.cleanup_resources()


def test_imports_after_a_setting_are_left_to_the_kernel(small):
    report = small("pass", "import json", "%matplotlib inline", "import shelve\nx = 1", "os.environ['A'] = 'b'", "import csv")
    assert notebook_imports([report])[-1] == "import json" and len(notebook_imports([report])) == 5


def figures(done) -> list[str]:
    """All pictures of a report."""
    notebook = nbformat.read(done.folder / "report.ipynb", as_version=4)
    return [output.data["image/png"] for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]


def test_warm_kernels_come_to_the_same(tmp_path):
    """Bit for bit: weights, history, predictions, metrics and figures."""
    asked = {"data": "digits", "family": "cnn", "epochs": 1, "learning_rate": 3e-3}
    cold = run("finetune", asked, tmp_path / "cold", progress=False, variables={"OMP_NUM_THREADS": "1"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with warm_kernels(1, notebook_imports([find_report("finetune")])) as kernel:
            warm = run("finetune", asked, tmp_path / "warm", progress=False, kernel=kernel)
    pd.testing.assert_frame_equal(cold.predictions, warm.predictions, check_exact=True)
    pd.testing.assert_frame_equal(cold.history.drop(columns="seconds"), warm.history.drop(columns="seconds"), check_exact=True)
    assert (cold.model_folder / "model.safetensors").read_bytes() == (warm.model_folder / "model.safetensors").read_bytes()
    assert cold.metrics["test"] == warm.metrics["test"] and cold.config["hardware"] == warm.config["hardware"]
    assert figures(cold) == figures(warm) and len(figures(cold)) > 2
