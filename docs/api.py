"""What a module offers, read from its exported source: signatures, docments and values as MyST markdown.

The source and not the imported objects: it has the annotations and defaults as they were written.
"""
import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
LONGEST_VALUE = 20  # lines of a value that are shown


@dataclass(frozen=True)
class Module:
    "One exported module."
    name: str    # such as 'fmnb.data.load'
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @cached_property
    def comments(self) -> dict[int, str]:
        "Line -> the comment that ends it."
        tokens = tokenize.generate_tokens(io.StringIO(self.source).readline)
        return {token.start[0]: token.string.lstrip("# ").strip() for token in tokens if token.type == tokenize.COMMENT}

    @cached_property
    def public(self) -> dict[str, ast.stmt]:
        "Name -> the statement that defines it, for the names in `__all__`."
        found = {name: node for node in self.tree.body for name in names_of(node)}
        listed = ast.literal_eval(found["__all__"].value) if "__all__" in found else []
        return {name: found[name] for name in listed if name in found}

    @property
    def values(self) -> list[str]:
        "Public names that are neither functions nor classes."
        return [name for name, node in self.public.items() if not isinstance(node, (*FUNCTION, ast.ClassDef))]

    def symbols(self) -> Iterator[str]:
        "Everything that gets an anchor: public names, and the methods of public classes."
        for name, node in self.public.items():
            yield name
            if isinstance(node, ast.ClassDef):
                yield from (f"{name}.{method.name}" for method in methods(node))


def read_modules(
    root: Path,      # the repository
    library: str,    # name of the package
) -> dict[str, Module]:
    "Every module of the package by its name."
    paths = [path for path in sorted((root / library).rglob("*.py")) if not path.name.startswith("_")]
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    return {name: Module(name, path.read_text(encoding="utf-8")) for name, path in zip(names, paths)}


def names_of(node: ast.stmt) -> list[str]:
    "The names that a statement defines."
    if isinstance(node, (*FUNCTION, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    "The public methods of a class."
    return [child for child in node.body if isinstance(child, FUNCTION) and not child.name.startswith("_")]


def decorators(node: ast.stmt) -> set[str]:
    "Names of the decorators, without modules and arguments."
    return {ast.unparse(o.func if isinstance(o, ast.Call) else o).split(".")[-1] for o in node.decorator_list}


# --- Arguments ---
@dataclass(frozen=True)
class Argument:
    "One row of a table of arguments, fields or results."
    name: str
    type: str = ""
    default: str = ""
    meaning: str = ""


def type_of(annotation: ast.expr | None) -> str:
    "A type as it is written, without the quotes of a forward reference."
    return ast.unparse(annotation).replace("'", "") if annotation is not None else ""


def arguments(
    function: ast.FunctionDef,
    comments: dict[int, str],   # line -> comment
    is_method: bool = False,    # then the first argument is left out
) -> list[Argument]:
    "The arguments and, last, what is returned; a comment belongs to what ends on its line."
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    rows = [("", arg, default) for arg, default in zip(plain, [None] * (len(plain) - len(a.defaults)) + a.defaults)]
    rows += [("*", a.vararg, None)] if a.vararg else []
    rows += [("", arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults)]
    rows += [("**", a.kwarg, None)] if a.kwarg else []
    rows = rows[1:] if is_method and "staticmethod" not in decorators(function) else rows
    lines = [(default or arg).end_lineno for _, arg, default in rows]
    last = function.returns.end_lineno if function.returns else 0
    found = []
    for number, (stars, arg, default) in enumerate(rows):
        meaning = comments.get(lines[number], "") if lines[number] not in [*lines[number + 1:], last] else ""
        found.append(Argument(stars + arg.arg, type_of(arg.annotation), ast.unparse(default) if default else "", meaning))
    return [*found, Argument("", type_of(function.returns), "", comments.get(last, ""))]


def fields(
    node: ast.ClassDef,        # a dataclass or named tuple
    comments: dict[int, str],
) -> list[Argument]:
    "Its fields; of a default that is made by a call, the first argument is the default and a text the meaning."
    found = []
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or field.target.id.startswith("_"):
            continue
        default, meaning = field.value, comments.get(field.end_lineno, "")
        if isinstance(default, ast.Call):
            texts = [o.value for o in default.args[1:] if isinstance(o, ast.Constant) and isinstance(o.value, str)]
            factories = [keyword.value for keyword in default.keywords if keyword.arg == "default_factory"]
            default = ast.Call(factories[0], [], []) if factories else (default.args or [default])[0]
            meaning = meaning or "".join(texts[:1])
        found.append(Argument(field.target.id, type_of(field.annotation), ast.unparse(default) if default else "", meaning))
    return found


# --- Markdown ---
def escape(text: str) -> str:
    "Plain text with code in backticks, safe as markdown."
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]<>$|{}~#])", r"\\\1", part) for part in parts)


def cell(text: str) -> str:
    "A table's cell: code with its bars escaped; `escape` has done it for the rest."
    return re.sub(r"`[^`]+`", lambda code: code[0].replace("|", r"\|"), text)


def table(
    rows: list[Argument],
    heading: str,                      # of the first column
    link: Callable[[str], str],        # links the code in a text
    link_type: Callable[[str], str],   # a type as code, its classes linked
) -> str:
    "The rows as a table without its empty columns; nothing where no row has a meaning."
    if not any(row.meaning for row in rows):
        return ""
    columns = {heading: [f"`{row.name}`" if row.name else "*returns*" for row in rows],
               "Type": [link_type(row.type) for row in rows],
               "Default": [f"`{row.default}`" if row.default else "" for row in rows],
               "Meaning": [link(escape(row.meaning)) for row in rows]}
    columns = {name: list(map(cell, column)) for name, column in columns.items() if any(column)}
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values())]
    return "```{container} arguments\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n```"


