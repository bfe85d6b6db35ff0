"""Write the model of a run at one of its checkpoints: trained weights from there, the rest from the base model.

This needs no process group and no accelerator, and memory for a shard and a block of the model. A run folder may come
from somebody else: no code from it or its base is run, and nothing is fetched, unless the caller allows it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.checkpoint.checks import NOT_RECORDED
from trainer.checkpoint.contents import RANDOM, REST, Contents
from trainer.checkpoint.fingerprint import Fingerprint
from trainer.checkpoint.identity import TOKEN_IDS, Identity
from trainer.checkpoint.store import CheckpointError, Manifest, Store, open_store
from trainer.config import ModelConfig, RunConfig
from trainer.config.schema import AdapterSubstrate, FullSubstrate
from trainer.data.errors import DataError
from trainer.data.tokenizer import BYTES, add_tokens, load_tokenizer, new_ids, reads_like_a_path
from trainer.export.base import (
    BaseCheck,
    InMemory,
    Permissions,
    Units,
    refuse_another,
    refuse_code,
    take_generation_config,
)
from trainer.export.from_engine import write_adapter
from trainer.export.shards import ExportError, write_model
from trainer.model import load as models
from trainer.model.adapters import Adapted, adapt
from trainer.model.blocks import Piece
from trainer.model.growth import GrownFolder
from trainer.model.new_rows import split

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Origin:
    """The settings that a run was built from."""

    model: ModelConfig
    substrate: AdapterSubstrate | FullSubstrate
    seed: int
    tokenizer: str
    new_rows: tuple[Literal["embeddings", "head"], ...]  # the parts of which the rows of new tokens alone trained
    trusted: bool  # whether the run allowed code of its model


class TrainedRun:
    """A checkpoint of a run folder, with all its files verified, and its base model.

    `folder` may also be what `engine.save_checkpoint` of a custom training loop wrote, a tag in it, or a `checkpoint-N`
    of `transformers.Trainer`; these require `permissions.base`. Uses the newest checkpoint, or that after `step`, or
    with `best` the one with the lowest evaluation loss. Raises `CheckpointError` or `ExportError`.
    """

    def __init__(
        self, folder: Path, *, step: int | None = None, best: bool = False, permissions: Permissions | None = None
    ) -> None:
        permissions = permissions or Permissions()
        self._store = open_store(folder)
        self.manifest = _chosen(self._store, step, best)
        recorded = self.manifest.state.get("identity")
        self.identity = None if recorded is None else Identity.model_validate(recorded)
        self.own_loop = "config" not in self.manifest.state.get("run", {})
        self.origin = _origin(self.manifest, self.identity, permissions, folder if self.own_loop else None)
        if self.identity is None:
            logger.warning(NOT_RECORDED, f"the checkpoint after step {self.manifest.step}")
        else:
            refuse_code(self.identity, permissions, f"the run in {folder}")
        self.tokenizer = _tokenizer(self.origin)
        self.changed = {unit: files for unit, files in self.manifest.units.items() if unit != RANDOM}
        for file in (file for files in self.changed.values() for file in files):
            if problem := self._store.problem(file):
                raise CheckpointError(f"the checkpoint after step {self.manifest.step} is damaged: {problem}")
        self.contents = Contents(self._store, self.changed)
        self.contents.learn(self.changed)

    @property
    def dtype(self) -> torch.dtype:
        return models.DTYPES[self.origin.model.dtype]

    @property
    def base_name(self) -> str:
        return self.origin.model.path or "model.random"

    @property
    def recorded(self) -> dict[str, str]:
        """Return the recorded fingerprints of the base, by unit."""
        return self.manifest.state.get("base", {})

    @property
    def has_adapters(self) -> bool:
        return isinstance(self.origin.substrate, AdapterSubstrate)

    @cached_property
    def model(self) -> PreTrainedModel:
        """Build the model on the meta device, in the dtype of training. Raises `ExportError` if it differs from the one
        that the run began with."""
        model = models.on_meta(self.origin.model, self.tokenizer).to(self.dtype)
        if self.origin.model.path is not None:
            take_generation_config(model, self.origin.model.path)
        if self.identity is not None and self.own_loop:
            _take_token_ids(model, self.identity)
        unknown = self.identity is None and self.origin.trusted and not self.origin.model.trust_remote_code
        if unknown and "AutoModelForCausalLM" in (getattr(model.config, "auto_map", None) or {}):
            raise ExportError(
                f"the base model in {self.base_name} has code of its own, with which this run may have trained: look "
                "at that code, and allow it with --trust-remote-code"
            )
        refuse_another(self.identity, model, self.tokenizer, self.base_name, adapters=False)
        split(model, new_ids(self.tokenizer), self.origin.new_rows)
        return model

    @cached_property
    def units(self) -> Units:
        units = Units(self.model, {*self.changed, *self.recorded}, path=self.origin.model.blocks)
        numel = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        for unit in self.changed:
            self._check({name: numel[name] for name in units.names(unit)}, self.contents.names_in(unit), unit)
        return units

    def check_adapters(self, adapted: Adapted) -> None:
        """Raise `CheckpointError` if the checkpoint does not fit these adapters."""
        numel = {name: tensor.numel() for name, tensor in adapted.model.state_dict(keep_vars=True).items()}
        known = {name: numel[name] for name in self.contents.names & numel.keys()}
        self._check(known, set(self.contents.names), "it")
        refuse_another(self.identity, adapted.model, self.tokenizer, self.base_name, adapters=True)

    def _check(self, numel: Mapping[str, int], found: set[str], where: str) -> None:
        """Raise `CheckpointError` unless the parameters `found` are exactly those of `numel`, in these sizes."""
        if foreign := sorted(found ^ numel.keys()):
            raise CheckpointError(
                f"the checkpoint after step {self.manifest.step} does not fit the model: {foreign[0]} is in only one "
                f"of them ({where})"
            )
        for name in numel:
            if misfit := self.contents.misfit(name, numel[name]):
                raise CheckpointError(f"the checkpoint after step {self.manifest.step} is damaged: {misfit}")

    @cached_property
    def base(self) -> GrownFolder | InMemory:
        """Return the weights of the base, which can be read by name."""
        if self.origin.model.path is not None:
            return GrownFolder(self.origin.model.path, self.model, new_ids(self.tokenizer))
        return InMemory(_loaded(self))

    def trained(self, tensor: Tensor) -> bool:
        """Return whether the checkpoint has this tensor of the model."""
        return self.units.of.get(id(tensor), (REST,))[0] in self.changed

    def partly(self, tensor: Tensor) -> bool:
        """Return whether the checkpoint has only those of a tensor's weights that a sparse update rule trained."""
        return self.trained(tensor) and self.contents.on_base([self.units.of[id(tensor)][1]])

    def entries(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return these weights: flat `indices` in the tensor, and `weight` there."""
        entries = self.contents.entries(self.units.of[id(tensor)][1])
        return {key: entries[key] for key in ("indices", "weight")}

    def from_checkpoint(self, tensor: Tensor, base: Tensor | None = None) -> Tensor:
        """Return the weights of a trained tensor; if only some of them trained, the others are those of `base`."""
        weights = torch.empty(tensor.shape, dtype=self.dtype) if base is None else base.clone()
        self.contents.weights(self.units.of[id(tensor)][1], weights)
        return weights


def export_run(run: TrainedRun, folder: Path, *, shard_size: int | str) -> list[str]:
    """Write `folder`: a Hugging Face folder or, for adapters, one in PEFT's format. Returns what `write_model` does."""
    substrate = run.origin.substrate
    if isinstance(substrate, AdapterSubstrate):
        adapted = _adapted(run, substrate)
        run.check_adapters(adapted)
        write_adapter(adapted.model, _adapter_weights(run, adapted), folder, tokenizer=run.tokenizer, replace=False)
        return []
    check = BaseCheck(run.base_name, run.recorded, run.units, run.identity)

    def read(piece: Piece) -> dict[str, Tensor]:
        whole = {name: t for name, t in piece.tensors.items() if run.trained(t) and not run.partly(t)}
        tensors = {name: run.from_checkpoint(t) for name, t in whole.items()}
        rest = [name for name in piece.tensors if name not in tensors]
        for name, weights in run.base.read(rest, run.dtype).items():
            if (known := run.units.of.get(id(piece.tensors[name]))) is not None:
                check.add(*known, weights)
            else:
                check.add_buffer(name, weights, run.dtype)
            tensor = piece.tensors[name]
            tensors[name] = run.from_checkpoint(tensor, weights) if run.partly(tensor) else weights
        return tensors

    return write_model(run.model, run.tokenizer, folder, read, shard_size=shard_size, replace=False)


def _chosen(store: Store, step: int | None, best: bool) -> Manifest:
    steps = store.steps()
    if not steps:
        raise CheckpointError(
            f"{store.folder.parent} has no checkpoints; give a run folder (it contains checkpoints/step-*.json), or a "
            "folder of engine.save_checkpoint or transformers.Trainer (checkpoint-N; it has them in a subfolder)"
        )
    if best:
        best_loss_and_step = store.read(steps[0]).state.get("best")
        if not best_loss_and_step:
            raise CheckpointError(f"no evaluation in {store.folder.parent}, so none is best; give --step")
        step = best_loss_and_step[1]
    if step is not None and step not in steps:
        near = min(steps, key=lambda other: abs(other - step))
        raise CheckpointError(
            f"{store.folder} has no checkpoint after step {step}; nearest: {near}; there are "
            f"{', '.join(map(str, sorted(steps)))}"
        )
    return store.read(steps[0] if step is None else step)


def _take_token_ids(model: PreTrainedModel, identity: Identity) -> None:
    """Set the recorded token IDs: loops such as `transformers.Trainer` take them from the tokenizer, in memory."""
    for config, recorded in ((model.config, identity.config), (model.generation_config, identity.generation)):
        for name in TOKEN_IDS:
            if config is not None and name in recorded:
                setattr(config, name, recorded[name])


_OWN_DTYPES: dict[str, Literal["bf16", "fp16", "fp32"]] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _origin(manifest: Manifest, identity: Identity | None, allowed: Permissions, own_folder: Path | None) -> _Origin:
    """Return what the run of a checkpoint was built from, on any machine. `own_folder` is that of a custom loop."""
    changes = {"attention": "auto", "trust_remote_code": allowed.trust_remote_code}
    if own_folder is None:
        try:
            config = RunConfig.model_validate(manifest.state["run"]["config"])
        except (TypeError, AttributeError, ValueError) as error:  # pydantic's ValidationError is one
            raise CheckpointError(
                f"the checkpoint after step {manifest.step} contains no configuration that this version reads ({error})"
            ) from error
        if allowed.base is not None and config.model.path is None:
            raise ExportError(
                f"--base {allowed.base}: the base of this run is not a folder but model.random and a seed"
            )
        given, substrate, seed, new_rows = config.model, config.substrate, config.seed, config.always_on.new_rows
    else:
        given, substrate, seed = _of_own_loop(manifest, identity, allowed, own_folder), FullSubstrate(), 0
        new_rows = ()
    path = _located(given.path, allowed.base) if given.path is not None else None
    wanted = given.tokenizer
    if allowed.tokenizer is not None:
        tokenizer = allowed.tokenizer
    elif wanted is None or wanted == given.path:
        tokenizer = path or BYTES
    elif wanted == BYTES or Path(wanted).expanduser().is_dir():
        tokenizer = wanted
    else:
        raise ExportError(
            f"the tokenizer of this run is {wanted!r}, which is not a folder here: name its folder with "
            "--tokenizer PATH, or fetch it from the Hub with --tokenizer NAME"
        )
    model = given.model_copy(update={**changes, "path": path})
    return _Origin(model, substrate, seed, tokenizer, new_rows, trusted=given.trust_remote_code)


def _of_own_loop(manifest: Manifest, identity: Identity | None, allowed: Permissions, folder: Path) -> ModelConfig:
    what = f"the checkpoint after step {manifest.step} in {folder} was saved by a custom training loop"
    if identity is None:
        raise CheckpointError(
            f"{what}, and an earlier version of Strata did not record its model: in that loop, load it "
            "(engine.load_checkpoint) and save it again, or save the model (save_pretrained)"
        )
    if identity.adapters:
        raise ExportError(f"{what}, with adapters: save them in that loop (PEFT's save_pretrained)")
    if identity.dtype not in _OWN_DTYPES:
        raise ExportError(f"{what}, with weights in {identity.dtype}; allowed: {', '.join(_OWN_DTYPES)}")
    if allowed.base is None:
        raise ExportError(f"{what}, and does not record the base model that it began with: name it with --base PATH")
    has_tokenizer = (folder / "tokenizer_config.json").is_file()  # as `transformers.Trainer` leaves it there
    return ModelConfig(
        path=allowed.base,
        tokenizer=str(folder) if has_tokenizer else None,
        dtype=_OWN_DTYPES[identity.dtype],
        blocks=identity.blocks,
    )


def _located(recorded: str, given: str | None) -> str:
    """Return the path or Hub name of the base: `given`, or else what the run recorded, if that is here."""
    path = Path(given or recorded).expanduser()
    if given is not None and not reads_like_a_path(given):
        return given  # a name on the Hub, which the caller asked for
    if (path / "config.json").is_file():
        return str(path.absolute()) if given is not None else recorded
    if given is None and not path.is_absolute():
        raise ExportError(
            f"the base of this run is {recorded!r}, which is not a model folder here: name its folder with "
            "--base PATH, or fetch it from the Hub with --base NAME"
        )
    raise ExportError(f"the base model is not in {path} (no config.json there); name its folder with --base PATH")


def _tokenizer(origin: _Origin) -> PreTrainedTokenizerBase:
    try:
        tokenizer = load_tokenizer(origin.tokenizer, trust_remote_code=origin.model.trust_remote_code)
        add_tokens(tokenizer, origin.model.add_tokens)
        return tokenizer
    except DataError as error:
        raise ExportError(f"{error}; name the folder of the run's tokenizer with --tokenizer PATH") from error


def _loaded(run: TrainedRun) -> PreTrainedModel:
    """Return the base with its weights, whole in host memory. Random ones are those of the run's ZeRO stage."""
    plain = {"zero_optimization": {"stage": 0}}

    def load(**options: Any) -> PreTrainedModel:
        model = models.load(run.origin.model, run.tokenizer, seed=run.origin.seed, deepspeed=plain, **options)
        split(model, new_ids(run.tokenizer), run.origin.new_rows)
        return model

    model = load()
    if run.origin.model.path is None and not _as_recorded(run, model):
        partitioned = load(as_partitioned=True)
        model = partitioned if _as_recorded(run, partitioned) else model
    return model


def _as_recorded(run: TrainedRun, model: PreTrainedModel) -> bool:
    """Return whether the first recorded unit has the weights that the run began with."""
    unit = next(iter(run.recorded), None)
    found, units = Fingerprint(), Units(model, set(run.recorded), path=run.origin.model.blocks)
    for name, parameter in model.named_parameters():
        if units.of[id(parameter)][0] == unit:
            found.add(name, parameter)
    return unit is None or str(found) == run.recorded[unit]


def _adapted(run: TrainedRun, substrate: AdapterSubstrate) -> Adapted:
    """Return the adapters on the meta device, or with weights if some never trained and are not in the checkpoint."""
    adapted = adapt(run.model, substrate, empty=True)
    if _whole(run, adapted):
        return adapted
    if run.origin.model.quantization is not None:
        raise ExportError(
            "some weights of these adapters never train and can only be made again from their seed and a base in four "
            "bits, on an accelerator: finish the run, which writes them"
        )
    base = _loaded(run)
    torch.manual_seed(run.origin.seed)
    return adapt(base, substrate)


def _whole(run: TrainedRun, adapted: Adapted) -> bool:
    """Return whether the checkpoint has all weights of the adapters."""
    return adapted.names <= run.contents.names and not run.contents.on_base(adapted.names)


@torch.no_grad()
def _adapter_weights(run: TrainedRun, adapted: Adapted) -> dict[str, Tensor]:
    model: PeftModel = adapted.model
    if not _whole(run, adapted):
        units = Units(model, {*run.changed, *run.recorded}, path=run.origin.model.blocks, adapters=True)
        check = BaseCheck(run.base_name, run.recorded, units, run.identity)
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
