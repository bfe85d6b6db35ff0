"""The interface of selectors: settings, a pure choice, and optionally a measurement that informs later choices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from trainer.settings import Count, Section

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Measurement:
    """A request to the prober: `kind` over each of `trials`, a tuple of block sets.

    `ablated_loss`: the loss on one probe batch for each trial, with the residual contribution of the trial's blocks, or
    with adapters their adapters' effect, scaled by `factor` (0 removes it). The answer is one number per trial, the
    mean over the target tokens of all ranks.
    """

    kind: Literal["ablated_loss"]
    trials: tuple[tuple[int, ...], ...]
    factor: float = 0.0


def keyed_generator(seed: int, *key: int) -> np.random.Generator:
    """Return a private generator that depends on (seed, key) alone, so that every rank draws the same."""
    import numpy as np  # late: its threads are set up before it is imported

    return np.random.default_rng(np.random.SeedSequence([seed, *key]))


class Selector(Section, ABC):
    """Choose the active blocks of an interval of `interval` optimizer steps.

    A selector is its own settings: the fields of a subclass are the keys below `selector` in a recipe, and `name`
    selects the class. Wrong values raise `pydantic.ValidationError`, a `ValueError`.

    `select` is pure: the same seed, interval number, number of blocks and observed state give the same blocks on
    every rank. It always returns `num_active` distinct blocks, because the optimizer's groups are slots of fixed
    number. A selector that learns requests measurements in `needs` and receives the answers in `observe`; the engine's
    prober measures, the selector never touches the model. It stores what it learns in other attributes, because fields
    are immutable.
    """

    model_config = ConfigDict(hide_input_in_errors=False)

    # Whether `needs` ever requests a measurement; then the engine requires probe batches.
    measures: ClassVar[bool] = False
    # Whether the same blocks train throughout, in any model: then no bank is ever used.
    constant: ClassVar[bool] = False

    name: str = ""
    interval: Count
    # Seed of the draws. Not a key in a recipe: there the run's `seed` is used.
    seed: Annotated[int, Field(ge=0)] = Field(0, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _plain_numbers(cls, values: Any) -> Any:
        """Turn NumPy's numbers and arrays into Python's, which settings require."""
        if not isinstance(values, dict):
            return values
        return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in values.items()}

    def __init__(self, **settings: Any) -> None:
        own = dict(self.__dict__)  # what a subclass set before this call
        super().__init__(**settings)
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields or name.startswith("_"):
            super().__setattr__(name, value)  # refuses fields
        else:
            object.__setattr__(self, name, value)

    def seeded(self, seed: int) -> Self:
        """Return a copy that draws from `seed` and has learned nothing."""
        return type(self)(**self.model_dump(), seed=seed)

    @abstractmethod
    def num_active(self, num_blocks: int) -> int:
        """Return how many blocks are active at a time. Raises `ValueError` if `num_blocks` are too few."""

    @abstractmethod
    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        """Return the blocks of interval number `interval` (from 0), ascending and distinct."""

    def reachable(self, num_blocks: int) -> Sequence[int]:
        """Return the blocks that may ever be chosen."""
        return range(num_blocks)

    def changes(self, num_blocks: int) -> bool:
        """Return whether intervals may differ in their blocks; False if the same ones train throughout."""
        return not self.constant and len(self.reachable(num_blocks)) > self.num_active(num_blocks)

    def needs(self, step: int) -> Measurement | None:
        """Return the measurement wanted before optimizer step `step` (from 0), if any."""
        return None

    def observe(self, measurement: Measurement, result: tuple[float, ...]) -> None:
        """Receive the answer to `measurement`: one number per trial, the same on every rank."""

    def importance(self) -> tuple[float, ...] | None:
        """Return what was learned: a number for each block, larger if the block matters more; None if the selector
        does not learn."""
        return None

    def warnings(self, num_steps: int) -> list[str]:
        """Return what a user should know before a run of `num_steps` optimizer steps."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned from measurements, as JSON-compatible values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class ProbeConfig(Section):
    """The batches of probes."""

    batch_size: Count = Field(16, description="Sequences (or packed rows) in the batch of a probe, over all ranks.")
    data: Literal["train", "eval"] = Field("train", description="Data from which the batches of probes are taken.")


class MeasuringSelector(Selector):
    """A selector that learns from probes; `probe` describes their batches."""

    measures: ClassVar[bool] = True

    probe: ProbeConfig = ProbeConfig()


def require_blocks(wanted: int, num_blocks: int) -> int:
    """Return `wanted` if a model of `num_blocks` blocks can provide it; raise `ValueError` otherwise."""
    if not 1 <= wanted <= num_blocks:
        raise ValueError(f"selector.blocks: {wanted}; allowed: 1 to {num_blocks}, the number of blocks of this model")
    return wanted
