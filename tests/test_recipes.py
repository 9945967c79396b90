"""Every backbone under every recipe and with every head: what is frozen, what is merged, what is saved, and what goes on after Ctrl-C."""
import json
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.torch_core import set_seed
from fastcore.basics import noop
from fmnb.config import RECIPES, make_config
from fmnb.core import ConfigError, DataError, RunError
from fmnb.data.load import BatchLoader, make_dataloaders
from fmnb.data.prepare import prepare
from fmnb.data.source import load_items
from fmnb.data.split import split_items
from fmnb.model.adapter import is_lora
from fmnb.model.head import build_model
from fmnb.model.output import HEADS
from fmnb.model.pool import POOLS
from fmnb.model.store import load_model, save_model
from fmnb.train import features
from fmnb.train.callback import learner_history
from fmnb.train.checkpoint import CHECKPOINT, read_checkpoint
from fmnb.train.finetune import measure_defaults, train
from fmnb.train.learner import epochs_within, make_learner, range_test
from fmnb.train.optimizer import hidden_matrices
from fmnb.train.recipe import EXTERNAL_RATES, RECIPE_FUNCTIONS, parse_recipe, rate_range
from fmnb.train.loop import DivergenceError
from test_contracts import BODIES, SIZES, sizes, spec

HEADS_AND_POOLS = [dict(name=head, pool=pool) for head, pool in zip(cycle(HEADS), POOLS)] + [dict(adapters=4), dict(pool="attention", adapters=4)]
IMAGE, SOUND, TEXT = ("cnn", "image", "residual"), ("rnn", "audio", "frames"), ("transformer", "text", "encoder")


