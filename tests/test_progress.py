"""How far a training is: said where a person looks, and never left in a notebook."""
import nbformat
from fmnb.run.execute import run

TRAINING = """
import time
from fmnb.explore.monitor import TerminalLine
line = TerminalLine()
line.last -= 11  # as if ten seconds had gone by
line.say("step 5 of 10, loss 0.5, 5 s left")
line.close()
print("trained")
"""


def notebook(path):
    cells = [nbformat.v4.new_code_cell("number: int = 0", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(TRAINING)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_a_log_gets_a_line_and_the_notebook_none(tmp_path, capfd, cold, monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # below pytest ipykernel leaves a kernel's stderr alone
    done = run(notebook(tmp_path / "training.ipynb"), {}, tmp_path / "run")
    assert "step 5 of 10, loss 0.5, 5 s left" in capfd.readouterr().err
    assert [output.text for output in nbformat.read(done.folder / "report.ipynb", 4).cells[-1].outputs] == ["trained\n"]


def test_without_progress_it_is_silent(tmp_path, capfd, cold, monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    run(notebook(tmp_path / "training.ipynb"), {}, tmp_path / "run", progress=False)
    assert "step 5 of 10" not in capfd.readouterr().err
