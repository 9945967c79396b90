"""Training that lasts: killed and resumed, out of memory, out of disk, out of numbers; and files that do not fit."""
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from fmnb.core import ConfigError, DataError, RunError
from fmnb.data.prepare import Preprocessing, prepare
from fmnb.data.source import load_items
from fmnb.data.split import split_items
from fmnb.data.stream import make_stream
from fmnb.model.head import build_backbone
from fmnb.train.checkpoint import CHECKPOINT, read_checkpoint
from fmnb.train.learner import make_learner
from fmnb.train.loop import DivergenceError
from fmnb.train.objective import make_objective
from fmnb.train.optimizer import OPTIMIZERS, SCHEDULES, schedule_factor
from fmnb.train.pretrain import PRETRAINING, PretrainSettings, choose_pretraining, pretrain, pretrain_history
from safetensors.torch import save_file

SETTINGS = PretrainSettings(steps=24, optimizer="adamw", learning_rate=3e-3, round_steps=8, precision="float32", checkpoint_steps=5)
KILLS = int(os.environ.get("FMNB_KILLS", 4))


@pytest.fixture(scope="module")
def digits():
    return prepare(split_items(load_items("digits")))


@pytest.fixture(scope="module")
def texts():
    rng, words = np.random.default_rng(0), "wave salt ship gull tide sand cloud wind star bird rain sun".split()
    return prepare(split_items(load_items(pd.DataFrame({"text": [" ".join(rng.choice(words, 20)) + f" {number}." for number in range(300)]}))), Preprocessing(tokenizer="char"))


def reader(texts, callbacks=(), batch_size=8, **sizes):
    """A learner that predicts characters."""
    set_seed(0)
    streams = [make_stream(texts, split, batch_size, context=24, training=split == "train") for split in ("train", "valid")]
    backbone = build_backbone("rnn", texts.input_spec, dict(name="lstm", width=24, hidden=24, directions=1, input_dropout=0.0, embedding_dropout=0.0) | sizes)
    return make_learner(DataLoaders(*streams, device="cpu"), make_objective(backbone, "rnn", "text", "causal_lm"), callbacks=callbacks)


def viewer(digits, objective="denoise", family="cnn", callbacks=()):
    """A learner of images with batch norm."""
    set_seed(0)
    views = 2 if objective == "contrastive" else 1
    streams = [make_stream(digits, split, 16, views=views, training=split == "train") for split in ("train", "valid")]
    model = make_objective(build_backbone(family, digits.input_spec), family, "image", objective)
    return make_learner(DataLoaders(*streams, device="cpu"), model, callbacks=callbacks)


def weights(learn):
    return torch.cat([tensor.detach().flatten().double() for tensor in learn.model.state_dict().values()])


class Inject(Callback):
    """Call `action(learn)` before the batches of some steps."""

    def __init__(self, steps, action):
        self.injected_steps, self.action = set(steps), action

    def before_batch(self):
        if self.training and self.learn.state.step + 1 in self.injected_steps:
            self.action(self.learn)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
