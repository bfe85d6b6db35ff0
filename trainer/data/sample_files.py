"""Write files of samples, split and pack them: Arrow streams, the format that `datasets` maps into memory.

Files are written and read batch by batch and never mapped, so that memory does not grow with them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.encode import Encoded

if TYPE_CHECKING:
    import pyarrow as pa

# A process that maps a file reads the head of every batch, a page or more: batches must be few.
_TOKENS_PER_BATCH = 2**22
# TRL packs the samples of every 1000 rows.
_ROWS_PER_PACKING = 1000


class SampleFile:
    """Write samples {input_ids, labels}, as context manager. If any has images, all have a column `images`, too, which
    is null for those that have none."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._images = False
        self._open()
        self._waiting: list[Encoded] = []
        self._tokens = 0

    def _open(self) -> None:
        import pyarrow as pa

        self._sink = pa.OSFile(str(self._file), "wb")
        self._writer = pa.ipc.new_stream(self._sink, batch_of([], images=self._images).schema)

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, *failure: object) -> None:
        with self._sink, self._writer:
            if failure[0] is None:
                self._flush()

    def write(self, encoded: Encoded) -> None:
        if encoded.images and not self._images:
            self._add_column()
        self._waiting.append(encoded)
        self._tokens += len(encoded.ids)
        if self._tokens >= _TOKENS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._tokens:
            return
        self._writer.write_batch(batch_of(self._waiting, images=self._images))
        self._waiting.clear()
        self._tokens = 0

    def _add_column(self) -> None:
        """Copy what was written to a file whose samples have the column `images`."""
        import pyarrow as pa

        self._writer.close()
        self._sink.close()
        narrow = self._file.with_name("narrow.arrow")
        os.replace(self._file, narrow)
        self._images = True
        self._open()
        with read_batches(narrow) as batches:
            for batch in batches:
                self._writer.write_batch(batch.append_column("images", pa.nulls(batch.num_rows, pa.string())))
        narrow.unlink()


def batch_of(parts: Sequence[Encoded], *, images: bool = False) -> pa.RecordBatch:
    """Return the samples of `parts` as lists of int32 in the columns input_ids and labels, and the records of their
    images, if wanted, as texts in the column images."""
    import pyarrow as pa

    none = [np.zeros(0, dtype=np.int32)]
    lengths = np.concatenate([*none, *(one.lengths for one in parts)])
    borders = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    columns = {"input_ids": [one.ids for one in parts], "labels": [one.labels for one in parts]}
    lists = {
        name: pa.ListArray.from_arrays(borders, pa.array(np.concatenate([*none, *arrays])))
        for name, arrays in columns.items()
    }
    if images:
        records = [one.images.get(index) for one in parts for index in range(len(one.lengths))]
        lists["images"] = pa.array(records, pa.string())
    return pa.RecordBatch.from_arrays(list(lists.values()), names=list(lists))


def split_file(file: Path, other: Path, moved: np.ndarray) -> None:
    """Move the samples `moved` (bool, [samples]) of a file to a new file `other`; both keep their order."""
    import pyarrow as pa

    kept = file.with_name("kept.arrow")
    start = 0
    with (
        read_batches(file) as batches,
        _stream(kept, batches.schema) as first,
        _stream(other, batches.schema) as second,
    ):
        for batch in batches:
            chosen = moved[start : start + batch.num_rows]
            start += batch.num_rows
            first.write_batch(batch.filter(pa.array(~chosen)))
            second.write_batch(batch.filter(pa.array(chosen)))
    os.replace(kept, file)


def pack(file: Path, max_length: int) -> None:
    """Replace the samples of a file by rows of samples, best fit first. None is cut: none is longer than a row."""
    packed = file.with_name("packed.arrow")
    with ExitStack() as opened:
        batches = opened.enter_context(read_batches(file))
        writer = None
        for table in _tables(batches):
            found = pack_table(table, max_length)
            writer = writer or opened.enter_context(_stream(packed, found.schema))
            writer.write_table(found)
    os.replace(packed, file)


def pack_table(table: pa.Table, max_length: int) -> pa.Table:
    """Return rows of the samples {input_ids, labels} of a table, best fit first, with their `seq_lengths`."""
    from datasets import Dataset
    from trl import pack_dataset

    # A table in memory that has a name: else `datasets` would hash it, or store files.
    with _no_bars():
        samples = Dataset(table, fingerprint="samples")
        rows = pack_dataset(samples, max_length, "bfd", map_kwargs={"new_fingerprint": "rows"})
    return rows.with_format("arrow")[:]


def _tables(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yield tables of as many rows as TRL packs together, or several times as many; fewer at the end."""
    import pyarrow as pa

    waiting: pa.Table | None = None
    for batch in batches:
        table = pa.Table.from_batches([batch])
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        ready = len(waiting) // _ROWS_PER_PACKING * _ROWS_PER_PACKING
        if ready:
            yield waiting.slice(0, ready)
            waiting = waiting.slice(ready)
    if waiting is not None and len(waiting):
        yield waiting


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep `datasets` from showing a bar for each table."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def read_batches(file: Path) -> Iterator[Any]:
    """Open a file for a `with` block; the batches are to be iterated over, and have a `schema`."""
    import pyarrow as pa

    with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as batches:
        yield batches


@contextmanager
def _stream(file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatchStreamWriter]:
    import pyarrow as pa

    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        yield writer
