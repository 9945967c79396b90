"""Preparation at its limits: data larger than memory, a process that is killed, sound and columns from file to model."""
import io
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import soundfile
import timm
from fmnb.core import read_json
from fmnb.data.load import make_dataloaders
from fmnb.data.prepare import Preprocessing, open_prepared, prepare, prepared_images, prepared_tokens
from fmnb.data.source import keep_frame, load_items, open_items
from fmnb.data.split import split_items
from fmnb.run.execute import run

LIMITED = """
import resource, sys
import numpy, pandas, torch, tokenizers, pyarrow
from fmnb.data.prepare import Preprocessing, prepare
from fmnb.data.source import load_items
from fmnb.data.split import split_items
held = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[2]) * 2**20,) * 2)
items = split_items(load_items(sys.argv[1]))
prepared = prepare(items, Preprocessing(image_size=512))
print(sum(prepared.counts.values()), (prepared.folder / "items.arrow").stat().st_size)
"""


def limited(path, mebibytes):
    """Load, split and prepare in a process that may hold so much more than its imports."""
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path), str(mebibytes)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(number) for number in done.stdout.split()]


needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts what it should on Linux only")


@needs_proc
def test_images_of_ten_times_the_memory_pass(tmp_path):
    from PIL import Image
    picture = Image.fromarray(np.tile(np.arange(0, 256, dtype="uint8"), (512, 2))).convert("RGB")
    for number in range(900):
        (tmp_path / "images" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "images" / "ab"[number % 2] / f"{number}.bmp" if number < 2 else tmp_path / "images" / "ab"[number % 2] / f"{number}.png")
    count, size = limited(tmp_path / "images", 64)
    assert count == 900 and size > 10 * 64 * 2**20


@needs_proc
def test_texts_larger_than_the_memory_pass(tmp_path):
    """Tables above 64 MiB are read piece by piece; the tokenizer and its threads need memory of their own."""
    words = np.random.default_rng(0).choice([8 * word for word in ("river", "stone", "garden", "winter", "letter", "market", "orange")], (16, 1300))
    with open(tmp_path / "texts.csv", "w") as file:
        file.write("text,label\n")
        for number in range(3000):
            file.write(f"{number} {' '.join(words[number % 16])},{number % 2}\n")
    assert (tmp_path / "texts.csv").stat().st_size > 1.5 * 110 * 2**20
    assert limited(tmp_path / "texts.csv", 110)[0] == 3000


