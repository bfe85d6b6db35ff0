"""Make samples of preferences for a loop of one's own, such as DPO (https://arxiv.org/abs/2305.18290): each prompt with
its chosen answer, and with its rejected one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.schema import DataSource
from trainer.data.batches import collate
from trainer.data.encode import Encoder, Outcome, Outcomes, Overflow
from trainer.data.errors import BadRows, DataError
from trainer.data.further_keys import FurtherKeys
from trainer.data.plain_files import Position
from trainer.data.rows import Unused, read_rows
from trainer.data.sources import open_source

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_FORMAT = "preference"


def preference_pairs(
    source: str | DataSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overflow: Overflow = "truncate",
) -> Dataset:
    """Tokenise the rows of format `preference` in a source: a path, or a source with its keys.

    Returns rows {chosen_input_ids, chosen_labels, rejected_input_ids, rejected_labels}, numpy arrays, int32; labels are
    -100 outside the answers. A row of which one half makes no sample (too long with `overflow="drop"`, an empty answer,
    or nothing to train on within `max_length`) is left out as a whole. All rows are held in memory. Raises `DataError`
    for what cannot be read or rendered, and if no pair is left.
    """
    from datasets import Dataset

    if isinstance(source, str):
        source = DataSource(path=source)
    unused, bad, keys = Unused(source.path, source.ignore), BadRows(source.path), FurtherKeys()
    rows = read_rows(source.path, open_source(source).records(Position()), _FORMAT, unused)
    encoder = Encoder(tokenizer, max_length=max_length, overflow=overflow)
    halves = {"chosen": rows, "rejected": [row.rejected for row in rows if row.rejected is not None]}
    for half in halves.values():
        keys.look(half, tokenizer, encoder.templates)
    keys.report(unused)
    if unused.problems():
        raise DataError(unused.problems())
    encoded = {name: encoder.encode(half) for name, half in halves.items()}
    for made in encoded.values():
        outcomes = Outcomes()
        outcomes.add(made)
        everything = np.full(len(rows), True)
        outcomes.check(source.path, bad, everything, max_length=max_length, overflow=overflow)
    whole = np.logical_and.reduce([made.outcomes <= Outcome.CUT for made in encoded.values()])
    columns: dict[str, list[Any]] = {}
    for name, made in encoded.items():
        numbers = np.flatnonzero(made.outcomes <= Outcome.CUT)
        samples = [sample for number, sample in zip(numbers, made.samples, strict=True) if whole[number]]
        for column in ("input_ids", "labels"):
            columns[f"{name}_{column}"] = [sample[column] for sample in samples]
    if not whole.any():
        raise DataError([f"{source.path}: no row has two answers within data.max_length={max_length}; raise it"])
    return Dataset.from_dict(columns).with_format("numpy")


def collate_pairs(pairs: Sequence[Mapping[str, Any]], *, pad_id: int) -> dict[str, torch.Tensor]:
    """Return rows of `preference_pairs` as one batch {input_ids, labels, attention_mask}, int64 [2 x pairs, longest]:
    the chosen answers first, then the rejected ones in the same order."""
    samples = [
        {column: pair[f"{name}_{column}"] for column in ("input_ids", "labels")}
        for name in ("chosen", "rejected")
        for pair in pairs
    ]
    return collate(samples, pad_id=pad_id)