@pytest.mark.parametrize("family", ["transformer", "cnn", "rnn"] if "FMNB_KILLS" in os.environ else ["transformer"])
def test_killed_at_any_moment_and_resumed(family, tmp_path):
    """SIGKILL at random moments: the weights and the history are those of the training that was left alone, and no file is left."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "kill_training.py", tmp_path, str(KILLS), family, "0"],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["same_weights"] and found["same_history"] and found["left"] == [], found
    assert found["kills"] >= KILLS // 2, found


def spoil(learn):
    learn.xb = (torch.full_like(learn.xb[0], torch.nan),)


def test_a_batch_of_no_numbers_is_left_out(digits):
    """Weights, averages and batch-norm statistics do not see it; the note names its items."""
    learn = viewer(digits, callbacks=[Inject([11], spoil)])
    ids = learn.dls.train.item_ids(10)
    pretrain(learn, SETTINGS)
    assert torch.isfinite(weights(learn)).all() and pretrain_history(learn).notna().all(axis=None)
    assert (learn.state.step, learn.state.skipped, learn.state.in_a_row) == (24, 1, 0)
    assert learn.notes == [f"Steps left out because the loss or the gradient was no number: 1, the first step 11, with the items {', '.join(ids[:3])}, ...."]


def test_batches_of_no_numbers_in_a_row_end_the_training(digits):
    learn = viewer(digits, callbacks=[Inject(range(12, 99), spoil)])
    ids = learn.dls.train.item_ids(15)
    with pytest.raises(DataError, match=f"The inputs of 5 steps in a row hold values that are no numbers, with the items {ids[0]}, .*; look at the items"):
        pretrain(learn, SETTINGS)


def test_losses_of_no_numbers_in_a_row_end_the_training(digits):
    learn = viewer(digits, callbacks=[Inject(range(12, 99), lambda learn: next(learn.model.parameters()).data.fill_(torch.nan))])
    ids = learn.dls.train.item_ids(15)
    with pytest.raises(DivergenceError, match=f"in 5 steps in a row, the last in epoch 2, step 8, with the items {ids[0]}, .*set a learning_rate below .* or look at these items"):
        pretrain(learn, SETTINGS)


def test_a_rate_that_is_far_too_high_ends_the_training(texts):
    with pytest.raises(RunError, match="set a learning_rate below"):
        pretrain(reader(texts, callbacks=[Inject(range(3, 99), lambda learn: learn.model.backbone.embedding.weight.data.fill_(torch.inf))]), SETTINGS)


def narrow(learn, most):
    """A model for which more than `most` items are too many, found out when half of its work is done."""
    def scarce(module, inputs, outputs):
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("out of memory")
    learn.model.register_forward_hook(scarce)
    return learn


def test_memory_errors_halve_the_batch_and_change_nothing_else(digits, texts):
    """What was halved equals what was accumulated from the start, random masks, dropout and batch norm included."""
    for make in (lambda: viewer(digits), lambda: viewer(digits, "masked_image", "cnn"), lambda: reader(texts, input_dropout=0.2, batch_size=16)):
        halved = pretrain(narrow(make(), 4), SETTINGS)
        parts = pretrain(make(), replace(SETTINGS, accumulate=4))
        assert halved.state.micro_batch == 4
        assert halved.notes == ["The memory did not suffice for 8 items at once: from step 1 on, at most 4 are computed at once, and a step is still made of the whole batch."]
        torch.testing.assert_close(weights(halved), weights(parts), atol=0, rtol=0)


def test_parts_of_a_batch_count_predictions_and_not_items(texts):
    """Windows of unequal length: the gradient in parts is that of the mean over all predictions."""
    def shorten(learn):
        inputs = learn.xb[0].clone()
        for row, length in enumerate((3, 25, 9, 2, 25, 25, 4, 17)):
            inputs[row, length:] = 0
        learn.xb = (inputs,)
    whole, parts = (pretrain(reader(texts, callbacks=[Inject(range(99), shorten)]), replace(SETTINGS, accumulate=count)) for count in (1, 4))
    torch.testing.assert_close(weights(whole), weights(parts), atol=2e-5, rtol=1e-4)
    columns = ["train_loss", "valid_loss"]
    pd.testing.assert_frame_equal(pretrain_history(whole)[columns], pretrain_history(parts)[columns], atol=1e-4)


def test_a_real_memory_error_of_the_cpu():
    """The allocator refuses: half of the batch at once does."""
    code = """
import resource, torch
from fastai.data.core import DataLoaders
from fmnb.train.learner import make_learner
torch.manual_seed(0)
class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__(); self.layer = torch.nn.Linear(4, 4)
    def forward(self, inputs):
        wide = self.layer(inputs).unsqueeze(-1).expand(-1, -1, 2_000_000).clone()  # 32 MB an item
        return torch.stack([wide.mean(dim=(1, 2)), inputs.new_ones(len(inputs))], dim=1)
    def loss(self, outputs, *ignored): return outputs[:, 0].sum() / outputs[:, 1].sum()
    def layer_groups(self): return [[self.layer]]
inputs = torch.randn(16, 4)
learn = make_learner(DataLoaders([(inputs, inputs[:, 0])], [(inputs[:1], inputs[:1, 0])], device="cpu"), Wide())
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000, resource.RLIM_INFINITY))
with learn.no_bar(), learn.no_logging():
    learn.fit(1, 1e-3)
