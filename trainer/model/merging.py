"""Merge adapters into their base a block at a time, without ever having the whole model in one place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.model.adapters import Adapted, twin
from trainer.model.blocks import Piece
from trainer.model.new_rows import fold
from trainer.model.partitions import created_whole

_BASE = "base_model.model."  # what PEFT puts before the names of the base


class Merger:
    """Merge the adapters of one block after another into its weights, with PEFT's own merge.

    It does so in a second model, which has weights only for the block that is merged.
    """

    def __init__(self, adapted: Adapted) -> None:
        self._adapted = adapted
        self._twin: Any = None

    def tensors(self, piece: Piece) -> dict[str, Tensor]:
        """Return the live tensors of the adapted model from which a piece of the merged one is made."""
        state = self._adapted.model.state_dict(keep_vars=True)
        if _is_plain(piece, state):  # its module may have other pieces inside
            owners = {_owner(f"{_BASE}{name}") for name in piece.tensors}
            return {name: tensor for name, tensor in state.items() if _owner(name) in owners}
        return {name: tensor for name, tensor in state.items() if name.startswith(f"{_BASE}{piece.path}.")}

    @torch.no_grad()
    def merge(self, piece: Piece, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the merged tensors of `piece`, in host memory. `tensors` are those of `tensors(piece)`, gathered.

        Raises what PEFT raises if it cannot merge, and `RuntimeError` if a tensor is missing.
        """
        tensors = fold(self._adapted.model, tensors)
        if _is_plain(piece, tensors):
            return {name: tensors[f"{_BASE}{name}"].detach() for name in piece.tensors}
        if self._twin is None:
            self._twin = twin(self._adapted)
        self._twin.load_state_dict(tensors, assign=True, strict=False)
        base = self._twin.get_base_model()
        missing = [name for name, p in base.get_submodule(piece.path).named_parameters() if p.is_meta]
        if missing:
            raise RuntimeError(f"{len(missing)} tensors are missing, for instance {piece.path}.{missing[0]}")
        _merge_within(base, piece.path)
        module = base.get_submodule(piece.path)
        state = {f"{piece.path}.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
        for parameter in module.parameters():
            parameter.data = parameter.data.new_empty(0)  # the twin keeps nothing
        return {name: state[name] for name in piece.tensors}


def _is_plain(piece: Piece, state: Mapping[str, Tensor]) -> bool:
    """Return whether PEFT has wrapped nothing in a piece: then `state` has all its tensors by their own names."""
    return all(f"{_BASE}{name}" in state for name in piece.tensors)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def plain_twin(adapted: Adapted, *, tied: bool) -> PreTrainedModel:
    """Return the base without adapters, on the meta device: the structure of a merged model."""
    base = adapted.model.get_base_model()
    config = copy.deepcopy(base.config)
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = tied
    with torch.device("meta"), created_whole():
        model = type(base)(config).to(base.dtype)
    model.generation_config = base.generation_config
    return model


def _merge_within(base: nn.Module, path: str) -> None:
    """Merge the layers of one module, as PEFT's `merge_and_unload` does for all."""
    for name in [name for name, _ in base.named_modules() if name == path or name.startswith(f"{path}.")]:
        try:
            layer: Any = base.get_submodule(name)  # PEFT's layers
        except AttributeError:  # removed with the layer that it was in
            continue
        if hasattr(layer, "unload_and_optionally_merge_module"):
            plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        elif hasattr(layer, "base_layer"):
            layer.merge()
            plain = layer.get_base_layer()
        else:
            continue
        base.set_submodule(name, plain)
