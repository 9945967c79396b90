"""Every widget in a real JupyterLab in Chromium: open, click, see the change, save, restart the kernel, still there."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect, sync_playwright
from test_diff import make, predicted

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--no-sandbox --disable-dev-shm-usage --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --use-fake-ui-for-media-stream --use-fake-device-for-media-stream".split()
NEEDED = os.environ.get("FMNB_BROWSER") == "needed"  # in CI a missing browser is an error
pytestmark = pytest.mark.skipif(not CHROMIUM and not NEEDED, reason="there is no Chromium; install Debian's package `chromium`")
expect.set_options(timeout=30_000)  # a busy machine is no error
NOISE = re.compile(r"favicon|ResizeObserver|404 \(Not Found\).*(translations|static)|Failed to load resource.*(workspaces|lsp)")


class Lab:
    """A JupyterLab, and a page of a browser that looks at it."""

    def __init__(self, url: str, root: Path, page):
        self.url, self.root, self.page, self.errors = url, root, page, []
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" and not NOISE.search(said.text + str(said.location)) else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, name: str, *sources: str) -> None:
        """Open a new notebook with these cells, and run them."""
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), self.root / f"{name}.ipynb")
        self.name = name
        self.visit()
        self.run()

    def visit(self) -> None:
        """Load the notebook's page."""
        self.page.goto(f"{self.url}/lab/tree/{self.name}.ipynb?reset")
        self.page.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell.currentWidget && window.jupyterapp.shell.currentWidget.sessionContext?.session?.kernel?.status === 'idle'", timeout=120_000)

    def run(self) -> None:
        """Run all cells, and wait for the kernel."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_function("() => [...window.jupyterapp.shell.currentWidget.content.widgets].every(cell => cell.model.type !== 'code' || (cell.model.executionCount && cell.model.executionState !== 'running'))", timeout=120_000)

    def save(self) -> dict:
        """Save the notebook; what was saved."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        return nbformat.read(self.root / f"{self.name}.ipynb", as_version=4)

    def restart(self) -> None:
        """Restart the kernel and run all cells, once it has heard all that was clicked."""
        self.ask("")
        self.page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart(); }")
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
        self.run()

    def close_kernel(self) -> None:
        """End the kernel and load the page again: the notebook as a stranger opens it, whose widgets are gone."""
        self.page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.shutdown(); }")
        self.visit()

    def view(self):
        """The live widgets."""
        return self.page.locator(".fmnb-live").last

    def ask(self, source: str) -> str:
        """What the kernel prints for some code."""
        return self.page.evaluate("""async source => { const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const future = kernel.requestExecute({code: source}); let said = ''; future.onIOPub = message => { if (message.header.msg_type === 'stream') said += message.content.text; if (message.header.msg_type === 'error') said += message.content.evalue; };
            await future.done; return said; }""", source)


@pytest.fixture(scope="module")
def server(tmp_path_factory, cache):
    root = tmp_path_factory.mktemp("lab")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"JUPYTER_CONFIG_DIR": str(root / ".config"), "JUPYTER_DATA_DIR": str(root / ".data"), "JUPYTERLAB_SETTINGS_DIR": str(root / ".settings"), "JUPYTERLAB_WORKSPACES_DIR": str(root / ".workspaces")}
    notification = root / ".settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    notification.parent.mkdir(parents=True)
    notification.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}))
    environment = {name: value for name, value in os.environ.items() if name not in ("FMNB_RUN", "FMNB_LIVE")} | settings
    with open(root / "lab.log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=",
                                    "--ServerApp.disable_check_xsrf=True", "--expose-app-in-browser", f"--ServerApp.root_dir={root}"],
                                   cwd=root, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{url}/api/status", timeout=1).close()
            break
        except OSError:
            assert process.poll() is None, (root / "lab.log").read_text()[-2000:]
            time.sleep(0.25)
    yield url, root
    process.terminate()
    process.wait(timeout=20)


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "there is no Chromium, and FMNB_BROWSER says that it is needed"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def lab(server, browser):
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, permissions=["microphone"])
    found, log = Lab(*server, context.new_page()), server[1] / "lab.log"
    before = log.stat().st_size
    yield found
    if folder := os.environ.get("FMNB_SHOTS"):
        found.page.screenshot(path=f"{folder}/{found.name}-1280.png")
        found.page.set_viewport_size({"width": 400, "height": 900})
        found.page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
        found.page.wait_for_timeout(300)
        found.page.screenshot(path=f"{folder}/{found.name}-400.png")
    context.close()
    said = log.read_text()[before:]
    assert found.errors == [] and "Traceback" not in said and "[E " not in said, said


