"""Escape and quote text from outside, which a terminal or a batch script might obey instead of showing."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

# Control characters, halves of surrogate pairs, and the characters that end a line or paragraph in Unicode.
_CONTROL = ("Cc", "Cs", "Zl", "Zp")
# Embeddings, overrides and isolates of the writing direction, which can make a text look like another one.
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_EXAMPLES = "(line ends, tabs, NUL, changes of direction)"
_LONGEST = 200
_MOST_DIGITS = 18


def printable(text: str, *, keep: str = "\n\t") -> str:
    """Escape every character that a terminal would obey or not show, except those in `keep`.

    Everything that the program prints passes through here when it contains values that a user, a file or another
    program gave.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else _escaped(character) for character in text
    )


def has_control_characters(text: str) -> bool:
    """Return whether `text` contains characters that no name, path or batch script should."""
    return not text.isprintable() and any(
        unicodedata.category(character) in _CONTROL or character in _BIDI_CONTROLS for character in text
    )


def text_problems(values: Any, path: str = "") -> list[str]:
    """Find keys and values of a nested configuration that contain control characters: they become names of files and
    folders, and parts of batch scripts."""
    if isinstance(values, str):
        if not has_control_characters(values):
            return []
        return [f"{path}: got {quoted(values)}; allowed: text without control characters {_EXAMPLES}"]
    if isinstance(values, Mapping):
        inside = [(f"{path}.{name}" if path else str(name), value) for name, value in values.items()]
        wrong = [
            f"{path or 'the configuration'}: key {quoted(name)} contains control characters; take them out"
            for name in values
            if isinstance(name, str) and has_control_characters(name)
        ]
    elif isinstance(values, list):
        inside, wrong = [(f"{path}[{index}]", value) for index, value in enumerate(values)], []
    else:
        return []
    return wrong + [problem for place, value in inside for problem in text_problems(value, place)]


def whole_number(text: str | None) -> int | None:
    """Return the number that `text` spells in plain ASCII digits, up to 18 of them; None for anything else."""
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else None


def quoted(value: Any) -> str:
    """Return the value as Python spells it (null, true and false as YAML does), on one line and shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return in_short(repr(value))


def in_short(text: str, longest: int = _LONGEST) -> str:
    """Return at most `longest` characters of `text`: its beginning and its end."""
    if len(text) <= longest:
        return text
    gap, end = " ... ", longest // 4
    return text[: longest - end - len(gap)] + gap + text[-end:]


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
