"""Starting points of every kind, from folders that the tests make: real loading code, no network."""
import json
import os
import shutil
import socket
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
import torchvision
import transformers
from fmnb.core import ConfigError, DataError, FmnbError, read_json, write_json
from fmnb.data.load import make_loader
from fmnb.data.prepare import Preprocessing, prepare
from fmnb.data.source import load_items
from fmnb.data.split import split_items
from fmnb.model.adapter import add_lora, merge_lora
from fmnb.model.head import build_backbone, build_model
from fmnb.model.start import find_start, take_weights
from fmnb.model.store import load_model, save_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SMALL_BERTS = {
    "bert": lambda n: transformers.BertConfig(vocab_size=n, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=40),
    "distilbert": lambda n: transformers.DistilBertConfig(vocab_size=n, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=600),
    "electra": lambda n: transformers.ElectraConfig(vocab_size=n + 3, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
    "albert": lambda n: transformers.AlbertConfig(vocab_size=n, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
}
SEEN = {"bert": 40, "distilbert": 256, "electra": 256, "albert": 256}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("Network is unreachable")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def texts():
    subjects, verbs, things = ("the model", "a reader", "no bird", "this function", "every test"), ("reads", "writes", "forgets", "returns"), ("a word", "many long lines", "nothing", "its own name")
    rows = [(f"{subject} {verb} {thing} and {other}", verb) for subject in subjects for verb in verbs for thing in things for other in things]
    return split_items(load_items(pd.DataFrame(rows, columns=["text", "label"])))


@pytest.fixture(scope="module")
def digits():
    return split_items(load_items("digits")).sample(200, random_state=0)


def save_tokenizer(texts, file, first=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")):
    words = [*first, *sorted({word for text in texts["text"] for word in text.lower().split() if word.isalpha()})[:300]]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[(token, words.index(token)) for token in ("[CLS]", "[SEP]")])
    tokenizer.enable_padding(length=64)  # as sentence-transformers saves it
    tokenizer.save(str(file))
    return len(words)


def save_text_model(folder, texts, kind="bert"):
    folder.mkdir()
    n = save_tokenizer(texts, folder / "tokenizer.json")
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(SMALL_BERTS[kind](n)).eval()
    model.save_pretrained(folder)
    return model


def ready(start, items, head=None, backbone=None):
    prepared = prepare(items, like=start.like)
    model = build_model(start.family, prepared.input_spec, prepared.classes, prepared.preprocessing, start.backbone | (backbone or {}), head)
    return prepared, take_weights(model, start).eval()


@pytest.mark.parametrize("kind", SMALL_BERTS)
def test_a_text_model_from_a_folder(tmp_path, texts, kind):
    original = save_text_model(tmp_path / "model", texts, kind)
    start = find_start(str(tmp_path / "model"), "text")
    assert (start.kind, start.family, start.like["preprocessing"]["max_length"]) == ("hugging_face", "transformer", SEEN[kind])
    prepared, model = ready(start, texts)
    tokens = next(iter(make_loader(prepared, "test", 16)))[0]
    assert (tokens[:, 0] == 2).all() and ((tokens == 3).sum(dim=1) == 1).all() and tokens.shape[1] <= SEEN[kind]  # [CLS] ... [SEP], padded to the longest
    expected = original(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    torch.testing.assert_close(model.backbone.encode(tokens), expected, atol=1e-6, rtol=1e-5)


def test_a_started_model_is_saved_without_its_origin(tmp_path, texts):
    save_text_model(tmp_path / "bert", texts)
    start = find_start(str(tmp_path / "bert"))
    prepared, model = ready(start, texts, dict(adapters=3, pool="mean"))
    tokens = next(iter(make_loader(prepared, "test", 8)))[0]
    merge_lora(add_lora(model))
    save_model(model, tmp_path / "run" / "model", prepared.folder / "tokenizer.json")
    shutil.rmtree(tmp_path / "bert")
    assert str(tmp_path) not in (tmp_path / "run" / "model" / "model.json").read_text()
    torch.testing.assert_close(load_model(tmp_path / "run")(tokens), model(tokens), atol=0, rtol=0)
    again = find_start(str(tmp_path / "run"), "text")
    assert again.kind == "fmnb" and again.backbone["adapters"] == 3
    torch.testing.assert_close(ready(again, texts)[1].backbone(tokens), model.backbone(tokens), atol=0, rtol=0)


def test_a_task_head_of_transformers_is_left_behind(tmp_path, texts):
    """A folder of BertForSequenceClassification: names with a prefix, a pooler and a classifier."""
    original = save_text_model(tmp_path / "bert", texts)
    classifier = transformers.BertForSequenceClassification(original.config)
    classifier.bert.load_state_dict(original.state_dict())
    classifier.save_pretrained(tmp_path / "bert")
    model = ready(find_start(str(tmp_path / "bert")), texts)[1]
    tokens = torch.tensor([[2, 9, 8, 7, 3]])
    torch.testing.assert_close(model.backbone.encode(tokens), original(input_ids=tokens).last_hidden_state)


def test_half_precision_weights_become_whole(tmp_path, texts):
    original = save_text_model(tmp_path / "bert", texts)
    original.half().save_pretrained(tmp_path / "bert")
    model = ready(find_start(str(tmp_path / "bert")), texts)[1]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("nested", [True, False])
def test_a_timm_model_from_a_folder(tmp_path, digits, nested):
    """As timm writes it for the hub, now and formerly."""
    original = timm.create_model("test_resnet", num_classes=7).eval()
    timm.models.save_for_hf(original, tmp_path, safe_serialization=True)
    config = read_json(tmp_path / "config.json")
    if not nested:
        write_json(tmp_path / "config.json", {name: value for name, value in config.items() if name != "pretrained_cfg"} | config["pretrained_cfg"])
    start = find_start(str(tmp_path), "image")
    assert (start.kind, start.family, start.like["input_spec"]) == ("timm", "cnn", dict(modality="image", channels=3, height=160, width=160))
    prepared, model = ready(start, digits)
    images = next(iter(make_loader(prepared, "test", 4)))[0]
    assert images.shape[1:] == (3, 160, 160) and prepared.preprocessing["mean"] == list(original.pretrained_cfg["mean"])
    torch.testing.assert_close(model.pooled(images), original.forward_head(original.forward_features(images), pre_logits=True), atol=1e-5, rtol=1e-4)


def test_a_vision_transformer_of_timm(tmp_path, digits):
    original = timm.create_model("test_vit", num_classes=7).eval()
    timm.models.save_for_hf(original, tmp_path, safe_serialization=True)
    start = find_start(str(tmp_path))
    assert start.family == "transformer"
    _, model = ready(start, digits)
    images = torch.rand(2, *(start.like["input_spec"][side] for side in ("channels", "height", "width")))
    torch.testing.assert_close(model.pooled(images), original.forward_head(original.forward_features(images), pre_logits=True), atol=1e-5, rtol=1e-4)


def hub_cache(folder, name, weights):
    """What torch.hub would leave of torchvision's weights."""
    (folder / "checkpoints").mkdir(exist_ok=True, parents=True)
    torch.save(weights, folder / "checkpoints" / Path(torchvision.models.get_model_weights(name).DEFAULT.url).name)


@pytest.mark.parametrize("name,family", [("shufflenet_v2_x0_5", "cnn"), ("swin_t", "transformer")])
def test_a_torchvision_model(tmp_path, monkeypatch, digits, name, family):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.manual_seed(3)
    original = torchvision.models.get_model(name).eval()
    hub_cache(tmp_path, name, original.state_dict())
    start = find_start(f"torchvision:{name}", "image")
    shown = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert (start.family, start.like["preprocessing"]["mean"], start.like["input_spec"]["height"]) == (family, list(shown.mean), 224)
    items = digits.head(30).assign(split=["train"] * 20 + ["valid"] * 5 + ["test"] * 5, label=["a", "b"] * 15)
    _, model = ready(start, items)
    images, last = torch.rand(2, 3, 224, 224), [module for module in original.modules() if isinstance(module, torch.nn.Linear)][-1]
    torch.testing.assert_close(last(model.pooled(images)), original(images), atol=1e-5, rtol=1e-4)


def test_pickles_that_are_more_than_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    hub_cache(tmp_path, "shufflenet_v2_x0_5", {"conv1.0.weight": os.getcwd})
    start = find_start("torchvision:shufflenet_v2_x0_5")
    with pytest.raises(ConfigError, match="torchvision cannot make shufflenet_v2_x0_5 .*[Ww]eights.only"):
        take_weights(build_model("cnn", start.like["input_spec"], ["a", "b"], backbone=start.backbone), start)


def test_a_timm_cnn_for_sound():
    """Spectrograms keep their own size and normalisation."""
    start = find_start("timm:resnet18", "audio")
    assert start.like == {} and start.family == "cnn"
    build_backbone("cnn", dict(modality="audio", channels=3, height=51, width=40), start.backbone)


@pytest.mark.parametrize("start_from", ["hf:someone/bert", "someone/bert"])
def test_the_hub_becomes_a_folder(tmp_path, texts, monkeypatch, start_from):
    monkeypatch.setenv("FMNB_CACHE", str(tmp_path / "cache"))
    save_text_model(tmp_path / "bert", texts)
    asked = []

    def download(repo, allow_patterns, local_dir):
        asked.append((repo, allow_patterns))
        shutil.copytree(tmp_path / "bert", local_dir)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    start = find_start(start_from, "text")
    assert asked == [("someone/bert", ["*.json", "*.safetensors"])] and start.kind == "hugging_face" and Path(start.place) == tmp_path / "cache" / "hub" / "someone--bert"


def test_what_cannot_be_reached_is_one_sentence():
    for start_from in ("hf:nobody/nothing", "runs/nothing"):
        with pytest.raises(ConfigError, match="is no folder here, and could not be fetched from the hub .*look at the name and the network.$") as caught:
            find_start(start_from)
        assert "\n" not in str(caught.value)
    start = find_start("timm:test_resnet", "image")
    with pytest.raises(ConfigError, match="timm cannot make test_resnet") as caught:
        take_weights(build_model("cnn", start.like["input_spec"], ["a", "b"], backbone=start.backbone), start)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start_from,message", [
    ("no such folder", "There is no folder 'no such folder' to start from; name a run or model folder, timm:NAME"), ("/no/such/folder", "There is no folder"),
    ("timm:resnet19", "timm has no model 'resnet19'; .*resnet1"), ("resnet19", "timm has no model 'resnet19'"), ("torchvision:resnet19", "torchvision has no model 'resnet19'.*Did you mean 'resnet1"),
    ("timm:", "timm has no model ''"),
])
def test_a_wrong_name_is_one_sentence(start_from, message):
    with pytest.raises(ConfigError, match=message):
        find_start(start_from)


def test_data_of_another_kind_are_refused(tmp_path, texts, digits):
    save_text_model(tmp_path / "bert", texts)
    for start_from, modality in ((str(tmp_path / "bert"), "image"), ("timm:resnet18", "text"), ("torchvision:resnet18", "text"), (str(tmp_path / "bert"), "audio")):
        with pytest.raises(ConfigError, match="takes .* data and these are .* data; choose another"):
            find_start(start_from, modality)
    with pytest.raises(DataError, match="max_length is 64, and the model to start from was made with 40"):
        prepare(texts, Preprocessing(max_length=64), find_start(str(tmp_path / "bert")).like)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize("change,message", [
    (lambda folder: (folder / "config.json").unlink(), "nor a config.json, so it holds no model"),
    (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is no tokenizer that can be read"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "other files of weights can execute code"),
    (lambda folder: edit(folder, pad_token_id=1), "pads with token 1, and fmnb pads with 0"),
    (lambda folder: edit(folder, model_type=None), "neither a model_type of transformers nor an architecture of timm"),
    (lambda folder: edit(folder, vocab_size=None), "which is no text model"),
    (lambda folder: edit(folder, model_type="strange", auto_map={"AutoModel": "code.Model"}), "no text model that transformers can make"),
    (lambda folder: edit(folder, num_hidden_layers=3), "16 of the weights in .* do not fit its config.json .*layer.2.* is absent there"),
    (lambda folder: edit(folder, intermediate_size=80), "intermediate.dense.weight is 64x32 there and 80x32 here"),
    (lambda folder: edit(folder, num_attention_heads=5), "no text model that transformers can make|cannot be made"),
    (lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50]), "no text model that transformers can make"),
])
def test_a_spoilt_folder_is_one_sentence(tmp_path, texts, change, message):
    save_text_model(tmp_path / "bert", texts)
    (tmp_path / "bert" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change(tmp_path / "bert")
    with pytest.raises(FmnbError, match=message) as caught:
        start = find_start(str(tmp_path / "bert"), "text")
        take_weights(build_model("transformer", start.like["input_spec"], ["a", "b"], backbone=start.backbone), start)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_say_which_layers(tmp_path, texts, digits):
    save_text_model(tmp_path / "bert", texts)
    start = find_start(str(tmp_path / "bert"))
    spec, config = start.like["input_spec"], start.backbone["config"]
    for sizes, message in [(dict(hidden_size=64), "the hidden_size 32, this one the hidden_size 64 .*word_embeddings.weight is .*x32 there and .*x64 here"),
                           (dict(num_hidden_layers=1), "layer.1.attention.self.query.weight is 32x32 there and absent here.* more"),
                           (dict(num_attention_heads=4), "the num_attention_heads 2, this one the num_attention_heads 4;")]:
        with pytest.raises(ConfigError, match=message):
            take_weights(build_model("transformer", spec, ["a", "b"], backbone=dict(name="hugging_face", config=config | sizes)), start)
    with pytest.raises(ConfigError, match="are those of a backbone hugging_face, and this model has the backbone encoder; leave backbone out"):
        take_weights(build_model("transformer", spec, ["a", "b"]), start)
    save_model(build_model("cnn", dict(modality="image", channels=1, height=8, width=8), ["a", "b"]), tmp_path / "own")
    with pytest.raises(ConfigError, match="has the base 32, this one the base 16 .stem.weight is 32x1x3x3 there and 16x1x3x3 here"):
        take_weights(build_model("cnn", dict(modality="image", channels=1, height=8, width=8), ["a", "b"], backbone=dict(base=16)), find_start(str(tmp_path / "own")))
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path / "timm", safe_serialization=True)
    edit(tmp_path / "timm", architecture="resnet18")
    other = find_start(str(tmp_path / "timm"))
    with pytest.raises(ConfigError, match="timm cannot make resnet18 .*size mismatch for .*32.*64"):
        take_weights(build_model("cnn", other.like["input_spec"], ["a", "b"], backbone=other.backbone), other)


def test_a_tokenizer_that_pads_otherwise_is_refused_by_the_data(tmp_path, texts):
    save_text_model(tmp_path / "bert", texts)
    save_tokenizer(texts, tmp_path / "bert" / "tokenizer.json", first=("<s>", "[PAD]", "[UNK]", "[CLS]", "[SEP]"))
    with pytest.raises(DataError, match="no padding token with id 0"):
        prepare(texts, like=find_start(str(tmp_path / "bert")).like)
