"""Asking a model about whatever lies there: each thing asked gets its own answer."""
import numpy as np
import pandas as pd
import pytest
from fmnb.core import DataError
from fmnb.data.prepare import Preprocessing, prepare
from fmnb.data.source import load_items
from fmnb.data.split import split_items
from fmnb.deploy.predict import load_predictor
from fmnb.model.head import build_model
from fmnb.model.store import save_model


def predictor(prepared, family, folder, **sizes):
    """A model that was not trained, saved and loaded."""
    model = build_model(family, prepared.input_spec, prepared.classes, prepared.preprocessing, sizes).eval()
    save_model(model, folder, prepared.folder / "tokenizer.json" if prepared.modality == "text" else None)
    return load_predictor(folder, "cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    items = split_items(load_items("digits"))
    for number, picture in enumerate(items["image"].head(6)):
        (folder / f"{number}.png").write_bytes(picture)
    return predictor(prepare(items), "cnn", tmp_path_factory.mktemp("model"), base=4), folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return predictor(prepare(split_items(load_items("docstrings"))), "cnn", tmp_path_factory.mktemp("model"), width=16)


def test_files_beside_a_folder_are_asked_too(pictures, tmp_path):
    """A stray folder, or folders named after splits, make no classes where labels are not wanted."""
    ask, folder = pictures
    for place in ("", "old/", "train/cat/"):
        for number in range(2):
            target = tmp_path / f"{place}{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((folder / f"{number}.png").read_bytes())
    answers = ask(tmp_path)
    assert sorted(answers["item_id"]) == ["0.png", "1.png", "old/0.png", "old/1.png", "train/cat/0.png", "train/cat/1.png"]
    assert answers["prediction"].notna().all()


def test_a_stray_folder_makes_no_classes_in_training(pictures, tmp_path):
    _, folder = pictures
    for name in ("a_0", "a_1", "a_2", "b_0", "b_1", "old/a_3"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes((folder / "0.png").read_bytes())
    assert len(load_items(tmp_path)) == 6


def test_a_list_gives_an_answer_for_each(pictures, texts):
    ask, folder = pictures
    files = [str(folder / "0.png"), str(folder / "1.png"), str(folder / "0.png")]
    answers = ask(files)
    assert len(answers) == 3 and answers["score_1"][0] == answers["score_1"][2]
    answers = texts(["Return the number of items.", None, float("nan"), ""])
    assert len(answers) == 4 and answers["prediction"].notna().tolist() == [True, False, False, False]
    assert all(answers["problem"][1:]) and not answers["problem"][0]
    with pytest.raises(DataError, match=r"is neither a path nor an embedded data set; ask about a text with a list"):
        texts("I loved it")


def test_files_of_text_are_asked_whole(texts, tmp_path):
    for name, text in (("short", "Open a file."), ("long", "Return a list. " * 400)):
        (tmp_path / f"{name}.txt").write_text(text)
    assert sorted(texts(tmp_path)["item_id"]) == ["long.txt", "short.txt"]
    assert texts(tmp_path / "long.txt")["item_id"].tolist() == ["long.txt"]


def test_a_row_with_a_wrong_column_stops_no_other(tmp_path):
    random = np.random.default_rng(0)
    rows = pd.DataFrame({"text": [f"word {number} of {number % 7}" for number in range(60)], "label": ["even", "odd"] * 30, "age": random.integers(20, 60, 60)})
    prepared = prepare(split_items(load_items(rows)), Preprocessing(columns=("age",)))
    ask = predictor(prepared, "cnn", tmp_path / "model", width=16)
    asked = rows.head(4).drop(columns="label").assign(age=["31", "unknown", "40", "22"])
    answers = ask(asked)
    assert answers["prediction"].notna().tolist() == [True, False, True, True] and "age" in answers["problem"][1]
    with pytest.raises(DataError, match="age"):
        ask(asked.drop(columns="age"))
