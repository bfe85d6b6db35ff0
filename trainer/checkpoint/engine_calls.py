"""`engine.save_checkpoint` and `engine.load_checkpoint` of an attached engine.

DeepSpeed's own write the optimizer's state as it lies, which fits the active set of that moment and no other: loaded
into another set it raises a KeyError, or on ZeRO-1 puts one block's weights into another. These keep DeepSpeed's
signatures, folders (`save_dir/tag`, and `latest` beside it) and results, and write and read Strata's format.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine

from trainer.checkpoint import CheckpointError, Checkpoints, Store, base_checksums, disk
from trainer.checkpoint.agreement import told_by_rank_0
from trainer.engine.attach import Sparse

logger = logging.getLogger(__name__)

_LATEST = "latest"


class EngineCalls:
    """The two calls for one engine. Collective."""

    def __init__(self, sparse: Sparse, engine: DeepSpeedEngine) -> None:
        self._sparse = sparse
        self._engine = engine
        self._base: dict[str, str] | None = None

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """A checkpoint in `save_dir/tag` (by default `global_stepN`), complete when this returns; what cannot train is
        the base model's, with and without `exclude_frozen_parameters`.

        `client_state` and the scheduler's state must be JSON: nothing is pickled. Raises `CheckpointError` on all
        ranks.
        """
        step = self._engine.global_steps
        tag = str(tag or f"global_step{step}")
        state = {"client_state": _json("client_state", client_state or {}), "scheduler": self._scheduler_state()}
        checkpoints = self._checkpoints(Path(save_dir) / tag)
        checkpoints.save(step, state, complete=True)

        def point_to_it() -> None:
            Store(Path(save_dir) / tag).abandon_after(step)  # the tag was another, later checkpoint's before
            if save_latest:
                disk.publish(Path(save_dir) / _LATEST, tag.encode())

        told_by_rank_0(point_to_it)
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Go on from the checkpoint in `load_dir/tag` (by default the one that `latest` names), on any number of ranks
        and under any stage; returns its folder and client state, or twice None where `latest` names nothing.

        Raises `CheckpointError` on all ranks for a checkpoint of DeepSpeed's own format, a damaged one, another base
        model, and where only a part is wanted.
        """
        if load_module_only or not load_optimizer_states or custom_load_fn is not None:
            raise CheckpointError(
                "load_checkpoint of a layer-wise engine restores weights and optimizer state together: call it without "
                "load_module_only, load_optimizer_states=False and custom_load_fn; for the weights alone, export them "
                "(python -m trainer export) and open that with from_pretrained"
            )
        found = told_by_rank_0(lambda: _find(Path(load_dir), tag))
        if found is None:
            logger.warning("no file '%s' in %s: pass a tag; nothing was loaded", _LATEST, load_dir)
            return None, None
        folder, step = found
        state = self._checkpoints(folder).resume(Store(folder), step)
        scheduler = self._engine.lr_scheduler
        if load_lr_scheduler_states and scheduler is not None and state["scheduler"] is not None:
            scheduler.load_state_dict(state["scheduler"])
        return str(folder), state["client_state"]

    def _checkpoints(self, folder: Path) -> Checkpoints:
        if self._base is None:
            self._base = base_checksums(self._sparse)
        return Checkpoints(self._sparse, folder, keep=2, asynchronous=False, base=self._base)

    def _scheduler_state(self) -> Any:
        scheduler = self._engine.lr_scheduler
        return None if scheduler is None else _json("the LR scheduler's state_dict()", scheduler.state_dict())


def _find(load_dir: Path, tag: str | None) -> tuple[Path, int] | None:
    """The folder of a tag and the step of the checkpoint in it; None where `latest` is missing."""
    if tag is None:
        try:
            tag = (load_dir / _LATEST).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
    folder = load_dir / str(tag)
    steps = Store(folder).steps()
    if not steps:
        raise CheckpointError(
            f"{folder} is no checkpoint of a layer-wise engine (it has no checkpoints/step-*.json). One that "
            "DeepSpeed wrote holds the optimizer state of one active set only: load its weights with "
            "from_pretrained before trainer.prepare, and begin anew"
        )
    return folder, steps[0]


def _json(what: str, value: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{what} cannot be saved: {error}. Allowed: what JSON knows; save tensors in a file of your own"
        ) from error
