"""Read JSON as `json.loads` does, but refuse an object with a duplicate key: it is unclear which value is meant."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str) -> Any:
    """Return the value of `text`. Raises `ValueError` (of which `json.JSONDecodeError` is a subclass), or
    `RecursionError` if the text is nested too deeply."""
    return json.loads(text, object_pairs_hook=_with_single_keys)


def _with_single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is given twice in one object")
    return values
