"""What differs between two runs: settings, cells and scores, also where something is missing, broken or hostile."""
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from fmnb.core import RunError, write_json
from fmnb.eval.difference import paired_difference
from fmnb.eval.metrics import measure
from fmnb.eval.predict import predictions_table
from fmnb.run.diff import RunDiff, diff_runs, differing_cells, differing_settings

needs_nbdime = pytest.mark.skipif(importlib.util.find_spec("nbdime") is None, reason="nbdime is not installed: pip install 'fmnb[diff]'")
IDS = [f"i{number:03d}" for number in range(300)]
CELLS = ["import pandas as pd", "items = load_items(data)\nitems.head()", "learn = train(learn, config)", "# %% prose"]


def predicted(seed: int, wrong: float = 0.1, ids=IDS, split="test") -> pd.DataFrame:
    rng, target = np.random.default_rng(seed), np.array(["a", "b", "c"])[np.arange(len(ids)) % 3]
    return pd.DataFrame({"item_id": ids, "split": split, "target": target, "prediction": np.where(rng.random(len(ids)) < wrong, "a", target)})


def notebook(path: Path, sources, tags=None, outputs=False) -> None:
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": (tags or {}).get(number, [])}) for number, source in enumerate(sources)]
    for cell in cells if outputs else []:
        cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text=f"said {np.random.default_rng().random()}")], int(np.random.default_rng().integers(99))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def make(folder: Path, predictions=None, config=None, cells=CELLS, status="finished", **more) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "status.json", {"status": status, "started": "2026-11-02T10:00:00+01:00", "process": 1})
    write_json(folder / "config.json", config or {"report": "finetune", "parameters": {"seed": 0}, "git": {"commit": "1f3", "dirty": False}})
    if predictions is not None:
        predictions.to_parquet(folder / "predictions.parquet")
        write_json(folder / "metrics.json", {"test": measure(predictions[predictions["split"] == "test"], resamples=50)} | more)
    if cells:
        notebook(folder / "report.ipynb", cells, outputs=True)
    return folder


@pytest.fixture
def two(tmp_path):
    return make(tmp_path / "first", predicted(0), n_parameters=1000, train_seconds=3.0), make(tmp_path / "second", predicted(1, 0.3), n_parameters=2000)


def test_metrics_stand_side_by_side_with_the_paired_difference(two):
    found = diff_runs(*two)
    tables = [pd.read_parquet(folder / "predictions.parquet") for folder in two]
    for metric in ("accuracy", "precision_macro", "recall_macro", "f1_macro"):
        expected, row = paired_difference(*tables[::-1], metric=metric), found.metrics.loc[metric]
        assert row[["difference", "low", "high", "p_value"]].tolist() == [expected.value, expected.low, expected.high, expected.p_value]
        assert row["second"] - row["first"] == pytest.approx(row["difference"])
    assert found.metrics.loc["n_parameters", ["first", "second"]].tolist() == [1000, 2000] and pd.isna(found.metrics.loc["n_parameters", "p_value"])
    assert found.metrics.loc["train_seconds", "first"] == 3 and pd.isna(found.metrics.loc["train_seconds", "second"])
    assert found.settings.empty


def test_only_the_test_split_is_compared(tmp_path):
    both = pd.concat([predicted(0), predicted(5, 0.9, [f"v{number}" for number in range(50)], "valid")])
    found = diff_runs(make(tmp_path / "a", both), make(tmp_path / "b", predicted(0).sample(frac=1, random_state=0)))
    assert found.metrics.loc["accuracy", ["difference", "p_value"]].tolist() == [0, 1] and not any("No difference" in note for note in found.notes)


@pytest.mark.parametrize("kind", ["multi_label", "regression"])
def test_other_problem_types(kind, tmp_path):
    rng = np.random.default_rng(0)
    there, true = rng.random((200, 2)) < 0.4, rng.normal(0, 1, 200).astype(np.float32)
    for name, noise in (("a", 0.2), ("b", 0.6)):
        table = predictions_table(IDS[:200], "test", true, true + rng.normal(0, noise, 200), [], "regression") if kind == "regression" else predictions_table(
            IDS[:200], "test", there, np.clip(there + rng.normal(0, noise, there.shape), 0.01, 0.99), ["x", "y"], "multi_label")
        make(tmp_path / name, table)
    found = diff_runs(tmp_path / "a", tmp_path / "b")
    tested = found.metrics["p_value"].dropna()
    assert set(tested.index) >= ({"r2", "mean_absolute_error", "root_mean_squared_error"} if kind == "regression" else {"f1_macro", "f1_micro", "hamming_loss"})
    assert (tested < 0.05).all() and (found.metrics["difference"].dropna() - (found.metrics["second"] - found.metrics["first"]).loc[tested.index]).abs().max() < 1e-6


def only(found: RunDiff, words: str) -> None:
    """Nothing was compared item by item, and a note says why."""
    assert found.metrics["difference"].isna().all() and any(words in note for note in found.notes), found.notes


