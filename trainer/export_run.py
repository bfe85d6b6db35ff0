"""Write the model of a run folder at one of its checkpoints: what trained from there, the rest from the base model.

Needs no process group and no accelerator, and holds a shard and a block of the model in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from trainer import blocks
from trainer import model as models
from trainer.adapters import Adapted, adapt
from trainer.blocks import Piece, pieces
from trainer.checkpoint.contents import RANDOM, REST, Contents, unit_of_block
from trainer.checkpoint.fingerprint import Fingerprint
from trainer.checkpoint.store import CheckpointError, Manifest, Store
from trainer.config import RunConfig
from trainer.data.tokenizer import load_tokenizer, tokenizer_name
from trainer.export import write_adapter
from trainer.shards import ExportError, write_model
from trainer.weights import ModelFolder


class Units:
    """Which unit each tensor of a model belongs to, and under which name it is known there.

    `known` are the units that a checkpoint or a delta knows of; what is in none of them is the rest.
    """

    def __init__(self, model: nn.Module, known: set[str], *, path: str | None, adapters: bool = False) -> None:
        structure = blocks.find(model, path=path, substrate="adapter" if adapters else "full")
        parts = {unit_of_block(block.index): block.parameters for block in structure.blocks} | structure.outside
        unit_of = {id(p): unit for unit, found in parts.items() if unit in known for p in found.values()}
        self.path = structure.path
        self.of = {id(p): (unit_of.get(id(p), REST), name) for name, p in model.named_parameters()}

    def names(self, unit: str) -> set[str]:
        return {name for found, name in self.of.values() if found == unit}


class BaseCheck:
    """Compares the weights of a base, as they come, with the fingerprints that were taken when a run began."""

    def __init__(self, base: str, recorded: Mapping[str, str], units: Units) -> None:
        self._base = base
        self._recorded = recorded
        self._awaited = {unit: units.names(unit) for unit in {unit for unit, _ in units.of.values()}}
        self._found = {unit: Fingerprint() for unit in self._awaited}

    def add(self, unit: str, name: str, weights: Tensor) -> None:
        """Raises `ExportError` with the last of a unit's tensors, where they are not what they were."""
        self._found[unit].add(name, weights)
        self._awaited[unit].remove(name)
        if not self._awaited[unit] and self._recorded.get(unit, self[unit]) != self[unit]:
            raise ExportError(
                f"the base model in {self._base} is another one than when the run began: {unit} has the fingerprint "
                f"{self[unit]} instead of {self._recorded[unit]}; give the base that was trained"
            )

    def __getitem__(self, unit: str) -> str:
        return str(self._found[unit])


class TrainedRun:
    """A checkpoint of a run folder, with all its files verified, and the base model that it stands on.

    `step` None is the newest checkpoint; `best` the one with the least evaluation loss; `base` the folder of the base
    model where it is not where the run found it. Raises `CheckpointError` or `ExportError`.
    """

    def __init__(self, folder: Path, *, step: int | None = None, best: bool = False, base: Path | None = None) -> None:
        self._store = Store(folder)
        self.manifest = _chosen(self._store, step, best)
        self.config = _configuration(self.manifest, base)
        self.tokenizer = load_tokenizer(
            tokenizer_name(self.config.model), trust_remote_code=self.config.model.trust_remote_code
        )
        self.changed = {unit: files for unit, files in self.manifest.units.items() if unit != RANDOM}
        for file in (file for files in self.changed.values() for file in files):
            if problem := self._store.problem(file):
                raise CheckpointError(f"the checkpoint after step {self.manifest.step} is damaged: {problem}")
        self.contents = Contents(self._store, self.changed)
        self.contents.learn(self.changed)

    @property
    def dtype(self) -> torch.dtype:
        return models.DTYPES[self.config.model.dtype]

    @property
    def base_name(self) -> str:
        return self.config.model.path or "model.random"

    @property
    def recorded(self) -> dict[str, str]:
        """Fingerprints of the base, by unit."""
        return self.manifest.state["base"]

    @property
    def has_adapters(self) -> bool:
        return self.config.substrate.name == "adapter"

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on the meta device, in the dtype that it was trained in."""
        model = models.on_meta(self.config.model, self.tokenizer).to(self.dtype)
        if self.config.model.path is not None:
            take_generation_config(model, self.config.model.path)
        return model

    @cached_property
    def units(self) -> Units:
        return Units(self.model, {*self.changed, *self.recorded}, path=self.config.model.blocks)

    @cached_property
    def base(self) -> ModelFolder | _InMemory:
        """The weights of the base, to be read by name."""
        if self.config.model.path is not None:
            return ModelFolder(self.config.model.path, self.model)
        return _InMemory(_loaded(self))

    def trained(self, tensor: Tensor) -> bool:
        """Whether the checkpoint has this tensor of the model."""
        return self.units.of.get(id(tensor), (REST,))[0] in self.changed

    def partly(self, tensor: Tensor) -> bool:
        """Whether the checkpoint has some of a tensor's weights alone, those that a sparse update rule trained."""
        return self.trained(tensor) and self.contents.on_base([self.units.of[id(tensor)][1]])

    def entries(self, tensor: Tensor) -> dict[str, Tensor]:
        """Those: flat `indices` in the tensor, and `weight` there."""
        entries = self.contents.entries(self.units.of[id(tensor)][1])
        return {key: entries[key] for key in ("indices", "weight")}

    def from_checkpoint(self, tensor: Tensor, base: Tensor | None = None) -> Tensor:
        """The weights of a tensor that was trained; of one that was partly, with the others of `base`."""
        weights = torch.empty(tensor.shape, dtype=self.dtype) if base is None else base.clone()
        self.contents.weights(self.units.of[id(tensor)][1], weights)
        return weights


