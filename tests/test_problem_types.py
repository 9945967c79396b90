"""Several labels and numbers: from a file to predictions, and what is refused on the way."""
import io
import json

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from fmnb.core import ConfigError, DataError
from fmnb.data.load import make_dataloaders, make_loader
from fmnb.data.prepare import Preprocessing, open_prepared, prepare
from fmnb.data.problem import find_problem_type, split_labels
from fmnb.data.quality import check, repair
from fmnb.data.source import keep_frame, load_items, open_items, save_items
from fmnb.data.split import SPLITS, assign_folds, split_items
from fmnb.eval.errors import class_table, findings
from fmnb.eval.metrics import measure
from fmnb.eval.predict import predict, problem_type_of
from fmnb.model.head import build_model
from fmnb.run.execute import run

TOPICS = [["art"], ["law", "sea"], [], ["sea"], ["art", "sea"]]
WRITTEN = {  # one data set, as people write it: a function from the texts to a file
    "lists.parquet": lambda path, texts: pd.DataFrame({"text": texts, "label": TOPICS * 24}).to_parquet(path),
    "lists.jsonl": lambda path, texts: path.write_text("".join(json.dumps({"text": text, "label": labels}) + "\n" for text, labels in zip(texts, TOPICS * 24))),
    "json.csv": lambda path, texts: pd.DataFrame({"text": texts, "label": [json.dumps(labels) for labels in TOPICS * 24]}).to_csv(path, index=False),
    "python.csv": lambda path, texts: pd.DataFrame({"text": texts, "label": TOPICS * 24}).to_csv(path, index=False),
    "bars.tsv": lambda path, texts: pd.DataFrame({"text": texts, "label": ["|".join(labels) or "|" for labels in TOPICS * 24]}).to_csv(path, index=False, sep="\t"),
}


def words(number: int = 120) -> list[str]:
    rng = np.random.default_rng(0)
    return [f"{i} " + " ".join(rng.choice(["river", "stone", "garden", "winter"], 6)) for i in range(number)]


def numbered(labels, **more) -> pd.DataFrame:
    return load_items(pd.DataFrame({"item_id": [f"i{i:03d}" for i in range(len(labels))], "text": words(len(labels)), "label": labels} | more))


@pytest.mark.parametrize("name", WRITTEN)
def test_several_labels_are_the_same_however_they_are_written(tmp_path, name):
    WRITTEN[name](tmp_path / name, words())
    items = load_items(tmp_path / name)
    assert items["label"].tolist() == ["art", "law|sea", "|", "sea", "art|sea"] * 24
    prepared = prepare(split_items(items))
    assert (prepared.problem_type, prepared.classes) == ("multi_label", ["art", "law", "sea"])
    by_id = dict(zip(prepared.item_ids, prepared.targets.tolist()))
    assert [by_id[item_id] for item_id in items["item_id"]] == [[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 0, 1]] * 24


def test_lists_of_one_label_stay_lists(tmp_path):
    items = load_items(keep_frame(pd.DataFrame({"text": words(40), "label": [["art"], ["sea"]] * 20})))
    save_items(repair(split_items(items), check(items))[0], tmp_path / "items.arrow")
    assert find_problem_type(open_items(tmp_path / "items.arrow")) == "multi_label"
    assert find_problem_type(open_items(tmp_path / "items.arrow"), "single_label") == "single_label"


def test_whole_numbers_are_classes_unless_somebody_says_so():
    items = numbered([str(i % 5) for i in range(100)])
    prepared = [prepare(split_items(items, problem_type=kind), Preprocessing(problem_type=kind)) for kind in ("", "regression")]
    assert [one.problem_type for one in prepared] == ["single_label", "regression"]
    assert [one.targets.dtype for one in prepared] == [np.int64, np.float32]
    assert prepared[0].folder != prepared[1].folder and open_prepared(prepared[1].folder) == prepared[1]