def test_a_killed_preparation_is_done_again(tmp_path, cache):
    code = "from fmnb.data import image\nimport time\nwrite = image.channel_statistics\ndef slow(*arguments):\n    print('half', flush=True)\n    time.sleep(60)\nimage.channel_statistics = slow\n" \
           "from fmnb.data.prepare import prepare\nfrom fmnb.data.source import load_items\nfrom fmnb.data.split import split_items\n" \
           f"prepare(split_items(load_items('digits')), folder={str(tmp_path / 'made')!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name.startswith("made.partial-") for path in tmp_path.iterdir()] == [True]
    prepared = prepare(split_items(load_items("digits")), folder=tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert len(prepared_images(prepared)) == 1797


def test_unchanged_input_is_found_and_changed_input_is_not(tmp_path):
    items = split_items(load_items("digits")).head(300)
    first, start = prepare(items), time.perf_counter()
    assert prepare(items).folder == first.folder
    assert prepare(items, Preprocessing(vocab_size=999)).folder == first.folder, "a setting of texts concerns no image"
    for other in (prepare(items, Preprocessing(image_size=7)), prepare(items.head(299)), prepare(items.assign(label=items["label"].replace("3", "4")))):
        assert other.folder != first.folder
    assert open_prepared(first.folder).fingerprint == first.fingerprint


def tone(pitch, seed):
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    signal = np.sin(2 * np.pi * pitch * np.arange(2400) / 8000) * rng.uniform(0.2, 0.8) + 0.02 * rng.standard_normal(2400)
    soundfile.write(buffer, signal, 8000, format="WAV")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Recordings in class folders: three pitches."""
    folder = tmp_path_factory.mktemp("tones")
    for number in range(120):
        path = folder / ["low", "middle", "high"][number % 3] / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tone([300, 700, 1500][number % 3], number))
    return folder


@pytest.mark.parametrize("family", ["cnn", "rnn", "transformer"])
def test_sound_from_folder_to_predictions(tones, tmp_path, family):
    done = run("finetune", {"data": tones, "family": family, "epochs": 12}, out=tmp_path / "run", progress=False)
    assert done.metrics["test"]["accuracy"]["value"] >= 0.9
    assert set(done.predictions["target"]) == {"low", "middle", "high"}


def test_sound_starts_from_an_image_model(tones, tmp_path):
    """Spectrograms keep their size and normalisation, whatever the model took before."""
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path / "weights", safe_serialization=True)
    done = run("finetune", {"data": tones, "start_from": str(tmp_path / "weights"), "epochs": 1, "learning_rate": 1e-3}, out=tmp_path / "run", progress=False)
    assert read_json(done.folder / "model" / "model.json")["input_spec"]["modality"] == "audio" and done.metrics["n_trained"] == done.metrics["n_parameters"]


def test_columns_beside_the_contents_decide(tmp_path):
    """The picture says nothing, the column everything: a model that takes both is mostly right; prepared once, used by its run folder."""
    digits = load_items("digits").head(600)
    label = np.where(np.random.default_rng(0).random(600) < 0.5, "ill", "well")
    frame = digits.assign(label=label, temperature=np.where(label == "ill", 39.0, 36.5) + np.random.default_rng(1).normal(0, 0.2, 600), site=["north", "south"] * 300)
    prepared = run("prepare", {"data": keep_frame(frame), "columns": "temperature,site", "preprocessing": "image_size=8", "augment": "none"}, out=tmp_path / "prepared", progress=False)
    items = open_items(prepared.folder / "items.arrow")
    assert {"split", "temperature", "site"} <= set(items) and len(items) <= 600
    done = run("finetune", {"data": prepared.folder, "epochs": 8}, out=tmp_path / "run", progress=False)
    assert done.metrics["test"]["accuracy"]["value"] >= 0.8
    again = run("finetune", {"data": prepared.folder, "epochs": 6, "start_from": done.folder}, out=tmp_path / "again", progress=False)
    assert again.metrics["test"]["accuracy"]["value"] >= 0.8


def test_a_corpus_is_prepared_without_labels(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(f"Chapter {i}. " + "It was a dark and stormy night; the rain fell in torrents. " * 20 for i in range(200)))
    done = run("prepare", {"data": tmp_path / "book.txt"}, out=tmp_path / "run", progress=False)
    prepared = prepare(open_items(done.folder / "items.arrow"))
    assert prepared.classes == [] and set(prepared.counts) == {"train", "valid", "test"}
    assert len(prepared_tokens(prepared)[1]) == sum(prepared.counts.values()) + 1


def test_one_class_drowns_the_other_unless_balanced():
    items = split_items(load_items("digits")).query("label == '0' or label == '1' and item_id < 'digits-0300'")
    dls = make_dataloaders(prepare(items), 16, balanced=True)
    drawn = np.concatenate([targets.numpy() for _ in range(5) for *_, targets in dls.train])
    assert abs(drawn.mean() - 0.5) < 0.1 < (items["label"] == "0").mean() - 0.5


def test_unreadable_files_are_left_out_and_named(tones, tmp_path):
    import shutil
    shutil.copytree(tones, tmp_path / "tones")
    (tmp_path / "tones" / "low" / "0.wav").write_bytes(b"RIFF")
    done = run("prepare", {"data": tmp_path / "tones", "repair": "unreadable"}, out=tmp_path / "run", progress=False)
    repairs = pd.read_parquet(done.folder / "repairs.parquet")
    assert repairs[["item_id", "kind", "action"]].to_numpy().tolist() == [["low/0.wav", "unreadable", "drop"]]
    assert (tmp_path / "tones" / "low" / "0.wav").exists()
    assert len(open_items(done.folder / "items.arrow")) == 119
