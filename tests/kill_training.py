"""Pretrain, kill it with SIGKILL at random moments, go on until it is done, and compare with a training that was left alone.

    python tests/kill_training.py FOLDER KILLS FAMILY SEED

prints a line of JSON: whether the weights are the same to the last bit, what the trainings were doing when they were killed, and the
files that are left. The process that imports and prepares all forks one child for each attempt.
"""
import json
import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import fmnb.train.checkpoint as checkpoint
import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from fmnb.data.prepare import Preprocessing, prepare
from fmnb.data.source import load_items
from fmnb.data.split import split_items
from fmnb.data.stream import make_stream
from fmnb.model.head import build_backbone
from fmnb.train.learner import make_learner
from fmnb.train.objective import make_objective
from fmnb.train.pretrain import PretrainSettings, pretrain, pretrain_history
from safetensors.torch import load_file, save_file

PHASES = ("setting out", "training", "validating", "writing a checkpoint")
phase = mmap.mmap(-1, 1)  # shared with the children
CASES = {  # backbone, objective, optimizer
    "transformer": (dict(name="vit", patch=2, dim=32, depth=2, heads=2, dropout=0.1), "masked_image", "muon"),
    "cnn": (dict(name="residual"), "denoise", "adamw"),
    "rnn": (dict(name="lstm", width=32, hidden=32, directions=1), "causal_lm", "muon"),
}


class Watch(Callback):
    """Say what the training is doing."""
    order = -20

    def before_train(self):
        phase[0] = 1

    def before_validate(self):
        phase[0] = 2


def watched_write(tree, file, write=checkpoint.write_checkpoint):
    before, phase[0] = phase[0], 3
    write(tree, file)
    phase[0] = before


checkpoint.write_checkpoint = watched_write


def data(family):
    if family == "rnn":
        return prepare(split_items(load_items(pd.DataFrame({"text": list(topics.values())})).head(60)), Preprocessing(tokenizer="char"))
    return prepare(split_items(load_items("digits")))


def train(prepared, family, steps, folder, result):
    """One attempt: begin, or go on."""
    set_seed(0)
    backbone, objective, optimizer = CASES[family]
    context = dict(context=24) if family == "rnn" else {}
    streams = [make_stream(prepared, split, 16, training=split == "train", seed=3, **context) for split in ("train", "valid")]
    modality = "text" if family == "rnn" else "image"
    model = make_objective(build_backbone(family, prepared.input_spec, backbone), family, modality, objective, mask_token=prepared.preprocessing.get("mask_token"))
    learn = make_learner(DataLoaders(*streams, device="cpu"), model, callbacks=[Watch()])
    settings = PretrainSettings(steps=steps, learning_rate=3e-3, optimizer=optimizer, accumulate=2, average=0.1, round_steps=23, precision="float32", checkpoint_steps=7)
    begin = time.perf_counter()
    pretrain(learn, settings, folder, save=lambda learn: save_file({name: tensor.contiguous() for name, tensor in learn.model.state_dict().items()}, result))
    columns = pretrain_history(learn).drop(columns="seconds")
    Path(f"{result}.json").write_text(json.dumps({"history": columns.to_dict("list"), "seconds": time.perf_counter() - begin}))


def attempt(delay, *arguments):
    """Fork a child and kill it after `delay` seconds of training, never if negative: what it was doing, or '' if it came to its end."""
    phase[0] = 0
    if not (child := os.fork()):
        try:
            train(*arguments)
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    if delay >= 0:
        early = random.random() < 0.1  # before it trains
        while not (early or phase[0]):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.2) if early else delay)
        doing = PHASES[phase[0]]
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return doing
    assert status == 0, "the training failed"
    return ""


def main(folder, kills, family, seed):
    random.seed(seed)
    torch.set_num_threads(1)
    warm = torch.nn.Linear(1, 1)
    warm(torch.ones(1, 1)).sum().backward()
    torch.optim.AdamW(warm.parameters()).step()  # imports a great deal, which the children need not do again
    prepared, folder, steps = data(family), Path(folder), 60 + 15 * kills
    attempt(-1, prepared, family, steps, folder / "alone", folder / "alone.safetensors")
    alone = json.loads((folder / "alone.safetensors.json").read_text())
    done, leftovers = [], 0
    while True:
        delay = random.uniform(0, 1.2 * alone["seconds"] / kills) if len(done) < kills else -1
        doing = attempt(delay, prepared, family, steps, folder / "killed", folder / "killed.safetensors")
        if not doing:
            break
        done.append(doing)
        leftovers += len([name for name in os.listdir(folder / "killed") if name.startswith(".")]) if (folder / "killed").exists() else 0
    first, second = (load_file(folder / f"{name}.safetensors") for name in ("alone", "killed"))
    same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    histories = [json.loads((folder / f"{name}.safetensors.json").read_text())["history"] for name in ("alone", "killed")]
    print(json.dumps(dict(kills=len(done), same_weights=same, same_history=histories[0] == histories[1], during={name: done.count(name) for name in PHASES},
                          temporaries_on_the_way=leftovers, left=os.listdir(folder / "killed"), seconds=alone["seconds"], steps=steps)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