def signature(function: ast.FunctionDef, rows: list[Argument]) -> str:
    "Arguments by name and default; with their types where no table shows them."
    bare = ast.parse(ast.unparse(function)).body[0]
    has_table = any(row.meaning for row in rows)
    a = bare.args
    kept = {row.name.lstrip("*") for row in rows}
    a.posonlyargs, a.args = [o for o in a.posonlyargs if o.arg in kept], [o for o in a.args if o.arg in kept]
    for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])] if has_table else []:
        arg.annotation = None
    result = type_of(function.returns)
    return f"({ast.unparse(a)})" + (f" -> {result}" if result and result != "None" else "")


def directive(kind: str, head: str, *parts: str, options: str = "") -> str:
    "A MyST directive; its fence is longer than those inside."
    body = "\n\n".join(part for part in parts if part)
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"^`+", body, re.MULTILINE)), default=0))
    return f"{fence}{{py:{kind}}} {head}\n{options}\n{body}\n{fence}"


@dataclass(frozen=True)
class Writer:
    "Writes the entries of one module."
    module: Module
    link: Callable[[str], str] = str                          # links the code in a text
    link_type: Callable[[str], str] = "`{}`".format           # a type as code, its classes linked

    def function(self, node: ast.FunctionDef, kind: str = "function") -> str:
        "A function or method: signature, docstring, table of arguments."
        rows = arguments(node, self.module.comments, kind != "function")
        marks = decorators(node)
        options = "".join(f":{mark}:\n" for mark in ("classmethod", "staticmethod") if mark in marks)
        head = node.name + signature(node, rows)
        if marks & {"property", "cached_property"}:
            kind, head, options = "property", node.name, f":type: {type_of(node.returns)}\n" if node.returns else ""
        return directive(kind, head, self.prose(node), table(rows, "Argument", self.link, self.link_type), options=options)

    def class_(self, node: ast.ClassDef) -> str:
        "A class: what it is made of, its fields or arguments, its methods."
        bases = [type_of(base) for base in node.bases if not isinstance(base, ast.Call)]
        made = next((child for child in node.body if isinstance(child, FUNCTION) and child.name == "__init__"), None)
        is_record = "dataclass" in decorators(node) or "NamedTuple" in bases
        rows = fields(node, self.module.comments) if is_record or not made else arguments(made, self.module.comments, True)[:-1]
        head = node.name + (signature(made, rows) if made and not is_record else "")
        shown = table(rows, "Field" if is_record else "Argument", self.link, self.link_type)
        kind = "exception" if node.name.endswith("Error") else "class"
        based = f"Based on {', '.join(map(self.link_type, bases))}." if bases else ""
        return directive(kind, head, self.prose(node), based, shown, *(self.function(method, "method") for method in methods(node)))

    def value(self, name: str) -> str:
        "A constant, dictionary or type: its value where it is short, and the comment beside it."
        node = self.module.public[name]
        source = ast.get_source_segment(self.module.source, node)
        is_short = "\n" not in source and len(source) < 100
        shown = "" if is_short or source.count("\n") >= LONGEST_VALUE else f"```python\n{source}\n```"
        options = f":value: {ast.unparse(node.value)}\n" if is_short and len(names_of(node)) == 1 else ""
        lines = [node.lineno] if node.lineno == node.end_lineno else [node.end_lineno, node.lineno]
        comment = next(filter(None, map(self.module.comments.get, lines)), "")
        return directive("data", name, self.link(escape(comment)), shown, options=options)

    def entry(self, name: str) -> str:
        "The entry of a public name."
        node = self.module.public[name]
        if isinstance(node, FUNCTION):
            return self.function(node)
        return self.class_(node) if isinstance(node, ast.ClassDef) else self.value(name)

    def prose(self, node: ast.stmt) -> str:
        "The docstring as markdown."
        return self.link(escape(ast.get_docstring(node) or ""))
