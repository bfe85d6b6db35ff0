"""Read how a configuration names data: one path, a source with its keys, or a list of these."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

# The formats of rows, each in a file of its name in trainer/data/formats: their columns, for the help of `format`.
FORMATS = {
    "alpaca": "{instruction, output}, optionally input, history, system",
    "qa": "{question, answer}, optionally context, system",
    "prompt": "{prompt, completion}, texts, or lists of messages with optionally system, tools, images",
    "preference": "{chosen, rejected} as TRL has them, trains on chosen, optionally prompt, system, tools, images",
    "messages": "{messages} as OpenAI writes them, optionally system, tools, images",
    "sharegpt": "{conversations}, optionally system, tools, images",
    "text": "{text}, with the loss on every token",
}
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+?)(?::(\w[^/]*))?")


def source_list(value: Any) -> Any:
    """Return the sources that `data.train` or `data.eval` names, each as a mapping; a wrong type is kept as it is."""
    if isinstance(value, str | Mapping | BaseModel):
        value = [value]
    return [_spelled_out(entry) for entry in value] if isinstance(value, list | tuple) else value


def _spelled_out(source: Any) -> Any:
    if not isinstance(source, str):
        return source
    name, split = hub_name(source) or (source, None)
    return {"path": name, "split": split} if split else {"path": source}


def hub_name(path: str) -> tuple[str, str | None] | None:
    """Return (owner/name, split or None) of a path that may name a data set on the Hub; None for the name of a file."""
    match = _HUB_NAME.fullmatch(path)
    return None if match is None or path.endswith(DATA_SUFFIXES) else (match[1], match[2])
