"""The interface of all update rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from trainer.accounting import dense_gradient_bytes
from trainer.config import RunConfig
from trainer.errors import StrataError
from trainer.model.blocks import Block


class UpdateError(StrataError, ValueError):
    """A step that the rule cannot apply, on all ranks; the message names the setting to change."""


@dataclass(frozen=True)
class Transient:
    """`size` bytes that one rank needs during backward. The plan prints "`name` `size` more in backward`when`"."""

    name: str
    size: int
    when: str = ""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rule's own state on one rank, without the weights and DeepSpeed's optimizer.

    `trained` is the number of weights that train at a time, on all ranks. `gradients`, `masters`, `moments` and
    `indices` remain between steps (see `UpdateRule.held`), `kept` is the state of inactive blocks, `backward` exists
    during backward only. `saved` is the size in a checkpoint, of all ranks together.
    """

    trained: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0
    indices: int = 0
    kept: int = 0
    backward: tuple[Transient, ...] = ()
    saved: int = 0


class UpdateRule(ABC):
    """Decide what is trained inside an active block, and how.

    `dense` leaves whole tensors to DeepSpeed's optimizer. A sparse rule keeps some or all of a block's tensors out of
    it (`in_optimizer`), receives their local gradients instead, owns the state that it needs and applies the step
    itself. Local means this rank's flat range of the parameter, which is the same range at every call: rank r owns
    elements [r c, (r + 1) c) of the flat parameter, c = ceil(numel / ranks).

    An optimizer step calls `receive` for each parameter once per micro-batch, then `begin_step` once, then `step` for
    each parameter. A step that is skipped ends with `discard` instead.
    """

    # Whether the rule trains always-on parts outside the blocks as well, instead of DeepSpeed's optimizer.
    whole_model = False
    # Maximum gradient norm in a step, over all parameters of the rule and all ranks; 0: no limit.
    gradient_clipping = 0.0

    @classmethod
    def from_config(cls, config: RunConfig, *, num_steps: int | None) -> Self:
        """Build the rule that `config` describes, for a run of `num_steps` optimizer steps (None: not known yet).

        By default the fields of `config.update` are the keyword arguments of the class. Raises `ConfigError`.
        """
        return cls(**config.update.model_dump(exclude={"name"}))

    @abstractmethod
    def in_optimizer(self, block: Block) -> set[str]:
        """Return the names of the block's parameters in DeepSpeed's optimizer: the same kinds in every block."""

    def bind(self, parameters: Mapping[str, nn.Parameter], *, reachable: Collection[str]) -> None:
        """Prepare the rule, once, before anything is allocated. `parameters`: all that the rule could train, in the
        same order on every rank; `reachable`: the names of those that the selector ever reaches. Raises `ValueError` if
        the rule's settings do not fit them."""

    def enter(self, name: str, weights: Tensor) -> None:
        """Prepare the parameter `name`, which becomes active; `weights` is this rank's flat range of it."""

    def wanted(self, name: str) -> Tensor | None:
        """Return the flat positions in the parameter (int64, the same on every rank) whose gradients alone `receive`
        needs; None: it needs those of this rank's whole range."""
        return None

    def moved(self, name: str) -> Tensor | None:
        """Return flat positions in the parameter (int64, the same on every rank) that `step` may change; None: all."""
        return None

    def receive(self, name: str, gradient: Tensor, weights: Tensor, *, last: bool) -> None:
        """Add one micro-batch's `gradient` (flat, fp32, mean over ranks, of this rank's range) to those that this step
        has received. The rule may keep and change it.

        `last`: this is known to be the step's last micro-batch. If `wanted` returned positions, `gradient` has a value
        for each of them, and comes once per step, summed over micro-batches.
        """

    def begin_step(self, weights: Mapping[str, Tensor]) -> None:
        """Begin a step whose gradients are all received; `weights`: this rank's range of each active parameter, flat.
        Collective."""

    def step(self, name: str, weights: Tensor, *, lr: float) -> None:
        """Update this rank's `weights` (flat) in place with the received gradients, then drop the gradients."""

    def discard(self) -> None:
        """Drop all received gradients: the step was skipped, as some are infinite or NaN on this or another rank."""

    def leave(self, name: str, *, keep: bool) -> None:
        """Freeze the parameter `name` again: `keep` its optimizer state until it enters again, or drop the state."""

    def footprint(
        self, active: Sequence[int], inactive: Sequence[int], *, ranks: int, weight_bytes: int, accumulation: int
    ) -> Footprint:
        """Return what the rule stores. `active`: the number of elements of each parameter that trains; `inactive`: of
        each whose state is kept meanwhile, empty if the bank drops it. Called before training.

        The default is right for a rule that keeps an fp32 master weight and two fp32 moments for every weight, and the
        sum of a step's gradients; it is zero for a rule that trains no parameters itself.
        """
        if not active:
            return Footprint()
        part, kept = (sum(-(-numel // ranks) for numel in numels) for numels in (active, inactive))
        return Footprint(
            trained=sum(active),
            masters=4 * part,
            moments=8 * part,
            kept=12 * kept,
            backward=(
                dense_gradient(active, ranks=ranks, weight_bytes=weight_bytes),
                Transient("sums", 4 * part, ": the gradients of a step"),
            ),
            saved=24 * (sum(active) + sum(inactive)),  # position, weight, master, moments
        )

    def warnings(self, *, steps_for_all_blocks: int) -> list[str]:
        """Return what a user should know before a run. `steps_for_all_blocks`: the fewest optimizer steps in which
        every block can be drawn once; 0 if the same blocks train throughout."""
        return []

    def report(self) -> list[str]:
        """Return lines about the whole run, printed at its end."""
        return []

    def figures(self) -> dict[str, float]:
        """Return what to log with a step's loss, by name; the same on every rank."""
        return {}

    def held(self) -> dict[str, list[Tensor]]:
        """Return the live tensors of the rule on this rank by kind: `gradients`, `masters`, `moments`, `indices`."""
        return {}

    def slices(self, name: str) -> dict[str, Tensor]:
        """Return this rank's state of one parameter for a checkpoint: `indices` (int64, flat positions in it)
        and tensors with one value for each; empty if there is no state."""
        return {}

    def restore(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Restore `tensors`, the concatenated `slices(name)` of all ranks that saved; their number may differ now."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is the same on every rank, as JSON-compatible values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def dense_gradient(active: Sequence[int], *, ranks: int, weight_bytes: int) -> Transient:
    """Return the gradient of the largest parameter, as backward computes it before the rule receives its share."""
    size = dense_gradient_bytes(max(active), ranks=ranks, weight_bytes=weight_bytes)
    return Transient("dense gradient", size, ", of one parameter at a time")
