"""Compare a plan with a machine: whether it fits into the memory of cards and hosts, and how long it takes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from trainer.config import RunConfig, total_steps
from trainer.planner.plan import Plan

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
# Bytes of the driver's context and NCCL's buffers, which torch does not count; and the share of temporary memory that
# its allocator loses.
CONTEXT = 3 * 2**29
SLACK = 0.1


def parse_bytes(text: str) -> int:
    """Return the bytes of `80GB`, `1.5TB`, `512MiB` or a plain number. Units are powers of 1024 in either spelling: a
    card that is sold as 80 GB has nearly 80 GiB. Raises `ValueError`."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([KMGT]?)(i?)B?", text.strip())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"got {text!r}; allowed: a number of bytes, or one with KB, MB, GB or TB, such as 80GB")
    value = float(match[1]) * 1024 ** _UNITS[match[2]]
    if not value > 0 or not math.isfinite(value):
        raise ValueError(f"got {text!r}; allowed: more than 0, such as 80GB")
    return int(value)


@dataclass(frozen=True)
class Machine:
    """`nodes` of `gpus` ranks each, with `gpu_memory` bytes for each rank and `host_memory` for each node (None: not
    checked). A rank sustains `flops` FLOPs per second, sends `bandwidth` bytes per second to other ranks, and copies
    `host_bandwidth` bytes per second between card and host."""

    nodes: int = 1
    gpus: int = 1
    gpu_memory: int | None = None
    host_memory: int | None = None
    flops: float | None = None
    bandwidth: int | None = None
    host_bandwidth: int | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


def needed(plan: Plan) -> int:
    """Return the bytes that a card must have: the peak, what torch does not count, and slack for temporary memory."""
    resident = sum(plan.memory.resident.values())
    return CONTEXT + resident + math.ceil((1 + SLACK) * (plan.memory.peak - resident))


def shortage(plan: Plan, machine: Machine) -> list[str]:
    """Return what does not fit, as phrases for a message; empty if all fits."""
    missing = []
    if machine.gpu_memory is not None and (wanted := needed(plan)) > machine.gpu_memory:
        missing.append(f"{_gib(wanted)} needed on each card of {_gib(machine.gpu_memory)}")
    host = plan.memory.total_host * machine.gpus
    if machine.host_memory is not None and host > machine.host_memory:
        missing.append(f"{_gib(host)} of host memory needed on each node of {_gib(machine.host_memory)}")
    return missing


@dataclass(frozen=True)
class Times:
    """Seconds of an optimizer step: with all overlap that is possible, and without any."""

    shortest: float
    longest: float


def times(plan: Plan, machine: Machine) -> Times | None:
    """Return the time of a step; None if a speed that matters is unknown."""
    if machine.flops is None or (machine.ranks > 1 and machine.bandwidth is None):
        return None
    if plan.offloaded and machine.host_bandwidth is None:
        return None
    compute = plan.flops / machine.flops
    sending = plan.volume.sent(machine.ranks) / machine.bandwidth if machine.bandwidth else 0.0
    hosting = plan.offloaded / machine.host_bandwidth if plan.offloaded and machine.host_bandwidth else 0.0
    return Times(shortest=max(compute, sending) + hosting, longest=compute + sending + hosting)


def num_steps(config: RunConfig, samples: int | None) -> int | None:
    """Return the optimizer steps of the run; None if they are unknown."""
    if config.train.steps is None and samples is None:
        return None
    return total_steps(config, samples or 0)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
