"""Make checked rows from records, whose format is detected by their columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from trainer.data.errors import BadRows, DataError
from trainer.data.formats import FORMATS
from trainer.data.formats.base import Row
from trainer.data.formats.fields import braces, is_empty, kind
from trainer.data.strict_json import parse_line

# Columns, and keys of messages, that say where a row comes from. They are left out, and named. `parallel_tool_calls` is
# a setting of OpenAI's interface, stored beside their `messages`.
_ABOUT_THE_ROW = re.compile(
    r"(\w+_)?(id|ids|idx|index|uuid|guid|hash|sha256)|__index_level_0__|unnamed: 0|url|license|sources?|dataset|"
    r"dataset_name|meta|metadata|timestamp|created_at|updated_at|split|parallel_tool_calls",
    re.IGNORECASE,
)


class Unused:
    """Collect the columns of a source, and the keys of its messages, that its samples do not contain.

    They may be left out if they only say where a row comes from, are named by `ignore`, or repeat what the sample
    contains; `ignored` names these. Any other is a problem, because an answer may depend on it.
    """

    def __init__(self, path: str, ignore: Sequence[str] = ()) -> None:
        self._path = path
        self._ignore = frozenset(ignore)
        self._ignored: dict[str, None] = {}  # in the order of their first rows
        self._lost: dict[str, str] = {}  # name: the first row that has it

    @property
    def ignored(self) -> tuple[str, ...]:
        return tuple(self._ignored)

    @property
    def ignores(self) -> bool:
        return bool(self._ignore)

    def without_ignored(self, values: Any, keep: Sequence[str] = ()) -> Any:
        """Return a mapping without the keys that `ignore` names, except those in `keep`; anything else unchanged."""
        if not self._ignore or not isinstance(values, Mapping):
            return values
        left_out = [name for name in values if name in self._ignore and name not in keep]
        self._ignored.update(dict.fromkeys(left_out))
        return {name: value for name, value in values.items() if name not in left_out} if left_out else values

    def add(self, later: Unused) -> None:
        """Join what was collected from the rows after those of `self`."""
        self._ignored.update(later._ignored)
        for name, where in later._lost.items():
            self._lost.setdefault(name, where)

    def leave_out(self, where: str, name: str, *, harmless: bool = False) -> None:
        """Record that the sample of the row `where` lacks `name`, which is a problem unless that is `harmless`."""
        if harmless or not name or _ABOUT_THE_ROW.fullmatch(name):  # pandas writes its index without a name
            self._ignored[name] = None
        else:
            self._lost.setdefault(name, where)

    def lost(self) -> list[str]:
        """Return what is wrong with columns and keys that are in no sample; nothing if there are none."""
        if not self._lost:
            return []
        names = ", ".join(self._lost)
        first = next(iter(self._lost.values()))
        return [
            f"{first}: has {{{names}}}, which would not be in the sample, although the answer may depend on it; "
            f"put it into a column that the format uses ({_known_with_optional()}), or leave it out by "
            f"naming the source as {{path: {self._path}, ignore: [{names}]}}"
        ]

    def problems(self) -> list[str]:
        """Return what is wrong once all rows were read: `lost`, and names in `ignore` that no row has."""
        problems = self.lost()
        unknown = sorted(self._ignore - set(self._ignored))
        if unknown:
            problems.append(
                f"{self._path}: ignore: no row has {braces(unknown)}; name columns or keys of messages that rows have"
            )
        return problems


class RowReader:
    """Make checked rows from records, a piece of a source after another.

    With `format` "auto" the columns of the first row that fits a format determine it; `first` is the place of that row,
    once it was seen. Records that cannot be read are added to `bad`, columns that the format does not use to `unused`.
    """

    def __init__(self, format: str, unused: Unused, bad: BadRows, *, first: str | None = None) -> None:
        self.format, self.first = format, first
        self._unused, self._bad = unused, bad

    def read(self, records: Iterable[tuple[str, Any]]) -> Iterator[Row]:
        """Yield a row for each record that can be read. A record of bytes is a line of JSON."""
        for where, values in records:
            try:
                values = self._unused.without_ignored(_mapping(values))
                if self.format == "auto":
                    self.format, self.first = detect(values), where
                yield _row(where, values, self.format, self.first, self._unused)
            except (ValueError, RecursionError) as problem:
                self._bad.add(where, problem)

    def detect_format(self, records: Iterable[tuple[str, Any]]) -> None:
        """Determine the format as `read` does, without reading rows."""
        for where, values in records:
            if self.format != "auto":
                return
            try:
                self.format, self.first = detect(self._unused.without_ignored(_mapping(values))), where
            except (ValueError, RecursionError):
                continue


def _mapping(values: Any) -> Mapping[str, Any]:
    """Return the mapping that a record is. Raises `ValueError` if it is something else, or could not be read."""
    if isinstance(values, bytes):
        values = parse_line(values)
    if isinstance(values, ValueError):
        raise values
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind(values)}, but an object is needed, {_known()}")
    return values


def read_rows(
    path: str, records: Iterable[tuple[str, Any]], format: str = "auto", unused: Unused | None = None
) -> list[Row]:
    """Return checked rows of the records of a `sources.Opened`, of a source that fits in memory.

    Raises `DataError` with up to ten problems. Columns that the format does not use are collected in `unused`; without
    it they are raised.
    """
    collected, bad = Unused(path) if unused is None else unused, BadRows(path)
    rows = list(RowReader(format, collected, bad).read(records))
    if unused is None and collected.problems():
        raise DataError([*bad.first, *collected.problems()])
    check_read(path, bad, len(rows))
    return rows


def check_read(path: str, bad: BadRows, num_rows: int) -> None:
    """Raise `DataError` if rows of a source could not be read, unless `bad` drops them, or if there are none."""
    bad.check(num_rows)
    if not num_rows:
        what = f"none of {bad.count} rows can be used" if bad.count else "contains no rows"
        raise DataError([*bad.first, f"{path}: {what}; each must be {_known()}"])


def detect(values: Mapping[str, Any]) -> str:
    """Return the format that a row's columns determine. Raises `ValueError` if they fit none or several."""
    complete = _complete(values)
    # In a table every row has all columns, so columns with values decide between several formats.
    filled = _complete({name: value for name, value in values.items() if value is not None})
    if len(filled) == 1:
        return filled[0]
    if len(complete) == 1:
        return complete[0]
    if complete:
        raise ValueError(
            f"the row's columns {braces(values)} fit several formats; state one of them by naming the source as "
            f"{{path: ..., format: {' | '.join(complete)}}}"
        )
    raise ValueError(f"no known format (format: auto): the row has {braces(values)}; known are {_known()}")


