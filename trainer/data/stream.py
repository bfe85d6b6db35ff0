"""Read and tokenise the rows of sources while training, in an order that needs no list of them.

The units of the sources are put into another order for every epoch. Their rows follow each other, and a *window* is the
next `shuffle_rows` of them: they are shuffled, tokenised, and packed if wanted. Both orders are drawn from the seed,
the epoch and the place where the window begins, so that a window can be made again from its place alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trainer.config.schema import DataSource
from trainer.data.batches import IGNORED
from trainer.data.encode import Encoded, Encoder, Outcome, Outcomes, Overflow, Report, Sample
from trainer.data.errors import MAX_PROBLEMS, BadRows, DataError
from trainer.data.formats.base import Row
from trainer.data.further_keys import FurtherKeys
from trainer.data.order import due_turns, whole_shares
from trainer.data.pictures import Places
from trainer.data.plain_files import Records
from trainer.data.rows import RowReader, Unused, check_read
from trainer.data.sample_files import batch_of, pack_table
from trainer.data.tokenised import Part
from trainer.data.units import Unit, units_of

if TYPE_CHECKING:
    import pyarrow as pa

SHUFFLE_ROWS = 2048
_LONGEST_HEAD = 1000  # records that are looked at for one that can be read
# Up to a checkpoint no row was bad, so that its stream is the same if such rows are left out.
_ADVICE = "such rows are left out if the run is started, or resumed, with data.on_bad_row=drop"


class Place(NamedTuple):
    """Say where a window begins: at a row of a unit, which is numbered in the order of the epoch."""

    epoch: int
    unit: int
    row: int


class Window(NamedTuple):
    """Hold what is made of the rows of a window, shuffled; the rows of each source that could not be used; the
    generator that shuffled them; and where the next window begins."""

    encoded: Encoded
    bad: list[BadRows]
    order: np.random.Generator
    after: Place


@dataclass(frozen=True)
class Making:
    """How samples are made of rows."""

    encoder: Encoder
    max_length: int
    overflow: Overflow
    shuffle_rows: int
    packing: bool
    drop_bad: bool


class OpenSource:
    """A source of a stream: its units, and the checks of its rows, which go on as rows are read."""

    def __init__(self, source: DataSource) -> None:
        found = units_of(source)
        self.path, self.units, self.content, self.about = source.path, found.units, found.content, found.about
        self._ignore = source.ignore
        self.keys = FurtherKeys()
        self.ignored: dict[str, None] = {}
        head = RowReader(source.format, Unused(self.path, self._ignore), BadRows(self.path))
        for unit in self.units:
            records = [record for record, _ in zip(unit(), range(_LONGEST_HEAD), strict=False)]
            head.detect_format(records)
            if head.format != "auto":
                break
        self._format, self._first = head.format, head.first
        if not self.units:
            check_read(self.path, BadRows(self.path), 0)

    def reader(self, *, drop_bad: bool) -> tuple[RowReader, Unused, BadRows]:
        """Return a reader for the rows of a window, and what it collects."""
        unused, bad = Unused(self.path, self._ignore), BadRows(self.path, drop=drop_bad, advice=_ADVICE)
        return RowReader(self._format, unused, bad, first=self._first), unused, bad

    def check(self, rows: Sequence[Row], unused: Unused, encoder: Encoder) -> None:
        """Raise `DataError` for columns, and keys of messages, that no sample contains, and for images."""
        if (pictured := next((row.where for row in rows if row.images), None)) is not None:
            raise DataError([f"data.streaming: true, but {pictured} has an image; set data.streaming=false"])
        self.keys.look(rows, encoder.tokenizer, encoder.templates, self.keys.settled)
        self.keys.report(unused)
        self.ignored |= dict.fromkeys(unused.ignored)
        if unused.lost():
            raise DataError(unused.lost())


class Stream:
    """Take the samples of sources one after another, without end: epochs follow each other.

    `key` distinguishes the orders of several streams with one seed.
    """

    def __init__(self, sources: Sequence[OpenSource], making: Making, *, seed: int, key: Sequence[int] = ()) -> None:
        self.num_bad = 0  # rows that were left out
        self._units: list[tuple[OpenSource, Unit]] = [(source, unit) for source in sources for unit in source.units]
        self._paths = ", ".join(source.path for source in sources)
        self._making, self._seed, self._key = making, seed, tuple(key)
        self._window: list[Sample] = []
        self._taken = 0
        self._begin = self._next = Place(0, 0, 0)
        self._order: tuple[int, np.ndarray] | None = None  # an epoch, and its order of the units
        self._opened: tuple[Place, Records] | None = None  # the records from there on

    def take(self) -> Sample:
        """Return the next sample. Raises `DataError` for rows that cannot be used, unless they are dropped, and if a
        whole epoch has no sample."""
        epoch = self._next.epoch
        while self._taken >= len(self._window):
            if self._next.epoch > epoch + 1:
                raise DataError([f"{self._paths}: no sample is left; raise data.max_length, or mend the rows"])
            self._make(self._next)
            self._taken = 0
        self._taken += 1
        return self._window[self._taken - 1]

    @property
    def state(self) -> list[int]:
        """Return where the window of the last sample begins, and how many of its samples were taken."""
        return [*self._begin, self._taken]

    def go_to(self, state: Sequence[int]) -> None:
        """Continue from a `state`. One window is made again: its rows are read and tokenised, those before it are not;
        rows before it in its unit are read."""
        *place, taken = state
        self._window, self._taken = [], 0
        self._begin = self._next = Place(*place)
        if taken:
            self._make(self._next)
            self._taken = taken

    def _make(self, place: Place) -> None:
        made = self.window(place)
        self._begin, self._next = place, made.after
        self._window = list(made.encoded.samples)
        self.num_bad += sum(bad.count for bad in made.bad)
        if self._making.packing and self._window:
            rows = _samples(pack_table(_table(made.encoded), self._making.max_length))
            self._window = [rows[index] for index in made.order.permutation(len(rows))]

    def window(self, place: Place) -> Window:
        """Read and tokenise the window that begins at `place`."""
        records, after = self._read(place)
        words = np.random.SeedSequence([self._seed, place.epoch, *self._key, 1 + place.unit, 1 + place.row])
        order = np.random.Generator(np.random.PCG64(words))
        rows, making = [], self._making
        readers = {source: source.reader(drop_bad=making.drop_bad) for source in dict.fromkeys(s for s, _ in records)}
        for source, record in records:
            rows += [(source, row) for row in readers[source][0].read([record])]
        rows = [rows[index] for index in order.permutation(len(rows))]
        for source, (_, unused, bad) in readers.items():
            own = [row for of, row in rows if of is source]
            if not making.drop_bad or bad.count > MAX_PROBLEMS:  # the end of an epoch may be a few rows
                bad.check(len(own))
            source.check(own, unused, making.encoder)
        encoded = making.encoder.encode([row for _, row in rows])
        self._refuse(encoded, [readers[source][2] for source, _ in rows])
        return Window(encoded, [bad for _, _, bad in readers.values()], order, after)

    def _refuse(self, encoded: Encoded, bad: Sequence[BadRows]) -> None:
        """Raise `DataError` for rows that cannot be rendered, unless the `bad` rows of their source drop them, and for
        rows that are too long, if that is an error."""
        too_long = [problem for problem in encoded.problems if problem.outcome == Outcome.TOO_LONG]
        if too_long:
            advice = "raise data.max_length, or set data.overflow to truncate or drop"
            raise DataError([*map(str, too_long[:MAX_PROBLEMS]), advice])
        for problem in encoded.problems:
            bad[problem.row].add(problem.where, problem.what)
        if not self._making.drop_bad:
            for one in dict.fromkeys(bad):
                one.check(len(encoded.outcomes))

    def _read(self, place: Place) -> tuple[list[tuple[OpenSource, tuple[str, Any]]], Place]:
        """Return the records of the window that begins at `place`, and where the next one begins."""
        found: list[tuple[OpenSource, tuple[str, Any]]] = []
        epoch, number, row = place
        order = self._order_of(epoch)
        while number < len(order):
            source, unit = self._units[order[number]]
            if self._opened is None or self._opened[0] != (epoch, number, row):
                records = unit()
                for _ in zip(range(row), records, strict=False):
                    pass
                self._opened = (Place(epoch, number, row), records)
            for record in self._opened[1]:
                found.append((source, record))
                row += 1
                if len(found) == self._making.shuffle_rows:
                    self._opened = (Place(epoch, number, row), self._opened[1])
                    return found, self._opened[0]
            number, row, self._opened = number + 1, 0, None
        return found, Place(epoch + 1, 0, 0)

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            words = np.random.SeedSequence([self._seed, epoch, *self._key])
            self._order = (epoch, np.random.Generator(np.random.PCG64(words)).permutation(len(self._units)))
        return self._order[1]


class Streams:
    """Mix sources: without weights they are one stream, else each is a stream that has its share of the turns."""

    def __init__(
        self, sources: Sequence[OpenSource], making: Making, *, weights: Sequence[float] | None, seed: int
    ) -> None:
        self.sources = sources
        self._given = (sources, making, weights)
        self._shares = whole_shares([1.0] if weights is None else weights)
        if weights is None:
            self.streams = [Stream(sources, making, seed=seed)]
        else:
            self.streams = [Stream([one], making, seed=seed, key=[2 + i]) for i, one in enumerate(sources)]

    def samples(self, first: int, count: int) -> list[Sample]:
        """Return the next samples, which are those from position `first` of the mix on."""
        return [self.streams[source].take() for source, _ in due_turns(self._shares, first, first + count)]

    @property
    def num_bad(self) -> int:
        """Count the rows that were left out so far."""
        return sum(stream.num_bad for stream in self.streams)

    def another(self, seed: int, shuffle_rows: int, epoch: int) -> Streams:
        """Return streams of the same sources in another order, at the beginning of an epoch."""
        sources, making, weights = self._given
        found = Streams(sources, replace(making, shuffle_rows=shuffle_rows), weights=weights, seed=seed)
        for stream in found.streams:
            stream.go_to([epoch, 0, 0, 0])
        return found


def preview(source: OpenSource, making: Making, seed: int) -> Part:
    """Tokenise the first rows of a source, and report on them. Raises `DataError` if they cannot be used."""
    from datasets import Dataset

    encoded, found, *_ = Stream([source], making, seed=seed).window(Place(0, 0, 0))
    if not found:
        check_read(source.path, BadRows(source.path), 0)
    (bad,) = found
    outcomes = Outcomes()
    outcomes.add(encoded)
    every = np.full(len(encoded.outcomes), True)
    known = BadRows(source.path, drop=making.drop_bad)
    counts = outcomes.check(source.path, known, every, max_length=making.max_length, overflow=making.overflow)
    table = _table(encoded)
    if making.packing:
        table = pack_table(table, making.max_length)
    targets = int(np.count_nonzero(encoded.labels != IGNORED))
    spelling, tokens = outcomes.spelling(every)
    return Part(
        path=source.path,
        samples=Dataset(table).with_format("numpy"),
        report=Report(*counts, len(encoded.ids), targets),
        places=Places(Path(source.path), Path(source.path)),
        ignored=tuple(source.ignored),
        num_bad=bad.count,
        first_bad=tuple(bad.first),
        num_spelling=spelling,
        control_tokens=tuple(tokens),
        streamed=source.about,
    )


def _table(encoded: Encoded) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_batches([batch_of([encoded])])


def _samples(table: pa.Table) -> list[Sample]:
    columns = {name: table.column(name) for name in table.column_names}
    return [{name: column[index].values.to_numpy() for name, column in columns.items()} for index in range(len(table))]
