"""Metrics agree with scikit-learn on tables of every kind; intervals and tests keep their promises; bad input is named."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import torchmetrics.functional.classification as theirs
from fmnb.core import ConfigError, DataError, FmnbError, RunError, read_json, write_json
from fmnb.data.show import plot_balance, show_images
from fmnb.data.source import keep_frame, load_items
from fmnb.eval.advice import score_gap
from fmnb.eval.calibrate import calibration_error, conformal_sets, conformal_threshold, fit_temperature, scaled
from fmnb.eval.compare import compare
from fmnb.eval.difference import check_same_items, items_needed, paired_difference, ranking, seed_difference
from fmnb.eval.errors import class_table, findings, plot_errors
from fmnb.eval.metrics import measure
from fmnb.eval.predict import predictions_table
from fmnb.run.execute import run
from fmnb.run.record import open_run
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as scikit


def made(n_items: int, n_classes: int, seed: int, skill: float = 2.0, shares=None) -> pd.DataFrame:
    """Predictions of a model with some skill; some scores are equal."""
    rng = np.random.default_rng(seed)
    targets = rng.choice(n_classes, n_items, p=shares)
    logits = rng.normal(size=(n_items, n_classes)).round(1) + skill * np.eye(n_classes)[targets] * (rng.random((n_items, 1)) < 0.8)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return predictions_table([f"i{i}" for i in range(n_items)], "test", targets, scores, [f"c{i}" for i in range(n_classes)])


def relabelled(table: pd.DataFrame, target) -> pd.DataFrame:
    return table.assign(target=target)


TABLES = {
    **{f"random {n}, {k} classes, seed {seed}": made(n, k, seed) for n, k in ((7, 2), (60, 3), (500, 10)) for seed in range(6)},
    "one item": made(1, 3, 0), "one class": relabelled(made(50, 3, 1), "c1"), "rare class": made(300, 3, 2, shares=[0.9, 0.09, 0.01]),
    "empty class": relabelled(made(80, 4, 3), made(80, 4, 3)["target"].replace("c3", "c0")),
    "perfect": made(60, 3, 4, skill=50).pipe(lambda t: relabelled(t, t["prediction"])),
    "all wrong": made(60, 3, 5).pipe(lambda t: relabelled(t, t["prediction"].map({"c0": "c1", "c1": "c2", "c2": "c0"}))),
    "large": made(30_000, 10, 6)}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.filterwarnings("ignore")
def test_metrics_agree_with_scikit_learn(name):
    table = TABLES[name]
    classes = [column.removeprefix("score_") for column in table if column.startswith("score_")]
    scores, there = table.filter(like="score_").to_numpy(), table["target"].to_numpy()[:, None] == np.array(classes)
    target, said = table["target"], table["prediction"]
    found = {metric: values["value"] for metric, values in measure(table, resamples=20).items()}
    used = [label for label in classes if label in {*target, *said}]
    expected = {
        "accuracy": scikit.accuracy_score(target, said), "matthews": scikit.matthews_corrcoef(target, said), "balanced_accuracy": scikit.balanced_accuracy_score(target, said),
        "f1_weighted": scikit.f1_score(target, said, average="weighted", zero_division=0),
        **{f"{key}_macro": score(target, said, labels=used, average="macro", zero_division=0) for key, score in
           (("precision", scikit.precision_score), ("recall", scikit.recall_score), ("f1", scikit.f1_score))},
        "log_loss": scikit.log_loss(target, scores, labels=classes),
        "brier": scikit.brier_score_loss(target, scores, labels=classes, scale_by_half=False),
    }
    kept = [number for number in range(len(classes)) if 0 < there[:, number].sum() < len(table)]
    if kept:
        expected |= {"roc_auc": np.mean([scikit.roc_auc_score(there[:, number], scores[:, number]) for number in kept]),
                     "average_precision": np.mean([scikit.average_precision_score(there[:, number], scores[:, number]) for number in kept])}
    if len(classes) > 3:
        expected["top_3_accuracy"] = scikit.top_k_accuracy_score(target, scores, k=3, labels=classes)
    assert set(found) == set(expected)
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value, abs=1e-9), metric


@pytest.mark.parametrize("name", TABLES)
def test_intervals_hold_the_value(name):
    for metric, found in measure(TABLES[name], resamples=300).items():
        assert np.isfinite([found["low"], found["high"]]).all(), metric
        assert found["low"] - 1e-9 <= found["value"] <= found["high"] + 1e-9 or name == "one item", metric
    table = class_table(TABLES[name])
    assert ((table["low"] <= table["F1-score"] + 1e-9) & (table["F1-score"] <= table["high"] + 1e-9)).all()
    assert findings(TABLES[name])


@pytest.mark.parametrize("seed", range(5))
def test_metrics_do_not_depend_on_order_or_names(seed):
    """Rows in another order, classes under other names: the same values."""
    table = made(120, 4, seed)
    renamed = table.replace({f"c{i}": f"d{i}" for i in range(4)}).rename(columns={f"score_c{i}": f"score_d{i}" for i in range(4)})
    for other in (table.sample(frac=1, random_state=seed), renamed):
        for metric, found in measure(other, resamples=20).items():
            assert found["value"] == pytest.approx(measure(table, resamples=20)[metric]["value"], abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_agree_with_torchmetrics(seed):
    table = made(400, 5, seed)
    scores, targets = torch.tensor(table.filter(like="score_").to_numpy()), torch.tensor(table["target"].str[1:].astype(int).to_numpy())
    found = {metric: values["value"] for metric, values in measure(table, resamples=20).items()}
    expected = {
        "accuracy": theirs.multiclass_accuracy(scores, targets, 5, average="micro"), "balanced_accuracy": theirs.multiclass_accuracy(scores, targets, 5, average="macro"),
        "precision_macro": theirs.multiclass_precision(scores, targets, 5), "recall_macro": theirs.multiclass_recall(scores, targets, 5), "f1_macro": theirs.multiclass_f1_score(scores, targets, 5),
        "f1_weighted": theirs.multiclass_f1_score(scores, targets, 5, average="weighted"), "matthews": theirs.multiclass_matthews_corrcoef(scores, targets, 5),
        "roc_auc": theirs.multiclass_auroc(scores, targets, 5), "average_precision": theirs.multiclass_average_precision(scores, targets, 5)}
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(float(value), abs=2e-7), metric  # torchmetrics counts in float32
    assert calibration_error(table)["value"] == pytest.approx(float(theirs.multiclass_calibration_error(scores, targets, 5, n_bins=15)), abs=1e-6)


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95])
def test_conformal_sets_agree_with_mapie(coverage):
    from mapie.conformity_scores import LACConformityScore
    from mapie.classification import SplitConformalClassifier

    class Known:
        """A classifier that says what the table says."""
        def __init__(self, tables):
            self.scores = np.concatenate([table.filter(like="score_").to_numpy() for table in tables])
            self.classes_, self.n_features_in_, self.is_fitted_ = np.arange(4), 1, True

        def fit(self, X, y):
            return self

        def predict_proba(self, X):
            return self.scores[np.asarray(X)[:, 0].astype(int)]

        def predict(self, X):
            return self.predict_proba(X).argmax(axis=1)

        def __sklearn_is_fitted__(self):
            return True

    valid, test = made(300, 4, 1), made(200, 4, 2)
    mapie = SplitConformalClassifier(Known([valid, test]), confidence_level=coverage, conformity_score=LACConformityScore(), prefit=True)
    mapie.conformalize(np.arange(300)[:, None], valid["target"].str[1:].astype(int).to_numpy())
    _, sets = mapie.predict_set(np.arange(300, 500)[:, None])
    ours = conformal_sets(test, conformal_threshold(valid, coverage))
    assert ours["size"].tolist() == sets[:, :, 0].sum(axis=1).tolist()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 80), st.integers(2, 6), st.integers(0, 10_000), st.floats(0, 6))
def test_properties_of_any_table(n_items, n_classes, seed, skill):
    """Within their ranges; an exchange of the classes' roles, a copy of the table and a temperature do what they must."""
    table = made(n_items, n_classes, seed, skill)
    found = measure(table, resamples=50)
    for metric, values in found.items():
        lowest, highest = {"matthews": (-1, 1), "log_loss": (0, 40), "brier": (0, 2)}.get(metric, (0, 1))
        assert lowest <= values["value"] <= highest and values["low"] <= values["high"] and values["n_items"] == n_items
    twice = pd.concat([table, table.assign(item_id=table["item_id"] + "'")], ignore_index=True)
    for metric, values in measure(twice, resamples=20).items():
        assert values["value"] == pytest.approx(found[metric]["value"], abs=1e-9), metric
    warm = scaled(table, fit_temperature(table))
    assert (warm[[f"score_c{i}" for i in range(n_classes)]].sum(axis=1) - 1).abs().max() < 1e-9
    assert measure(warm, resamples=20)["log_loss"]["value"] <= found["log_loss"]["value"] + 1e-6
    difference = paired_difference(table, table.assign(prediction=table["prediction"].iloc[::-1].to_numpy()), resamples=50)
    mirrored = paired_difference(table.assign(prediction=table["prediction"].iloc[::-1].to_numpy()), table, resamples=50)
    assert difference.value == pytest.approx(-mirrored.value, abs=1e-12) and 0 < difference.p_value <= 1


