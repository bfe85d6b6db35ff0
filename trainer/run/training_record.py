"""Track the progress of a run, which checkpoints store: steps, evaluations, schedule, data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from trainer.checkpoint.agreement import ask_rank_0
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.config import RunConfig
from trainer.data.batches import SampleOrder
from trainer.data.errors import DataError
from trainer.run.progress import Meter
from trainer.run.resuming import Origin, RunState, changed, changed_data


class TrainingRecord:
    """Count the steps taken, and keep the evaluation loss by step. Saves to `checkpoints` and resumes from them."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: RunConfig,
        batches: SampleOrder,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        *,
        job: str | None = None,
    ) -> None:
        self.checkpoints = checkpoints
        self.step = 0
        self.evaluations: dict[int, float] = {}
        self.skipped = 0  # consecutive steps
        self.last_loss = 0.0
        self._config = config
        self._batches = batches
        self._scheduler = scheduler
        self._job = job  # as the lease names it; only rank 0 knows it

    def save(self, meter: Meter) -> None:
        """Save a checkpoint after the steps so far, with the sums of `meter` since the last log line."""
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

    def resume(self, origin: Origin | None, meter: Meter) -> list[str]:
        """Resume from `origin`. Returns lines that say so and what has changed; none if the run starts anew.

        Raises `CheckpointError`, or `DataError` if the samples are not those of the checkpoint.
        """
        if origin is None:
            return []
        # Rank 0 decides: a shared folder can briefly look different on different nodes.
        step, state = ask_rank_0(lambda: origin.find(self._config))
        self.step = self._resume_data(state)
        self.checkpoints.resume(origin.store, step)
        self._resume_schedule(state.scheduler)
        self.evaluations = {step: _number(loss) for step, loss in state.evaluations}
        self.skipped, self.last_loss = state.skipped, _number(state.last_loss)
        meter.resume_from(*map(_number, state.meter))
        manifest = f"{origin.store.folder}/step-{step:08d}.json"
        return [
            f"resuming after step {self.step}, from {manifest}",
            *changed(state.config, self._config),
            *self._batches.not_recorded(state.data),
        ]

    def _resume_data(self, state: RunState) -> int:
        try:
            return self._batches.resume(state.data)
        except DataError as error:
            if "made_of" in state.data:
                raise
            # An earlier version did not record its data in detail, but its configuration may show the difference.
            raise DataError([*error.problems, *changed_data(state.config, self._config)]) from error

    def _resume_schedule(self, state: Mapping[str, Any]) -> None:
        """Restore the position of the schedule, with the learning rates and the length that are configured now."""
        scheduler = self._scheduler
        own = {key: value for key, value in scheduler.state_dict().items() if key in ("base_lrs", "lr_lambdas")}
        scheduler.load_state_dict({**state, **own})
        for group, base, factor in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(scheduler.last_epoch)


def _finite(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
