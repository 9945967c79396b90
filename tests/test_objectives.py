"""Objectives, looped over every backbone that can do them: they learn, answer alike in evaluation, and see nothing of what they are asked."""
import io
import math

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import torch.nn.functional as F
from fmnb.core import ConfigError
from fmnb.data.prepare import Preprocessing, prepare
from fmnb.data.sound import add_deltas
from fmnb.data.source import load_items
from fmnb.data.split import split_items
from fmnb.data.stream import make_stream
from fmnb.data.text import word_starts
from fmnb.model.head import BACKBONES, build_backbone
from fmnb.train.objective import DEFAULT_OBJECTIVES, OBJECTIVES, make_objective, objective_settings
from tokenizers import Tokenizer

SMALL = {  # sizes that train in a blink, and variants that other objectives need
    ("cnn", "image"): [dict(base=8)], ("cnn", "audio"): [dict(base=8)], ("cnn", "text"): [dict(width=32, depth=2)],
    ("rnn", "image"): [dict(hidden=16, embedding=16)], ("rnn", "audio"): [dict(name="frames", hidden=24, embedding=32, layers=1, directions=n) for n in (1, 2)],
    ("rnn", "text"): [*(dict(name=cell, width=32, hidden=24, directions=n) for cell in ("lstm", "gru") for n in (1, 2)), dict(name="awd_lstm", width=32, hidden=48, last=32)],
    ("transformer", "image"): [dict(name="vit", dim=32, depth=2, patch=2), dict(name="conv_stem", dim=32, depth=1)],
    ("transformer", "audio"): [dict(name="frames", dim=32, depth=2, causal=causal) for causal in (False, True)],
    ("transformer", "text"): [dict(name=name, width=32, depth=2) for name in ("encoder", "decoder")],
}
SPECS = {"image": dict(modality="image", channels=1, height=8, width=8), "audio": dict(modality="audio", channels=3, height=51, width=40), "text": dict(modality="text", vocab_size=300, max_length=64)}


def title(values):
    return "-".join(map(str, (*values[:2], *values[2].values(), values[3])))


def fitting():
    """Every objective with every backbone that can do it."""
    for (family, modality), variants in SMALL.items():
        for sizes in variants:
            body = build_backbone(family, SPECS[modality], sizes)
            for name, objective in OBJECTIVES.items():
                if modality in objective.modalities and not objective.misfit(body):
                    yield pytest.param((family, modality, sizes, name), id=title((family, modality, sizes, name)))


FITTING = list(fitting())


def voice(number):
    rng, seconds, buffer = np.random.default_rng(number), np.arange(4000) / 8000, io.BytesIO()
    pitch = rng.uniform(200, 650) * np.exp2(rng.uniform(-1, 1) * np.sin(2 * np.pi * rng.uniform(0.2, 1) * seconds))
    soundfile.write(buffer, 0.2 * sum(np.sin(2 * np.pi * n * np.cumsum(pitch) / 8000) / n for n in (1, 2, 3))[: rng.integers(2500, 4001)], 8000, format="WAV")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def prepared():
    """Real embedded data without labels, and made voices."""
    voices = pd.DataFrame({"item_id": [f"voice-{i:03d}" for i in range(120)], "audio": [voice(i) for i in range(120)]})
    texts = load_items("docstrings").drop(columns=["label", "group"])
    return {"image": prepare(split_items(load_items("digits").drop(columns="label"))), "audio": prepare(split_items(voices), Preprocessing(max_seconds=0.5)),
            "text": prepare(split_items(texts), Preprocessing(vocab_size=300))}


def build(chosen, seed=0, settings=None):
    family, modality, sizes, name = chosen
    torch.manual_seed(seed)
    starts = torch.arange(300) % 3 != 0
    return make_objective(build_backbone(family, SPECS[modality], sizes), family, modality, name, settings, mask_token=1, word_starts=starts)


def batch(modality, seed=0, n=8):
    generator = torch.Generator().manual_seed(seed)
    if modality == "text":
        return torch.randint(3, 300, (n, 33), generator=generator)
    if modality == "image":
        return torch.randn(n, 1, 8, 8, generator=generator)
    return add_deltas(torch.randn(n, 1, 51, 40, generator=generator))


