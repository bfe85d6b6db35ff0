"""Hold what a run trains and evaluates on: the samples of all sources, and reports on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.data.encode import Report
from trainer.data.pictures import Places

if TYPE_CHECKING:
    from datasets import Dataset

    from trainer.data.stream import Streams


@dataclass(frozen=True)
class Part:
    """The samples of one source: memory-mapped {input_ids, labels}, numpy arrays. If they are packed, each is a row of
    samples and also has `seq_lengths`. `ignored` names the columns, and keys of messages, that no sample contains.
    `num_bad` rows of the source, part held out or not, could not be used; `first_bad` says what is wrong with ten.
    `num_spelling` rows spell `control_tokens`, which are kept as text. If the source is streamed, everything is about
    its first rows, and `streamed` says how much there is of it. Its images are in `places`."""

    path: str
    samples: Dataset
    report: Report
    places: Places
    ignored: tuple[str, ...] = ()
    num_bad: int = 0
    first_bad: tuple[str, ...] = ()
    num_spelling: int = 0
    control_tokens: tuple[str, ...] = ()
    streamed: str = ""

    @property
    def has_images(self) -> bool:
        return "images" in self.samples.column_names


@dataclass(frozen=True)
class TokenisedData:
    """The samples of all sources, concatenated, and the part of each source.

    `weights` has one number for each part of `train`, or is None. `made_of` maps keys to what decides the training
    samples, and `fingerprint` is its hash. `earlier_fingerprint` is what checkpoints recorded before they recorded
    `made_of`; None if a source was read in another way then. If training data is streamed, `streams` makes its samples,
    and `train` has only those of the first rows of every source.
    """

    train: Dataset
    train_parts: tuple[Part, ...]
    eval: Dataset | None
    eval_parts: tuple[Part, ...]
    weights: tuple[float, ...] | None
    fingerprint: str
    made_of: Mapping[str, Any]
    earlier_fingerprint: str | None
    streams: Streams | None = None

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Return `fingerprint`, and what a checkpoint of an earlier version may have recorded instead."""
        return tuple(filter(None, (self.fingerprint, self.earlier_fingerprint)))

    @property
    def has_images(self) -> bool:
        return any(part.has_images for part in (*self.train_parts, *self.eval_parts))

    @property
    def sizes(self) -> list[int]:
        """Count the samples (or packed rows) of each source of `train`."""
        return [len(part.samples) for part in self.train_parts]

    @property
    def train_report(self) -> Report:
        return sum((part.report for part in self.train_parts), start=Report(0, 0, 0, 0, 0))