def test_more_items_make_narrower_intervals():
    width = {n: {metric: found["high"] - found["low"] for metric, found in measure(made(n, 4, 0)).items()} for n in (100, 10_000)}
    for metric in width[100]:
        assert 4 < width[100][metric] / width[10_000][metric] < 25, metric


BROKEN = {
    "no number": (lambda t: t.assign(score_c0=t["score_c0"].where(t.index != 2)), "has a score that is no number"),
    "infinite": (lambda t: t.assign(score_c1=np.inf), "a score that is no number"),
    "outside": (lambda t: t.assign(score_c0=t["score_c0"] + 1), "outside of"),
    "no sum": (lambda t: t.assign(score_c0=t["score_c0"] / 3, score_c1=t["score_c1"] / 3), "do not sum to one"),
    "no target": (lambda t: t.assign(target=None), "lack a target"), "no items": (lambda t: t.head(0), "no predictions to measure")}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tables_are_refused(name):
    breaks, message = BROKEN[name]
    with pytest.raises(DataError, match=message):
        measure(breaks(made(40, 3, 0)))


def test_different_items_are_refused():
    first, second = made(40, 3, 0), made(40, 3, 1)
    with pytest.raises(DataError, match="disagree on the target of item"):
        paired_difference(first, second)
    with pytest.raises(DataError, match=r"different items \(10 differ, for example i3"):
        check_same_items({"a": first, "b": first.head(30)})
    with pytest.raises(DataError, match="different items"):
        seed_difference([first] * 2, [first.head(30)] * 2)


