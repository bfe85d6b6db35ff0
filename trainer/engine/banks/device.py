"""The bank on the device."""

from __future__ import annotations

from torch import Tensor

from trainer.engine.banks.base import KeepingBank


class Device(KeepingBank):
    """Keep master weights and moments on their device, as copies: 12 bytes for each inactive parameter that was
    ever active. Suits small state, such as that of adapters: nothing is transferred.
    """

    def _copy(self, value: Tensor) -> Tensor:
        return value.clone()
