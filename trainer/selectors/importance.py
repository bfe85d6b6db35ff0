"""IST's selector: learn which blocks matter by suppressing some and comparing losses; train those more often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from trainer.selectors.base import Measurement, MeasuringSelector, keyed_generator
from trainer.settings import Count, Positive, Share

if TYPE_CHECKING:
    import numpy as np

# After this many draws the scores are ignored, so that drawing different sets always ends.
_REDRAWS = 100
# First element of the generators' keys: an interval and an update with the same number draw independently.
_INTERVAL, _UPDATE = 0, 1


def rewards(losses: Sequence[float]) -> list[float]:
    """Return r_k = exp(-loss_k) - mean_j exp(-loss_j), [probes]: above zero if suppression did less harm than average.

    IST, arXiv 2410.11772. A loss that is NaN counts as infinite. Raises `ValueError` for losses far below zero.
    """
    try:
        gained = [0.0 if math.isnan(loss) else math.exp(-loss) for loss in losses]
    except OverflowError:
        gained = [math.inf]
    if math.inf in gained:
        raise ValueError(
            f"probe losses {[float(loss) for loss in losses]}: exp(-loss) must be finite; return a loss of about 0 or "
            "more"
        )
    mean = sum(gained) / len(gained)
    return [each - mean for each in gained]


def log_sigmoid(value: float) -> float:
    """Return log(sigmoid(value)) without overflow."""
    return min(value, 0.0) - math.log1p(math.exp(-abs(value)))


def updated_dispensability(
    dispensability: Sequence[float], suppressed: Sequence[Sequence[int]], losses: Sequence[float], *, rate: float
) -> tuple[float, ...]:
    """Return D_i + rate * sum over the probes k that suppressed block i of r_k p_i (1 - p_i), with p = sigmoid(D).

    `dispensability` [blocks] grows if a block matters *less* (the paper's code calls it importance); `losses`
    [probes] are those with the blocks of `suppressed[k]` suppressed. All probes use the p from before the update.
    """
    result = list(dispensability)
    for blocks, reward in zip(suppressed, rewards(losses), strict=True):
        for block in blocks:
            share = math.exp(log_sigmoid(dispensability[block]))
            result[block] += rate * reward * share * (1 - share)
    return tuple(result)


def draw(log_weights: Sequence[float], size: int, generator: np.random.Generator) -> tuple[int, ...]:
    """Draw `size` of [blocks] one after the other without replacement, with probabilities as exp(log_weights).

    By the largest of log_weights + Gumbel noise, which is the same distribution and has no weights that round to zero.
    """
    noise = generator.gumbel(size=len(log_weights)).tolist()
    ranked = sorted(range(len(log_weights)), key=lambda block: -(log_weights[block] + noise[block]))
    return tuple(sorted(ranked[:size]))


def _count(share: float, num_blocks: int) -> int:
    """Return floor(share * num_blocks), robust to floating-point error."""
    return math.floor(share * num_blocks + 1e-9)


class Importance(MeasuringSelector):
    """Draw blocks without replacement, those that matter more often (IST, arXiv 2410.11772, and its code `ist.py`).

    Every `update_every` steps the loss of one probe batch is measured `probes` times, each time with another
    `suppressed_share` of the blocks scaled by `suppression_factor`, and the scores learn from it
    (`updated_dispensability`). Suppressed are the more dispensable ones, with weights sigmoid(D); `active_share` of the
    blocks train, drawn with weights sigmoid(-D). Shares are rounded down.
    """

    name: Literal["importance"] = Field(
        "importance", description="Learn which blocks matter, and train those more often (IST)."
    )
    active_share: Share = Field(0.25, description="Share of the blocks that are active at a time, rounded down.")
    interval: Count = Field(1, description="Optimizer steps between two draws of blocks.")
    update_every: Count = Field(10, description="Optimizer steps between two updates of the importance.")
    probes: Annotated[int, Field(ge=2)] = Field(
        3, description="Probes per update. Each measures the loss of one batch with another set of blocks suppressed."
    )
    suppressed_share: Share = Field(0.5, description="Share of the blocks that a probe suppresses, rounded down.")
    suppression_factor: Annotated[float, Field(ge=0, le=1)] = Field(
        0.25, description="Factor by which a suppressed block (with adapters: its adapters) contributes."
    )
    reward_rate: Positive = Field(10.0, description="Step size of an update of the importance.")

    # [blocks]; None before the number of blocks is known.
    _dispensability: tuple[float, ...] | None = PrivateAttr(None)

    def num_active(self, num_blocks: int) -> int:
        if num_blocks < 2:
            raise ValueError(f"selector.name: importance compares blocks, and this model has {num_blocks}; use all")
        least = math.ceil(1000 / num_blocks) / 1000  # as a number to type, and enough for one block
        active = _count(self.active_share, num_blocks)
        if not active:
            raise ValueError(
                f"selector.active_share: {self.active_share} of {num_blocks} blocks is none; allowed: {least} or more"
            )
        suppressed = _count(self.suppressed_share, num_blocks)
        sets = math.comb(num_blocks, suppressed)
        if sets < 2:
            raise ValueError(
                f"selector.suppressed_share: {self.suppressed_share} of {num_blocks} blocks leaves one set to "
                f"suppress, and selector.probes={self.probes} different ones are compared; allowed: {least} to below 1"
            )
        if sets < self.probes:
            allowed = "2" if sets == 2 else f"2 to {sets}"
            raise ValueError(
                f"selector.probes: {self.probes}, but {suppressed} of {num_blocks} blocks (selector.suppressed_share "
                f"{self.suppressed_share}) make {sets} different sets; allowed: {allowed}"
            )
        return active

    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        size = self.num_active(num_blocks)
        scores = self._scores(num_blocks)
        generator = keyed_generator(self.seed, _INTERVAL, interval)
        return draw([log_sigmoid(-score) for score in scores], size, generator)

    def needs(self, step: int) -> Measurement | None:
        if self._dispensability is None or step == 0 or step % self.update_every:
            return None
        trials = self._suppressed_sets(step // self.update_every)
        return Measurement(kind="ablated_loss", trials=trials, factor=self.suppression_factor)

    def observe(self, measurement: Measurement, result: tuple[float, ...]) -> None:
        assert self._dispensability is not None  # it asked for this
        self._dispensability = updated_dispensability(
            self._dispensability, measurement.trials, result, rate=self.reward_rate
        )

    def importance(self) -> tuple[float, ...] | None:
        # From zero, so that what was not measured is not -0.0.
        return None if self._dispensability is None else tuple(0.0 - score for score in self._dispensability)

    def warnings(self, num_steps: int) -> list[str]:
        if self.update_every < num_steps:
            return []
        return [
            f"WARNING: the importance of blocks is never measured: selector.update_every is {self.update_every}, but "
            f"the run has {num_steps} steps. Lower selector.update_every"
        ]

    def state_dict(self) -> dict[str, Any]:
        return {} if self._dispensability is None else {"dispensability": list(self._dispensability)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "dispensability" in state:
            self._dispensability = tuple(map(float, state["dispensability"]))

    def _scores(self, num_blocks: int) -> tuple[float, ...]:
        if self._dispensability is None:
            self._dispensability = (0.0,) * num_blocks
        if len(self._dispensability) != num_blocks:
            raise ValueError(f"{len(self._dispensability)} blocks were scored before, this model has {num_blocks}")
        return self._dispensability

    def _suppressed_sets(self, update: int) -> tuple[tuple[int, ...], ...]:
        """Return `probes` different sets; `num_active` has checked that there are that many."""
        assert self._dispensability is not None
        scores = [log_sigmoid(score) for score in self._dispensability]
        size = _count(self.suppressed_share, len(scores))
        generator = keyed_generator(self.seed, _UPDATE, update)
        chosen: list[tuple[int, ...]] = []
        draws = 0
        while len(chosen) < self.probes:
            draws += 1
            candidate = draw(scores if draws <= _REDRAWS else [0.0] * len(scores), size, generator)
            if candidate not in chosen:
                chosen.append(candidate)
        return tuple(chosen)
