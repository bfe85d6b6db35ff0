"""Values in nested mappings, by dotted path."""

from collections.abc import Mapping
from typing import Any


def get(values: Any, path: str, default: Any = None) -> Any:
    """Return the value at `path` (a.b.c), or `default` if it is missing."""
    for name in path.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return default
        values = values[name]
    return values


def number(values: Mapping[str, Any], path: str, default: float = 0) -> float:
    """Return the number at `path`, or `default` if there is none."""
    value = get(values, path)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default
