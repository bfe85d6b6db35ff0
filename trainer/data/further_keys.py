"""Find the keys of messages, and of their calls, that the chat template writes in no row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer.data.answers import RefusedRow
from trainer.data.formats.base import Row
from trainer.data.formats.conversations import CALL_KEYS, FUNCTION_KEYS
from trainer.data.formats.fields import is_empty
from trainer.data.rendering import write
from trainer.data.rows import Unused
from trainer.data.templates import Templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = tuple[str, str]  # a key, and the role of its message
# The most rows that are rendered to find out whether the template writes a key.
_MOST_TRIES = 1000


class FurtherKeys:
    """Collect the keys that only some templates know, and whether the template writes them in any row.

    Every template reads `role`, `content` and calls; these are not checked. Rows may be looked at in pieces: `add`
    joins what was found in the next piece, and the result is that of looking at all rows at once.
    """

    def __init__(self) -> None:
        self._first: dict[Kind, str] = {}  # the first row that has them
        self._tries: Counter[Kind] = Counter()  # up to the one that succeeded
        self._written: set[Kind] = set()

    @property
    def written(self) -> list[list[str]]:
        """Return the kinds that the template writes in some row, as plain JSON."""
        return sorted(map(list, self._written))

    def remember(self, written: Iterable[Sequence[str]]) -> None:
        """Count kinds as `written` in rows that are not looked at again."""
        self._written |= {(key, role) for key, role in written}

    @property
    def settled(self) -> frozenset[Kind]:
        """Return the kinds for which no more rows need to be rendered."""
        return frozenset(self._written | {kind for kind, tries in self._tries.items() if tries >= _MOST_TRIES})

    def look(
        self,
        rows: Iterable[Row],
        tokenizer: PreTrainedTokenizerBase,
        templates: Templates,
        settled: Collection[Kind] = (),
    ) -> None:
        """Look at rows, but render none for the kinds that are `settled`."""
        for row in rows:
            for index, message in enumerate(row.messages):
                for key, without in _further_keys(message):
                    kind = (key, message["role"])
                    self._first.setdefault(kind, row.where)
                    # Some keys are written only in some places, such as the reasoning of a last turn.
                    if kind not in settled and kind not in self._written and self._tries[kind] < _MOST_TRIES:
                        self._tries[kind] += 1
                        if _writes(row, index, without, tokenizer, templates.for_row(row)):
                            self._written.add(kind)

    def add(self, later: FurtherKeys) -> None:
        for kind, where in later._first.items():
            self._first.setdefault(kind, where)
        for kind, tries in later._tries.items():
            if kind in self._written:
                continue
            self._tries[kind] += tries
            if kind in later._written and self._tries[kind] <= _MOST_TRIES:
                self._written.add(kind)

    def report(self, unused: Unused) -> None:
        """Report to `unused` the keys that were written in no row."""
        for kind, where in self._first.items():
            if kind not in self._written:
                key, role = kind
                # The call that the message answers contains the name of the function, too.
                unused.leave_out(where, key, harmless=key == "name" and role == "tool")


def _further_keys(message: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the keys of a message, its calls and their functions that only some templates know, each with the message
    without that key."""
    for key, value in message.items():
        if key not in ("role", "content", "tool_calls") and not is_empty(value):
            yield key, _without(message, key)
    calls = message.get("tool_calls", [])
    for number, call in enumerate(calls):
        function = call["function"]
        smaller = [(key, _without(call, key)) for key in call if key not in CALL_KEYS and not is_empty(call[key])]
        smaller += [
            (key, {**call, "function": _without(function, key)})
            for key in function
            if key not in FUNCTION_KEYS and not is_empty(function[key])
        ]
        for key, other in smaller:
            yield key, {**message, "tool_calls": [*calls[:number], other, *calls[number + 1 :]]}


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _writes(
    row: Row, index: int, without: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: str
) -> bool:
    """Return whether a template renders a row differently if message `index` is `without`, which lacks a key."""
    messages = list(row.messages)
    messages[index] = without
    try:
        return write(row, tokenizer, template) != write(replace(row, messages=tuple(messages)), tokenizer, template)
    except RefusedRow:  # encoding the row reports it
        return True
