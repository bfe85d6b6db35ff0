"""The prober: measures the model on probe batches for selectors that learn, and leaves no trace in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from trainer.blocks import Block
from trainer.engine.registration import Registration
from trainer.engine.suppression import Suppress
from trainer.selectors import Measurement

# Takes the engine's module and a batch; returns the summed loss and the number of target tokens it is summed over.
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, int]]


class Prober:
    """Runs a selector's measurements without gradients and dropout, on batches from `batches`.

    Results are sums over all ranks divided by all ranks' target tokens. Random number generators, the module's
    training mode and the order in which ZeRO-3 prefetches are as before afterwards.
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
        """Go on after so many batches, which an earlier process took."""
        while self.taken < batches:
            self._next()

    def _next(self) -> Any:
        self.taken += 1
        return next(self._batches)

    def measure(self, measurement: Measurement) -> tuple[float, ...]:
        """One number for each trial of `measurement`, the same on every rank."""
        batch = self._next()
        module = self._registration.engine.module
        modes = [(child, child.training) for child in module.modules()]
        order = self._registration.fetch_order()
        accelerator = get_accelerator()
        devices = [] if accelerator.device_name() == "cpu" else [accelerator.current_device()]
        totals = []
        with torch.random.fork_rng(devices), torch.no_grad():
            try:
                module.eval()
                for trial in measurement.trials:
                    with self._suppress([self._blocks[i].module for i in trial], measurement.factor):
                        loss, count = self._loss_function(module, batch)
                    totals.append(
                        torch.stack(
                            [loss.double(), torch.tensor(float(count), dtype=torch.float64, device=loss.device)]
                        )
                    )
            finally:
                for child, training in modes:
                    child.training = training
                if order and self._registration.fetch_order() != order:  # a blend fetches some modules twice
                    self._registration.expect_fetch_order(order)
        sums = torch.stack(totals)
        dist.all_reduce(sums)
        return tuple((sums[:, 0] / sums[:, 1].clamp(min=1)).tolist())
