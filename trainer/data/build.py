"""Build the files of a source's samples: read, check, render and tokenise its records in pieces, by all cores."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.cluster.ranks import cores_of_process
from trainer.config.schema import DataSource
from trainer.data.cached import check_samples
from trainer.data.encode import ROWS_PER_CHUNK, Encoded, Encoder, Outcomes, Overflow, Report
from trainer.data.errors import BadRows, DataError
from trainer.data.further_keys import FurtherKeys, Kind
from trainer.data.plain_files import Position
from trainer.data.progress import RowProgress
from trainer.data.rows import RowReader, Unused, check_read
from trainer.data.sample_files import SampleFile, pack, split_file
from trainer.data.sources import Opened
from trainer.data.tokenizer import vocabulary_size
from trainer.data.workers import in_order

TRAIN, HELD_OUT = "train", "held_out"  # the splits of a source in its folder of the cache
# More processes than this do not get their pieces fast enough from the one that reads.
_MOST_PROCESSES = 16
# A piece of long rows ends before ROWS_PER_CHUNK: what is made of it takes many times its text in memory.
_MOST_CHARACTERS = 2**22


class _Piece(NamedTuple):
    """Consecutive records, and what the records before have decided."""

    records: list[tuple[str, Any]]
    format: str
    first: str | None
    settled: frozenset[Kind]
    share: float  # of the source that has been read with it


class _Made(NamedTuple):
    """Hold what a process made of a piece. `failure` is an error that concerns the tokenizer, not a row."""

    num_rows: int
    bad: BadRows
    unused: Unused
    keys: FurtherKeys
    encoded: Encoded | None
    failure: DataError | None
    share: float


@dataclass(frozen=True)
class Builder:
    """Build the files of sources with one tokenizer and the same settings."""

    encoder: Encoder
    max_length: int
    overflow: Overflow
    packing: bool
    drop_bad: bool
    seed: int

    def build(self, folder: Path, source: DataSource, opened: Opened, eval_fraction: float) -> dict[str, Any]:
        """Write a file of samples for each split into `folder`, and return what `cached.seal` is to record.

        Rows are not held in memory. What is wrong with them is reported in this order, as if all were read before any
        is tokenised: records that cannot be read, columns that are not used, rows that cannot be tokenised.
        """
        bad, unused = BadRows(source.path, drop=self.drop_bad), Unused(source.path, source.ignore)
        outcomes = Outcomes()
        file = folder / f"{TRAIN}.arrow"
        self._encode(file, source, opened, bad, unused, outcomes)
        chosen = {TRAIN: np.full(outcomes.num_rows, True)}
        held_out = held_out_rows(source.path, outcomes.num_rows, eval_fraction, self.seed)
        if held_out is not None:
            split_file(file, folder / f"{HELD_OUT}.arrow", held_out[outcomes.of_samples])
            chosen = {TRAIN: ~held_out, HELD_OUT: held_out}
        info: dict[str, Any] = {"reports": {}}
        for name, rows in chosen.items():
            counts = outcomes.check(source.path, bad, rows, max_length=self.max_length, overflow=self.overflow)
            file = folder / f"{name}.arrow"
            if self.packing:
                pack(file, self.max_length)
            tokens = check_samples(file, vocabulary=vocabulary_size(self.encoder.tokenizer), max_length=self.max_length)
            info["reports"][name] = asdict(Report(*counts, *tokens))
        spelling = [outcomes.spelling(rows) for rows in chosen.values()]
        spelt = dict.fromkeys(token for _, names in spelling for token in names)
        return info | {
            "ignored": list(unused.ignored),
            "num_bad": bad.count,
            "first_bad": bad.first,
            "num_spelling": sum(count for count, _ in spelling),
            "control_tokens": list(spelt),
        }

    def _encode(
        self, file: Path, source: DataSource, opened: Opened, bad: BadRows, unused: Unused, outcomes: Outcomes
    ) -> None:
        keys, failure, num_rows = FurtherKeys(), None, 0
        work = _Work(source, self.encoder, self.packing)
        processes = min(cores_of_process(os.environ), _MOST_PROCESSES)
        with ExitStack() as opening:
            samples = opening.enter_context(SampleFile(file))
            progress = opening.enter_context(closing(RowProgress(source.path)))
            opening.enter_context(_short_collections())
            done = in_order(work, _pieces(source, opened, keys), processes=processes)
            for made in opening.enter_context(closing(done)):
                bad.add_all(made.bad)
                unused.add(made.unused)
                keys.add(made.keys)
                failure = failure or made.failure
                num_rows += made.num_rows
                if made.encoded is not None and failure is None:
                    outcomes.add(made.encoded)
                    samples.write(made.encoded)
                progress.add(made.num_rows, made.share)
        check_read(source.path, bad, num_rows)
        keys.report(unused)
        if unused.problems():
            raise DataError(unused.problems())
        if failure is not None:
            raise failure


@contextmanager
def _short_collections() -> Iterator[None]:
    """Keep the garbage collector from looking through all imported modules again and again, in every process."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _pieces(source: DataSource, opened: Opened, keys: FurtherKeys) -> Iterator[_Piece]:
    """Yield the records of a source in pieces. `keys` are collected meanwhile."""
    reader = RowReader(source.format, Unused(source.path, source.ignore), BadRows(source.path))
    position = Position()
    records = opened.records(position)
    while piece := _next_piece(records):
        share = min(1.0, position.done / opened.size) if opened.size else 1.0
        yield _Piece(piece, reader.format, reader.first, keys.settled, share)
        reader.detect_format(piece)


