"""Grow embeddings and head by the rows of new tokens, in memory and as they are read from files.

Many tables have more rows than their tokenizer has tokens: the first of these spare rows are taken, and a table only
grows if they do not suffice. Every new row begins as the mean of the rows of the tokenizer's earlier tokens, which
bounds what the new tokens take from the probability of the others: "Initializing New Word Embeddings for Pretrained
Language Models" (Hewitt, 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Nothing is drawn, so all ranks
and ZeRO stages begin with the same rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from trainer.model.blocks import NEW_ROWS, full_shape, is_partitioned
from trainer.model.new_rows import gathered
from trainer.model.weights import ModelFolder

_CHUNK = 4096  # rows


def grow(model: PreTrainedModel, ids: range) -> None:
    """Give `model` rows for the tokens `ids`, each the mean of the rows before them. Collective under ZeRO-3.

    The model may be partitioned (then inside `partitioned_creation`) or on the meta device. `ids` follow on the ids of
    the tokenizer's other tokens, as `trainer.data.tokenizer.add_tokens` returns them.
    """
    if not ids:
        return
    if full_shape(model.get_input_embeddings().weight)[0] < ids.stop:
        model.resize_token_embeddings(ids.stop, mean_resizing=False)
    for table in dict.fromkeys(_tables(model).values()):
        partitioned = is_partitioned(table)
        with gathered([table], modifier_rank=0):
            if table.numel() and not table.is_meta and (not partitioned or dist.get_rank() == 0):
                table.data[ids.start : ids.stop] = mean(table.data[: ids.start])


def grown(architecture: PretrainedConfig, ids: range) -> None:
    """Give a configuration the vocabulary that `grow` leaves."""
    text = architecture.get_text_config()
    text.vocab_size = max(text.vocab_size, ids.stop)


@torch.no_grad()
def mean(rows: Tensor) -> Tensor:
    """Return the mean of `rows` [number, ...] in their dtype, in host memory.

    It is summed in fp64 on the host, so that it is the same wherever it is computed.
    """
    total = torch.zeros(rows.shape[1:], dtype=torch.float64)
    for start in range(0, rows.shape[0], _CHUNK):
        total += rows[start : start + _CHUNK].to("cpu", torch.float64).sum(0)
    return (total / rows.shape[0]).to(rows.dtype)


class GrownFolder(ModelFolder):
    """The weights of a folder as `grow` leaves a model that was loaded from it."""

    def __init__(self, path: str | os.PathLike[str], model: PreTrainedModel, ids: range) -> None:
        """See `ModelFolder`; `model` has the rows `ids`, and may be split (`new_rows.split`)."""
        super().__init__(path, model)
        self._ids = ids
        self._tables = {name for name in _tables(model) if name in self.shapes} if ids else set()
        for name in self._tables:
            rows, *rest = self.shapes[name]
            self.shapes[name] = (max(rows, ids.stop), *rest)

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        names = list(names)
        of_rows = {name: f"{path}.weight" for name in names if (path := _path_of_rows(name)) is not None}
        plain = [name for name in names if name not in of_rows]
        found = super().read([*plain, *of_rows.values()], dtype)
        for name in self._tables & found.keys():
            found[name] = self._grown(found[name])
        rows = {name: found[table][self._ids.start : self._ids.stop] for name, table in of_rows.items()}
        return {name: rows[name] if name in rows else found[name] for name in names}

    def _grown(self, table: Tensor) -> Tensor:
        rows = max(table.shape[0], self._ids.stop)
        made = torch.empty((rows, *table.shape[1:]), dtype=table.dtype)
        made[: table.shape[0]] = table
        made[self._ids.start : self._ids.stop] = mean(table[: self._ids.start])
        return made


def _path_of_rows(name: str) -> str | None:
    path, _, leaf = name.rpartition(".")
    return path if leaf == NEW_ROWS else None


def _tables(model: Any) -> dict[str, Any]:
    """Return what has a row for each token, by all its names: weight and bias of embeddings and head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    ids = {
        id(tensor)
        for module in ends
        if module is not None
        for name, tensor in module.named_parameters(recurse=False)
        if name != NEW_ROWS
    }
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in ids}