class Rows:
    """Random items of a modality, as a dataset of `BatchLoader`."""
    weights = None

    def __init__(self, modality, n_items, problem_type="single_label", columns=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.positions, self.prepared = np.arange(n_items), SimpleNamespace(fingerprint=f"{modality} {problem_type} {columns} {seed}")
        shape = (n_items, *SIZES.get(modality, ()))
        inputs = torch.randint(2, 50, (n_items, 12), generator=generator) if modality == "text" else torch.randn(shape, generator=generator)
        classes = torch.arange(n_items) % 2
        if modality == "text":
            inputs[:, 0], inputs[::3, 9:] = 5 + classes, 0
        else:
            inputs += classes.float().view(-1, *[1] * (inputs.ndim - 1))
        beside = (torch.randn(n_items, 2, generator=generator), torch.randint(3, (n_items, 1), generator=generator)) if columns else ()
        targets = {"single_label": classes, "multi_label": torch.stack([classes, 1 - classes], dim=1).float(), "regression": 10.0 + classes}[problem_type]
        self.tensors = (inputs, *beside, targets)

    def __len__(self):
        return len(self.positions)

    def fetch(self, rows):
        return tuple(tensor[torch.as_tensor(np.asarray(rows))] for tensor in self.tensors)


def jitter(batch):
    """An augmentation."""
    return (batch[0] + 0.05 * torch.randn_like(batch[0]), *batch[1:]) if batch[0].is_floating_point() else batch


def learner(body=IMAGE, head=None, n_items=16, callbacks=(), problem_type="single_label", columns=False, **settings):
    """Batches of eight, made in the same way each time."""
    family, modality, name = body
    set_seed(0)
    input_spec = spec(modality) | ({"columns": dict(n_numbers=2, category_sizes=[3])} if columns else {})
    model = build_model(family, input_spec, list("ab"), dict(target=dict(mean=10.5, std=0.5)), sizes(family, name), head, problem_type)
    datasets = [Rows(modality, n, problem_type, columns, seed) for seed, n in enumerate((n_items, 8))]
    train_loader = BatchLoader(datasets[0], bs=8, indexed=True, shuffle=True, drop_last=True, after_batch=jitter, device=torch.device("cpu"))
    valid_loader = BatchLoader(datasets[1], bs=8, indexed=True, after_batch=noop, device=torch.device("cpu"))
    return make_learner(DataLoaders(train_loader, valid_loader, device="cpu"), model, callbacks=callbacks, **settings)


def config(recipe, epochs=1, rate=3e-3, **values):
    """float32, so that what is compared to 1e-5 can be; a large weight decay, so that nothing frozen escapes notice."""
    return make_config({"recipe": f"{recipe}, precision=float32, weight_decay=0.5, keep=last, checkpoint_minutes=0", "epochs": epochs, "learning_rate": rate} | values)


def in_bytes(tensors):
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


class Watch(Callback):
    """What is frozen does not move by one bit; the layer groups cover all parameters once; what LoRA says before it is merged."""
    order = 200

    def still(self):
        model = self.learn.model
        owners = {id(buffer): module for module in model.modules() for buffer in module.buffers(recurse=False)}
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        for name, buffer in model.named_buffers():
            own = list(owners[id(buffer)].parameters())
            if own and not any(p.requires_grad for p in own):
                frozen[name] = buffer
        return in_bytes(frozen)

    def before_train(self):
        self.before = self.still()
        grouped = [id(p) for group in self.learn.model.layer_groups() for module in group for p in module.parameters()]
        assert sorted(grouped) == sorted(id(p) for p in self.learn.model.parameters())

    def after_train(self):
        assert self.still() == self.before

    def after_fit(self):
        if hasattr(self, "inputs"):
            self.answers = self.learn.model.eval()(*self.inputs).detach()


def write_tokenizer(path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    Tokenizer(WordLevel({f"word{number}": number for number in range(50)}, unk_token="word1")).save(str(path))
    return path


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family,modality,name", BODIES)
def test_contract_of_recipes(family, modality, name, recipe, tmp_path):
    """Each backbone under each recipe, with one head after the other."""
    number = BODIES.index((family, modality, name)) + RECIPES.index(recipe)
    check_recipe((family, modality, name), recipe, HEADS_AND_POOLS[number % len(HEADS_AND_POOLS)], tmp_path)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("head", HEADS_AND_POOLS, ids=str)
@pytest.mark.parametrize("body", [IMAGE, SOUND, TEXT], ids=str)
def test_contract_of_heads(body, head, recipe, tmp_path):
    """Each head under each recipe, on one backbone a family."""
    check_recipe(body, recipe, head, tmp_path)


def check_recipe(body, recipe, head, folder):
    watch = Watch()
    learn = learner(body, head, callbacks=[watch])
    watch.inputs, model = learn.dls.valid.one_batch()[:-1], learn.model
    if recipe == "head_only" and not features.cannot_cache(learn):
        del watch.inputs
    before, names = in_bytes(model.state_dict()), list(model.state_dict())
    train(learn, config(recipe, epochs=2 if recipe == "gradual" else 1))
    after = in_bytes(model.state_dict())
    assert learn.model is model and not is_lora(model) and sorted(model.state_dict()) == sorted(names)
    assert after["head.linear.weight"] != before["head.linear.weight"]
    if recipe == "head_only":
        assert [key for key in names if key.startswith("backbone.") and ".adapters." not in key and after[key] != before[key]] == []
    elif recipe != "lora":
        assert any(after[key] != before[key] for key in names if key.startswith("backbone."))
    inputs = learn.dls.valid.one_batch()[:-1]
    answers = model.eval()(*inputs).detach()
    if recipe == "lora":
        torch.testing.assert_close(answers, watch.answers, atol=1e-5, rtol=1e-4)
        assert any(after[key] != before[key] for key in names if key.startswith("backbone."))
    save_model(model, folder, write_tokenizer(folder / "words.json") if body[1] == "text" else None)
    assert load_model(folder)(*inputs).detach().numpy().tobytes() == answers.numpy().tobytes()


class CtrlC(Callback):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch):
        self.at = epoch

    def before_batch(self):
        if self.training and len(self.learn.state.rounds) + 1 == self.at and self.iter == 1:
            raise KeyboardInterrupt


def same(first, second):
    return in_bytes(first.model.state_dict()) == in_bytes(second.model.state_dict())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("body", [IMAGE, SOUND, TEXT], ids=str)
def test_interrupted_and_resumed(body, recipe, tmp_path):
    """In the first epoch, in the middle, right after a stage, twice; by a new learner and by the one that was interrupted: the same weights and history."""
    head, settings = dict(dropout=0.2), config(recipe, epochs=5, seed=3)
    whole = train(learner(body, head), settings)
    for epochs in ((1,), (2, 4), (3, 3)):
        for epoch in epochs:
            interrupted = learner(body, head, callbacks=[CtrlC(epoch)])
            with pytest.raises(KeyboardInterrupt):
                train(interrupted, settings, folder=tmp_path)
            assert len(read_checkpoint(tmp_path / CHECKPOINT)["state"]["rounds"]) == epoch - 1
            assert not is_lora(interrupted.model) and interrupted.first_epoch == 0
        interrupted.remove_cb(CtrlC)
        resumed = train(interrupted if epochs == (3, 3) else learner(body, head), settings, folder=tmp_path)
        assert same(resumed, whole) and list(tmp_path.iterdir()) == []
        pd.testing.assert_frame_equal(learner_history(resumed).drop(columns="seconds"), learner_history(whole).drop(columns="seconds"), check_exact=True)
        assert resumed.notes[-1] == f"The training was interrupted, and went on after epoch {epochs[-1] - 1}." or "weights are those of epoch" in resumed.notes[-1]


@pytest.mark.parametrize("text", ["full, precision=bfloat16", "full, precision=float16", "scratch, precision=float32, average=0, accumulate=2, clip=0.1", "gradual, precision=float32, patience=1, keep=last",
                                  "full, precision=float32, layer_decay=0.5, warm_up=0.5", "scratch, precision=float32, optimizer=muon", "full, precision=float32, optimizer=muon"])
def test_each_setting_resumes_exactly(text, tmp_path):
    settings = make_config({"recipe": f"{text}, checkpoint_minutes=0", "epochs": 4, "learning_rate": 3e-3})
    interrupted = learner(callbacks=[CtrlC(3)])
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, settings, folder=tmp_path)
    assert same(train(learner(), settings, folder=tmp_path), train(learner(), settings))


