"""From data files to samples on disk: rendered, tokenised with the loss on the answer only, once for all ranks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from trainer.data.batches import IGNORED, Batches, collate, count_targets, eval_batches
from trainer.data.rows import MAX_PROBLEMS, DataError, Row, read_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED", "Batches", "DataError", "Overflow", "Prepared", "Report", "Row", "collate", "count_targets",
    "eval_batches", "prepare", "read_rows", "tokenize_file",
]  # fmt: skip

logger = logging.getLogger(__name__)

Overflow = Literal["truncate", "drop", "error"]

ROWS_PER_CHUNK = 512  # fast tokenizers encode the rows of a chunk in parallel; also the size of an Arrow record batch
FORMAT_VERSION = 1  # raise it whenever the same file and settings give other samples: it is part of the cache's name
LOCK_NOTICE_SECONDS = 30
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Report:
    """What became of a file: samples kept (`truncated` of them cut to the limit), samples dropped, and token counts.

    `target_tokens` are those that the loss is taken over: labels other than -100, the first position not counted.
    """

    samples: int
    truncated: int
    dropped: int
    tokens: int
    target_tokens: int


@dataclass(frozen=True)
class Prepared:
    """Memory-mapped samples (`input_ids` and `labels`, numpy arrays), their reports, and the folder they lie in."""

    train: Dataset
    train_report: Report
    eval: Dataset | None
    eval_report: Report | None
    folder: Path


def tokenize_file(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int, overflow: Overflow
) -> tuple[list[dict[str, np.ndarray]], Report]:
    """Renders and tokenises a file. Samples are {input_ids, labels}: int32, [length], labels -100 outside the answer.

    Question and answer become "Question: {question}\\nAnswer: {answer}", prompt and completion are taken verbatim; the
    end of text that follows is a target as well. Messages go through the tokenizer's chat template, and the assistant's
    tokens are the targets. Of a sample with more than `max_length` tokens, "truncate" cuts the end, "drop" leaves it
    out, "error" raises. A sample left without a target is dropped. Raises DataError, also where no sample is left.
    """
    samples: list[dict[str, np.ndarray]] = []
    report = _tokenize(path, read_rows(path), tokenizer, max_length=max_length, overflow=overflow, keep=samples.append)
    return samples, report


def _tokenize(
    path: str | Path,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overflow: Overflow,
    keep: Callable[[dict[str, np.ndarray]], object],
) -> Report:
    """Hands each sample to `keep` as it is made, so that a large file need not fit in memory twice."""
    num_samples = num_truncated = num_tokens = num_targets = 0
    too_long: list[str] = []
    for line, ids, labels in _encode(path, rows, tokenizer):
        length = len(ids)
        if length > max_length and overflow == "error":
            too_long.append(f"{path}:{line}: {length} tokens, data.max_length is {max_length}")
            if len(too_long) == MAX_PROBLEMS:
                break
        targets = int(np.count_nonzero(labels[1:max_length] != IGNORED))
        if targets == 0 or (length > max_length and overflow != "truncate"):
            continue
        num_samples += 1
        num_truncated += length > max_length
        num_tokens += min(length, max_length)
        num_targets += targets
        keep({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    if too_long:
        raise DataError([*too_long, "raise data.max_length, or set data.overflow to truncate or drop"])
    if num_samples == 0:
        raise DataError(
            [
                f"{path}: none of {len(rows)} samples is left: each is over data.max_length={max_length} tokens "
                f"(data.overflow={overflow}) or has no target within it; raise data.max_length"
            ]
        )
    return Report(num_samples, num_truncated, len(rows) - num_samples, num_tokens, num_targets)


def _encode(
    path: str | Path, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Line, ids and labels of each row, of full length."""
    if rows[0].messages:
        yield from _encode_messages(path, rows, tokenizer)
    else:
        for start in range(0, len(rows), ROWS_PER_CHUNK):
            yield from _encode_texts(rows[start : start + ROWS_PER_CHUNK], tokenizer)


