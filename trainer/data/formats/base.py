"""Define a format of rows: its required and optional columns, and how a row is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.formats.fields import braces, text
from trainer.data.formats.images import Image

# Columns with the system prompt.
SYSTEM = ("system", "system_prompt")


@dataclass(frozen=True)
class Row:
    """One row: `messages`, or else a `prompt` (empty for plain text) and its `answer`.

    `where` is how error messages name the row. `trains` says for each assistant message whether its tokens are targets.
    `verbatim` texts may contain control tokens, which others keep as text. `images` are those of all messages, in
    order; the contents have `images.MARK` in their places. `rejected` is the same prompt with another answer, to which
    that of this row is preferred.
    """

    where: str
    prompt: str = ""
    answer: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    trains: tuple[bool, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    verbatim: bool = False
    images: tuple[Image, ...] = ()
    rejected: Row | None = None


# Returns a mapping without the keys that the user ignores, except for the named ones.
Ignore = Callable[[Any, Sequence[str]], Any]


@dataclass(frozen=True)
class Format:
    """A way to write a sample as a row.

    `columns` are required and identify the format; `optional` are those with an established meaning. Of both, `texts`
    contain text and nothing else, and `messages` may contain lists of messages. The reader of tables needs both,
    because a column of JSON may store a text as if it were a value.
    `read(where, values)` returns a checked row, or raises `ValueError`. `takes_optional(values)` returns whether a row
    has a place for the optional columns. Two functions concern formats whose columns contain objects:
    `without_ignored(values, ignore)` removes the keys that a user ignores from the objects, and `unread(values)` yields
    the keys in them that `read` does not use, each with whether leaving it out is harmless.
    """

    columns: tuple[str, ...]
    read: Callable[[str, Mapping[str, Any]], Row]
    optional: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()
    takes_optional: Callable[[Mapping[str, Any]], bool] = lambda values: True
    without_ignored: Callable[[Mapping[str, Any], Ignore], Mapping[str, Any]] = lambda values, ignore: values
    unread: Callable[[Mapping[str, Any]], Iterator[tuple[str, bool]]] = lambda values: iter(())


def system_prompt(values: Mapping[str, Any]) -> str | None:
    """Return the system prompt of a row, if it has one. Raises `ValueError` if both columns have a value."""
    given = [name for name in SYSTEM if values.get(name) not in (None, "")]
    if len(given) > 1:
        raise ValueError(f"{braces(given)}: both have a value; leave one out by ignore: [{given[1]}]")
    return text(values[given[0]], given[0]) if given else None
