"""Model folders: what is written, what is read back, and what happens to folders that are not as they should be."""
import json
import os
import shutil
import socket

import huggingface_hub
import pytest
import torch
import transformers
from fmnb.core import ConfigError, RunError, read_json, write_json
from fmnb.data.text import train_tokenizer
from fmnb.model.head import build_backbone, build_model
from fmnb.model.store import FILES, load_backbone, load_model, model_card, pull_from_hub, push_to_hub, read_description, read_weights, save_model, save_weights, take_backbone
from safetensors.torch import load_file

TEXTS = ["the cat sat on the mat", "a dog ran after the cat", "no bird was there"] * 20
IMAGE = dict(modality="image", channels=1, height=8, width=8)


@pytest.fixture
def tokenizer(tmp_path):
    trained = train_tokenizer(TEXTS, 300)
    trained.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def text_spec(tokenizer):
    from tokenizers import Tokenizer
    return dict(modality="text", vocab_size=Tokenizer.from_file(str(tokenizer)).get_vocab_size(), max_length=32)


def save_foundation(folder, backbone, objective="causal_lm", tokenizer=None):
    """What pretraining leaves: weights of backbone and objective, and where they come from."""
    weights = {f"backbone.{name}": value for name, value in backbone.state_dict().items()} | {"objective.scale": torch.ones(3)}
    described = backbone.description | dict(kind="foundation", objective=dict(name=objective), preprocessing={}, data=dict(name="d", fingerprint="f", counts={}),
                                            trained=dict(steps=10, tokens=640, seconds=1.0, loss=2.0, valid_loss=2.1))
    save_weights(folder, weights, described, tokenizer)
    return folder


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    backbone = build_backbone("rnn", text_spec(tokenizer), dict(name="lstm", width=16, hidden=16, directions=1))
    return save_foundation(tmp_path / "checkpoint", backbone, tokenizer=tokenizer)


def same_weights(left, right):
    return all(torch.equal(value, right.state_dict()[name]) for name, value in left.state_dict().items())


def test_a_foundation_checkpoint_comes_back(checkpoint):
    description = read_description(checkpoint)
    assert description["kind"] == "foundation" and description["format"] == 1 and description["trained"]["steps"] == 10
    assert description["tokenizer"] == checkpoint / "tokenizer.json"
    backbone = load_backbone(checkpoint)
    assert backbone.causal and not backbone.training
    assert set(read_weights(checkpoint, "backbone")) == set(backbone.state_dict())
    assert set(read_weights(checkpoint, "objective")) == {"scale"}


def test_the_backbone_of_either_kind_can_be_taken(tmp_path, tokenizer, checkpoint):
    spec = text_spec(tokenizer)
    chosen = read_description(checkpoint)["backbone"]
    classifier = take_backbone(build_model("rnn", spec | dict(max_length=99), ["a", "b"], backbone=chosen | dict(dropout=0.1, locked=True)), checkpoint)
    assert same_weights(load_backbone(checkpoint), classifier.backbone)
    save_model(classifier, tmp_path / "classifier", tokenizer)
    second = take_backbone(build_model("rnn", spec, ["x", "y", "z"], backbone=chosen), tmp_path / "classifier")
    assert same_weights(classifier.backbone, second.backbone) and same_weights(load_backbone(tmp_path / "classifier"), second.backbone)


@pytest.mark.parametrize("backbone,message", [
    (dict(directions=2), "the directions 1, this one the directions 2 \\(stack.layers.0.1.weight_ih_l0 is absent there and 64x16 here, .* and 1 more\\)"),
    (dict(width=8), "the width 16, this one the width 8 \\(embedding.weight is .*x16 there and .*x8 here"), (dict(cell="gru"), "the cell lstm, this one the cell gru"),
    (dict(name="gru"), "the name lstm, the cell lstm, this one the name gru, the cell gru")])
def test_another_architecture_is_refused(tokenizer, checkpoint, backbone, message):
    chosen = dict(name="lstm", width=16, hidden=16, directions=1) | backbone
    with pytest.raises(ConfigError, match=message + ".*; start from a model of the same kind"):
        take_backbone(build_model("rnn", text_spec(tokenizer), ["a", "b"], backbone=chosen), checkpoint)


def test_another_family_is_refused(tmp_path):
    save_model(build_model("cnn", IMAGE, ["a", "b"]), tmp_path / "cnn")
    with pytest.raises(ConfigError, match="has the family cnn, this one the family transformer; start from"):
        take_backbone(build_model("transformer", IMAGE, ["a", "b"]), tmp_path / "cnn")
    with pytest.raises(ConfigError, match="start from a model of the same kind"):
        take_backbone(build_model("cnn", IMAGE | dict(height=16), ["a", "b"]), tmp_path / "cnn")


