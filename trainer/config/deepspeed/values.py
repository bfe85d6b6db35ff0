"""Set values in a nested DeepSpeed configuration, by dotted paths; `trainer.settings.nested` reads them."""

from typing import Any

AUTO = "auto"


def assign(values: dict[str, Any], path: str, value: Any) -> None:
    *blocks, name = path.split(".")
    for block in blocks:
        values = values.setdefault(block, {})
    values[name] = value
