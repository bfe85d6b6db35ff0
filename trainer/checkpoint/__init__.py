"""Checkpoints: what changed since the last one, written beside training, and found again on any number of ranks.

`store` writes and verifies files, `contents` takes tensors out of an engine and puts them back, `fingerprint` knows the
base again. This module decides what a save holds, and when it is done.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from trainer.checkpoint.contents import Contents, Share, parameters_by_unit, put_weights_back, take, unit_of_block
from trainer.checkpoint.fingerprint import fingerprints
from trainer.checkpoint.store import CheckpointError, File, Manifest, Store
from trainer.engine.attach import Sparse

logger = logging.getLogger(__name__)

__all__ = ["CheckpointError", "Checkpoints", "Store"]

# The unit of each rank's random number generators.
_RANDOM = "random"
_POLL_SECONDS = 0.02


class Checkpoints:
    """Saves an attached engine into a run folder, and resumes one from there.

    All ranks call every method together. With `asynchronous` a save stops training for a copy of what changed into host
    memory only; files are written in a thread, without collectives: ranks tell rank 0 through the folder, which they
    share, and rank 0 publishes.
    """

    def __init__(
        self,
        sparse: Sparse,
        folder: Path,
        *,
        keep: int,
        asynchronous: bool,
        patience_seconds: float = 1800.0,
    ) -> None:
        self._sparse = sparse
        self._store = Store(folder)
        self._keep = keep
        self._asynchronous = asynchronous
        self._patience = patience_seconds
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        # The newest checkpoint of this run: a save writes what differs from it.
        self._baseline: Manifest | None = None
        self._last: int | None = None  # step of the last save
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._pending: Manifest | None = None
        self._best: tuple[float, int] | None = None  # evaluation loss, step
        # Checksums of what was never trained, by unit; None before the first save.
        self._base: dict[str, str] | None = None
        # In the names of files: an earlier attempt may have left some of the same step, or whole checkpoints of it.
        attempt = [secrets.token_hex(4)]
        torch.distributed.broadcast_object_list(attempt)
        self._attempt = attempt[0]

    def _fingerprints(self, trained: Collection[str]) -> dict[str, str]:
        """Of the units that are still the base's; what never trains is a unit of its own."""
        units = parameters_by_unit(self._sparse)
        known = {id(parameter) for unit in units.values() for parameter in unit.values()}
        rest = {name: p for name, p in self._sparse.model.named_parameters() if id(p) not in known}
        base = {unit: parameters for unit, parameters in units.items() if unit not in trained}
        return fingerprints(self._sparse, {**base, "rest": rest})

    @property
    def last_step(self) -> int | None:
        """Of the newest checkpoint that is whole, as far as `finish` knows."""
        return self._baseline.step if self._baseline else None

    # --- saving ------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin a checkpoint after `step` steps, with `state` (JSON) for whoever resumes. An earlier one is finished
        first. Raises `CheckpointError` on all ranks where a file of the earlier one could not be written."""
        if step == self._last:
            return
        self.finish()
        self._last = step
        changed = self._changed()
        if self._base is None:
            self._base = self._fingerprints(changed)
        shares = take(self._sparse, changed)
        shares[_RANDOM] = Share(_random_state(), {}, {})
        full = {"base": self._base, "ranks": self._ranks, "sparse": self._sparse.state_dict(), "run": dict(state)}
        full["best"] = self._best
        kept = {} if self._baseline is None else self._baseline.units
        units = {unit: list(files) for unit, files in kept.items() if unit not in shares}
        self._pending = Manifest(step, units, full)
        self._thread = threading.Thread(target=self._write, args=(self._pending, shares), name="checkpoint")
        self._thread.start()
        if not self._asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait until what was begun is written; raises `CheckpointError` on all ranks where it could not be."""
        if self._thread is None or self._pending is None:
            return
        self._thread.join()
        manifest, self._thread, self._pending = self._pending, None, None
        failures: list[str | None] = [None] * self._ranks
        mine = None if self._failure is None else f"rank {self._rank}: {self._failure}"
        torch.distributed.all_gather_object(failures, mine)
        self._failure = None
        told = next((failure for failure in failures if failure), None)
        if told:
            left = f"the one after step {self._baseline.step} is whole" if self._baseline else "there is no earlier one"
            raise CheckpointError(f"the checkpoint after step {manifest.step} was not written: {told}; {left}")
        self._baseline = self._store.read(manifest.step)

    def is_best(self, step: int, loss: float) -> bool:
        """Whether no evaluation before had less loss; then the next save, of `step`, is kept however old it gets."""
        if not math.isfinite(loss) or (self._best is not None and loss >= self._best[0]):
            return False
        self._best = (loss, step)
        return True

    def _changed(self) -> list[str]:
        """Units that trained since the newest checkpoint, or train now; other blocks are as they were there."""
        now = self._sparse.times_active
        before = self._baseline.state["sparse"]["times_active"] if self._baseline else [0] * len(now)
        # Those that train now have state of this interval, also where all of its steps were skipped so far.
        changed = {i for i, (old, new) in enumerate(zip(before, now, strict=True)) if old != new}
        blocks = [unit_of_block(i) for i in sorted(changed | set(self._sparse.active))]
        return blocks + list(self._sparse.always_on)

    def _write(self, manifest: Manifest, shares: Mapping[str, Share]) -> None:
        """In the thread of every rank."""
        step = manifest.step
        try:
            written = {
                unit: self._store.write(step, f"{unit}-{self._mark(self._rank)}", share.tensors, share.metadata())
                for unit, share in shares.items()
            }
            self._store.announce(step, self._mark(self._rank), {unit: vars(file) for unit, file in written.items()})
            if self._rank == 0:
                self._publish(manifest)
            else:
                self._wait_for(step, lambda: self._published(step))
        except BaseException as error:  # told to the main thread, and to the ranks that wait for this one
            self._failure = error
            with suppress(OSError):
                self._store.announce(step, f"{self._attempt}-failed", f"rank {self._rank}: {error}")

    def _publish(self, manifest: Manifest) -> None:
        step = manifest.step
        for rank in range(self._ranks):
            files = self._wait_for(step, partial(self._store.announced, step, self._mark(rank)))
            for unit, file in files.items():
                manifest.units.setdefault(unit, []).append(File(**file))
        self._store.publish(manifest)
        best = manifest.state["best"]
        try:
            self._store.prune(self._keep, also=[best[1]] if best else [])
        except OSError as error:  # the checkpoint is whole all the same
            logger.warning("old checkpoints in %s could not be removed: %s", self._store.folder, error)

    def _mark(self, rank: int) -> str:
        return f"{self._attempt}-r{rank:05d}"

    def _published(self, step: int) -> bool:
        """The manifest is that of this save."""
        if step not in self._store.steps():
            return False
        return any(self._attempt in file.name for file in self._store.read(step).files)

    def _wait_for(self, step: int, look: Callable[[], Any]) -> Any:
        end = time.monotonic() + self._patience
        while True:
            found = look()
            if found:
                return found
            failed = self._store.announced(step, f"{self._attempt}-failed")
            if failed:
                raise RuntimeError(failed)
            if time.monotonic() > end:
                raise TimeoutError(f"other ranks had not written their files after {self._patience:.0f} s")
            time.sleep(_POLL_SECONDS)

    # --- resuming ----------------------------------------------------------------------------------------------

    def resume(self, source: Store, step: int) -> dict[str, Any]:
        """Put the checkpoint of `step` in `source` back into the engine; returns the `state` that was saved with it.

        Nothing is loaded before sizes and checksums of all its files were compared, each by one of the ranks. Raises
        `CheckpointError` on all ranks.
        """
        manifest = source.read(step)
        self._verify(source, manifest, step)
        self._last = step
        base = manifest.state["base"]
        self._compare_base(base, self._fingerprints(manifest.units))
        contents = Contents(source, manifest.units)
        contents.learn(unit for unit in manifest.units if unit != _RANDOM)
        put_weights_back(self._sparse, contents)
        self._sparse.load_state_dict(manifest.state["sparse"], contents)
        self._base = base
        if source.folder.resolve() == self._store.folder.resolve():
            self._best = tuple(manifest.state["best"]) if manifest.state["best"] else None
            if self._rank == 0:
                source.abandon_after(step)
            dist.barrier()
            self._baseline = manifest
        files = manifest.units[_RANDOM]
        if len(files) == self._ranks:
            with source.open(files[self._rank]) as opened:
                _restore_random_state({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
        else:  # not what it would have been, but not the start's again either
            torch.manual_seed(torch.initial_seed() + step * self._ranks)
        return dict(manifest.state["run"])

    def _verify(self, source: Store, manifest: Manifest, step: int) -> None:
        problems: list[list[str]] = [[] for _ in range(self._ranks)]
        mine = manifest.files[self._rank :: self._ranks]
        torch.distributed.all_gather_object(problems, [p for p in map(source.problem, mine) if p])
        found = [problem for rank in problems for problem in rank]
        if found:
            older = [other for other in source.steps() if other < step]
            raise CheckpointError(
                f"the checkpoint after step {step} is damaged: {found[0]}"
                + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
                + (f"; there is an older one: resume={source.folder}/step-{older[0]:08d}.json" if older else "")
            )

    def _compare_base(self, base: Mapping[str, str], now: Mapping[str, str]) -> None:
        """What the checkpoint leaves to the base must be what it was."""
        changed = [unit for unit in now if base.get(unit) != now[unit]]
        if changed:
            raise CheckpointError(
                f"the base model is another one than when this run began: {', '.join(changed)} "
                f"{'differs' if len(changed) == 1 else 'differ'}, which were never trained and are not in the "
                "checkpoint. Give the same model.path (or model.random and seed)"
            )


def _random_state() -> dict[str, Tensor]:
    """Of this process's generators."""
    kind, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([kind, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        state["accelerator"] = accelerator.get_rng_state()
    return state


def _restore_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    kind, *internal = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((kind, tuple(internal), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(state["numpy_gauss"][0]))
    )
    if "accelerator" in state:
        get_accelerator().set_rng_state(state["accelerator"])