BROWSER = ["from fmnb.data.quality import check\nfrom fmnb.data.source import load_items\nfrom fmnb.explore.browse import Browser, Cleaner\ndigits = load_items('digits')"]


def test_browser(lab):
    lab.open("browser", *BROWSER, "Browser(digits, check(digits), per_page=12)")
    view = lab.view()
    view.locator("select").first.select_option(label="3 (183)")
    view.get_by_text("183 of 1,797 items").wait_for()
    view.get_by_role("button", name="next").click()
    expect(view.locator("input[type=number]")).to_have_value("2")
    expect(view.locator("img:visible")).to_have_count(12)
    lab.save()
    lab.restart()
    lab.view().get_by_text("183 of 1,797 items").wait_for()
    expect(lab.view().locator("input[type=number]")).to_have_value("2")
    assert not lab.page.locator(".fmnb-twin").last.is_visible()


def test_cleaner(lab):
    lab.open("cleaner", *BROWSER, "cleaner = Cleaner(digits, 'decisions.jsonl', per_page=6)\ncleaner")
    lab.view().locator("select").nth(1).select_option(label="drop")
    lab.view().locator("select").nth(2).select_option(label="is 7")
    lab.view().get_by_text("1 dropped, 1 relabelled").wait_for()
    rows = [json.loads(line) for line in (lab.root / "decisions.jsonl").read_text().splitlines()]
    assert [(row["item_id"], row["decision"], row["label"], row["before"]) for row in rows] == [("digits-0000", "drop", "", "0"), ("digits-0001", "relabel", "7", "1")]
    lab.save()
    lab.restart()
    assert [lab.view().locator("select").nth(number).input_value() for number in (1, 2)] == [lab.view().locator("select").nth(number).locator("option", has_text=text).get_attribute("value") for number, text in ((1, "drop"), (2, "is 7"))]
    said = lab.ask("from fmnb.data.decision import apply_decisions, read_decisions\nprint(len(apply_decisions(digits, read_decisions('decisions.jsonl'))[0]))")
    assert said.strip() == "1796"


def test_augmentations(lab):
    lab.open("augmentations", "from fmnb.data.prepare import prepare\nfrom fmnb.data.source import load_items\nfrom fmnb.data.split import split_items\nfrom fmnb.explore.augment import AugmentationPreview\nprepared = prepare(split_items(load_items('digits')))",
             "preview = AugmentationPreview(prepared)\npreview")
    before = lab.view().locator("img").get_attribute("src")
    lab.view().get_by_text("cutout", exact=True).click()
    lab.view().get_by_text("augment = 'affine, cutout'").wait_for()
    assert lab.view().locator("img").get_attribute("src") != before
    lab.save()
    lab.restart()
    lab.view().get_by_text("augment = 'affine, cutout'").wait_for()


def test_picker(lab):
    advice = [dict(candidate=f"{family} default", score=score, low=score - 0.03, high=score + 0.02, seconds=seconds, reason=f"{seconds} seconds.", parameters={"data": "digits", "family": family}) for family, score, seconds in (("cnn", 0.97, 23), ("rnn", 0.96, 60))]
    (lab.root / "select").mkdir()
    (lab.root / "select" / "metrics.json").write_text(json.dumps({"advice": advice}))
    lab.open("picker", "from fmnb.explore.select import ModelPicker\npicker = ModelPicker('select')\npicker")
    lab.view().locator("select").select_option(label="rnn default")
    lab.view().get_by_text("fmnb run finetune -p data digits -p family rnn").wait_for()
    lab.save()
    lab.restart()
    lab.view().get_by_text("fmnb run finetune -p data digits -p family rnn").wait_for()
    assert lab.ask("print(picker.parameters['family'])").strip() == "rnn"