def test_other_items_are_counted_and_not_compared(tmp_path):
    found = diff_runs(make(tmp_path / "a", predicted(0)), make(tmp_path / "b", predicted(0, ids=[*IDS[100:], "new"])))
    only(found, "No difference was tested, since the runs were tested on different items: 200 are shared, 100 are only in a and 1 only in b.")
    assert found.metrics[["first", "second"]].notna().all(axis=None)


def test_other_targets_and_other_problems_are_not_compared(tmp_path):
    make(tmp_path / "a", predicted(0))
    make(tmp_path / "b", predicted(0).assign(target="b"))
    only(diff_runs(tmp_path / "a", tmp_path / "b"), "disagree on the target of item")
    numbers = np.arange(300, dtype=np.float32)
    make(tmp_path / "c", predictions_table(IDS, "test", numbers, numbers, [], "regression"))
    found = diff_runs(tmp_path / "a", tmp_path / "c")
    assert found.metrics["difference"].isna().all()


def test_predictions_of_several_models_are_not_compared(tmp_path, two):
    several = pd.concat([predicted(0).assign(model="cnn"), predicted(1).assign(model="rnn")])
    several.to_parquet(make(tmp_path / "compare") / "predictions.parquet")
    only(diff_runs(two[0], tmp_path / "compare"), "compare has no predictions of one model on a test split")


@pytest.mark.parametrize("harm,words", [
    (lambda run: (run / "predictions.parquet").unlink(), "second has no predictions that could be read"),
    (lambda run: (run / "predictions.parquet").write_bytes(b"PAR1 no"), "second has no predictions that could be read"),
    (lambda run: pd.DataFrame({"a": [1]}).to_parquet(run / "predictions.parquet"), "second has no predictions that could be read"),
    (lambda run: predicted(0).drop(columns="target").to_parquet(run / "predictions.parquet"), "no predictions of one model"),
    (lambda run: (run / "metrics.json").write_text("[1"), None), (lambda run: (run / "metrics.json").write_text('{"test": [1], "n_parameters": "many"}'), None),
    (lambda run: (run / "config.json").unlink(), None), (lambda run: (run / "config.json").write_text("[]"), None), (lambda run: (run / "config.json").write_text('{"git": "none", "data": [1, {"a": 2}], "packages": 5}'), None),
])
def test_what_is_missing_or_broken_is_said_and_the_rest_is_compared(harm, words, two):
    harm(two[1])
    found = diff_runs(*two)
    assert len(found.metrics) and str(found) and found._repr_html_()
    if words:
        only(found, words)


def test_settings_that_differ_by_part():
    first = {"report": "finetune", "parameters": {"seed": 0, "out": "a", "epochs": 3}, "packages": {"torch": "2.15.0", "timm": "1.0"}, "git": {"commit": "ab", "dirty": False},
             "hardware": {"cpus": 2, "device": "cpu"}, "data": {"fingerprint": "1", "counts": {"train": 10, "test": 3}}, "other": 1}
    second = json.loads(json.dumps(first)) | {"other": 2}
    assert differing_settings(first, second).empty
    second["parameters"] = {"seed": 1, "out": "b", "epochs": 3.0, "recipe": ""}
    second["packages"].pop("timm")
    second["git"]["commit"], second["hardware"]["device"], second["data"]["counts"]["train"] = "cd", "cuda", 11
    assert differing_settings(first, second).values.tolist() == [
        ["parameters", "seed", "0", "1"], ["parameters", "epochs", "3", "3.0"], ["parameters", "recipe", "absent", ""], ["packages", "timm", "1.0", "absent"],
        ["git", "commit", "ab", "cd"], ["hardware", "device", "cpu", "cuda"], ["data", "counts.train", "10", "11"]]


