"""Remember what a chat template writes around the contents of messages."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, zip_longest

from trainer.data.formats.base import Row

_MOST = 1000


class Shapes:
    """The texts between the contents of conversations, by template and the roles of the messages.

    Most conversations are written like an earlier one with the same roles. If the texts of that one and their own
    contents make up the whole, then the template has left out none of them, and this is known without rendering the
    conversation once more with marks in it.
    """

    def __init__(self) -> None:
        self._between: dict[tuple[str, ...], list[str]] = {}

    def explain(self, row: Row, template: str, text: str) -> bool:
        """Return whether a known shape and the contents of a row make up the whole `text` of it."""
        between = self._between.get(_key(row, template))
        return between is not None and _has_only_contents(row) and _joined(between, row) == text

    def learn(self, row: Row, template: str, text: str, marked: str, mark: Callable[[int], str]) -> None:
        """Take the shape of a row, whose text with `mark(index)` after the content of each message is `marked`."""
        if len(self._between) >= _MOST or not _has_only_contents(row):
            return
        between, position = [], 0
        for index, message in enumerate(row.messages):
            end = marked.find(mark(index), position)
            start = end - len(message["content"])
            if start < position or marked[start:end] != message["content"]:
                return
            between.append(marked[position:start])
            position = end + len(mark(index))
        between.append(marked[position:])
        if _joined(between, row) == text:
            self._between[_key(row, template)] = between


def _key(row: Row, template: str) -> tuple[str, ...]:
    return (template, *(message["role"] for message in row.messages))


def _has_only_contents(row: Row) -> bool:
    return not row.tools and not any("tool_calls" in message for message in row.messages)


def _joined(between: list[str], row: Row) -> str:
    contents = (message["content"] for message in row.messages)
    return "".join(chain.from_iterable(zip_longest(between, contents, fillvalue="")))
