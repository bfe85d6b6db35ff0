"""Each rank's share of every parameter, which it updates outside the optimizer and writes into checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic

import torch
from deepspeed import comm as dist
from torch import Tensor

from trainer.engine.zero.parameters import P
from trainer.model.blocks import full_numel
from trainer.model.ownership import own_bounds, share_size


class Shares(ABC, Generic[P]):
    """This rank's share of parameters, which the other ranks learn of when it is published."""

    def owned_start(self, parameter: P) -> int:
        """Return where `owned_range` begins in the flat parameter."""
        return own_bounds(full_numel(parameter))[0]

    @abstractmethod
    def local_shard(self, parameter: P) -> Tensor:
        """Return the weights that this rank stores, flat: all of them below stage 3, its partition there."""

    @abstractmethod
    def owned_range(self, parameter: P) -> Tensor:
        """Return the live weights of this rank's share, flat. Call `publish` after writing to them."""

    @abstractmethod
    def publish(self, parameter: P) -> None:
        """Give every rank that stores `parameter` the shares of the others. Collective."""

    @abstractmethod
    def publish_entries(self, entries: Sequence[tuple[P, Tensor]]) -> None:
        """Publish several parameters in one exchange. Only the given flat positions (int64, the same on every rank) may
        have been written to. Collective."""


class SharesOfWholes(Shares[P]):
    """Every rank stores whole parameters: stages 0 to 2."""

    def local_shard(self, parameter: P) -> Tensor:
        return parameter.data.view(-1)

    def owned_range(self, parameter: P) -> Tensor:
        start, stop = own_bounds(parameter.numel())
        return parameter.data.view(-1)[start:stop]

    def publish(self, parameter: P) -> None:
        ranks, numel = dist.get_world_size(), parameter.numel()
        chunk = share_size(numel, ranks)
        mine = parameter.data.new_zeros(chunk)
        owned = self.owned_range(parameter)
        mine[: owned.numel()] = owned
        whole = parameter.data.new_empty(chunk * ranks)
        dist.all_gather_into_tensor(whole, mine)
        parameter.data.view(-1).copy_(whole[:numel])

    def publish_entries(self, entries: Sequence[tuple[P, Tensor]]) -> None:
        # Sends 4 bytes for each entry.
        if dist.get_world_size() == 1 or not entries:
            return
        flat = torch.cat([_owned_entries(parameter, positions) for parameter, positions in entries])
        dist.all_reduce(flat)  # adds zeros to one value: exact
        values = flat.split([positions.numel() for _, positions in entries])
        for (parameter, positions), value in zip(entries, values, strict=True):
            parameter.data.view(-1)[positions] = value.to(parameter.dtype)


def _owned_entries(parameter: Tensor, positions: Tensor) -> Tensor:
    """Return the weights at `positions` (fp32), zero if another rank owns them."""
    start, stop = own_bounds(parameter.numel())
    mine = (positions >= start) & (positions < stop)
    return parameter.data.view(-1)[positions].float().where(mine, 0.0)
