"""Open data sources (files, folders and Hub names) and read them into records: plain values with their location."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.schema import DataSource
from trainer.config.sources import DATA_SUFFIXES, hub_name
from trainer.data.errors import DataError, in_short
from trainer.data.plain_files import READERS, ROWS_PER_READ, Position, Records, read_csv, read_json, table_rows

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, DatasetDict

# Settings of a builder of `datasets` that do not affect the content of files, or that `_open_plain_files` follows.
_OF_NO_CONTENT = ("name", "version", "data_dir", "data_files", "description", "sep", "delimiter")
_SUFFIXES = {"json": {".json", ".jsonl", ".ndjson"}, "csv": {".csv", ".tsv"}, "parquet": {".parquet"}}
# Files in which `datasets` describes a folder.
_ABOUT_THE_FOLDER = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Opened:
    """A source that exists. `records(position)` yields pairs (where, value), and `content()` identifies these records.

    `where` is how messages name the record, `train.jsonl:12` or `train.parquet, row 12`. The value is a mapping if the
    file contains one, bytes if it is a line of JSON, or a `ValueError` that says why this record cannot be read. A null
    in a table is None. `position` is moved from 0 to `size` while records are read.

    `content()` is a list of plain JSON. `as_before` says whether it is still the one in fingerprints of the time before
    folders of JSON and CSV files were read file by file.
    """

    path: str
    content: Callable[[], list[Any]]
    records: Callable[[Position], Records]
    size: float
    as_before: bool = True


def open_source(source: DataSource) -> Opened:
    """Open a source; a data set of the Hub is downloaded. Raises `DataError` if there is nothing to read."""
    file = Path(source.path).expanduser()
    if file.is_dir() or (not file.exists() and hub_name(source.path)):
        return _open_data_set(source)
    reader = READERS.get(file.suffix)
    if reader is None:
        raise DataError([f"{source.path}: not the name of a data file; allowed: {' | '.join(DATA_SUFFIXES)}"])
    if not file.is_file():
        raise DataError([f"{source.path}: cannot be read: No such file"])
    return Opened(
        source.path, lambda: _hashes(source.path, [file]), partial(reader, source.path, file), file.stat().st_size
    )


def _hashes(path: str, files: Iterable[Path]) -> list[Any]:
    return [[file.suffix, _file_hash(path, file)] for file in files]


def _file_hash(path: str, file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError([f"{path}: cannot be read: {error.strerror or error}"]) from error


def _open_data_set(source: DataSource) -> Opened:
    from datasets import load_dataset

    split = source.split or "train"
    folder = Path(source.path).expanduser()
    try:
        if is_saved(folder):
            data_set = open_saved(source)
        else:
            plain = _open_plain_files(source, split) if folder.is_dir() else None
            if plain is not None:
                return plain
            data_set = load_dataset(source.path, source.subset, split=split, keep_in_memory=False)
    except DataError:
        raise
    except Exception as error:  # datasets, huggingface_hub, requests and pyarrow raise many kinds
        raise DataError(
            [
                f"{source.path}: no data set here or on the Hub can be read under this name with split={split!r} and "
                f"subset={source.subset!r}: {in_short(error)}"
            ]
        ) from error
    files = [Path(entry["filename"]) for entry in data_set.cache_files]
    tables = data_set.with_format("arrow")

    def batches() -> Iterator[pa.RecordBatch]:
        return (part for table in tables.iter(ROWS_PER_READ) for part in table.to_batches())

    return Opened(
        source.path,
        lambda: _hashes(source.path, files) if files else [["memory", _table_hash(batches())]],
        lambda position: table_rows(source.path, batches(), position),
        len(data_set),
    )


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_saved(source: DataSource) -> Dataset:
    """Open a data set that `save_to_disk` wrote, or the split of it that the source names."""
    from datasets import load_from_disk

    saved = load_from_disk(str(Path(source.path).expanduser()), keep_in_memory=False)
    return _part_of_saved(source, saved, source.split or "train")


def _part_of_saved(source: DataSource, saved: Dataset | DatasetDict, split: str) -> Dataset:
    """Return the split, or a part of one, of a data set that `save_to_disk` wrote."""
    from datasets import DatasetDict, ReadInstruction, concatenate_datasets

    if source.subset is not None:
        raise DataError([f"{source.path}: subset={source.subset!r}, but a saved data set has none; set it to null"])
    if not isinstance(saved, DatasetDict) and source.split is None:
        return saved
    parts = dict(saved) if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
    try:
        chosen = ReadInstruction.from_spec(split).to_absolute({name: len(part) for name, part in parts.items()})
    except (ValueError, AssertionError, KeyError) as error:
        raise DataError([f"{source.path}: split={split!r}: {in_short(error)}; allowed: {', '.join(parts)}"]) from error
    return concatenate_datasets([parts[part.splitname].select(range(part.from_, part.to)) for part in chosen])


def _refuse_unread(path: str, listed: Mapping[str, Iterable[str]]) -> None:
    """Raise DataError for data files in a folder that are in none of the splits that `datasets` finds there."""
    folder = Path(path).expanduser().resolve()  # as `datasets` does
    read = {os.path.realpath(file) for files in listed.values() for file in files}
    unread = sorted(
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.name.endswith(DATA_SUFFIXES)
        and file.name not in _ABOUT_THE_FOLDER
        and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)  # hidden
        and os.path.realpath(file) not in read
    )
    if unread:
        shown = ", ".join(unread[:3]) + (f" and {len(unread) - 3} more" if len(unread) > 3 else "")
        raise DataError(
            [
                f"{path}: {shown} would not be read: `datasets` reads files of one type, or those that are named after "
                "splits. Name the files one by one (data.train=[a.jsonl, b.csv]), or move these away"
            ]
        )


def _table_hash(batches: Iterable[pa.RecordBatch]) -> str:
    """Return the hash of a table that is in no file."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(f"{batch.schema.remove_metadata()}, {batch.num_rows}".encode())
        digest.update(batch.serialize())
    return digest.hexdigest()


