"""Selectors decide which blocks train in an interval. One file per selector, with its settings, and a line here."""

from typing import Any

from trainer.selectors.all import All
from trainer.selectors.base import Measurement, MeasuringSelector, Selector, keyed_generator
from trainer.selectors.cyclic import Cyclic
from trainer.selectors.fixed import Fixed
from trainer.selectors.importance import Importance
from trainer.selectors.uniform import Uniform

REGISTRY: dict[str, type[Selector]] = {
    "uniform": Uniform,
    "cyclic": Cyclic,
    "fixed": Fixed,
    "all": All,
    "importance": Importance,
}


def build(name: str, *, seed: int = 0, **settings: Any) -> Selector:
    """Return the selector `name` with its settings. Raises `ValueError` for an unknown name or a wrong value."""
    if name not in REGISTRY:
        raise ValueError(f"selector.name: unknown selector '{name}'; allowed: {', '.join(REGISTRY)}")
    return REGISTRY[name](seed=seed, **settings)


__all__ = [
    "All",
    "Cyclic",
    "Fixed",
    "Importance",
    "Measurement",
    "MeasuringSelector",
    "REGISTRY",
    "Selector",
    "Uniform",
    "build",
    "keyed_generator",
]