def export_run(run: TrainedRun, folder: Path, *, shard_size: int | str) -> None:
    """Write `folder`: a Hugging Face folder, or for adapters one in PEFT's format."""
    if run.has_adapters:
        adapted = _adapted(run)
        write_adapter(adapted.model, _adapter_weights(run, adapted), folder)
        return
    check = BaseCheck(run.base_name, run.recorded, run.units)

    def read(piece: Piece) -> dict[str, Tensor]:
        whole = {name: t for name, t in piece.tensors.items() if run.trained(t) and not run.partly(t)}
        found = {name: run.from_checkpoint(t) for name, t in whole.items()}
        rest = [name for name in piece.tensors if name not in found]
        for name, weights in run.base.read(rest, run.dtype).items():
            if (known := run.units.of.get(id(piece.tensors[name]))) is not None:  # buffers have no fingerprint
                check.add(*known, weights)
            tensor = piece.tensors[name]
            found[name] = run.from_checkpoint(tensor, weights) if run.partly(tensor) else weights
        return found

    write_model(run.model, run.tokenizer, folder, read, shard_size=shard_size)


def take_generation_config(model: PreTrainedModel, base: str) -> None:
    """As `from_pretrained` does, and a model on the meta device does not."""
    with suppress(OSError):  # it has none
        model.generation_config = GenerationConfig.from_pretrained(base)


class _InMemory:
    """A base that was built from a seed, with the face of `ModelFolder`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._tensors = {name: t for piece in pieces(model) for name, t in piece.tensors.items()}

    def read(self, names: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: self._tensors[name].detach().to(dtype) for name in names}


def _chosen(store: Store, step: int | None, best: bool) -> Manifest:
    steps = store.steps()
    if not steps:
        raise CheckpointError(
            f"{store.folder.parent} has no checkpoints; give a run folder, in which checkpoints/step-*.json lie"
        )
    if best:
        found = store.read(steps[0]).state["best"]
        if not found:
            raise CheckpointError(f"no evaluation in {store.folder.parent}, so none is best; give --step")
        step = found[1]
    if step is not None and step not in steps:
        near = min(steps, key=lambda other: abs(other - step))
        raise CheckpointError(
            f"{store.folder} has no checkpoint after step {step}; nearest: {near}; there are "
            f"{', '.join(map(str, sorted(steps)))}"
        )
    return store.read(steps[0] if step is None else step)


def _configuration(manifest: Manifest, base: Path | None) -> RunConfig:
    """That of the run, on any machine."""
    try:
        config = RunConfig.model_validate(manifest.state["run"]["config"])
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"the checkpoint after step {manifest.step} does not hold the configuration of a run of this version "
            f"({error}); checkpoints of your own loop are resumed there"
        ) from error
    changes: dict[str, Any] = {"attention": "auto"}
    if base is not None:
        if config.model.path is None:
            raise ExportError(f"--base {base}: the base of this run is not a folder but model.random and a seed")
        changes["path"] = str(base)
    model = config.model.model_copy(update=changes)
    path = Path(model.path) if model.path is not None else None
    if path is not None and path.is_absolute() and not (path / "config.json").is_file():
        raise ExportError(f"the base model is not in {path} (no config.json there); say where it is with --base PATH")
    return config.model_copy(update={"model": model})


def _loaded(run: TrainedRun) -> PreTrainedModel:
    """The base with weights, whole in host memory."""
    plain = {"zero_optimization": {"stage": 0}}
    return models.load(run.config.model, run.tokenizer, seed=run.config.seed, deepspeed=plain)


def _adapted(run: TrainedRun) -> Adapted:
    """On the meta device; with weights, where adapters have some that never trained and are not in the checkpoint."""
    adapted = adapt(run.model, run.config.substrate, empty=True)
    if _whole(run, adapted):
        return adapted
    if run.config.model.quantization is not None:
        raise ExportError(
            "some weights of these adapters never train, and come again from their seed and a base in four bits, on an "
            "accelerator: finish the run, which writes them"
        )
    base = _loaded(run)
    torch.manual_seed(run.config.seed)
    return adapt(base, run.config.substrate)


def _whole(run: TrainedRun, adapted: Adapted) -> bool:
    """Whether the checkpoint has all weights of the adapters."""
    return adapted.names <= run.contents.names and not run.contents.on_base(adapted.names)


@torch.no_grad()
def _adapter_weights(run: TrainedRun, adapted: Adapted) -> dict[str, Tensor]:
    model: PeftModel = adapted.model
    if not _whole(run, adapted):
        units = Units(model, {*run.changed, *run.recorded}, path=run.config.model.blocks, adapters=True)
        check = BaseCheck(run.base_name, run.recorded, units)
        for name, parameter in model.named_parameters():
            unit, _ = units.of[id(parameter)]
            if unit not in run.changed or run.contents.on_base([name]):
                check.add(unit, name, parameter)
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in run.contents.names and name in adapted.names:
            known = not run.contents.on_base([name])
            weights[name] = torch.empty(tensor.shape, dtype=run.dtype) if known else tensor.detach().clone()
            run.contents.weights(name, weights[name])
        elif name in adapted.names:
            weights[name] = tensor.detach()
    return weights
