"""Which part of each parameter a rank owns."""

from __future__ import annotations

from deepspeed import comm as dist


def bounds(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return the range [start, stop) of a flat parameter of `numel` weights that `rank` owns: elements
    [rank * c, (rank + 1) * c), c = ceil(numel / ranks). It is also the partition of ZeRO-3."""
    chunk = -(-numel // ranks)
    return min(numel, rank * chunk), min(numel, (rank + 1) * chunk)


def own_bounds(numel: int) -> tuple[int, int]:
    """Return `bounds` of this rank."""
    return bounds(numel, dist.get_rank(), dist.get_world_size())
