"""What a rank stores between steps: weights, gradients, masters, moments and banks, by formula and as measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelState:
    """Bytes on one rank, measured after a step: weights, resident gradients, fp32 masters, Adam's two moments, and the
    indices of a sparse update rule.

    With `offload`, masters, moments and gradients are in host memory.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    offload: bool = False
    indices: int = 0

    @property
    def device(self) -> int:
        return self.weights if self.offload else self.total

    @property
    def host(self) -> int:
        return self.total - self.device

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments + self.indices


def model_state(
    parameters: Sequence[int],
    groups: Sequence[Sequence[int]],
    *,
    stage: int,
    ranks: int,
    weight_bytes: int,
    gradient_bytes: int | None = None,
    moment_bytes: int = 8,
    offload: bool = False,
) -> ModelState:
    """Return the minimum that ZeRO `stage` stores on a rank.

    `parameters`: elements of every parameter of the model; `groups`: of those in the optimizer, by group.
    `weight_bytes` is 2 (bf16, fp16) or 4 (fp32); `gradient_bytes`, those of an accumulated gradient, default to it;
    `moment_bytes` are both of Adam's together, 2 for an 8-bit Adam, whose scales of blocks are not counted.

    Stages 1 and 2 replicate weights, split each group into equal parts, and free gradients within the step. Stage 3
    splits each parameter, keeps a partition of the gradients, and uses fp32 weights as their own masters. Stage 0 is
    plain fp32 training: no extra masters, gradients freed after the step.
    """
    held = [numel for group in groups for numel in group]
    gradient_bytes = gradient_bytes or weight_bytes
    if stage == 0:
        return ModelState(4 * sum(parameters), 0, 0, moment_bytes * sum(held))
    if stage == 3:
        mine, active = (sum(-(-n // ranks) for n in numels) for numels in (parameters, held))
        own_masters = weight_bytes == 4 and not offload
        # Offloading keeps the accumulated partition and, beside it, the gradient of the fp32 master.
        gradients = gradient_bytes * active + (4 * active if offload else 0)
        return ModelState(
            weight_bytes * mine, gradients, 0 if own_masters else 4 * active, moment_bytes * active, offload
        )
    active = sum(-(-sum(group) // ranks) for group in groups)
    return ModelState(
        weight_bytes * sum(parameters), 4 * active if offload else 0, 4 * active, moment_bytes * active, offload
    )


def dense_gradient_bytes(numel: int, *, ranks: int, weight_bytes: int) -> int:
    """Return the largest size of the gradient of one parameter with `numel` elements before the update rule receives
    it: as computed by backward and in fp32, and with several ranks also this rank's part of their mean."""
    if ranks == 1:
        return 4 * numel + (weight_bytes * numel if weight_bytes != 4 else 0)
    return (4 + weight_bytes) * numel + 4 * -(-numel // ranks)


def nf4_bytes(numel: int) -> int:
    """Return the bytes of a matrix in NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3): four bits per
    weight, a byte per scale of 64 weights, and four bytes per scale of 256 such scales."""
    scales = -(-numel // 64)
    return -(-numel // 2) + scales + 4 * -(-scales // 256)


def banked_bytes(blocks: Iterable[int], *, ranks: int) -> int:
    """Return what a bank stores on a rank for blocks of so many elements: fp32 masters and Adam's two moments."""
    return sum(12 * -(-numel // ranks) for numel in blocks)


def measured_state(held: Mapping[str, Iterable[Tensor]], *, offload: bool = False) -> ModelState:
    """Measure live tensors by kind (`Sparse.held()`); each storage is counted once, under its first kind."""
    seen: set[int] = set()
    totals = {}
    for kind in ("weights", "gradients", "masters", "moments", "indices"):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held[kind]}
        totals[kind] = sum(size for pointer, size in storages.items() if pointer not in seen)
        seen |= storages.keys()
    return ModelState(**totals, offload=offload)


def readable(num_bytes: float) -> str:
    """Format bytes: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
