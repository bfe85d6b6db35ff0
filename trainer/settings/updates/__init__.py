"""Settings of the update rules; one file per rule. Each names its implementation in `trainer/updates`."""

from trainer.settings.updates.base import UpdateSettings
from trainer.settings.updates.dense import DenseSettings
from trainer.settings.updates.unmask import UnmaskSettings

REGISTRY: dict[str, type[UpdateSettings]] = {
    "dense": DenseSettings,
    "unmask": UnmaskSettings,
}

__all__ = ["REGISTRY", "DenseSettings", "UnmaskSettings", "UpdateSettings"]
