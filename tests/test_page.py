"""The page of a run: what a reader gets of all kinds of outputs, whole and harmless, and how its tables sort in a browser."""
import base64
import hashlib
import io
import json
import re
import shutil
import subprocess

import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from fmnb.run.page import write_html
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

HOSTILE = "<script>alert(1)</script>"
WIDGET = "application/vnd.jupyter.widget-view+json"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><title>a</title></svg>'
WAV = "data:audio/wav;base64,UklGRiQAAABXQVZF"


def png() -> str:
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 900), dtype=np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def shown(**data: str):
    """A display of several forms; the first underscore of a name stands for a slash."""
    return new_output("display_data", {name.replace("_", "/", 1): form for name, form in data.items()})


def cell(source, *outputs, **metadata):
    return new_code_cell(source, outputs=list(outputs), metadata=metadata)


def page_of(folder, *cells) -> BeautifulSoup:
    nbformat.write(new_notebook(cells=list(cells), metadata={"widgets": {"application/vnd.jupyter.widget-state+json": {"state": {"a": {}}}}}), folder / "report.ipynb")
    write_html(folder / "report.ipynb", folder / "report.html")
    return BeautifulSoup((folder / "report.html").read_text(encoding="utf-8"), "html.parser")


SCORES = pd.DataFrame({"recall": ["0.953 [0.931, 0.970]", "0.1 [0, 1]", "nan", "1"], "items": ["1,234", "56", "", "7"], "share": ["12 %", "3 %", "100 %", "5.5 %"],
                       "note": ["item 10", "item 9", "item 1", "x"]}, index=pd.Index([HOSTILE, "b", "c", "d"], name="class"))