def test_every_objective_is_somebodys_and_every_pair_has_a_usual_one():
    assert {param.values[0][3] for param in FITTING} == set(OBJECTIVES)
    assert set(DEFAULT_OBJECTIVES) == {(family, modality) for family in BACKBONES for modality in BACKBONES[family]} == set(SMALL)
    for (family, modality), variants in SMALL.items():
        for sizes in variants:
            objective = make_objective(build_backbone(family, SPECS[modality], sizes), family, modality, mask_token=1)
            assert objective.name in DEFAULT_OBJECTIVES[family, modality]


@pytest.mark.parametrize("chosen", FITTING)
def test_the_loss_falls_in_thirty_steps_of_real_data(chosen, prepared):
    objective, data = build(chosen), prepared[chosen[1]]
    assert data.input_spec == SPECS[chosen[1]] | {key: value for key, value in data.input_spec.items() if key == "max_length"}
    optimizer, losses = torch.optim.AdamW(objective.parameters(), 5e-3, betas=(0.9, 0.99)), []
    for inputs, *_ in make_stream(data, "train", 32, context=32 if chosen[1] == "text" else 0, views=objective.views, round_steps=30):
        loss = objective.loss(objective(inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-6:]) < 0.97 * sum(losses[:6]), losses


@pytest.mark.parametrize("chosen", FITTING)
def test_gradients_reach_every_parameter(chosen):
    objective = build(chosen)
    outputs = objective(batch(chosen[1]))
    assert outputs.shape == (8, 2) and outputs.dtype == torch.float32 and torch.isfinite(outputs).all() and (outputs[:, 1] == outputs[:, 1].round()).all()
    torch.testing.assert_close(objective.loss(outputs, torch.zeros(8)), outputs[:, 0].sum() / outputs[:, 1].sum())
    objective.loss(outputs).backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()] == []


@pytest.mark.parametrize("chosen", FITTING)
def test_evaluation_repeats_itself_and_draws_nothing(chosen):
    objective, inputs = build(chosen).eval(), batch(chosen[1])
    before = torch.get_rng_state()
    assert torch.equal(objective(inputs), objective(inputs)) and torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(build(chosen).eval()(inputs), objective(inputs))


@pytest.mark.parametrize("chosen", FITTING)
def test_it_is_rebuilt_from_its_description_and_its_groups_hold_every_parameter_once(chosen):
    objective, inputs = build(chosen).eval(), batch(chosen[1])
    description = objective.describe()
    assert set(description) == {"name", *objective_settings(objective.name)}
    again = build((*chosen[:3], description.pop("name")), seed=5, settings=description).eval()
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again(inputs), objective(inputs))
    grouped = [id(p) for group in objective.layer_groups() for module in group for p in module.parameters()]
    assert sorted(grouped) == sorted(id(p) for p in objective.parameters())


