"""What a run has behind it, kept in checkpoints: steps, evaluations, schedule, data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import CheckpointError, Checkpoints, Store, readable
from trainer.checkpoint.agreement import told_by_rank_0
from trainer.config import RunConfig
from trainer.data.batches import Batches
from trainer.progress import Meter
from trainer.resuming import came_from, changed, check_settings, named


class History:
    """`step` steps were taken, with these evaluation losses by step. Saves and resumes with `checkpoints`."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: RunConfig,
        batches: Batches,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        *,
        job: str | None = None,
    ) -> None:
        self.checkpoints = checkpoints
        self.step = 0
        self.evaluations: dict[int, float] = {}
        self.skipped = 0  # in a row
        self.last_loss = 0.0
        self._config = config
        self._batches = batches
        self._scheduler = scheduler
        self._job = job  # as the lease names it; known to rank 0

    def save(self, meter: Meter) -> None:
        """A checkpoint after the steps so far, and of what `meter` has added up since the last log line."""
        self.checkpoints.save(
            self.step,
            {
                "job": self._job,
                "config": self._config.model_dump(mode="json"),
                "data": self._batches.state(self.step),
                "scheduler": self._scheduler.state_dict(),
                "evaluations": [[step, _finite(loss)] for step, loss in self.evaluations.items()],
                "skipped": self.skipped,
                "last_loss": _finite(self.last_loss),
                "meter": [_finite(value) for value in meter.sums()],
            },
        )

    def resume(self, folder: Path, meter: Meter) -> list[str]:
        """Go on as `resume` says; returns lines that say from where and what is new, none for a run that begins. Raises
        `CheckpointError`."""
        wanted = self._config.resume
        if wanted == "never":
            return []
        # Rank 0 looks for all: folders on several machines are not always of one mind.
        found = told_by_rank_0(lambda: _find(wanted, Store(folder)))
        if found is None:
            return []
        source, step, state = found
        check_settings(state["config"], self._config)
        self.step = self._batches.resume(state["data"])
        self.checkpoints.resume(source, step)
        self._take_up_schedule(state["scheduler"])
        self.evaluations = {step: _number(loss) for step, loss in state["evaluations"]}
        self.skipped, self.last_loss = state["skipped"], _number(state["last_loss"])
        meter.go_on_from(*map(_number, state["meter"]))
        origin = f"{source.folder}/step-{step:08d}.json"
        return [f"going on after step {self.step}, from {origin}", *changed(state["config"], self._config)]

    def _take_up_schedule(self, state: Mapping[str, Any]) -> None:
        """Where it was, with the rates and the length that are configured now."""
        scheduler = self._scheduler
        own = {key: value for key, value in scheduler.state_dict().items() if key in ("base_lrs", "lr_lambdas")}
        scheduler.load_state_dict({**state, **own})
        for group, base, factor in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(scheduler.last_epoch)


def _find(wanted: str, own: Store) -> tuple[Store, int, dict[str, Any]] | None:
    """Where `resume: wanted` goes on, after which step, and what was saved of the run; None: it begins."""
    # A run that began with a path, and was started once more, goes on where it is by now.
    source, step = (own, None) if wanted == "auto" or came_from(own, wanted) else named(wanted)
    if step is None:
        steps = source.steps()
        if not steps and wanted == "auto":
            return None
        if not steps:
            raise CheckpointError(f"resume: no checkpoint in {source.folder}; name a run folder that has some")
        step = steps[0]
    return source, step, readable(source, step).state["run"]


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
