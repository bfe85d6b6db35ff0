"""Data files as checked rows: JSON objects, one per line, of the three shapes that can be trained on."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = (("question", "answer"), ("prompt", "completion"), ("messages",))
KNOWN_SHAPES = "{question, answer}, {prompt, completion} or {messages: [{role, content}, ...]}"
MAX_PROBLEMS = 10  # one broken line is often one of thousands


class DataError(ValueError):
    """Data that cannot be trained on. `problems` holds one line each, with file and line or the key to change."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Row:
    """One line of a data file: `messages`, or else a prompt and its answer."""

    line: int
    prompt: str = ""
    answer: str = ""
    messages: tuple[Mapping[str, str], ...] = ()


def read_rows(path: str | Path) -> list[Row]:
    """Reads a file of JSON objects, one per line; blank lines are skipped, keys that no shape knows are ignored.

    The first row's shape is the file's. Raises DataError with up to ten problems, each with file and line.
    """
    rows: list[Row] = []
    problems: list[str] = []
    first: tuple[int, tuple[str, ...]] | None = None
    for number, line in _lines(path):
        try:
            shape, values = _parse(line)
            first = first or (number, shape)
            if shape != first[1]:
                raise ValueError(f"a row of {_braces(shape)}, but line {first[0]} is {_braces(first[1])}; do not mix")
            rows.append(_row(number, shape, values))
        except ValueError as problem:
            problems.append(f"{path}:{number}: {problem}")
            if len(problems) == MAX_PROBLEMS:
                raise DataError([*problems, f"{path}: stopped after {MAX_PROBLEMS} problems"]) from None
    if problems:
        raise DataError(problems)
    if not rows:
        raise DataError([f"{path}: holds no rows; one JSON object per line is needed, {KNOWN_SHAPES}"])
    return rows


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if content.strip():
                    yield number, content
    except OSError as error:
        raise DataError([f"{path}: cannot be read: {error.strerror or error}"]) from error


def _parse(line: bytes) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The shape of a line and its values; ValueError says what is wrong with it."""
    try:
        values = json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: byte {line[error.start]:#04x} at column {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{_kind(values)} where an object is needed, {KNOWN_SHAPES}")
    found = [shape for shape in SHAPES if all(key in values for key in shape)]
    if len(found) != 1:
        what = "more than one shape" if found else "no known shape"
        raise ValueError(f"{what}: the row has {_braces(values)}; known are {KNOWN_SHAPES}")
    return found[0], values


def _row(number: int, shape: tuple[str, ...], values: Mapping[str, Any]) -> Row:
    if shape == ("messages",):
        return Row(number, messages=_messages(values["messages"]))
    first, answer = (_text(values[key], key) for key in shape)
    return Row(number, prompt=f"Question: {first}\nAnswer: " if shape[0] == "question" else first, answer=answer)


def _messages(values: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"messages: {_kind(values)} where a list of {{role, content}} is needed, not empty")
    messages = []
    for index, value in enumerate(values):
        if not isinstance(value, dict) or "role" not in value or "content" not in value:
            what = _braces(value) if isinstance(value, dict) else _kind(value)
            raise ValueError(f"messages[{index}]: {what} where {{role, content}} is needed")
        if value.get("tool_calls"):
            raise ValueError(f"messages[{index}]: tool_calls are not supported; write the call into the content")
        messages.append({key: _text(value[key], f"messages[{index}].{key}") for key in ("role", "content")})
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("messages: no message with role 'assistant', so nothing to train on")
    return tuple(messages)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key}: {_kind(value)} where a string is needed, not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, tokenizers cannot encode it
        raise ValueError(f"{key}: lone surrogate {value[error.start]!a} at character {error.start + 1}") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    if value is None:
        return "null"
    kind = names[type(value)]
    return f"empty {kind}" if value in ("", [], {}) else f"{kind} {textwrap.shorten(json.dumps(value), 40)}"


def _braces(keys: Mapping[str, Any] | Sequence[str]) -> str:
    return "{" + ", ".join(keys) + "}"
