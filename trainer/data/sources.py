"""Data sources as records: files, folders and Hub names, read into plain mappings that know where they stand."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.schema import DataSource
from trainer.config.sources import DATA_SUFFIXES, hub_name
from trainer.data.errors import DataError, in_short

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_READ = 1000
Records = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Opened:
    """A source that exists. The content of `files` decides what `records` gives: pairs of (where, value).

    `where` is how a message names the record, `train.jsonl:12` or `train.parquet, row 12`; the value is a mapping, as
    far as the file goes, or a ValueError that says why this one record cannot be read.
    """

    path: str
    files: tuple[Path, ...]
    records: Callable[[], Records]


def open_source(source: DataSource) -> Opened:
    """Looks a source up, fetches it from the Hub where it names one; DataError where there is nothing to read."""
    file = Path(source.path).expanduser()
    if file.is_dir() or (not file.exists() and hub_name(source.path)):
        return _open_data_set(source)
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise DataError([f"{source.path}: no data file by its name; allowed: {' | '.join(DATA_SUFFIXES)}"])
    if not file.is_file():
        raise DataError([f"{source.path}: cannot be read: No such file"])
    return Opened(source.path, (file,), lambda: reader(source.path, file))


def _open_data_set(source: DataSource) -> Opened:
    from datasets import DatasetDict, load_dataset, load_from_disk

    split = source.split or "train"
    try:
        if any((Path(source.path).expanduser() / name).is_file() for name in ("state.json", "dataset_dict.json")):
            data_set = load_from_disk(str(Path(source.path).expanduser()))  # written by save_to_disk
            data_set = data_set[split] if isinstance(data_set, DatasetDict) else data_set
        else:
            data_set = load_dataset(source.path, source.subset, split=split, keep_in_memory=False)
    except Exception as error:  # of datasets, huggingface_hub, requests, pyarrow: whatever stands in the way
        raise DataError(
            [
                f"{source.path}: no data set here or on the Hub can be read under this name with split={split!r} and "
                f"subset={source.subset!r}: {in_short(error)}"
            ]
        ) from error
    files = tuple(Path(entry["filename"]) for entry in data_set.cache_files)
    tables = data_set.with_format("arrow")
    return Opened(
        source.path,
        files,
        lambda: _table_rows(source.path, (part for table in tables.iter(ROWS_PER_READ) for part in table.to_batches())),
    )


def _read_text(path: str, file: Path) -> str:
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError([f"{path}:{line}: not UTF-8 text: byte {content[error.start]:#04x}"]) from error


def _read_jsonl(path: str, file: Path) -> Records:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if content.strip():
                yield f"{path}:{number}", _parse_line(content)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 text: byte {line[error.start]:#04x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deeply
        return ValueError(f"not JSON that can be read: {error}")


def _read_json(path: str, file: Path) -> Records:
    """A list of objects; or, as many files of this name hold, one object per line."""
    with file.open("rb") as stream:
        start = stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _read_jsonl(path, file)
        return
    try:
        rows = json.loads(_read_text(path, file))
    except json.JSONDecodeError as error:
        raise DataError([f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"]) from error
    except (ValueError, RecursionError) as error:
        raise DataError([f"{path}: not JSON that can be read: {error}"]) from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _read_csv(path: str, file: Path) -> Records:
    """Every value is text: an answer of 007 is neither a number nor 7, as it would be where types are guessed."""
    csv.field_size_limit(sys.maxsize)  # texts are longer than the module's 128 KiB
    reader = csv.DictReader(io.StringIO(_read_text(path, file), newline=""), strict=True)
    number = 0
    try:
        for number, row in enumerate(reader, start=1):
            where = f"{path}, row {number}"
            if None in row:
                yield (
                    where,
                    ValueError(f"more values than the {len(reader.fieldnames or ())} columns of the first line"),
                )
            else:
                yield where, {column: value for column, value in row.items() if value is not None}
    except csv.Error as error:
        raise DataError([f"{path}, row {number + 1}: not CSV: {error}"]) from error


def _read_parquet(path: str, file: Path) -> Records:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            yield from _table_rows(path, table.iter_batches(ROWS_PER_READ))
    except pa.ArrowException as error:
        raise DataError([f"{path}: not a readable Parquet file: {in_short(error)}"]) from error


def _read_arrow(path: str, file: Path) -> Records:
    """Arrow's file format, or its stream format, in which `datasets` saves."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as content:
            try:
                opened = pa.ipc.open_file(content)
            except pa.ArrowInvalid:
                content.seek(0)
                yield from _table_rows(path, pa.ipc.open_stream(content))
            else:
                yield from _table_rows(path, map(opened.get_batch, range(opened.num_record_batches)))
    except pa.ArrowException as error:
        raise DataError([f"{path}: not a readable Arrow file: {in_short(error)}"]) from error


def _table_rows(path: str, batches: Iterable[pa.RecordBatch]) -> Records:
    number = 0
    for batch in batches:
        for row in _batch_rows(batch):
            number += 1
            yield f"{path}, row {number}", row


def _batch_rows(batch: pa.RecordBatch) -> list[Any]:
    try:
        return [_without_nulls(row) for row in batch.to_pylist()]
    except UnicodeDecodeError as error:  # neither format checks its text
        if batch.num_rows == 1:
            return [ValueError(f"not UTF-8 text: byte {error.object[error.start]:#04x} at column {error.start + 1}")]
        return [row for index in range(batch.num_rows) for row in _batch_rows(batch.slice(index, 1))]


def _without_nulls(value: Any) -> Any:
    """Tables give every object all the keys that any of them has, null where it had none."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[str, Path], Records]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
assert tuple(_READERS) == DATA_SUFFIXES
