"""Compute a checksum of a model's weights that does not depend on ranks or ZeRO stage, and needs no gathering.

Checkpoints leave to the base model what was never trained. When a run is resumed or exported, or a delta is applied,
the checksum tells whether the base model is the one that the run began with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from trainer.engine.sparse import Sparse

# A sum over elements of (bits x a number that depends on name and position), modulo two primes below 2**31, so that
# partial sums of ranks add up to the sum over the whole.
_PRIMES = (2_147_483_647, 2_147_483_629)
_CHUNK = 2**20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprint:
    """The checksum of a set of named tensors, added in any order, whole or in parts."""

    def __init__(self, sums: Iterable[int] = (0, 0)) -> None:
        self.sums = tuple(value % prime for value, prime in zip(sums, _PRIMES, strict=True))

    def add(self, name: str, weights: Tensor, start: int = 0) -> None:
        """Add elements [start, start + numel) of the flat tensor `name`."""
        sums = zip(self.sums, _PRIMES, strict=True)
        self.sums = tuple((value + _checksum(weights, name, start, prime)) % prime for value, prime in sums)

    def __str__(self) -> str:
        """Return 16 hexadecimal digits."""
        return "".join(f"{value:08x}" for value in self.sums)


@torch.no_grad()
def fingerprints(sparse: Sparse, units: Mapping[str, Mapping[str, nn.Parameter]]) -> dict[str, str]:
    """Return the `Fingerprint` of each unit of a live engine, the same on every rank. Collective."""
    shares = [Fingerprint() for _ in units]
    for fingerprint, parameters in zip(shares, units.values(), strict=True):
        for name, parameter in parameters.items():
            start, weights = sparse.owned(parameter)
            fingerprint.add(name, weights, start)
    total = torch.tensor([fingerprint.sums for fingerprint in shares], dtype=torch.int64, device=sparse.device)
    dist.all_reduce(total)
    return {unit: str(Fingerprint(sums)) for unit, sums in zip(units, total.tolist(), strict=True)}


def _checksum(weights: Tensor, name: str, start: int, prime: int) -> int:
    """Return the sum, modulo `prime`, over elements [start, start + numel) of the flat parameter `name`."""
    salt = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=3).digest(), "little")
    bits = weights.detach().reshape(-1).view(_INTEGERS[weights.element_size()])
    total = 0
    for begin in range(0, bits.numel(), _CHUNK):
        part = bits[begin : begin + _CHUNK].to(torch.int64).remainder(prime)
        places = torch.arange(start + begin, start + begin + part.numel(), device=part.device)
        # Below 2**31 each, so that a product is below 2**62.
        factors = (places.remainder(prime) * 1_103_515_245 + salt).remainder(prime)
        total += int((part * factors).remainder(prime).sum())
    return total % prime
