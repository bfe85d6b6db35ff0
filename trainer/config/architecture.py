"""Find sizes in a transformers configuration from which nothing can be built, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.text import in_short, quoted

# Part of a field's name -> the largest number. The deepest models have some hundred layers; building a hundred
# thousand takes minutes, even without weights.
_MOST = {"layer": 1000, "expert": 10_000}


def architecture_problems(key: str, fields: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each impossible size in `fields`, the value of `key` in the run configuration."""
    problems = []
    for holder, values in _mappings(key, fields):
        for name, value in values.items():
            most = next((most for part, most in _MOST.items() if part in str(name)), None)
            if most is not None and isinstance(value, int) and value > most:
                problems.append(f"{holder}.{in_short(str(name))}: got {quoted(value)}; allowed: up to {most:,}")
        heads, shared = (_count(values, name) for name in ("num_attention_heads", "num_key_value_heads"))
        if heads and shared and heads % shared:
            problems.append(
                f"{holder}.num_key_value_heads: {shared} does not divide num_attention_heads {heads}; each head of "
                "keys and values serves the same number of attention heads"
            )
    return problems


def _mappings(path: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield `values` and every mapping inside it (`text_config`), with its dotted path."""
    yield path, values
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _mappings(f"{path}.{name}", value)


def _count(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
