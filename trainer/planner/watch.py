"""Plan the memory of a run at its start, and compare the plan with the measured peak at its end."""

from __future__ import annotations

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from trainer.accounting import readable
from trainer.config import RunConfig
from trainer.planner.machine import CONTEXT, needed
from trainer.planner.plan import Plan, Planner
from trainer.planner.report import one_line


class PeakWatch:
    """Plan on rank 0 and measure on all ranks. On CPUs, which do not count allocations, nothing is measured.

    Create it before the model: transformers partitions what it builds under an active ZeRO-3 configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self._measures = get_accelerator().device_name() != "cpu"
        self._config = config
        self._planner = Planner(on_cpu=not self._measures)
        self._plan, self._failure = self._planned(config) if dist.get_rank() == 0 else (None, "")

    def _planned(self, config: RunConfig) -> tuple[Plan | None, str]:
        try:
            return self._planner.plan(config, dist.get_world_size()), ""
        except Exception as error:  # such as of code that torch cannot trace; a run does not depend on its plan
            return None, f"memory could not be planned: {type(error).__name__}: {error}"

    def start(self, *, fused: bool) -> list[str]:
        """Start to measure. Returns what rank 0 prints before the run: the plan, and a warning if the card is smaller.
        `fused`: whether the loss is fused; if the plan assumed so and it is not, the run is planned again."""
        if self._measures:
            get_accelerator().reset_peak_memory_stats()
        if self._plan is not None and self._plan.loss.fused and not fused:
            train = self._config.train.model_copy(update={"fused_loss": False})
            self._plan, self._failure = self._planned(self._config.model_copy(update={"train": train}))
        del self._planner  # and the models that it caches
        if self._plan is None:
            return [self._failure] if self._failure else []
        lines = [one_line(self._plan)]
        memory = get_accelerator().total_memory() if self._measures else 0
        if 0 < memory < needed(self._plan) - CONTEXT:
            lines.append(
                f"WARNING: with slack this run needs {readable(needed(self._plan))}, but the card has "
                f"{readable(memory)}: "
                "`python -m trainer plan` lists changes that make it fit"
            )
        return lines

    def result(self) -> tuple[str, dict[str, int | None]]:
        """Return (a line, figures for the metrics) on rank 0 after the run; both empty on other ranks. Collective."""
        measured = None
        if self._measures:
            most = torch.tensor(
                [get_accelerator().max_memory_allocated()], device=get_accelerator().current_device_name()
            )
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            measured = int(most)
        if self._plan is None:
            return "", {}
        planned = self._plan.memory.peak
        figures = {"planned_peak_bytes": planned, "measured_peak_bytes": measured}
        if measured is None:
            return f"Peak memory: {readable(planned)} planned, not measured on a CPU.", figures
        share = measured / planned
        return f"Peak memory: {readable(measured)} measured, {readable(planned)} planned (ratio {share:.2f}).", figures
