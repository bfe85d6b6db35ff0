"""Compute bytes and FLOPs of a run by formula, from shapes alone.

The dry run, the planner and the benchmarks share these formulas: `state` (what stays on a rank between steps),
`flops`, `peak` (what a step needs at its peak), `communication` (what ranks send each other).
"""

from trainer.accounting.communication import Volume, step_volume
from trainer.accounting.flops import BlockFlops, step_flops
from trainer.accounting.peak import Activations, Memory, StepShape, Zero, fused_loss, memory
from trainer.accounting.state import (
    ModelState,
    banked_bytes,
    dense_gradient_bytes,
    measured_state,
    model_state,
    nf4_bytes,
    readable,
)

__all__ = [
    "Activations",
    "BlockFlops",
    "Memory",
    "ModelState",
    "StepShape",
    "Volume",
    "Zero",
    "banked_bytes",
    "dense_gradient_bytes",
    "fused_loss",
    "measured_state",
    "memory",
    "model_state",
    "nf4_bytes",
    "readable",
    "step_flops",
    "step_volume",
]
