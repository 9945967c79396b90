"""Processed notebooks become the pages of the site: what nbdev leaves to Quarto, done for Sphinx.

nbdev has taken out what is hidden and set a `show_doc` cell behind each exported one. Here a notebook gets its title back,
`show_doc` cells become entries with anchors, code in a text is linked to what it names, directives and figures are
understood, and the navigation is made of what is there.
"""
import ast
import base64
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath

import nbformat
from api import Module, Writer
from nbformat import NotebookNode

NUMBER = re.compile(r"^\d+[a-zA-Z0-9]*_")  # what nbdev takes off a notebook's name
SHOW_DOC = re.compile(r"^show_doc\((\w+)\)", re.MULTILINE)
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):\s*(\S+)\s*\n?", re.MULTILINE)
TAGS = {("echo", "false"): "remove-input", ("output", "false"): "remove-output", ("include", "false"): "remove-cell", ("code-fold", "true"): "hide-input"}
LINK_OR_CODE = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\)|`[^`]+`|\$[^$]+\$")
SECTIONS = ("guides", "reports", "benchmarks")  # folders of notebooks, in the order of the navigation; others follow
JOINED = "&#8288;"  # nothing visible between two pieces of code
WORDS = {"train", "valid", "test"}  # splits: linked only where a function of that name is at home


@dataclass(frozen=True)
class Page:
    "One notebook of the site."
    path: PurePosixPath               # below nbs/
    title: str
    subtitle: str = ""
    intro: str = ""                   # what follows them in the first cell
    module: str = ""                  # what the notebook exports, such as 'fmnb.data.load'
    parameters: frozenset[str] = frozenset()   # of a report

    @property
    def name(self) -> str:
        return NUMBER.sub("", self.path.stem)

    @property
    def short_title(self) -> str:
        "Without the word that its folder says already: 'Benchmark: loading' is 'Loading' among the benchmarks."
        kind, _, rest = self.title.partition(": ")
        return rest[0].upper() + rest[1:] if rest and kind.lower() == self.path.parent.name.removesuffix("s") else self.title

    @property
    def docname(self) -> str:
        "Where nbdev would put it, without the suffix."
        return (self.path.parent / self.name.lower()).as_posix()


def read_page(
    path: PurePosixPath,      # below nbs/
    notebook: NotebookNode,   # as it was written
    library: str,             # name of the package
) -> Page:
    "Title, subtitle and the rest of the first markdown cell; the exported module; the parameters."
    first = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
    title = re.search(r"^# +(.+)$", first, re.MULTILINE)
    subtitle = re.search(r"^> +(.+)$", first, re.MULTILINE)
    intro = "\n".join(line for line in first.splitlines() if line not in {found[0] for found in (title, subtitle) if found})
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    exported = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(cell.source for cell in code), re.MULTILINE)
    declared = [node for cell in code if "parameters" in cell.metadata.get("tags", []) for node in ast.parse(cell.source).body]
    names = frozenset(name.id for node in declared if isinstance(node, ast.Assign | ast.AnnAssign)
                      for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store))
    return Page(path, title[1] if title else path.stem, subtitle[1] if subtitle else "", intro.strip(), f"{library}.{exported[1]}" if exported else "", names)


# --- Links ---
@dataclass(frozen=True)
class Links:
    "What code in a text may name, and where that stands."
    pages: list[Page]
    modules: dict[str, Module]
    doc_url: str                                                  # where nbdev's links point to
    symbols: dict[str, str] = field(default_factory=dict)         # 'make_loader' -> 'fmnb.data.load.make_loader'
    notebooks: dict[str, Page] = field(default_factory=dict)      # '14_data.load', its path, 'fmnb.data.load' -> page
    reports: dict[str, Page] = field(default_factory=dict)        # 'finetune' -> page

    def __post_init__(self):
        for page in self.pages:
            self.notebooks.update({name: page for name in (page.path.stem, f"nbs/{page.path}", str(page.path), page.module) if name and name != "index"})
            self.reports.update({page.name: page} if page.path.parent.name == "reports" else {})
            module = self.modules.get(page.module)
            for symbol in module.symbols() if module else ():
                self.symbols.setdefault(symbol, f"{module.name}.{symbol}")
                self.symbols[f"{module.name}.{symbol}"] = f"{module.name}.{symbol}"

    def code(self, text: str, page: Page, before: str = "") -> str:
        "Code in a text, linked if it names something: the page's own symbols first, then other symbols, notebooks and reports."
        name = text.removesuffix("()")
        own = f"{page.module}.{name}"
        symbol = own if own in self.symbols else self.symbols.get(name) if name not in WORDS | page.parameters else None
        other = self.notebooks.get(name)
        report = self.reports.get(name) if name not in page.parameters else None
        if report and (not symbol or not page.module or re.search(r"\breports? $", before)):
            symbol, other = None, report
        if symbol:
            return f"{{py:obj}}`{text} <{symbol}>`"
        return f"[`{text}`](/{other.docname}.ipynb)" if other else f"`{text}`"

    def type(self, text: str, page: Page) -> str:
        "A type as code, its classes linked."
        names = [name for name in dict.fromkeys(re.findall(r"\b[A-Z]\w+\b", text)) if name in self.symbols]
        parts = re.split(rf"\b({'|'.join(names)})\b", text) if names else [text]
        codes = [self.code(part, page) if part in names else f"`{part.strip()}`" for part in parts if part.strip()]
        return (" " if " " in "".join(parts[::2]) else JOINED).join(codes)

    def text(self, text: str, page: Page) -> str:
        "Markdown with its code linked, and with links to notebooks made links to pages."
        text = re.sub(rf"\[(`[^`]+`)\]\({re.escape(self.doc_url)}[^)]*\)", r"\1", text)  # nbdev's links: made again below
        lines, is_fenced = [], False
        for line in text.splitlines():
            is_fence = line.lstrip().startswith(("```", "~~~"))
            is_fenced ^= is_fence
            if not (is_fence or is_fenced or line.startswith(("#", "    "))):
                line = LINK_OR_CODE.sub(lambda match: self._replaced(match, page), line)
            lines.append(line)
        return "\n".join(lines)

    def _replaced(self, match: re.Match, page: Page) -> str:
        found = match[0]
        if found.startswith("`"):
            return self.code(found.strip("`"), page, match.string[: match.start()])
        target = re.fullmatch(r"(.*\]\()([^)#:]+\.ipynb)(#[^)]*)?\)", found, re.DOTALL)
        if not target:
            return found
        other = self.notebooks.get(resolved(page.path.parent, target[2]))
        return f"{target[1]}/{other.docname}.ipynb{target[3] or ''})" if other else found