print(learn.state.micro_batch, *learn.notes)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs Linux")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in ("2", "4", "8"), done.stdout
    assert "The memory did not suffice" in done.stdout


def test_what_cannot_be_computed_in_parts_says_so(digits):
    with pytest.raises(RunError, match="cannot be computed in parts; set batch_size to 8"):
        pretrain(narrow(viewer(digits, "contrastive"), 20), SETTINGS)
    with pytest.raises(ConfigError, match="set accumulate to 1"):
        pretrain(viewer(digits, "contrastive"), replace(SETTINGS, accumulate=2))
    with pytest.raises(RunError, match="for a single item"):
        pretrain(narrow(viewer(digits), 0), SETTINGS)


def test_full_disk(texts, tmp_path, monkeypatch):
    """The checkpoint before stays whole, the temporary goes, the training ends well and says what happened."""
    calls, kept = [], []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 1 or len(calls) > 3:
            return save_file(tensors, path, metadata)
        path.write_bytes(b"half a check")
        raise OSError(28, "No space left on device")

    class Look(Callback):
        order = 200

        def after_batch(self):
            if len(calls) == 3 and not kept:
                kept.append((read_checkpoint(tmp_path / CHECKPOINT)["state"]["step"], os.listdir(tmp_path)))

    monkeypatch.setattr("fmnb.model.weights.save_file", full)
    learn = pretrain(reader(texts, callbacks=[Look()]), SETTINGS, tmp_path)
    assert kept == [(0, [CHECKPOINT])] and os.listdir(tmp_path) == []
    assert len(learn.notes) == 1 and "could not be written (there is no space left)" in learn.notes[0] and "The one before was kept." in learn.notes[0]
    torch.testing.assert_close(weights(learn), weights(pretrain(reader(texts), SETTINGS)), atol=0, rtol=0)


def test_a_folder_that_cannot_be_written_to_is_known_at_once(texts, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="^[^\n]*run/checkpoint.safetensors could not be written"):
        pretrain(reader(texts), SETTINGS, tmp_path / "file" / "run")


def stopped(learn, folder, step=14, settings=SETTINGS):
    """A folder with the checkpoint of an interrupted training."""
    def stop(learn):
        raise KeyboardInterrupt
    learn.add_cb(Inject([step], stop))
    with pytest.raises(KeyboardInterrupt):
        pretrain(learn, settings, folder)
    return folder / CHECKPOINT


@pytest.mark.parametrize("other,message", [
    (lambda texts, digits: (reader(texts), replace(SETTINGS, learning_rate=1e-3)), "learning_rate is 0.003 there and 0.001 here"),
    (lambda texts, digits: (reader(texts), replace(SETTINGS, optimizer="muon")), "optimizer is adamw there and muon here"),
    (lambda texts, digits: (reader(texts, width=16), SETTINGS), r"embedding.weight is \[.*, 24\] there and \[.*, 16\] here"),
    (lambda texts, digits: (reader(texts, batch_size=4), SETTINGS), "batch is 8 there and 4 here"),
    (lambda texts, digits: (viewer(digits), SETTINGS), "name of objective is causal_lm there and denoise here"),
])
def test_a_checkpoint_of_another_training_is_refused(other, message, texts, digits, tmp_path):
    file = stopped(reader(texts), tmp_path)
    before = file.read_bytes()
    with pytest.raises(RunError, match=message):
        pretrain(*other(texts, digits), tmp_path)
    assert file.read_bytes() == before