def _next_piece(records: Iterator[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the next records: ROWS_PER_CHUNK, or fewer whose text reaches _MOST_CHARACTERS."""
    piece, size = [], 0
    for record in islice(records, ROWS_PER_CHUNK):
        piece.append(record)
        size += _characters(record[1])
        if size >= _MOST_CHARACTERS:
            break
    return piece


def _characters(record: Any) -> int:
    """Return the length of the texts in a record; of one that is a line of JSON, all of it."""
    size, values = 0, [record]
    while values:  # without recursion: a record may be nested deeply
        value = values.pop()
        if isinstance(value, str | bytes):
            size += len(value)
        elif isinstance(value, Mapping):
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value
    return size


class _Work:
    """Make samples of the records of a piece."""

    def __init__(self, source: DataSource, encoder: Encoder, packing: bool) -> None:
        self._source, self._encoder, self._packing = source, encoder, packing

    def __call__(self, piece: _Piece) -> _Made:
        path = self._source.path
        unused, bad, keys = Unused(path, self._source.ignore), BadRows(path, drop=True), FurtherKeys()
        rows = list(RowReader(piece.format, unused, bad, first=piece.first).read(piece.records))
        encoded = failure = None
        try:
            if self._packing and (pictured := next((row.where for row in rows if row.images), None)):
                raise DataError([f"data.packing: true, but {pictured} has an image; set data.packing=false"])
            keys.look(rows, self._encoder.tokenizer, self._encoder.templates, piece.settled)
            encoded = self._encoder.encode(rows)
        except DataError as error:
            failure = error
        return _Made(len(rows), bad, unused, keys, encoded, failure, piece.share)


def held_out_rows(path: str, num_rows: int, eval_fraction: float, seed: int) -> np.ndarray | None:
    """Return which rows are held out, bool, [rows]; None if their share is 0 rows, as for a small source of a mix."""
    num_eval = round(num_rows * eval_fraction)
    if num_eval == num_rows:
        raise DataError(
            [f"data.eval_fraction: {eval_fraction} of the {num_rows} rows of {path} leaves none to train on"]
        )
    if not num_eval:
        return None
    # The third word separates this draw from those of epochs, which have no third word, or one >= 2 (see SampleOrder).
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0, 1]))).permutation(num_rows)
    held_out = np.zeros(num_rows, dtype=bool)
    held_out[order[:num_eval]] = True
    return held_out
