"""Check that the base model of an export or a delta is the one that was trained, and what may be loaded from it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.checkpoint.contents import REST, unit_of_block
from trainer.checkpoint.fingerprint import Fingerprint
from trainer.checkpoint.identity import Identity, buffer_digest, differences, identity_of, new_versions
from trainer.export.shards import ExportError
from trainer.model import blocks
from trainer.model import load as models
from trainer.model.blocks import pieces

logger = logging.getLogger(__name__)


class Units:
    """Map each tensor of a model to its unit and its name.

    `known` are the units of a checkpoint or a delta; tensors of no such unit belong to the unit `rest`.
    """

    def __init__(self, model: nn.Module, known: set[str], *, path: str | None, adapters: bool = False) -> None:
        structure = blocks.find(model, path=path, substrate="adapter" if adapters else "full")
        parts = {unit_of_block(block.index): block.parameters for block in structure.blocks} | structure.outside
        unit_of = {id(p): unit for unit, its in parts.items() if unit in known for p in its.values()}
        self.path = structure.path
        self.of = {id(p): (unit_of.get(id(p), REST), name) for name, p in model.named_parameters()}

    def names(self, unit: str) -> set[str]:
        return {name for its_unit, name in self.of.values() if its_unit == unit}


class BaseCheck:
    """Compare a base model, tensor by tensor, with the fingerprints of its weights and checksums of its buffers that
    were recorded when a run began."""

    def __init__(self, base: str, recorded: Mapping[str, str], units: Units, identity: Identity | None) -> None:
        self._base = base
        self._recorded = recorded
        self._buffers = (identity.buffers if identity else None) or {}
        self._awaited = {unit: units.names(unit) for unit in {unit for unit, _ in units.of.values()}}
        self._found = {unit: Fingerprint() for unit in self._awaited}

    def add(self, unit: str, name: str, weights: Tensor) -> None:
        """Add a tensor. Raises `ExportError` at the last tensor of a unit if the unit's fingerprint differs."""
        self._found[unit].add(name, weights)
        self._awaited[unit].remove(name)
        if not self._awaited[unit] and self._recorded.get(unit, self[unit]) != self[unit]:
            raise ExportError(
                f"the base model in {self._base} is not the one that the run began with: {unit} has the fingerprint "
                f"{self[unit]} instead of {self._recorded[unit]}; use the base that was trained"
            )

    def add_buffer(self, name: str, buffer: Tensor, dtype: torch.dtype) -> None:
        """Raise `ExportError` if the buffer differs from the recorded one."""
        now = buffer_digest(buffer, dtype)
        if self._buffers.get(name, now) != now:
            raise ExportError(
                f"the base model in {self._base} is not the one that the run began with: its buffer {name} has the "
                f"SHA-256 {now} instead of {self._buffers[name]}; use the base that was trained"
            )

    def __getitem__(self, unit: str) -> str:
        return str(self._found[unit])


@dataclass(frozen=True)
class Permissions:
    """Permissions that the caller must give, since a run folder or a delta may come from somebody else.

    `base` and `tokenizer` are folders or Hub names to use instead of those in the folder. Only names given here are
    fetched. `trust_remote_code` lets the base and the tokenizer run Python code of their own.
    """

    base: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False


def take_generation_config(model: PreTrainedModel, base: str) -> None:
    """Load the generation configuration as `from_pretrained` does; a model on the meta device has none."""
    if (settings := models.load_generation_config(base)) is not None:
        model.generation_config = settings


class InMemory:
    """A base that was built from a seed, with the interface of `ModelFolder`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._tensors = {name: t for piece in pieces(model) for name, t in piece.tensors.items()}

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: self._tensors[name].detach().to(dtype) for name in names}


def refuse_code(identity: Identity, permissions: Permissions, what: str) -> None:
    """Raise `ExportError` if the model has code of its own that the caller does not allow."""
    if identity.code and not permissions.trust_remote_code:
        raise ExportError(
            f"{what} trained a model with code of its own ({', '.join(sorted(identity.code))}): look at that code in "
            "the base, and allow it with --trust-remote-code"
        )


def refuse_another(
    identity: Identity | None,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    *,
    adapters: bool,
) -> None:
    """Raise `ExportError` if `model` or its tokenizer differs from the record; the message names the key. Weights are
    not compared."""
    if identity is None:
        return
    now = identity_of(model, tokenizer, blocks=identity.blocks, buffers=False)
    if not adapters:
        now = now.model_copy(update={"adapters": identity.adapters})
    if found := differences(identity, now):
        raise ExportError(
            f"the base model in {base} is not the one that the run began with: {'; '.join(found)}. Use the base that "
            "was trained"
        )
    if warning := new_versions(identity, now):
        logger.warning("%s", warning)
