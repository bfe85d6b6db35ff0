"""Update rules decide what is trained inside an active block, and how. One file per rule.

A rule's settings, and the line that registers it, are in `trainer/settings/updates`.
"""

from __future__ import annotations

from trainer.settings import implementation
from trainer.settings.updates import REGISTRY
from trainer.updates.base import Footprint, Transient, UpdateError, UpdateRule
from trainer.updates.dense import Dense
from trainer.updates.unmask import Unmask


def rule(name: str) -> type[UpdateRule]:
    """Return the class of the update rule `name`. Raises `ValueError` for an unknown name."""
    if name not in REGISTRY:
        raise ValueError(f"update.name: unknown update rule '{name}'; allowed: {', '.join(REGISTRY)}")
    found: type[UpdateRule] = implementation(REGISTRY[name].implementation)
    return found


__all__ = ["Dense", "Footprint", "Transient", "Unmask", "UpdateError", "UpdateRule", "rule"]