def test_kinds_are_not_mixed_up(checkpoint):
    with pytest.raises(RunError, match="holds a foundation checkpoint, not a classifier"):
        load_model(checkpoint)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_weights_are_one_sentence(checkpoint, share):
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(RunError, match="is not whole .*; copy or download it again"):
        load_backbone(checkpoint)


def change_description(folder, **changes):
    write_json(folder / "model.json", read_json(folder / "model.json") | changes)


@pytest.mark.parametrize("changes,error,message", [
    (dict(format=2), RunError, "has format 2, and this version of fmnb reads formats up to 1; update fmnb"),
    (dict(kind="adapter"), RunError, "describes no model of fmnb|holds adapter"),
    (dict(family="transformer"), ConfigError, "has no backbone 'lstm'"),
    (dict(backbone=dict(name="gru")), RunError, "does not hold the model that model.json describes"),
    (dict(backbone=dict(name="lstm", depth=3)), ConfigError, "has no size 'depth'"),
])
def test_a_description_that_does_not_fit_is_one_sentence(checkpoint, changes, error, message):
    change_description(checkpoint, **changes)
    with pytest.raises(error, match=message) as caught:
        load_backbone(checkpoint)
        read_description(checkpoint, "foundation")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content,message", [("", "not valid JSON"), ("[]", "describes no model"), ("{}", "describes no model"), ('{"architectures": ["Bert"]}', "describes no model")])
def test_a_strange_description_is_one_sentence(checkpoint, content, message):
    (checkpoint / "model.json").write_text(content)
    with pytest.raises(RunError, match=message):
        load_backbone(checkpoint)


def test_the_tokenizer_must_be_there_and_match(checkpoint):
    file = checkpoint / "tokenizer.json"
    train_tokenizer(TEXTS, 300, "char").save(str(file))
    with pytest.raises(RunError, match="tokens and the model was made for"):
        read_description(checkpoint)
    file.write_text("{}")
    with pytest.raises(RunError, match="is no tokenizer that can be read"):
        load_backbone(checkpoint)
    file.unlink()
    with pytest.raises(RunError, match="text model without its tokenizer.json"):
        load_backbone(checkpoint)


def test_a_folder_holds_no_code(checkpoint):
    """Four files; the weights are safetensors, the rest is text."""
    assert {path.name for path in checkpoint.iterdir()} == set(FILES)
    load_file(checkpoint / "model.safetensors")
    json.loads((checkpoint / "model.json").read_text()), json.loads((checkpoint / "tokenizer.json").read_text())


def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch):
    model = build_model("cnn", IMAGE, ["a", "b"])
    save_model(model, tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    monkeypatch.setattr("fmnb.model.weights.save_file", lambda weights, path, metadata: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match="could not be written \\(there is no space left\\); make room"):
        save_model(build_model("rnn", IMAGE, ["a", "b"]), tmp_path / "m")
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before


@pytest.mark.parametrize("modality,objective,pipeline", [("text", "causal_lm", "text-generation"), ("text", "masked_lm", "fill-mask"), ("image", "contrastive", "image-feature-extraction"), ("audio", "masked_frames", "feature-extraction")])
def test_a_card_is_one_that_the_hub_reads(modality, objective, pipeline):
    description = dict(kind="foundation", family="transformer", input_spec=dict(modality=modality), backbone=dict(name="frames", depth=4), objective=dict(name=objective),
                       data=dict(name="odd | name", counts=dict(train=3)), trained=dict(steps=10, valid_loss=1.5), preprocessing=dict(mean=[0.5]))
    text = model_card(description)
    card = huggingface_hub.ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("fmnb", pipeline) and {"fmnb", "transformer", objective} <= set(card.data.tags)
    assert "steps 10" in text and "odd / name" in text and "load_backbone" in text
    assert "classification" in model_card(description | dict(kind="classifier", classes=["a", "b"], objective={}))


@pytest.mark.parametrize("address", ["{}", "file://{}"])
def test_push_and_pull_through_a_folder(tmp_path, checkpoint, address):
    (checkpoint / "optimizer.pt").write_bytes(b"a pickle")
    (checkpoint / "modeling.py").write_text("print('code')")
    repo = address.format(tmp_path / "shared" / "model")
    assert push_to_hub(checkpoint, repo) == str(tmp_path / "shared" / "model")
    (tmp_path / "shared" / "model" / "setup.py").write_text("print('code')")
    pulled = pull_from_hub(repo, tmp_path / "pulled")
    assert {path.name for path in pulled.iterdir()} == set(FILES)
    assert all((pulled / name).read_bytes() == (checkpoint / name).read_bytes() for name in FILES)


def test_pull_without_a_folder_goes_to_the_cache(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setenv("FMNB_CACHE", str(tmp_path / "cache"))
    pulled = pull_from_hub(checkpoint)
    assert (tmp_path / "cache") in pulled.parents and same_weights(load_backbone(pulled), load_backbone(checkpoint))


def test_nothing_broken_is_pushed_or_pulled(tmp_path, checkpoint):
    whole = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(whole[:-10])
    for move in (push_to_hub, pull_from_hub):
        with pytest.raises(RunError, match="is not whole"):
            move(checkpoint, tmp_path / "there")
    assert not (tmp_path / "there").exists()


class FakeHub:
    """Records what would go to the hub."""
    def __init__(self, calls):
        self.calls = calls

    def create_repo(self, repo, private, exist_ok):
        self.calls.append(("create", repo, private))

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        self.calls.append(("upload", repo_id, set(allow_patterns)))


def test_the_hub_gets_and_gives_four_files(tmp_path, checkpoint, monkeypatch):
    calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FakeHub(calls))
    assert push_to_hub(checkpoint, "someone/model") == "https://huggingface.co/someone/model"
    assert calls == [("create", "someone/model", True), ("upload", "someone/model", set(FILES))]

    def download(repo, revision, allow_patterns, local_dir):
        assert (repo, revision, set(allow_patterns)) == ("someone/model", "main", set(FILES))
        shutil.copytree(checkpoint, local_dir)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same_weights(load_backbone(pull_from_hub("someone/model", tmp_path / "pulled")), load_backbone(checkpoint))


def test_a_hub_that_does_not_answer_is_one_sentence(tmp_path, checkpoint, monkeypatch):
    def refuse(*_, **__):
        raise OSError("Network is unreachable\nand more")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(RunError, match="^someone/model could not be fetched from the hub .*hf auth login.$"):
        pull_from_hub("someone/model", tmp_path / "pulled")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: type("Hub", (), {"create_repo": refuse})())
    with pytest.raises(RunError, match="^someone/model could not be written on the hub"):
        push_to_hub(checkpoint, "someone/model")


