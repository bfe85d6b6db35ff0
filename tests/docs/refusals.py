"""Find what the program refuses with: the texts of errors and of problems, wherever their words are written.

A text is followed backwards from where it is raised, collected or printed as a refusal: through names, parameters,
attributes and the results of functions of the package, by their names alone. That finds a little too much (a function
of another class with the same name), but it misses little, and needs no list of functions.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

GAP = "\0"  # a value in a message
# Errors that only a mistake in this package can cause, or that Python's own protocols need.
OF_PROGRAMMERS = {"AssertionError", "AttributeError", "NotImplementedError", "StopIteration"}
REFUSING = {"refuse", "_refuse", "error"}  # of `trainer.cli`, of `submit`, and of argparse's parsers
DESCRIBING = {"description", "help", "prog", "usage", "epilog", "metavar"}  # arguments that describe keys and options
MIN_WORDS = 3  # a text of fewer words is put together of others


@dataclass(frozen=True)
class Refusal:
    """A text that a user may read, with a gap where it has a value, and the function that contains it."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text.replace(GAP, '...')}"


Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(eq=False)
class _Scope:
    """A function, or what a module has outside of its functions."""

    place: str
    parameters: set[str] = field(default_factory=set)
    written: dict[str, list[ast.AST]] = field(default_factory=lambda: defaultdict(list))
    results: list[ast.AST] = field(default_factory=list)


class _Package(ast.NodeVisitor):
    """Every scope of a package, where each name is written, and what is said in refusals."""

    def __init__(self, folder: Path):
        self.functions: dict[str, list[_Scope]] = defaultdict(list)
        self.calls: dict[str, list[tuple[_Scope, ast.Call]]] = defaultdict(list)
        self.outer: dict[str, list[tuple[_Scope, ast.AST]]] = defaultdict(list)  # of modules and attributes
        self.said: list[tuple[_Scope, ast.AST]] = []
        for path in sorted(folder.rglob("*.py")):
            self.module = str(path.relative_to(folder.parent))
            self.scopes = [_Scope(self.module)]
            self.visit(ast.parse(path.read_text()))

    @property
    def scope(self) -> _Scope:
        return self.scopes[-1]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        scope = _Scope(f"{self.module}, {node.name}", {a.arg for a in arguments})
        self.functions[node.name].append(scope)
        self.scopes.append(scope)
        for statement in node.body:
            self.visit(statement)
        self.scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scopes.append(_Scope(f"{self.module}, {node.name}"))
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Raise(self, node: ast.Raise) -> None:
        name = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        if node.exc is not None and not (isinstance(name, ast.Name) and name.id in OF_PROGRAMMERS):
            self.said.append((self.scope, node.exc))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = _name(node.func)
        self.calls[name].append((self.scope, node))
        if name in REFUSING or any(ast.unparse(keyword.value) == "sys.stderr" for keyword in node.keywords):
            self.said += [(self.scope, argument) for argument in node.args]
        if name in ("append", "extend", "add") and isinstance(node.func, ast.Attribute):
            self._write(node.func.value, *node.args)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return | ast.Yield | ast.YieldFrom) -> None:
        if node.value is not None:
            self.scope.results.append(node.value)
        self.generic_visit(node)

    visit_Yield = visit_YieldFrom = visit_Return

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._write(target, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign | ast.AugAssign | ast.NamedExpr) -> None:
        if node.value is not None:
            self._write(node.target, node.value)
        self.generic_visit(node)

    visit_AugAssign = visit_NamedExpr = visit_AnnAssign

    def visit_For(self, node: ast.For | ast.comprehension) -> None:
        self._write(node.target, node.iter)
        self.generic_visit(node)

    visit_comprehension = visit_For

    def _write(self, target: ast.AST, *values: ast.AST) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            for element in target.elts:
                self._write(element, *values)
        elif isinstance(target, ast.Attribute):
            self.outer[f"{self.module}.{target.attr}"] += [(self.scope, value) for value in values]
        elif isinstance(target, ast.Name) and len(self.scopes) == 1:
            self.outer[target.id] += [(self.scope, value) for value in values]
        elif isinstance(target, ast.Name):
            self.scope.written[target.id] += values


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else GAP for p in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def num_words(text: str) -> int:
    """Return how many words a text has, without the names of keys, such as `model.path`, and options."""
    return len(re.findall(r"(?<![\w.-])[A-Za-z]{2,}(?![\w=]|\.\w)", text))


def refusals(folder: Path) -> set[Refusal]:
    """Return the texts of at least `MIN_WORDS` words that the package in `folder` refuses with."""
    package = _Package(folder)
    waiting = [_Said(scope, node) for scope, node in package.said]
    seen, found = set[_Said](), set[Refusal]()
    while waiting:
        said = waiting.pop()
        if said not in seen:
            seen.add(said)
            text = _text(said.node)
            if text is not None and num_words(text) >= MIN_WORDS and " " in text and "\n" not in text.strip():
                found.add(Refusal(said.scope.place, text))
            waiting += _sources(package, said)
    return found


@dataclass(frozen=True)
class _Said:
    """An expression whose value is in a refusal.

    `of_call`: it is what a function returns, and the arguments of its call are looked at already.
    """

    scope: _Scope
    node: ast.AST
    of_call: bool = False


def _sources(package: _Package, said: _Said) -> list[_Said]:
    """Return what the value of an expression is made of."""
    scope, here = said.scope, list[ast.AST]()
    match said.node:
        case ast.Name(id=name) if name in scope.written:
            here = scope.written[name]
        case ast.Name(id=name) if name in scope.parameters:
            calls = [] if said.of_call else package.calls[scope.place.partition(", ")[2]]
            return [_Said(caller, argument) for caller, call in calls for argument in _arguments(call)]
        case ast.Name(id=name):
            return [_Said(*written) for written in package.outer[name]]
        case ast.Attribute(attr=name):
            return [_Said(*written) for written in package.outer[f"{_module(scope)}.{name}"]]
        case ast.Call(func=function) as call:
            texts = [function.value] if isinstance(function, ast.Attribute) else []  # such as " | ".join
            here = [*texts, *_arguments(call)]
            results = [(other, result) for other in package.functions[_name(function)] for result in other.results]
            made = [_Said(*result, of_call=True) for result in results]
            return [*made, *(replace(said, node=value) for value in here)]
        case ast.JoinedStr(values=values) as text if num_words(_text(text) or "") <= MIN_WORDS:
            here = [value.value for value in values if isinstance(value, ast.FormattedValue)]
        case ast.IfExp(body=body, orelse=other):
            here = [body, other]
        case ast.Subscript(value=value) | ast.Starred(value=value) | ast.NamedExpr(value=value):
            here = [value]
        case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element) | ast.SetComp(elt=element):
            here = [element]
        case ast.Compare() | ast.Constant() | ast.JoinedStr():  # what is put into a sentence is explained with it
            here = []
        case node:  # sums, lists, dictionaries
            here = list(ast.iter_child_nodes(node))
    return [replace(said, node=value) for value in here]


def _module(scope: _Scope) -> str:
    return scope.place.partition(", ")[0]


def _arguments(call: ast.Call) -> list[ast.AST]:
    return [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg not in DESCRIBING)]
