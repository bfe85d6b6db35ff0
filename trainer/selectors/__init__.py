"""Selectors decide which blocks train in an interval. One file per selector; `build` is the registry."""

from trainer.selectors.base import Measurement, Selector, keyed_generator
from trainer.selectors.cyclic import Cyclic
from trainer.selectors.every import All
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


def build(name: str, *, seed: int, **settings: object) -> Selector:
    """The selector `name` with its settings; raises `ValueError` for an unknown name."""
    if name not in REGISTRY:
        raise ValueError(f"selector.name: unknown selector '{name}'; allowed: {', '.join(REGISTRY)}")
    return REGISTRY[name](seed=seed, **settings)


__all__ = [
    "All",
    "Cyclic",
    "Fixed",
    "Importance",
    "Measurement",
    "REGISTRY",
    "Selector",
    "Uniform",
    "build",
    "keyed_generator",
]
