"""The pretraining report on data of other kinds than the embedded digits: corpora, partly labelled data, data to evaluate on."""
import numpy as np
import pandas as pd
import pytest
from fmnb.core import RunError
from fmnb.model.store import load_backbone, read_description
from fmnb.run.execute import run

QUICK = {"steps": 12, "batch_size": 8}
WORDS = {"sea": "wave salt ship gull tide sand".split(), "sky": "cloud wind star bird rain sun".split()}


def sentences(number: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    labels = ["sea", "sky"] * (number // 2)
    return pd.DataFrame({"text": [" ".join(rng.choice(WORDS[label], 8)) + f" {seed} {i}." for i, label in enumerate(labels)], "label": labels})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A text of its own, 40 kB, in one file."""
    path = tmp_path_factory.mktemp("corpus") / "tales.txt"
    path.write_text("\n".join(sentences(800)["text"]))
    return path


def test_corpus_evaluated_on_a_table(corpus, tmp_path):
    """No labels in the corpus: the gain is measured on the named table, one of whose test items the corpus holds."""
    labelled = sentences(160, seed=1)
    labelled.assign(split=["test" if i % 4 == 0 else "train" for i in range(160)]).to_csv(tmp_path / "places.csv", index=False)
    corpus.write_text(corpus.read_text() + "\n" + labelled["text"][0] + " and nothing else was seen that day by anybody at all.")
    done = run("pretrain", {"data": str(corpus), "family": "rnn", "backbone": "hidden=16, width=16", "evaluate_on": str(tmp_path / "places.csv"), **QUICK}, tmp_path / "run", progress=False)
    assert [row["n_labels"] for row in done.metrics["gain"]][-1] > 80 and done.metrics["n_overlapping"] is not None
    assert set(done.predictions["start"]) == {"scratch", "pretrained"}
    assert read_description(done.folder, "foundation")["objective"]["name"] == "causal_lm"
    assert load_backbone(done.folder).n_features
    assert done.history["step"].iloc[-1] == QUICK["steps"] and {"tokens", "seconds", "train_loss", "valid_loss", "probe"} <= set(done.history)


def test_corpus_alone_has_no_gain(corpus, tmp_path):
    done = run("pretrain", {"data": str(corpus), "family": "cnn", **QUICK}, tmp_path / "run", progress=False)
    assert done.metrics["gain"] == [] and done.metrics["n_overlapping"] is None and "probe" not in done.history


def test_partly_labelled_texts_are_all_read(tmp_path):
    table = sentences(300)
    table.loc[table.index % 3 > 0, "label"] = None
    table.to_csv(tmp_path / "some.csv", index=False)
    done = run("pretrain", {"data": str(tmp_path / "some.csv"), "family": "transformer", "backbone": "width=16, depth=1, heads=2", **QUICK}, tmp_path / "run", progress=False)
    assert sum(done.config["data"]["counts"].values()) == 300 and done.metrics["gain"][-1]["n_labels"] < 100


@pytest.mark.parametrize("parameters, message", [
    ({"objective": "causal_ml"}, "causal_lm"), ({"objective": "masked_lm, maskng=span"}, "masking"), ({"objective": "contrastive"}, "is for image and audio data"),
    ({"backbone": "depht=3"}, "'depht=3' is no setting of backbone"), ({"objective": "causal_lm"}, "needs a causal backbone")])
def test_what_does_not_go_together_is_said(parameters, message, tmp_path):
    sentences(60).to_csv(tmp_path / "few.csv", index=False)
    with pytest.raises(RunError, match=message):
        run("pretrain", {"data": str(tmp_path / "few.csv"), **parameters}, tmp_path / "run", progress=False)