STYLED = SCORES.style.set_uuid("table").format(escape="html").format_index(escape="html")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a report with all kinds of outputs."""
    stream = [new_output("stream", name="stderr", text="UserWarning: slow\n"), new_output("stream", text="start\n\r 10%|# | 1/10 [00:01<00:09,  1.0it/s]"),
              new_output("stream", text="\r100%|##| 10/10 [00:02<00:00,  5.0it/s]\n\x1b[1;31mloss\x1b[0m 0.5\rloss 0.1\n"), new_output("stream", text=HOSTILE)]
    error = new_output("error", ename="ValueError", evalue=f"class {HOSTILE}", traceback=["-" * 75, "\x1b[0;31mValueError\x1b[0m  (most recent call last)", f"ValueError: class {HOSTILE}"])
    figure = shown(image_png=png(), text_plain="<Figure size 640x480>")
    titled = new_output("display_data", {"image/png": png()}, metadata={"image/png": {"title": 'Losses "by" epoch', "width": 450}})
    progress = {WIDGET: {"model_id": "a"}, "text/plain": "HBox(children=(FloatProgress(value=0.0), HTML(value='')))"}
    return page_of(
        tmp_path_factory.mktemp("page"),
        new_markdown_cell("An Exception was encountered", metadata={"tags": ["papermill-error-cell-tag"]}),
        new_markdown_cell("# Report on `<digits>` & more\n\n> What it answers."),
        new_markdown_cell("## Parameters"),
        cell("epochs: int = 3  # passes", tags=["parameters"]), cell("# Parameters\nepochs = 1", tags=["injected-parameters"]), cell("   "),
        new_markdown_cell("## Data\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n```python\nx = 1\n```\n\n![badge](https://example.org/badge.png) and [a link](https://example.org)"),
        cell("fit()", *stream, new_output("execute_result", {"text/plain": f"['{HOSTILE}']"})),
        cell("table", shown(text_html=SCORES.to_html(), text_plain="table"), shown(text_html=STYLED.to_html()),
             shown(text_html=STYLED.to_html())),
        new_markdown_cell("## Training\n\n### Losses"),
        cell("plot", figure, titled, new_output("display_data", {"image/svg+xml": SVG}), shown(image_jpeg=png())),
        cell("play", shown(text_html=f'<audio controls><source src="{WAV}" type="audio/wav"></audio>')),
        new_markdown_cell("# Data"),
        cell("widgets", new_output("display_data", {WIDGET: {"model_id": "a"}, "text/html": "<b>static twin</b>", "text/plain": "VBox()"}),
             new_output("display_data", {WIDGET: {"model_id": "a"}, "text/plain": "IntSlider(value=7)"}), new_output("display_data", {WIDGET: {"model_id": "a"}}),
             new_output("display_data", progress), shown(text_html="<script src='https://cdn.example.org/x.js'></script>", text_plain="<IPython.core.display.HTML object>"),
             shown(text_html=f'<div>plot</div><script>{"x" * 100_000}</script><link rel="stylesheet" href="https://example.org/x.css">'),
             new_output("display_data", {"application/javascript": "alert(1)", "text/plain": "<IPython.core.display.Javascript object>"})),
        new_markdown_cell("stopped here", metadata={"tags": ["papermill-error-cell-tag"]}),
        cell("fail()", error))


def texts(page, selector):
    return [element.get_text() for element in page.select(selector)]


def test_it_is_a_document(page):
    assert page.html["lang"] == "en" and page.title.text == "Report on <digits> & more"
    assert texts(page, "h1") == ["Report on <digits> & more"]
    assert [(heading.name, heading["id"]) for heading in page.select("h2, h3")] == [
        ("h2", "Parameters"), ("h2", "Data"), ("h2", "Training"), ("h3", "Losses"), ("h2", "Data-2")]
    ids = [element["id"] for element in page.find_all(id=True)]
    assert len(ids) == len(set(ids))


def test_contents_lead_to_every_heading(page):
    links = page.select("nav a")
    assert [link.text for link in links] == ["Parameters", "Data", "Training", "Losses", "Data"]
    assert all(page.find(id=link["href"][1:]).name == link.parent["class"][0] for link in links)


def test_nothing_is_fetched_and_only_its_own_script_runs(page):
    assert not [element for element in page.find_all(src=True) if not element["src"].startswith("data:")]
    assert not page.find_all(["link", "iframe", "object", "embed", "base"])
    assert "@import" not in page.style.text and "url(" not in page.style.text
    scripts, policy = page.find_all("script"), page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    digest = base64.b64encode(hashlib.sha256(scripts[0].string.encode()).digest()).decode()
    assert len(scripts) == 1 and f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    assert page.find("a", string="badge")["href"] == "https://example.org/badge.png"


def test_only_parameters_show_their_code(page):
    code = [(element.text, element.find_parent("details") is not None) for element in page.select("code.python")]
    assert code[:2] == [("epochs: int = 3  # passes", False), ("# Parameters\nepochs = 1", False)]
    assert [source for source, folded in code if folded] == ["fit()", "table", "plot", "play", "widgets", "fail()"]
    assert page.select("code.python span.c1") and not page.select("details[open]")


def test_warnings_and_progress_are_gone(page):
    text = page.main.text
    for debris in ("UserWarning", "it/s", "10%|", "\r", "\x1b", "FloatProgress", "object>", "An Exception was encountered", "stopped here", "xxxx", "-----"):
        assert debris not in text, debris
    assert f"start\nloss 0.1\n{HOSTILE}" in texts(page, "pre")


def test_names_stay_text(page):
    assert f"['{HOSTILE}']" in texts(page, ".output pre")
    assert texts(page, ".table tbody th").count(HOSTILE) == 3
    assert HOSTILE in page.find("pre", "error").text and HOSTILE in page.find("p", "failed").text


def test_a_failure_is_told_at_the_top_and_shown_once(page):
    assert page.main.find(True)["class"] == ["failed"]
    assert page.find(id=page.select_one(".failed a")["href"][1:]) is page.find("pre", "error")
    assert page.main.text.count("most recent call last") == 1


def test_widgets_are_static(page):
    assert texts(page, ".output > b") == ["static twin"]
    assert "IntSlider(value=7)" in texts(page, ".output pre")
    assert sum("interactive view" in text for text in texts(page, ".output pre")) == 1
    assert all(output.get_text(strip=True) or output.find(["img", "audio"]) for output in page.select(".output"))


def test_figures_have_texts_and_sound_plays(page):
    images = page.find_all("img")
    assert [image["alt"] for image in images] == ["Figure 1: Losses", 'Losses "by" epoch', "Figure 2: Losses", "Figure 3: Losses"]
    assert images[1]["width"] == "450" and base64.b64decode(images[2]["src"].split(",")[1]).decode() == SVG
    assert page.audio.source["src"] == WAV


def test_tables_scroll_on_their_own(page):
    tables = page.find_all("table")
    assert len(tables) == 4 and all(table.parent["class"] == ["table"] for table in tables)
    assert texts(tables[1], "thead th") == ["class", "recall", "items", "share", "note"] and not tables[1].has_attr("border")


def test_own_overhead_is_small(page):
    assert len(str(page)) - len(str(page.main)) < 20_000


def test_a_report_without_headings(tmp_path):
    page = page_of(tmp_path, cell("1", new_output("execute_result", {"text/plain": "1"})), cell("2", shown(image_png=png())))
    assert page.title.text == "report" and texts(page, "h1") == ["report"] and page.nav is None and page.img["alt"] == "Figure 1"


def test_images_of_prose_are_embedded(tmp_path):
    (tmp_path / "dot.png").write_bytes(base64.b64decode(png()))
    attached = new_markdown_cell("![inside](attachment:a.png)", attachments={"a.png": {"image/png": png()}})
    page = page_of(tmp_path, new_markdown_cell("# Title\n\n![dot](dot.png)\n\n![gone](gone.png)"), attached)
    assert [(image["alt"], image["src"].split(",")[1] == png()) for image in page.find_all("img")] == [("dot", True), ("inside", True)]
    assert "gone" in page.main.text


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
CLICKS = """
const seen = [];
for (const table of document.querySelectorAll("table.dataframe"))
  [...table.tHead.rows[0].cells].forEach((cell, place) => {
    for (let click = 0; click < 3; click++) {
      cell.querySelector("button")?.click();
      seen.push([cell.getAttribute("aria-sort"), ...[...table.tBodies[0].rows].map(row => row.cells[place].textContent)]);
    }
  });