@needs_nbdime
def test_cells_that_differ(tmp_path):
    changed = [CELLS[0], "import numpy as np", CELLS[1].replace("head", "tail"), CELLS[3], "done()"]
    notebook(tmp_path / "a.ipynb", CELLS, outputs=True)
    notebook(tmp_path / "b.ipynb", changed, outputs=True)
    found = differing_cells(tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    assert sorted((change.kind, change.cell, change.before, change.after) for change in found) == sorted([
        ("added", 2, "", "import numpy as np"), ("changed", 3, CELLS[1], changed[2]), ("removed", 3, CELLS[2], ""), ("added", 5, "", "done()")])
    back = differing_cells(tmp_path / "b.ipynb", tmp_path / "a.ipynb")
    assert sorted((change.before, change.after) for change in back) == sorted((change.after, change.before) for change in found)


@needs_nbdime
def test_outputs_metadata_and_what_papermill_adds_are_no_difference(tmp_path):
    notebook(tmp_path / "a.ipynb", ["seed = 3", *CELLS], {0: ["injected-parameters"], 1: ["slow"]}, outputs=True)
    notebook(tmp_path / "b.ipynb", [*CELLS, "error here"], {4: ["papermill-error-cell-tag"]}, outputs=True)
    assert differing_cells(tmp_path / "a.ipynb", tmp_path / "b.ipynb") == []


@needs_nbdime
@pytest.mark.parametrize("seed", range(30))
def test_the_changes_lead_from_one_notebook_to_the_other(seed, tmp_path):
    """Whatever was added, removed, changed and repeated: what the changes leave alone is the same in both, in the same order."""
    rng = np.random.default_rng(seed)
    words = ["load(data)", "fit(model)\nplot(model)", "measure(model)", "x = 1\ny = 2\nz = 3", "", "show()"]
    first, second = ([rng.choice(words) + f"\n# {rng.integers(3)}" * int(rng.integers(2)) for _ in range(rng.integers(1, 9))] for _ in range(2))
    notebook(tmp_path / "a.ipynb", first)
    notebook(tmp_path / "b.ipynb", second)
    changes = differing_cells(tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    left_before, left_after = list(first), list(second)
    for change in changes:
        if change.after:
            assert second[change.cell - 1] == change.after
            left_after.remove(change.after)
        else:
            assert first[change.cell - 1] == change.before
        if change.before:
            left_before.remove(change.before)
    assert sorted(filter(None, left_before)) == sorted(filter(None, left_after))
    assert bool(changes) == ([cell for cell in first if cell] != [cell for cell in second if cell]) or not all(first) or not all(second)


def test_without_nbdime_a_note_says_how_to_install_it(two, monkeypatch):
    monkeypatch.setitem(sys.modules, "nbdime", None)
    found = diff_runs(*two)
    assert found.cells == [] and "No cells were compared, since nbdime is not installed; install it with: pip install 'fmnb[diff]'." in found.notes


@needs_nbdime
@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"nbformat": 9}', b"\xff\xff"])
def test_a_notebook_that_is_none_is_said(content, two):
    path = two[1] / "report.ipynb"
    path.unlink() if content is None else path.write_bytes(content)
    found = diff_runs(*two)
    assert found.cells == [] and any(note.startswith("No cells were compared, since ") and "second" in note for note in found.notes), found.notes


def test_what_is_no_run_is_refused(two, tmp_path):
    with pytest.raises(RunError, match="is not a run folder: it has no status.json"):
        diff_runs(two[0], tmp_path)
    with pytest.raises(RunError, match="nowhere is not a run folder"):
        diff_runs("nowhere", two[0])


def test_runs_that_did_not_finish_are_compared_too(tmp_path, two):
    make(tmp_path / "failed", status="failed", cells=[*CELLS, "1 / 0"])
    found = diff_runs(two[0], tmp_path / "failed")
    assert "failed is failed." in found.notes and found.metrics["second"].isna().all()
    only(found, "failed has no predictions that could be read")


def test_cells_of_different_reports_are_not_compared(tmp_path):
    found = diff_runs(make(tmp_path / "a"), make(tmp_path / "b", config={"report": "pretrain"}, cells=["other()"]))
    assert found.cells == [] and "No cells were compared, since the runs are of different reports." in found.notes
    assert found.settings.iloc[0].tolist() == ["report", "report", "finetune", "pretrain"]


def test_uncommitted_changes_are_said(tmp_path):
    config = {"report": "finetune", "git": {"commit": "1f3", "dirty": True}}
    assert any("Files differed from the git commit" in note for note in diff_runs(make(tmp_path / "a"), make(tmp_path / "b", config=config)).notes)


def test_runs_of_the_same_name_are_called_by_their_paths(tmp_path):
    found = diff_runs(make(tmp_path / "monday" / "cnn"), make(tmp_path / "friday" / "cnn"))
    assert found.first != found.second and found.first.endswith("cnn")
    shutil.rmtree(tmp_path / "friday")
    assert diff_runs(tmp_path / "monday" / "cnn", tmp_path / "monday" / "cnn").settings.empty


def test_hostile_contents_are_shown_harmlessly(tmp_path):
    nasty = "<script>alert(1)</script>\x1b[31m\u202e\n"
    config = {"report": "finetune", "parameters": {nasty: nasty, "seed": 1}, "git": {"commit": nasty, "dirty": True}}
    make(tmp_path / "a", predicted(0))
    make(tmp_path / "<b>\x1b[2J", predicted(1), config, [*CELLS, nasty])
    found = diff_runs(tmp_path / "a", tmp_path / "<b>\x1b[2J")
    assert all(line.isprintable() for line in str(found).split("\n"))
    assert "<script>" not in found._repr_html_() and "<b>" not in found._repr_html_() and "\x1b" not in found._repr_html_()


def test_parameters_of_the_notebooks_own_are_compared():
    one, two = ({"parameters": {"seed": 0}, "asked": {"parameters": {"dropout": value, "seed": 0}}, "code": code} for value, code in ((0.1, "a"), (0.5, "b")))
    found = differing_settings(one, two).set_index("name")
    assert set(found.index) == {"dropout", "code"} and found.loc["dropout", ["first", "second"]].tolist() == ["0.1", "0.5"]
