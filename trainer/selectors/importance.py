"""IST's selector: learns which blocks matter by suppressing some and watching the loss, and trains those more often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.selectors.base import Measurement, Selector, keyed_generator

# Draws of a set that was drawn before, after which the scores are left aside, so that drawing ends.
_REDRAWS = 100
# What the keys of the generators begin with, so that an interval and an update of one number draw apart.
_INTERVAL, _UPDATE = 0, 1


def rewards(losses: Tensor) -> Tensor:
    """r_k = exp(-loss_k) - mean_j exp(-loss_j), [probes]: above zero where suppression did less harm than on average.

    IST, arXiv 2410.11772. A loss that is NaN counts as infinite.
    """
    gained = torch.exp(-losses.nan_to_num(nan=math.inf, posinf=math.inf))
    if not gained.isfinite().all():
        raise ValueError(f"probe losses {losses.tolist()}: exp(-loss) must be finite; return a loss of about 0 or more")
    return gained - gained.mean()


def updated_dispensability(
    dispensability: Tensor, suppressed: Sequence[Sequence[int]], losses: Tensor, *, rate: float
) -> Tensor:
    """D_i + rate * sum over the probes k that suppressed block i of r_k p_i (1 - p_i), with p = sigmoid(D).

    `dispensability` [blocks] grows where a block matters *less* (the paper's code calls it importance); `losses`
    [probes] are those with the blocks of `suppressed[k]` suppressed. All probes use the p from before the update.
    """
    share = torch.sigmoid(dispensability)
    slope = share * (1 - share)
    result = dispensability.clone()
    for blocks, reward in zip(suppressed, rewards(losses), strict=True):
        chosen = list(blocks)
        result[chosen] += rate * reward * slope[chosen]
    return result


def draw(log_weights: Tensor, size: int, generator: np.random.Generator) -> tuple[int, ...]:
    """`size` of [blocks], one after the other without replacement, with probabilities as exp(log_weights).

    By the largest of log_weights + Gumbel noise, which is the same distribution and has no weights that round to zero.
    """
    noise = torch.from_numpy(generator.gumbel(size=log_weights.numel()))
    return tuple(sorted((log_weights + noise).topk(size).indices.tolist()))


def _count(share: float, num_blocks: int) -> int:
    """So many of the blocks, rounded down; 0.29 of 100 is 29, whatever 0.29 * 100 gives."""
    return math.floor(share * num_blocks + 1e-9)


class Importance(Selector):
    """Blocks drawn without replacement, those that matter more often (IST, arXiv 2410.11772, and its code `ist.py`).

    Every `update_every` steps the loss of one probe batch is measured `probes` times, each time with another
    `suppressed_share` of the blocks scaled by `suppression_factor`, and the scores learn from it
    (`updated_dispensability`). Suppressed are the more dispensable ones, with weights sigmoid(D); `active_share` of the
    blocks train, drawn with weights sigmoid(-D). Shares are rounded down.
    """

    measures = True

    def __init__(
        self,
        *,
        active_share: float = 0.25,
        suppressed_share: float = 0.5,
        suppression_factor: float = 0.25,
        probes: int = 3,
        update_every: int = 10,
        reward_rate: float = 10.0,
        interval: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(interval=interval, seed=seed)
        for name, value in (("active_share", active_share), ("suppressed_share", suppressed_share)):
            if not 0 < value <= 1:
                raise ValueError(f"selector.{name}: {value}; allowed: above 0, at most 1")
        if not 0 <= suppression_factor <= 1:
            raise ValueError(f"selector.suppression_factor: {suppression_factor}; allowed: 0 to 1")
        for name, least, count in (("probes", 2, probes), ("update_every", 1, update_every)):
            if count < least:
                raise ValueError(f"selector.{name}: {count}; allowed: {least} or more")
        if not 0 < reward_rate < math.inf:
            raise ValueError(f"selector.reward_rate: {reward_rate}; allowed: above 0")
        self.active_share = active_share
        self.suppressed_share = suppressed_share
        self.suppression_factor = suppression_factor
        self.probes = probes
        self.update_every = update_every
        self.reward_rate = reward_rate
        # [blocks], fp64; None before the number of blocks is known.
        self._dispensability: Tensor | None = None

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
        return draw(torch.nn.functional.logsigmoid(-scores), size, generator)

    def needs(self, step: int) -> Measurement | None:
        if self._dispensability is None or step == 0 or step % self.update_every:
            return None
        trials = self._suppressed_sets(step // self.update_every)
        return Measurement(kind="ablated_loss", trials=trials, factor=self.suppression_factor)

    def observe(self, measurement: Measurement, result: tuple[float, ...]) -> None:
        assert self._dispensability is not None  # it asked for this
        losses = torch.tensor(result, dtype=torch.float64)
        self._dispensability = updated_dispensability(
            self._dispensability, measurement.trials, losses, rate=self.reward_rate
        )

    def importance(self) -> tuple[float, ...] | None:
        # From zero, so that what was not measured is not -0.0.
        return None if self._dispensability is None else tuple((0.0 - self._dispensability).tolist())

    def state_dict(self) -> dict[str, Any]:
        return {} if self._dispensability is None else {"dispensability": self._dispensability.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "dispensability" in state:
            self._dispensability = torch.tensor(state["dispensability"], dtype=torch.float64)

    def _scores(self, num_blocks: int) -> Tensor:
        if self._dispensability is None:
            self._dispensability = torch.zeros(num_blocks, dtype=torch.float64)
        if self._dispensability.numel() != num_blocks:
            raise ValueError(f"{self._dispensability.numel()} blocks were scored before, this model has {num_blocks}")
        return self._dispensability

    def _suppressed_sets(self, update: int) -> tuple[tuple[int, ...], ...]:
        """`probes` different sets; `num_active` saw to it that there are so many."""
        assert self._dispensability is not None
        scores = torch.nn.functional.logsigmoid(self._dispensability)
        size = _count(self.suppressed_share, scores.numel())
        generator = keyed_generator(self.seed, _UPDATE, update)
        chosen: list[tuple[int, ...]] = []
        draws = 0
        while len(chosen) < self.probes:
            draws += 1
            candidate = draw(scores if draws <= _REDRAWS else torch.zeros_like(scores), size, generator)
            if candidate not in chosen:
                chosen.append(candidate)
        return tuple(chosen)
