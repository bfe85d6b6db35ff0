"""Save what changed since the last checkpoint while training continues, and resume on any number of ranks.

`store` writes and verifies files, `contents` reads tensors from an engine and writes them back, `fingerprint`
recognises the base model. This module decides what a save contains, and when it is complete.
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

from trainer.checkpoint import checks
from trainer.checkpoint.agreement import agreed, ask_rank_0
from trainer.checkpoint.contents import (
    RANDOM,
    REST,
    Contents,
    Share,
    collect_shares,
    parameters_by_unit,
    restore_weights,
    stage_on_host,
    unit_of_block,
)
from trainer.checkpoint.fingerprint import fingerprints
from trainer.checkpoint.identity import Identity, identity_of
from trainer.checkpoint.lease import Lease, LeaseError
from trainer.checkpoint.random_state import random_state, restore_random_state
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.store import CheckpointError, File, Manifest, Store
from trainer.engine.sparse import Sparse

logger = logging.getLogger(__name__)

# Seconds between two polls of the folder: at first, and at most.
_POLL_SECONDS = 0.02, 0.5


class Checkpoints:
    """Save an attached engine into a run folder, and resume one from there.

    All ranks call every method together. With `asynchronous`, training continues during a save: a thread copies what
    changed into host memory before the next optimizer step, and then writes files from there. Threads use no
    collectives: each rank reports to rank 0 through the folder, which all ranks share, and waits for the others for at
    most `patience_seconds`.

    Rank 0 publishes the checkpoint, if `lease` says that the run folder still belongs to this run. `lease` is None on
    all other ranks. It is also None in loops whose folder no other job uses; then rank 0 always publishes.

    A loop that writes to weights or optimizer state itself, for example to average weights, must first call
    `sparse.change()`.

    Create it before the first step: it computes checksums of the base model, whose units are not saved until they
    train. `identity` is the result of `identity_of` for the model (the default), or for model and tokenizer if the
    tokenizer should be compared as well.
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
        identity: Identity | None = None,
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
        self._pending: Manifest | None = None  # of the current save
        self._staging = Staging()
        self._best: tuple[float, int] | None = None  # evaluation loss, step
        self._candidate: tuple[float, int] | None = None  # the next best, until its save has succeeded
        self.base = dict(base) if base is not None else base_checksums(sparse)
        self.identity = identity or identity_of(sparse.model, blocks=sparse.structure.path)
        # Makes file names unique: an earlier attempt may have left files or a whole checkpoint of the same step.
        attempt = [secrets.token_hex(4)]
        torch.distributed.broadcast_object_list(attempt)
        self._attempt = attempt[0]

    @property
    def last_step(self) -> int | None:
        """Return the step of the newest whole checkpoint that `finish` has confirmed, if there is one."""
        return self._baseline.step if self._baseline else None

    # --- saving ------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Mapping[str, Any], *, complete: bool = False) -> None:
        """Finish the previous save, and begin a checkpoint after `step` steps.

        `resume` returns `state`, which must be JSON. With `complete` the checkpoint also contains what may train but
        never has. Raises `CheckpointError` on all ranks if there is not enough space, or if a file of the previous save
        could not be written; its subclass `LeaseError` if the run folder now belongs to another job.
        """
        # A step that was saved without an evaluation is saved again if it turns out to be the best.
        again = step == self._last
        if again and (self._candidate is None or self._candidate[1] != step):
            return
        self.finish()
        if again:  # other names: the files of the first save are needed until this one is published
            self._attempt += "a"
        shares = agreed(
            lambda: collect_shares(self._sparse, self._changed(complete), on_base=() if complete else self.base)
        )
        shares[RANDOM] = Share(random_state(), {}, {})
        own_bytes = sum(t.numel() * t.element_size() for share in shares.values() for t in share.tensors.values())
        self.require_space(own_bytes, f"the checkpoint after step {step} was not written: it needs")
        agreed(lambda: stage_on_host(shares.values(), self._staging))
        try:
            agreed(lambda: self._begin(step, state, shares))
        except Exception as error:
            self._cancel(step, error)
            raise
        if self._asynchronous:
            self._sparse.before_change(self._staging.join)
        else:
            self.finish()

    def _begin(self, step: int, state: Mapping[str, Any], shares: Mapping[str, Share]) -> None:
        """Start the thread that writes `shares`."""
        record = {"base": self.base, "ranks": self._ranks, "sparse": self._sparse.state_dict(), "run": dict(state)}
        record["identity"] = self.identity.model_dump()
        record["best"] = self._candidate if self._candidate and self._candidate[1] == step else self._best
        record = json.loads(json.dumps(record, allow_nan=False))  # a copy, which the caller cannot change
        earlier = {} if self._baseline is None else self._baseline.units
        units = {unit: list(files) for unit, files in earlier.items() if unit not in shares}
        manifest = Manifest(step, units, record)
        thread = threading.Thread(target=self._write, args=(manifest, shares), name="checkpoint", daemon=True)
        self._staging.order()
        try:
            thread.start()
        except RuntimeError:  # no further thread can be started
            self._staging.abandon()
            raise
        self._last, self._pending, self._thread = step, manifest, thread

    def _cancel(self, step: int, error: Exception) -> None:
        """Cancel a save that some rank could not begin, and end the threads of the ranks that began it."""
        with suppress(OSError):
            self._store.announce(step, f"{self._attempt}-failed", str(error))
        if self._thread is not None:
            self._thread.join()
        self._thread, self._pending, self._failure, self._last = None, None, None, self.last_step
        ask_rank_0(lambda: self._store.withdraw(step, self._attempt))

    def finish(self) -> None:
        """Wait until the current save is written. Raises `CheckpointError` on all ranks if it could not be written."""
        if self._thread is None or self._pending is None:
            return
        self._thread.join()
        manifest, self._thread, self._pending = self._pending, None, None
        failure, self._failure = self._failure, None
        votes = torch.tensor(int(failure is not None), device=self._sparse.device)
        dist.all_reduce(votes)
        if not votes:
            self._baseline = ask_rank_0(lambda: self._store.read(manifest.step))
            self._adopt_best(self._baseline)
            return
        report = None if failure is None else (f"rank {self._rank}: {failure}", isinstance(failure, LeaseError))
        reports: list[tuple[str, bool] | None] = [None] * self._ranks
        torch.distributed.all_gather_object(reports, report)
        failures = [failed for failed in reports if failed is not None]
        self._last, self._candidate = self.last_step, None
        # The files of a published checkpoint stay, even if a rank failed before it saw the publication.
        published = ask_rank_0(lambda: self._withdraw_unless_published(manifest.step))
        lease_lost = any(of_lease for _, of_lease in failures)
        if lease_lost and published:
            raise LeaseError(failures[0][0])
        raise (LeaseError if lease_lost else CheckpointError)(
            f"the checkpoint after step {manifest.step} was not written: {failures[0][0]}; {self._last_intact()}"
        )

    def _withdraw_unless_published(self, step: int) -> bool:
        """Remove, on rank 0, the files of a failed save unless it was published. Returns whether it was."""
        published = self._published(step)
        if not published:
            self._store.withdraw(step, self._attempt)
        return published

    def require_space(self, num_bytes: int, what: str) -> None:
        """Raise `CheckpointError` on all ranks if together they need more space than the file system has left.

        `num_bytes` is what this rank needs. The message begins with `what`, for example "this run needs". Collective.
        """
        free = ask_rank_0(self._free_space)
        wanted = torch.tensor(num_bytes, dtype=torch.int64, device=self._sparse.device)
        dist.all_reduce(wanted)
        needed = int(wanted)
        if needed > free:
            raise CheckpointError(
                f"{what} {needed / 2**20:,.1f} MiB, but {self._store.folder} has {free / 2**20:,.1f} MiB free; "
                f"{self._last_intact()}. Make room, lower checkpoint.keep ({self._keep} here) or set another output"
            )

    def _free_space(self) -> int:
        existing = next(path for path in (self._store.folder, *self._store.folder.parents) if path.exists())
        return shutil.disk_usage(existing).free

    def _adopt_best(self, manifest: Manifest) -> None:
        best = manifest.state["best"]
        self._best = tuple(best) if best else None
        if self._candidate and self._best and self._candidate[1] <= self._best[1]:
            self._candidate = None

    def _last_intact(self) -> str:
        return f"the one after step {self._baseline.step} is intact" if self._baseline else "there is no earlier one"

    def is_best(self, step: int, loss: float) -> bool:
        """Return whether `loss` is the lowest so far. If so, the next save must be of `step`, and its checkpoint is
        kept until there is a better one."""
        best = self._candidate or self._best
        if not math.isfinite(loss) or (best is not None and loss >= best[0]):
            return False
        self._candidate = (loss, step)
        return True

    def _changed(self, complete: bool) -> list[str]:
        """Return the units that have trained since the newest checkpoint or train now; others have not changed."""
        if complete:
            return list(parameters_by_unit(self._sparse))
        now = self._sparse.times_active
        before = self._baseline.state["sparse"]["times_active"] if self._baseline else [0] * len(now)
        # Active blocks have fresh state, even if all steps of this interval have been skipped so far.
        changed = {i for i, (old, new) in enumerate(zip(before, now, strict=True)) if old != new}
        blocks = [unit_of_block(i) for i in sorted(changed | set(self._sparse.active))]
        return blocks + list(self._sparse.always_on)

    def _write(self, manifest: Manifest, shares: Mapping[str, Share]) -> None:
        """Write this rank's files. Runs in a thread of every rank."""
        step = manifest.step
        try:
            self._staging.run()
            written = {
                unit: self._store.write(step, f"{unit}-{self._file_mark(self._rank)}", share.tensors, share.metadata())
                for unit, share in shares.items()
            }
            self._store.announce(
                step, self._file_mark(self._rank), {unit: vars(file) for unit, file in written.items()}
            )
            if self._rank == 0:
                self._publish(manifest)
            else:
                self._wait_for(step, lambda: self._published(step))
        except Exception as error:  # reported to the main thread, and to the ranks that wait for this one
            self._failure = error
            with suppress(OSError):
                self._store.announce(step, f"{self._attempt}-failed", f"rank {self._rank}: {error}")

    def _publish(self, manifest: Manifest) -> None:
        step = manifest.step
        for rank in range(self._ranks):
            files = self._wait_for(step, partial(self._store.announced, step, self._file_mark(rank)))
            for unit, file in files.items():
                manifest.units.setdefault(unit, []).append(File(**file))
        with self._publishing():
            self._store.publish(manifest)
        with self._publishing():  # checked again: after a pause the files may belong to another job
            best = manifest.state["best"]
            try:
                self._store.prune(self._keep, also=[step, *([best[1]] if best else [])])
            except OSError as error:  # the new checkpoint is complete nevertheless
                logger.warning("old checkpoints in %s could not be removed: %s", self._store.folder, error)

    def _clear_after(self, manifest: Manifest) -> None:
        """On rank 0, rename checkpoints after `manifest` and remove what killed saves left: a run that resumes from
        `manifest` needs neither."""
        with self._publishing():
            self._store.abandon_after(manifest.step)
            if self._lease is not None:  # without a lease, another job may be saving here now
                self._store.remove_leftovers()

    def _publishing(self) -> AbstractContextManager[None]:
        return self._lease.held() if self._lease is not None else nullcontext()

    def _file_mark(self, rank: int) -> str:
        return f"{self._attempt}-r{rank:05d}"

    def _published(self, step: int) -> bool:
        """Return whether the manifest of `step` is that of this save."""
        if step not in self._store.steps():
            return False
        return any(self._attempt in file.name for file in self._store.read(step).files)

    def _wait_for(self, step: int, poll: Callable[[], Any]) -> Any:
        end, pause = time.monotonic() + self._patience, _POLL_SECONDS[0]
        while True:
            answer = poll()
            if answer:
                return answer
            failed = self._store.announced(step, f"{self._attempt}-failed")
            if failed:
                raise RuntimeError(failed)
            if time.monotonic() > end:
                raise TimeoutError(f"other ranks had not written their files after {self._patience:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS[1])

    # --- resuming ----------------------------------------------------------------------------------------------

    def resume(self, source: Store, step: int) -> dict[str, Any]:
        """Load the checkpoint of `step` in `source` into the engine; return the `state` that was saved with it.

        Before anything is loaded, the size and checksum of each of its files are verified by one of the ranks.
        Raises `CheckpointError` on all ranks.
        """
        try:
            self.finish()
        except LeaseError:
            raise
        except CheckpointError:  # the loaded state replaces the one that could not be saved
            pass
        manifest = ask_rank_0(lambda: checks.readable(source, step))
        checks.verify(source, manifest)
        checks.compare_identity(manifest, self.identity)
        self._candidate, self._last = None, None
        contents = Contents(source, manifest.units)
        agreed(lambda: contents.learn(unit for unit in manifest.units if unit != RANDOM))
        agreed(lambda: checks.check_shapes(self._sparse, manifest, contents))
        checks.compare_base(self._sparse, self.base, manifest, contents)
        restore_weights(self._sparse, contents)
        with checks.as_checkpoint_errors(manifest):
            agreed(lambda: self._sparse.load_state_dict(manifest.state["sparse"], contents))
        self._sparse.compare_ranks()
        self.base = manifest.state["base"]
        if source.folder.resolve() == self._store.folder.resolve():
            self._adopt_best(manifest)
            ask_rank_0(lambda: self._clear_after(manifest))
            self._baseline, self._last = manifest, step
        with checks.as_checkpoint_errors(manifest):
            agreed(lambda: self._restore_random_state(source, manifest.units[RANDOM], step))
        return dict(manifest.state["run"])

    def _restore_random_state(self, source: Store, files: list[File], step: int) -> None:
        if len(files) == self._ranks:
            with source.open(files[self._rank]) as opened:
                restore_random_state({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
        else:  # another number of ranks: use a new seed, not that of the start
            torch.manual_seed(torch.initial_seed() + step * self._ranks)


def base_checksums(sparse: Sparse) -> dict[str, str]:
    """Return a checksum of each unit that has not trained yet and, as `rest`, of what never trains. Collective."""
    units = parameters_by_unit(sparse)
    known = {id(parameter) for unit in units.values() for parameter in unit.values()}
    rest = {name: p for name, p in sparse.model.named_parameters() if id(p) not in known}
    trained = {unit_of_block(index) for index, times in enumerate(sparse.times_active) if times}
    if sparse.steps:
        trained |= sparse.always_on.keys()
    base = {unit: parameters for unit, parameters in units.items() if unit not in trained}
    return fingerprints(sparse, {**base, REST: rest})
