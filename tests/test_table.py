"""The table of runs, on folders that nobody would wish for: broken, hostile, vanishing, many, and changed by others meanwhile."""
import json
import multiprocessing
import os
import shutil
import sqlite3
import threading
from datetime import datetime
from pathlib import Path

import fmnb.run.table as table_module
import pandas as pd
import pytest
from fmnb.core import ConfigError, RunError, write_json
from fmnb.run.table import COLUMN_TYPES, INDEX, LIMIT, export_runs, format_runs, printable, runs_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

STATUS = {"status": "finished", "started": "2026-11-02T10:00:00+01:00", "updated": "2026-11-02T09:02:30+00:00", "process": 1, "request": "ab"}
CONFIG = {"report": "finetune", "parameters": {"data": "digits", "family": "cnn", "backbone": "name=vit", "recipe": "full", "start_from": "runs/x", "seed": 3}}
METRICS = {"test": {"accuracy": {"value": 0.9, "low": 0.8, "high": 0.95}, "f1_macro": {"value": 0.8}}, "train_seconds": 12.5, "n_parameters": 1000}


def make(folder: Path, status=STATUS, config=CONFIG, metrics=METRICS) -> Path:
    """A Run folder of these contents; bytes are written as they are, None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("status.json", status), ("config.json", config), ("metrics.json", metrics)):
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        elif value is not None:
            (folder / name).write_text(json.dumps(value))
    return folder


def listed(root: Path) -> pd.DataFrame:
    """The table, which must be the same without an index, with a new one and with one that is there."""
    tables = [runs_table(root, index=False), runs_table(root), runs_table(root)]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])
    assert {name: str(kind) for name, kind in tables[0].dtypes.items()} == COLUMN_TYPES
    return tables[0].set_index("run", drop=False)


def test_a_row_says_what_the_folder_says(tmp_path):
    make(tmp_path / "a")
    row = listed(tmp_path).loc["a"]
    assert (row["report"], row["status"], row["data"], row["family"], row["backbone"], row["recipe"], row["start_from"], row["seed"]) == ("finetune", "finished", "digits", "cnn", "name=vit", "full", "runs/x", 3)
    assert (row["seconds"], row["accuracy"], row["f1_macro"], row["train_seconds"], row["n_parameters"]) == (150.0, 0.9, 0.8, 12.5, 1000)
    assert row["started"] == datetime.fromisoformat(STATUS["started"]).astimezone().replace(tzinfo=None) and pd.isna(row["r2"]) and pd.isna(row["error"])


def test_runs_at_any_depth_but_not_inside_a_model(tmp_path):
    for name in ("a", "a/cnn", "b/c/d", "a/model/x", "a/training/x", "a/tracking/x", ".hidden/x", "model/training/deep"):
        make(tmp_path / name)
    assert sorted(listed(tmp_path)["run"]) == ["a", "a/cnn", "b/c/d", "model/training/deep"]
    assert sorted(listed(tmp_path / "a")["run"]) == [".", "cnn"]
    assert not (tmp_path / "a" / INDEX).exists()


def test_the_newest_run_is_first_whatever_its_time_zone(tmp_path):
    for name, started in (("second", "2026-11-02T10:00:00+00:00"), ("first", "2026-11-02T09:30:00-05:00"), ("third", "2026-11-02T10:30:00+01:00"), ("never", "yesterday")):
        make(tmp_path / name, STATUS | {"started": started})
    assert runs_table(tmp_path)["run"].tolist() == ["first", "second", "third", "never"]


def test_partial_runs(tmp_path):
    make(tmp_path / "begun", STATUS | {"status": "running", "process": os.getpid()}, CONFIG, None)
    make(tmp_path / "killed", STATUS | {"status": "running", "process": 2**22 + 1}, None, None)
    make(tmp_path / "stopped", STATUS | {"status": "interrupted", "error": "KeyboardInterrupt"})
    make(tmp_path / "failed", STATUS | {"status": "failed", "error": "ValueError: no"})
    for number, process in enumerate([-1, 0, 2**70, "1", None, 1.5, True]):
        make(tmp_path / f"odd-{number}", STATUS | {"status": "running", "process": process})
    table = listed(tmp_path)
    assert table["status"].to_dict() == {"begun": "running", "killed": "interrupted", "stopped": "interrupted", "failed": "failed"} | {f"odd-{number}": "interrupted" for number in range(7)}
    assert table.loc["failed", "error"] == "ValueError: no" and table.loc["killed", "error"] == "the process ended without a word"
    assert table["seconds"].isna().all()


BROKEN = {
    "list": (b"[]", "holds no JSON object"), "text": (b'"a"', "holds no JSON object"), "nothing": (b"", "not valid JSON"), "half": (b'{"status": "fin', "not valid JSON"),
    "binary": (b"\xff\xfe\x00\xd8", "not valid JSON"), "deep": (b"[" * 200_000, "not valid JSON"), "number": (b'{"status": ' + b"9" * 5000 + b"}", "not valid JSON")}


@pytest.mark.parametrize("file", ["status.json", "config.json", "metrics.json"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_makes_the_run_unreadable(kind, file, tmp_path):
    content, reason = BROKEN[kind]
    (make(tmp_path / "a") / file).write_bytes(content)
    row = listed(tmp_path).loc["a"]
    assert row["status"] == "unreadable" and row["error"] == f"{file} {reason}" if reason.startswith("holds") else f"{file} is {reason}"
    assert pd.isna(row["accuracy"]) == (file == "metrics.json") and pd.isna(row["data"]) == (file == "config.json")


@pytest.mark.parametrize("file", ["status.json", "config.json", "metrics.json"])
def test_a_huge_file_is_not_read(file, tmp_path):
    with open(make(tmp_path / "a") / file, "wb") as opened:
        opened.truncate(LIMIT + 1)  # takes no room
    row = listed(tmp_path).loc["a"]
    assert row["status"] == "unreadable" and row["error"] == f"{file} has 20 MB and is not read above 20"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_not_opened(tmp_path):
    """A pipe would block for ever, a link may point anywhere."""
    for name in ("pipe", "link", "folder"):
        (make(tmp_path / name) / "config.json").unlink()
    os.mkfifo(tmp_path / "pipe" / "config.json")
    (tmp_path / "link" / "config.json").symlink_to("/dev/zero")
    (tmp_path / "folder" / "config.json").mkdir()
    table = listed(tmp_path)
    assert (table["status"] == "unreadable").all() and (table["error"] == "config.json is not a regular file").all()


def test_links_are_not_followed(tmp_path):
    make(tmp_path / "outside" / "secret")
    make(tmp_path / "runs" / "a")
    for name, target in (("loop", tmp_path / "runs"), ("out", tmp_path / "outside"), ("a/self", tmp_path / "runs" / "a"), ("dangling", "no/such")):
        (tmp_path / "runs" / name).symlink_to(target, target_is_directory=True)
    assert listed(tmp_path / "runs")["run"].tolist() == ["a"]


def test_values_of_other_kinds_are_left_out(tmp_path):
    odd = {"test": {"accuracy": {"value": float("nan")}, "precision_macro": {"value": "0.9"}, "recall_macro": {"value": True}, "f1_macro": {"value": float("inf")},
                    "r2": 0.5, "f1_micro": {"value": 10**400}, "spearman": {"value": None}, "hamming_loss": []}, "train_seconds": "long", "n_parameters": 2**70}
    make(tmp_path / "a", STATUS | {"started": 5, "updated": [], "error": {"a": 1}}, {"report": ["x"], "parameters": {"data": 5, "family": None, "recipe": ["a"], "seed": 1.5, "backbone": {}}}, odd)
    make(tmp_path / "b", STATUS, {"parameters": [1], "report": 5}, {"test": "good"})
    make(tmp_path / "c", STATUS | {"status": 5})
    table = listed(tmp_path)
    for name in ("a", "b"):
        assert table.loc[name].drop(["run", "status", "started", "seconds"] if name == "b" else ["run", "status"]).isna().all()
    assert table["status"].to_dict() == {"a": "finished", "b": "finished", "c": "unreadable"}


def test_another_program_s_status_is_no_run(tmp_path):
    make(tmp_path / "thesis", {"ok": True})
    assert listed(tmp_path).empty


def test_a_newer_version_is_listed_with_a_note(tmp_path):
    make(tmp_path / "new", STATUS | {"format": 99})
    make(tmp_path / "known", STATUS | {"format": 1})
    make(tmp_path / "odd", STATUS | {"format": "2.0"})
    table = listed(tmp_path)
    assert table.loc["new", "error"] == "written by a newer fmnb (format 99, known is 1)" and table.loc["new", "accuracy"] == 0.9
    assert table.loc["known", "error"] != table.loc["known", "error"] and (table["status"] == "finished").all()


NASTY = ["<script>alert(1)</script>", "two\nlines", "\x1b[31mred\x1b[0m", "a\tb\r", "\u202egnirts", "Größe 大", "=1+1", "a'b\"c", "x" * 200]


def test_names_and_values_are_printed_harmlessly(tmp_path):
    for name in NASTY:
        config = {"report": name, "parameters": CONFIG["parameters"] | {"data": name, "family": name}}
        make(tmp_path / name, STATUS | {"error": name, "status": "failed"}, config)
    (tmp_path / os.fsdecode(b"not \xff utf-8")).mkdir()
    make(tmp_path / os.fsdecode(b"not \xff utf-8"))
    table = listed(tmp_path)
    assert len(table) == len(NASTY) + 1 and {r"two\nlines", r"\x1b[31mred\x1b[0m", "Größe 大"} <= set(table["data"])
    text = format_runs(table)
    assert all(line.isprintable() for line in text.split("\n")) and len(text.split("\n")) == len(table) + 1
    assert "<script>" not in table._repr_html_() and "&lt;script&gt;" in table._repr_html_()
    for suffix in (".csv", ".parquet", ".json"):
        export_runs(table, tmp_path / f"out{suffix}")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out.parquet"), table.reset_index(drop=True))


def test_folders_that_vanish_while_it_reads(tmp_path, monkeypatch):
    for number in range(6):
        make(tmp_path / f"run-{number}")
    read, gone = table_module._read_object, []

    def reading(file, found):
        if "run-3" in file and not gone:
            gone.append(shutil.rmtree(tmp_path / "run-3"))
        return read(file, found)

    monkeypatch.setattr(table_module, "_read_object", reading)
    assert sorted(runs_table(tmp_path)["run"]) == [f"run-{number}" for number in (0, 1, 2, 4, 5)]
    scan = os.scandir

    def scanning(folder):
        if Path(folder).name == "run-4":
            raise FileNotFoundError(folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scanning)
    assert sorted(runs_table(tmp_path)["run"]) == [f"run-{number}" for number in (0, 1, 2, 5)]


def reads(monkeypatch) -> list[str]:
    """The files that are read from now on."""
    names, read = [], table_module._read_object
    monkeypatch.setattr(table_module, "_read_object", lambda file, found: names.append(file) or read(file, found))
    return names


def test_the_index_saves_reading_what_has_not_changed(tmp_path, monkeypatch):
    for number in range(5):
        make(tmp_path / f"run-{number}")
    first, names = runs_table(tmp_path), reads(monkeypatch)
    pd.testing.assert_frame_equal(runs_table(tmp_path), first)
    assert names == []
    write_json(tmp_path / "run-1" / "metrics.json", {"test": {"accuracy": {"value": 0.1}}})
    (tmp_path / "run-2" / "config.json").unlink()
    shutil.rmtree(tmp_path / "run-3")
    make(tmp_path / "run-9")
    table = runs_table(tmp_path).set_index("run")
    assert sorted({Path(name).parent.name for name in names}) == ["run-1", "run-2", "run-9"]
    assert table.loc["run-1", "accuracy"] == 0.1 and pd.isna(table.loc["run-2", "data"]) and "run-3" not in table.index and "run-9" in table.index
    names.clear()
    runs_table(tmp_path, index=False)
    assert len(names) == 15


def test_a_run_that_ends_is_seen_though_its_status_is_in_the_index(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=print)
    process.start()
    make(tmp_path / "a", STATUS | {"status": "running", "process": os.getpid()})
    make(tmp_path / "b", STATUS | {"status": "running", "process": process.pid})
    runs_table(tmp_path)
    process.join()
    assert runs_table(tmp_path).set_index("run")["status"].to_dict() == {"a": "running", "b": "interrupted"}


def garbage(file):
    file.write_bytes(b"SQLite format 3\0" + os.urandom(4096))


def other_version(file):
    with sqlite3.connect(file) as index:
        index.execute("PRAGMA user_version = 99")
    index.close()


def other_contents(file):
    with sqlite3.connect(file) as index:
        for facts in ("no JSON", "[]", '{"facts": 5}', 7, None, b"\xff"):
            index.execute("UPDATE runs SET facts = ? WHERE run = (SELECT run FROM runs WHERE facts LIKE '%finetune%' LIMIT 1)", (facts,))
    index.close()


def other_tables(file):
    with sqlite3.connect(file) as index:
        index.execute("ALTER TABLE runs RENAME TO walks")
    index.close()


def cut(file):
    file.write_bytes(file.read_bytes()[:5000])


@pytest.mark.parametrize("harm", [garbage, other_version, other_contents, other_tables, cut, Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_harmed_index_is_made_anew(harm, tmp_path, monkeypatch):
    for number in range(20):
        make(tmp_path / f"run-{number}")
    before = runs_table(tmp_path)
    harm(tmp_path / INDEX)
    pd.testing.assert_frame_equal(runs_table(tmp_path), before)
    names = reads(monkeypatch)
    pd.testing.assert_frame_equal(runs_table(tmp_path), before)
    assert names == []


def test_a_folder_that_cannot_be_written_is_listed_all_the_same(tmp_path, monkeypatch):
    make(tmp_path / "a")
    (tmp_path / INDEX).mkdir()
    assert runs_table(tmp_path)["run"].tolist() == ["a"]
    (tmp_path / INDEX).rmdir()

    def refuse(path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(table_module, "atomic_path", refuse)
    assert runs_table(tmp_path)["run"].tolist() == ["a"] and os.listdir(tmp_path) == ["a"]


def test_an_index_that_is_a_link_harms_nobody(tmp_path):
    make(tmp_path / "runs" / "a")
    (tmp_path / "diary.txt").write_text("mine")
    (tmp_path / "runs" / INDEX).symlink_to(tmp_path / "diary.txt")
    assert runs_table(tmp_path / "runs")["run"].tolist() == ["a"]
    assert (tmp_path / "diary.txt").read_text() == "mine"


def test_no_runs_no_index(tmp_path):
    (tmp_path / "photos").mkdir()
    assert runs_table(tmp_path).empty and os.listdir(tmp_path) == ["photos"]


def test_many_listings_while_runs_come_and_go(tmp_path):
    """Eight threads list while a ninth makes, changes and deletes runs: none fails, and in the end all agree."""
    for number in range(30):
        make(tmp_path / f"old-{number}")
    errors, ready = [], threading.Event()

    def list_often():
        try:
            while not ready.is_set():
                assert {f"old-{number}" for number in range(30)} <= set(runs_table(tmp_path)["run"])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=list_often) for _ in range(8)]
    for thread in threads:
        thread.start()
    for number in range(40):
        make(tmp_path / f"new-{number % 5}", STATUS | {"error": "x" * number})
        if number % 3 == 0:
            shutil.rmtree(tmp_path / f"new-{number % 5}")
    ready.set()
    for thread in threads:
        thread.join()
    assert errors == []
    pd.testing.assert_frame_equal(runs_table(tmp_path), runs_table(tmp_path, index=False))
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == [INDEX]


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
    ["status", "started", "updated", "process", "error", "format", "parameters", "data", "seed", "report", "test", "accuracy", "value", "train_seconds"]) | st.text(), inner, max_size=4), max_leaves=12)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VALUES, VALUES, VALUES, st.binary(max_size=20))
def test_whatever_the_files_hold_there_is_a_table(tmp_path, status, config, metrics, rubbish):
    for name, contents in (("odd", (status, config, metrics)), ("good", (STATUS, CONFIG, METRICS)), ("half", (STATUS, config, rubbish)), ("dict", ({"status": status} | (status if isinstance(status, dict) else {}), config, metrics))):
        make(tmp_path / name, *contents)
    table = listed(tmp_path)
    assert table.loc["good", "accuracy"] == 0.9 and {"half", "dict"} <= set(table.index)
    assert all(line.isprintable() for line in format_runs(table).split("\n"))


@given(st.text())
def test_printable_text_is_printable_and_the_rest_is_left_alone(text):
    assert printable(text).isprintable() and (not text.isprintable() or len(text) > 1000 or printable(text) == text)
    printable(text).encode("utf-8")


@pytest.fixture
def three(tmp_path):
    for name, family, accuracy, error in (("a", "cnn", 0.9, 0.1), ("b", "rnn", 0.7, 0.3), ("c", "cnn", None, 0.2)):
        test = {"accuracy": {"value": accuracy}, "mean_absolute_error": {"value": error}}
        make(tmp_path / name, STATUS, {"report": "finetune", "parameters": {"family": family, "seed": None if accuracy is None else 1}}, {"test": test})
    return tmp_path


@pytest.mark.parametrize("where,found", [("family == 'cnn'", "ac"), ("accuracy > 0.8", "a"), ("accuracy != accuracy", "c"), ("not (family == 'cnn')", "b"), ("seed == 1", "ab"), ("seed in [1, 2]", "ab"),
                                         ("run.str.contains('[ab]')", "ab"), ("started > '2026-11-01' and started < '2026-11-03'", "abc"), ("r2 > 0", ""), ("status == 'finished' and mean_absolute_error < 0.25", "ac"), ("start_from == ''", "")])
def test_where(where, found, three):
    assert sorted(runs_table(three, where)["run"]) == list(found)


@pytest.mark.parametrize("where", ["famly == 'cnn'", "accuracy >", "accuracy > 'a'", "accuracy", "accuracy = 1", "1", "@os.system('true')", "import os", "run.nothing()", "__import__('os')", "accuracy > 0.5; 1", "a" * 10_000])
def test_a_wrong_condition_lists_the_columns(where, three):
    with pytest.raises(ConfigError, match="The columns are run, report, status, data"):
        runs_table(three, where)


@pytest.mark.parametrize("sort,order", [("accuracy", "abc"), ("-accuracy", "bac"), ("mean_absolute_error", "acb"), ("-mean_absolute_error", "bca"), ("family", "acb"), ("-run", "cba")])
def test_sort(sort, order, three):
    assert "".join(runs_table(three, sort=sort)["run"]) == order


def test_a_wrong_column_to_sort_by_is_refused(three):
    with pytest.raises(ConfigError, match="There is no column 'acuracy' to sort by. Did you mean 'accuracy'"):
        runs_table(three, sort="-acuracy")


def test_export(three, tmp_path):
    table = runs_table(three)
    for name in ("x/out.csv", "out.JSON", "out.parquet"):
        assert export_runs(table, tmp_path / name).exists()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out.parquet"), table)
    assert list(pd.read_csv(tmp_path / "x" / "out.csv")) == list(COLUMN_TYPES)
    assert json.loads((tmp_path / "out.JSON").read_text())[0].keys() == COLUMN_TYPES.keys()
    with pytest.raises(ConfigError, match=r"ends in .csv, .parquet, .json, not to 'out'"):
        export_runs(table, tmp_path / "out")
    with pytest.raises(RunError, match="cannot be written"):
        export_runs(table, tmp_path / "out.parquet" / "below.csv")


def test_an_empty_table_can_be_printed_and_exported(tmp_path):
    table = runs_table(tmp_path / "nothing", "accuracy > 0.9", "accuracy")
    assert table.empty and list(table) == list(COLUMN_TYPES)
    assert len(pd.read_csv(export_runs(table, tmp_path / "empty.csv"))) == 0
    assert isinstance(format_runs(table), str)
