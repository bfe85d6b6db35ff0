"""Write and verify the checksums of a folder of tokenised samples, and check its samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from trainer.config.reading import read_file
from trainer.data.batches import IGNORED
from trainer.data.errors import DataError
from trainer.data.sample_files import read_batches

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


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while part := stream.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def _text_checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
