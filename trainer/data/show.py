"""What `python -m trainer prepare` prints: samples with their targets marked, and what became of each source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.batches import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.data import Part, Prepared

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
BRACKETS = "⟦", "⟧"


def shown(data: Prepared, tokenizer: PreTrainedTokenizerBase, count: int, *, colour: bool) -> list[str]:
    """The first `count` samples of each source as text, tokens that are trained on in green or in brackets."""
    start, end = (GREEN, PLAIN) if colour else BRACKETS
    lines = []
    for title, part in _parts(data):
        for number, (ids, labels) in enumerate(islice(_samples(part), count), start=1):
            targets = int(np.count_nonzero(labels != IGNORED))
            lines.append(f"--- {title} {part.path}, sample {number}: {len(ids)} tokens, {targets} trained on")
            runs = groupby(zip(ids.tolist(), labels.tolist(), strict=True), key=lambda pair: pair[1] != IGNORED)
            text = ""
            for trained, run in runs:
                piece = tokenizer.decode([token for token, _ in run])
                text += f"{start}{piece}{end}" if trained else piece
            lines += [text, ""]
    return lines


def describe(data: Prepared, max_length: int) -> list[str]:
    """A line for each source."""
    lines = []
    for index, (title, part) in enumerate(_parts(data)):
        report, rows = part.report, len(part.samples)
        line = (
            f"{title} {part.path}: {report.samples:,} samples ({report.truncated:,} truncated, {report.dropped:,} "
            f"dropped), {report.tokens:,} tokens, {report.target_tokens:,} trained on"
        )
        if "seq_lengths" in part.samples.column_names:
            line += f"; packed into {rows:,} rows, {report.tokens / (rows * max_length):.1%} full"
        if data.weights and index < len(data.train_parts):
            line += f"; {data.weights[index] / sum(data.weights):.1%} of what is seen"
        lines.append(line)
    return lines


def _parts(data: Prepared) -> list[tuple[str, Part]]:
    return [("train", part) for part in data.train_parts] + [("eval", part) for part in data.eval_parts]


def _samples(part: Part) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels of each sample, packed rows taken apart."""
    row: Mapping[str, np.ndarray]
    for row in part.samples:
        borders = np.cumsum(row["seq_lengths"])[:-1] if "seq_lengths" in row else []
        yield from zip(np.split(row["input_ids"], borders), np.split(row["labels"], borders), strict=True)
