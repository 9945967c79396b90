"""Contracts, looped over everything that is registered: backbones, heads, recipes, sources."""
import copy
import math

import pytest
import torch
from fmnb.config import FAMILIES, RECIPES
from fmnb.data.load import BATCHES
from fmnb.data.source import EMBEDDED, load_items
from fmnb.model.baseline import BASELINE_NAMES
from fmnb.model.bottleneck import output_channels
from fmnb.model.cnn import CNN_BACKBONES, MaskedBatchNorm, spread
from fmnb.model.head import BACKBONES, build_backbone, build_model
from fmnb.train.recipe import ITEM_PASSES, LEARNING_RATES, RECIPE_FUNCTIONS

IMAGE_SIZES = [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 16, 48), (1, 5, 7)]
BODIES = [(family, modality, name) for family, backbones in BACKBONES.items() for modality, names in backbones.items() for name in names]
SIZES = {"image": (1, 8, 8), "audio": (3, 51, 40)}
BERT = dict(model_type="bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64)
SMALL = {("cnn", "timm"): dict(model="test_resnet"), ("transformer", "timm"): dict(model="test_vit"), ("cnn", "torchvision"): dict(model="shufflenet_v2_x0_5"), ("transformer", "hugging_face"): dict(config=BERT),
         ("rnn", "awd_lstm"): dict(width=32, hidden=48, last=32)}

each_body = pytest.mark.parametrize("family,modality,name", BODIES)


def bodies_of(*modalities):
    return pytest.mark.parametrize("family,modality,name", [body for body in BODIES if body[1] in modalities])


def spec(modality, size=None):
    return dict(modality="text", vocab_size=50, max_length=32) if modality == "text" else dict(zip(("channels", "height", "width"), size or SIZES[modality]), modality=modality)


def sizes(family, name, **more):
    return dict(name=name) | SMALL.get((family, name), {}) | more


def body(family, modality, name, size=None, **more):
    torch.manual_seed(0)
    return build_backbone(family, spec(modality, size), sizes(family, name, **more))


def model(family, modality, name, classes="ab", size=None):
    torch.manual_seed(0)
    return build_model(family, spec(modality, size), list(classes), backbone=sizes(family, name))


def batch(modality, n=4, size=None):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 50, (n, 12), generator=generator) if modality == "text" else torch.randn(n, *(size or SIZES[modality]), generator=generator)


def test_registries_cover_each_other():
    assert set(BACKBONES) == set(FAMILIES) and set(RECIPE_FUNCTIONS) == set(RECIPES)
    modalities = set(BATCHES)
    assert set(LEARNING_RATES) == {(family, modality) for family in FAMILIES for modality in modalities}
    assert all(set(backbones) == modalities for backbones in BACKBONES.values())
    assert set(BASELINE_NAMES) == set(ITEM_PASSES) == modalities
    assert all(factor > 0 and 0 < low < high < 0.1 for factor, low, high in LEARNING_RATES.values())


@each_body
def test_backbone_makes_features_of_the_promised_size(family, modality, name):
    made = model(family, modality, name, "abc")
    features = made.backbone(batch(modality))
    assert features.shape == (4, made.backbone.n_features) and features.dtype == torch.float32
    assert made(batch(modality)).shape == (4, 3)


@each_body
def test_states_have_the_promised_shape(family, modality, name):
    made = body(family, modality, name)
    states = made.encode(batch(modality))
    if family == "cnn" and modality != "text":
        assert states.shape == (4, made.n_states, *made.grid)
    else:
        assert states.ndim == 3 and states.shape[0] == 4 and states.shape[2] == made.n_states
    if modality == "text" or name == "frames":
        assert states.shape[1] == (12 if modality == "text" else SIZES["audio"][1])
    assert isinstance(made.causal, bool)


@pytest.mark.parametrize("size", IMAGE_SIZES)
@bodies_of("image")
def test_image_backbones_take_any_size(family, modality, name, size):
    made = model(family, "image", name, size=size)
    assert torch.isfinite(made(batch("image", size=size))).all()


