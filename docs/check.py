"""What has to hold for every page of the site: links lead somewhere, and nothing is fetched from elsewhere."""
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urldefrag

ELSEWHERE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:)?//|^[a-z][a-z0-9+.-]*:", re.IGNORECASE)
FETCHED = re.compile(r"^(?:https?:)?//", re.IGNORECASE)
FETCHED_BY_CSS = re.compile(r"(?:@import\s+|url\()\s*['\"]?((?:https?:)?//[^'\")\s]+)", re.IGNORECASE)
LEVELS = {"h1", "h2", "h3", "h4", "h5", "h6"}
LOADING = {"stylesheet", "icon", "preload", "modulepreload", "manifest"}


@dataclass
class Facts(HTMLParser):
    "What a page holds."
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    without_text: int = 0    # images
    headings: list[int] = field(default_factory=list)  # their levels, in order
    title: str = ""
    language: str = ""

    def __post_init__(self):
        super().__init__()
        self.in_title = False

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self.headings += [int(tag[1])] if tag in LEVELS else []
        self.language = given.get("lang", "") if tag == "html" else self.language
        self.without_text += tag == "img" and given.get("alt") is None
        if tag in ("a", "area") and given.get("href"):
            self.links.append(given["href"])
        is_loaded = tag != "link" or LOADING & set((given.get("rel") or "").split())
        self.loaded += [given[name] for name in ("src", "href" if tag == "link" else "data") if is_loaded and given.get(name)]
        self.in_title = tag == "title"

    def handle_data(self, data):
        self.title += data if self.in_title else ""

    def handle_endtag(self, tag):
        self.in_title = False


def read_facts(html: str) -> Facts:
    "The facts of one page."
    facts = Facts()
    facts.feed(html)
    return facts


def check_site(
    folder: Path,        # a site: HTML files and what they need
) -> list[str]:          # one sentence a problem
    "Links and anchors that do not resolve, requests to other hosts, pages without title, language or one main heading, headings that skip a level, images without a text."
    pages = {path.resolve(): read_facts(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, facts in pages.items():
        name = path.relative_to(folder.resolve()).as_posix()
        for link in dict.fromkeys(facts.links + facts.loaded):
            if not ELSEWHERE.match(link) and (problem := unresolved(link, path, pages)):
                found.append(f"{name}: {problem}")
        found += [f"{name}: {link} is fetched from elsewhere." for link in facts.loaded if FETCHED.match(link)]
        found += [f"{name}: {facts.headings.count(1)} main headings, not one."] if facts.headings.count(1) != 1 else []
        found += [f"{name}: a heading of level {next_one} follows one of level {one}." for one, next_one in pairwise(facts.headings) if next_one > one + 1]
        found += [f"{name}: no title."] if not facts.title.strip() else []
        found += [f"{name}: the language is not said."] if not facts.language else []
        found += [f"{name}: {facts.without_text} images without a text."] if facts.without_text else []
    for path in sorted(folder.rglob("*.css")):
        found += [f"{path.relative_to(folder).as_posix()}: {url} is fetched from elsewhere." for url in FETCHED_BY_CSS.findall(path.read_text(encoding="utf-8"))]
    return found


def unresolved(link: str, page: Path, pages: dict[Path, Facts]) -> str:
    "What is wrong with an internal link; empty if nothing is."
    target, anchor = urldefrag(link)
    path = (page.parent / unquote(target.partition("?")[0])).resolve() if target else page
    if not path.is_file():
        return f"{link} leads nowhere."
    if anchor and path in pages and unquote(anchor) not in pages[path].anchors:
        return f"{link} has no such anchor."
    return ""
