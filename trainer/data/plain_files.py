"""Read data files line by line or table by table, without the type guessing of `datasets`.

No file is held in memory as a whole, except one of JSON in which something is wrong.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from trainer.data import strict_json
from trainer.data.errors import DataError, in_short
from trainer.data.formats import FORMATS
from trainer.data.formats.conversations import CONTENT_KEYS

if TYPE_CHECKING:
    import pyarrow as pa

Records = Iterator[tuple[str, Any]]
Decoder = Callable[[Any], Any]

ROWS_PER_READ = 1000
BYTES_PER_READ = 2**20


class Position:
    """How much of a source has been read: bytes of its files, or rows of a table."""

    def __init__(self) -> None:
        self.done = 0.0


def _check_text(path: str, file: Path) -> None:
    """Raise `DataError` if a file is not UTF-8, before any of it is used."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with file.open("rb") as stream:
            while block := stream.read(BYTES_PER_READ):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        _read_text(path, file)


def _read_text(path: str, file: Path) -> str:
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError([f"{path}:{line}: not UTF-8 text: byte {content[error.start]:#04x}"]) from error


def _read_jsonl(path: str, file: Path, position: Position) -> Records:
    """Yield lines as bytes: parsing JSON takes time, which several processes can share."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            position.done += len(line)
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if content.strip():
                yield f"{path}:{number}", content


def has_json_lines(file: Path) -> bool:
    """Return whether a file has one object of JSON per line, and not a list of objects, by its beginning."""
    with file.open("rb") as stream:
        start = stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    return not start.startswith(b"[")


def read_json(path: str, file: Path, position: Position) -> Records:
    """Yield the records of a list of objects or, as many files with this suffix contain, of one object per line."""
    if has_json_lines(file):
        yield from _read_jsonl(path, file, position)
        return
    _check_text(path, file)
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            for number, row in enumerate(strict_json.items(partial(_read_some, text, position)), start=1):
                yield f"{path}, row {number}", row
    except (ValueError, RecursionError):
        _raise_problem(path, file)


def _read_some(text: TextIO, position: Position, size: int) -> str:
    found = text.read(size)
    position.done += len(found)
    return found


def _raise_problem(path: str, file: Path) -> NoReturn:
    """Raise `DataError` for a file of JSON, with the line and column in the whole of it."""
    try:
        strict_json.loads(_read_text(path, file))
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise DataError([f"{where}: not JSON: {strict_json.said(error)} at column {error.colno}"]) from error
    except (ValueError, RecursionError) as error:
        raise DataError([f"{path}: not JSON that can be read: {error}"]) from error
    raise DataError([f"{path}: changed while it was read"])


def read_csv(path: str, file: Path, position: Position, delimiter: str = ",") -> Records:
    """Yield the records of a CSV file. Every value is text: the answer 007 is not read as the number 7."""
    csv.field_size_limit(sys.maxsize)  # texts are longer than the module's 128 KiB
    _check_text(path, file)
    with file.open(encoding="utf-8-sig", newline="") as text:
        yield from _csv_records(path, csv.DictReader(_counted(text, position), strict=True, delimiter=delimiter))


def _counted(lines: Iterable[str], position: Position) -> Iterator[str]:
    for line in lines:
        position.done += len(line)
        yield line


def _csv_records(path: str, reader: csv.DictReader[str]) -> Records:
    number = 0
    try:
        _check_names(path, reader.fieldnames or ())
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


def _read_parquet(path: str, file: Path, position: Position) -> Records:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            each = file.stat().st_size / max(1, table.metadata.num_rows)
            yield from table_rows(path, table.iter_batches(ROWS_PER_READ), position, each)
    except (pa.ArrowException, OSError) as error:  # OSError also for headers that make no sense
        raise DataError([f"{path}: not a readable Parquet file: {in_short(error)}"]) from error


def _read_arrow(path: str, file: Path, position: Position) -> Records:
    """Yield the records of Arrow's file format, or of its stream format, in which `datasets` saves."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(file)) as content:
            try:
                opened = pa.ipc.open_file(content)
            except pa.ArrowInvalid:
                content.seek(0)
                batches: Iterable[pa.RecordBatch] = pa.ipc.open_stream(content)
            else:
                batches = map(opened.get_batch, range(opened.num_record_batches))
            for record in table_rows(path, batches, Position()):
                position.done = content.tell()
                yield record
    except (pa.ArrowException, OSError) as error:
        raise DataError([f"{path}: not a readable Arrow file: {in_short(error)}"]) from error