def test_an_interruption_during_validation(tmp_path):
    """The averaged model stands in the place of the own one then."""
    class Validating(Callback):
        def before_validate(self):
            if len(self.learn.state.rounds) == 2:
                raise KeyboardInterrupt
    learn = learner(callbacks=[Validating()])
    model = learn.model
    with pytest.raises(KeyboardInterrupt):
        train(learn, config("full", 4), folder=tmp_path)
    learn.remove_cb(Validating)
    assert learn.model is model
    assert same(train(learn, config("full", 4), folder=tmp_path), train(learner(), config("full", 4)))


def test_measured_values_come_from_the_checkpoint(tmp_path):
    """Measured again they might differ, and the training could not go on."""
    given = make_config({"recipe": "gradual", "epochs": 40, "budget": 0.002})
    measured, found = measure_defaults(learner(), given, "image", tmp_path)
    assert measured.epochs < 40 and measured.learning_rate == float(f"{found.learning_rate:.4g}") and parse_recipe(measured.recipe).precision
    learn = learner(callbacks=[CtrlC(2 if measured.epochs > 1 else 1)])
    with pytest.raises(KeyboardInterrupt):
        train(learn, measured, folder=tmp_path)
    again, curve = measure_defaults(learner(), given, "image", tmp_path)
    assert again == measured and curve.learning_rate == found.learning_rate and curve.curve.equals(found.curve)
    with pytest.raises(RunError, match="is of another training: seed is 0 there and 1 here"):
        train(learner(), make_config(measured.to_dict() | {"seed": 1}), folder=tmp_path)
    with pytest.raises(RunError, match="data_fingerprint is"):
        train(learner(columns=True), measured, folder=tmp_path)