LEARNER = """
from fmnb.explore.monitor import TrainingMonitor
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
rows = [(row, (row[0] > 0).long()) for row in torch.randn(512, 8)]
learn = Learner(DataLoaders.from_dsets(rows, rows, bs=8, num_workers=0, device="cpu"), torch.nn.Linear(8, 2), loss_func=torch.nn.CrossEntropyLoss())
"""


def test_monitor(lab):
    lab.open("monitor", LEARNER)
    lab.page.evaluate("""async source => { const panel = window.jupyterapp.shell.currentWidget; window.jupyterapp.commands.execute('notebook:insert-cell-below');
        panel.content.activeCell.model.sharedModel.setSource(source); window.jupyterapp.commands.execute('notebook:run-cell'); }""",
                      "learn.fit(100_000, cbs=TrainingMonitor('weights', every=0.2))")
    lab.view().get_by_text(re.compile(r"step [\d,]+ of 6,400,000, loss .* items a second, .* left")).wait_for(timeout=60_000)
    lab.view().locator("polyline").nth(1).wait_for(state="attached")
    lab.view().get_by_role("button", name="Save now").click()
    for _ in range(300):
        if list(lab.root.glob("weights/step-*.safetensors")):
            break
        lab.page.wait_for_timeout(100)
    assert list(lab.root.glob("weights/step-*.safetensors"))
    lab.view().get_by_role("button", name="Stop").click()
    lab.view().get_by_text(re.compile("stopped after step")).wait_for(timeout=30_000)
    lab.page.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'", timeout=60_000)
    assert lab.ask("print(learn.epoch < 100_000)").strip() == "True"
    assert "training loss" in json.dumps(lab.save().cells[-1])  # the twin is up to date


def test_errors(lab):
    lab.open("errors", *BROWSER[:1], """
import numpy as np, pandas as pd
from fmnb.explore.errors import ErrorExplorer
items, random = digits[:300], np.random.default_rng(0)
scores = random.dirichlet(np.full(10, 0.3), 300); scores[np.arange(300), items['label'].astype(int)] += random.uniform(0, 1, 300); scores /= scores.sum(axis=1, keepdims=True)
table = pd.DataFrame({'item_id': items['item_id'], 'split': 'test', 'target': items['label'], 'prediction': scores.argmax(axis=1).astype(str)} | {f'score_{name}': scores[:, name] for name in range(10)})
ErrorExplorer(table, items)""")
    cell = lab.view().locator("button[title*=' predicted as ']:not([title$=': 0 items'])").filter(has_not_text=re.compile(r"^\d\d")).first
    target, prediction, count = re.match(r"(\d) predicted as (\d): (\d+) items", cell.get_attribute("title")).groups()
    cell.click()
    said = re.compile(rf"{target} taken for {prediction}: {count} items" if target != prediction else rf"{target}, right: {count} items")
    lab.view().get_by_text(said).wait_for()
    expect(lab.view().locator("img")).to_have_count(min(24, int(count)))
    lab.view().locator(".widget-readout").first.click()
    lab.page.keyboard.press("Control+A")
    lab.page.keyboard.type("0.5")
    lab.page.keyboard.press("Enter")
    lab.view().get_by_text(re.compile(r"^(?!300 )\d+ of 300 items answered")).wait_for()  # the kernel has heard it
    lab.save()
    lab.restart()
    expect(lab.view().locator(".widget-readout").first).to_have_text("0.50")


