"""Which part of each parameter a rank owns."""

from __future__ import annotations

from deepspeed import comm as dist


def share_size(numel: int, ranks: int) -> int:
    """Return the size of each rank's share of `numel` weights, with padding if they do not divide evenly."""
    return -(-numel // ranks)


def part(numel: int, size: int, rank: int) -> tuple[int, int]:
    """Return the range [start, stop) of `numel` weights that `rank` owns if all shares are of `size`: what padding
    there is, is at the end."""
    return min(numel, rank * size), min(numel, (rank + 1) * size)


def bounds(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return the range [start, stop) of a flat parameter of `numel` weights that `rank` owns: elements
    [rank * c, (rank + 1) * c), c = ceil(numel / ranks). It is also the partition of ZeRO-3."""
    return part(numel, share_size(numel, ranks), rank)


def own_bounds(numel: int) -> tuple[int, int]:
    """Return `bounds` of this rank."""
    return bounds(numel, dist.get_rank(), dist.get_world_size())
