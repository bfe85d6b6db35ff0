"""Settings of `trainer/engine/banks/cpu.py`."""

from typing import ClassVar, Literal

from pydantic import Field

from trainer.settings.banks.base import BankSettings


class CpuSettings(BankSettings):
    """Keep copies in host memory."""

    implementation: ClassVar[str] = "trainer.engine.banks.cpu:Cpu"
    place: ClassVar[Literal["device", "host"] | None] = "host"

    name: Literal["cpu"] = Field("cpu", description="Keep optimizer state and fp32 master weights in host memory.")
