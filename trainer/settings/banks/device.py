"""Settings of `trainer/engine/banks/device.py`."""

from typing import ClassVar, Literal

from pydantic import Field

from trainer.settings.banks.base import BankSettings


class DeviceSettings(BankSettings):
    """Keep copies on the device."""

    implementation: ClassVar[str] = "trainer.engine.banks.device:Device"
    place: ClassVar[Literal["device", "host"] | None] = "device"

    name: Literal["device"] = Field(
        "device",
        description="Keep copies of optimizer state and fp32 master weights in the same memory, usually the GPU's.",
    )
