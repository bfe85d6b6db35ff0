"""Settings of the banks; one file per bank. Each names its implementation in `trainer/engine/banks`."""

from trainer.settings.banks.base import BankSettings
from trainer.settings.banks.cpu import CpuSettings
from trainer.settings.banks.device import DeviceSettings
from trainer.settings.banks.discard import DiscardSettings

REGISTRY: dict[str, type[BankSettings]] = {
    "discard": DiscardSettings,
    "device": DeviceSettings,
    "cpu": CpuSettings,
}

__all__ = ["REGISTRY", "BankSettings", "CpuSettings", "DeviceSettings", "DiscardSettings"]