def test_a_ranking_of_equal_models_has_one_place():
    table = made(200, 3, 0)
    places = ranking({"a": table, "b": table, "c": table})
    assert places["rank"].tolist() == [1, 1, 1] and places["items needed"].iloc[0] == np.inf


def test_ranks_do_not_fall_and_all_pairs_are_corrected():
    """Also with the best model, which was found among the pairs by the same items."""
    tables = {f"m{number}": made(150, 3, 0).assign(prediction=lambda table, number=number: table["target"].where(np.random.default_rng(number).random(len(table)) < 0.9 - 0.05 * number, "c0")) for number in range(4)}
    tables = {name: table[["item_id", "split", "target", "prediction"]] for name, table in tables.items()}
    assert ranking(tables)["rank"].is_monotonic_increasing
    alone = {one.other: paired_difference(tables[one.better], tables[one.other]) for one in compare(tables)}
    for one in compare(tables):
        assert alone[one.other].p_value <= one.p_value <= min(1, 6 * alone[one.other].p_value) + 1e-9 and one.n_needed >= alone[one.other].n_needed
    assert any(one.p_value > 3.5 * alone[one.other].p_value for one in compare(tables))  # three pairs have the best one, six there are


def test_items_do_not_replace_seeds():
    """Variance that more items leave as it is can make their number infinite."""
    assert items_needed(0.01, 0.003, 10_000) == items_needed(0.01, 0.003, 10_000, fixed=0.0) < np.inf
    assert items_needed(0.01, 0.003, 10_000, fixed=5e-6) > items_needed(0.01, 0.003, 10_000)
    assert items_needed(0.01, 0.003, 10_000, fixed=0.0082**2) == np.inf


