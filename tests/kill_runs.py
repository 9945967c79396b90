"""Kill `fmnb run finetune` again and again, with `kill -9`, at any moment; then see that nothing was lost and nothing half-written is believed.

    python tests/kill_runs.py FOLDER KILLS [SEED]

Every run is killed several times, then left alone to finish. Sometimes the command is killed, sometimes its kernel.
"""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from fmnb.core import RunError
from fmnb.run.record import changed_files, open_run

PARAMETERS = ["-p", "epochs", "4", "-p", "learning_rate", "0.003", "-p", "batch_size", "64"]
KILLS_A_RUN = 5
COMMAND = [sys.executable, "-c", "import sys; from fmnb.run.cli import main; sys.exit(main())", "run"]


def begin(*words):
    environment = {name: value for name, value in os.environ.items() if name != "FMNB_RUN"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*COMMAND, *map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kernels(process):
    """The processes that a process has started."""
    found = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if f" {process} " in _stat(path)]
    return found


def _stat(path):
    try:
        parent = path.read_text().rpartition(")")[2].split()[1]
        return f" {parent} "
    except OSError:
        return ""


def doing(folder):
    """How far a run has come, from what is in its folder."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} if folder.exists() else set()
    stages = [("report.html", "closing"), ("metrics.json", "writing"), ("stages/predictions.json", "evaluating"), (r"training/.*/checkpoint\.safetensors", "training"),
              (r"training/.*/defaults\.json", "measuring"), ("config.json", "preparing")]
    return next((label for pattern, label in stages if any(re.fullmatch(pattern, name) for name in names)), "starting")


def main(folder, kills, seed=0):
    random.seed(seed)
    folder = Path(folder)
    start = time.monotonic()
    assert begin("finetune", *PARAMETERS, "--out", folder / "whole").wait() == 0
    seconds = time.monotonic() - start
    whole = open_run(folder / "whole")
    moments, different, believed, left, number = Counter(), 0, 0, 0, 0
    while sum(moments.values()) < kills:
        number += 1
        out = folder / f"run {number}"
        for turn in range(KILLS_A_RUN + 1):
            words = ("finetune", *PARAMETERS, "--out", out) if turn % 2 == 0 or not (out / "config.json").exists() else ("--resume", out)
            process = begin(*words)
            if turn < KILLS_A_RUN:
                time.sleep(random.uniform(0, 1.05 * seconds))
            elif process.wait(timeout=600):
                raise SystemExit(f"{out}: {process.stderr.read()}")
            if process.poll() is not None:
                break
            moments[doing(out)] += 1
            started = kernels(process.pid)
            os.kill(random.choice([process.pid, *started]), signal.SIGKILL)
            time.sleep(random.choice([0, 0.5, 3]))
            if process.poll() is None and turn % 3:
                process.wait(timeout=60)
            elif process.poll() is None:
                process.kill()
            process.wait()
            try:
                killed = open_run(out)
            except (RunError, FileNotFoundError):
                continue
            believed += not (killed.predictions.equals(whole.predictions) and (out / "report.html").exists() and not changed_files(killed))
            break  # it had just finished
        done = open_run(out)
        different += not done.predictions.equals(whole.predictions)
        left += len([path for path in out.rglob("*") if path.name.startswith(".") or path.name in ("training", "stages")])
    print(json.dumps(dict(kills=sum(moments.values()), runs=number, during=dict(moments), different_predictions=different, unfinished_but_believed=believed, left_over=left, seconds_of_a_run=round(seconds, 1))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(int, sys.argv[3:]))
