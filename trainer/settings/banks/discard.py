"""Settings of `trainer/engine/banks/discard.py`."""

from typing import ClassVar, Literal

from pydantic import Field

from trainer.settings.banks.base import BankSettings


class DiscardSettings(BankSettings):
    """Keep nothing."""

    implementation: ClassVar[str] = "trainer.engine.banks.discard:Discard"
    place: ClassVar[Literal["device", "host"] | None] = None

    name: Literal["discard"] = Field(
        "discard",
        description="Discard optimizer state and fp32 master weights at a switch. With substrate.name=adapter the "
        "default is device.",
    )
    redrawn: Literal["reset", "keep"] = Field(
        "reset",
        description="State of a block that is drawn twice in a row. reset: discarded like that of any other block, as "
        "published for LISA and BAdam; keep: the block continues with it. Always-on parts always keep theirs.",
    )
