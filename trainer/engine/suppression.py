"""Scale down what a block adds while a probe measures the loss without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trainer.model.blocks import Block

# Takes the modules of some blocks and a factor; inside the context they add `factor` of what they add outside.
Suppress = Callable[[Sequence[nn.Module], float], AbstractContextManager[None]]


@contextmanager
def suppressed_residuals(modules: Sequence[nn.Module], factor: float) -> Iterator[None]:
    """Scale the residual contribution of blocks: hidden states x -> x + factor * (block(x) - x). Undone on exit."""

    def scale(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        first = output[0] if isinstance(output, tuple) else output
        scaled = torch.lerp(hidden, first, factor)
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(scale, with_kwargs=True).remove)
        yield


def refuse_unsuppressed(blocks: Sequence[Block]) -> None:
    """Raise `ValueError` if something trains in a block that `suppressed_adapters` would leave as it is.

    These are what PEFT trains beside or instead of adapters: `modules_to_save`, biases, prompts inside attention. A
    probe would learn nothing of them.
    """
    for block in blocks:
        covered = {
            id(parameter)
            for layer in block.module.modules()
            if isinstance(layer, BaseTunerLayer)
            for name, parameter in layer.named_parameters()
            if not name.startswith("base_layer.")
        }
        beside = [name for name, parameter in block.parameters.items() if id(parameter) not in covered]
        if beside:
            raise ValueError(
                f"selector.name: importance suppresses adapters, and {beside[0]} is in none of them: leave it out of "
                "substrate.peft (modules_to_save, bias, the method), or take another selector (uniform, cyclic, all)"
            )


@contextmanager
def suppressed_adapters(modules: Sequence[nn.Module], factor: float) -> Iterator[None]:
    """Scale down the adapters inside blocks, whatever PEFT method made them. Undone on exit.

    LoRA and its variants have a scaling, which is multiplied by `factor` for each adapter name (with DoRA the direction
    loses its adapter, the trained magnitude stays). Other methods' layers give a blend: factor * with the adapter
    + (1 - factor) * without.
    """

    def blend(layer: BaseTunerLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return torch.lerp(layer.get_base_layer()(*args, **kwargs), output, factor)

    with ExitStack() as stack:
        for module in modules:
            layers = [child for child in module.modules() if isinstance(child, BaseTunerLayer)]
            if any(isinstance(layer, LoraLayer) for layer in layers):
                stack.enter_context(rescale_adapter_scale(module, factor))
            for layer in layers:
                if not isinstance(layer, LoraLayer):
                    stack.callback(layer.register_forward_hook(blend, with_kwargs=True).remove)
        yield
