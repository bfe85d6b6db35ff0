"""From data sources to samples on disk: rendered, tokenised, packed; once for all ranks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer.config.schema import DataSource, RunConfig, TrainSource
from trainer.data.batches import IGNORED, Batches, collate, count_targets, count_tokens, eval_batches
from trainer.data.encode import GENERATION_MARK, ROWS_PER_CHUNK, Overflow, Report, Sample, encode
from trainer.data.errors import DataError
from trainer.data.rows import Row, read_rows
from trainer.data.sources import Opened, open_source

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED", "Batches", "DataError", "Part", "Prepared", "Report", "collate", "count_targets", "count_tokens",
    "eval_batches", "prepare", "prepare_run",
]  # fmt: skip

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # raise it whenever the same file and settings give other samples: it is part of the cache's name
LOCK_NOTICE_SECONDS = 30
TRAIN, HELD_OUT = "train", "held_out"  # the splits of a source in its folder of the cache


@dataclass(frozen=True)
class Part:
    """What one source became: memory-mapped samples {input_ids, labels}, numpy arrays; or, packed, rows of samples that
    also have `seq_lengths`."""

    path: str
    samples: Dataset
    report: Report


@dataclass(frozen=True)
class Prepared:
    """The samples of all sources, one source after another, and what became of each source.

    `weights` has one number for each part of `train`, or is None. `fingerprint` stands for all that decides
    the training samples.
    """

    train: Dataset
    train_parts: tuple[Part, ...]
    eval: Dataset | None
    eval_parts: tuple[Part, ...]
    weights: tuple[float, ...] | None
    fingerprint: str

    @property
    def sizes(self) -> list[int]:
        """Samples (or packed rows) of each source of `train`."""
        return [len(part.samples) for part in self.train_parts]

    @property
    def train_report(self) -> Report:
        return sum((part.report for part in self.train_parts), start=Report(0, 0, 0, 0, 0))


def prepare_run(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """`prepare` with the settings of a run; the cache is shared by the runs of a folder."""
    data = config.data
    beside = Path(config.output).expanduser().parent / "cache"
    return prepare(
        train=data.train,
        eval=data.eval or (),
        eval_fraction=data.eval_fraction,
        tokenizer=tokenizer,
        max_length=data.max_length,
        overflow=data.overflow,
        packing=data.packing,
        cache=Path(data.cache).expanduser() if data.cache else beside,
        seed=config.seed,
    )


def prepare(
    *,
    train: Sequence[TrainSource],
    eval: Sequence[DataSource],
    eval_fraction: float,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overflow: Overflow,
    packing: bool,
    cache: str | Path,
    seed: int,
) -> Prepared:
    """Tokenises the training and evaluation sources once for all processes, and opens the result.

    The samples of a source lie in a folder of `cache` that is named by what they are made of (the bytes of its file,
    tokenizer, chat template, settings), so a second run finds them and an edited file does not. Whoever comes first
    builds, under a file lock; everybody else waits and reads. No process group is needed: call it before there is one.
    Where building fails, the next in line tries for itself, so that every process raises the same DataError.

    With no `eval` and an `eval_fraction` above 0, rows of each training source are set aside for evaluation, drawn by
    `seed` alone, so that neither max_length nor the tokenizer changes which ones.
    """
    if eval and eval_fraction:
        raise DataError([f"data.eval_fraction: {eval_fraction} beside data.eval; give one of them"])
    maker = _Maker(tokenizer, max_length, overflow, packing, Path(cache), seed)
    folders, problems = [], []
    for source in [*train, *eval]:
        try:
            folders.append(maker.folder(source, eval_fraction))
        except DataError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise DataError(problems)
    opened = [_open(source.path, folder) for source, folder in zip([*train, *eval], folders, strict=True)]
    train_parts = [parts[TRAIN] for parts in opened[: len(train)]]
    eval_parts = [parts[TRAIN] for parts in opened[len(train) :]]
    eval_parts += [parts[HELD_OUT] for parts in opened if HELD_OUT in parts]
    if eval_fraction and not eval_parts:
        num_rows = sum(part.report.samples + part.report.dropped for part in train_parts)
        raise DataError([f"data.eval_fraction: {eval_fraction} of {num_rows} rows leaves none to evaluate on"])
    weights = tuple(source.weight for source in train if source.weight is not None)
    return Prepared(
        _joined(train_parts),
        tuple(train_parts),
        _joined(eval_parts) if eval_parts else None,
        tuple(eval_parts),
        weights or None,
        _digest([folder.name for folder in folders[: len(train)]]),
    )


def _joined(parts: Sequence[Part]) -> Dataset:
    from datasets import concatenate_datasets

    return concatenate_datasets([part.samples for part in parts]).with_format("numpy")


@dataclass(frozen=True)
class _Maker:
    """Makes the folders of sources, all with the same settings."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    overflow: Overflow
    packing: bool
    cache: Path
    seed: int

    def folder(self, source: DataSource, eval_fraction: float) -> Path:
        """The folder of a source, made where there is none yet."""
        opened = open_source(source)
        folder = self.cache / self._key(source, opened, eval_fraction)
        try:
            if not folder.is_dir():
                with _lock(folder.with_name(f"{folder.name}.lock")):
                    if not folder.is_dir():
                        rows = read_rows(source.path, opened.records(), source.format)
                        self._build(folder, source.path, _split(source.path, rows, eval_fraction, self.seed))
        except OSError as error:
            raise DataError(
                [f"data.cache: cannot write to {str(self.cache)!r}: {error}; name another folder"]
            ) from error
        return folder

    def _key(self, source: DataSource, opened: Opened, eval_fraction: float) -> str:
        return _digest(
            {
                "version": FORMAT_VERSION,
                "files": [[file.suffix, _file_hash(source.path, file)] for file in opened.files],
                "source": [source.format, source.subset, source.split],
                "split": [eval_fraction, self.seed] if eval_fraction else None,
                "tokenizer": _tokenizer_identity(self.tokenizer),
                "max_length": self.max_length,
                "overflow": self.overflow,
                "packed_by": version("trl") if self.packing else None,
            }
        )

    def _build(self, folder: Path, path: str, splits: dict[str, list[Row]]) -> None:
        """Writes every split to a temporary folder and renames it: what bears the final name is complete."""
        unfinished = f"{folder.name}.{socket.gethostname()}."
        # What a killed process left: the lock is ours. On this host only, since some network file systems do not lock
        # across hosts.
        for leftover in folder.parent.glob(f"{unfinished}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = folder.with_name(f"{unfinished}{uuid.uuid4().hex}")
        temporary.mkdir()
        try:
            reports = {}
            for name, rows in splits.items():
                reports[name] = asdict(self._write(temporary / f"{name}.arrow", path, rows))
                if self.packing:
                    _pack(temporary / f"{name}.arrow", self.max_length)
            (temporary / "reports.json").write_text(json.dumps(reports, indent=1), encoding="utf-8")
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else a host that our lock did not reach was faster, with the same content
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, file: Path, path: str, rows: Sequence[Row]) -> Report:
        """One Arrow stream, the format that `datasets` maps into memory, written chunk by chunk."""
        import pyarrow as pa

        schema = pa.schema({name: pa.list_(pa.int32()) for name in ("input_ids", "labels")})
        waiting: list[Sample] = []
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

            def keep(sample: Sample) -> None:
                waiting.append(sample)
                if len(waiting) == ROWS_PER_CHUNK:
                    flush()

            def flush() -> None:
                writer.write_batch(pa.RecordBatch.from_pylist(waiting, schema=schema))
                waiting.clear()

            report = encode(path, rows, self.tokenizer, max_length=self.max_length, overflow=self.overflow, keep=keep)
            flush()
        return report


