"""Update rules decide what is trained inside an active block, and how. One file per rule; `build` is the registry."""

from typing import Any

from trainer.updates.base import UpdateError, UpdateRule
from trainer.updates.dense import Dense
from trainer.updates.unmask import Unmask

REGISTRY: dict[str, type[UpdateRule]] = {"dense": Dense, "unmask": Unmask}


def build(name: str, **settings: Any) -> UpdateRule:
    """The update rule `name` with its settings; raises `ValueError` for an unknown name."""
    if name not in REGISTRY:
        raise ValueError(f"update.name: unknown update rule '{name}'; allowed: {', '.join(REGISTRY)}")
    return REGISTRY[name](**settings)


__all__ = ["Dense", "REGISTRY", "Unmask", "UpdateError", "UpdateRule", "build"]
