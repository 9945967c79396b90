"""The site: notebooks become pages, code in texts becomes links, and every link leads somewhere."""
import ast
import builtins
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import nbformat
import pytest
from conftest import MODULES, NOTEBOOKS, ROOT, code_cells, notebook_id

sys.path.append(str(ROOT / "docs"))

from api import Module, Writer, arguments, escape, names_of, read_modules  # noqa: E402
from check import check_site, read_facts  # noqa: E402
from mend import valid_html  # noqa: E402
from pages import Links, Page, figure_text, make_page, navigation, read_page, rooms  # noqa: E402

SOURCE = '''"""A module."""
__all__ = ["LIMITS", "Box", "Full", "BoxError", "fill"]
LIMITS = {"cnn": 1}  # most items
@dataclass(frozen=True)
class Box:
    "What is in a box."
    size: int = 1   # items, at least 1
    names: tuple[str, ...] = ()
    def open(self) -> list[str]:
        "Its contents."
class Full(nn.Module):
    "A network."
    def __init__(self, width: int):
        pass
    def forward(self, x): pass
class BoxError(ValueError):
    "Too many."
def fill(
    box: Box | None,     # an empty one, as from `Box`
    *items: str,         # in [0, 2**32)
    train: bool = True,  # for the split `train`
) -> "Box":              # the same, full
    "Fill `box`; raises `BoxError`."
def _private(): pass
'''


def cells(*sources: str):
    """A notebook; what starts with `md:` is markdown, the rest code."""
    new = nbformat.v4
    return new.new_notebook(cells=[new.new_markdown_cell(source[3:]) if source.startswith("md:") else new.new_code_cell(source) for source in sources])


@pytest.fixture
def links():
    pages = [Page(PurePosixPath("index.ipynb"), "toy"),
             Page(PurePosixPath("10_data.box.ipynb"), "Boxes", "What holds items.", module="toy.data.box"),
             Page(PurePosixPath("05_core.ipynb"), "Core", "What all need.", module="toy.core"),
             Page(PurePosixPath("reports/20_fill.ipynb"), "Filling", "How full?", parameters=frozenset({"Box"}))]
    modules = {"toy.data.box": Module("toy.data.box", SOURCE), "toy.core": Module("toy.core", '__all__ = ["hash_of"]\ndef hash_of(): pass\n')}
    return Links(pages, modules, "https://toy.example/")


def test_every_module_is_read():
    modules = read_modules(ROOT, "fmnb")
    assert len(modules) > 60 and "fmnb.core" in modules
    for module in modules.values():
        listed = re.search(r"__all__ = (\[.*?\])", module.source, re.DOTALL)[1]
        assert list(module.public) == eval(listed)
        for name in module.public:
            assert Writer(module).entry(name).startswith("```")


def test_arguments_are_read_with_their_comments():
    module = Module("toy.data.box", SOURCE)
    rows = arguments(module.public["fill"], module.comments)
    assert [(row.name, row.type, row.default) for row in rows] == [("box", "Box | None", ""), ("*items", "str", ""), ("train", "bool", "True"), ("", "Box", "")]
    assert [row.meaning for row in rows] == ["an empty one, as from `Box`", "in [0, 2**32)", "for the split `train`", "the same, full"]


def test_a_comment_belongs_to_the_last_on_its_line():
    module = Module("m", "def f(a, b=1,  # two\n  c=(1,\n 2)) -> int:  # result\n  pass\ndef g(a: int):  # both\n  pass\n")
    f, g = module.tree.body
    assert [row.meaning for row in arguments(f, module.comments)] == ["", "two", "", "result"]
    assert arguments(g, module.comments)[0].meaning == "both"


def test_entries_have_signatures_tables_and_methods():
    writer = Writer(Module("toy.data.box", SOURCE))
    entry = writer.entry("fill")
    assert entry.startswith("````{py:function} fill(box, *items, train=True) -> Box\n")
    assert r"| `box` | `Box \| None` |" in entry and r"2\*\*32" in entry and "| *returns* | `Box` |  | the same, full |" in entry
    box = writer.entry("Box")
    assert box.startswith("````{py:class} Box\n") and "| `size` | `int` | `1` | items, at least 1 |" in box and "```{py:method} open() -> list[str]" in box
    assert "{py:class} Full(width: int)" in writer.entry("Full") and "Based on `nn.Module`." in writer.entry("Full")
    assert writer.entry("BoxError").startswith("```{py:exception} BoxError\n")
    assert ":value: {'cnn': 1}" in writer.entry("LIMITS") and "most items" in writer.entry("LIMITS")


def test_plain_text_is_safe_as_markdown():
    assert escape("a * b < `c * d`") == r"a \* b \< `c * d`"