def test_a_target_without_a_score_is_named():
    table = made(30, 3, 0)
    table.loc[4, "target"] = "bird"
    with pytest.raises(DataError, match="1 of 30 items have a label without a score, such as 'bird'"):
        measure(table)


def test_the_gap_of_few_items_is_wide():
    """Newcombe's interval has a width where nothing varies."""
    train, valid = (pd.DataFrame({"item_id": range(n), "split": "x", "target": "a", "prediction": said}) for n, said in ((40, "a"), (3, "b")))
    gap = score_gap(train, valid)
    assert gap.value == 1 and gap.low < 0.6 and score_gap(train, train).low < 0 < score_gap(train, train).high


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small finished run, and another seed's."""
    folder = tmp_path_factory.mktemp("runs")
    return [run("finetune", {"epochs": 2, "seed": seed, "batch_size": 64, "learning_rate": 0.003}, folder / f"seed {seed}", progress=False) for seed in (0, 1)]


def test_a_finished_run_is_evaluated_from_its_folder(finished, tmp_path):
    done = run("evaluate", {"runs": str(finished[0].folder)}, tmp_path / "evaluated", progress=False)
    assert done.metrics["test"] == json.loads(json.dumps(finished[0].metrics["test"]))
    assert not (done.folder / "finetune").exists() and "without_leaks" in done.metrics
    assert "373 of 373" in (done.folder / "report.html").read_text()


def test_an_edited_run_folder_is_seen(finished, tmp_path):
    """By the hashes that a run keeps; where it kept none, by asking its model again."""
    edited = shutil.copytree(finished[1].folder, tmp_path / "edited")
    table = finished[1].predictions
    table.assign(prediction=table["prediction"].where(table.index % 50 != 0, "7")).to_parquet(edited / "predictions.parquet")
    with pytest.raises(RunError, match="predictions.parquet of run .* was changed after it had finished"):
        open_run(edited)
    status = read_json(edited / "status.json")
    del status["artifacts"]
    write_json(edited / "status.json", status)
    done = run("evaluate", {"runs": str(edited)}, tmp_path / "evaluated", progress=False)
    assert "not what they were" in (done.folder / "report.html").read_text()


def test_finished_runs_are_compared(finished, tmp_path):
    done = run("compare", {"runs": ",".join(str(part.folder) for part in finished)}, tmp_path / "compared", progress=False)
    assert set(done.metrics["models"]) == {"seed 0", "seed 1", "baseline"} and len(done.metrics["ranking"]) == 2
    assert not [path for path in done.folder.iterdir() if path.is_dir()]


def test_what_cannot_be_evaluated_is_named(finished, tmp_path):
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "status.json").write_text(json.dumps({"status": "failed", "error": "out of paper", "started": "2026-01-01", "process": 1}))
    for value, message in ((str(tmp_path / "none"), "is not a run folder"), (str(tmp_path / "failed"), r"is failed \(out of paper\)"),
                           (f"{finished[0].folder},{finished[1].folder}", "the report compare takes many")):
        with pytest.raises(FmnbError, match=message):
            run("evaluate", {"runs": value}, tmp_path / "evaluated", overwrite=True, progress=False)
    twice = ",".join([str(finished[0].folder)] * 2)
    with pytest.raises(FmnbError, match="folders of the same name"):
        run("compare", {"runs": twice}, tmp_path / "compared", progress=False)
    with pytest.raises(ConfigError, match="Unknown parameter 'run'"):
        run("evaluate", {"run": "x"}, tmp_path / "evaluated", progress=False)
    with pytest.raises(FmnbError, match="is not a run folder"):
        open_run(tmp_path)


PROBLEMS = {"multi_label": ["cat", "dog", "cat|dog"] * 40, "regression": list(np.random.default_rng(0).gamma(2, 2, 120).round(2))}