def _complete(values: Mapping[str, Any]) -> list[str]:
    """Return the formats whose required columns are all in a row."""
    return [name for name, format in FORMATS.items() if all(column in values for column in format.columns)]


def _row(where: str, values: Mapping[str, Any], name: str, first: str | None, unused: Unused) -> Row:
    format = FORMATS[name]
    missing = [column for column in format.columns if column not in values]
    if missing:
        given = f"by {first}" if first else "as stated"
        raise ValueError(
            f"column {', '.join(missing)} missing: the row has {braces(values)}, but the format is {name} "
            f"{braces(format.columns)} {given}; do not mix formats in one file"
        )
    if unused.ignores:
        values = format.without_ignored(values, unused.without_ignored)
    row = format.read(where, values)
    for key, harmless in format.unread(values):
        unused.leave_out(where, key, harmless=harmless)
    used = (*format.columns, *(format.optional if format.takes_optional(values) else ()))
    # Some data sets repeat, for example, the first message in a column.
    contained = [*(values.get(column) for column in used), *(message["content"] for message in row.messages)]
    # If the format was stated, columns of other formats are harmless: the user did not choose them.
    others = _complete(values) if first is None else []
    not_chosen = {column for other in others for column in FORMATS[other].columns}
    for column in (column for column in values if column not in used):
        if not is_empty(values[column]):
            unused.leave_out(where, column, harmless=column in not_chosen or values[column] in contained)
    return row


def _known_with_optional() -> str:
    return ", ".join(f"{name} {braces([*format.columns, *format.optional])}" for name, format in FORMATS.items())


def _known() -> str:
    return ", ".join(f"{braces(format.columns)}" for format in FORMATS.values())
