"""Banks keep or discard master weights and optimizer state of inactive blocks. One file per bank.

A bank's settings, and the line that registers it, are in `trainer/settings/banks`.
"""

from __future__ import annotations

from typing import Any

from trainer.engine.banks.base import Bank, KeepingBank
from trainer.settings import implementation
from trainer.settings.banks import REGISTRY


def build(name: str, **settings: Any) -> Bank:
    """Return the bank `name` with its settings. Raises `ValueError` for an unknown name."""
    if name not in REGISTRY:
        raise ValueError(f"bank.name: unknown bank '{name}'; allowed: {', '.join(REGISTRY)}")
    bank: Bank = implementation(REGISTRY[name].implementation)(**settings)
    return bank


__all__ = ["Bank", "KeepingBank", "build"]