def _pack(file: Path, max_length: int) -> None:
    """Replaces samples by rows of samples, best fit first; none is cut, as none is longer than a row."""
    from datasets import Dataset
    from trl import pack_dataset

    packed = file.with_name("packed.arrow")
    # A file of its own, named: otherwise it would lie beside the samples under a name that differs from run to run.
    pack_dataset(Dataset.from_file(str(file)), max_length, "bfd", map_kwargs={"cache_file_name": str(packed)})
    os.replace(packed, file)


def _split(path: str, rows: list[Row], eval_fraction: float, seed: int) -> dict[str, list[Row]]:
    """A share of 0 rows is left out: in a mix, a small source may have nothing to give."""
    num_eval = round(len(rows) * eval_fraction)
    if num_eval == len(rows):
        raise DataError(
            [f"data.eval_fraction: {eval_fraction} of the {len(rows)} rows of {path} leaves none to train on"]
        )
    if not num_eval:
        return {TRAIN: rows}
    # A third word keeps this draw apart from those of the epochs, which have none, or one from 2 on (see Batches).
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0, 1]))).permutation(len(rows))
    chosen = set(order[:num_eval].tolist())
    return {
        TRAIN: [row for index, row in enumerate(rows) if index not in chosen],
        HELD_OUT: [row for index, row in enumerate(rows) if index in chosen],
    }


def _open(path: str, folder: Path) -> dict[str, Part]:
    from datasets import Dataset

    try:
        reports = json.loads((folder / "reports.json").read_text(encoding="utf-8"))
        return {
            name: Part(path, Dataset.from_file(str(folder / f"{name}.arrow")).with_format("numpy"), Report(**report))
            for name, report in reports.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError([f"data.cache: {str(folder)!r} is damaged ({error}); delete that folder"]) from error


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _file_hash(path: str, file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise DataError([f"{path}: cannot be read: {error.strerror or error}"]) from error
    return digest.hexdigest()


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """What decides a tokenizer's output, the same in every process, as plain JSON."""
    if tokenizer.is_fast:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        core.pop("truncation"), core.pop("padding")  # state of the latest call, not of the tokenizer
    else:
        core = [type(tokenizer).__name__, tokenizer.get_vocab(), sorted(map(str, tokenizer.added_tokens_decoder))]
    template = tokenizer.chat_template
    return {
        "core": hashlib.sha256(json.dumps(core, sort_keys=True).encode()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": template,
        "patched_by": version("trl") if template and not GENERATION_MARK.search(json.dumps(template)) else None,
    }


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    held = None
    while held is None:
        try:
            held = lock.acquire(timeout=LOCK_NOTICE_SECONDS)
        except Timeout:
            logger.warning("waiting for another process to tokenise the data; it holds %s", path)
    with held:
        yield
