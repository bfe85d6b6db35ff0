"""How a configuration names data: one path, a source with its keys, or a list of these."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+?)(?::(\w[^/]*))?")


def source_list(value: Any) -> Any:
    """The sources that `data.train` or `data.eval` names, each a mapping; what is of a wrong type stays as it is."""
    if isinstance(value, str | Mapping | BaseModel):
        value = [value]
    return [_spelled_out(entry) for entry in value] if isinstance(value, list | tuple) else value


def _spelled_out(source: Any) -> Any:
    if not isinstance(source, str):
        return source
    name, split = hub_name(source) or (source, None)
    return {"path": name, "split": split} if split else {"path": source}


def hub_name(path: str) -> tuple[str, str | None] | None:
    """(owner/name, split or None) of a path that may stand for a data set on the Hub; None for a file's name."""
    match = _HUB_NAME.fullmatch(path)
    return None if match is None or path.endswith(DATA_SUFFIXES) else (match[1], match[2])
