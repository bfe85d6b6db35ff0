"""No ZeRO: the basic optimizer steps the parameters themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from trainer.engine.zero.registration import Registration
from trainer.engine.zero.shares import SharesOfWholes
from trainer.engine.zero.slices import Slice
from trainer.model.ownership import own_bounds


class Stage0(Registration[nn.Parameter]):
    """No ZeRO, fp32: the basic optimizer steps the parameters themselves. The reference for the other stages."""

    stage = "stage 0"
    shares = SharesOfWholes[nn.Parameter]()

    def registered(self) -> list[list[nn.Parameter]]:
        return [list(group["params"]) for group in self.engine.basic_optimizer.param_groups]

    def dispose(self) -> None:
        return None

    def build(self) -> None:
        return None

    def _master(self, index: int) -> Tensor:
        raise AssertionError("stage 0 has one state per parameter, not one per group")

    def all_masters(self) -> list[Tensor]:
        return []  # fp32 weights are their own masters

    def _exchange(self, index: int, leaving: list[nn.Parameter], entering: list[nn.Parameter]) -> None:
        self.engine.basic_optimizer.param_groups[index]["params"] = list(entering)
        for parameter in leaving:
            self.engine.basic_optimizer.state.pop(parameter, None)

    def masters(self, index: int) -> list[Tensor]:
        return [p.detach().view(-1) for p in self.groups[index].values()]

    def _masters_from_weights(self, index: int) -> None:
        return None  # weights are masters

    def forget_state(self, index: int) -> None:
        for parameter in self.groups[index].values():
            self.engine.basic_optimizer.state.pop(parameter, None)

    def _ranges(self, index: int) -> list[tuple[int, int, int]]:
        return [(0, 0, p.numel()) for p in self.groups[index].values()]

    def slices(self, index: int) -> list[Slice]:
        slices = []
        for name, parameter in self.groups[index].items():
            moments, scalars = self.layout.split(self.engine.basic_optimizer, parameter)
            flat = {k: v.view(-1) for k, v in ({"master": parameter.detach()} | moments).items()}
            slices.append(Slice(name, tuple(parameter.shape), 0, parameter.numel(), flat, scalars))
        return slices

    def materialise_state(self, index: int, moments: Iterable[str], scalars: Mapping[str, float]) -> None:
        for parameter in self.groups[index].values():
            state = self.engine.basic_optimizer.state[parameter]
            state.update({key: self.layout.zeros(parameter, key) for key in moments})
            state.update({key: self.layout.scalar(key, value) for key, value in scalars.items()})

    def own_part(self, piece: Slice) -> Slice:
        start, stop = own_bounds(piece.stop)
        return replace(piece, start=start, stop=stop, tensors={k: v[start:stop] for k, v in piece.tensors.items()})