def resolved(folder: PurePosixPath, path: str) -> str:
    "A relative path of a link, seen from nbs/."
    parts = []
    for part in (folder / path).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


# --- Notebooks ---
def read_notebook(path: Path) -> NotebookNode:
    "A notebook as it stands; whether it is valid is tested elsewhere."
    return nbformat.v4.reads(path.read_text(encoding="utf-8"))


def figure_text(
    source: str,     # of the cell that drew it
    heading: str,    # of its section
    prose: str,      # the markdown before it
) -> str:
    "What a figure is, for those who cannot see it: its section, what was said of it, and what drew it."
    sentences = re.split(r"(?<=[.:?!])\s+", re.sub(r"[`*$\\{}]|\]\([^)]*\)|[\[]", "", prose).strip().split("\n")[-1])
    said = sentences[-1].rstrip(":. ") if prose else ""
    drawn = re.findall(r"\b((?:plot|show|draw)_\w+)\(", source)
    return f"{heading}: {said or 'figure'}" + (f" (drawn by {drawn[-1]})" if drawn else "")


def code_cell(cell: NotebookNode, page: Page, links: Links, alt: str) -> NotebookNode:
    "A code cell: Quarto's directives become tags; figures get their text, outputs in markdown their links."
    tags = [TAGS[found] for found in DIRECTIVE.findall(cell.source) if found in TAGS]
    cell.source = DIRECTIVE.sub("", cell.source)
    cell.metadata = NotebookNode(tags=[*cell.metadata.get("tags", []), *tags], mystnb={"image": {"alt": alt}})
    for output in cell.outputs:
        if "text/markdown" in output.get("data", {}):
            output.data["text/markdown"] = links.text(output.data["text/markdown"], page)
        if "text/html" in output.get("data", {}):  # the empty corner of a table of pandas is no heading
            output.data["text/html"] = re.sub(r"<th([^>]*)></th>", r"<td\1></td>", output.data["text/html"])
    return cell


