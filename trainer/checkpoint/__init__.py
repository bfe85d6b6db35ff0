"""Checkpoints: what changed since the last one, written beside training, and found again on any number of ranks.

`store` writes and verifies files, `contents` takes tensors out of an engine and puts them back, `fingerprint` knows the
base again. This module decides what a save holds, and when it is done.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

from trainer.blocks import full_numel
from trainer.checkpoint.agreement import told_by_rank_0
from trainer.checkpoint.contents import (
    RANDOM,
    REST,
    Contents,
    Share,
    parameters_by_unit,
    put_on_host,
    put_weights_back,
    take,
    unit_of_block,
)
from trainer.checkpoint.fingerprint import fingerprints
from trainer.checkpoint.lease import Lease, LeaseError
from trainer.checkpoint.random_state import random_state, restore_random_state
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.store import CheckpointError, File, Manifest, Store
from trainer.engine.attach import Sparse

logger = logging.getLogger(__name__)

__all__ = ["CheckpointError", "Checkpoints", "LeaseError", "Store"]

# Between looks into the folder: at first, and at most.
_POLL_SECONDS = 0.02, 0.5


class Checkpoints:
    """Saves an attached engine into a run folder, and resumes one from there.

    All ranks call every method together. With `asynchronous` a thread copies what changed into host memory, which must
    be done before the next optimizer step, and writes files from there, without collectives: ranks tell rank 0 through
    the folder, which they share, and rank 0 publishes, as long as the run folder is its own (`lease`, on rank 0; None
    for a loop that lets nobody else write there).

    A loop that writes to weights or optimizer state itself, for an average of weights for instance, calls
    `sparse.change()` before it does.

    Make it before the first step: it takes checksums of what it will not save again until it trains, the base model.
    """

    def __init__(
        self,
        sparse: Sparse,
        folder: Path,
        *,
        keep: int,
        asynchronous: bool,
        lease: Lease | None = None,
        base: Mapping[str, str] | None = None,
        patience_seconds: float = 600.0,
    ) -> None:
        self._sparse = sparse
        self._store = Store(folder)
        self._keep = keep
        self._asynchronous = asynchronous
        self._lease = lease
        self._patience = patience_seconds
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        # The newest checkpoint of this run: a save writes what differs from it.
        self._baseline: Manifest | None = None
        self._last: int | None = None  # step of the last save
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._pending: Manifest | None = None
        self._staging = Staging()
        self._best: tuple[float, int] | None = None  # evaluation loss, step
        self._candidate: tuple[float, int] | None = None  # until its save has succeeded
        self.base = dict(base) if base is not None else base_checksums(sparse)
        # In the names of files: an earlier attempt may have left some of the same step, or whole checkpoints of it.
        attempt = [secrets.token_hex(4)]
        torch.distributed.broadcast_object_list(attempt)
        self._attempt = attempt[0]

    @property
    def last_step(self) -> int | None:
        """Of the newest checkpoint that is whole, as far as `finish` knows."""
        return self._baseline.step if self._baseline else None

    # --- saving ------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Mapping[str, Any], *, complete: bool = False) -> None:
        """Begin a checkpoint after `step` steps, with `state` (JSON) for whoever resumes. An earlier one is finished
        first. With `complete` it holds what never trained, too, as far as it may train.

        Raises `CheckpointError` on all ranks: where there is no room, or a file of the earlier one could not be
        written; `LeaseError`, which is one, where the run folder is another job's by now.
        """
        if step == self._last:
            return
        self.finish()
        shares = take(self._sparse, self._changed(complete), on_base=() if complete else self.base)
        shares[RANDOM] = Share(random_state(), {}, {})
        own = sum(t.numel() * t.element_size() for share in shares.values() for t in share.tensors.values())
        self.require_space(own, f"the checkpoint after step {step} was not written: it")
        put_on_host(shares.values(), self._staging)
        self._last = step
        full = {"base": self.base, "ranks": self._ranks, "sparse": self._sparse.state_dict(), "run": dict(state)}
        full["best"] = self._candidate if self._candidate and self._candidate[1] == step else self._best
        full = json.loads(json.dumps(full, allow_nan=False))  # what the caller goes on changing is not written later
        kept = {} if self._baseline is None else self._baseline.units
        units = {unit: list(files) for unit, files in kept.items() if unit not in shares}
        self._pending = Manifest(step, units, full)
        work = {"target": self._write, "args": (self._pending, shares)}
        thread = threading.Thread(**work, name="checkpoint", daemon=True)
        self._staging.order()
        try:
            thread.start()
        except RuntimeError:  # no room for another thread
            self._staging.abandon()
            raise
        self._thread = thread
        if self._asynchronous:
            self._sparse.before_change(self._staging.join)
        else:
            self.finish()

    def finish(self) -> None:
        """Wait until what was begun is written; raises `CheckpointError` on all ranks where it could not be."""
        if self._thread is None or self._pending is None:
            return
        self._thread.join()
        manifest, self._thread, self._pending = self._pending, None, None
        failure, self._failure = self._failure, None
        votes = torch.tensor(int(failure is not None), device=self._sparse.device)
        dist.all_reduce(votes)
        if not votes:
            self._baseline = told_by_rank_0(lambda: self._store.read(manifest.step))
            self._take_best(self._baseline)
            return
        mine = None if failure is None else (f"rank {self._rank}: {failure}", isinstance(failure, LeaseError))
        everyone: list[tuple[str, bool] | None] = [None] * self._ranks
        torch.distributed.all_gather_object(everyone, mine)
        failures = [told for told in everyone if told is not None]
        self._last, self._candidate = self.last_step, None
        # One that exists needs its files, whoever failed to hear of it.
        if self._rank == 0 and not self._published(manifest.step):
            self._store.withdraw(manifest.step, self._attempt)
        dist.barrier()
        lost = any(of_lease for _, of_lease in failures)
        if lost and self._published(manifest.step):
            raise LeaseError(failures[0][0])
        raise (LeaseError if lost else CheckpointError)(
            f"the checkpoint after step {manifest.step} was not written: {failures[0][0]}; {self._what_is_left()}"
        )

    def require_space(self, num_bytes: int, what: str) -> None:
        """Raise `CheckpointError` on all ranks where the file system has less free than all ranks' `num_bytes`, which
        `what` takes. Collective."""
        free = 0
        if self._rank == 0:
            there = next(path for path in (self._store.folder, *self._store.folder.parents) if path.exists())
            free = shutil.disk_usage(there).free
        wanted = torch.tensor([num_bytes, free], dtype=torch.int64, device=self._sparse.device)
        dist.all_reduce(wanted)
        needed, free = wanted.tolist()
        if needed > free:
            raise CheckpointError(
                f"{what} takes {needed / 2**20:,.1f} MiB, and {self._store.folder} has {free / 2**20:,.1f} MiB free; "
                f"{self._what_is_left()}. Make room, lower checkpoint.keep ({self._keep} here) or set another output"
            )

    def _take_best(self, manifest: Manifest) -> None:
        best = manifest.state["best"]
        self._best = tuple(best) if best else None
        if self._candidate and self._best and self._candidate[1] <= self._best[1]:
            self._candidate = None

    def _what_is_left(self) -> str:
        return f"the one after step {self._baseline.step} is whole" if self._baseline else "there is no earlier one"

    def is_best(self, step: int, loss: float) -> bool:
        """Whether no evaluation before had less loss; then the next save, of `step`, is kept however old it gets."""
        best = self._candidate or self._best
        if not math.isfinite(loss) or (best is not None and loss >= best[0]):
            return False
        self._candidate = (loss, step)
        return True

    def _changed(self, complete: bool) -> list[str]:
        """Units that trained since the newest checkpoint, or train now; other blocks are as they were there."""
        if complete:
            return list(parameters_by_unit(self._sparse))
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
            self._staging.run()
            written = {
                unit: self._store.write(step, f"{unit}-{self._mark(self._rank)}", share.tensors, share.metadata())
                for unit, share in shares.items()
            }
            self._store.announce(step, self._mark(self._rank), {unit: vars(file) for unit, file in written.items()})
            if self._rank == 0:
                self._publish(manifest)
            else:
                self._wait_for(step, lambda: self._published(step))
        except Exception as error:  # told to the main thread, and to the ranks that wait for this one
            self._failure = error
            with suppress(OSError):
                self._store.announce(step, f"{self._attempt}-failed", f"rank {self._rank}: {error}")

    def _publish(self, manifest: Manifest) -> None:
        step = manifest.step
        for rank in range(self._ranks):
            files = self._wait_for(step, partial(self._store.announced, step, self._mark(rank)))
            for unit, file in files.items():
                manifest.units.setdefault(unit, []).append(File(**file))
        with self._publishing():
            self._store.publish(manifest)
        best = manifest.state["best"]
        with self._publishing():  # asked again: whoever stood still in there must not remove what is another's by now
            try:
                self._store.prune(self._keep, also=[step, *([best[1]] if best else [])])
            except OSError as error:  # the checkpoint is whole all the same
                logger.warning("old checkpoints in %s could not be removed: %s", self._store.folder, error)

    def _publishing(self) -> AbstractContextManager[None]:
        return self._lease.held() if self._lease is not None else nullcontext()

    def _mark(self, rank: int) -> str:
        return f"{self._attempt}-r{rank:05d}"

    def _published(self, step: int) -> bool:
        """The manifest is that of this save."""
        if step not in self._store.steps():
            return False
        return any(self._attempt in file.name for file in self._store.read(step).files)

    def _wait_for(self, step: int, look: Callable[[], Any]) -> Any:
        end, pause = time.monotonic() + self._patience, _POLL_SECONDS[0]
        while True:
            found = look()
            if found:
                return found
            failed = self._store.announced(step, f"{self._attempt}-failed")
            if failed:
                raise RuntimeError(failed)
            if time.monotonic() > end:
                raise TimeoutError(f"other ranks had not written their files after {self._patience:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS[1])

    # --- resuming ----------------------------------------------------------------------------------------------

    def resume(self, source: Store, step: int) -> dict[str, Any]:
        """Put the checkpoint of `step` in `source` back into the engine; returns the `state` that was saved with it.

        Nothing is loaded before sizes and checksums of all its files were compared, each by one of the ranks. Raises
        `CheckpointError` on all ranks.
        """
        with suppress(CheckpointError):  # one that is on its way comes before
            self.finish()
        manifest = told_by_rank_0(lambda: readable(source, step))
        self._verify(source, manifest, step)
        self._candidate, self._last = None, step
        contents = Contents(source, manifest.units)
        contents.learn(unit for unit in manifest.units if unit != RANDOM)
        self._check_shapes(manifest, contents)
        self._compare_base(manifest, contents)
        put_weights_back(self._sparse, contents)
        self._sparse.load_state_dict(manifest.state["sparse"], contents)
        self.base = manifest.state["base"]
        if source.folder.resolve() == self._store.folder.resolve():
            self._take_best(manifest)
            told_by_rank_0(lambda: source.abandon_after(step))
            self._baseline = manifest
        files = manifest.units[RANDOM]
        if len(files) == self._ranks:
            with source.open(files[self._rank]) as opened:
                restore_random_state({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
        else:  # not what it would have been, but not the start's again either
            torch.manual_seed(torch.initial_seed() + step * self._ranks)
        return dict(manifest.state["run"])

    def _verify(self, source: Store, manifest: Manifest, step: int) -> None:
        everyone: list[list[tuple[str, str]]] = [[] for _ in range(self._ranks)]
        mine = manifest.files[self._rank :: self._ranks]
        torch.distributed.all_gather_object(everyone, [(f.name, p) for f in mine if (p := source.problem(f))])
        found = [one for rank in everyone for one in rank]
        if found:
            damaged = {name for name, _ in found}
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise CheckpointError(
                f"the checkpoint after step {step} is damaged: {found[0][1]}{more}{_offer(source, step, damaged)}"
            )

    def _check_shapes(self, manifest: Manifest, contents: Contents) -> None:
        """The model, what trains of it at a time, and how, are those of the checkpoint."""
        rule, ours = manifest.state["sparse"]["rule"], type(self._sparse.update).__name__
        if rule != ours:
            raise CheckpointError(
                f"the checkpoint after step {manifest.step} was trained with update rule {rule}, and this is {ours}: "
                "give the same update"
            )
        slots = manifest.state["sparse"]["slots"]
        if len(slots) != len(self._sparse.active):
            raise CheckpointError(
                f"the checkpoint after step {manifest.step} has {len(slots)} active blocks, and the selector here "
                f"chooses {len(self._sparse.active)}: give the same selector"
            )
        units = parameters_by_unit(self._sparse)
        unknown = manifest.units.keys() - units.keys() - {RANDOM}
        if unknown:
            raise CheckpointError(f"the checkpoint holds {', '.join(sorted(unknown))}, which do not train here")
        for unit in manifest.units.keys() & units.keys():
            for name, parameter in units[unit].items():
                size = contents.size(name)
                if size is not None and size != full_numel(parameter):
                    raise CheckpointError(
                        f"{name} has {full_numel(parameter):,} elements here, and {size:,} in the checkpoint: this is "
                        "another model"
                    )

    def _compare_base(self, manifest: Manifest, contents: Contents) -> None:
        """What the checkpoint leaves to the base must be what it was."""
        before = manifest.state["base"]
        units = parameters_by_unit(self._sparse)
        if self._sparse.steps:  # an engine that has trained on may hold something else by now
            missing = {unit: parameters for unit, parameters in units.items() if unit not in manifest.units}
            now = fingerprints(self._sparse, missing)
            later = [unit for unit in missing if before.get(unit) != now[unit]]
            if later:
                raise CheckpointError(
                    f"{', '.join(later)} trained after the checkpoint of step {manifest.step}, which leaves them to "
                    "the base model: load it into an engine that has not trained yet, or save with complete=True"
                )
        partly = {unit for unit in manifest.units if unit in units and contents.on_base(units[unit])}
        # An engine that has trained on may hold others by now, whatever the base was when it began.
        trained = sorted(partly if self._sparse.steps else partly - self.base.keys())
        if trained:
            raise CheckpointError(
                f"the checkpoint after step {manifest.step} holds the unmasked weights of {', '.join(trained)} alone, "
                "and this engine has trained others there: load it into an engine of the base model"
            )
        left = [unit for unit in self.base if unit not in manifest.units or unit in partly]
        changed = [unit for unit in left if before.get(unit) != self.base[unit]]
        if changed:
            raise CheckpointError(
                f"the base model is another one than when this run began: {', '.join(changed)} "
                f"{'differs' if len(changed) == 1 else 'differ'}, which the checkpoint leaves to it, because they were "
                "never trained. Give the same model.path (or model.random and seed)"
            )


def base_checksums(sparse: Sparse) -> dict[str, str]:
    """Of each unit that has not trained yet, and of what never trains, `rest`. Collective."""
    units = parameters_by_unit(sparse)
    known = {id(parameter) for unit in units.values() for parameter in unit.values()}
    rest = {name: p for name, p in sparse.model.named_parameters() if id(p) not in known}
    trained = {unit_of_block(index) for index, times in enumerate(sparse.times_active) if times}
    if sparse.steps:
        trained |= sparse.always_on.keys()
    base = {unit: parameters for unit, parameters in units.items() if unit not in trained}
    return fingerprints(sparse, {**base, REST: rest})


def readable(source: Store, step: int) -> Manifest:
    """The manifest of a step; the `CheckpointError` of a damaged one names an older one, if there is."""
    try:
        return source.read(step)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_offer(source, step, set())}") from error


def _offer(source: Store, step: int, damaged: set[str]) -> str:
    older = source.offered_before(step, damaged)
    return "" if older is None else f"; there is an older one: resume={source.folder}/step-{older:08d}.json"
