"""Compute the peaks of a step on a rank: activations, loss, gathered weights and buckets, besides resident state.

Models DeepSpeed 0.19.8. The device's context and the allocator's slack are not in these figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.accounting.state import ModelState

# A tile of TRL's fused head (`trl/kernels/chunked_logprob.py`, `trl/trainer/utils.py` 1.16): tokens and entries.
_TILE = (4096, 32768)


@dataclass(frozen=True)
class Activations:
    """Bytes besides weights. `saved`: what forward keeps for backward, including its output but not its input; `peak`:
    the most that is alive besides the input during forward and backward, including `saved` and one weight's gradient at
    a time; `forward`: the same without gradients, as in evaluation and in a checkpointed forward."""

    saved: int
    peak: int
    forward: int


@dataclass(frozen=True)
class StepShape:
    """The sizes that determine a step's transient bytes.

    `active` and `passed`: a block that trains, and one that only passes gradients on, the largest of each; backward
    passes `depth` blocks, of which `num_active` train. `loss`: final norm, head and loss. In bytes: `evaluation`, a
    forward without gradients (0: none), `embedded`, a hidden state, and `saved`, what forward keeps of the blocks that
    backward passes unless it computes them again. In elements: `largest`, the largest parameter that trains;
    `embeddings`, the input embeddings if they train; `total`, the model; `groups`, the optimizer's groups.
    """

    active: Activations
    passed: Activations
    loss: Activations
    evaluation: int
    embedded: int
    depth: int
    num_active: int
    saved: int
    checkpointing: bool
    largest: int
    embeddings: int
    total: int
    groups: tuple[int, ...]
    # Bytes that the update rule needs in backward besides its state, by part.
    rule: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Zero:
    """Settings of ZeRO that determine bytes; sizes are elements, as in DeepSpeed's configuration."""

    stage: int
    ranks: int
    weight_bytes: int
    gradient_bytes: int
    reduce_bucket: int = 0
    overlap: bool = False
    max_live: int = 0
    offload: bool = False
    offload_param: bool = False
    # With optimizer state on NVMe: number of host buffers, each as large as the largest group's part in fp32.
    nvme_buffers: int = 0
    machine_ranks: int = 0  # hpZ: ranks over which each node partitions its own copy
    # Unfused AdamW of torch, as on a CPU, allocates temporaries; fused AdamW and DeepSpeed's do not.
    temporaries: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. `resident` remains throughout; `moments` are added to it at each possible peak of a step, by
    part; `host` is in host memory, `disk` on NVMe."""

    resident: dict[str, int]
    moments: dict[str, dict[str, int]]
    host: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    @property
    def highest(self) -> str:
        """Return the moment with the most bytes."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Return the bytes at that moment, by part."""
        return {k: v for k, v in {**self.resident, **self.moments[self.highest]}.items() if v}

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def total_host(self) -> int:
        return sum(self.host.values())


def fused_loss(
    *, tokens: int, hidden: int, vocabulary: int, weight_bytes: int, trains: bool, tiles: int
) -> Activations:
    """Return the bytes of TRL's fused head: a tile of logits, fp32 gradients of hidden states and, if the head
    `trains`, of the head, and their copies in the weights' type. `tiles`: number of fp32 copies of a tile, which are
    made without Triton only (7 on a CPU, else 0)."""
    rows, columns = min(tokens, _TILE[0]), min(vocabulary, _TILE[1])
    tile_bytes = rows * (weight_bytes * _TILE[1] + 4 * tiles * columns)  # the buffer is as wide for any vocabulary
    inputs = 2 * tokens * hidden * weight_bytes  # normed hidden states, and the rows that are targets
    gradients = (4 + weight_bytes) * (tokens * hidden + trains * hidden * vocabulary)
    return Activations(saved=inputs, peak=inputs + tile_bytes + gradients, forward=inputs + tile_bytes)