def no_network(*_, **__):
    raise AssertionError("the network was asked")


def test_a_hugging_face_encoder_needs_its_source_only_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    spec = text_spec(tokenizer)
    config = transformers.BertConfig(vocab_size=spec["vocab_size"], hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=40)
    original = transformers.BertModel(config).eval()
    original.save_pretrained(tmp_path / "bert")
    chosen = dict(name="hugging_face", path=str(tmp_path / "bert"))
    model = build_model("transformer", spec, ["a", "b"], backbone=chosen).eval()
    tokens = torch.randint(2, spec["vocab_size"], (3, 12))
    torch.testing.assert_close(model.backbone.encode(tokens), original(input_ids=tokens).last_hidden_state)
    save_model(model, tmp_path / "saved", tokenizer)
    shutil.rmtree(tmp_path / "bert")
    assert str(tmp_path) not in (tmp_path / "saved" / "model.json").read_text()
    torch.testing.assert_close(load_model(tmp_path / "saved")(tokens), model(tokens))
    again = take_backbone(build_model("transformer", spec, ["x", "y"], backbone=read_description(tmp_path / "saved")["backbone"]), tmp_path / "saved")
    assert same_weights(again.backbone, model.backbone)


def test_no_weights_from_a_pickle_and_no_code_from_a_folder(tmp_path):
    config = transformers.BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = transformers.BertModel(config)
    config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    spec = dict(modality="text", vocab_size=40, max_length=16)
    with pytest.raises(ConfigError, match="config.json and model.safetensors"):
        build_backbone("transformer", spec, dict(name="hugging_face", path=str(tmp_path / "pickled")))
    model.save_pretrained(tmp_path / "coded")
    written = json.loads((tmp_path / "coded" / "config.json").read_text())
    (tmp_path / "coded" / "config.json").write_text(json.dumps(written | dict(model_type="strange", auto_map=dict(AutoConfig="code.Config", AutoModel="code.Model"))))
    (tmp_path / "coded" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="is no text model that transformers can make"):
        build_backbone("transformer", spec, dict(name="hugging_face", path=str(tmp_path / "coded")))
    assert not (tmp_path / "ran").exists()


def test_a_timm_model_needs_its_weights_only_once(tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    import timm
    from safetensors.torch import save_file
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "weights.safetensors")
    chosen = dict(name="timm", model="test_resnet", weights=str(tmp_path / "weights.safetensors"))
    model = build_model("cnn", IMAGE, ["a", "b"], backbone=chosen).eval()
    save_model(model, tmp_path / "saved")
    os.remove(tmp_path / "weights.safetensors")
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(load_model(tmp_path / "saved")(images), model(images))


@pytest.mark.parametrize("module,backbone,modality", [("timm", dict(name="timm"), "image"), ("transformers", dict(name="hugging_face", path="x"), "text")])
def test_an_absent_library_is_one_sentence(monkeypatch, module, backbone, modality):
    import sys
    monkeypatch.setitem(sys.modules, module, None)
    spec = IMAGE if modality == "image" else dict(modality="text", vocab_size=40, max_length=16)
    with pytest.raises(ConfigError, match=f"needs {module}, which is not installed; install fmnb\\[hub\\]"):
        build_backbone("transformer", spec, backbone)