def _check_names(path: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError([f"{path}: several columns are called {', '.join(twice)}; give each a name of its own"])


def table_rows(
    path: str, batches: Iterable[pa.RecordBatch], position: Position, row_size: float = 1.0, *, first: int = 0
) -> Records:
    """Yield the records of tables, the rows after `first` others. Each counts `row_size` in `position`."""
    number = first
    decoders = None
    for batch in _small(batches):
        if decoders is None:
            _check_names(path, batch.schema.names)
            decoders = _decoders(batch.schema)
        for row in _batch_rows(batch, decoders):
            number += 1
            position.done += row_size
            yield f"{path}, row {number}", row


def _small(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of batches in batches of a few: as Python's values they take several times the memory."""
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_READ):
            yield batch.slice(start, ROWS_PER_READ)


def _batch_rows(batch: pa.RecordBatch, decoders: Mapping[str, Decoder]) -> list[Any]:
    try:
        columns = [_values(column) for column in batch.columns]
    except UnicodeDecodeError as error:  # neither Parquet nor Arrow checks its text
        if batch.num_rows == 1:
            return [ValueError(f"not UTF-8 text: byte {error.object[error.start]:#04x} at column {error.start + 1}")]
        return [row for index in range(batch.num_rows) for row in _batch_rows(batch.slice(index, 1), decoders)]
    rows: list[Any] = []
    for index in range(batch.num_rows):
        row = {name: values[index] for name, values in zip(batch.schema.names, columns, strict=True)}
        try:
            row |= {name: decode(row[name]) for name, decode in decoders.items()}
        except ValueError as error:
            rows.append(error)
        else:
            rows.append(row)
    return rows


def _values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError, ImportError) as error:  # times that Python's types cannot represent
        return [NotAValue(f"{column.type}: {error}") if valid else None for valid in column.is_valid().to_pylist()]


class NotAValue:
    """Replace a table's value for which Python has no type. It does no harm in a column that is left out."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __str__(self) -> str:
        return self._why


def _decoders(schema: pa.Schema) -> dict[str, Decoder]:
    """Return functions that restore what was written, by column, for columns that are stored as another type."""
    from datasets import Features

    features: Mapping[str, Any] = {}
    try:  # the description that `datasets` stores of the columns that it writes
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = Features.from_dict(described["info"]["features"])
    except Exception:  # no description, or one of an unknown version: the Arrow types must do
        features = {}
    decoders = {field.name: _decoder(field.type, features.get(field.name), (field.name,)) for field in schema}
    return {name: decode for name, decode in decoders.items() if decode is not None}


def _decoder(kind: pa.DataType, feature: Any, path: tuple[str, ...]) -> Decoder | None:
    """Return the function that restores values of an Arrow type and a feature of `datasets`; None if none is needed."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, getattr(pa, "JsonType", ())) or type(feature).__name__ == "Json":
        return lambda text: _parse_json(text, path)
    if type(feature).__name__ == "ClassLabel" and types.is_integer(kind):
        names = feature.names or []
        return lambda number: names[number] if number is not None and 0 <= number < len(names) else None
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _decoder(kind.value_type, feature, path)
    if types.is_map(kind):
        return _each_item(_decoder(kind.item_type, None, (*path, "{}")))
    if types.is_struct(kind):
        inner = feature if isinstance(feature, Mapping) else {}
        fields = [kind.field(index) for index in range(kind.num_fields)]
        decoders = {field.name: _decoder(field.type, inner.get(field.name), (*path, field.name)) for field in fields}
        return _each_field({name: decode for name, decode in decoders.items() if decode is not None})
    value_type = getattr(kind, "value_type", None)  # all kinds of lists have it
    if value_type is None:
        return None
    item_feature = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    decode = _decoder(value_type, item_feature, (*path, "[]"))
    return None if decode is None else lambda values: values and [decode(value) for value in values]


def _each_item(decode: Decoder | None) -> Decoder:
    def decode_map(pairs: list[tuple[Any, Any]] | None) -> dict[Any, Any] | None:
        if pairs is None:
            return None
        return {key: value if decode is None else decode(value) for key, value in pairs}

    return decode_map


def _each_field(decoders: Mapping[str, Decoder]) -> Decoder | None:
    if not decoders:
        return None
    return lambda value: value and {**value, **{name: decode(value[name]) for name, decode in decoders.items()}}


_TEXTS = {column for format in FORMATS.values() for column in format.texts}
_MESSAGES = {column for format in FORMATS.values() for column in format.messages}


def _parse_json(text: str | None, path: tuple[str, ...]) -> Any:
    """Return the value that a JSON column stores as text.

    If some values of a column are texts and others are not, `datasets` stores a text that is valid JSON, such as 4 or
    true, unquoted. In a field that allows only text, such a value is therefore the text. In a column that may also
    contain messages, a list or an object is what it looks like: `read` refuses it unless it is a list of messages.
    """
    if text is None:
        return None
    try:
        value = strict_json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{'.'.join(path)}: not JSON that can be read: {error}") from error
    if isinstance(value, str):
        return value
    match path:
        case [column] if column in _MESSAGES:
            return value if isinstance(value, list | dict) else text
        case [column] if column in _TEXTS:
            return text
        case [column, "[]", key] if column in _MESSAGES and key in CONTENT_KEYS:
            # The content of a message may also be a list of OpenAI's parts.
            parts = isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value)
            return value if parts else text
    return value


READERS: dict[str, Callable[[str, Path, Position], Records]] = {
    ".jsonl": _read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
