"""Batches to pretrain on: a function of seed and step, every token once, the text as it is in the file."""
import dataclasses
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.torch_core import get_random_states
from fmnb.core import DataError
from fmnb.data.prepare import Preprocessing, prepare, prepared_tokens
from fmnb.data.source import load_items
from fmnb.data.split import split_items
from fmnb.data.stream import TokenStream, document_begins, make_stream
from fmnb.data.text import END
from tokenizers import Tokenizer, models

PLAY = "".join(f"MÉNÉNIUS:\nWhat, {'ho, ' * (number % 7)}{number}!\n\n   \tFrom naïve “quotes” to 日本語;\n" for number in range(400))
AWKWARD = "\n\n  begins with space" + "x" * 5000 + " " * 4100 + "\n" * 2500 + "[MASK] [END] ends with space \n\n"


def write(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, newline="")
    return folder


def corpus(folder, split="train", tokenizer="char", **texts):
    """A folder of texts, prepared; all in one split."""
    return prepare(load_items(write(folder, **texts)).assign(split=split), Preprocessing(tokenizer=tokenizer, vocab_size=500))


def tokenizer_of(prepared):
    return Tokenizer.from_file(str(prepared.folder / "tokenizer.json"))


def targets(loader, steps):
    """How often each place of the stream is a target in some steps."""
    count, stream = np.zeros(loader.dataset.stream.total, int), loader.dataset.stream
    rows = np.concatenate([loader.rows(step) for step in steps])
    windows = loader.dataset.fetch(rows)[0].numpy()
    for row, window in zip(rows, windows):
        places = (row + np.arange(len(window))) % stream.total
        assert (stream.read(places, 1)[window > 0][:, 0] == window[window > 0]).all()
        np.add.at(count, places[1:][window[1:] > 0], 1)
    return count


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("text", [PLAY, AWKWARD], ids=["play", "awkward"])
def test_the_stream_of_a_corpus_is_the_text_of_its_file(tmp_path, kind, text):
    prepared = corpus(tmp_path / "play", tokenizer=kind, play=text)
    loader = make_stream(prepared, "train", 3, context=50, training=False)
    first, rest = loader.batch(0)[0][0, :1], torch.cat([inputs[:, 1:].flatten() for inputs, _ in loader])
    tokens = torch.cat([first, rest[rest > 0]]).tolist()
    assert tokenizer_of(prepared).decode(tokens, skip_special_tokens=False) == text


def test_files_are_documents_and_passages_are_not(tmp_path):
    prepared = corpus(tmp_path / "books", a=PLAY, b=AWKWARD, c="short")
    stream = TokenStream(prepared, prepared.positions("train"), 10)
    whole = tokenizer_of(prepared).decode(stream.read(np.array([0]), len(stream))[0].tolist(), skip_special_tokens=False)
    assert whole == PLAY + END + AWKWARD + END + "short"


def test_a_passage_that_is_missing_or_in_another_split_ends_a_document(tmp_path):
    items = load_items(write(tmp_path / "book", book=PLAY))
    prepared = prepare(split_items(items), Preprocessing(tokenizer="char"))
    positions = prepared.positions("train")
    begins = document_begins(prepared, positions)
    assert 1 < begins.sum() == 1 + (np.diff(positions) > 1).sum()
    stream = TokenStream(prepared, positions, 10)
    assert (stream.read(np.array([0]), len(stream)) == stream.end).sum() == begins.sum() - 1


def test_rows_of_a_table_and_labelled_texts_are_documents_and_classifiers_see_no_end_token():
    items = split_items(load_items("docstrings").head(300))
    for data in (items, items.drop(columns=["label", "group"])):
        prepared = prepare(data, Preprocessing(vocab_size=500))
        stream = make_stream(prepared, "train", 4, context=20).dataset.stream
        assert stream.end == tokenizer_of(prepared).token_to_id(END) and stream.end not in prepared_tokens(prepared)[0]
        assert (stream.read(np.array([0]), stream.total) == stream.end).sum() == prepared.counts["train"]