document.title = JSON.stringify(seen);
"""


def clicked(folder, *tables):
    """What the columns of tables show after the first, second and third click on each header, and the page afterwards."""
    page_of(folder, new_markdown_cell("# Sorted"), cell("tables", *(shown(text_html=table.to_html()) for table in tables)))
    html = (folder / "report.html").read_text(encoding="utf-8")
    html = re.sub("<meta http-equiv.*?>", "", html, flags=re.DOTALL).replace("</body>", f"<script>{CLICKS}</script></body>")  # its policy would refuse the clicks
    (folder / "clicked.html").write_text(html, encoding="utf-8")
    dumped = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                             f"--user-data-dir={folder / 'profile'}", "--dump-dom", f"file://{folder / 'clicked.html'}"], capture_output=True, text=True, timeout=120)
    page = BeautifulSoup(dumped.stdout, "html.parser")
    return json.loads(page.title.text), page


@pytest.mark.skipif(not BROWSER, reason="there is no Chromium")
def test_tables_sort_in_a_browser(tmp_path):
    seen, page = clicked(tmp_path, SCORES)
    recall, items, share, note = (seen[start:start + 3] for start in (3, 6, 9, 12))
    assert recall == [["ascending", "0.1 [0, 1]", "0.953 [0.931, 0.970]", "1", "nan"], ["descending", "1", "0.953 [0.931, 0.970]", "0.1 [0, 1]", "nan"],
                      [None, "0.953 [0.931, 0.970]", "0.1 [0, 1]", "nan", "1"]]
    assert items[:2] == [["ascending", "7", "56", "1,234", ""], ["descending", "1,234", "56", "7", ""]]
    assert share[0][1:] == ["3 %", "5.5 %", "12 %", "100 %"] and note[0][1:] == ["item 1", "item 9", "item 10", "x"]
    assert [cell.get("class") for cell in page.select("tbody tr:first-child > *")] == [None, ["num"], ["num"], ["num"], None]


@pytest.mark.skipif(not BROWSER, reason="there is no Chromium")
def test_rows_that_share_a_cell_sort_on_their_own(tmp_path):
    index = pd.MultiIndex.from_product([["digits", "words"], ["cnn", "rnn"]], names=["data", "family"])
    seen, page = clicked(tmp_path, pd.DataFrame({"F1": [0.9, 0.7, 0.8, 0.6]}, index=index))
    assert seen[6] == ["ascending", "0.6", "0.7", "0.8", "0.9"] and seen[8] == [None, "0.9", "0.7", "0.8", "0.6"]
    assert [[cell.text for cell in row.find_all(["th", "td"])] for row in page.select("tbody tr")] == [
        ["digits", "cnn", "0.9"], ["digits", "rnn", "0.7"], ["words", "cnn", "0.8"], ["words", "rnn", "0.6"]]
