"""Replace `engine.save_checkpoint` and `engine.load_checkpoint` of an attached engine.

DeepSpeed's own methods save optimizer state that fits the current active set and no other: loading it into another set
raises a KeyError or, on ZeRO-1, puts one block's weights into another. The replacements keep DeepSpeed's signatures,
folders (`save_dir/tag`, and `latest` beside it) and results, but write and read Strata's format.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine

from trainer.checkpoint import disk
from trainer.checkpoint.agreement import agreed, ask_rank_0
from trainer.checkpoint.checkpoints import Checkpoints, base_checksums
from trainer.checkpoint.identity import identity_of
from trainer.checkpoint.store import LATEST, CheckpointError, Store, tagged
from trainer.engine.sparse import Sparse

logger = logging.getLogger(__name__)


def install(sparse: Sparse, engine: DeepSpeedEngine) -> None:
    """Replace the engine's two methods by those for `sparse`."""
    calls = EngineCalls(sparse, engine)
    engine.save_checkpoint = calls.save_checkpoint
    engine.load_checkpoint = calls.load_checkpoint


class EngineCalls:
    """The two methods for one engine. Collective."""

    def __init__(self, sparse: Sparse, engine: DeepSpeedEngine) -> None:
        self._sparse = sparse
        self._engine = engine
        # Recorded now, because a loop may change its model's configuration while it trains.
        self._identity = identity_of(sparse.model, blocks=sparse.structure.path)
        self._base: dict[str, str] | None = None

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write a checkpoint into `save_dir/tag` (by default `global_stepN`); it is complete when this returns.

        With and without `exclude_frozen_parameters`, what cannot train is left to the base model.
        `client_state` and the scheduler's state must be JSON: nothing is pickled. Raises `CheckpointError` on all
        ranks.
        """
        step = self._engine.global_steps
        tag = str(tag or f"global_step{step}")
        state = agreed(
            lambda: {"client_state": _json("client_state", client_state or {}), "scheduler": self._scheduler_state()}
        )
        checkpoints = self._checkpoints(Path(save_dir) / tag)
        checkpoints.save(step, state, complete=True)

        def update_latest() -> None:
            Store(Path(save_dir) / tag).abandon_after(step)  # the tag may have named a later checkpoint before
            if save_latest:
                disk.publish(Path(save_dir) / LATEST, tag.encode())

        ask_rank_0(update_latest)
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
        """Resume from the checkpoint in `load_dir/tag` (by default the one that `latest` names), on any number of ranks
        and under any stage. Returns its folder and client state, or (None, None) if there is no `latest`.

        Raises `CheckpointError` on all ranks for a checkpoint of DeepSpeed's own format, a damaged one or another base
        model, and if only a part is requested.
        """
        if load_module_only or not load_optimizer_states or custom_load_fn is not None:
            raise CheckpointError(
                "load_checkpoint of a layer-wise engine restores weights and optimizer state together: call it without "
                "load_module_only, load_optimizer_states=False and custom_load_fn; for the weights alone, export them "
                "(python -m trainer export) and open that with from_pretrained"
            )
        found = ask_rank_0(lambda: _find(Path(load_dir), tag))
        if found is None:
            logger.warning("no file '%s' in %s: pass a tag; nothing was loaded", LATEST, load_dir)
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
        return Checkpoints(self._sparse, folder, keep=2, asynchronous=False, base=self._base, identity=self._identity)

    def _scheduler_state(self) -> Any:
        scheduler = self._engine.lr_scheduler
        return None if scheduler is None else _json("the LR scheduler's state_dict()", scheduler.state_dict())


def _find(load_dir: Path, tag: str | None) -> tuple[Path, int] | None:
    """Return the folder of a tag and the step of its newest checkpoint, or None if `latest` is missing."""
    if tag is None and not (load_dir / LATEST).exists():
        return None
    folder = tagged(load_dir) if tag is None else load_dir / str(tag)
    steps = Store(folder).steps()
    if not steps:
        raise CheckpointError(
            f"{folder} is not a checkpoint of a layer-wise engine (it has no checkpoints/step-*.json). A checkpoint "
            "that DeepSpeed wrote contains the optimizer state of one active set only: load its weights with "
            "from_pretrained before trainer.prepare, and start anew"
        )
    return folder, steps[0]


def _json(what: str, value: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{what} cannot be saved: {error}. Allowed: JSON values; save tensors in a file of your own"
        ) from error
