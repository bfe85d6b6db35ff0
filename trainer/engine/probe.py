"""Measure the model on probe batches for selectors that learn, without any effect on training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from trainer.engine.inspection import unobserved
from trainer.engine.suppression import Suppress
from trainer.engine.zero.registration import Registration
from trainer.model.blocks import Block
from trainer.selectors import Measurement

# Takes the engine's module and a batch; returns the summed loss and the number of target tokens it is summed over.
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, int]]


@runtime_checkable
class Positioned(Protocol):
    """An iterator that can jump to the batch of any number, without making those before it."""

    def go_to(self, number: int, /) -> None: ...


class Prober:
    """Run a selector's measurements without gradients and dropout, on batches from `batches`.

    Results are sums over all ranks divided by all ranks' target tokens. Random number generators, the module's
    training mode and the order in which ZeRO-3 prefetches are restored afterwards.
    """

    def __init__(
        self,
        registration: Registration,
        blocks: Sequence[Block],
        *,
        suppress: Suppress,
        batches: Iterator[Any],
        loss_function: LossFunction,
    ) -> None:
        self._registration = registration
        self._blocks = blocks
        self._suppress = suppress
        self._batches = batches
        self._loss_function = loss_function
        self.taken = 0  # batches

    def skip(self, batches: int) -> None:
        """Skip the first `batches` batches, which an earlier process used.

        An iterator with `go_to` jumps over them; any other has to make them.
        """
        if isinstance(self._batches, Positioned):
            self._batches.go_to(batches)
            self.taken = batches
        while self.taken < batches:
            self._next()

    def _next(self) -> Any:
        self.taken += 1
        return next(self._batches)

    def measure(self, measurement: Measurement) -> tuple[float, ...]:
        """Return the mean loss for each trial of `measurement`, the same on every rank."""
        batch = self._next()
        module = self._registration.engine.module
        totals = []
        with unobserved(self._registration), torch.no_grad():
            module.eval()
            for trial in measurement.trials:
                with self._suppress([self._blocks[i].module for i in trial], measurement.factor):
                    loss, count = self._loss_function(module, batch)
                totals.append(
                    torch.stack([loss.double(), torch.tensor(float(count), dtype=torch.float64, device=loss.device)])
                )
        sums = torch.stack(totals)
        dist.all_reduce(sums)
        return tuple((sums[:, 0] / sums[:, 1].clamp(min=1)).tolist())