def documented(cell: NotebookNode) -> str:
    "The name that a cell documents; empty if it is another cell."
    found = SHOW_DOC.search(cell.source) if cell.cell_type == "code" else None
    return found[1] if found else ""


def in_order(cells: list[NotebookNode], names: list[str]) -> list[NotebookNode]:
    "The cells, with neighbouring entries in the order of `names`: nbdev turns it round."
    found = []
    for is_entry, run in groupby(cells, key=lambda cell: documented(cell) in names):
        found += sorted(run, key=lambda cell: names.index(documented(cell))) if is_entry else run
    return found


def make_page(
    notebook: NotebookNode,   # as nbdev processed it
    page: Page,
    links: Links,
    source_url: str,          # of the notebook
) -> NotebookNode:
    "The notebook that Sphinx reads."
    module = links.modules.get(page.module)
    writer = Writer(module, lambda text: links.text(text, page), lambda text: links.type(text, page)) if module else None
    names = list(module.public) if module else []
    markdown = nbformat.v4.new_markdown_cell
    cells, heading, prose, left = [markdown(header(page, links, source_url))], page.title, "", list(names)
    for cell in in_order(notebook.cells, names):
        if (name := documented(cell)) in left:
            cells.append(markdown(writer.entry(name)))
            left.remove(name)
        elif cell.cell_type == "code":
            cells.append(code_cell(cell, page, links, figure_text(cell.source, heading, prose)))
        elif cell.cell_type == "markdown" and not cell.source.startswith("<!--"):
            headings = re.findall(r"^#+ +(.+)$", cell.source, re.MULTILINE)
            heading = re.sub(r"[`*]", "", headings[-1]) if headings else heading
            cells.append(markdown(links.text(cell.source, page)))
        prose = re.sub(r"^#.*$", "", cell.source, flags=re.MULTILINE) if cell.cell_type == "markdown" else ""
    if left:
        cells.append(markdown("\n\n".join(["## Values", *map(writer.entry, left)])))
    made = nbformat.v4.new_notebook(cells=cells)
    made.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return made


def header(page: Page, links: Links, source_url: str) -> str:
    "Title, subtitle, where it comes from, introduction."
    origin = [f"`{page.module}`"] * bool(page.module) + [f"[{page.path.name}]({source_url})"]
    parts = [f"# {page.title}", f"> {links.text(page.subtitle, page)}" if page.subtitle else "",
             f":::{{container}} origin\n{' · '.join(origin)}\n:::" if page.name != "index" else "",
             f"```{{py:module}} {page.module}\n:synopsis: {re.sub(r'[`*]', '', page.subtitle)}\n```" if page.module else "",
             links.text(page.intro, page)]
    return "\n\n".join(part for part in parts if part)


