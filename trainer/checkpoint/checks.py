"""Check a checkpoint's files, model, trained parameters and base model before it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from deepspeed import comm as dist
from safetensors import SafetensorError

from trainer.checkpoint.agreement import agreed
from trainer.checkpoint.contents import (
    RANDOM,
    Contents,
    parameters_by_unit,
)
from trainer.checkpoint.fingerprint import fingerprints
from trainer.checkpoint.identity import Identity, differences, new_versions
from trainer.checkpoint.store import CheckpointError, Manifest, Store
from trainer.engine.sparse import Sparse
from trainer.model.blocks import full_numel

logger = logging.getLogger(__name__)

# Logged once, for checkpoints and deltas of versions that did not write these records.
NOT_RECORDED = (
    "%s does not record which config.json, buffers, code and tokenizer it belongs to (an earlier version of Strata "
    "wrote it), so they cannot be compared"
)


@contextmanager
def as_checkpoint_errors(manifest: Manifest) -> Iterator[None]:
    """Turn errors of loading a state into `CheckpointError`: the checksum matches, but another program may have written
    values that do not fit."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint after step {manifest.step} contains a state that does not fit this run: "
            f"{type(error).__name__}: {error}"
        ) from error


def verify(source: Store, manifest: Manifest) -> None:
    """Compare sizes and checksums of all files, each by one of the ranks. Raises `CheckpointError` on all ranks."""
    rank, ranks, step = dist.get_rank(), dist.get_world_size(), manifest.step
    everyone: list[list[tuple[str, str]]] = [[] for _ in range(ranks)]
    mine = manifest.files[rank::ranks]
    damaged_here = agreed(lambda: [(f.name, p) for f in mine if (p := source.problem(f))])
    torch.distributed.all_gather_object(everyone, damaged_here)
    problems = [problem for of_rank in everyone for problem in of_rank]
    if problems:
        damaged = {name for name, _ in problems}
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"the checkpoint after step {step} is damaged: {problems[0][1]}{more}{_offer(source, step, damaged)}"
        )


def compare_identity(manifest: Manifest, identity: Identity) -> None:
    """Raise `CheckpointError` on all ranks if the model or tokenizer differs on any of them."""
    recorded = manifest.state.get("identity")
    if recorded is None:
        if dist.get_rank() == 0:
            logger.warning(NOT_RECORDED, f"the checkpoint after step {manifest.step}")
        return
    before = Identity.model_validate(recorded)
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    torch.distributed.all_gather_object(everyone, differences(before, identity))
    for rank, found in enumerate(everyone):
        if found:
            raise CheckpointError(
                f"{f'rank {rank}: ' if rank else ''}this is not the model that the run began with: "
                f"{'; '.join(found)}. Undo the change, or start anew with resume=never"
            )
    if (warning := new_versions(before, identity)) and dist.get_rank() == 0:
        logger.warning("%s", warning)


def check_shapes(sparse: Sparse, manifest: Manifest, contents: Contents) -> None:
    """Raise `CheckpointError` unless model, update rule, number of active blocks and optimizer are the checkpoint's."""
    if RANDOM not in manifest.units or any(manifest.state.get(key) is None for key in ("base", "sparse", "run")):
        raise CheckpointError(
            f"the checkpoint after step {manifest.step} has no training state to resume from: it was changed"
        )
    rule, ours = manifest.state["sparse"]["rule"], type(sparse.update).__name__
    if rule != ours:
        raise CheckpointError(
            f"the checkpoint after step {manifest.step} was trained with update rule {rule}, but this run has {ours}: "
            "use the same update rule"
        )
    slots = manifest.state["sparse"]["slots"]
    if len(slots) != len(sparse.active):
        raise CheckpointError(
            f"the checkpoint after step {manifest.step} has {len(slots)} active blocks, but the selector here "
            f"chooses {len(sparse.active)}: use the same selector"
        )
    blocks, times = len(sparse.blocks), manifest.state["sparse"]["times_active"]
    if len(times) != blocks or len(set(slots)) != len(slots) or any(index >= blocks for index in slots):
        raise CheckpointError(
            f"the checkpoint after step {manifest.step} has {len(times)} blocks, of which {slots} were active, "
            f"but there are {blocks} here: this is a different model"
        )
    units = parameters_by_unit(sparse)
    unknown = manifest.units.keys() - units.keys() - {RANDOM}
    if unknown:
        raise CheckpointError(
            f"the checkpoint after step {manifest.step} contains {', '.join(sorted(unknown))}, not trained here: use "
            "the same always_on and method"
        )
    for unit in manifest.units.keys() & units.keys():
        for name, parameter in units[unit].items():
            if misfit := contents.misfit(name, full_numel(parameter)):
                raise CheckpointError(misfit)
            moments, kept = contents.moments(name), sparse.state_names
            if moments and moments != kept:  # there are none before the first step
                raise CheckpointError(
                    f"the checkpoint after step {manifest.step} has optimizer state {', '.join(sorted(moments))} "
                    f"of {name}, but the optimizer here keeps {', '.join(sorted(kept)) or 'none'}: use the same "
                    "optimizer"
                )
        foreign = contents.names_in(unit) - units[unit].keys()
        if foreign:
            raise CheckpointError(
                f"the checkpoint after step {manifest.step} contains {min(foreign)} in {unit}, which this model does "
                "not have: use the same model and substrate"
            )


def compare_base(sparse: Sparse, base: Mapping[str, str], manifest: Manifest, contents: Contents) -> None:
    """Raise `CheckpointError` if units that the checkpoint leaves to the base model have changed.

    `base` contains the checksums of this engine's base model, by unit. Collective.
    """
    before = manifest.state["base"]
    units = parameters_by_unit(sparse)
    if sparse.steps:  # an engine that has trained may have changed them
        missing = {unit: parameters for unit, parameters in units.items() if unit not in manifest.units}
        now = fingerprints(sparse, missing)
        later = [unit for unit in missing if before.get(unit) != now[unit]]
        if later:
            raise CheckpointError(
                f"{', '.join(later)} trained after the checkpoint of step {manifest.step}, which leaves them to "
                "the base model: load it into an engine that has not trained yet, or save with complete=True"
            )
    partly = {unit for unit in manifest.units if unit in units and contents.on_base(units[unit])}
    # An engine that has trained may have changed other weights there, whatever its base model was.
    trained = sorted(partly if sparse.steps else partly - base.keys())
    if trained:
        raise CheckpointError(
            f"the checkpoint after step {manifest.step} contains only the unmasked weights of {', '.join(trained)}, "
            "and this engine has trained others there: load it into an engine of the base model"
        )
    left = [unit for unit in base if unit not in manifest.units or unit in partly]
    changed = [unit for unit in left if before.get(unit) != base[unit]]
    if changed:
        raise CheckpointError(
            f"the base model is not the one that this run began with: {', '.join(changed)} "
            f"{'differs' if len(changed) == 1 else 'differ'}. The checkpoint does not contain what never trained. Use "
            "the same model.path (or model.random and seed)"
        )


def readable(source: Store, step: int) -> Manifest:
    """Return the manifest of a step. The `CheckpointError` for a damaged one names an older one, if there is one."""
    try:
        return source.read(step)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_offer(source, step, set())}") from error


def _offer(source: Store, step: int, damaged: set[str]) -> str:
    older = source.offered_before(step, damaged)
    return "" if older is None else f"; there is an older one: resume={source.folder}/step-{older:08d}.json"