@each_body
def test_layer_groups_hold_every_parameter_once(family, modality, name):
    made = model(family, modality, name)
    grouped = [id(p) for group in made.layer_groups() for module in group for p in module.parameters()]
    assert sorted(grouped) == sorted(id(p) for p in made.parameters())
    assert len(made.layer_groups()) >= 3


@each_body
def test_blocks_are_numbered_by_their_layer_group(family, modality, name):
    """Each is behind the first group, in order, and its output is states of a batch."""
    made = body(family, modality, name)
    numbers, blocks = zip(*made.block_groups())
    assert list(numbers) == sorted(numbers) and 1 <= numbers[0] and numbers[-1] < len(made.layer_groups())
    assert all(channels > 1 and dim in (-1, 1) for channels, dim in output_channels(made, blocks))


@each_body
def test_every_parameter_gets_a_gradient(family, modality, name):
    made = model(family, modality, name)
    made.head.loss(made(batch(modality)), torch.tensor([0, 1, 0, 1])).backward()
    assert [name for name, p in made.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


@each_body
def test_an_item_does_not_depend_on_its_neighbours(family, modality, name):
    made = model(family, modality, name).eval()
    inputs = batch(modality)
    torch.testing.assert_close(made(inputs)[:1], made(inputs[:1]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(made(inputs), made(inputs), atol=0, rtol=0)


@bodies_of("text")
def test_padding_does_not_change_a_text(family, modality, name):
    made = model(family, "text", name).eval()
    tokens = batch("text")
    padded = torch.cat([tokens, torch.zeros(4, 9, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(made(tokens), made(padded), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(made.backbone.encode(tokens), made.backbone.encode(padded)[:, :12], atol=1e-5, rtol=1e-4)


@each_body
def test_wrong_input_is_refused_in_one_sentence(family, modality, name):
    made = body(family, modality, name)
    wrong = [torch.randn(4, 2, 8, 8), torch.randn(4, 8)] if modality != "text" else [torch.full((2, 3), 50), torch.tensor([[-1]]), torch.randn(2, 3), torch.zeros(2, 0, dtype=torch.int64)]
    for inputs in wrong:
        for refuse in (made, made.encode):
            with pytest.raises(ValueError, match="^Expected .*got"):
                refuse(inputs)


@each_body
def test_initial_loss_is_that_of_a_guess(family, modality, name):
    made = model(family, modality, name, "abcdefgh")
    loss = made.head.loss(made(batch(modality, 8)), torch.arange(8)).item()
    assert loss < 2 * math.log(8)


@each_body
def test_description_rebuilds_and_weights_fill(family, modality, name):
    """Also without what the backbone was made from: no path and no network is left in the description."""
    made = body(family, modality, name).eval()
    again = build_backbone(**made.description).eval()
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(again(batch(modality)), made(batch(modality)), atol=0, rtol=0)
    assert again.description == made.description and made.description["backbone"]["name"] == name


@each_body
def test_a_copy_can_be_taken_while_training(family, modality, name):
    """Averaging the weights copies the model."""
    made = body(family, modality, name).train()
    made(batch(modality)).sum().backward()
    again = copy.deepcopy(made).eval()
    torch.testing.assert_close(again(batch(modality)), made.eval()(batch(modality)), atol=0, rtol=0)


CAUSAL = [("rnn", "text", name, dict(directions=1)) for name in ("lstm", "gru", "awd_lstm")] + [
    ("rnn", "audio", "frames", dict(directions=1)), ("transformer", "text", "encoder", dict(causal=True)), ("transformer", "audio", "frames", dict(causal=True))]
SEQUENCES = [(*found, {}) for found in BODIES if found[1] == "text" or found[2] == "frames"] + CAUSAL


@pytest.mark.parametrize("family,modality,name,more", SEQUENCES)
def test_a_state_sees_what_it_may(family, modality, name, more):
    """A later change does not reach earlier states where the backbone says that it is causal, and does where not."""
    made = body(family, modality, name, **more).eval()
    inputs, changed = batch(modality), batch(modality)
    if modality == "text":
        changed[:, 8:] = 51 - changed[:, 8:]
    else:
        changed[:, :, 8:] += 1
    before, after = made.encode(inputs), made.encode(changed)
    assert torch.equal(before[:, :8], after[:, :8]) == made.causal
    assert not torch.equal(before[:, 8], after[:, 8])
    assert made.causal or not more


@pytest.mark.parametrize("name", ["lstm", "gru", "awd_lstm"])
def test_each_direction_is_a_stack_of_its_own(name):
    """The forward half of the states is causal through all layers, the backward half the other way round."""
    made = body("rnn", "text", name, directions=2, layers=3).eval()
    inputs, changed = batch("text"), batch("text")
    changed[:, 8] = 51 - changed[:, 8]
    differs = (made.encode(inputs) != made.encode(changed)).any(dim=0)
    half = made.n_states // 2
    assert not differs[:8, :half].any() and not differs[9:, half:].any()
    assert differs[8:, :half].any(dim=1).all() and differs[:9, half:].any(dim=1).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(1, 8, 8), (3, 32, 32), (3, 33, 64), (3, 101, 40)])
@pytest.mark.parametrize("name", CNN_BACKBONES["image"])
def test_hidden_pixels_do_not_reach_the_states(name, size, training):
    made = body("cnn", "image", name, size).train(training)
    images, visible = batch("image", 6, size), torch.rand(6, *made.grid, generator=torch.Generator().manual_seed(1)) < 0.4
    seen = spread(visible, size[1:], made.stride).unsqueeze(1)
    states = made.encode(images, visible)
    for other in (torch.zeros_like(images), 100 * torch.ones_like(images), torch.full_like(images, torch.nan)):
        assert torch.equal(made.encode(torch.where(seen, images, other), visible), states)
    shown = (states != 0).any(dim=1)
    assert not shown[~visible].any() and shown[visible].all()


def test_the_default_backbone_is_written_down():
    """A model for photographs is built again as what it is, whatever the default becomes; a name and sizes go above it."""
    photographs = spec("image", (3, 32, 32))
    assert [build_backbone("cnn", photographs, chosen).description["backbone"] for chosen in ({}, {"base": 8}, {"name": "residual"})] == [
        {"name": "pooled", "base": 64, "stem": 24}, {"name": "pooled", "base": 8, "stem": 24}, {"name": "residual", "base": 32}]
    assert build_backbone("cnn", spec("image", (3, 24, 40))).description["backbone"]["name"] == "residual"


def test_batch_norm_counts_what_is_visible():
    """The statistics are those of the visible positions, however many hidden ones stand between them."""
    states, visible = 3 * torch.randn(8, 5, 6, 7) + 2, torch.rand(8, 6, 7) < 0.4
    masked, plain = MaskedBatchNorm(5), torch.nn.BatchNorm1d(5)
    normed = masked(states, visible).movedim(1, -1)
    torch.testing.assert_close(normed[visible], plain(states.movedim(1, -1)[visible]))
    torch.testing.assert_close(masked.running_var, plain.running_var)
    assert not normed[~visible].any()


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 32, 32), (3, 30, 47)])
def test_kept_patches_are_the_image(size):
    made = body("transformer", "image", "vit", size).eval()
    images, tokens = batch("image", size=size), math.prod(made.grid)
    states, order = made.encode(images), torch.stack([torch.randperm(tokens) for _ in range(4)])
    torch.testing.assert_close(made.encode(images, order), states.gather(1, order.unsqueeze(-1).expand(-1, -1, made.n_states)), atol=1e-5, rtol=1e-4)
    assert made.encode(images, order[:, :tokens // 4]).shape == (4, tokens // 4, made.n_states)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sources_are_stable_items_tables(name):
    items, again = load_items(name), load_items(name)
    assert items["item_id"].is_unique and items["label"].notna().all() and {"image", "text"} & set(items)
    assert items.equals(again)
    assert items["label"].value_counts().min() >= 100
