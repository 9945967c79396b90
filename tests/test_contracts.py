"""Contracts, looped over everything that is registered: backbones, heads, recipes, sources."""
import math

import pytest
import torch
from fmnb.config import FAMILIES, RECIPES
from fmnb.data.load import BATCHES
from fmnb.data.source import EMBEDDED, load_items
from fmnb.model.baseline import BASELINE_NAMES
from fmnb.model.head import BACKBONES, build_model
from fmnb.train.recipe import ITEM_PASSES, LEARNING_RATES, RECIPE_FUNCTIONS

IMAGE_SIZES = [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 16, 48), (1, 5, 7)]
BODIES = [(family, modality) for family, backbones in BACKBONES.items() for modality in backbones]


SIZES = {"image": (1, 8, 8), "audio": (3, 51, 40)}


def spec(modality, size=None):
    return dict(modality="text", vocab_size=50, max_length=32) if modality == "text" else dict(zip(("channels", "height", "width"), size or SIZES[modality]), modality=modality)


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


@pytest.mark.parametrize("family,modality", BODIES)
def test_backbone_makes_features_of_the_promised_size(family, modality):
    model = build_model(family, spec(modality), ["a", "b", "c"])
    features = model.backbone(batch(modality))
    assert features.shape == (4, model.backbone.n_features) and features.dtype == torch.float32
    assert model(batch(modality)).shape == (4, 3)


@pytest.mark.parametrize("size", IMAGE_SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_image_backbones_take_any_size(family, size):
    model = build_model(family, spec("image", size), ["a", "b"])
    assert torch.isfinite(model(batch("image", size=size))).all()


@pytest.mark.parametrize("family,modality", BODIES)
def test_layer_groups_hold_every_parameter_once(family, modality):
    model = build_model(family, spec(modality), ["a", "b"])
    grouped = [id(p) for group in model.layer_groups() for module in group for p in module.parameters()]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert len(model.layer_groups()) >= 3


@pytest.mark.parametrize("family,modality", BODIES)
def test_every_parameter_gets_a_gradient(family, modality):
    model = build_model(family, spec(modality), ["a", "b"])
    model.head.loss(model(batch(modality)), torch.tensor([0, 1, 0, 1])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


@pytest.mark.parametrize("family,modality", BODIES)
def test_an_item_does_not_depend_on_its_neighbours(family, modality):
    model = build_model(family, spec(modality), ["a", "b"]).eval()
    inputs = batch(modality)
    torch.testing.assert_close(model(inputs)[:1], model(inputs[:1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_a_text(family):
    model = build_model(family, spec("text"), ["a", "b"]).eval()
    tokens = batch("text")
    padded = torch.cat([tokens, torch.zeros(4, 9, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(model(tokens), model(padded), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family,modality", BODIES)
def test_wrong_input_is_refused_in_one_sentence(family, modality):
    backbone = build_model(family, spec(modality), ["a", "b"]).backbone
    wrong = [torch.randn(4, 2, 8, 8), torch.randn(4, 8)] if modality != "text" else [torch.full((2, 3), 50), torch.tensor([[-1]]), torch.randn(2, 3), torch.zeros(2, 0, dtype=torch.int64)]
    for inputs in wrong:
        with pytest.raises(ValueError, match="^Expected .*got"):
            backbone(inputs)


@pytest.mark.parametrize("family,modality", BODIES)
def test_initial_loss_is_that_of_a_guess(family, modality):
    torch.manual_seed(0)
    model = build_model(family, spec(modality), list("abcdefgh"))
    loss = model.head.loss(model(batch(modality, 8)), torch.arange(8)).item()
    assert loss < 2 * math.log(8)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sources_are_stable_items_tables(name):
    items, again = load_items(name), load_items(name)
    assert items["item_id"].is_unique and items["label"].notna().all() and {"image", "text"} & set(items)
    assert items.equals(again)
    assert items["label"].value_counts().min() >= 100
