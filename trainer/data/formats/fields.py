"""Check the values of a row's fields. A `ValueError` says what was received instead."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.data import strict_json


def is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def plain(value: Any, key: str) -> Any:
    """Return `value` as plain JSON, without the keys whose value is null, at every depth.

    In a table every object has all the keys that any of them has, with null for a missing key. A null therefore means
    a missing key, however a source is read. Arguments of a call that are spelled as a string keep their nulls.
    """
    if isinstance(value, Mapping):
        return {name: plain(inner, f"{key}.{name}") for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [plain(inner, f"{key}[{index}]") for index, inner in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(
        f"{key}: {kind(value)}, a type that tables have and JSON does not; write it as text, which JSON files and "
        "columns of strings do not change"
    )


def parsed(value: Any, key: str, wanted: type | tuple[type, ...], needed: str) -> Any:
    """Return `value`, or the value of its JSON if it is a string. Raises `ValueError` if that is not a `wanted`."""
    parsed = value
    if isinstance(value, str):
        try:
            parsed = strict_json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
    if not isinstance(parsed, wanted):
        raise ValueError(f"{key}: {kind(value)}, but {needed} is needed, or its JSON as a string")
    return parsed


def answer(value: Any, key: str) -> str:
    """Return the text of an answer, which may be empty: such rows of published data sets are dropped and counted."""
    return "" if value in (None, "") else text(value, key)


def text(value: Any, key: str) -> str:
    """Return `value`. Raises `ValueError` if it is not a non-empty string that can be encoded in UTF-8."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key}: {kind(value)}, but a non-empty string is needed")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, tokenizers cannot encode it
        raise ValueError(f"{key}: lone surrogate {value[error.start]!a} at character {error.start + 1}") from None
    return value


def kind(value: Any) -> str:
    """Describe a value for a message: its type and the beginning of its JSON."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    if value is None:
        return "null"
    kind = names.get(type(value), type(value).__name__)  # tables have more types than JSON
    return (
        f"empty {kind}" if value in ("", [], {}) else f"{kind} {textwrap.shorten(json.dumps(value, default=str), 40)}"
    )


def braces(keys: Mapping[str, Any] | Sequence[str]) -> str:
    return "{" + ", ".join(map(str, keys)) + "}"
