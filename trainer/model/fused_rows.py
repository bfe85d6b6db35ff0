"""The fused head and loss (TRL's) for a head of which only the rows of new tokens train.

TRL's backward computes the gradient of a whole head, in fp32, if any of it trains. Here it computes that of the hidden
states with the whole table, which is frozen, and then that of the new rows alone, as a head of so many entries: the
normalisation, logZ, is that of the whole vocabulary in both.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from trainer.model.new_rows import WithNewRows, rows_in_table


class _Context:
    """Hold what TRL's function (1.16) keeps between its forward and its backward."""

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, bool, bool]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Do nothing: `_LogProbs` does this for its own."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Do nothing: only log-probabilities are asked for."""


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, head: WithNewRows, targets: Tensor, *settings: Any) -> Any:
        from trl.kernels import ChunkedLogProbFunction

        inner = _Context()
        with rows_in_table(head.weight, rows, head.first_row) as table:
            found = ChunkedLogProbFunction.forward(inner, hidden, table, None, targets, *settings)
        log_z = inner.saved_tensors[4]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, targets, log_z)
        inner.saved_tensors = ()
        ctx.inner, ctx.head = inner, head
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        (hidden, targets, log_z), inner, head = ctx.saved_tensors, ctx.inner, ctx.head
        of_hidden = of_rows = None
        with maybe_gather_lm_head_ctx(head.weight, head.new_rows):
            if ctx.needs_input_grad[0]:
                inner.needs_input_grad = (True, False, False)
                inner.saved_tensors = (hidden, head.weight, None, targets, log_z, log_z)
                with rows_in_table(head.weight, head.new_rows, head.first_row):
                    of_hidden = ChunkedLogProbFunction.backward(inner, gradient, None)[0]
            if ctx.needs_input_grad[1]:
                inner.needs_input_grad = (False, True, False)
                inner.saved_tensors = (hidden, head.new_rows, None, targets - head.first_row, log_z, log_z)
                inner.chunk_size = head.new_rows.shape[0]  # the width of its buffer
                of_rows = ChunkedLogProbFunction.backward(inner, gradient, None)[1]
        return of_hidden, of_rows, *[None] * (len(ctx.needs_input_grad) - 2)


class _Applied:
    """Stand for TRL's function while it scores with `head`."""

    def __init__(self, head: WithNewRows) -> None:
        self._head = head

    def apply(self, hidden: Tensor, weight: Tensor, bias: None, targets: Tensor, *settings: Any) -> Any:
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        with maybe_gather_lm_head_ctx(self._head.new_rows):
            return _LogProbs.apply(hidden, self._head.new_rows, self._head, targets, *settings)


def fuse_new_rows(model: PreTrainedModel) -> None:
    """Let the fused head of `model`, which TRL has added, train the new rows of the head, if it has any."""
    from trl.trainer import utils

    head, inner = model.get_output_embeddings(), model.forward
    if not isinstance(head, WithNewRows):
        return

    @wraps(inner)
    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return inner(*args, **kwargs)
        own = utils._ChunkedLogProbFunction  # which the forward of TRL looks up when it runs
        utils._ChunkedLogProbFunction = _Applied(head)
        try:
            return inner(*args, fused_lm_head=True, **kwargs)
        finally:
            utils._ChunkedLogProbFunction = own

    model.forward = forward
