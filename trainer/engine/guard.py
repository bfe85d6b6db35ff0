"""The guard: what trains is what was drawn, on every rank, and nothing else moves.

The same wrong training has shipped again and again in layer-wise trainers: layers that are drawn and never change,
frozen layers that do. Neither shows in the loss. The guard looks at the optimizer's own structures at every switch,
and at a sample of the weights now and then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from trainer.blocks import Block
from trainer.engine.registration import Registration

# Weights sampled from each block and rank. Adam moves practically every weight at every step.
_SAMPLE = 64


class GuardError(RuntimeError):
    """Training is not doing what it says; raised on all ranks."""


@dataclass(frozen=True)
class _Snapshot:
    step: int
    active: tuple[int, ...]
    weights: list[Tensor]
    masters: dict[int, list[Tensor]]


class Guard:
    """Compares, at each switch, ranks with each other and the optimizer with the active set.

    Every `every` steps (0: never) it also remembers a sample of each block's weights at a switch, and checks at the
    next one that active blocks moved and frozen ones did not.
    """

    def __init__(self, registration: Registration, blocks: Sequence[Block], *, every: int, expect_motion: bool) -> None:
        self._registration = registration
        self._blocks = blocks
        self._every = every
        self._expect_motion = expect_motion  # a sparse rule may leave the sampled weights alone
        self._snapshot: _Snapshot | None = None
        self._lr_seen = False
        self._last_check = 0
        # The largest parameter of each block stands for it.
        self._witness = [max(b.parameters.values(), key=lambda p: getattr(p, "ds_numel", p.numel())) for b in blocks]

    def note_learning_rates(self) -> None:
        """Call after each applied step: without a learning rate nothing is expected to move."""
        groups = self._registration.engine.basic_optimizer.param_groups
        self._lr_seen = self._lr_seen or any(group["lr"] > 0 for group in groups)

    def before_switch(self) -> str | None:
        """What moved that should not have, or did not and should have, on this rank since the last snapshot."""
        before, self._snapshot = self._snapshot, None
        if before is None:
            return None
        problems = []
        for block, old, new in zip(self._blocks, before.weights, self._sample_weights(), strict=True):
            if block.index not in before.active and not torch.equal(old, new):
                problems.append(f"block {block.index} is frozen but its weights moved")
        for index, old in before.masters.items():
            new = self._sample_masters((index,))[index]
            still = all(torch.equal(a, b) for a, b in zip(old, new, strict=True)) and sum(t.numel() for t in old)
            if self._expect_motion and self._lr_seen and still:
                problems.append(f"block {index} is active but none of its sampled masters moved")
        return f"since step {before.step}: " + "; ".join(problems) if problems else None

    def after_switch(
        self,
        *,
        interval: int,
        step: int,
        active: tuple[int, ...],
        expected: list[list[nn.Parameter]],
        problem: str | None,
    ) -> None:
        """Compare everything at once, with one small all-reduce; raises `GuardError` on all ranks alike."""
        problem = problem or self._registered_problem(expected)
        digest = hashlib.blake2b(repr((interval, active)).encode(), digest_size=6).digest()
        number = int.from_bytes(digest, "little")  # 48 bits: exact in int64 with either sign
        device = get_accelerator().current_device_name()
        votes = torch.tensor([number, -number, int(problem is not None)], dtype=torch.int64, device=device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        highest, lowest, any_problem = (int(v) for v in votes.tolist())
        if highest != -lowest or any_problem:
            self._raise_together(interval, active, problem)
        if self._every and step - self._last_check >= self._every:
            self._last_check = step
            self._lr_seen = False
            self._snapshot = _Snapshot(step, active, self._sample_weights(), self._sample_masters(active))

    def _registered_problem(self, expected: list[list[nn.Parameter]]) -> str | None:
        live = self._registration.registered()
        if [[id(p) for p in group] for group in live] != [[id(p) for p in group] for group in expected]:
            names = {id(p): n for b in self._blocks for n, p in b.parameters.items()}
            have = sorted({names.get(id(p), "?") for group in live for p in group if id(p) in names})
            want = sorted({names[id(p)] for group in expected for p in group if id(p) in names})
            return f"the optimizer trains {have}, the active set is {want}"
        if not all(p.requires_grad for group in live for p in group):
            return "a registered parameter does not require gradients; something froze it after the switch"
        return None

    def _raise_together(self, interval: int, active: tuple[int, ...], problem: str | None) -> None:
        reports: list[object] = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(reports, (interval, active, problem))
        lines = [
            f"  rank {rank}: interval {i}, active blocks {list(a)}" + (f"; {p}" if p else "")
            for rank, (i, a, p) in enumerate(reports)  # type: ignore[misc]
        ]
        raise GuardError("the guard stopped training:\n" + "\n".join(lines))

    def _sample_weights(self) -> list[Tensor]:
        return [self._registration.local_shard(p)[:_SAMPLE].clone() for p in self._witness]

    def _sample_masters(self, active: tuple[int, ...]) -> dict[int, list[Tensor]]:
        """Masters rather than weights: bf16 weights may round a small step away."""
        wanted = {id(self._witness[i]): i for i in active}
        samples: dict[int, list[Tensor]] = {}
        for number, group in enumerate(self._registration.groups):
            if not any(id(p) in wanted for p in group.values()):
                continue
            for parameter, piece in zip(group.values(), self._registration.slices(number), strict=True):
                if id(parameter) in wanted:
                    samples.setdefault(wanted[id(parameter)], []).append(piece.tensors["master"][:_SAMPLE].clone())
        return samples