def _open_plain_files(source: DataSource, split: str) -> Opened | None:
    """Open a folder of JSON or CSV files, each of which is read as if it were named alone; None for other folders."""
    from datasets import ReadInstruction

    names = list(dict.fromkeys(part.split("[")[0].strip() for part in split.split("+")))
    files: dict[str, list[Path]] = {}
    options: dict[str, Any] = {}
    for name in names:
        found = plain_files(source, name)
        if found is None:
            return None
        files[name], options = found

    def split_records(name: str, position: Position) -> Records:
        for file in files[name]:
            if options:
                yield from read_csv(str(file), file, position, **options)
            else:
                yield from read_json(str(file), file, position)

    def records(position: Position) -> Records:
        if split in files:
            yield from split_records(split, position)
            return
        counts = {name: sum(1 for _ in split_records(name, Position())) for name in names}
        try:
            chosen = ReadInstruction.from_spec(split).to_absolute(counts)
        except (ValueError, AssertionError) as error:
            raise DataError([f"{source.path}: split={split!r}: {in_short(error)}"]) from error
        for part in chosen:
            yield from islice(split_records(part.splitname, position), part.from_, part.to)

    def content() -> list[Any]:
        syntax = options.get("delimiter", "json")
        return [["folder", syntax], *([name, *_hashes(source.path, files[name])] for name in names)]

    size = sum(file.stat().st_size for part in files.values() for file in part)
    return Opened(source.path, content, records, size, as_before=False)


def plain_files(
    source: DataSource, split: str, kinds: Sequence[str] = ("json", "csv")
) -> tuple[list[Path], dict[str, Any]] | None:
    """Return the files of a split of a folder of some `kinds` of files, and the options of `read_csv` for them. None
    for a folder of others, or in which there is anything special, such as an unknown split: it is left to `datasets`.

    `datasets` decides which files are in a split, but does not read them: it would guess a type for each column, so
    that 1 beside 1.5 becomes 1.0, the text 2024-01-01 a date and the answer 007 a 7.
    """
    from datasets import load_dataset_builder

    builder = load_dataset_builder(source.path, source.subset)
    config = builder.config
    if source.subset is None and config.data_files:
        _refuse_unread(source.path, config.data_files)
    files = [Path(file) for file in (config.data_files or {}).get(split, ())]
    allowed = _SUFFIXES.get(builder.name, set()) if builder.name in kinds else set()
    settings = [field.name for field in dataclasses.fields(config) if field.name not in _OF_NO_CONTENT]
    standard = all(getattr(config, name) == getattr(type(config)(), name) for name in settings)
    if not files or not {file.suffix for file in files} <= allowed or not standard or builder.info.features is not None:
        return None
    return files, {"delimiter": config.sep} if builder.name == "csv" else {}


assert tuple(READERS) == DATA_SUFFIXES
