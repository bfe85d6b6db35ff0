"""Bytes and FLOPs of a run by formula, from shapes alone.

One set of formulas behind the dry run, the planner and the benchmarks: `state` (what stays on a rank between steps),
`flops`, `peak` (what a step needs at its highest moment), `communication` (what ranks send each other).
"""

from trainer.accounting.flops import BlockShape, block_shape, step_flops
from trainer.accounting.state import ModelState, banked_bytes, measured_state, model_state, nf4_bytes, readable

__all__ = [
    "BlockShape",
    "ModelState",
    "banked_bytes",
    "block_shape",
    "measured_state",
    "model_state",
    "nf4_bytes",
    "readable",
    "step_flops",
]