@pytest.mark.parametrize(("body", "recipe", "optimizer"), [(("cnn", "image", "pooled"), "scratch", "FilterMuon"), (("cnn", "image", "pooled"), "full", "AdamW"), (IMAGE, "scratch", "AdamW"), (IMAGE, "full, optimizer=muon", "FilterMuon")])
def test_the_optimizer_is_chosen_and_written_down(body, recipe, optimizer):
    learn = learner(body)
    settings, found = measure_defaults(learn, config(recipe, rate=0.0), "image")
    chosen = parse_recipe(settings.recipe).optimizer
    assert chosen == ("muon" if optimizer == "FilterMuon" else "")
    assert rate_range(parse_recipe(recipe).name, *body[:2], body[2], chosen)[1:] == found.allowed
    parts = getattr(train(learn, settings).opt.opt, "parts", [learn.opt.opt])
    assert type(parts[0]).__name__ == optimizer
    group = parts[0].param_groups[0]
    assert (group["momentum"] if optimizer == "FilterMuon" else group["betas"][0]) == (0.95 if optimizer == "FilterMuon" else 0.9)  # as it was made; fastai's schedule would change it
    assert all(parameter.isfinite().all() for parameter in learn.model.parameters())


@pytest.mark.parametrize("body", [("cnn", "image", "timm"), ("cnn", "image", "torchvision"), ("transformer", "text", "hugging_face"), IMAGE, TEXT], ids="-".join)
def test_muon_has_work_in_every_backbone(body):
    """Also where the layer groups are lists of parameters."""
    model = learner(body).model
    hidden, groups = hidden_matrices(model), model.layer_groups()
    ends = {id(parameter) for group in (groups[0], groups[-1]) for module in group for parameter in module.parameters()}
    assert hidden and not hidden & ends and hidden <= {id(parameter) for parameter in model.parameters() if parameter.ndim > 1}


def test_other_settings_are_measured_anew(tmp_path):
    """What an interrupted training has measured is not put in the place of what is asked for now."""
    measured, _ = measure_defaults(learner(), config("full", 5, rate=0.0), "image", tmp_path)
    changed, found = measure_defaults(learner(), config("full", 7, rate=1e-4), "image", tmp_path)
    assert (changed.epochs, changed.learning_rate, found) == (7, 1e-4, None) and measured.epochs == 5


@pytest.mark.parametrize("recipe", ["full", "head_only"])
def test_a_budget_where_validation_takes_many_batches(recipe):
    learn = learner()
    learn.dls = DataLoaders(learn.dls.train, learn.dls.valid.new(bs=1), device="cpu")
    measured, _ = measure_defaults(learn, config(recipe, 30, budget=0.05), "image")
    assert 1 <= measured.epochs <= 30


@pytest.mark.parametrize("recipe", ["scratch", "head_only"])
def test_shortened_epochs(recipe, tmp_path):
    """A share of the batches in each epoch; interrupted or not; and the next training has whole ones again."""
    settings = config(f"{recipe}, share=0.5", epochs=4, seed=3)
    whole = train(learner(n_items=64), settings)
    assert whole.state.step == 4 * 4 and "Each epoch took 50% of the training batches, other ones each time." in whole.notes
    with pytest.raises(KeyboardInterrupt):
        train(learner(n_items=64, callbacks=[CtrlC(3)]), settings, folder=tmp_path)
    assert same(whole, train(learner(n_items=64), settings, folder=tmp_path))
    assert train(whole, config(recipe, epochs=2)).state.step == 2 * 8


@pytest.mark.parametrize("validation, minutes, whole, expected", [
    (0, 1e-4, False, (1, 0.1)), (0, 0.5, False, (1, 0.5)), (0, 1, False, (1, 1.0)), (0, 1.5, False, (2, 0.75)), (0, 4.9, False, (5, 0.98)), (0, 100, False, (40, 1.0)),
    (30, 1.6, False, (1, 1.0)),  # a second validation would cost more than the second epoch brings
    (30, 0.75, False, (1, 0.25)), (0, 4.9, True, (4, 1.0)), (0, 0.5, True, (1, 1.0)),
])
def test_epochs_fill_the_minutes(validation, minutes, whole, expected, monkeypatch):
    """Ten steps of six seconds an epoch."""
    monkeypatch.setattr("fmnb.train.learner.step_seconds", lambda learn: (6.0, float(validation)))
    n_epochs, share = epochs_within(learner(n_items=80), minutes, 40, whole)
    assert n_epochs == expected[0] and share == pytest.approx(expected[1])


