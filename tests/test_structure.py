"""The rooms of the package: who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainer

PACKAGE = Path(trainer.__file__).parent
# From the top. A room imports from those below it. `trainer` itself holds the version alone.
ORDER = (
    "cli", "train", "planner", "run", "export", "api", "integrations", "checkpoint", "engine", "updates", "accounting",
    "model", "data", "cluster", "config", "selectors", "settings", "errors",
)  # fmt: skip
# Python's own names, which are in no room.
OUTSIDE = ("__init__", "__main__")
MOST_FLAT_FILES, MOST_LINES, MOST_METHODS = 8, 450, 30


def name_of(path: Path, package: Path = PACKAGE) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, modules: set[str]) -> Iterator[str]:
    """Modules of the package that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in modules else node.module


def room_of(module: str) -> str | None:
    _, _, inside = module.partition(".")
    return inside.partition(".")[0] or None


def wrong_arrows(package: Path) -> list[str]:
    files = {name_of(path, package): path for path in package.rglob("*.py")}
    wrong = []
    for module, path in sorted(files.items()):
        here = room_of(module)
        if here is None or here in OUTSIDE:
            continue
        for other in imported(path.read_text(), set(files)):
            there = room_of(other)
            if there not in (None, here) and ORDER.index(there) <= ORDER.index(here):
                wrong.append(f"{module} imports {other}")
    return wrong


def test_nothing_imports_upward() -> None:
    assert wrong_arrows(PACKAGE) == []


def test_every_room_has_a_place_in_the_order() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - set(OUTSIDE) == set(ORDER)


def test_few_files_lie_flat() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_FLAT_FILES


def test_files_and_classes_are_of_a_size_to_read() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        assert len(source.splitlines()) <= MOST_LINES, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                assert len(methods) <= MOST_METHODS, f"{path}: {node.name}"


def test_tests_lie_in_the_folder_of_their_room() -> None:
    tests = Path(__file__).parent
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    folders = {path.parent.relative_to(tests).parts[0] for path in tests.glob("*/**/test_*.py")}
    assert folders - rooms == {"benchmarks", "docs", "earlier", "gpu", "slurm"}
    of_the_tests = {"test_comparing.py", "test_forked.py", "test_mutations.py", "test_structure.py"}
    assert {path.name for path in tests.glob("test_*.py")} == of_the_tests


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("from trainer.engine.sparse import Sparse", True),
        ("def f():\n    from trainer.engine import sparse", True),
        ("import trainer.engine.sparse", True),
        ("from trainer.config import load", False),
        ("from trainer import __version__", False),
    ],
)
def test_an_arrow_that_runs_up_is_found(tmp_path: Path, line: str, wrong: bool) -> None:
    package = tmp_path / "trainer"
    for file, content in {"engine/sparse.py": "", "config/__init__.py": "", "data/rows.py": line}.items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(content)
        (package / file).with_name("__init__.py").touch()
    (package / "__init__.py").write_text("__version__ = '0'")
    assert bool(wrong_arrows(package)) is wrong
