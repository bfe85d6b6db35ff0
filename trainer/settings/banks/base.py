"""The base of the settings of all banks."""

from typing import ClassVar, Literal

from trainer.settings import Section


class BankSettings(Section):
    """Settings of a bank. The fields are the keys below `bank`; `name` chooses the bank."""

    # The class in `trainer/engine/banks`, as "module:Class".
    implementation: ClassVar[str]
    # The memory in which state is kept: beside the weights, or in host memory. None: no state is kept.
    place: ClassVar[Literal["device", "host"] | None]

    name: str = ""