@pytest.mark.parametrize("labels", [["art", "sea"] * 60, TOPICS * 24, np.random.default_rng(0).gamma(2, 2, 120)], ids=["single_label", "multi_label", "regression"])
@pytest.mark.parametrize("grouped", [False, True])
def test_splits_keep_their_promises(labels, grouped):
    """Shares are met, order plays no part, groups stay whole, every label can be learnt."""
    items = numbered(labels, **({"group": [f"g{i // 3}" for i in range(120)]} if grouped else {}))
    split = split_items(items)
    pd.testing.assert_series_equal(split_items(items.sample(frac=1, random_state=0)).sort_index()["split"], split["split"])
    sizes = split["split"].value_counts()
    assert 12 <= sizes["test"] <= 36 and 6 <= sizes["valid"] <= 18
    if grouped:
        assert (split.groupby("group")["split"].nunique() == 1).all()
    assert prepare(split).counts == sizes.to_dict()
    assert len(set(assign_folds(items))) == 5


@pytest.mark.parametrize("seed", range(20))
def test_every_label_can_be_learnt(seed):
    """However rare labels come together, each of them has a training item, and frequent ones are where they were wanted."""
    rng = np.random.default_rng(seed)
    sets = [rng.choice(30, rng.integers(0, 4), replace=False, p=(weights := 1 / np.arange(1, 31)) / weights.sum()).astype(str).tolist() for _ in range(200)]
    split = split_items(numbered(sets))
    rows = split.assign(label=split["label"].map(split_labels)).explode("label").dropna(subset="label")
    counts = pd.crosstab(rows["label"], rows["split"]).reindex(columns=SPLITS, fill_value=0)
    assert (counts["train"] > 0).all()
    frequent = counts[counts.sum(axis=1) >= 20]
    assert (frequent["test"] / frequent.sum(axis=1)).between(0.08, 0.35).all() and (frequent["valid"] > 0).all()
    assert prepare(split).targets.sum() == sum(map(len, sets))