def test_a_tokenizer_without_a_separator_lays_texts_end_to_end(tmp_path):
    vocabulary = {token: number for number, token in enumerate(["<pad>", *"abcdefghijklmnopqrstuvwxyz "])}
    Tokenizer(models.BPE(vocabulary, [])).save(str(tmp_path / "tokenizer.json"))
    prepared = corpus(tmp_path / "books", tokenizer=str(tmp_path / "tokenizer.json"), a="one two " * 50, b="three four " * 40)
    loader = make_stream(prepared, "train", 1, context=30)
    assert prepared.preprocessing["end_token"] is None and loader.dataset.stream.total == len(loader.dataset.stream) == 840
    for epoch in range(3):
        assert set(targets(loader, range(epoch * 28, epoch * 28 + 28))) == {1}


@pytest.mark.parametrize("context,batch", [(7, 5), (64, 1), (100, 13), (1000, 3)])
def test_every_token_is_a_target_once_an_epoch(tmp_path, context, batch):
    prepared = corpus(tmp_path / "books", a=PLAY[:3000], b=AWKWARD[4900:7000], c="tiny", d="x")
    one, many = (make_stream(prepared, "train", size, context) for size in (1, batch))
    n = len(one.dataset)
    for epoch in range(3):
        assert set(targets(one, range(epoch * n, (epoch + 1) * n))) == {1}
    numbered = np.concatenate([many.rows(step) for step in range(-(-3 * n // many.bs))])[:3 * n]
    assert (numbered == np.concatenate([one.rows(step) for step in range(3 * n)])).all()
    assert sorted(one.rows(0) // context) != sorted(one.rows(n)) and len({int(one.rows(epoch * n)[0]) % context for epoch in range(20)}) > 3


@pytest.mark.parametrize("context,batch", [(7, 5), (100, 13), (100_000, 4)])
def test_validation_asks_for_every_token_but_the_first_once_and_starts_cold(tmp_path, context, batch):
    prepared = corpus(tmp_path / "books", a=PLAY[:3000], b="tiny")
    loader = make_stream(prepared, "train", batch, context, training=False)
    count = targets(loader, range(len(loader)))
    assert count[0] == 0 and (count[1:-1] == 1).all() and count[-1] == 0  # the last one leads round
    starts = np.concatenate([loader.rows(step) for step in range(len(loader))])
    assert (starts == np.arange(len(starts)) * context).all()
    windows = torch.cat([inputs for inputs, _ in loader])
    assert (windows[:-1] > 0).all() and ((windows[-1] > 0).long().diff() <= 0).all()


def test_order_is_a_function_of_seed_and_step(tmp_path):
    prepared = corpus(tmp_path / "books", a=PLAY)
    before = torch.get_rng_state()
    loaders = [make_stream(prepared, "train", 4, 50, seed=seed, round_steps=size) for seed, size in ((0, 3), (0, 1000), (1, 3))]
    for step in (0, 5, 333):
        same, other = (torch.equal(loaders[0].batch(step)[0], loader.batch(step)[0]) for loader in loaders[1:])
        assert same and not other
    rounds = [[inputs for inputs, _ in loaders[0]] for _ in range(3)]
    assert [len(o) for o in rounds] == [3, 3, 3] and loaders[0].step == 9
    assert all(torch.equal(inputs, loaders[1].batch(step)[0]) for step, inputs in enumerate(sum(rounds, [])))
    assert torch.equal(before, torch.get_rng_state())


def test_a_step_counts_when_its_batch_has_been_used(tmp_path):
    loader = make_stream(corpus(tmp_path / "books", a=PLAY), "train", 4, 50, round_steps=3)
    seen = [loader.step for _ in loader]
    assert seen == [0, 1, 2] and loader.step == 3
    for _ in loader:
        break
    assert loader.step == 3
    loader.step = 4
    assert len(list(loader)) == 2 and loader.step == 6 and len(loader) == 3


def test_augmentation_repeats_with_restored_states():
    digits = prepare(split_items(load_items("digits")))
    loader, batches, states = make_stream(digits, "train", 32, views=2, round_steps=4), [], []
    for inputs, _ in loader:
        batches.append(inputs)
        torch.rand(5)  # the model draws as well
        states.append(get_random_states())
    for step in (1, 2, 3):
        torch.manual_seed(99)
        loader.step, loader.pending_states = step, states[step - 1]
        assert torch.equal(next(iter(loader))[0], batches[step]) and loader.pending_states is None


def test_item_ids_name_what_a_batch_holds(tmp_path):
    digits = prepare(split_items(load_items("digits")))
    loader = make_stream(digits, "train", 8, augment="none")
    ids = loader.item_ids(3)
    assert [digits.targets[list(digits.item_ids).index(name)] for name in ids] == loader.batch(3)[1].tolist()
    items = load_items(write(tmp_path / "books", a=PLAY, b=AWKWARD)).assign(split="train")
    prepared = prepare(items, Preprocessing(tokenizer="char"))
    loader, texts, decode = make_stream(prepared, "train", 16, context=5), dict(zip(items["item_id"], items["text"])), tokenizer_of(prepared).id_to_token
    for step in range(40):
        for name, window in zip(loader.item_ids(step), loader.batch(step)[0].tolist()):
            assert decode(window[0]) in (*texts[name], END)


def test_loaders_make_fastai_dataloaders(tmp_path):
    prepared = corpus(tmp_path / "books", a=PLAY)
    dls = DataLoaders(make_stream(prepared, "train", 4, 50, round_steps=3), make_stream(prepared, "train", 8, 50, training=False))
    assert len(list(dls.train)) == 3 and len(list(dls.valid)) == len(dls.valid)
    assert dls.train.one_batch()[0].shape == (4, 51) and dls.train.step == 3


def test_a_stream_takes_no_memory_for_its_tokens(tmp_path):
    prepared = corpus(tmp_path / "books", **{f"b{number}": "green bottles hanging on the wall\n" * 20_000 for number in range(8)})
    size = prepared_tokens(prepared)[0].nbytes
    tracemalloc.start()
    loader = make_stream(prepared, "train", 64, 256)
    loader.batch(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 20 * 2**20 and peak < size / 4


def test_too_little_text_is_said(tmp_path):
    prepared = corpus(tmp_path / "short", a="twenty characters...")
    with pytest.raises(DataError, match="The train texts have 20 tokens, fewer than the 65 of one window; choose a context below 20, or give more text"):
        make_stream(prepared, "train", 4, 64)
    assert make_stream(prepared, "train", 4, 19).batch(0)[0].shape == (2, 20)
    assert make_stream(prepared, "train", 4, 64, training=False).batch(0)[0].shape == (1, 65)
    with pytest.raises(DataError, match="fewer than the 2 of one window"):
        make_stream(corpus(tmp_path / "one", a="x"), "train", training=False)
    with pytest.raises(DataError, match="no valid items"):
        make_stream(prepared, "valid")


def test_empty_files_are_said(tmp_path):
    with pytest.raises(DataError, match="holds no text"):
        load_items(write(tmp_path / "empty", a=""))
    with pytest.raises(DataError, match="Item b.txt:000000 has an empty text"):
        corpus(tmp_path / "half", a=PLAY, b="")


def test_a_text_that_has_no_labels_is_kept_exactly_and_one_that_has_is_stripped():
    items = pd.DataFrame({"item_id": list("abcd"), "text": ["  one\n", "two", "three ", " four"], "label": list("xyxy"), "split": "train"})
    for labels, expected in ((True, ["one", "two", "three", "four"]), (False, items["text"].tolist())):
        prepared = prepare(items if labels else items.drop(columns="label"))
        values, offsets = prepared_tokens(prepared)
        tokenizer = tokenizer_of(prepared)
        assert [tokenizer.decode(values[a:b].tolist()) for a, b in zip(offsets, offsets[1:])] == expected


def test_prepared_folders_from_before_the_end_token_can_be_streamed(tmp_path):
    prepared = corpus(tmp_path / "books", a=PLAY, b=PLAY)
    old = dataclasses.replace(prepared, preprocessing={key: value for key, value in prepared.preprocessing.items() if key != "end_token"})
    assert make_stream(old, "train", 4, 50).dataset.stream.total == 2 * len(PLAY)