@pytest.mark.parametrize("text, page, expected", [
    ("`fill`", 0, "[`fill`](/reports/fill.ipynb)"),                              # outside of the modules a report's name is the report
    ("`fill`", 2, "{py:obj}`fill <toy.data.box.fill>`"),
    ("the report `fill`", 2, "the report [`fill`](/reports/fill.ipynb)"),
    ("`fill()`", 1, "{py:obj}`fill() <toy.data.box.fill>`"),
    ("`Box.open`", 0, "{py:obj}`Box.open <toy.data.box.Box.open>`"),
    ("`toy.data.box.Box`", 0, "{py:obj}`toy.data.box.Box <toy.data.box.Box>`"),
    ("`Box`", 3, "`Box`"),                                                       # a parameter of this report
    ("`_private` and `train`", 1, "`_private` and `train`"),
    ("`10_data.box` or `toy.core`", 0, "[`10_data.box`](/data.box.ipynb) or [`toy.core`](/core.ipynb)"),
    ("[`Box`](https://toy.example/data.box.html#box)", 0, "{py:obj}`Box <toy.data.box.Box>`"),
    ("[`_private`](https://toy.example/data.box.html#_private)", 0, "`_private`"),
    ("`train`", 2, "`train`"),
    ("[core](../05_core.ipynb#hashes)", 3, "[core](/core.ipynb#hashes)"),
    ("[`Box`](https://elsewhere.example)", 0, "[`Box`](https://elsewhere.example)"),
    ("# `Box`\n```\n`Box`\n```\n    `Box`", 0, "# `Box`\n```\n`Box`\n```\n    `Box`"),
    ("$`Box`$", 0, "$`Box`$"),
])
def test_code_is_linked_to_what_it_names(links, text, page, expected):
    assert links.text(text, links.pages[page]) == expected


def test_a_page_has_its_title_back_and_entries_for_what_it_exports(links):
    processed = cells("md:<!-- WARNING -->", "md:## Filling\nA box of `hash_of`:", "#| echo: false\n#| output: asis\nshow_doc(fill)", "#| eval: false\nplot_box(1)", "md:### Rest")
    page = make_page(processed, links.pages[1], links, "https://git.example/10_data.box.ipynb")
    first, prose, entry, drawn, _, rest = page.cells
    assert first.source.startswith("# Boxes\n\n> What holds items.") and "{py:module} toy.data.box" in first.source
    assert "{py:obj}`hash_of <toy.core.hash_of>`" in prose.source
    assert entry.cell_type == "markdown" and "{py:function} fill" in entry.source
    assert drawn.source == "plot_box(1)" and drawn.metadata.mystnb["image"]["alt"] == "Filling: figure (drawn by plot_box)"
    assert rest.source.startswith("## Values") and all(f"}} {name}" in rest.source for name in ("LIMITS", "Box", "BoxError")) and "} fill(" not in rest.source


@pytest.mark.parametrize("directive, tag", [("echo: false", "remove-input"), ("output: false", "remove-output"), ("code-fold: true", "hide-input")])
def test_directives_of_quarto_are_understood(links, directive, tag):
    page = make_page(cells(f"#| {directive}\n1 + 1"), links.pages[3], links, "")
    assert page.cells[1].source == "1 + 1" and tag in page.cells[1].metadata.tags


def test_a_figure_is_told_in_words():
    assert figure_text("show_items(items)", "Evaluation", "All.\n\nThe items that `m` is most wrong about:") == "Evaluation: The items that m is most wrong about (drawn by show_items)"


def test_first_cell_is_title_subtitle_and_introduction():
    page = read_page(PurePosixPath("reports/20_fill.ipynb"), cells("md:# Filling\n\n> How full?\n\nRead this."), "toy")
    assert (page.title, page.subtitle, page.intro, page.docname, page.module) == ("Filling", "How full?", "Read this.", "reports/fill", "")
    assert read_page(PurePosixPath("10_data.box.ipynb"), cells("#| default_exp data.box", "md:# Boxes"), "toy").module == "toy.data.box"


def test_navigation_is_made_of_what_is_there(links):
    made = navigation(links.pages, links, {"reports/fill"}, "toy")
    assert list(made) == ["reports/index", "library/data", "library", "index"]
    assert list(rooms(links.pages)) == ["", "data"]
    assert "[![](/reports/fill.png) Filling](/reports/fill.ipynb)" in made["reports/index"]
    assert "box </data.box>" in made["library/data"] and "{py:obj}`fill <toy.data.box.fill>`" in made["library/data"]
    assert made["library"].index("toy.core") < made["library"].index("toy.data.box")
    assert "reports/index" in made["index"] and "library" in made["index"]


def test_titles_in_the_navigation_are_short():
    assert Page(PurePosixPath("benchmarks/10_x.ipynb"), "Benchmark: loading").short_title == "Loading"
    assert Page(PurePosixPath("10_x.ipynb"), "Benchmark: loading").short_title == "Benchmark: loading"


def test_types_are_linked_piece_by_piece(links):
    assert links.type("list[Box] | None", links.pages[2]) == "`list[` {py:obj}`Box <toy.data.box.Box>` `] | None`"
    assert links.type("np.ndarray | None", links.pages[2]) == "`np.ndarray | None`"
    assert "``" not in links.type("list[Box]", links.pages[2])


