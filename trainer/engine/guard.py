"""Check that exactly the drawn blocks train, on every rank, and that nothing else changes.

Layer-wise trainers have repeatedly shipped with one of two faults: drawn layers that never change, or frozen layers
that do change. The loss shows neither. The guard inspects the optimizer's own structures at every switch, and a sample
of the weights at some switches.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from trainer.engine.silence import Silence
from trainer.engine.zero.registration import Registration
from trainer.errors import StrataError
from trainer.model.blocks import Block

logger = logging.getLogger(__name__)

# Elements sampled from each parameter on each rank.
_SAMPLE = 16


class GuardError(StrataError, RuntimeError):
    """Raised on all ranks if what trains differs from what was drawn."""


@dataclass(frozen=True)
class _Snapshot:
    step: int
    active: tuple[int, ...]
    weights: list[Tensor]
    masters: dict[int, Tensor]


class Guard:
    """Compare, at each switch, the active sets of all ranks, and the optimizer with the active set.

    At most once in `every` steps (0: never) it also takes a sample of each block's weights at a switch, and checks at
    the next switch that active blocks moved and frozen ones did not. Unless `every` is 0, it names the parameters in
    the optimizer that no gradient reaches, and stops training if these are `adapters`. Those named in `rare` may
    have to wait for a gradient: the towers of a multimodal model, until a row has an image.
    """

    def __init__(
        self,
        registration: Registration,
        blocks: Sequence[Block],
        *,
        every: int,
        expect_motion: bool,
        adapters: bool = False,
        rare: Collection[str] = (),
    ) -> None:
        self._registration = registration
        self._blocks = blocks
        self._every = every
        self._expect_motion = expect_motion  # False for sparse rules: they may not train the sampled weights
        self._silence = Silence(registration, rare) if every and expect_motion else None
        self._adapters = adapters
        # Kept after its comparison until the next one is taken, so that memory is the same at every switch.
        self._snapshot: _Snapshot | None = None
        self._compared = True
        self._lr_seen = False  # whether a step since the snapshot had a learning rate above 0
        self._last_check = 0

    def after_step(self, lr: float) -> None:
        """Record that a step with learning rate `lr` was applied: at 0 nothing is expected to move. Collective."""
        self._lr_seen = self._lr_seen or lr > 0
        if self._silence is not None:
            self._report_silent(self._silence.after_step(lr))

    def _report_silent(self, names: list[str]) -> None:
        """Raise `GuardError` on all ranks for adapters that no gradient reaches; log a warning for other weights."""
        if not names:
            return
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        finding = f"no gradient has reached {shown} in the steps so far"
        if self._adapters:
            raise GuardError(
                f"the guard stopped training: {finding}. These adapters do not learn: the model does not use the "
                "modules that they adapt, or reads the weights of these modules directly. Leave these modules out "
                "(substrate.peft.exclude_modules or target_modules), or set train.guard_every=0 to train anyway"
            )
        if dist.get_rank() == 0:
            logger.warning("%s: the model does not use these weights; at most weight decay changes them", finding)

    def due(self, step: int) -> bool:
        """Return whether the guard takes a sample at the switch before `step`."""
        return bool(self._every) and (step == 0 or step - self._last_check >= self._every)

    def before_switch(self) -> tuple[list[int] | None, str | None]:
        """Compare this rank's weights with the last sample; return (None, None) if there is none to compare.

        Otherwise, return 0 for each block that should have moved and did not, 1 for all others; and a description of
        the frozen blocks that moved, or None.
        """
        if self._silence is not None:
            self._report_silent(self._silence.look())
        before = self._snapshot
        if before is None or self._compared:
            return None, None
        problems = []
        for block, old, new in zip(self._blocks, before.weights, self._sample_weights(), strict=True):
            if block.index not in before.active and not torch.equal(old, new):
                problems.append(f"block {block.index} is frozen but its weights moved")
        moved = [1] * len(self._blocks)
        if self._expect_motion and self._lr_seen:
            for index, new in self._sample_masters(before.active).items():
                moved[index] = int(not torch.equal(new, before.masters[index]))
        return moved, f"since step {before.step}: " + "; ".join(problems) if problems else None

    def after_switch(
        self,
        *,
        interval: int,
        step: int,
        active: tuple[int, ...],
        expected: Sequence[Mapping[str, nn.Parameter]],
        moved: list[int] | None = None,
        problem: str | None = None,
    ) -> None:
        """Check ranks, registration and movement with one small all-reduce. Raises `GuardError` on all ranks.

        `moved` and `problem` are the results of `before_switch`. A block counts as moved if it moved on any rank: a
        rank may store only weights that had no gradient.
        """
        problem = problem or self._registered_problem(expected)
        digest = hashlib.blake2b(repr((interval, active)).encode(), digest_size=6).digest()
        number = int.from_bytes(digest, "little")  # 48 bits: exact in int64 with either sign
        device = get_accelerator().current_device_name()
        # The maximum of -number is minus the least number: all ranks agree if it is minus the greatest.
        ballot = [number, -number, int(problem is not None), *(moved or [])]
        votes = torch.tensor(ballot, dtype=torch.int64, device=device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        # `tolist` makes the host wait for the copies of the switch. ZeRO-3's gather stream, which does not, needs this.
        highest, minus_lowest, any_problem, *moved_anywhere = votes.tolist()
        still = [index for index, any_rank in enumerate(moved_anywhere) if not any_rank]
        if still and self._snapshot is not None:
            since = f"since step {self._snapshot.step}"
            problem = problem or f"{since}: blocks {still} were active but none of their sampled master weights moved"
        if highest != -minus_lowest or any_problem or still:
            self._raise_together(interval, active, problem)
        self._compared = True
        if self.due(step):
            self._compared = False
            self._last_check = step
            self._lr_seen = False
            self._snapshot = _Snapshot(step, active, self._sample_weights(), self._sample_masters(active))

    def _registered_problem(self, expected: Sequence[Mapping[str, nn.Parameter]]) -> str | None:
        live = self._registration.registered()
        if [[id(p) for p in group] for group in live] != [[id(p) for p in group.values()] for group in expected]:
            names = {id(p): n for b in self._blocks for n, p in b.parameters.items()}
            have = sorted({names.get(id(p), "?") for group in live for p in group if id(p) in names})
            want = sorted({names[id(p)] for group in expected for p in group.values() if id(p) in names})
            return f"the optimizer trains {have}, the active set is {want}"
        if not all(p.requires_grad for group in live for p in group):
            return "a registered parameter does not require gradients; something froze it after the switch"
        return None

    def _raise_together(self, interval: int, active: tuple[int, ...], problem: str | None) -> None:
        reports: list[Any] = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(reports, (interval, active, problem))
        lines = [
            f"  rank {rank}: interval {i}, active blocks {list(a)}" + (f"; {p}" if p else "")
            for rank, (i, a, p) in enumerate(reports)
        ]
        raise GuardError("the guard stopped training:\n" + "\n".join(lines))

    def _sample_weights(self) -> list[Tensor]:
        shard = self._registration.shares.local_shard
        return [torch.cat([shard(p)[:_SAMPLE] for p in block.parameters.values()]) for block in self._blocks]

    def _sample_masters(self, active: tuple[int, ...]) -> dict[int, Tensor]:
        """Return samples of master weights by block. In bf16 weights a small step may be rounded away."""
        owner = {id(p): index for index in active for p in self._blocks[index].parameters.values()}
        samples: dict[int, list[Tensor]] = {index: [] for index in active}
        for number, group in enumerate(self._registration.groups):
            if any(id(p) in owner for p in group.values()):
                with self._registration.resident(number):
                    for parameter, master in zip(group.values(), self._registration.masters(number), strict=True):
                        samples[owner[id(parameter)]].append(master[:_SAMPLE].clone())
        return {index: torch.cat(pieces) for index, pieces in samples.items() if pieces}
