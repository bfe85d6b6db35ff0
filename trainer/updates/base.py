"""What every update rule promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from trainer.blocks import Block


class UpdateError(ValueError):
    """A step that the rule cannot take, on all ranks; the text says which setting to change."""


class UpdateRule(ABC):
    """What is trained inside an active block, and how.

    `dense` hands whole tensors to DeepSpeed's optimizer. A sparse rule keeps some or all of a block's tensors out of
    it (`in_optimizer`), receives their local gradients instead, owns whatever state it needs and makes the step
    itself. Local means this rank's flat range of the parameter, which is the same range at every call: rank r has
    elements [r c, (r + 1) c) of the flat parameter, c = ceil(numel / ranks).

    In an optimizer step each parameter is received once for each micro-batch, then `begin_step` is called once, then
    `step` for each parameter. A step that is skipped ends with `discard` instead.
    """

    # Whether always-on parts outside the blocks are the rule's as well, rather than DeepSpeed's optimizer's.
    whole_model = False
    # Largest norm of what the rule applies in a step, over all its parameters and ranks; 0: no limit.
    gradient_clipping = 0.0

    @abstractmethod
    def in_optimizer(self, block: Block) -> set[str]:
        """Names of the block's parameters that DeepSpeed's optimizer trains; the same kinds in every block."""

    def prepare(self, parameters: Mapping[str, nn.Parameter], *, reachable: Collection[str]) -> None:
        """Once, before anything is allocated: all parameters that could be the rule's to train, in the same order on
        every rank, and the names of those that the selector ever reaches. Raises `ValueError` where the rule's settings
        do not fit."""

    def enter(self, name: str, weights: Tensor) -> None:
        """The parameter `name` becomes active; `weights` are this rank's, flat."""

    def wanted(self, name: str) -> Tensor | None:
        """Flat positions in the parameter (int64, the same on every rank) of the only gradients that `receive` wants;
        None: of this rank's whole range."""
        return None

    def moved(self, name: str) -> Tensor | None:
        """Flat positions in the parameter (int64, the same on every rank) that `step` may have changed; None: any."""
        return None

    def receive(self, name: str, gradient: Tensor, weights: Tensor, *, last: bool) -> None:
        """Add one micro-batch's gradient (fp32, mean over ranks, this rank's range) to what this step has received. It
        is the rule's to keep and to change.

        `last` says that no other follows in this step; where nobody knows, it is never set. If the rule named what it
        wants, the gradient is of all those positions, and comes once for all micro-batches.
        """

    def begin_step(self, weights: Mapping[str, Tensor]) -> None:
        """All gradients of the step are there; `weights` are this rank's of all active parameters. Collective."""

    def step(self, name: str, weights: Tensor, *, lr: float) -> None:
        """Update this rank's `weights` (flat) in place with what was received, and forget it."""

    def discard(self) -> None:
        """Forget all that was received: the step was skipped for infinite or NaN gradients, on this or another rank."""

    def leave(self, name: str, *, keep: bool) -> None:
        """The parameter `name` is frozen again; its optimizer state is to be kept until it enters again, or dropped."""

    def figures(self) -> dict[str, float]:
        """What is worth a line beside a step's loss, by name; the same on every rank."""
        return {}

    def held(self) -> dict[str, list[Tensor]]:
        """The live tensors of the rule on this rank by kind: `gradients`, `masters`, `moments`, `indices`."""
        return {}

    def slices(self, name: str) -> dict[str, Tensor]:
        """This rank's state of one parameter for a checkpoint: `indices` (flat positions in the parameter, int64) and
        tensors of one value for each; empty without state."""
        return {}

    def restore(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take back what all ranks' `slices(name)` make together, one after the other, on any number of ranks."""

    def state_dict(self) -> dict[str, Any]:
        """What is the same on every rank, as JSON-compatible values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
