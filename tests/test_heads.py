"""Heads, pools, losses, adapters and LoRA, looped over every registered backbone."""
import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fmnb.core import ConfigError, RunError
from fmnb.data.text import train_tokenizer
from fmnb.model.adapter import add_lora, is_lora, lora_parameters, lora_targets, merge_lora, unmerge_lora
from fmnb.model.head import build_model
from fmnb.model.loss import LOSSES, binary_focal, class_weights, focal
from fmnb.model.output import HEADS, parse_head
from fmnb.model.pool import POOLS
from fmnb.model.store import load_backbone, load_model, save_model, take_backbone
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight
from test_contracts import batch, bodies_of, each_body, sizes, spec

CLASSES = list("abc")
TARGETS = {"single_label": torch.tensor([0, 1, 2, 1]), "multi_label": torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]]), "regression": torch.tensor([250.0, 310.0, 180.0, 260.0])}
SCALE = dict(target=dict(mean=250.0, std=50.0))
HEADS_AS_TEXT = ["linear", "mlp, hidden=16", "pool=mean", "pool=max", "pool=concat, dropout=0.1", "pool=attention", "mlp, pool=attention, adapters=4"]


def model(family, modality, name, head="", problem_type="single_label", columns=None):
    torch.manual_seed(0)
    input_spec = spec(modality) | ({"columns": columns} if columns else {})
    classes = [] if problem_type == "regression" else CLASSES
    return build_model(family, input_spec, classes, SCALE, sizes(family, name), parse_head(head), problem_type)


def grouped(made):
    return [id(parameter) for group in made.layer_groups() for module in group for parameter in module.parameters()]


