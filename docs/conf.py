"""Sphinx: how pages become the site. What settings.ini says is taken from there."""
from functools import cache
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from nbdev.config import get_config
from sphinx.pycode import ModuleAnalyzer

DOCS = Path(__file__).parent
ROOT = DOCS.parent
settings = get_config(path=DOCS)

# --- The project ---
project = settings.title
version = release = settings.version
author = settings.author
project_copyright = settings.copyright
html_title = settings.title
html_baseurl = f"{settings.doc_host}{settings.doc_baseurl}/"
language = "en"

# --- Notebooks: shown as they were committed ---
extensions = ["myst_nb", "sphinx.ext.viewcode"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # nothing is fetched from elsewhere
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# --- Names ---
add_module_names = False
toc_object_entries_show_parents = "hide"
viewcode_follow_imported_members = False
modindex_common_prefix = [f"{settings.lib_name}."]
nitpicky = True  # a link to a name that has no entry is an error; types of other libraries have none
nitpick_ignore_regex = [("py:class", ".*"), ("py:exc", ".*"), ("py:obj", "None")]

# --- Look ---
html_theme = "furo"
templates_path = ["templates"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_favicon = "static/icon.svg"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_math_renderer = "mathml"
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#0b5a8a", "color-brand-content": "#0b5a8a", "color-brand-visited": "#5b3f96"},
    "dark_css_variables": {"color-brand-primary": "#7cc4f0", "color-brand-content": "#7cc4f0", "color-brand-visited": "#c3aef5"},
}


def mathml(translator, node: nodes.Node) -> None:
    "Mathematics as MathML, which browsers draw themselves."
    is_block = isinstance(node, nodes.math_block)
    formula = convert(node.astext(), display="block" if is_block else "inline")
    translator.body.append(f'<div class="formula">{formula}</div>' if is_block else formula)
    raise nodes.SkipNode


@cache
def source_of(module: str) -> tuple[str, dict] | None:
    "The source of a module and where its names stand, without importing it."
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.exists():
        return None
    analyzer = ModuleAnalyzer.for_string(path.read_text(encoding="utf-8"), module)
    analyzer.find_tags()
    return analyzer.code, analyzer.tags


def setup(app) -> None:
    "What Sphinx calls."
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("viewcode-find-source", lambda app, module: source_of(module))
