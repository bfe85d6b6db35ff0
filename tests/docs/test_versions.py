"""The versions, extras and sizes that pages state, compared with pyproject.toml, constraints.txt and the code."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.docs.pages import ROOT
from trainer.updates.unmask import Unmask

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
STARTED, SUPPORT, CHECKPOINTS = (
    (ROOT / "docs" / name).read_text() for name in ("getting-started.md", "support.md", "checkpoints.md")
)


def _least(requirements: list[str]) -> dict[str, str]:
    """Return the lower bound of each requirement, by name; an empty string for one without."""
    return {name: bound for name, _, bound in (requirement.partition(">=") for requirement in requirements)}


def _rows(page: str, head: str) -> list[list[str]]:
    """Return the cells of the table whose first cell is `head`."""
    (table,) = re.findall(rf"^\| {head} \|.*\n\| ---.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def test_the_table_of_versions() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {name.lower(): version for name, version in pinned.items()}
    least = _least(PROJECT["dependencies"])
    rows = _rows(SUPPORT, "package")
    assert {name: bound for name, bound, _ in rows} == least and len(rows) == len(least)
    assert {name: tested for name, _, tested in rows} == {name: pinned[name] for name in least}


@pytest.mark.parametrize("page", [STARTED, SUPPORT], ids=["getting-started", "support"])
def test_python(page: str) -> None:
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')} or later" in page


def test_the_lower_bounds_that_are_named_at_the_installation() -> None:
    (said,) = re.findall(r"by the lower bounds in `pyproject.toml`: (.+?) and others", STARTED, re.DOTALL)
    named = dict(part.lower().split() for part in said.split(","))
    assert len(named) >= 5 and named.items() <= _least(PROJECT["dependencies"]).items()


def test_the_extras_at_the_installation() -> None:
    rows = {extra.strip("`"): set(re.findall(r"`(.+?)`", installs)) for extra, installs, _ in _rows(STARTED, "extra")}
    assert rows.keys() == {f"{PROJECT['name']}[{extra}]" for extra in EXTRAS}
    for extra, requirements in EXTRAS.items():
        names = set(_least(requirements))
        own = {name for name in names if name.startswith(PROJECT["name"])}  # extras of its own, in brackets
        others = {other for name in own for other in name.partition("[")[2].strip("]").split(",")}
        assert rows[f"{PROJECT['name']}[{extra}]"] == names - own | others, extra


def test_the_extras_of_the_table_of_support() -> None:
    rows = {extra.strip("`"): package for extra, package, _ in _rows(SUPPORT, "extra")}
    expected = {
        f"{PROJECT['name']}[{extra}]": " and ".join(f"{name} {least} or later" for name, least in _least(needs).items())
        for extra, needs in EXTRAS.items()
        if extra != "dev"
    }
    assert rows == expected


def test_the_bytes_that_id3_saves() -> None:
    options = {"ranks": 1, "weight_bytes": 4, "accumulation": 1}
    saved = [
        Unmask(budget=1000, bias_correction=correction).footprint([2000], [], **options).saved // 1000
        for correction in ("global", "local")
    ]
    said = " ".join(CHECKPOINTS.split())
    assert (
        f"With ID3, a checkpoint takes {saved[0]} bytes for each weight of the budget, or {saved[1]} with "
        "`update.bias_correction=local`" in said
    )
