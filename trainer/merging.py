"""Merge adapters into their base a block at a time, without ever having the whole model in one place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.adapters import Adapted, twin
from trainer.blocks import Piece

_BASE = "base_model.model."  # what PEFT puts before the names of the base


class Merger:
    """Makes of the tensors of a block with adapters those of the block that they come to, with PEFT's own merge.

    It happens in a second model that has weights only where it merges.
    """

    def __init__(self, adapted: Adapted) -> None:
        self._adapted = adapted
        self._twin: Any = None

    def tensors(self, path: str) -> dict[str, Tensor]:
        """The live tensors of the adapted model that those of the module `path` of the merged one are made of."""
        state = self._adapted.model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if name.startswith(f"{_BASE}{path}.")}

    @torch.no_grad()
    def merge(self, piece: Piece, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The merged tensors of `piece`, of the whole `tensors` that `tensors(piece.path)` names, in host memory.

        Raises what PEFT raises where it cannot merge, and `RuntimeError` where something is not to be had.
        """
        if self._twin is None:
            self._twin = twin(self._adapted)
        self._twin.load_state_dict(tensors, assign=True, strict=False)
        base = self._twin.get_base_model()
        missing = [name for name, p in base.get_submodule(piece.path).named_parameters() if p.is_meta]
        if missing:
            raise RuntimeError(f"{len(missing)} tensors are not to be had, for instance {piece.path}.{missing[0]}")
        _merge_within(base, piece.path)
        module = base.get_submodule(piece.path)
        state = {f"{piece.path}.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
        for parameter in module.parameters():
            parameter.data = parameter.data.new_empty(0)  # the twin keeps nothing
        return {name: state[name] for name in piece.tensors}


def plain_twin(adapted: Adapted, *, tied: bool) -> PreTrainedModel:
    """The base as it is without adapters, on the meta device: what a merged model looks like."""
    base = adapted.model.get_base_model()
    config = copy.deepcopy(base.config)
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = tied
    with torch.device("meta"):
        model = type(base)(config).to(base.dtype)
    model.generation_config = base.generation_config
    return model


def _merge_within(base: nn.Module, path: str) -> None:
    """As PEFT's `merge_and_unload`, for the layers of one module."""
    for name in [name for name, _ in base.named_modules() if name == path or name.startswith(f"{path}.")]:
        try:
            layer = base.get_submodule(name)
        except AttributeError:  # gone with the layer that it was in
            continue
        if hasattr(layer, "unload_and_optionally_merge_module"):
            plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        elif hasattr(layer, "base_layer"):
            layer.merge()
            plain = layer.get_base_layer()
        else:
            continue
        base.set_submodule(name, plain)
