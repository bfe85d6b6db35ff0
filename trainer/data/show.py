"""Format what `python -m trainer prepare` prints: samples with their targets marked, and a summary of each source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.text import printable
from trainer.data.batches import IGNORED
from trainer.data.pictures import image_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.data.cache import Part, TokenisedData

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
SHOWN = 3  # rows that were left out
BRACKETS = "⟦", "⟧"


@dataclass(frozen=True)
class Sample:
    """A sample as text: runs of tokens that are trained on, or not, and the files of its images. `source` says which
    part of the data it is from."""

    source: str
    number: int
    num_tokens: int
    num_targets: int
    runs: tuple[tuple[str, bool], ...]
    images: tuple[str, ...] = ()

    @property
    def heading(self) -> str:
        return f"{self.source}, sample {self.number}: {self.num_tokens:,} tokens, {self.num_targets:,} trained on"


def samples(data: TokenisedData, tokenizer: PreTrainedTokenizerBase, count: int) -> Iterator[Sample]:
    """Yield the first `count` samples of each source. Characters that a terminal would obey are escaped."""
    for title, part in _parts(data):
        for number, (ids, labels, images) in enumerate(islice(_samples(part), count), start=1):
            pairs = zip(ids.tolist(), (labels != IGNORED).tolist(), strict=True)
            runs = tuple(
                (printable(tokenizer.decode([token for token, _ in run])), trained)
                for trained, run in groupby(pairs, key=lambda pair: pair[1])
            )
            targets = int(np.count_nonzero(labels != IGNORED))
            yield Sample(f"{title} {printable(part.path)}", number, len(ids), targets, runs, tuple(images))


def shown(data: TokenisedData, tokenizer: PreTrainedTokenizerBase, count: int, *, colour: bool) -> list[str]:
    """Return the first `count` samples of each source as lines, with targets in green (`colour`) or in brackets."""
    start, end = (GREEN, PLAIN) if colour else BRACKETS
    lines = []
    for sample in samples(data, tokenizer, count):
        text = "".join(f"{start}{text}{end}" if trained else text for text, trained in sample.runs)
        images = (f"image {index}: {printable(image)}" for index, image in enumerate(sample.images, start=1))
        lines += [f"--- {sample.heading}", text, *images, ""]
    return lines


def describe(data: TokenisedData, max_length: int) -> list[str]:
    """Return a line about each source: its samples and tokens, what was left out, and its share of a mix."""
    lines: list[str] = []
    named: set[str] = set()
    spelling: set[str] = set()
    for index, (title, part) in enumerate(_parts(data)):
        report, rows = part.report, len(part.samples)
        line = (
            f"{title} {part.path}: {_of(part)}{report.samples:,} samples ({report.truncated:,} truncated, "
            f"{report.dropped:,} dropped), {report.tokens:,} tokens, {report.target_tokens:,} trained on"
        )
        if part.has_images:
            line += f"; {sum(bool(record) for record in part.samples['images']):,} samples have images"
        if part.ignored:
            line += f"; ignored: {', '.join(part.ignored)}"
        if part.num_spelling and part.path not in spelling:
            spelling.add(part.path)
            tokens = ", ".join(map(printable, part.control_tokens))
            line += f"; {part.num_spelling:,} rows spell {tokens}, kept as text"
        if "seq_lengths" in part.samples.column_names:
            line += f"; packed into {rows:,} rows, {report.tokens / (rows * max_length):.1%} full"
        if data.weights and index < len(data.train_parts):
            line += f"; {data.weights[index] / sum(data.weights):.1%} of what is seen"
        lines.append(line)
        if part.num_bad and part.path not in named:  # held-out rows have the same source
            named.add(part.path)
            lines.append(f"  {part.num_bad:,} rows of {part.path} left out (data.on_bad_row: drop), among them")
            lines += [f"    {problem}" for problem in part.first_bad[:SHOWN]]
    return lines


def _of(part: Part) -> str:
    return f"streamed ({part.streamed}), of the first rows " if part.streamed else ""


def _parts(data: TokenisedData) -> list[tuple[str, Part]]:
    return [("train", part) for part in data.train_parts] + [("eval", part) for part in data.eval_parts]


def _samples(part: Part) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Yield ids and labels of each sample, also of those in packed rows, and where its images are."""
    row: Mapping[str, Any]
    for row in part.samples:
        borders: list[int] = np.cumsum(row["seq_lengths"])[:-1].tolist() if "seq_lengths" in row else []
        images = image_files(row.get("images"), part.places)
        for ids, labels in zip(np.split(row["input_ids"], borders), np.split(row["labels"], borders), strict=True):
            yield ids, labels, images