@pytest.mark.parametrize("labels", [TOPICS * 24, np.random.default_rng(0).gamma(2, 2, 120)], ids=["multi_label", "regression"])
def test_a_model_learns_and_is_measured(labels):
    """Targets, loss, predictions and metrics fit one another: a few steps on what is easy to see make the loss small."""
    items = numbered(labels)
    prepared = prepare(split_items(items))
    torch.manual_seed(0)
    model = build_model("cnn", prepared.input_spec, prepared.classes, prepared.preprocessing, problem_type=prepared.problem_type)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    tokens, targets = make_dataloaders(prepared, 16).train.one_batch()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.head.loss(model(tokens), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    table = predict(model, make_loader(prepared, "test"))
    assert problem_type_of(table) == prepared.problem_type
    given = items.set_index("item_id")["label"].loc[table["item_id"]].replace("|", "").to_numpy()
    assert np.allclose(table["target"], given.astype(float)) if prepared.problem_type == "regression" else (table["target"] == given).all()
    assert all(np.isfinite([metric["value"], metric["low"], metric["high"]]).all() for metric in measure(table).values())
    assert len(class_table(table)) and findings(table)


BAD = {  # labels of eight items, the last of the test split; what is said of them
    "a label unseen in training": (["a", "b"] * 3 + ["a", "new"], "", "Item i007 has the label 'new', which no training item has"),
    "a number unseen as a class": (["1", "2"] * 3 + ["1", "7"], "", "Item i007 has the label '7', which no training item has"),
    "one of several labels unseen in training": (["a", "a|b"] * 3 + ["b", "a|new"], "", "Item i007 has the label 'a|new', of which no training item has a part"),
    "a missing label": (["a", "b"] * 3 + ["a", None], "", "Item i007 has no label"),
    "a missing set of labels": (["a", "a|b"] * 3 + ["b", None], "", "Item i007 has no label; write [] where none of the labels applies"),
    "NaN among numbers": ([1.5, 2.5] * 3 + [1.5, float("nan")], "", "Item i007 has no label"),
    "infinity among numbers": ([1.5, 2.5] * 3 + [float("-inf"), 1.5], "", "Item i006 has the label '-inf', which is no finite number"),
    "a number too large": (["1.5", "2.5"] * 3 + ["1e60", "1.5"], "", "Item i006 has the label '1e60', which is no finite number"),
    "a word among numbers": (["1.5", "2.5"] * 3 + ["high", "1.5"], "", "Item i006 has the label 'high', which is no finite number"),
    "words said to be numbers": (["a", "b"] * 4, "regression", "Item i000 has the label 'a', which is no finite number"),
    "equal numbers": ([2.5] * 8, "", "All 7 training items have the label '2.5', so there is nothing to predict"),
    "equal sets of labels": (["a|b"] * 8, "", "All 7 training items have the label 'a|b'"),
    "no label at all": (["|"] * 8, "", "All 7 training items have the label '|'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_labels_are_refused(name):
    labels, said, fault = BAD[name]
    items = pd.DataFrame({"item_id": [f"i{i:03d}" for i in range(8)], "text": words(8), "label": labels, "split": ["train"] * 7 + ["test"]})
    with pytest.raises(DataError, match="^" + fault.replace("|", r"\|").replace("[", r"\[").replace(".", r"\.")):
        prepare(items, Preprocessing(problem_type=said))


@pytest.mark.parametrize("labels, fault", [([["a"], "b"], "'b' in row 2 where other rows have lists"), ([["a", float("nan")]], "has nan among the labels of row 1"), ([{"a": 1}], "has a dict in row 1"),
                                           ([["a|b"]], r"'a\|b' among the labels of row 1"), ([[1, 0, 0]], "not zeros and ones"), (['["a"]', "b"], "'b' in row 2"), ([np.eye(2)], "among the labels of row 1")])
def test_mixed_kinds_are_refused(labels, fault):
    with pytest.raises(DataError, match=fault):
        load_items(pd.DataFrame({"text": words(len(labels)), "label": labels}))


def test_one_item_in_a_class():
    with pytest.raises(DataError, match="Label 'rare' has 1 group"):
        split_items(numbered(["a", "b"] * 20 + ["rare"]))
    several = split_items(numbered([["a"], ["a", "b"]] * 20 + [["rare"]]))
    assert several["split"].iloc[-1] == "train"
    assert "Class rare has 1 item" in check(several, ["small_class"])["evidence"].iloc[0]


def test_all_labels_equal_make_no_classifier():
    prepared = prepare(numbered(["a"] * 8, split=["train"] * 6 + ["valid", "test"]))
    with pytest.raises(ConfigError, match="at least two classes"):
        build_model("cnn", prepared.input_spec, prepared.classes)


def test_labels_that_are_no_numbers_are_found_and_repaired():
    items = numbered([1.5, 2.5, 4.0] * 20 + [float("nan"), float("inf"), "none"])
    findings = check(items)
    assert findings["evidence"][findings["kind"] == "missing"].tolist() == ["1 of 63 items (1.6%) without label: i060.", "2 of 63 items (3.2%) without a finite number as label: i061, i062."]
    prepared = prepare(split_items(repair(items, findings)[0]))
    assert len(prepared.targets) == 60 and np.isfinite(prepared.targets).all()


def test_infinity_and_gaps_in_columns():
    """A gap becomes the median, with a flag where training items have gaps; an infinite number is refused; neither reaches a batch."""
    gaps = numbered(["a", "b"] * 30, age=[np.nan, 30.0, 40.0] * 20)
    batch = make_loader(prepare(split_items(gaps), Preprocessing(columns=("age",))), "train").one_batch()
    assert batch[1].shape[1] == 2 and torch.isfinite(batch[1]).all()
    only_test = split_items(numbered(["a", "b"] * 30, age=np.arange(60.0)))
    only_test["age"] = only_test["age"].where(only_test["split"] != "test")
    assert torch.isfinite(make_loader(prepare(only_test, Preprocessing(columns=("age",))), "test").one_batch()[1]).all()
    with pytest.raises(DataError, match="Column 'age' is infinite in item i00"):
        prepare(split_items(numbered(["a", "b"] * 30, age=[np.inf, 1.0] * 30)), Preprocessing(columns=("age",)))


def test_recordings_without_finite_samples():
    def wav(samples):
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, 8000, format="WAV", subtype="FLOAT")
        return buffer.getvalue()
    sounds = [np.sin(np.arange(2000) * pitch / 50) for pitch in range(1, 13)]
    sounds[5][7] = np.nan
    items = pd.DataFrame({"item_id": [f"a{i:02d}" for i in range(12)], "audio": [wav(samples) for samples in sounds], "label": np.linspace(0, 1, 12).astype(str), "split": ["train"] * 10 + ["valid", "test"]})
    with pytest.raises(DataError, match="Item a05 .* not finite"):
        prepare(items)
    assert check(items, ["unreadable"])["item_ids"].tolist() == [["a05"]]


def test_balanced_drawing_needs_one_class_an_item():
    for labels, what in ((TOPICS * 8, "several labels"), (np.arange(40) + 0.5, "numbers as labels")):
        with pytest.raises(ConfigError, match=f"have {what}"):
            make_dataloaders(prepare(split_items(numbered(labels))), balanced=True)


def test_data_follow_a_model_and_keep_their_own_target():
    """Sizes and statistics are the model's; the scale of the numbers is that of the data."""
    ratings = split_items(numbered(np.random.default_rng(0).gamma(2, 2, 60)))
    first = prepare(ratings)
    like = dict(input_spec=first.input_spec, preprocessing=first.preprocessing, tokenizer=first.folder / "tokenizer.json")
    second = prepare(ratings.assign(label=ratings["label"].astype(float) + 100), like=like)
    assert second.input_spec == first.input_spec and second.preprocessing["max_length"] == first.preprocessing["max_length"]
    assert abs(second.preprocessing["target"]["mean"] - first.preprocessing["target"]["mean"] - 100) < 1e-4
    assert "target" not in prepare(ratings.assign(label=["a", "b"] * 30), like=like).preprocessing


@pytest.mark.parametrize("labels, metric, name", [
    ([["art"], ["law", "sea"], [], ["sea"]] * 40, "f1_macro", "macro F1"),
    ([number % 7 + 0.5 for number in range(160)], "r2", "R²"),
], ids=["several", "numbers"])
def test_they_are_compared_chosen_for_and_tuned(labels, metric, name, tmp_path):
    texts = [f"{number} {'river ' * (number % 7)}stone {number % 4}" for number in range(160)]
    asked = {"data": keep_frame(pd.DataFrame({"text": texts, "label": labels})), "epochs": 2}
    tuned = run("tune", asked | {"family": "cnn", "trials": 2, "search_minutes": 0.0}, tmp_path / "tuned", progress=False)
    assert f"points of {name} on the validation split" in tuned.metrics["findings"][0]
    assert metric in tuned.metrics["models"]["tuned"]["test"] and "head.label_smoothing" not in tuned.history
    assert len(tuned.history) == 2 and tuned.history["score"].notna().any()
    compared = run("compare", asked | {"families": "cnn,rnn"}, tmp_path / "compared", progress=False)
    assert {model for model, scores in compared.metrics["models"].items() if metric in scores["test"]} == {"cnn", "rnn", "baseline"}
    assert any("the baseline (TF-IDF + " in sentence and name in sentence for sentence in compared.metrics["findings"])
    chosen = run("select", {"data": asked["data"], "families": "cnn", "search_minutes": 0.1}, tmp_path / "chosen", progress=False)
    assert chosen.metrics["findings"][0].startswith("Take cnn convolution") and name in chosen.metrics["findings"][0]
    assert chosen.history[metric].between(0, 1).all() and f"{name} of TF-IDF" in (chosen.folder / "report.html").read_text()