class Lucky(Callback):
    """A loss that is next to nothing in the first step, or no number at all."""
    order = 5

    def __init__(self, first):
        self.first = first

    def after_loss(self):
        if self.training and (self.train_iter == 0 or np.isnan(self.first)):
            self.learn.loss_grad = self.learn.loss_grad * self.first
            self.learn.loss = self.learn.loss_grad.detach().clone()


@pytest.mark.parametrize("first", [1e-6, float("nan")])
def test_a_range_test_survives_its_first_steps(first, monkeypatch):
    """fastai's rule ends where the loss is four times its smallest; here that is in the second step, or there is no loss."""
    made = make_learner
    monkeypatch.setattr("fmnb.train.learner.make_learner", lambda *values, **more: made(*values, callbacks=[Lucky(first)], **more))
    found = range_test(learner(n_items=64), (1e-3, 1e-2), steps=30)
    assert len(found.curve) == 30 and 1e-3 <= found.learning_rate <= 1e-2
    assert ("suggests nothing" in found.explain()) == bool(np.isnan(first))


def test_a_loader_that_cannot_shorten_an_epoch():
    learn = learner()
    learn.dls = DataLoaders(DataLoader(learn.dls.train.dataset, bs=8), learn.dls.valid)
    with pytest.raises(ConfigError, match="cannot shorten an epoch; leave the recipe's share at 1"):
        train(learn, config("scratch, share=0.5"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_measuring_changes_nothing(recipe):
    """Neither weights nor random numbers, and nothing that was put in for the measurement stays."""
    learn, fresh = learner(TEXT), learner(TEXT)
    given = make_config({"recipe": f"{recipe}, precision=float32", "epochs": 3, "family": "transformer", "budget": 10.0})
    measured, found = measure_defaults(learn, given, "text")
    assert found.curve["loss"].notna().all() and measured.epochs == 3 and same(learn, fresh) and learn.notes == []
    assert same(train(learn, measured), train(learner(TEXT), measured))


class Spoil(Callback):
    """Make the inputs of some epochs, or of a single step, no numbers."""

    def __init__(self, epoch, step=None):
        self.at, self.step = epoch, step

    def before_batch(self):
        if self.training and len(self.learn.state.rounds) + 1 >= self.at and self.step in (None, self.iter):
            self.learn.xb = (torch.full_like(self.learn.xb[0], torch.nan), *self.learn.xb[1:])


def test_inputs_that_are_no_numbers():
    with pytest.raises(DataError, match="The inputs of 5 steps in a row hold values that are no numbers; look at the items"):
        train(learner(callbacks=[Spoil(1)]), config("full", 5))
    learn = train(learner(callbacks=[Spoil(1, step=1)]), config("full", 3))
    assert learner_history(learn).notna().all(axis=None) and learn.state.skipped == 3
    assert all(torch.isfinite(tensor).all() for tensor in learn.model.state_dict().values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_training_that_diverges(recipe, tmp_path):
    """The last good weights stay, and a note says at which rate and step it ended; without good weights it is an error."""
    class Explode(Callback):
        def __init__(self, epoch):
            self.at = epoch

        def after_loss(self):
            if self.training and len(self.learn.state.rounds) + 1 >= self.at:
                self.learn.loss_grad = self.learn.loss_grad * torch.nan
    learn = train(learner(n_items=64, callbacks=[Explode(3)]), config(recipe, 4), folder=tmp_path)
    assert any("in 5 steps in a row, the last in epoch 3, step 5; set a learning_rate below" in note for note in learn.notes)
    assert learn.notes[-1].startswith("The weights are those of epoch 2, the last of 2") and not is_lora(learn.model) and list(tmp_path.iterdir()) == []
    assert all(torch.isfinite(tensor).all() for tensor in learn.model.state_dict().values())
    with learn.no_bar(), learn.no_logging():
        assert learn.validate()[0] == pytest.approx(learner_history(learn)["valid_loss"].iloc[1], rel=1e-5)
    with pytest.raises(DivergenceError, match="the last in epoch 1, step 5"):
        train(learner(n_items=64, callbacks=[Explode(1)]), config(recipe, 4), folder=tmp_path)
    with pytest.raises(RunError, match="epoch 1, step .*; set a learning_rate below"):
        train(learner(TEXT, n_items=400), config(recipe, 2, rate=10.0), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("problem_type", ["multi_label", "regression"])
def test_other_problems_than_one_label(problem_type, recipe):
    history = learner_history(train(learner(n_items=64, problem_type=problem_type), config(recipe, 12, rate=1e-2)))
    assert "accuracy" not in history and history["metric"].iloc[-1] > (0.8 if recipe != "head_only" else 0.4)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("body", [IMAGE, TEXT], ids=str)
def test_cached_features_train_the_same_head(body, columns, monkeypatch):
    """As behind the frozen backbone, without augmentation; the second time from the file, which is made again where it is damaged."""
    def trained():
        learn = learner(body, columns=columns)
        learn.dls.train.after_batch = noop
        return train(learn, config("head_only", 3))
    first, written = trained(), []
    monkeypatch.setattr(features, "compute_features", lambda *_: written.append(1))
    assert same(trained(), first) and not written
    monkeypatch.undo()
    monkeypatch.setattr(features, "cannot_cache", lambda learn: "of a test")
    monkeypatch.setattr("fmnb.train.finetune.cannot_cache", lambda learn: "of a test")
    behind = trained()
    assert "since of a test." in behind.notes[0]
    for name, tensor in behind.model.state_dict().items():
        torch.testing.assert_close(tensor, first.model.state_dict()[name], atol=2e-4, rtol=1e-3)


def test_a_cache_that_cannot_be_used(monkeypatch, tmp_path):
    """Damaged, the features are computed again; on a full disk they are not kept."""
    monkeypatch.setenv("FMNB_CACHE", str(tmp_path))
    first = train(learner(), config("head_only", 2))
    file, = (tmp_path / "features").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert same(train(learner(), config("head_only", 2)), first)
    file.unlink()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("fmnb.model.weights.save_file", full)
    learn = train(learner(), config("head_only", 2))
    assert same(learn, first) and any("not kept for another time" in note and "no space left" in note for note in learn.notes)


def test_balanced_classes_are_drawn_from_features_too():
    learn = learner()
    learn.dls.train.dataset.weights = np.where(np.arange(16) == 5, 1.0, 0.0)
    tail = features.feature_learner(learn)
    batch, expected = next(iter(tail.dls.train)), features.compute_features(learn, learn.dls.train.dataset)
    assert torch.equal(batch[0], expected[0][5].expand(8, -1))


def test_memory_errors_halve_the_batch_in_a_recipe():
    learn = learner(IMAGE)

    def scarce(module, inputs, outputs):
        if len(inputs[0]) > 4:
            raise torch.OutOfMemoryError("out of memory")
    learn.model.register_forward_hook(scarce)
    train(learn, config("full", 2))
    assert any("from step 1 on, at most 4 are computed at once" in note for note in learn.notes)


def test_registry_of_recipes():
    assert set(RECIPE_FUNCTIONS) == set(RECIPES) == set(EXTERNAL_RATES)
    assert json.loads(json.dumps(parse_recipe("lora, rank=4").__dict__))["rank"] == 4


def test_a_training_without_a_good_step_says_so():
    """Also one so short that it ends before the steps are too many."""
    prepared = prepare(split_items(load_items("digits")))
    model = build_model("cnn", prepared.input_spec, prepared.classes, prepared.preprocessing, {"base": 4})
    with torch.no_grad():
        next(model.head.parameters()).fill_(float("nan"))
    config = make_config({"recipe": "scratch, precision=float32", "epochs": 1, "batch_size": 400, "learning_rate": 1e-3, "family": "cnn"})
    with pytest.raises(DivergenceError, match="No step gave a loss that is a number"):
        train(make_learner(make_dataloaders(prepared, 400), model), config)
