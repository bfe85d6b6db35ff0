"""Bytes of a run by formula, from shapes alone. The dry run and the benchmarks print these figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelState:
    """Bytes on one rank, measured after a step: weights, resident gradients, fp32 masters, Adam's two moments.

    With `offload` masters, moments and gradients lie in host memory.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    offload: bool = False

    @property
    def device(self) -> int:
        return self.weights if self.offload else self.total

    @property
    def host(self) -> int:
        return self.total - self.device

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments


def model_state(
    parameters: Sequence[int],
    groups: Sequence[Sequence[int]],
    *,
    stage: int,
    ranks: int,
    weight_bytes: int,
    gradient_bytes: int | None = None,
    offload: bool = False,
) -> ModelState:
    """The minimum that ZeRO `stage` holds on a rank.

    `parameters`: elements of every parameter of the model; `groups`: of those that the optimizer holds, by group.
    `weight_bytes` is 2 (bf16) or 4 (fp32); `gradient_bytes`, those of an accumulated gradient, default to it.

    Stages 1 and 2 replicate weights, cut each group into equal parts, and free gradients within the step. Stage 3
    cuts each parameter, keeps a partition of the gradients, and uses fp32 weights as their own masters. Stage 0 is
    plain fp32 training: no extra masters, gradients freed after the step.
    """
    held = [numel for group in groups for numel in group]
    gradient_bytes = gradient_bytes or weight_bytes
    if stage == 0:
        return ModelState(4 * sum(parameters), 0, 0, 8 * sum(held))
    if stage == 3:
        mine, active = (sum(-(-n // ranks) for n in numels) for numels in (parameters, held))
        own_masters = weight_bytes == 4 and not offload
        # Offloading keeps the accumulated partition and, beside it, the gradient of the fp32 master.
        gradients = gradient_bytes * active + (4 * active if offload else 0)
        return ModelState(weight_bytes * mine, gradients, 0 if own_masters else 4 * active, 8 * active, offload)
    active = sum(-(-sum(group) // ranks) for group in groups)
    return ModelState(weight_bytes * sum(parameters), 4 * active if offload else 0, 4 * active, 8 * active, offload)


def measured_state(held: Mapping[str, Iterable[Tensor]], *, offload: bool = False) -> ModelState:
    """The same figures from live tensors by kind (`Sparse.held()`), each storage counted once, under its first kind."""
    seen: set[int] = set()
    totals = {}
    for kind in ("weights", "gradients", "masters", "moments"):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held[kind]}
        totals[kind] = sum(size for pointer, size in storages.items() if pointer not in seen)
        seen |= storages.keys()
    return ModelState(**totals, offload=offload)


def readable(num_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
