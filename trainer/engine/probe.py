"""The prober: measures the model on probe batches for selectors that learn, and leaves no trace in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from trainer.blocks import Block
from trainer.selectors import Measurement

# Takes the engine's module and a batch; returns the summed loss and the number of target tokens it is summed over.
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, int]]


class Prober:
    """Runs a selector's measurements without gradients and dropout, on batches from `batches`.

    Results are sums over all ranks divided by all ranks' target tokens. Random number generators and the module's
    training mode are as before afterwards.
    """

    def __init__(
        self, engine: DeepSpeedEngine, blocks: Sequence[Block], *, batches: Iterator[Any], loss_function: LossFunction
    ) -> None:
        self._engine = engine
        self._blocks = blocks
        self._batches = batches
        self._loss_function = loss_function

    def measure(self, measurement: Measurement) -> tuple[float, ...]:
        """One number for each trial of `measurement`, the same on every rank."""
        batch = next(self._batches)
        module = self._engine.module
        modes = [(child, child.training) for child in module.modules()]
        accelerator = get_accelerator()
        devices = [] if accelerator.device_name() == "cpu" else [accelerator.current_device()]
        totals = []
        with torch.random.fork_rng(devices), torch.no_grad():
            try:
                module.eval()
                for trial in measurement.trials:
                    with suppressed([self._blocks[i].module for i in trial], measurement.factor):
                        loss, count = self._loss_function(module, batch)
                    totals.append(
                        torch.stack(
                            [loss.double(), torch.tensor(float(count), dtype=torch.float64, device=loss.device)]
                        )
                    )
            finally:
                for child, training in modes:
                    child.training = training
        sums = torch.stack(totals)
        dist.all_reduce(sums)
        return tuple((sums[:, 0] / sums[:, 1].clamp(min=1)).tolist())


@contextmanager
def suppressed(modules: Sequence[nn.Module], factor: float) -> Iterator[None]:
    """Scale the residual contribution of `modules`: hidden states x -> x + factor * (block(x) - x). Always undone."""

    def scale(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        first = output[0] if isinstance(output, tuple) else output
        scaled = torch.lerp(hidden, first, factor)
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(scale, with_kwargs=True)
            stack.callback(handle.remove)
        yield
