"""A checksum of a model's weights that does not depend on ranks or ZeRO stage, and needs no gathering.

Checkpoints leave out what was never trained: it is the base's. The checksum tells whether the base that a run is
resumed on is the one that it began with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from trainer.engine.attach import Sparse

# A sum over elements of (bits x a number that depends on name and position), modulo two primes below 2**31, so that
# partial sums of ranks add up to the sum over the whole.
_PRIMES = (2_147_483_647, 2_147_483_629)
_CHUNK = 2**20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprints(sparse: Sparse, units: Mapping[str, Mapping[str, nn.Parameter]]) -> dict[str, str]:
    """For each unit 16 hexadecimal digits, the same on every rank. Collective."""
    sums = [[0, 0] for _ in units]
    for position, parameters in enumerate(units.values()):
        for name, parameter in parameters.items():
            start, weights = sparse.owned(parameter)
            for which, prime in enumerate(_PRIMES):
                sums[position][which] = (sums[position][which] + _checksum(weights, name, start, prime)) % prime
    total = torch.tensor(sums, dtype=torch.int64, device=sparse.device)
    dist.all_reduce(total)
    return {
        unit: "".join(f"{value % prime:08x}" for value, prime in zip(values, _PRIMES, strict=True))
        for unit, values in zip(units, total.tolist(), strict=True)
    }


def _checksum(weights: Tensor, name: str, start: int, prime: int) -> int:
    """Of elements [start, ...) of the flat parameter `name`."""
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