@pytest.mark.parametrize("chosen", FITTING)
def test_half_precision_gives_nearly_the_same_loss(chosen):
    objective, inputs = build(chosen).eval(), batch(chosen[1])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = objective(inputs)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(objective.loss(outputs), objective.loss(objective(inputs)), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("chosen", FITTING)
def test_parts_hold_every_item_once(chosen):
    objective, inputs = build(chosen), batch(chosen[1])
    for count in (1, 2, 3, 4):
        parts = objective.parts(inputs, count)
        assert len(parts) <= count and sum(map(len, parts)) == 8
        if objective.views == 2:
            assert all(torch.equal(part[len(part) // 2:].flatten(1).sum(dim=1), inputs[4:][(inputs[:4, None] == part[None, : len(part) // 2]).flatten(2).all(dim=2).any(dim=1)].flatten(1).sum(dim=1)) for part in parts)
        else:
            assert torch.equal(torch.cat(parts), inputs)


def of(*names):
    return pytest.mark.parametrize("chosen", [param for param in FITTING if param.values[0][3] in names])


@of("causal_lm")
def test_a_token_to_come_tells_nothing(chosen):
    objective, inputs = build(chosen).eval(), batch("text")
    later = torch.cat([inputs[:, :20], inputs[:, 20:].flip(1)], dim=1)
    torch.testing.assert_close(objective.logits(inputs)[:, :20], objective.logits(later)[:, :20])
    if objective.directions == 2:  # the half that reads backwards sees nothing earlier
        earlier = torch.cat([inputs[:, :20].flip(1), inputs[:, 20:]], dim=1)
        back = [objective.backbone.encode(tokens).chunk(2, dim=-1)[1][:, 20:] for tokens in (inputs, earlier)]
        torch.testing.assert_close(*back)


@of("causal_lm")
def test_padding_is_no_target_and_changes_nothing(chosen):
    objective, inputs = build(chosen).eval(), batch("text")
    padded = torch.cat([inputs, torch.zeros(8, 9, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(objective(padded), objective(inputs), atol=1e-3, rtol=1e-5)


@of("masked_lm")
@pytest.mark.parametrize("masking", ["token", "word", "span"])
def test_a_hidden_token_tells_nothing(chosen, masking):
    objective, inputs = build(chosen, settings=dict(masking=masking, share=0.3)).eval(), batch("text")
    corrupted, asked = objective.corrupt(inputs)
    hidden = asked & (corrupted == 1)
    assert 0.1 < hidden.float().mean() < 0.4 and torch.equal(corrupted[~asked], inputs[~asked])
    other = inputs.masked_fill(hidden, 8)  # 8 begins no word or begins one: whole words are drawn anew
    if masking != "word":
        assert torch.equal(objective.corrupt(other)[0], corrupted)
        torch.testing.assert_close(objective.scores(corrupted, asked), objective.scores(*objective.corrupt(other)))
    original, shown, filled = objective.reconstruct(inputs)
    assert torch.equal(shown, corrupted) and torch.equal(filled[~asked], original[~asked])


@of("masked_image")
def test_a_hidden_pixel_tells_nothing(chosen):
    objective, inputs = build(chosen).eval(), batch("image")
    original, shown, painted = objective.reconstruct(inputs)
    hidden = (shown == 0) & (original != 0)
    assert 0.3 < hidden.float().mean() < 0.9 and torch.equal(painted[~hidden], original[~hidden])
    assert torch.equal(objective.predict(inputs + 9 * hidden)[0], objective.predict(inputs)[0])
    assert not torch.equal(objective.predict(inputs + 9 * ~hidden)[0], objective.predict(inputs)[0])


@of("masked_frames")
def test_a_hidden_frame_tells_nothing(chosen):
    objective, inputs = build(chosen).eval(), batch("audio")
    original, shown, filled = objective.reconstruct(inputs)
    hidden = shown[:, :1] == 0
    assert 0.05 < hidden.float().mean() < 0.4 and torch.equal(filled[:, 0][~hidden[:, 0]], original[:, 0][~hidden[:, 0]])
    other = add_deltas(torch.where(hidden, torch.randn(hidden.shape), inputs[:, :1]))
    torch.testing.assert_close(objective.corrupt(other)[0], shown)


@of("autoregressive")
def test_a_frame_to_come_tells_nothing(chosen):
    objective, inputs = build(chosen).eval(), batch("audio")
    for frame in (10, 30):
        later = add_deltas(torch.cat([inputs[:, :1, :frame], torch.randn(8, 1, 51 - frame, 40)], dim=2))
        seen = frame - objective.shift + 1  # predictions of frames up to `frame`
        torch.testing.assert_close(objective.predict(inputs)[0][:, :seen], objective.predict(later)[0][:, :seen])
        assert not torch.allclose(objective.predict(inputs)[0][:, seen:], objective.predict(later)[0][:, seen:])
    if objective.directions == 2:
        earlier = add_deltas(torch.cat([torch.randn(8, 1, 20, 40), inputs[:, :1, 20:]], dim=2))
        torch.testing.assert_close(objective.predict(inputs)[1][:, 19:], objective.predict(earlier)[1][:, 19:])


@of("denoise")
def test_a_hole_tells_nothing(chosen):
    objective, inputs = build(chosen).eval(), batch(chosen[1])
    spoilt, holes = objective.corrupt(inputs)
    original, shown, cleaned = objective.reconstruct(inputs)
    assert torch.equal(shown, spoilt) and cleaned.shape == inputs.shape and 0.1 < holes.float().mean() < 0.6
    other = torch.where(holes[:, :1], torch.randn(holes[:, :1].shape), inputs[:, :1])
    torch.testing.assert_close(objective.corrupt(add_deltas(other) if chosen[1] == "audio" else other)[0], spoilt)


def test_silence_at_the_end_is_not_asked_for():
    inputs = batch("audio", n=64)
    inputs[:32, :, 30:] = add_deltas(torch.full((32, 1, 51, 40), -2.0))[:, :, 30:]
    for chosen in [param.values[0] for param in FITTING if param.values[0][3] in ("masked_frames", "autoregressive", "denoise") and param.values[0][1] == "audio"]:
        count = build(chosen).eval()(inputs)[:, 1]
        assert count[:32].mean() < 0.75 * count[32:].mean()


def test_contrastive_loss_is_that_of_the_paper():
    objective = build(("cnn", "image", dict(base=8), "contrastive")).eval()
    inputs = batch("image")
    points = F.normalize(objective.projection(objective.backbone(inputs)), dim=1).double()
    for i in range(8):
        alike = {k: math.exp((points[i] @ points[k]).item() / objective.temperature) for k in range(8) if k != i}
        assert objective(inputs)[i, 0].item() == pytest.approx(-math.log(alike[(i + 4) % 8] / sum(alike.values())), abs=1e-4)


def test_causal_loss_is_the_cross_entropy_of_the_text(prepared):
    objective = build(("transformer", "text", dict(name="decoder", width=32, depth=2), "causal_lm")).eval()
    loader = make_stream(prepared["text"], "valid", 64, context=32, training=False)
    with torch.no_grad():
        outputs = torch.cat([objective(inputs) for inputs, _ in loader])
        windows = torch.cat([inputs for inputs, _ in loader])
        expected = F.cross_entropy(objective.logits(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten(), ignore_index=0)
    assert outputs[:, 1].sum() == len(loader.dataset.stream) - 1
    torch.testing.assert_close(objective.loss(outputs), expected)


def test_whole_words_share_a_fate(prepared):
    tokenizer = Tokenizer.from_file(str(prepared["text"].folder / "tokenizer.json"))
    starts = torch.from_numpy(word_starts(tokenizer))
    objective = make_objective(build_backbone("cnn", SPECS["text"]), "cnn", "text", "masked_lm", dict(masking="word"), 1, starts).eval()
    windows = make_stream(prepared["text"], "valid", 64, context=63, training=False).one_batch()[0]
    asked = objective.corrupt(windows)[1]
    inside = ~starts[windows[:, 1:]] & (windows[:, 1:] > 0)
    assert inside.any() and torch.equal(asked[:, 1:][inside], asked[:, :-1][inside]) and 0.1 < asked[windows > 0].float().mean() < 0.2


@pytest.mark.parametrize("family,modality,sizes,name,message", [
    ("transformer", "text", dict(name="encoder"), "causal_lm", "needs a causal backbone"),
    ("cnn", "text", {}, "causal_lm", "needs a causal backbone"),
    ("transformer", "text", dict(name="decoder"), "masked_lm", "needs a backbone that sees both sides"),
    ("rnn", "text", dict(directions=1), "masked_lm", "needs a backbone that sees both sides"),
    ("transformer", "audio", dict(name="frames", causal=True), "masked_frames", "needs a backbone that sees both sides"),
    ("transformer", "audio", dict(name="frames"), "autoregressive", "needs a causal backbone"),
    ("cnn", "audio", {}, "masked_frames", "needs a backbone that reads a frame a step"),
    ("transformer", "image", dict(name="conv_stem"), "masked_image", "needs a backbone that can leave out what is hidden"),
    ("transformer", "image", dict(name="vit"), "denoise", "needs a backbone that makes a map"),
    ("cnn", "text", {}, "contrastive", "is for image and audio data, not for text; take one of causal_lm, masked_lm"),
    ("cnn", "image", {}, "contrast", "Did you mean 'contrastive'"),
])
def test_what_does_not_go_together_is_refused(family, modality, sizes, name, message):
    with pytest.raises(ConfigError, match=message):
        make_objective(build_backbone(family, SPECS[modality], sizes), family, modality, name, mask_token=1)
