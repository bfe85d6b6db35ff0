"""Read JSON as `json.loads` does, but refuse an object with a duplicate key: it is unclear which value is meant."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

_SPACE = " \t\n\r"
_CHARACTERS = 2**20


def loads(text: str) -> Any:
    """Return the value of `text`. Raises `ValueError` (of which `json.JSONDecodeError` is a subclass), or
    `RecursionError` if the text is nested too deeply."""
    return json.loads(text, object_pairs_hook=_with_single_keys)


def items(read: Callable[[int], str]) -> Iterator[Any]:
    """Yield the items of a list in JSON, of which `read(size)` returns the next characters.

    Raises `ValueError` or `RecursionError` as `loads` does, without the place in the whole text.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_with_single_keys)
    text, position, ended = "", 0, False
    before = "["  # what comes before an item
    while True:
        try:
            start = _after(text, position, before)
            if before == "[" and text[start] == "]":
                end = start
            else:
                item, end = decoder.raw_decode(text, start)
                end = _spaces(text, end)
            if text[end] not in ",]":  # or nothing is there (IndexError): a number may go on, for instance
                raise ValueError("no end of the item")
        except (ValueError, IndexError):
            if ended:
                raise ValueError("not a list") from None
            # As much again as there is, so that a long item is not parsed again and again.
            wanted = max(_CHARACTERS, len(text) - position)
            more = read(wanted)
            text, position, ended = text[position:] + more, 0, len(more) < wanted
            continue
        if end > start:
            yield item
        position, before = end, ","
        if text[end] == "]":
            break
    rest = text[end + 1 :]
    while rest or not ended:
        if rest.strip(_SPACE):
            raise ValueError("something after the list")
        rest = read(_CHARACTERS)
        ended = ended or not rest


def _after(text: str, position: int, before: str) -> int:
    """Return where the text after `before`, and after the space around it, begins."""
    position = _spaces(text, position)
    if text[position] != before:
        raise ValueError(f"no {before}")
    position = _spaces(text, position + 1)
    text[position]  # IndexError at the end
    return position


def _spaces(text: str, position: int) -> int:
    while text[position] in _SPACE:
        position += 1
    return position


def parse_line(line: bytes) -> Any:
    """Return the value of a line of JSON, or a `ValueError` that says why it cannot be read."""
    try:
        return loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 text: byte {line[error.start]:#04x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {said(error)} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deeply
        return ValueError(f"not JSON that can be read: {error}")


def said(error: json.JSONDecodeError) -> str:
    """Return what is wrong, without the position: some of the messages end with "at"."""
    return error.msg.removesuffix(" at")


def _with_single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is given twice in one object")
    return values