# --- Navigation ---
def toctree(entries: Iterable[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", "", *entries, "```"])


def cards(pages: list[Page], links: Links, pictures: set[str]) -> str:
    "A card for each page: its largest figure, title and subtitle."
    found = []
    for page in pages:
        picture = f"![](/{page.docname}.png) " if page.docname in pictures else ""
        found.append(f":::{{container}} card\n[{picture}{page.short_title}](/{page.docname}.ipynb)\n\n{links.text(page.subtitle, page)}\n:::")
    return "\n".join(["::::{container} cards", *found, "::::"])


def rooms(pages: list[Page]) -> dict[str, list[Page]]:
    "'data' -> the pages of its modules in the order of layers; the rooms in the order of their first layer."
    found = {}
    for page in sorted((page for page in pages if page.module), key=lambda page: page.path.stem):
        room = page.module.split(".")[1:-1]
        found.setdefault(".".join(room), []).append(page)
    return found


def module_table(pages: list[Page], links: Links, names: bool = False) -> str:
    "Module, title and subtitle in the order of layers; with the public functions and classes if `names`."
    lines = ["| Module | What is in the room |", "| --- | --- |"]
    for page in pages:
        module = links.modules[page.module]
        listed = " ".join(links.code(name, page) for name in module.public if name not in module.values) if names else ""
        lines.append(f"| [`{page.module}`](/{page.docname}.ipynb) | **{page.title}.** {links.text(page.subtitle, page)}{'<br>' + listed if listed else ''} |")
    return ":::{container} modules\n" + "\n".join(lines) + "\n:::"


def navigation(
    pages: list[Page],
    links: Links,
    pictures: set[str],   # names of the pages that have one
    library: str,         # name of the package
) -> dict[str, str]:
    "Pages that are not notebooks, by name: one a section, the library, and one a room of the library; and the start page's tree."
    folders = sorted({page.path.parent.name for page in pages} - {""}, key=lambda name: (SECTIONS.index(name) if name in SECTIONS else len(SECTIONS), name))
    found = {}
    for folder in folders:
        inside = [page for page in pages if page.path.parent.name == folder]
        found[f"{folder}/index"] = "\n\n".join([f"# {folder.capitalize()}", cards(inside, links, pictures), toctree(f"{page.short_title} </{page.docname}>" for page in inside)])
    parts, entries = ["# Library", "In the order of layers: a module imports only from those above it. Every name stands in the {ref}`index of names <genindex>`."], []
    for room, inside in rooms(pages).items():
        entries += [f"{room} <library/{room}>"] if room else [f"{page.name} </{page.docname}>" for page in inside]
        parts += [f"## [{library}.{room}](/library/{room}.md)" if room else f"## {library}", module_table(inside, links)]
        if room:
            leaves = toctree(f"{page.module.split('.')[-1]} </{page.docname}>" for page in inside)
            found[f"library/{room}"] = "\n\n".join([f"# {library}.{room}", module_table(inside, links, names=True), leaves])
    found["library"] = "\n\n".join([*parts, toctree(entries)])
    found["index"] = toctree([*(f"{folder}/index" for folder in folders), "library"])
    return found


# --- The whole ---
def largest_picture(notebook: NotebookNode) -> bytes:
    "The largest figure among the outputs, as PNG; empty where there is none."
    figures = [output.data["image/png"] for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    return base64.b64decode(max(figures, key=len, default=""))


def write_pages(
    nbs: Path,            # the notebooks as they were written
    processed: Path,      # and as nbdev processed them
    folder: Path,         # where the pages go; emptied before
    modules: dict[str, Module],
    library: str,         # name of the package
    doc_url: str,         # where nbdev's links point to
    git_url: str,         # where the repository can be read
) -> list[Page]:
    "Write what Sphinx reads."
    paths = sorted(path.relative_to(processed) for path in processed.rglob("*.ipynb"))
    pages = [read_page(PurePosixPath(path), read_notebook(nbs / path), library) for path in paths]
    links = Links(pages, modules, doc_url)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(processed, folder, ignore=shutil.ignore_patterns("*.ipynb", "*.yml", "_docs"))
    pictures = set()
    made = {}
    for page in pages:
        notebook = read_notebook(processed / page.path)
        made[page.docname] = make_page(notebook, page, links, f"{git_url}/{page.path}")
        if page.path.parent.name and (picture := largest_picture(notebook)):
            pictures.add(page.docname)
            (folder / f"{page.docname}.png").parent.mkdir(parents=True, exist_ok=True)
            (folder / f"{page.docname}.png").write_bytes(picture)
    extra = navigation(pages, links, pictures, library)
    made["index"].cells.append(nbformat.v4.new_markdown_cell(extra.pop("index")))
    for name, text in extra.items():
        (folder / f"{name}.md").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    for name, notebook in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.ipynb").write_text(nbformat.v4.writes(notebook), encoding="utf-8")
    return pages
