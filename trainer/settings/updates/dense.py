"""Settings of `trainer/updates/dense.py`."""

from typing import ClassVar, Literal

from pydantic import Field

from trainer.settings.updates.base import UpdateSettings


class DenseSettings(UpdateSettings):
    """Train all weights of an active block with DeepSpeed's optimizer."""

    implementation: ClassVar[str] = "trainer.updates.dense:Dense"

    name: Literal["dense"] = Field("dense", description="Train all weights of an active block with the optimizer.")
