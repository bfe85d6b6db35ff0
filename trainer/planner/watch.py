"""The plan of a run that starts, and what was measured when it is over."""

from __future__ import annotations

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from trainer.accounting import readable
from trainer.config import RunConfig
from trainer.planner.machine import CONTEXT, needed
from trainer.planner.plan import Planner
from trainer.planner.report import one_line


class PeakWatch:
    """Plans on rank 0 and measures on all ranks; on CPUs, which do not count, nothing is measured.

    To be made before the model: transformers cuts what it builds under an active ZeRO-3 configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self._measures = get_accelerator().device_name() != "cpu"
        self._plan, self._failure = None, ""
        if dist.get_rank() == 0:
            try:
                self._plan = Planner(on_cpu=not self._measures).plan(config, dist.get_world_size())
            except Exception as error:  # of what torch cannot trace; a run does not depend on its plan
                self._failure = f"no plan of the memory: {type(error).__name__}: {error}"

    def start(self) -> list[str]:
        """Measure from here on. What rank 0 says before the run: the plan, and a warning where the card is smaller."""
        if self._measures:
            get_accelerator().reset_peak_memory_stats()
        if self._plan is None:
            return [self._failure] if self._failure else []
        lines = [one_line(self._plan)]
        memory = get_accelerator().total_memory() if self._measures else 0
        if 0 < memory < needed(self._plan) - CONTEXT:
            lines.append(
                f"WARNING: with slack that is {readable(needed(self._plan))}, and this card has {readable(memory)}: "
                "`python -m trainer plan` says what makes it fit"
            )
        return lines

    def result(self) -> tuple[str, dict[str, int | None]]:
        """(a line, figures for the metrics) on rank 0 after the run; nothing on other ranks. Collective."""
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
        return f"Peak memory: {readable(measured)} measured, {readable(planned)} planned ({share:.2f} of it).", figures