def test_entries_keep_the_order_of_the_source(links):
    page = make_page(cells("show_doc(fill)", "show_doc(BoxError)", "md:Then", "show_doc(Box)"), links.pages[1], links, "")
    assert [re.search(r"} (\w+)", cell.source)[1] for cell in page.cells[1:] if "{py:" in cell.source and "## Values" not in cell.source] == ["BoxError", "fill", "Box"]


def test_what_libraries_write_becomes_valid():
    page = '<head></head><div><style scoped>a {}</style><p>x</p><style type="text/css">#T_1 td {}</style><th class="blank level0" >&nbsp;</th><th halign="left">y</th></div><pre>one <div class="v">two\n</div></pre>'
    assert valid_html(page) == '<head><style type="text/css">#T_1 td {}</style></head><div><p>x</p><td class="blank level0"></td><th>y</th></div><pre>one <span class="v">two\n</span></pre>'


# --- The check ---
PAGE = '<html lang="en"><head><title>T</title></head><body><h1 id="top">T</h1>{}</body></html>'


def site(folder: Path, **pages: str) -> Path:
    for name, body in pages.items():
        (folder / f"{name}.html").write_text(PAGE.format(body))
    return folder


def test_a_good_site_has_no_problems(tmp_path):
    body = '<a href="b.html#top">b</a><a href="#top">up</a><a href="https://example.org">out</a><a href="search.html?q=x">s</a><img src="i.png" alt="">'
    (tmp_path / "i.png").write_bytes(b"")
    assert check_site(site(tmp_path, a=body, b="", search="")) == []


@pytest.mark.parametrize("body, said", [
    ('<a href="c.html">c</a>', "c.html leads nowhere"),
    ('<a href="b.html#gone">b</a>', "no such anchor"),
    ('<a href="#gone">b</a>', "no such anchor"),
    ('<img src="gone.png" alt="">', "gone.png leads nowhere"),
    ('<script src="https://cdn.example/x.js"></script>', "fetched from elsewhere"),
    ('<link rel="stylesheet" href="//fonts.example/x.css">', "fetched from elsewhere"),
    ("<h1>Two</h1>", "2 main headings"),
    ("<h2>Two</h2><h4>Four</h4>", "a heading of level 4 follows one of level 2"),
    ('<img src="b.html">', "1 images without a text"),
])
def test_what_is_wrong_with_a_site_is_said(tmp_path, body, said):
    assert [said in problem for problem in check_site(site(tmp_path, a=body, b=""))] == [True]


def test_styles_fetch_nothing(tmp_path):
    (tmp_path / "x.css").write_text("@import url(https://fonts.example/y.css);")
    assert "fetched from elsewhere" in check_site(site(tmp_path, a=""))[0]


def test_links_to_elsewhere_are_no_requests():
    assert read_facts('<link rel="canonical" href="https://x.example/">').loaded == []


# --- The real thing ---
@pytest.mark.parametrize("path", NOTEBOOKS, ids=notebook_id)
def test_links_between_notebooks_lead_somewhere(path):
    prose = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)\s#:]+\.\w+)(?:#[^)]*)?\)", re.sub(r"`[^`]*`", "", prose)):
        assert (path.parent / target).is_file(), f"{target} leads nowhere"


def late_types(path: Path) -> set[str]:
    """Types that exported code has in quotes and no cell of the notebook imports or defines: nbdev cannot document them."""
    known, quoted = set(dir(builtins)), set()
    for cell in code_cells(path):
        if cell.source.startswith("%"):
            continue
        for node in ast.parse(cell.source).body:
            known |= {(alias.asname or alias.name).split(".")[0] for alias in getattr(node, "names", []) if isinstance(node, ast.Import | ast.ImportFrom)}
            known |= set(names_of(node))
            functions = [node] if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and "#| export" in cell.source else []
            annotations = [o.annotation for f in functions for o in ast.walk(f.args) if isinstance(o, ast.arg)] + [f.returns for f in functions]
            texts = [o.value for a in annotations if a for o in ast.walk(a) if isinstance(o, ast.Constant) and isinstance(o.value, str)]
            quoted |= {o.id for text in texts for o in ast.walk(ast.parse(text, mode="eval")) if isinstance(o, ast.Name)}
    return quoted - known


@pytest.mark.parametrize("path", MODULES, ids=notebook_id)
def test_nbdev_can_evaluate_the_types(path):
    assert late_types(path) == set(), "import them in the hidden cell of imports"


@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_nb", "furo")), reason="the extra docs is not installed: `make docs` installs it")
def test_the_site_builds_without_a_warning(tmp_path):
    for name in ("settings.ini", "fmnb", "nbs", "docs"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".*", "runs", "models")) if source.is_dir() else shutil.copy(source, tmp_path / name)
    done = subprocess.run([sys.executable, "docs/build.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    assert (tmp_path / "_docs/index.html").is_file() and (tmp_path / "_proc/index.ipynb").is_file()
    for page in ("core", "data.load", "reports/finetune", "benchmarks/coverage", "library", "library/data"):
        assert (tmp_path / f"_docs/{page}.html").is_file()