@pytest.mark.parametrize("harm,message", [
    (lambda content: content[:-1], "is damaged"),
    (lambda content: content[: len(content) // 2], "is damaged"),
    (lambda content: content[:5], "is damaged"),
    (lambda content: b"", "is damaged"),
    (lambda content: content.replace(b'{\\"format\\": 1', b'{\\"format\\": 2', 1), "format 2 of a newer fmnb"),
])
def test_a_damaged_or_newer_checkpoint_is_refused(harm, message, texts, tmp_path):
    file = stopped(reader(texts), tmp_path)
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(RunError, match=message) as caught:
        pretrain(reader(texts), SETTINGS, tmp_path)
    assert CHECKPOINT in str(caught.value)


def test_checkpoints_hold_no_code(texts, tmp_path):
    content = stopped(reader(texts), tmp_path).read_bytes()
    assert b"pickle" not in content and b"ctorch" not in content and json.loads(content[8:8 + int.from_bytes(content[:8], "little")])


def test_an_interval_in_minutes(texts, tmp_path):
    """A few hundredths of a second, so several files are written; nothing else depends on the clock."""
    settings = replace(SETTINGS, checkpoint_steps=0, checkpoint_minutes=1e-4)
    stopped(reader(texts), tmp_path, settings=settings)
    assert 5 < read_checkpoint(tmp_path / CHECKPOINT)["state"]["step"] <= 13
    learn = pretrain(reader(texts), replace(SETTINGS, checkpoint_minutes=100.0), tmp_path)
    torch.testing.assert_close(weights(learn), weights(pretrain(reader(texts), SETTINGS)), atol=0, rtol=0)


def test_a_resumed_budget_in_minutes_has_the_same_number_of_steps(texts, tmp_path):
    settings = PretrainSettings(minutes=0.02, learning_rate=3e-3, precision="float32", checkpoint_steps=2)
    stopped(reader(texts), tmp_path, step=8, settings=settings)
    total = read_checkpoint(tmp_path / CHECKPOINT)["state"]["total"]
    learn = pretrain(reader(texts), settings, tmp_path)
    assert learn.state.step == learn.state.total == total > 8


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_each_precision_resumes_exactly(precision, digits, tmp_path):
    settings = replace(SETTINGS, precision=precision, steps=12, round_steps=4, checkpoint_steps=3)
    stopped(viewer(digits, "masked_image"), tmp_path, step=8, settings=settings)
    learn = pretrain(viewer(digits, "masked_image"), settings, tmp_path)
    torch.testing.assert_close(weights(learn), weights(pretrain(viewer(digits, "masked_image"), settings)), atol=0, rtol=0)
    assert learn.state.precision == precision and (learn.scaler is not None) == (precision == "float16")


def test_half_precision_finds_a_scale(digits):
    """A scale that is far too large is halved until the gradients are numbers; no step counts as bad for that."""
    learn = viewer(digits)
    learn.make_scaler = lambda: setattr(learn, "scaler", learn.scaler or torch.amp.GradScaler("cpu", init_scale=2.0**40))
    pretrain(learn, replace(SETTINGS, precision="float16", steps=6))
    assert learn.state.skipped == 0 and learn.scaler.get_scale() < 2.0**40


def test_probe_and_validation_change_nothing(texts):
    def probe(model):
        torch.rand(7), np.random.rand(3)
        assert not model.training
        return 1.0
    probed = pretrain(reader(texts, input_dropout=0.2), SETTINGS, probe=probe)
    assert pretrain_history(probed)["probe"].tolist() == [1.0] * 3
    torch.testing.assert_close(weights(probed), weights(pretrain(reader(texts, input_dropout=0.2), SETTINGS)), atol=0, rtol=0)


def test_the_last_round_may_be_short(texts):
    history = pretrain_history(pretrain(reader(texts), replace(SETTINGS, steps=20)))
    assert history["step"].tolist() == [8, 16, 20] and history["tokens"].tolist() == [8 * 24 * step for step in (8, 16, 20)]


def test_registries_and_schedules():
    assert set(OPTIMIZERS) == {"adamw", "muon"}
    for decay in SCHEDULES:
        factors = [schedule_factor(step, 50, 0.2, decay) for step in range(50)]
        assert 0 < min(factors) and max(factors) == 1 and factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    for family, modality in PRETRAINING:
        settings = choose_pretraining(family, modality, 10_000, 16)
        assert settings.steps and settings.batch_size and settings.learning_rate
    assert choose_pretraining("cnn", "image", 40).batch_size == 4


def test_muon_is_for_hidden_matrices(digits, texts):
    without = viewer(digits)
    without.model.backbone.requires_grad_(False)
    with pytest.raises(ConfigError, match="set optimizer to 'adamw'"):
        pretrain(without, replace(SETTINGS, optimizer="muon"))
    for learn, fall in ((reader(texts), 0.3), (viewer(digits), 0.1)):
        history = pretrain_history(pretrain(learn, replace(SETTINGS, optimizer="muon", learning_rate=2e-2)))
        assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0] - fall