@pytest.mark.parametrize("head", HEADS_AS_TEXT)
@each_body
def test_every_head_fits_every_backbone(family, modality, name, head):
    made, inputs = model(family, modality, name, head), batch(modality)
    outputs = made(inputs)
    assert outputs.shape == (4, 3) and made.features(inputs).shape[0] == 4
    assert sorted(grouped(made)) == sorted(id(parameter) for parameter in made.parameters())
    made.head.loss(outputs, TARGETS["single_label"]).backward()
    assert [name for name, parameter in made.named_parameters() if parameter.grad is None or not torch.isfinite(parameter.grad).all()] == []
    made.eval()
    torch.testing.assert_close(made(inputs), made.head(made.features(inputs)), atol=0, rtol=0)
    torch.testing.assert_close(made(inputs)[:1], made(inputs[:1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", POOLS)
@bodies_of("text")
def test_no_pool_sees_padding(family, modality, name, pool):
    made, tokens = model(family, "text", name, f"pool={pool}").eval(), batch("text")
    padded = torch.cat([tokens, torch.zeros(4, 5, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(made.features(tokens), made.features(padded), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("problem_type,loss", [(kind, loss) for kind, losses in LOSSES.items() for loss in losses])
def test_every_loss_is_learnt(problem_type, loss, head):
    """Four items are learnt by heart, and predictions are what the problem asks for."""
    made = model("rnn", "image", "rows", f"{head}, loss={loss}, label_smoothing=0", problem_type)
    optimizer, inputs, targets = torch.optim.Adam(made.parameters(), lr=0.01), batch("image"), TARGETS[problem_type]
    made.eval()  # nothing is dropped out
    for _ in range(60):
        optimizer.zero_grad()
        made.head.loss(made(inputs), targets).backward()
        optimizer.step()
    predictions = made.head.predict(made(inputs))
    if problem_type == "regression":
        assert predictions.shape == (4,) and (predictions - targets).abs().max() < 25
    else:
        assert predictions.shape == (4, 3) and predictions.min() >= 0 and predictions.max() <= 1
        right = predictions.argmax(dim=1) if problem_type == "single_label" else (predictions > 0.5).float()
        assert torch.equal(right, targets)
    if problem_type == "single_label":
        torch.testing.assert_close(predictions.sum(dim=1), torch.ones(4))


def test_losses_agree_with_scikit_learn():
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 3, dtype=torch.float64), torch.randint(0, 3, (50,))
    assert abs(LOSSES["single_label"]["cross_entropy"](logits, targets).item() - log_loss(targets, logits.softmax(dim=1))) < 1e-9
    several = (torch.rand(50, 3, dtype=torch.float64) < 0.4).double()
    expected = np.mean([log_loss(several[:, i], logits[:, i].sigmoid()) for i in range(3)])
    assert abs(LOSSES["multi_label"]["binary_cross_entropy"](logits, several).item() - expected) < 1e-9
    auto = torch.tensor(class_weights("auto", CLASSES, targets.numpy()), dtype=torch.float64)
    np.testing.assert_allclose(auto, compute_class_weight("balanced", classes=np.arange(3), y=targets.numpy()))
    weighted = LOSSES["single_label"]["cross_entropy"](logits, targets, auto).item()
    assert abs(weighted - log_loss(targets, logits.softmax(dim=1), sample_weight=auto[targets])) < 1e-9  # balanced weights have mean 1


@pytest.mark.parametrize("problem_type,loss", [(kind, loss) for kind in ("single_label", "multi_label") for loss in LOSSES[kind]])
def test_mixed_targets_cost_the_mix(problem_type, loss):
    """MixUp's shares cost what their parts cost together, also with weights and smoothing."""
    made = model("cnn", "image", "residual", f"loss={loss}", problem_type)
    made.head.register_buffer("weights", torch.tensor([1.0, 3.0, 0.5]), persistent=False)
    outputs, targets = torch.randn(4, 3), TARGETS[problem_type]
    whole = F.one_hot(targets, 3).float() if problem_type == "single_label" else targets
    mixed = 0.3 * whole + 0.7 * whole.flip(0)
    torch.testing.assert_close(made.head.loss(outputs, mixed), 0.3 * made.head.loss(outputs, whole) + 0.7 * made.head.loss(outputs, whole.flip(0)))
    torch.testing.assert_close(made.head.loss(outputs, targets), made.head.loss(outputs, whole))


@pytest.mark.parametrize("head,problem_type", [("linear", "single_label"), ("mlp, hidden=16, pool=attention, adapters=4", "multi_label"), ("pool=concat", "regression")])
@bodies_of("image", "text")
def test_a_saved_model_predicts_the_same_bytes(tmp_path, family, modality, name, head, problem_type):
    made, inputs = model(family, modality, name, head, problem_type).eval(), batch(modality)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    tokenizer = None
    if modality == "text":
        tokenizer = tmp_path / "tokenizer.json"
        train_tokenizer(["".join(map(chr, range(97, 143)))], 300, "char").save(str(tokenizer))  # 46 characters and 4 special tokens
    save_model(made, tmp_path / "model", tokenizer)
    again = load_model(tmp_path / "model")
    assert torch.equal(again.head.predict(again(inputs)), made.head.predict(made(inputs))) and again.description == made.description
    assert torch.equal(load_backbone(tmp_path / "model")(inputs), made.backbone(inputs))


def test_a_folder_of_before_is_a_linear_head(tmp_path):
    """What was saved before problem types, heads and adapters were there."""
    from fmnb.core import read_json, write_json
    made = model("cnn", "image", "residual").eval()
    save_model(made, tmp_path)
    described = read_json(tmp_path / "model.json")
    write_json(tmp_path / "model.json", {name: value for name, value in described.items() if name != "problem_type"} | {"head": {}})
    assert torch.equal(load_model(tmp_path)(batch("image")), made(batch("image")))


def test_a_kill_leaves_the_old_model_and_the_next_save_removes_the_rest(tmp_path, monkeypatch):
    made = model("cnn", "image", "residual")
    save_model(made, tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    (tmp_path / "m" / ".model.safetensors.left").write_bytes(b"half")
    (tmp_path / "m" / ".model.safetensors.over").mkdir()
    (tmp_path / "m" / ".model.safetensors.over" / ".tmp123").write_bytes(b"half")
    save_model(made, tmp_path / "m")
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    from safetensors import SafetensorError

    def full(weights, path, metadata=None):
        path.write_bytes(b"half")
        raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
    monkeypatch.setattr("fmnb.model.weights.save_file", full)
    with pytest.raises(RunError, match="model.safetensors could not be written \\(there is no space left\\); make room"):
        save_model(made, tmp_path / "m")
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before


def test_columns_stand_beside_any_pool():
    made = model("transformer", "text", "encoder", "mlp, pool=attention", columns=dict(n_numbers=2, category_sizes=[3])).eval()
    numbers, categories = torch.rand(4, 2), torch.zeros(4, 1, dtype=torch.int64)
    pooled = made.pooled(batch("text"))
    assert torch.equal(made.head(made.beside(pooled, numbers, categories)), made(batch("text"), numbers, categories))
    assert [type(module).__name__ for module in made.layer_groups()[-1]] == ["AttentionPool", "ColumnFeatures", "Head"]


# Adapters

@each_body
def test_new_adapters_change_nothing_and_learn(family, modality, name):
    plain, made = model(family, modality, name).eval(), model(family, modality, name, "adapters=3").eval()
    inputs, groups = batch(modality), made.layer_groups()
    assert torch.equal(plain.backbone(inputs), made.backbone(inputs)) and torch.equal(plain.backbone.encode(inputs), made.backbone.encode(inputs))
    assert set(made.backbone.state_dict()) - set(plain.backbone.state_dict()) == {key for key in made.backbone.state_dict() if key.startswith("adapters.")}
    assert sorted(grouped(made)) == sorted(id(parameter) for parameter in made.parameters()) and len(groups) == len(plain.layer_groups())
    assert len(made.backbone.adapters) >= 1 and len(groups) - 1 > max(made.backbone.adapter_groups)
    made.train().head.loss(made(inputs), TARGETS["single_label"]).backward()
    assert all(adapter.up.weight.grad.any() for adapter in made.backbone.adapters)
    with torch.no_grad():
        for adapter in made.backbone.adapters:
            adapter.up.weight.normal_()
    assert not torch.equal(plain.backbone(inputs), made.eval().backbone(inputs))


def test_a_copys_adapters_are_its_own():
    made = model("cnn", "image", "residual", "adapters=3").eval()
    twin, inputs = copy.deepcopy(made), batch("image")
    with torch.no_grad():
        twin.backbone.adapters[0].up.weight.normal_()
    assert not torch.equal(twin(inputs), made(inputs)) and torch.equal(copy.deepcopy(made)(inputs), made(inputs))


def test_adapters_can_be_added_to_trained_weights_and_not_left_out(tmp_path):
    made = model("cnn", "image", "residual").eval()
    save_model(made, tmp_path / "plain")
    wide = take_backbone(model("cnn", "image", "residual", "adapters=3"), tmp_path / "plain").eval()
    assert torch.equal(wide.backbone(batch("image")), made.backbone(batch("image")))
    save_model(wide, tmp_path / "wide")
    again = take_backbone(build_model("cnn", spec("image"), CLASSES, backbone=wide.description["backbone"]), tmp_path / "wide").eval()
    assert torch.equal(again.backbone(batch("image")), wide.backbone(batch("image")))
    with pytest.raises(ConfigError, match="has the adapters 3, this one the adapters absent .*start from a model of the same kind"):
        take_backbone(model("cnn", "image", "residual"), tmp_path / "wide")


# LoRA

def disturb(made):
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    return made


@each_body
def test_lora_merged_equals_unmerged(family, modality, name):
    made, inputs = model(family, modality, name, "mlp, hidden=16").eval(), batch(modality)
    names, before, groups = sorted(made.state_dict()), made(inputs), len(made.layer_groups())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = disturb(add_lora(copy.deepcopy(made), rank=3))
    changed = tuned(inputs)
    assert is_lora(tuned) and not torch.equal(changed, before) and lora_parameters(tuned) < made.n_parameters
    assert len(tuned.layer_groups()) == groups and sorted(grouped(tuned)) == sorted(id(parameter) for parameter in tuned.parameters())
    torch.testing.assert_close(copy.deepcopy(tuned)(inputs), changed, atol=0, rtol=0)
    forgotten = unmerge_lora(copy.deepcopy(tuned))
    torch.testing.assert_close(forgotten(inputs), before, atol=0, rtol=0)
    merged = merge_lora(tuned)
    torch.testing.assert_close(merged(inputs), changed, atol=1e-5, rtol=1e-5)
    for plain in (merged, forgotten):
        assert sorted(plain.state_dict()) == names and not is_lora(plain) and all(parameter.requires_grad for parameter in plain.parameters())
        assert type(plain) is type(made) and not any("peft" in type(module).__module__ for module in plain.modules())
    copy.deepcopy(made).load_state_dict(merged.state_dict())


@each_body
def test_a_lora_weight_is_in_the_group_of_its_layer(family, modality, name):
    made = model(family, modality, name, "adapters=3")
    number_of = {key: number for number, group in enumerate(made.layer_groups()) for module in group for parameter in module.parameters()
                 for key, other in made.named_parameters() if other is parameter}
    tuned = add_lora(made, rank=2)
    groups = {id(parameter): number for number, group in enumerate(tuned.layer_groups()) for module in group for parameter in module.parameters()}
    seen = 0
    for key, parameter in tuned.named_parameters():
        if ".lora_" in key:
            layer = key.split(".lora_")[0].replace(".base_layer", "") + "."
            assert groups[id(parameter)] == next(number for base, number in number_of.items() if base.startswith(layer))
            seen += 1
    assert seen >= 2 and min(groups[id(parameter)] for key, parameter in tuned.named_parameters() if ".lora_" in key) >= 1


@each_body
def test_only_what_is_new_learns_beside_lora(family, modality, name):
    """In training mode, with every dropout on: no bit of the frozen weights moves, and all that is trainable gets a gradient."""
    made = add_lora(model(family, modality, name, "pool=attention, adapters=3"), rank=2).train()
    before = {key: parameter.detach().clone() for key, parameter in made.named_parameters()}
    optimizer = torch.optim.SGD([parameter for parameter in made.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        made.head.loss(made(batch(modality)), TARGETS["single_label"]).backward()
        optimizer.step()
    trainable = {key for key, parameter in made.named_parameters() if parameter.requires_grad}
    assert trainable == {key for key in before if ".lora_" in key or ".adapters." in key or key.startswith(("head.", "pool."))}
    moved = {key for key, parameter in made.named_parameters() if not torch.equal(parameter, before[key])}
    assert moved <= trainable and any(".lora_B" in key for key in moved) and {"head.linear.weight", "backbone.adapters.0.up.weight"} <= moved
    assert all(torch.isfinite(parameter.grad).all() for parameter in made.parameters() if parameter.requires_grad)


def test_lora_says_what_it_cannot_do():
    made = model("transformer", "text", "encoder")
    for settings, message in [(dict(rank=0), "rank of at least 1"), (dict(alpha=0.0), "alpha above 0"), (dict(dropout=1.0), "dropout in \\[0, 1\\)"),
                              (dict(targets="quary"), "no layer named 'quary' among the 4")]:
        with pytest.raises(ConfigError, match=message):
            add_lora(made, **settings)
    assert not is_lora(made) and merge_lora(made) is made and unmerge_lora(made) is made
    with pytest.raises(ConfigError, match="merge it before"):
        add_lora(add_lora(made))
    with pytest.raises(ConfigError, match="recurrent weights can have no dropout"):
        add_lora(model("rnn", "text", "lstm"), dropout=0.1)


def test_lora_needs_peft(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="LoRA needs peft, which is not installed; install fmnb\\[hub\\] or choose another recipe"):
        add_lora(model("cnn", "image", "residual"))


def test_lora_is_small_where_models_are_large():
    made = build_model("transformer", dict(modality="text", vocab_size=30_522), ["a", "b"], backbone=dict(name="hugging_face", config=dict(
        model_type="bert", hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)))
    share = sum(parameter.numel() for parameter in add_lora(made).parameters() if parameter.requires_grad) / made.n_parameters
    assert 0.01 < share < 0.02 and len(lora_targets(merge_lora(made))[0]) == 36


@pytest.mark.parametrize("loss, targets", [(focal, torch.tensor([0])), (binary_focal, torch.tensor([[1.0, 0.0]]))])
def test_focal_loss_has_a_slope_where_the_model_is_sure(loss, targets):
    outputs = torch.tensor([[40.0, -40.0]], requires_grad=True)
    loss(outputs, targets, gamma=0.5).backward()
    assert outputs.grad.isfinite().all()
