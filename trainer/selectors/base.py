"""What every selector promises: a pure choice, and optionally a measurement that informs the next ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Measurement:
    """A wish for the prober: `kind` over each of `trials`, a tuple of block sets.

    `ablated_loss`: the loss on one probe batch for each trial, with the blocks of that trial suppressed to `factor` of
    what they add (0 removes it): their residual contribution, or with adapters the adapters' effect. The answer is one
    number per trial, averaged over all ranks' target tokens.
    """

    kind: Literal["ablated_loss"]
    trials: tuple[tuple[int, ...], ...]
    factor: float = 0.0


def keyed_generator(seed: int, *key: int) -> np.random.Generator:
    """A private generator that depends on (seed, key) alone, so that every rank draws the same."""
    return np.random.default_rng(np.random.SeedSequence([seed, *key]))


class Selector(ABC):
    """Chooses the active blocks of an interval of `interval` optimizer steps.

    `select` is pure: the same seed, interval number, number of blocks and observed state give the same blocks on
    every rank. It always returns `num_active` distinct blocks, because the optimizer's groups are slots of fixed
    number. A selector that learns states what it wants in `needs` and is told the answer in `observe`; the engine's
    prober measures, the selector never touches the model.
    """

    # Whether `needs` ever asks for something; then the engine must be given batches to probe with.
    measures = False

    def __init__(self, *, interval: int, seed: int) -> None:
        if interval < 1:
            raise ValueError(f"selector.interval: {interval}; allowed: 1 or more optimizer steps")
        self.interval = interval
        self.seed = seed

    @abstractmethod
    def num_active(self, num_blocks: int) -> int:
        """How many blocks are active at a time; raises `ValueError` if `num_blocks` are too few."""

    @abstractmethod
    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        """The blocks of interval number `interval` (from 0), ascending and distinct."""

    def reachable(self, num_blocks: int) -> Sequence[int]:
        """The blocks that may ever be chosen."""
        return range(num_blocks)

    def needs(self, step: int) -> Measurement | None:
        """The measurement wanted before optimizer step `step` (from 0), if any."""
        return None

    def observe(self, measurement: Measurement, result: tuple[float, ...]) -> None:
        """Receive the answer to `measurement`: one number per trial, the same on every rank."""

    def importance(self) -> tuple[float, ...] | None:
        """What was learned: a number for each block, larger where the block matters more; None: nothing is learned."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What was learned from measurements, as JSON-compatible values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


def require_blocks(wanted: int, num_blocks: int) -> int:
    """`wanted`, if a model of `num_blocks` blocks can provide it."""
    if not 1 <= wanted <= num_blocks:
        raise ValueError(f"selector.blocks: {wanted}; allowed: 1 to {num_blocks}, the number of blocks of this model")
    return wanted
