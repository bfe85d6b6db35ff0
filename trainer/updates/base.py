"""What every update rule promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from trainer.blocks import Block


class UpdateRule(ABC):
    """What is trained inside an active block, and how.

    `dense` hands whole tensors to DeepSpeed's optimizer. A sparse rule keeps some or all of a block's tensors out of
    it (`in_optimizer`), receives their local gradients instead, owns whatever state it needs and makes the step
    itself. Local means this rank's flat range of the parameter, which is the same range at every call: 1-D tensors
    of at most ceil(numel / ranks) elements.
    """

    @abstractmethod
    def in_optimizer(self, block: Block) -> set[str]:
        """Names of the block's parameters that DeepSpeed's optimizer trains; the same kinds in every block."""

    def enter(self, name: str, weights: Tensor) -> None:
        """The parameter `name` becomes active; `weights` are this rank's, flat."""

    def receive(self, name: str, gradient: Tensor) -> None:
        """Add one micro-batch's gradient (fp32, flat, mean over ranks) to what this step has received."""

    def step(self, name: str, weights: Tensor, *, lr: float) -> None:
        """Update this rank's `weights` (flat) in place with what was received, and forget it."""

    def discard(self, name: str) -> None:
        """Forget what was received: the step was skipped for infinite or NaN gradients, on this or another rank."""

    def leave(self, name: str) -> None:
        """The parameter `name` is frozen again."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, as tensors and JSON-compatible values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
