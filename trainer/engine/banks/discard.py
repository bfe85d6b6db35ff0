"""The bank that keeps no state."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from trainer.engine.banks.base import Bank
from trainer.engine.zero.slices import Slice

logger = logging.getLogger(__name__)


class Discard(Bank):
    """Discard state: a block starts each interval with fresh moments and with master weights copied from its weights.

    LISA (arXiv 2403.17919) and BAdam (arXiv 2404.02827) do the same, also if a block is drawn twice in a row. With
    `redrawn="keep"` such a block continues with its state. If the selector always chooses the same blocks, as in full
    fine-tuning, there is no switch and all state is kept.
    """

    keeps = False

    def __init__(self, *, redrawn: Literal["reset", "keep"] = "reset") -> None:
        if redrawn not in ("reset", "keep"):
            raise ValueError(f"bank.redrawn: got {redrawn!r}; allowed: reset, keep")
        self.redrawn = redrawn

    def put(self, slices: Sequence[Slice]) -> None:
        return None

    def holds(self, names: Sequence[str]) -> bool:
        return False

    def layout(self, names: Sequence[str]) -> tuple[set[str], dict[str, float]]:
        return set(), {}

    def take(self, slices: Sequence[Slice]) -> None:
        raise AssertionError("the discard bank holds nothing")


def redrawn_as_recorded(state: Mapping[str, Any], bank: Bank, *, warn: bool) -> Literal["reset", "keep"] | None:
    """Return what happens to a block that is drawn twice in a row in a run that resumes from `state`.

    That is the setting that the run began with, whatever `bank` is set to now.
    """
    recorded = state.get("redrawn", "keep") or bank.redrawn  # earlier versions recorded nothing, and kept
    if recorded != bank.redrawn and warn and torch.distributed.get_rank() == 0:
        logger.warning(
            "bank.redrawn is %s in this run, not %s: it began with a version in which a block that is drawn twice "
            "in a row kept its state. To change that, start anew (resume=never)",
            recorded,
            bank.redrawn,
        )
    return recorded
