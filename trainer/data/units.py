"""Divide sources into units, pieces that can be read from their beginning: of lines, of row groups, or whole files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from trainer.config.schema import DataSource
from trainer.config.sources import DATA_SUFFIXES, hub_name
from trainer.data.errors import DataError, in_short
from trainer.data.plain_files import (
    READERS,
    ROWS_PER_READ,
    Position,
    Records,
    has_json_lines,
    read_csv,
    read_json,
    table_rows,
)
from trainer.data.sources import is_saved, open_saved, plain_files

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Unit = Callable[[], Records]

# Small enough that a few thousand rows come from many places of a file, large enough to be read at once; but no file
# has more units than an order of them takes memory for.
_BYTES, _MOST = 2**16, 2**20
_ROWS = 128
# Of a file, what is read to recognise it: hashing all of it would take hours.
_EDGE = 2**16


@dataclass(frozen=True)
class Units:
    """The units of a source, what identifies them (plain JSON), and a few words about them."""

    units: Sequence[Unit]
    content: list[Any]
    about: str


def units_of(source: DataSource) -> Units:
    """Divide a source. Raises `DataError` if there is nothing to read."""
    file = Path(source.path).expanduser()
    if is_saved(file):
        return _rows_of_saved(open_saved(source), source.path)
    if file.is_dir() or (not file.exists() and hub_name(source.path)):
        return _units_of_folder(source)
    if file.suffix not in READERS:
        raise DataError([f"{source.path}: not the name of a data file; allowed: {' | '.join(DATA_SUFFIXES)}"])
    if not file.is_file():
        raise DataError([f"{source.path}: cannot be read: No such file"])
    return _of_files([(source.path, file)], {})


def _units_of_folder(source: DataSource) -> Units:
    from datasets import load_dataset_builder

    split = source.split or "train"
    if "[" in split or "+" in split:
        raise DataError(
            [f"{source.path}: split={split!r}: a part of a split cannot be streamed; name a whole one, or its files"]
        )
    try:
        found = plain_files(source, split, ("json", "csv", "parquet")) if Path(source.path).is_dir() else None
        if found is not None:
            files, options = found
            return _of_files([(str(file), file) for file in files], options)
        builder = load_dataset_builder(source.path, source.subset)
        stream = builder.as_streaming_dataset(split=split)
    except DataError:
        raise
    except Exception as error:  # datasets, huggingface_hub, requests and pyarrow raise many kinds
        raise DataError(
            [
                f"{source.path}: no data set here or on the Hub can be streamed under this name with split={split!r} "
                f"and subset={source.subset!r}: {in_short(error)}"
            ]
        ) from error
    shards = stream.num_shards
    units = [partial(_shard, source.path, stream, shards, index) for index in range(shards)]
    return Units(units, [builder.config_id, builder.hash, split, shards], f"{shards} shards")


def _shard(path: str, stream: IterableDataset, shards: int, index: int) -> Records:
    tables = stream.shard(shards, index).with_format("arrow").iter(ROWS_PER_READ)
    batches = (batch for table in tables for batch in table.to_batches())
    return table_rows(f"{path}, shard {index + 1}", batches, Position())


def _rows_of_saved(saved: Dataset, path: str) -> Units:
    tables = saved.with_format("arrow")

    def read(start: int) -> Records:
        return table_rows(path, tables[start : start + _ROWS].to_batches(), Position(), first=start)

    files = [_identity(Path(entry["filename"])) for entry in saved.cache_files]
    return Units([partial(read, start) for start in range(0, len(saved), _ROWS)], files, f"{len(saved):,} rows")


def _of_files(files: Sequence[tuple[str, Path]], options: dict[str, Any]) -> Units:
    try:
        units = [unit for path, file in files for unit in _of_file(path, file, options)]
        content = [_identity(file) for _, file in files]
    except OSError as error:
        raise DataError([f"{error.filename}: cannot be read: {error.strerror or error}"]) from error
    size = sum(file.stat().st_size for _, file in files) / 1e9
    return Units(units, content, f"{len(files)} file{'s' * (len(files) > 1)}, {size:,.3g} GB")


def _of_file(path: str, file: Path, options: dict[str, Any]) -> Iterator[Unit]:
    if file.suffix == ".parquet":
        yield from _row_groups(path, file)
    elif file.suffix in (".csv", ".tsv"):
        yield partial(read_csv, path, file, Position(), **options)
    elif file.suffix == ".arrow":
        yield partial(READERS[".arrow"], path, file, Position())
    elif has_json_lines(file):
        size = file.stat().st_size
        step = max(_BYTES, -(-size // _MOST))
        yield from (partial(_lines, path, file, start, start + step) for start in range(0, size, step))
    else:
        yield partial(read_json, path, file, Position())


def _row_groups(path: str, file: Path) -> Iterator[Unit]:
    import pyarrow as pa
    from pyarrow import parquet

    def read(group: int, first: int) -> Records:
        with parquet.ParquetFile(file) as table:
            batches = table.iter_batches(ROWS_PER_READ, row_groups=[group])
            yield from table_rows(path, batches, Position(), first=first)

    try:
        with parquet.ParquetFile(file) as table:
            first = 0
            for group in range(table.num_row_groups):
                yield partial(read, group, first)
                first += table.metadata.row_group(group).num_rows
    except pa.ArrowException as error:
        raise DataError([f"{path}: not a readable Parquet file: {in_short(error)}"]) from error


def _lines(path: str, file: Path, start: int, stop: int) -> Records:
    """Yield the lines that begin from byte `start` up to `stop`."""
    with file.open("rb") as stream:
        if start:
            stream.seek(start - 1)
            stream.readline()  # the end of a line that began before
        while (begin := stream.tell()) < stop and (line := stream.readline()):
            content = line if begin else line.removeprefix(b"\xef\xbb\xbf")
            if content.strip():
                yield _Line(path, file, begin), content


class _Line(str):
    """The name of a file, which becomes that of a line if it is shown: lines before it are counted only then."""

    def __new__(cls, path: str, file: Path, begin: int) -> _Line:
        self = super().__new__(cls, path)
        self._file, self._begin = file, begin
        return self

    _file: Path
    _begin: int

    def __str__(self) -> str:
        number, left = 1, self._begin
        with self._file.open("rb") as stream:
            while left and (block := stream.read(min(left, 2**20))):
                number += block.count(b"\n")
                left -= len(block)
        return f"{str.__str__(self)}:{number}"

    def __format__(self, form: str) -> str:
        return format(str(self), form)


def _identity(file: Path) -> list[Any]:
    """Return the size of a file, and a hash of its beginning and its end."""
    size = os.path.getsize(file)
    with file.open("rb") as stream:
        digest = xxhash.xxh3_128(stream.read(_EDGE))
        stream.seek(max(0, size - _EDGE))
        digest.update(stream.read(_EDGE))
    return [file.suffix, size, digest.hexdigest()]
