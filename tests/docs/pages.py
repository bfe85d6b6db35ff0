"""The README and the pages in docs/, and the blocks in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. `before` is the paragraph above it."""

    page: Path
    line: int
    language: str
    text: str
    before: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, language: str | None = None) -> Iterator[Block]:
    """Yield the fenced blocks of a page, or those of one language."""
    lines = page.read_text().splitlines()
    opened: int | None = None
    before, between = "", True
    for number, line in enumerate(lines):
        if line.startswith("```"):
            if opened is None:
                opened = number
                continue
            found = lines[opened][3:].strip()
            if language in (None, found):
                yield Block(page, opened + 2, found, "\n".join(lines[opened + 1 : number]) + "\n", before)
            opened = None
        elif opened is None and line.strip():
            before = line if between else f"{before}\n{line}"
        between = not line.strip()


def all_blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, language)]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
