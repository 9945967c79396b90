"""Advice within limits: what does not fit, what fails, and what was trained before."""
import json
import shutil

import pytest
from fmnb.core import RunError
from fmnb.run.execute import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run to start from."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    return run("finetune", {"backbone": "base=8", "epochs": 2, "learning_rate": 0.003}, folder, progress=False)


def test_trained_weights_are_considered_and_damaged_ones_left_out(trained, tmp_path):
    damaged = shutil.copytree(trained.folder, tmp_path / "damaged")
    (damaged / "model" / "model.safetensors").write_bytes(b"nothing")
    asked = {"families": "cnn", "start_from": f"{trained.folder},{damaged}", "search_minutes": 0.05}
    done = run("select", asked, tmp_path / "selected", progress=False)
    advice = {row["candidate"]: row for row in done.metrics["advice"]}
    assert advice["cnn from trained"]["score"] > 0.5
    assert advice["cnn from damaged"]["score"] is None and "model.safetensors" in advice["cnn from damaged"]["reason"]
    page = (done.folder / "report.html").read_text()
    assert "LogME" in page and "fmnb run finetune" in page
    assert done.metrics["parameters"]["data"] == "digits" and json.dumps(done.metrics)


@pytest.mark.parametrize("limits, message", [
    ({"budget": 1e-4}, r"No candidate fits into the limits. The cheapest is cnn .*, which needs about [\d.e-]+ minutes"),
    ({"max_memory": 1e-3}, r"No candidate fits into the limits. The cheapest is cnn .*, which needs about [\d.e-]+ minutes and [\d.]+ GiB"),
])
def test_limits_that_nothing_fits_name_the_cheapest(limits, message, tmp_path):
    with pytest.raises(RunError, match=message):
        run("select", {"families": "cnn"} | limits, tmp_path / "selected", progress=False)


def test_data_without_labels_are_refused(tmp_path):
    (tmp_path / "texts.csv").write_text("text\n" + "".join(f"a text of {number} words\n" for number in range(60)))
    for report in ("select", "tune", "compare"):
        with pytest.raises(RunError, match="The data have no labels"):
            run(report, {"data": str(tmp_path / "texts.csv")}, tmp_path / report, progress=False)
