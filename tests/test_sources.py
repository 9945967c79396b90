"""Every kind of source is read, every format decoded, and every kind of broken input ends in one sentence or a named item."""
import bz2
import gzip
import io
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import ROOT
from fmnb.core import DataError
from fmnb.data.archive import expand
from fmnb.data.media import audio_header, decode_audio, decode_image, decode_pixels, in_processes, modality_of, read_bytes
from fmnb.data.source import fingerprint_items, keep_frame, load_items, open_items, save_items
from PIL import Image

DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def no_hang():
    """Nothing here may take longer than 20 seconds."""
    def stop(*_):
        raise TimeoutError("20 seconds are over")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)


# --- making files ---

def picture(width=24, height=16):
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 10, y * 15, 255 - x * 5 - y], axis=-1).clip(0, 255).astype("uint8"))


def image_bytes(form="PNG", image=None, **options):
    buffer = io.BytesIO()
    (image or picture()).save(buffer, form, **options)
    return buffer.getvalue()


def sound_bytes(form="WAV", rate=16_000, channels=1, seconds=0.2):
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([wave] * channels, axis=1), rate, format=form)
    return buffer.getvalue()


def parquet_bytes(columns, **options):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def zip_bytes(members, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tar_bytes(members, mode="w"):
    """Members are bytes, or a type and a link's target."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = data
                archive.addfile(info)
    return buffer.getvalue()


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def jpeg_of_size(width, height):
    """A JPEG whose header lies about its size."""
    data = bytearray(image_bytes("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5:frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def png_of_size(width, height):
    """A PNG whose header lies about its size, with the checksum to match."""
    data = bytearray(image_bytes("PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


# --- every kind of source ---

PETS = {f"{split}/{label}/{i}.png": image_bytes() for split in ("train", "val", "test") for label in ("cat", "dog") for i in range(2)}
FILMS = [("a fine film", "1"), ("a dull film", "0"), ("worth seeing", "1"), ("not worth a cent", "0"), ('he says "no"', "0"), ("naïve – but good", "1")]


def text_table(form, rows=FILMS):
    frame = pd.DataFrame(rows, columns=["text", "label"])
    if form == "parquet":
        return parquet_bytes({name: frame[name].tolist() for name in frame})
    if form == "jsonl":
        return "".join(json.dumps(dict(zip(("text", "label"), row))) + "\n" for row in rows).encode()
    return frame.to_csv(sep="\t" if form == "tsv" else ",", index=False).encode()


@pytest.mark.parametrize("enclosed", ["", "pets/", "a/b/pets/"])
@pytest.mark.parametrize("form", ["folder", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_class_folders_with_splits(tmp_path, form, enclosed):
    files = {enclosed + name: data for name, data in PETS.items()}
    noise = {"__MACOSX/train/cat/._0.png": b"x", f"{enclosed}train/cat/.hidden.png": b"x"}
    if form == "folder":
        data = write(tmp_path / "data", files | noise)
    else:
        data = tmp_path / f"pets.{form}"
        data.write_bytes(zip_bytes(files | noise) if form == "zip" else tar_bytes(files | noise, f"w:{form[4:]}"))
    items = load_items(data)
    assert items["item_id"].tolist() == sorted(PETS)
    assert items["label"].tolist() == [name.split("/")[1] for name in sorted(PETS)]
    assert items["split"].value_counts().to_dict() == {"train": 4, "valid": 4, "test": 4}
    assert all(decode_pixels(source, name).shape == (16, 24, 3) for source, name in zip(items["image"], items["item_id"]))


def test_class_folders_without_splits(tmp_path):
    items = load_items(write(tmp_path, {f"{label}/deep/{i}.wav": sound_bytes() for label in "ab" for i in range(2)} | {"stray.wav": sound_bytes(), "a/notes.pdf": b"x"}))
    assert (list(items), items["label"].tolist()) == (["item_id", "audio", "label"], ["a", "a", "b", "b"])
    assert items.attrs["source"]["files passed over"] == "2"


@pytest.mark.parametrize("packed", [False, True])
def test_labels_in_names(tmp_path, packed):
    files = {f"{digit}_{speaker}_{i}.wav": b"x" for digit in range(3) for speaker in ("ada", "bob") for i in range(4)}
    data = write(tmp_path / "speech", files)
    if packed:
        data = tmp_path / "speech.zip"
        data.write_bytes(zip_bytes({f"speech/{name}": value for name, value in files.items()}))
    assert load_items(data)["label"].value_counts().to_dict() == {"0": 8, "1": 8, "2": 8}
    said = load_items(data, name_pattern=r"^(?P<label>\d)_(?P<group>\w+)_(?P<time>\d+)$")
    assert list(said) == ["item_id", "audio", "label", "group", "time"] and said["time"].sum() == 6 * 6


def test_unlabelled_media_have_no_label(tmp_path):
    assert list(load_items(write(tmp_path, {f"IMG_{i:04d}.png": image_bytes() for i in range(12)}))) == ["item_id", "image"]


def test_links_to_folders_are_not_followed(tmp_path):
    root = write(tmp_path / "data", PETS)
    (root / "train" / "cat" / "loop").symlink_to(root)
    (root / "train" / "cat" / "out").symlink_to(tmp_path)
    (root / "train" / "cat" / "linked.png").symlink_to(root / "train" / "cat" / "0.png")
    items = load_items(root)
    assert len(items) == len(PETS) + 1 and items.attrs["source"]["files passed over"] == "2"


@pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
def test_text_tables(tmp_path, form, packed):
    if packed and form == "parquet":
        pytest.skip("Parquet compresses by itself")
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[packed]
    items = load_items(write(tmp_path, {f"films.{form}{packed}": pack(text_table(form))}) / f"films.{form}{packed}")
    assert list(zip(items["text"], items["label"])) == FILMS and items["item_id"].is_unique


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_named_after_splits(tmp_path, form, packed):
    files = {f"{split}.{form}": text_table(form, FILMS[start:] + [FILMS[0]]) for start, split in enumerate(("train", "dev", "test"))} | {"README.txt": "hello"}
    data = write(tmp_path / "films", files)
    if packed:
        data = tmp_path / "films.zip"
        data.write_bytes(zip_bytes({f"films/{name}": value for name, value in files.items()}))
    items = load_items(data)
    assert items["split"].value_counts().to_dict() == {"train": 7, "valid": 6, "test": 5}
    assert items["item_id"].is_unique and items["group"].nunique() == len(FILMS)


def test_a_table_without_header_and_quoting(tmp_path):
    rows = [('"stray quote', "1"), ("two 5\" disks", "0"), ('"', "1"), ("it 's \"fine\"", "0")] * 3
    items = load_items(write(tmp_path, {"films.tsv": "".join(f"{text}\t{label}\n" for text, label in rows)}) / "films.tsv")
    assert list(zip(items["text"], items["label"])) == rows


@pytest.mark.parametrize("header", ["text,label", "Sentence,Class", "REVIEW,target", "content,y", "document, category"])
def test_synonyms(tmp_path, header):
    items = load_items(write(tmp_path, {"a.csv": f"{header}\nx,1\nz,2\n"}) / "a.csv")
    assert items[["text", "label"]].values.tolist() == [["x", "1"], ["z", "2"]]


def test_columns_can_be_said(tmp_path):
    write(tmp_path, {"a.csv": "text,words,label,mood\nt,w,1,good\nt,v,2,bad\n", "b.csv": "x,good\ny,bad\n", "c.csv": "0,1\na good one,1\na bad one,0\na fair one,1\n"})
    items = load_items(tmp_path / "a.csv", text_column="words", label_column="mood")
    assert items[["text", "label", "other_text", "other_label"]].values.tolist() == [["w", "good", "t", 1], ["v", "bad", "t", 2]]
    assert load_items(tmp_path / "b.csv", text_column="1", label_column="0")["text"].tolist() == ["good", "bad"]
    assert load_items(tmp_path / "c.csv")[["text", "label"]].values.tolist() == [["a good one", "1"], ["a bad one", "0"], ["a fair one", "1"]]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "latin-1"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])
def test_encodings_and_newlines(tmp_path, suffix, encoding, newline):
    separator = "\t" if suffix == ".tsv" else ","
    lines = [f"text{separator}label", f"naïve café{separator}1", f"Grüße{separator}0"]
    data = tmp_path / f"a{suffix}"
    data.write_bytes(newline.join([*lines, ""]).encode(encoding))
    items = load_items(data)
    if suffix == ".txt":
        assert items["text"].tolist() == ["\n".join([*lines, ""])]
    else:
        assert items[["text", "label"]].values.tolist() == [["naïve café", "1"], ["Grüße", "0"]]


def test_paths_in_tables_are_relative_to_them(tmp_path):
    write(tmp_path, {"sub/a/1.png": image_bytes(), "sub/a/2.png": image_bytes(), "sub/list.csv": "file name,class\na/1.png,x\na/2.png,y\n", "sub/say.csv": "path,label\nb/1.wav,x\n", "sub/b/1.wav": sound_bytes()})
    items = load_items(tmp_path / "sub" / "list.csv")
    assert [decode_image(path).size for path in items["image"]] == [(24, 16)] * 2
    assert modality_of(load_items(tmp_path / "sub" / "say.csv")) == "audio"


@pytest.mark.parametrize("rows", ["id,label\n{0},{1}\n", "id,breed\n{0},{1}\n", "path,class\nimages/{0}.png,{1}\n", "file,label\n{0}.png,{1}\n"])
@pytest.mark.parametrize("where", ["images/", "images/train/", "train/", ""])
def test_a_table_beside_media_gives_the_labels(tmp_path, rows, where):
    if "images" in rows and where != "images/":
        pytest.skip("the table names another folder")
    labels = {f"{i:04d}": "cat" if i % 3 else "dog" for i in range(6)}
    head, line = rows.splitlines()
    table = "\n".join([head, *(line.format(name, label) for name, label in labels.items())]) + "\n"
    root = write(tmp_path / "data", {f"{where}{name}.png": image_bytes() for name in labels} | {"labels.csv": table})
    packed = tmp_path / "data.zip"
    packed.write_bytes(zip_bytes({path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in root.rglob("*.*")}))
    for data in (root, packed, root / "labels.csv"):
        items = load_items(data)
        assert {path[-8:-4]: label for path, label in zip(items["image"], items["label"])} == labels
        assert all(decode_image(path).size == (24, 16) for path in items["image"]) and items.attrs["source"]["kind"] != "folder of image files"


def test_names_in_another_case_are_found_and_rows_without_a_file_are_counted(tmp_path):
    names = ["IMG_1.JPG", "cafe\u0301.png", "c.png"]
    table = "file,label\nimg_1.jpg,cat\ncaf\u00e9.png,dog\nc.png,cat\nmissing.png,dog\n"
    items = load_items(write(tmp_path, {name: image_bytes() for name in names} | {"labels.csv": table.encode()}))
    assert len(items) == 3 and items["label"].tolist() == ["cat", "dog", "cat"] and items.attrs["source"]["rows that name no file"] == "1"


def test_a_frame_that_is_kept_again_with_other_labels_is_another(tmp_path):
    rows = pd.DataFrame({"text": [f"text {number}" for number in range(6)]})
    several, one = (keep_frame(rows.assign(label=labels)) for labels in ([["a"], ["b"]] * 3, ["a", "b"] * 3))
    assert several != one and load_items(several).attrs["source"] != load_items(one).attrs["source"]


def test_a_table_beside_media_that_does_not_fit_is_refused(tmp_path):
    root = write(tmp_path / "data", {"images/1.png": GOOD, "images/2.png": GOOD, "images/3.png": GOOD, "labels.csv": "name,label\na,cat\nb,dog\n"})
    with pytest.raises(DataError, match=r"in one folder, and no column of labels.csv names them; give the path of labels.csv"):
        load_items(root)
    write(root, {"labels.csv": "name,label\n1,cat\n2,dog\n3,cat\n", "more/4.png": GOOD, "more/5.png": GOOD})
    with pytest.raises(DataError, match="other labels than their folders do; say label_column to take the table"):
        load_items(root)
    assert load_items(root, label_column="label")["label"].tolist() == ["cat", "dog", "cat"]
    assert load_items(root, name_pattern=r"(?P<label>\d)")["label"].tolist() == list("12345")
    (root / "labels.csv").unlink()
    assert load_items(root)["label"].tolist() == ["images"] * 3 + ["more"] * 2


def test_a_table_in_a_folder_of_its_own(tmp_path):
    root = write(tmp_path / "data", {f"audio/{i}.wav": sound_bytes() for i in range(4)} | {"meta/list.csv": "filename,fold,target\n" + "".join(f"{i}.wav,1,{i % 2}\n" for i in range(4))})
    for data in (root, root / "meta" / "list.csv"):
        items = load_items(data)
        assert items[["item_id", "label", "fold"]].values.tolist() == [[f"audio/{i}.wav", str(i % 2), 1] for i in range(4)]


def test_names_of_files_are_no_texts(tmp_path):
    write(tmp_path, {"a.csv": "filename,label\nrec-1,cat\nrec-2,dog\n", "b.csv": "file,label\nx/1.txt,a\nx/2.txt,b\n", "x/1.txt": "one", "x/2.txt": "two"})
    with pytest.raises(DataError, match="names no images, recordings or texts, such as 'rec-1'"):
        load_items(tmp_path / "a.csv")
    assert load_items(tmp_path / "b.csv")["text"].tolist() == ["one", "two"]


def test_columns_that_would_be_lost_are_kept_and_said(tmp_path):
    items = load_items(write(tmp_path, {"a.csv": "id,text,label\n1,x,\n1,y,\n"}) / "a.csv")
    assert list(items) == ["item_id", "text", "id"] and "not unique" in items.attrs["source"]["ids"] and "empty" in items.attrs["source"]["labels"]


@pytest.mark.parametrize("content", ["bytes", "paths", "both", "audio", "text"])
def test_a_fingerprint_outlives_saving(tmp_path, content, monkeypatch):
    monkeypatch.chdir(write(tmp_path, {"1.png": GOOD, "1.wav": sound_bytes()}))
    contents = {"bytes": ("image", [GOOD, IMAGES["rgb.jpg"]]), "paths": ("image", ["1.png", "1.png"]), "both": ("image", [GOOD, "1.png"]), "audio": ("audio", ["1.wav", "1.wav"]), "text": ("text", ["a" * 99, None])}
    kind, values = contents[content]
    beside = {"label": ["a", None], "n": [1, 2], "x": [0.5, None], "day": [pd.Timestamp("2020-02-02"), None], "mixed": [1, "x"], "whole": pd.array([1, None], dtype="Int64"), "some": pd.Series([1, None], dtype=object)}
    items = load_items(pd.DataFrame({kind: values} | beside))
    save_items(items, tmp_path / "items.arrow")
    monkeypatch.chdir("/")
    assert fingerprint_items(open_items(tmp_path / "items.arrow")) == fingerprint_items(items)
    assert {type(value) for value in items[kind]} <= ({bytes} if content in ("bytes", "both") else {str, float})


def test_images_inside_parquet(tmp_path):
    columns = {"image": [{"bytes": image_bytes(), "path": "a.png"}, {"bytes": image_bytes("JPEG"), "path": "b.jpg"}], "label": [0, 1]}
    items = load_items(write(tmp_path, {"a.parquet": parquet_bytes(columns)}) / "a.parquet")
    assert [decode_image(value, name).size for value, name in zip(items["image"], items["item_id"])] == [(24, 16)] * 2
    assert items["label"].tolist() == ["0", "1"] and isinstance(items["image"].iloc[0], bytes)


def test_dataframes(tmp_path):
    frame = pd.DataFrame({"id": [1, 2], "image": [np.zeros((4, 4, 3), np.uint8), picture()], "label": [True, False], "age": [3, 4]}, index=[5, 5])
    before = frame.copy()
    items = load_items(frame)
    assert items[["item_id", "label", "age"]].values.tolist() == [["1", "true", 3], ["2", "false", 4]]
    assert [decode_image(value).size for value in items["image"]] == [(4, 4), (24, 16)]
    pd.testing.assert_frame_equal(frame.drop(columns="image"), before.drop(columns="image"))


def test_a_corpus_is_its_passages(tmp_path):
    rng = np.random.default_rng(0)
    text = "".join(" ".join(f"word{i}" for i in rng.integers(0, 99, size)) + rng.choice(["\n", "\n\n", "\n \n", " "]) for size in rng.integers(1, 900, 200)) + "x" * 9000 + "語" * 5000
    write(tmp_path, {"books/b.txt": text, "books/sub/a.txt": "short", "books/c.txt": "\r\nend\r\n"})
    single, books = load_items(tmp_path / "books" / "b.txt"), load_items(tmp_path / "books")
    assert list(single) == ["item_id", "text"] and list(books) == ["item_id", "text", "group"]
    assert "".join(single.sort_values("item_id")["text"]) == text
    assert single["text"].str.len().max() <= 2000 and single["text"].str.len().iloc[:-1].min() >= 1000
    assert books.groupby("group")["text"].agg("".join).to_dict() == {"b.txt": text, "c.txt": "\nend\n", "sub/a.txt": "short"}
    assert single["item_id"].iloc[12] == "b.txt:000012"


def test_texts_named_after_splits_are_a_corpus_with_splits(tmp_path):
    items = load_items(write(tmp_path, {f"{name}.txt": f"text of {name}" for name in ("train", "valid", "test")}))
    assert dict(zip(items["text"], items["split"])) == {f"text of {name}": name for name in ("train", "valid", "test")}


def test_texts_in_class_folders(tmp_path):
    items = load_items(write(tmp_path, {f"mails/{split}/{label}/{i}.txt": f"{label} {i}" for split in ("train", "test") for label in ("spam", "ham") for i in range(3)}))
    assert len(items) == 12 and (items["text"].str.split().str[0] == items["label"]).all() and set(items["split"]) == {"train", "test"}


def test_a_saved_hub_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    data = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    datasets.DatasetDict(train=data, validation=data.select([0]), unsupervised=data).save_to_disk(str(tmp_path / "films"))
    items = load_items(f"hf:{tmp_path / 'films'}")
    assert items["text"].tolist() == ["a", "b", "c", "a"] and items["split"].tolist() == ["train"] * 3 + ["valid"]
    assert items["label"].fillna("").tolist() == ["good", "bad", "", "good"]
    data.save_to_disk(str(tmp_path / "single"))
    assert list(load_items(f"hf:{tmp_path / 'single'}")) == ["item_id", "text", "label"]
    write(tmp_path, {"folder/train.csv": text_table("csv")})
    assert load_items(f"hf:{tmp_path / 'folder'}")["text"].tolist() == [text for text, _ in FILMS]


def test_recordings_of_a_hub_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}, "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"audio": [{"bytes": sound_bytes(rate=rate), "path": None} for rate in (8000, 16_000)], "label": [0, 1]}, features=features)
    data.cast_column("audio", datasets.Audio()).save_to_disk(str(tmp_path / "speech"))
    items = load_items(f"hf:{tmp_path / 'speech'}")
    assert [decode_audio(value)[1] for value in items["audio"]] == [8000, 16_000] and items["label"].tolist() == ["a", "b"]


def test_the_hub_without_a_network():
    pytest.importorskip("datasets")
    code = "from fmnb.data.source import load_items\ntry: load_items('hf:nobody/nothing')\nexcept ValueError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"Data 'hf:nobody/nothing' cannot be loaded \(.+\); check the name and the network.+\.\n", done.stdout)


# --- formats ---

def grey(mode):
    return picture().convert("L").convert(mode)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


IMAGES = {
    "rgb.jpg": image_bytes("JPEG"), "grey.jpeg": image_bytes("JPEG", grey("L")), "cmyk.jpg": image_bytes("JPEG", picture().convert("CMYK")), "turned.jpg": image_bytes("JPEG", exif=turned()),
    "rgb.png": image_bytes("PNG"), "grey.png": image_bytes("PNG", grey("L")), "palette.png": image_bytes("PNG", picture().quantize(16)), "alpha.png": image_bytes("PNG", picture().convert("RGBA")),
    "grey-alpha.png": image_bytes("PNG", grey("LA")), "bit.png": image_bytes("PNG", grey("1")), "16.png": image_bytes("PNG", Image.fromarray(np.full((16, 24), 40_000, "uint16"))),
    "rgb.webp": image_bytes("WEBP"), "alpha.webp": image_bytes("WEBP", picture().convert("RGBA")), "rgb.bmp": image_bytes("BMP"), "grey.bmp": image_bytes("BMP", grey("L")),
    "palette.gif": image_bytes("GIF"), "moving.gif": image_bytes("GIF", save_all=True, append_images=[picture().rotate(90)]), "rgb.tiff": image_bytes("TIFF"), "cmyk.tif": image_bytes("TIFF", picture().convert("CMYK")),
    "16.tif": image_bytes("TIFF", Image.fromarray(np.full((16, 24), 40_000, "uint16"))), "UPPER.PNG": image_bytes("PNG"), "turned.png": image_bytes("PNG", exif=turned()),
}


def test_image_formats(tmp_path):
    items = load_items(write(tmp_path, {f"kind/{name}": data for name, data in IMAGES.items()} | {"other/a.png": image_bytes()}))
    assert len(items) == len(IMAGES) + 1
    for name, path in zip(items["item_id"], items["image"]):
        image = decode_image(path, name)
        assert image.size == ((16, 24) if "turned" in name else (24, 16)) and image.mode in ("L", "RGB"), name
        assert decode_pixels(path, name).dtype == np.uint8
        if image.mode == "RGB" and "turned" not in name:
            assert np.abs(np.asarray(image, int) - np.asarray(picture(), int)).mean() < 40, name


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_audio_formats(tmp_path, form, rate, channels):
    items = load_items(write(tmp_path, {f"{label}/1.{form.lower()}": sound_bytes(form, rate, channels, 1) for label in "ab"}))
    for name, path in zip(items["item_id"], items["audio"]):
        samples, read = decode_audio(path, name, rate=16_000)
        middle = samples[4000:12_000]
        assert read == 16_000 and samples.ndim == 1 and samples.dtype == np.float32 and abs(len(samples) - 16_000) < 3000
        assert abs(np.abs(np.fft.rfft(middle)).argmax() * 2 - 440) <= 4


# --- archives ---

def test_two_expansions_at_once(tmp_path):
    data = tmp_path / "pets.zip"
    data.write_bytes(zip_bytes({f"{i}.txt": f"{i}" for i in range(500)}))
    found = []
    threads = [threading.Thread(target=lambda: found.append(expand(data, tmp_path / "out"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(list(found[0].iterdir())) == 500 and len(list((tmp_path / "out").iterdir())) == 1


def test_an_interrupted_expansion_is_not_used(tmp_path):
    data = tmp_path / "pets.zip"
    data.write_bytes(zip_bytes({f"{i}.txt": "text" for i in range(20_000)}, zipfile.ZIP_STORED))
    code = "import sys; from fmnb.data.archive import expand; print('go', flush=True); expand(*sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, data, tmp_path / "out"], stdout=subprocess.PIPE)
    process.stdout.readline()
    while not list(tmp_path.glob("out/.partial-*/*.txt")):
        assert process.poll() is None
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(list((tmp_path / "out").iterdir())) == 1
    assert len(list(expand(data, tmp_path / "out").iterdir())) == 20_000


def test_a_changed_archive_is_expanded_again(tmp_path):
    data = tmp_path / "a.zip"
    data.write_bytes(zip_bytes({"a.txt": "one"}))
    first = expand(data)
    data.write_bytes(zip_bytes({"a.txt": "three"}))
    assert [(folder / "a.txt").read_text() for folder in (first, expand(data))] == ["one", "three"]


def test_a_fingerprint_outlives_the_expansion(tmp_path):
    data = tmp_path / "pets.zip"
    data.write_bytes(zip_bytes(PETS))
    first = fingerprint_items(load_items(data))
    expanded = expand(data)
    expanded.rename(tmp_path / "away")
    assert fingerprint_items(load_items(data)) == first


# --- broken input ---

HEAD = "text,label\n"
ROWS = "".join(f"text {i},{i % 2}\n" for i in range(50))
GOOD = image_bytes()
BOMB = gzip.compress(bytes(2**27), 1)


def pair(name, data):
    """Two classes of images, one file of them broken."""
    return {f"a/{name}": data, "a/ok.png": GOOD, "b/ok.png": GOOD, "b/ok2.png": GOOD}


def sounds(name, data):
    return {f"a/{name}": data, "a/ok.wav": sound_bytes(), "b/ok.wav": sound_bytes()}


def encrypted():
    data = bytearray(zip_bytes({"a/1.png": GOOD}))
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + offset] |= 1
    return bytes(data)


def lying_zip():
    """Declares 10 bytes where there are 128 MiB."""
    data = bytearray(zip_bytes({"zeros.csv": bytes(2**27)}))
    for magic, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(magic) + offset
        data[at:at + 4] = (10).to_bytes(4, "little")
    return bytes(data)


STORED = zip_bytes({"a/1.txt": b"sound and whole", "a/2.txt": b"x"}, zipfile.ZIP_STORED)
TAR = tar_bytes({f"pets/{i}.txt": b"x" * 700 for i in range(20)})
PARQUET = text_table("parquet", FILMS * 20)
WAV = sound_bytes()

# name -> files, what to load, what must be named: in the error, or as the item that is found faulty
REFUSED, FOUND = "refused", "found"
BROKEN = {
    # images
    "image of 0 bytes": (pair("x.png", b""), "", FOUND, "a/x.png"),
    "image with another's suffix": (pair("x.png", b"%PDF-1.4 no image"), "", FOUND, "a/x.png"),
    "text as jpg": (pair("x.jpg", b"hello"), "", FOUND, "a/x.jpg"),
    "wav as jpg": (pair("x.jpg", WAV), "", FOUND, "a/x.jpg"),
    "html as png": (pair("x.png", b"<html>404 not found</html>"), "", FOUND, "a/x.png"),
    "jpeg, magic only": (pair("x.jpg", b"\xff\xd8\xff"), "", FOUND, "a/x.jpg"),
    "jpeg, half": (pair("x.jpg", image_bytes("JPEG")[:len(image_bytes("JPEG")) // 2]), "", FOUND, "a/x.jpg"),
    "jpeg, cut in its header": (pair("x.jpg", image_bytes("JPEG")[:60]), "", FOUND, "a/x.jpg"),
    "png, half": (pair("x.png", GOOD[:len(GOOD) // 2]), "", FOUND, "a/x.png"),
    "png, without its end": (pair("x.png", GOOD[:-30]), "", FOUND, "a/x.png"),
    "gif, half": (pair("x.gif", image_bytes("GIF")[:300]), "", FOUND, "a/x.gif"),
    "webp, half": (pair("x.webp", image_bytes("WEBP")[:60]), "", FOUND, "a/x.webp"),
    "bmp, half": (pair("x.bmp", image_bytes("BMP")[:200]), "", FOUND, "a/x.bmp"),
    "tiff, half": (pair("x.tif", image_bytes("TIFF")[:60]), "", FOUND, "a/x.tif"),
    "jpeg of 65,535 x 65,535 in its header": (pair("x.jpg", jpeg_of_size(65_535, 65_535)), "", FOUND, "a/x.jpg"),
    "png of 2 billion x 2 billion in its header": (pair("x.png", png_of_size(2**31 - 1, 2**31 - 1)), "", FOUND, "a/x.png"),
    "png of 0 x 0 in its header": (pair("x.png", png_of_size(0, 0)), "", FOUND, "a/x.png"),
    "png with damaged pixels": (pair("x.png", GOOD[:60] + b"\0" * 20 + GOOD[80:]), "", FOUND, "a/x.png"),
    "floating-point image": (pair("x.tif", image_bytes("TIFF", Image.fromarray(np.ones((4, 4), "float32")))), "", FOUND, "a/x.tif"),
    "folder without anything": ({"data/.hidden": ""}, "data", REFUSED, "data holds no images"),
    "folder of unknown files": ({"data/a.docx": "x", "data/b.xyz": "x"}, "data", REFUSED, ".docx, .xyz"),
    # recordings
    "wav of 0 bytes": (sounds("x.wav", b""), "", FOUND, "a/x.wav"),
    "wav, magic only": (sounds("x.wav", b"RIFF"), "", FOUND, "a/x.wav"),
    "wav, cut in its header": (sounds("x.wav", WAV[:30]), "", FOUND, "a/x.wav"),
    "wav without samples": (sounds("x.wav", WAV[:44]), "", FOUND, "a/x.wav"),
    "png as wav": (sounds("x.wav", GOOD), "", FOUND, "a/x.wav"),
    "flac, cut in its header": (sounds("x.flac", sound_bytes("FLAC")[:40]), "", FOUND, "a/x.flac"),
    "ogg, cut in its header": (sounds("x.ogg", sound_bytes("OGG")[:60]), "", FOUND, "a/x.ogg"),
    "mp3 of noise": (sounds("x.mp3", bytes(range(1, 255)) * 3), "", FOUND, "a/x.mp3"),
    # tables
    "table of 0 bytes": ({"a.csv": ""}, "a.csv", REFUSED, "a.csv is empty"),
    "jsonl of 0 bytes": ({"a.jsonl": ""}, "a.jsonl", REFUSED, "a.jsonl is empty"),
    "parquet of 0 bytes": ({"a.parquet": ""}, "a.parquet", REFUSED, "a.parquet is empty"),
    "blank lines": ({"a.csv": "\n\n\n"}, "a.csv", REFUSED, "a.csv is empty"),
    "header only": ({"a.csv": HEAD}, "a.csv", REFUSED, "a.csv has no rows"),
    "parquet without rows": ({"a.parquet": parquet_bytes({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())})}, "a.parquet", REFUSED, "a.parquet"),
    "parquet without columns": ({"a.parquet": parquet_bytes({})}, "a.parquet", REFUSED, "a.parquet"),
    "too many fields": ({"a.csv": HEAD + ROWS + "one,two,three\n"}, "a.csv", REFUSED, "a.csv, line 52, has 3 fields"),
    "too many fields in all rows": ({"a.csv": HEAD + "a,b,c\nd,e,f\n"}, "a.csv", REFUSED, "a.csv, line 2, has 3 fields"),
    "too many fields in a tsv": ({"a.tsv": "x y\t1\nx z\t0\nx\t1\t2\n"}, "a.tsv", REFUSED, "a.tsv, line 3, has 3 fields"),
    "too few fields": ({"a.csv": HEAD + "no label\n" + ROWS}, "a.csv", FOUND, "no label"),
    "open quotation mark": ({"a.csv": HEAD + ROWS + '"never closed,1\n' + ROWS}, "a.csv", REFUSED, "a.csv, row 52, has a quotation mark"),
    "missing label": ({"a.csv": HEAD + ROWS + "no label,\n"}, "a.csv", FOUND, "no label"),
    "missing text": ({"a.csv": HEAD + ROWS + ",1\n"}, "a.csv", FOUND, "nan"),
    "label NaN": ({"a.csv": HEAD + ROWS + "no label,NaN\n"}, "a.csv", FOUND, "no label"),
    "label NaN in jsonl": ({"a.jsonl": '{"text": "no label", "label": NaN}\n{"text": "b", "label": 1}\n'}, "a.jsonl", FOUND, "no label"),
    "label null in jsonl": ({"a.jsonl": '{"text": "no label", "label": null}\n{"text": "b", "label": 1}\n'}, "a.jsonl", FOUND, "no label"),
    "no label key in jsonl": ({"a.jsonl": '{"text": "no label"}\n{"text": "b", "label": 1}\n'}, "a.jsonl", FOUND, "no label"),
    "label NaN in parquet": ({"a.parquet": parquet_bytes({"text": ["no label", "b"], "label": [float("nan"), 1.0]})}, "a.parquet", FOUND, "no label"),
    "missing columns": ({"a.csv": "stars,words\ngood,fine\nbad,poor\n"}, "a.csv", REFUSED, "a.csv needs a column"),
    "missing columns in jsonl": ({"a.jsonl": '{"words": "x", "stars": 1}\n'}, "a.jsonl", REFUSED, "a.jsonl needs a column"),
    "missing columns in parquet": ({"a.parquet": parquet_bytes({"words": ["x"]})}, "a.parquet", REFUSED, "a.parquet needs a column"),
    "column twice": ({"a.csv": "text,label,label\nx,1,2\n"}, "a.csv", REFUSED, "a.csv has the column 'label' more than once"),
    "column twice but for spaces": ({"a.csv": "text,label, text\nx,1,2\n"}, "a.csv", REFUSED, "a.csv has the column 'text' more than once"),
    "png as csv": ({"a.csv": GOOD}, "a.csv", REFUSED, "a.csv holds binary data"),
    "spreadsheet as csv": ({"a.csv": zip_bytes({"xl/workbook.xml": "<x/>"})}, "a.csv", REFUSED, "a.csv holds binary data"),
    "noise as csv": ({"a.csv": np.random.default_rng(0).bytes(4000)}, "a.csv", REFUSED, "a.csv holds binary data"),
    "zeros as csv": ({"a.csv": bytes(4000)}, "a.csv", REFUSED, "a.csv"),
    "csv as parquet": ({"a.parquet": HEAD + ROWS}, "a.parquet", REFUSED, "a.parquet cannot be read"),
    "csv as jsonl": ({"a.jsonl": HEAD + ROWS}, "a.jsonl", REFUSED, "a.jsonl, line 1,"),
    "parquet, half": ({"a.parquet": PARQUET[:len(PARQUET) // 2]}, "a.parquet", REFUSED, "a.parquet cannot be read"),
    "parquet, without its end": ({"a.parquet": PARQUET[:-4]}, "a.parquet", REFUSED, "a.parquet cannot be read"),
    "parquet, damaged footer": ({"a.parquet": PARQUET[:-60] + b"\xff" * 30 + PARQUET[-30:]}, "a.parquet", REFUSED, "a.parquet cannot be read"),
    "jsonl, cut": ({"a.jsonl": text_table("jsonl")[:-9]}, "a.jsonl", REFUSED, "a.jsonl, line 6,"),
    "jsonl of lists": ({"a.jsonl": "[1, 2]\n"}, "a.jsonl", REFUSED, "a.jsonl, line 1, is not a JSON object"),
    "jsonl, too deep": ({"a.jsonl": '{"text": ' + "[" * 100_000 + "\n"}, "a.jsonl", REFUSED, "a.jsonl, line 1,"),
    "one JSON array": ({"a.jsonl": '[{"text": "a", "label": 1}]'}, "a.jsonl", REFUSED, "a.jsonl, line 1, is not a JSON object"),
    "gz, cut": ({"a.csv.gz": gzip.compress((HEAD + ROWS).encode())[:-20]}, "a.csv.gz", REFUSED, "a.csv.gz cannot be read"),
    "gz, bad checksum": ({"a.csv.gz": gzip.compress((HEAD + ROWS).encode())[:-8] + bytes(8)}, "a.csv.gz", REFUSED, "a.csv.gz cannot be read"),
    "gz bomb": ({"a.csv.gz": BOMB}, "a.csv.gz", REFUSED, "a.csv.gz"),
    "no gz": ({"a.parquet.gz": b"x"}, "a.parquet.gz", REFUSED, "a.parquet.gz is not of a kind"),
    "path that is not there": ({"a.csv": "image,label\nno.png,1\n"}, "a.csv", FOUND, "no.png"),
    "split that differs in its columns": ({"d/train.csv": HEAD + ROWS, "d/test.csv": "text,stars\nx,1\n"}, "d", REFUSED, "train.csv has the columns"),
    "split without rows": ({"d/train.csv": HEAD + ROWS, "d/test.csv": HEAD}, "d", REFUSED, "test.csv has no rows"),
    "several tables": ({"d/one.csv": HEAD + ROWS, "d/two.csv": HEAD + ROWS}, "d", REFUSED, "one.csv, two.csv"),
    # texts
    "text of 0 bytes": ({"a.txt": ""}, "a.txt", REFUSED, "a.txt holds no text"),
    "png as text": ({"a.txt": GOOD}, "a.txt", REFUSED, "a.txt holds no text"),
    "one empty text of a corpus": ({"d/a.txt": "", "d/b.txt": "text"}, "d", FOUND, "a.txt:000000"),
    "one binary text of a corpus": ({"d/a.txt": GOOD, "d/b.txt": "text"}, "d", FOUND, "a.txt:000000"),
    "one empty text of a class": ({"d/x/1.txt": "", "d/x/2.txt": "text", "d/y/1.txt": "text", "d/y/2.txt": "text"}, "d", FOUND, "x/1.txt"),
    # archives
    "no archive": ({"a.zip": "hello"}, "a.zip", REFUSED, "a.zip cannot be expanded"),
    "zip of 0 bytes": ({"a.zip": ""}, "a.zip", REFUSED, "a.zip"),
    "empty zip": ({"a.zip": zip_bytes({})}, "a.zip", REFUSED, "a.zip holds no files"),
    "empty tar": ({"a.tar": tar_bytes({})}, "a.tar", REFUSED, "a.tar holds no files"),
    "zip slip": ({"a.zip": zip_bytes({"../../evil.txt": "x"})}, "a.zip", REFUSED, "'../../evil.txt'"),
    "zip slip inside": ({"a.zip": zip_bytes({"a/../../evil.txt": "x"})}, "a.zip", REFUSED, "'a/../../evil.txt'"),
    "absolute member": ({"a.zip": zip_bytes({"/evil.txt": "x"})}, "a.zip", REFUSED, "'/evil.txt'"),
    "member with backslashes": ({"a.zip": zip_bytes({"..\\evil.txt": "x"})}, "a.zip", REFUSED, "evil.txt"),
    "member on a drive": ({"a.zip": zip_bytes({"C:/evil.txt": "x"})}, "a.zip", REFUSED, "'C:/evil.txt'"),
    "tar slip": ({"a.tar": tar_bytes({"../evil.txt": b"x"})}, "a.tar", REFUSED, "'../evil.txt'"),
    "absolute member of a tar": ({"a.tar.gz": tar_bytes({"/evil.txt": b"x"}, "w:gz")}, "a.tar.gz", REFUSED, "'/evil.txt'"),
    "symbolic link": ({"a.tar": tar_bytes({"etc": (tarfile.SYMTYPE, "/etc")})}, "a.tar", REFUSED, "'etc' that is a link"),
    "link, then a member through it": ({"a.tar": tar_bytes({"etc": (tarfile.SYMTYPE, ".."), "etc/evil.txt": b"x"})}, "a.tar", REFUSED, "'etc' that is a link"),
    "hard link": ({"a.tar": tar_bytes({"passwd": (tarfile.LNKTYPE, "/etc/passwd")})}, "a.tar", REFUSED, "'passwd' that is a link"),
    "device": ({"a.tar": tar_bytes({"null": (tarfile.CHRTYPE, "")})}, "a.tar", REFUSED, "'null' that is a device"),
    "pipe": ({"a.tar": tar_bytes({"pipe": (tarfile.FIFOTYPE, "")})}, "a.tar", REFUSED, "'pipe' that is a device"),
    "zip bomb": ({"a.zip": zip_bytes({"zeros.csv": bytes(2**27)})}, "a.zip", REFUSED, "'zeros.csv', expands to more than 200 times"),
    "zip bomb that lies": ({"a.zip": lying_zip()}, "a.zip", REFUSED, "a.zip, member 'zeros.csv',"),
    "tar bomb": ({"a.tar.gz": tar_bytes({"zeros.csv": bytes(2**27)}, "w:gz")}, "a.tar.gz", REFUSED, "a.tar.gz"),
    "bomb in a bomb": ({"a.zip": zip_bytes({"inner.zip": zip_bytes({"zeros.csv": bytes(2**20)})})}, "a.zip", REFUSED, ".zip"),
    "encrypted zip": ({"a.zip": encrypted()}, "a.zip", REFUSED, "encrypted member 'a/1.png'"),
    "zip with a bad checksum": ({"a.zip": STORED.replace(b"sound", b"tound")}, "a.zip", REFUSED, "member 'a/1.txt', cannot be expanded (Bad CRC-32"),
    "zip, half": ({"a.zip": STORED[:len(STORED) // 2]}, "a.zip", REFUSED, "a.zip"),
    "zip, without its end": ({"a.zip": STORED[:-10]}, "a.zip", REFUSED, "a.zip"),
    "zip, without its start": ({"a.zip": STORED[30:]}, "a.zip", REFUSED, "a.zip"),
    "tar, half a member": ({"a.tar": TAR[:5000]}, "a.tar", REFUSED, "a.tar"),
    "tar, cut between members": ({"a.tar": TAR[:512 * 3 * 4]}, "a.tar", REFUSED, "a.tar"),
    "tar, damaged header": ({"a.tar": TAR[:512 * 3 * 4] + b"x" * 512 + TAR[512 * 13:]}, "a.tar", REFUSED, "a.tar"),
    "tar.gz, half": ({"a.tar.gz": gzip.compress(np.random.default_rng(0).bytes(9000) and TAR)[:100]}, "a.tar.gz", REFUSED, "a.tar.gz"),
    "tar.gz, bad checksum": ({"a.tar.gz": gzip.compress(TAR)[:-8] + bytes(8)}, "a.tar.gz", REFUSED, "a.tar.gz"),
    "tar.xz, half": ({"a.tar.xz": lzma.compress(TAR)[:-40]}, "a.tar.xz", REFUSED, "a.tar.xz"),
    "tar.bz2, half": ({"a.tar.bz2": bz2.compress(TAR)[:-40]}, "a.tar.bz2", REFUSED, "a.tar.bz2"),
    "file where a folder should be": ({"a.zip": zip_bytes({"a": "x", "a/b.txt": "y"})}, "a.zip", REFUSED, "a.zip, member 'a/b.txt'"),
    "member with a name too long": ({"a.zip": zip_bytes({"x" * 300 + ".txt": "y"})}, "a.zip", REFUSED, "a.zip, member 'xxx"),
    # paths
    "nothing there": ({}, "nowhere.csv", REFUSED, "nowhere.csv' is neither"),
    "unknown suffix": ({"a.docx": "x"}, "a.docx", REFUSED, "a.docx is not of a kind"),
    "name too long": ({}, "x" * 5000, REFUSED, "is neither"),
    "hub name that is none": ({}, "hf:", REFUSED, "hf:"),
}


def is_one_sentence(message):
    return "\n" not in message and message.endswith((".", "?")) and not re.search(r"Traceback|\. [A-Z](?!id you mean)(?!nown:)", message)


def faulty(items):
    """Ids, and texts where ids are hashes, of the items that have no label or content, or whose content cannot be decoded."""
    kind, found = modality_of(items), []
    decode = {"image": decode_pixels, "audio": decode_audio, "text": lambda text, item_id: None}[kind]
    for position, row in enumerate(items.to_dict("records")):
        missing = pd.isna(row[kind]) or ("label" in row and pd.isna(row["label"]))
        try:
            if not missing:
                decode(row[kind], row["item_id"])
        except DataError as error:
            assert row["item_id"] in str(error) and is_one_sentence(str(error)), error
            missing = True
        if missing:
            found.append(f"{row['item_id']} {row[kind]}")
    return found


def test_there_are_enough_broken_inputs():
    assert len(BROKEN) >= 100 and sum(kind == FOUND for _, _, kind, _ in BROKEN.values()) >= 35


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_is_refused_or_found(tmp_path, name):
    files, target, kind, named = BROKEN[name]
    outside = tmp_path / "inner"
    write(outside, files)
    data = target if target.startswith(("hf:", "xxx")) else outside / target
    if kind == REFUSED:
        with pytest.raises(DataError) as caught, warnings.catch_warnings(action="error"):
            load_items(data)
        message = str(caught.value)
        assert is_one_sentence(message) and named in message, message
        assert not list(tmp_path.rglob("evil.txt")) and not list(tmp_path.parent.glob("evil.txt"))
        return
    with warnings.catch_warnings(action="error"):
        items = load_items(data)
    found = faulty(items)
    assert len(found) == 1 and named in found[0], found


@pytest.mark.parametrize("make", [
    lambda: pd.DataFrame({"text": [], "label": []}), lambda: pd.DataFrame(), lambda: pd.DataFrame({"words": ["a"]}), lambda: pd.DataFrame([["a", "b"]], columns=["text", "text"]),
    lambda: pd.DataFrame({"text": [["a"], "b"], "label": [1, 2]}), lambda: pd.DataFrame({"text": ["a", "b"], "label": [[1], 2]}), lambda: pd.DataFrame({"image": [1.5, 2.5], "label": [1, 2]}),
    lambda: None, lambda: 7, lambda: "", lambda: ["a", "b"],
], ids=["no rows", "nothing", "missing columns", "column twice", "list as text", "list as label", "number as image", "None", "a number", "an empty name", "a list"])
def test_broken_objects_are_refused(make):
    with pytest.raises(DataError) as caught:
        load_items(make())
    assert is_one_sentence(str(caught.value))


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.zip", "a.parquet"])
def test_a_pipe_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load_items(tmp_path / name)
    with pytest.raises(DataError, match="no images"):
        load_items(tmp_path)


@pytest.mark.parametrize("read", [read_bytes, decode_pixels, decode_audio, audio_header])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(DataError, match="Item x cannot be read .it is no regular file"):
            read(path, "x")


def test_a_killed_process_is_an_error():
    with pytest.raises(DataError, match="was ended from outside"):
        list(in_processes(lambda rows: os.kill(os.getpid(), signal.SIGKILL) if rows.start else 0, 5000))
    assert list(in_processes(lambda rows: rows.start, 5000)) == list(range(0, 5000, 256))


def test_times_of_a_tar_may_be_absurd(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.txt")
        info.size, info.pax_headers = 4, {"mtime": "1e30"}
        archive.addfile(info, io.BytesIO(b"text"))
    assert load_items(write(tmp_path, {"a.tar": buffer.getvalue()}) / "a.tar")["text"].tolist() == ["text"]


def test_mixed_types_become_texts():
    items = load_items(pd.DataFrame({"text": ["a", 1, 2.5, None, b"caf\xe9"], "label": ["x", 1, 1.0, np.nan, True]}))
    assert items["text"].fillna("").tolist() == ["a", "1", "2.5", "", "café"]
    assert len(faulty(items)) == 1


def test_one_class_is_no_fault_of_the_source(tmp_path):
    assert load_items(write(tmp_path, {"cat/1.png": GOOD, "cat/2.png": GOOD}))["label"].tolist() == ["cat", "cat"]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_an_image_cut_anywhere(tmp_path, form):
    data = image_bytes(form, Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)))
    for size in range(0, len(data), max(1, len(data) // 40)):
        (tmp_path / "x").write_bytes(data[:size])
        try:
            decode_pixels(tmp_path / "x", "x")
        except DataError as error:
            assert is_one_sentence(str(error))
        else:
            assert size > len(data) * 0.9


@pytest.mark.parametrize("name", ["a.parquet", "a.zip", "a.tar", "a.tar.gz", "a.jsonl", "a.csv.gz"])
def test_a_file_damaged_anywhere(tmp_path, name):
    whole = {"a.parquet": PARQUET, "a.zip": STORED, "a.tar": TAR, "a.tar.gz": gzip.compress(TAR), "a.jsonl": text_table("jsonl"), "a.csv.gz": gzip.compress((HEAD + ROWS).encode())}[name]
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        for position in rng.integers(0, len(data), 3):
            data[position] = rng.integers(0, 256)
        (tmp_path / name).write_bytes(data)
        try:
            load_items(tmp_path / name)
        except DataError as error:
            assert is_one_sentence(str(error)), error


# --- sizes ---

def test_a_table_larger_than_memory(tmp_path):
    """150 MB of rows under a limit of 200 MB above what the imports take."""
    code = """
import resource, sys
from fmnb.data.source import fingerprint_items, load_items
used = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData"))) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 200 * 2**20,) * 2)
items = load_items(sys.argv[1])
print(len(items), items["text"].iloc[-1][:9], items["label"].nunique(), len(fingerprint_items(items)))
"""
    with (tmp_path / "large.csv").open("w") as file:
        file.write("text,label\n")
        file.writelines(f'"row {i:05d}, {"word " * 2000}",{i % 3}\n' for i in range(20_000))
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "large.csv"], env={**os.environ, "FMNB_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.stdout == "20000 row 19999 3 16\n", done.stderr[-2000:]


@pytest.mark.skipif(not DATA.exists(), reason="the shared data are not here")
def test_real_data():
    films, digits, words = load_items(DATA / "sst2"), load_items(DATA / "fsdd.zip"), load_items(DATA / "tinyshakespeare.txt")
    assert films["split"].value_counts().to_dict() == {"train": 6920, "test": 1821, "valid": 872} and set(films["label"]) == {"0", "1"}
    assert digits["label"].value_counts().to_dict() == {str(i): 300 for i in range(10)}
    assert "".join(words["text"]) == (DATA / "tinyshakespeare.txt").read_text()