def _encode_texts(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise DataError(["model.tokenizer: has no end-of-text token (eos_token), so no answer would ever end"])
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    # Apart, because generation starts from the tokens of the prompt alone: tokenised together, a merge across the
    # border would give a prompt never seen in use, and a first target that holds part of it.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    prompts = tokenizer([row.prompt for row in rows], **options)["input_ids"]
    answers = tokenizer([row.answer for row in rows], **options)["input_ids"]
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        # A verbatim prompt or completion may spell either mark itself.
        prompt = [bos, *prompt] if adds_bos and prompt[:1] != [bos] else prompt
        answer = answer if answer[-1:] == [eos] else [*answer, eos]
        yield row.line, _int32(prompt + answer), _int32([IGNORED] * len(prompt) + answer)


def _encode_messages(
    path: str | Path, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    template = _training_template(tokenizer)
    for row in rows:
        try:
            encoded = tokenizer.apply_chat_template(
                list(row.messages), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:  # templates raise what they like: jinja2.TemplateError, TypeError, ValueError, ...
            raise DataError([f"{path}:{row.line}: the tokenizer's chat template refuses the row: {error}"]) from error
        ids = _int32(encoded["input_ids"])
        yield row.line, ids, np.where(np.asarray(encoded["assistant_masks"]) == 1, ids, np.int32(IGNORED))


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template with marks around what the assistant says; without them nothing can be masked."""
    key, instead = "model.tokenizer", "use rows of {prompt, completion}, or the tokenizer of an instruct model"
    if not tokenizer.is_fast:
        raise DataError([f"{key}: {type(tokenizer).__name__} cannot map text to tokens (not a fast one); {instead}"])
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError([f"{key}: has no chat template, which rows of {{messages}} need; {instead}"]) from error
    if GENERATION_MARK.search(template):
        return template
    try:
        from trl import get_training_chat_template

        return get_training_chat_template(tokenizer) or template
    except (ImportError, ValueError) as error:
        raise DataError(
            [
                f"{key}: its chat template has no {{% generation %}} marks, and TRL offers no patch for it ({error}); "
                "put {% generation %} ... {% endgeneration %} around the assistant's content and end mark in "
                f"chat_template.jinja, or {instead}"
            ]
        ) from error


def _int32(values: Sequence[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


def prepare(
    *,
    train: str | Path,
    eval: str | Path | None,
    eval_fraction: float,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overflow: Overflow,
    cache: str | Path,
    seed: int,
) -> Prepared:
    """Tokenises the training and evaluation files once for all processes, and opens the result.

    The samples lie in a folder of `cache` that is named by what they are made of (bytes of the files, tokenizer, chat
    template, settings), so a second run finds them and an edited file does not. Whoever comes first builds, under a
    file lock; everybody else waits and reads. No process group is needed: call it before there is one. Where building
    fails, the next in line tries for itself, so that every process raises the same DataError.

    With no `eval` file and an `eval_fraction` above 0, rows of the training file are set aside for evaluation, drawn by
    `seed` alone, so that neither max_length nor the tokenizer changes which ones.
    """
    if eval is not None and eval_fraction:
        raise DataError([f"data.eval_fraction: {eval_fraction} beside data.eval={str(eval)!r}; give one of them"])
    key = _cache_key(train, eval, eval_fraction, tokenizer, max_length, overflow, seed)
    folder = Path(cache) / key
    try:
        if not folder.is_dir():
            with _lock(Path(cache) / f"{key}.lock"):
                if not folder.is_dir():
                    splits = _read_splits(train, eval, eval_fraction, seed)
                    _build(folder, splits, tokenizer, max_length=max_length, overflow=overflow)
    except OSError as error:
        raise DataError([f"data.cache: cannot write to {str(cache)!r}: {error}; name another folder"]) from error
    return _open(folder)


def _cache_key(
    train: str | Path,
    eval: str | Path | None,
    eval_fraction: float,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overflow: Overflow,
    seed: int,
) -> str:
    parts = {
        "format": FORMAT_VERSION,
        "train": _file_hash(train),
        "eval": _file_hash(eval) if eval is not None else None,
        "split": [eval_fraction, seed] if eval is None and eval_fraction else None,
        "tokenizer": _tokenizer_identity(tokenizer),
        "max_length": max_length,
        "overflow": overflow,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _file_hash(path: str | Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
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
        "patched_by": _trl_version() if template and not GENERATION_MARK.search(json.dumps(template)) else None,
    }


def _trl_version() -> str | None:
    """Read without importing TRL, which takes seconds and is needed by the process that tokenises only."""
    try:
        return version("trl")
    except PackageNotFoundError:
        return None


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


def _read_splits(
    train: str | Path, eval: str | Path | None, eval_fraction: float, seed: int
) -> dict[str, tuple[str | Path, list[Row]]]:
    rows = read_rows(train)
    if eval is not None:
        return {"train": (train, rows), "eval": (eval, read_rows(eval))}
    if not eval_fraction:
        return {"train": (train, rows)}
    num_eval = round(len(rows) * eval_fraction)
    if not 0 < num_eval < len(rows):
        raise DataError(
            [
                f"data.eval_fraction: {eval_fraction} of the {len(rows)} rows of {train} is {num_eval} for evaluation "
                f"and {len(rows) - num_eval} for training; each side needs at least one"
            ]
        )
    # A third word keeps this draw apart from those of the epochs, which are keyed by (seed, epoch).
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0, 1]))).permutation(len(rows))
    chosen = set(order[:num_eval].tolist())
    return {
        "train": (train, [row for index, row in enumerate(rows) if index not in chosen]),
        "eval": (train, [row for index, row in enumerate(rows) if index in chosen]),
    }


def _build(
    folder: Path,
    splits: dict[str, tuple[str | Path, list[Row]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overflow: Overflow,
) -> None:
    """Writes every split to a temporary folder and renames it: what bears the final name is complete."""
    unfinished = f"{folder.name}.{socket.gethostname()}."
    for leftover in folder.parent.glob(f"{unfinished}*"):  # of a killed process: the lock is ours; on this host only,
        shutil.rmtree(leftover, ignore_errors=True)  # since some network file systems do not lock across hosts
    temporary = folder.with_name(f"{unfinished}{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        reports = {
            name: asdict(_write(temporary / f"{name}.arrow", path, rows, tokenizer, max_length, overflow))
            for name, (path, rows) in splits.items()
        }
        (temporary / "reports.json").write_text(json.dumps(reports, indent=1), encoding="utf-8")
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # else a host that our lock did not reach was faster, with the same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    file: Path,
    path: str | Path,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overflow: Overflow,
) -> Report:
    """One Arrow stream, the format that `datasets` maps into memory, written chunk by chunk."""
    import pyarrow as pa

    schema = pa.schema({name: pa.list_(pa.int32()) for name in ("input_ids", "labels")})
    waiting: list[dict[str, np.ndarray]] = []
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

        def keep(sample: dict[str, np.ndarray]) -> None:
            waiting.append(sample)
            if len(waiting) == ROWS_PER_CHUNK:
                flush()

        def flush() -> None:
            writer.write_batch(pa.RecordBatch.from_pylist(waiting, schema=schema))
            waiting.clear()

        report = _tokenize(path, rows, tokenizer, max_length=max_length, overflow=overflow, keep=keep)
        flush()
    return report


def _open(folder: Path) -> Prepared:
    from datasets import Dataset

    try:
        reports = json.loads((folder / "reports.json").read_text(encoding="utf-8"))
        samples = {name: Dataset.from_file(str(folder / f"{name}.arrow")).with_format("numpy") for name in reports}
        counts = {name: Report(**report) for name, report in reports.items()}
        return Prepared(samples["train"], counts["train"], samples.get("eval"), counts.get("eval"), folder)
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError([f"data.cache: {str(folder)!r} is damaged ({error}); delete that folder"]) from error