@pytest.mark.parametrize("problem_type", PROBLEMS)
def test_runs_of_other_problems_are_evaluated(problem_type, tmp_path):
    """Several labels an item, and numbers: what is for one class is left out, the rest is there."""
    words = {"cat": "purr meow whiskers", "dog": "bark fetch tail", "cat|dog": "purr bark pets together"}
    labels = PROBLEMS[problem_type]
    texts = [f"{words.get(label, 'a story of ' + str(label))} number {number}" for number, label in enumerate(labels)]
    data = keep_frame(pd.DataFrame({"text": texts, "label": labels}))
    made = run("finetune", {"data": str(data), "epochs": 2, "batch_size": 16, "learning_rate": 0.003}, tmp_path / "made", progress=False)
    done = run("evaluate", {"runs": str(made.folder)}, tmp_path / "evaluated", progress=False)
    assert done.metrics["test"] == json.loads(json.dumps(made.metrics["test"]))
    assert "Calibration is for one class an item" in (done.folder / "report.html").read_text()


def test_dollars_in_names_are_no_formulas():
    """Two dollar signs in a label, and something between them that Matplotlib cannot read as a formula."""
    names = {"c0": r"US$ \wrong{$", "c1": "CA$ and AU$", "c2": "c2"}
    table = made(60, 3, 0).replace(names).rename(columns={f"score_{old}": f"score_{new}" for old, new in names.items()})
    items = load_items("digits").head(60).assign(label=table["target"].to_numpy(), split="test")
    for figure in (plot_errors(table, title="from $ to $").figure, plot_balance(items), show_images(items.head(2), items["label"].head(2))):
        figure.canvas.draw()
    axes = plot_errors(table)
    axes.figure.canvas.draw()
    assert r"US\$ \wrong{\$" in {label.get_text() for label in axes.get_yticklabels()}


def test_few_items_of_a_class_widen_the_interval():
    """Of five items of a rare class, 70 % are found in truth, and of a frequent one all: the intervals hold macro recall as often as they say, also where no error is seen."""
    held, flawless, rng = [], [], np.random.default_rng(0)
    for right in rng.binomial(5, 0.7, 400):
        target = np.repeat(["rare", "frequent"], [5, 95])
        said = np.where((target == "rare") & (np.arange(100) >= right), "frequent", target)
        found = measure(pd.DataFrame({"item_id": np.arange(100), "split": "test", "target": target, "prediction": said}), resamples=400)["recall_macro"]
        held.append(found["low"] <= 0.85 <= found["high"])
        flawless += [held[-1]] if right == 5 else []
    assert np.mean(held) > 0.92 and len(flawless) > 40 and all(flawless)  # a bootstrap cannot hold it there


def test_a_large_confusion_matrix_shows_where_the_errors_are():
    """Of fifty classes, of which eight are mistaken: forty, those eight among them."""
    target = np.repeat([f"c{number:02d}" for number in range(50)], 4)
    said = np.where(np.arange(200) % 4 == 0, np.where(target < "c08", "c00", target), target)
    axes = plot_errors(pd.DataFrame({"item_id": np.arange(200), "split": "test", "target": target, "prediction": said}), title="all")
    shown = {label.get_text() for label in axes.get_yticklabels()}
    assert len(shown) == 40 and {f"c{number:02d}" for number in range(8)} <= shown and axes.get_title() == "all, 40 of 50 classes"


def test_an_unstratified_mean_is_unsure_of_the_mix():
    """Two classes whose losses differ: drawn at random, the share of the hard one is chance as well."""
    table = made(200, 3, 0, shares=[0.5, 0.3, 0.2])
    easy = (table["target"] == "c0").to_numpy()
    scores = np.where(easy[:, None], 0.01, np.array([[0.98, 0.01, 0.01]])) + easy[:, None] * np.array([[0.97, 0, 0]])
    table = table.assign(**{f"score_c{number}": scores[:, number] for number in range(3)}, prediction="c0")
    width = {stratified: found["high"] - found["low"] for stratified in (True, False) for found in [measure(table, resamples=50, stratified=stratified)["log_loss"]]}
    assert width[True] < 1e-6 < 0.5 < width[False]