def test_comparer(lab):
    for number, name in enumerate(("first", "second", "third")):
        make(lab.root / "runs" / name, predicted(number))
    lab.open("comparer", "from fmnb.explore.compare import RunComparer\nRunComparer('runs')")
    lab.view().locator("select").first.select_option(["first", "third"])
    lab.view().get_by_text("second: third").wait_for()
    lab.view().get_by_text("second - first").wait_for()
    lab.save()
    lab.restart()
    lab.view().get_by_text("second: third").wait_for()


@pytest.fixture(scope="module")
def models(server):
    """An untrained model of each modality, as a run leaves one."""
    import numpy as np
    import pandas as pd
    import soundfile
    from io import BytesIO
    from fmnb.data.prepare import Preprocessing, prepare
    from fmnb.data.source import load_items
    from fmnb.data.split import split_items
    from fmnb.model.head import build_model
    from fmnb.model.store import save_model

    def tone(pitch):
        file = BytesIO()
        soundfile.write(file, 0.3 * np.sin(2 * np.pi * pitch * np.arange(8000) / 8000), 8000, format="WAV")
        return file.getvalue()
    sounds = pd.DataFrame({"item_id": [f"tone-{number}" for number in range(60)], "audio": [tone(300 + 10 * number) for number in range(60)], "label": ["low", "high"] * 30})
    for name, items, family in (("image", load_items("digits"), "cnn"), ("text", load_items("docstrings").sample(300, random_state=0), "rnn"), ("audio", sounds, "cnn")):
        prepared = prepare(split_items(items), Preprocessing(vocab_size=1000))
        model = build_model(family, prepared.input_spec, prepared.classes, prepared.preprocessing).eval()
        save_model(model, server[1] / f"models/{name}", prepared.folder / "tokenizer.json" if name == "text" else None)


def test_asking_about_a_picture(lab, models):
    from fmnb.data.source import load_items
    (lab.root / "three.png").write_bytes(load_items("digits")["image"][3])
    lab.open("picture", "from fmnb.data.source import load_items\nfrom fmnb.explore.ask import TryIt", "TryIt('models/image', load_items('digits'))")
    with lab.page.expect_file_chooser() as chooser:
        lab.view().get_by_text("Drop a picture here").click()
    chooser.value.set_files(lab.root / "three.png")
    lab.view().get_by_text("The most similar training items").wait_for(timeout=60_000)
    lab.view().get_by_text("cosine 1.00").first.wait_for()
    lab.save()
    lab.restart()
    lab.view().get_by_text("cosine 1.00").first.wait_for(timeout=60_000)


def test_asking_about_a_text(lab, models):
    lab.open("text", "from fmnb.explore.ask import TryIt\nTryIt('models/text')")
    lab.view().locator("textarea").fill("Return the number of items in the list.")
    lab.view().get_by_role("button", name="Ask").click()
    lab.view().get_by_text(re.compile("confidence")).wait_for()
    lab.save()
    lab.restart()
    lab.view().get_by_text(re.compile("confidence")).wait_for()


def test_asking_about_a_recording(lab, models):
    lab.open("recording", "from fmnb.explore.ask import TryIt\nTryIt('models/audio')")
    lab.view().get_by_role("button", name="Record").click()
    lab.page.wait_for_timeout(1500)
    lab.view().get_by_role("button", name="Stop").click()
    lab.view().get_by_text(re.compile("confidence")).wait_for(timeout=30_000)
    expect(lab.view().locator("audio")).to_have_count(1)


def test_what_is_left_without_a_kernel(lab):
    lab.open("twin", *BROWSER, "Browser(digits, per_page=6)")
    lab.view().locator("img").first.wait_for()
    lab.save()
    lab.close_kernel()
    twin = lab.page.locator(".fmnb-twin").last
    twin.wait_for(state="visible")
    expect(twin.locator("img")).to_have_count(6)
    expect(lab.page.get_by_text(re.compile("Error displaying widget|Loading widget"))).to_be_hidden()
    lab.errors = [error for error in lab.errors if "widget model not found" not in error]
