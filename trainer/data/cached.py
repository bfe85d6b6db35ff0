"""Lock a folder of tokenised samples, write and verify its checksums, check its samples, remove a damaged one."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from trainer.config.reading import read_file
from trainer.data.batches import IGNORED
from trainer.data.errors import DataError
from trainer.data.sample_files import read_batches

logger = logging.getLogger(__name__)

LOCK_NOTICE_SECONDS = 30
INFO = "reports.json"
SUFFIX = ".arrow"
_MOST_INFO_BYTES = 2**24


def seal(folder: Path, info: Mapping[str, Any]) -> None:
    """Write `info` beside the files of a folder, with their checksums and its own."""
    files = {file.name: _checksum(file) for file in sorted(folder.glob(f"*{SUFFIX}"))}
    content = {**info, "files": files}
    text = json.dumps({**content, "checksum": _text_checksum(content)}, indent=1)
    (folder / INFO).write_text(text, encoding="utf-8")


def read_cached(folder: Path) -> dict[str, Any]:
    """Return the `info` of a folder. Raises `ValueError` if any of its files is not what was written.

    Every process reads every byte. That is affordable: the checksum is as fast as memory, and the first process leaves
    the bytes in the page cache, where training needs them anyway.
    """
    try:
        content = json.loads(read_file(folder / INFO, most_bytes=_MOST_INFO_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{INFO} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.pop("checksum", None) != _text_checksum(content):
        raise ValueError(f"{INFO} is not what was written")
    for name, checksum in content["files"].items():
        try:
            sound = (folder / name).is_file() and _checksum(folder / name) == checksum
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
        if not sound:
            raise ValueError(f"{name} is not what was written")
    return content


def check_samples(file: Path, *, vocabulary: int, max_length: int) -> tuple[int, int]:
    """Count the tokens of a file of samples, and those that are targets. Raises `DataError` if training could not use
    the samples as they are.

    Each sample must have 1 to `max_length` token ids, all below `vocabulary`, and as many labels, each of which is the
    token id or masked. The `seq_lengths` of a packed row must sum up to its length.
    """
    import numpy as np

    num_tokens = num_targets = 0
    with read_batches(file) as batches:
        for batch in batches:
            ids, labels = batch.column("input_ids"), batch.column("labels")
            lengths = ids.value_lengths().to_numpy()
            found, targets = ids.flatten().to_numpy(), labels.flatten().to_numpy()
            problem = None
            if not np.array_equal(lengths, labels.value_lengths().to_numpy()):
                problem = "samples whose token ids and labels differ in number"
            elif len(lengths) and (lengths.min() < 1 or lengths.max() > max_length):
                problem = f"samples of {lengths.min()} to {lengths.max()} tokens, but 1 to {max_length} are allowed"
            elif len(found) and (found.min() < 0 or found.max() >= vocabulary):
                problem = f"token ids from {found.min()} to {found.max()} in a vocabulary of {vocabulary}"
            elif not np.all((targets == found) | (targets == IGNORED)):
                problem = "labels that differ from the token at their position"
            elif "seq_lengths" in batch.schema.names:
                counts = batch.column("seq_lengths").value_lengths().to_numpy()
                parts = batch.column("seq_lengths").flatten().to_numpy()
                ends = np.cumsum(np.concatenate([[0], parts]))[np.cumsum(counts)]
                if not np.array_equal(ends, np.cumsum(lengths)) or (len(parts) and parts.min() < 1):
                    problem = "packed rows whose length is not that of their samples"
            if problem is not None:
                raise DataError([f"model.tokenizer: made {problem}; give another tokenizer or chat template"])
            num_tokens += len(found)
            num_targets += int(np.count_nonzero(targets != IGNORED))
    return num_tokens, num_targets


def remove_damaged(folder: Path, damage: ValueError) -> None:
    """Remove a damaged folder; processes that have mapped its files keep them. Raises `DataError`."""
    aside = folder.with_name(f"{folder.name}.{socket.gethostname()}.damaged.{uuid.uuid4().hex}")
    try:
        os.rename(folder, aside)
    except FileNotFoundError:  # a host on which the lock has no effect was faster
        return
    except OSError as error:
        raise DataError(
            [f"data.cache: {str(folder)!r} is damaged ({damage}) and cannot be removed ({error}); delete it"]
        ) from error
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)


def unfinished(folder: Path) -> Path:
    """Return a new name for a folder that is built before it is renamed to `folder`."""
    return folder.with_name(f"{folder.name}.{socket.gethostname()}.{uuid.uuid4().hex}")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in the cache of `folder`, whose lock the caller holds.

    Other folders are cleared if their lock is free. Only leftovers of this host are removed, because some network file
    systems do not lock across hosts.
    """
    from filelock import FileLock, Timeout

    named = re.compile(rf"([0-9a-f]{{32}})\.{re.escape(socket.gethostname())}\.(damaged\.)?[^.]+")
    for leftover in list(folder.parent.iterdir()):
        if (found := named.fullmatch(leftover.name)) is None:
            continue
        if found[1] == folder.name:
            shutil.rmtree(leftover, ignore_errors=True)
            continue
        # Another user's lock, for instance, cannot be taken.
        with suppress(Timeout, OSError), FileLock(folder.with_name(f"{found[1]}.lock"), timeout=0):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock of a folder while inside; says so if another process holds it for long."""
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


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while part := stream.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def _text_checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