def memory(state: ModelState, shape: StepShape, zero: Zero, *, host: Mapping[str, int], banked: int = 0) -> Memory:
    """Return the memory of one optimizer step of `shape` under `zero`, with the model state `state`. `host` is added in
    host memory, and `banked` on the device."""
    resident = {"weights": state.weights} | ({"full bank": banked} if banked else {})
    on_host = {k: v for k, v in host.items() if v}
    on_disk: dict[str, int] = {}
    if zero.offload_param:
        on_host["weights"] = resident.pop("weights")
    for kind in ("gradients", "masters", "moments", *(["indices"] if state.indices else [])):
        to_disk = zero.nvme_buffers and kind in ("masters", "moments")
        (on_disk if to_disk else on_host if state.offload else resident)[kind] = getattr(state, kind)
    if zero.nvme_buffers:  # the fp32 gradient is swapped with its master
        on_disk["gradients"] = state.masters
        on_host["gradients"] -= state.masters
        on_host["NVMe buffers"] = 4 * zero.nvme_buffers * -(-max(shape.groups) // zero.ranks)
    bucket = zero.weight_bytes * zero.reduce_bucket
    if zero.stage == 3:
        resident["buckets"] = bucket
    if zero.offload and zero.stage in (1, 2):  # through which gradients leave
        resident["offload buffer"] = zero.weight_bytes * shape.largest
    if zero.machine_ranks > 1:
        resident["weights for each machine"] = zero.weight_bytes * -(-shape.total // zero.machine_ranks)
    return Memory(resident, _moments(shape, zero, bucket), on_host, on_disk)


def _moments(shape: StepShape, zero: Zero, bucket: int) -> dict[str, dict[str, int]]:
    gathered = _gathered(shape, zero)
    saved = _saved(shape)
    reduction = _reduction(shape, zero, bucket)
    worst = max((shape.active, shape.passed) if shape.num_active < shape.depth else (shape.active,), key=_peak)
    recomputed = worst.peak if shape.checkpointing else worst.peak - worst.saved
    gradients = _whole_gradients(shape, zero)
    return {
        "loss": {"activations": saved, "loss": shape.loss.peak, "gathered": gathered},
        "backward": {
            "activations": saved,
            "recomputed": recomputed,
            "gathered": gathered,
            "buckets": reduction,
            "whole gradients": gradients,
            **shape.rule,
        },
        "embeddings": {
            "activations": shape.embedded,
            "embeddings' gradient": zero.weight_bytes * shape.embeddings,
            "gathered": gathered,
            "buckets": reduction,
            "whole gradients": gradients,
            **shape.rule,
        },
        "optimizer step": _optimizer_step(shape, zero),
        "evaluation": {"evaluation": shape.evaluation, "gathered": gathered},
    }


def _peak(activations: Activations) -> int:
    return activations.peak


def _saved(shape: StepShape) -> int:
    """Return what forward keeps of all blocks, including the input of the first of them."""
    if shape.checkpointing:
        return shape.embedded * (shape.depth + 1)
    return shape.embedded + shape.saved


def _gathered(shape: StepShape, zero: Zero) -> int:
    """Return the bytes of gathered weights: prefetching stops at `max_live` elements, but gathers whole parameters. A
    single rank has all weights in place, unless they are in host memory."""
    if zero.stage < 3 or (zero.ranks == 1 and not zero.offload_param):
        return 0
    return zero.weight_bytes * min(shape.total, zero.max_live + shape.largest)


def _reduction(shape: StepShape, zero: Zero, bucket: int) -> int:
    """Return the bytes of reduction in backward: of the copy of a full bucket in stage 3, of the buckets in 1 and 2."""
    if zero.stage == 0:
        return 0
    if zero.stage == 3:
        return bucket
    return bucket * (2 if zero.overlap else 1)


def _whole_gradients(shape: StepShape, zero: Zero) -> int:
    """Return the bytes of accumulated gradients: all of them below stage 2, this rank's part under stage 2."""
    elements = sum(shape.groups)
    if zero.stage == 3 or (zero.stage == 2 and zero.offload):
        return 0
    if zero.stage == 2:
        return zero.gradient_bytes * -(-elements // zero.ranks)
    return zero.weight_bytes * elements


def _optimizer_step(shape: StepShape, zero: Zero) -> dict[str, int]:
    """Return the bytes of gradients in fp32, group by group, and of what the optimizer allocates."""
    if zero.offload:
        return {"step": 0}
    part = -(-max(shape.groups, default=0) // zero.ranks)
    temporaries = 8 * part if zero.temporaries else 0
    if zero.stage == 0:
        return {"whole gradients": _whole_gradients(shape, zero), "step": 8 * shape.largest * zero.temporaries}
    return {"whole gradients": _whole_gradients(shape, zero), "step": (4 + zero.gradient_bytes) * part + temporaries}
