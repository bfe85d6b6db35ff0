"""Train the rows of new tokens in embeddings and head, and no other row.

The rows become a parameter of their own, [new tokens, width], beside the table that they belong to, which stays frozen
as a whole: gradients, masters and moments exist for these rows only, under every ZeRO stage, and weight decay has
nothing else to act on. The module looks up, or multiplies with, the table as if the rows stood in it, so that a model
that is opened with the rows in its table computes the same, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.model.blocks import NEW_ROWS, BlockError, full_shape, is_partitioned


@contextmanager
def rows_in_table(table: Tensor, rows: Tensor, first: int) -> Iterator[Tensor]:
    """Yield `table` [vocabulary, width], whole, in which `rows` stand from row `first` on while inside; after that it
    is as before."""
    table, place = table.data, slice(first, first + rows.shape[0])
    before = table[place].clone()
    table[place] = rows.data
    try:
        yield table
    finally:
        table[place] = before


class _Linear(torch.autograd.Function):
    """`torch.nn.functional.linear` with the new rows in the head's table, of which only they have a gradient."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, head: WithNewRows) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.head = head  # ZeRO-3 gathers its parameters for forward and for backward
        with rows_in_table(head.weight, rows, head.first_row) as table:
            return nn.functional.linear(hidden, table, head.bias)

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(  # type: ignore[override] # of decorators without types
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        (hidden,), head = ctx.saved_tensors, ctx.head
        of_hidden = of_rows = None
        if ctx.needs_input_grad[0]:
            with rows_in_table(head.weight, head.new_rows, head.first_row) as table:
                of_hidden = gradient @ table
        if ctx.needs_input_grad[1]:
            of_rows = gradient[..., head.new_ids].flatten(0, -2).T @ hidden.flatten(0, -2)
        return of_hidden, of_rows, None


class WithNewRows:
    """Base of the classes that `split` gives to modules: `new_rows` stand for the rows of `weight` from `first_row`
    on."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    new_rows: nn.Parameter
    first_row: int

    @property
    def new_ids(self) -> slice:
        """Return the rows of the table that `new_rows` stand for."""
        return slice(self.first_row, self.first_row + full_shape(self.new_rows)[0])


class _EmbeddingWithNewRows(WithNewRows):
    def forward(self: Any, ids: Tensor) -> Tensor:
        found = super().forward(ids)  # type: ignore[misc] # of the module's own class
        places = ids - self.first_row
        number = self.new_rows.shape[0]
        # The same class looks the new rows up: some scale what they find.
        of_rows = copy.copy(self)
        of_rows.__dict__.update(_parameters={"weight": self.new_rows}, padding_idx=None, num_embeddings=number)
        new = super(_EmbeddingWithNewRows, of_rows).forward(places.clamp(0, number - 1))  # type: ignore[misc]
        return torch.where(((places >= 0) & (places < number)).unsqueeze(-1), new, found)


class _HeadWithNewRows(WithNewRows):
    def forward(self: Any, hidden: Tensor) -> Tensor:
        return _Linear.apply(hidden, self.new_rows, self)


def split(model: nn.Module, ids: range, parts: Collection[str]) -> None:
    """Make the rows `ids` of `model`'s embeddings and head a parameter of their own, with the table's values; the rest
    of the table is then never trained.

    `parts` says of which: `embeddings`, `head`, or both, which they must be if the two are tied. `model` must have
    these rows (`trainer.model.growth.grow`). Collective under ZeRO-3. Raises `BlockError` for what cannot be split.
    """
    if not parts:
        return
    if not ids:
        raise BlockError(
            f"always_on.{min(parts)}: new_rows, but the tokenizer has all tokens of model.add_tokens already, so there "
            "are no new rows: set true or false"
        )
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and head.weight is embeddings.weight
    if tied and set(parts) != {"embeddings", "head"}:
        (other,) = {"embeddings", "head"} - set(parts)
        raise BlockError(
            f"always_on.{min(parts)}: new_rows, but not always_on.{other}, to which this model ties it: set both to "
            "the same value"
        )
    with gathered([embeddings.weight]):
        rows = nn.Parameter(embeddings.weight.detach()[ids.start : ids.stop].clone())
    if "embeddings" in parts:
        if not isinstance(embeddings, nn.Embedding):
            raise BlockError(f"always_on.embeddings: new_rows, but {type(embeddings).__name__} is no table; set true")
        _give(embeddings, _EmbeddingWithNewRows, rows, ids)
    if "head" in parts:
        if type(head).forward is not nn.Linear.forward:
            raise BlockError(f"always_on.head: new_rows, but {type(head).__name__} is no linear layer; set true")
        if not tied:
            with gathered([head.weight]):
                rows = nn.Parameter(head.weight.detach()[ids.start : ids.stop].clone())
        _give(head, _HeadWithNewRows, rows, ids)
    if tied:
        names = [name for name, module in model.named_modules() if module in (embeddings, head)]
        keys: Any = model.all_tied_weights_keys  # for exports, which write tied tensors under one name
        for name in names:
            if (source := keys.get(f"{name}.weight")) is not None:
                keys[f"{name}.{NEW_ROWS}"] = f"{source.rpartition('.')[0]}.{NEW_ROWS}"


def _give(module: Any, kind: type[WithNewRows], rows: nn.Parameter, ids: range) -> None:
    own = type(module)
    module.__class__ = type(f"{own.__name__}WithNewRows", (kind, own), {})
    module.first_row = ids.start
    module.register_parameter(NEW_ROWS, rows)


def fold(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors`, of `model` by name and whole, with new rows in their tables instead of beside them."""
    folded = dict(tensors)
    for name in [name for name in tensors if name.rpartition(".")[2] == NEW_ROWS]:
        path = name.rpartition(".")[0]
        module: Any = model.get_submodule(path)
        rows, table = folded.pop(name), folded[f"{path}.weight"].clone()
        table[module.new_ids] = rows
        folded[f"{path}.weight"] = table
    return folded


def gathered(parameters: list[Any], **options: Any) -> Any:
    """Gather those of `parameters` that ZeRO-3 has in parts, while inside."""
    parts = [parameter for parameter in parameters if parameter is not None and is_partitioned(parameter)]
    return deepspeed.zero.GatheredParameters(parts, enabled=bool(parts), **options)
