"""Read and write YAML: numbers and booleans of YAML 1.2's core schema, and limits on what a file may expand to.

PyYAML reads YAML 1.1, in which 1:30 is 90, 010 is 8 and `on` is true. Anchors, aliases and `<<` are read; tags are
not, so that a value has the type that its text shows.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

# Far above what any recipe needs. A file within them takes up to a second to read.
MOST_BYTES = 2**20
_MOST_VALUES = 50_000
_DEEPEST = 32
_MOST_DIGITS = 100

_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")
_SPECIAL_FLOAT = re.compile(r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")


class YamlError(ValueError):
    """Raised for text that cannot be read as YAML. `line` counts from 1; None means the whole text."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem, line)
        self.problem = problem
        self.line = line


def read(text: str) -> Any:
    """Return the value that `text` represents. Raises `YamlError`."""
    try:
        _check(text)
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise YamlError(
            error.problem or str(error), error.problem_mark.line + 1 if error.problem_mark else None
        ) from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise YamlError(str(error).replace("\n", " ")) from None


def write(values: Any) -> str:
    """Return YAML that `read`, and a reader of YAML 1.1, read back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key given twice. This runs before `<<` is resolved, which may repeat keys."""
        node = super().compose_mapping_node(anchor)
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _error(f"key {key.value!r} given twice", key)
                seen.add(key.value)
        return node


def _read_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > _MOST_DIGITS:
        raise _error(f"an integer of {len(text)} digits; allowed: up to {_MOST_DIGITS}", node)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_Loader.add_implicit_resolver(f"{_TAG}null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _SPECIAL_FLOAT, list("-+."))
_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"^<<$"), ["<"])
_Loader.add_constructor(f"{_TAG}int", _read_int)


class _Dumper(yaml.SafeDumper):
    """Quote strings that YAML 1.1 or 1.2 would read as something else, and repeat values instead of aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))


def _check(text: str) -> None:
    """Raise if reading `text` would take too long or never end, without exceeding the limits itself."""
    size = 0
    opened: list[tuple[str | None, int]] = []
    sizes: dict[str, int] = {}
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = size - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise _error(f"alias *{event.anchor} is inside what it stands for", event)
            size += sizes.get(event.anchor or "", 0)  # the composer refuses an undefined one
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            if event.tag is not None:
                raise _error(f"tag {event.tag.replace(_TAG, '!!')} is not read; write the value alone", event)
            if isinstance(event, yaml.ScalarEvent):
                size += 1
                if event.anchor is not None:
                    sizes[event.anchor] = 1
            else:
                opened.append((event.anchor, size))
                size += 1
        if len(opened) > _DEEPEST:
            raise _error(f"nested more than {_DEEPEST} deep", event)
        if size > _MOST_VALUES:
            raise _error(f"more than {_MOST_VALUES:,} values, aliases written out", event)


def _error(problem: str, at: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    mark = at.start_mark
    assert isinstance(mark, yaml.Mark), mark  # PyYAML's own parser always sets one; libyaml's are of another type
    return yaml.constructor.ConstructorError(None, None, problem, mark)
