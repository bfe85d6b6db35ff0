"""Find what passes through each kind of block, and through head and loss, store and compute.

They are traced. What cannot be traced, because it depends on values, runs for real, on short sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import PreTrainedModel

from trainer.accounting.flops import BlockFlops
from trainer.accounting.peak import Activations
from trainer.config.text import in_short
from trainer.errors import StrataError
from trainer.model.blocks import Block, Structure
from trainer.planner.tracing import Pass, Tracer

# Tokens of the sequences that run for real. State-space blocks pad to multiples of 256.
_SHORT = (256, 512, 768)


class PassError(StrataError, ValueError):
    """A pass through a part of the model fails, traced and run for real alike."""


@dataclass(frozen=True)
class BlockPasses:
    """Passes through a block that is frozen, that trains, and that trains below all others."""

    passed: Pass
    active: Pass
    entry: Pass

    @property
    def flops(self) -> BlockFlops:
        """Return the FLOPs of the three."""
        return BlockFlops(
            self.active.forward,
            passed=self.passed.backward,
            active=self.active.backward,
            entry=self.entry.backward,
        )


@dataclass
class Passes:
    """Find the passes of a model, which may be on the meta device, at `batch` sequences of `length` tokens.

    `blocks` are its blocks and what trains in them. `zero3`: with the linear layers of DeepSpeed's stage 3. `notes`
    say, after a call, what was not traced, and `complete` whether nothing is left out.
    """

    model: PreTrainedModel
    structure: Structure
    blocks: Sequence[Block]
    batch: int
    length: int
    zero3: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._traced = Tracer(self.model, self.structure, batch=self.batch, length=self.length, zero3=self.zero3)
        self._untraced: dict[str, Exception] = {}  # by part
        self.kinds = self._traced.kinds
        self.complete = True  # False once a part is left out

    def of_blocks(self) -> list[BlockPasses]:
        """Return the passes of each block. Raises `PassError`."""
        of_kind = {kind: self._of_block(self.blocks[kind]) for kind in sorted(set(self.kinds))}
        return [of_kind[kind] for kind in self.kinds]

    def outside(self, *, head: bool) -> Pass:
        """Return the pass through final norm, head, which trains or not, and loss. Raises `PassError`."""
        return self._found("head and loss", lambda tracer: tracer.outside(head=head))

    def forward_bytes(self) -> tuple[int, int]:
        """Return the bytes that evaluation needs: of a block, the most, and of the loss. Raises `PassError`."""
        blocks = [self._block(kind, (), input_requires_grad=False) for kind in sorted(set(self.kinds))]
        return max(block.activations.forward for block in blocks), self.outside(head=False).activations.forward

    @property
    def hidden_bytes(self) -> int:
        """Return the bytes of a block's input."""
        found = self._found("a block", lambda tracer: _only_bytes(tracer.hidden_bytes))
        return found.activations.forward

    @cached_property
    def _real(self) -> list[Tracer]:
        return [
            Tracer(self.model, self.structure, batch=1, length=short, zero3=self.zero3, real=True) for short in _SHORT
        ]

    def _of_block(self, block: Block) -> BlockPasses:
        trains = [name.removeprefix(f"{block.path}.") for name in block.parameters]
        return BlockPasses(
            passed=self._block(block.index, (), input_requires_grad=True),
            active=self._block(block.index, trains, input_requires_grad=True),
            entry=self._block(block.index, trains, input_requires_grad=False),
        )

    def _block(self, index: int, trains: Sequence[str], *, input_requires_grad: bool) -> Pass:
        return self._found(
            f"block {index}", lambda tracer: tracer.block(index, trains=trains, input_requires_grad=input_requires_grad)
        )

    def _found(self, part: str, find: Callable[[Tracer], Pass]) -> Pass:
        if part not in self._untraced:
            try:
                return find(self._traced)
            except Exception as error:  # of any kind: the model's own code may raise it
                self._untraced[part] = error
                self._refuse_length(part, find)
        untraced = self._untraced[part]
        said = f"{type(untraced).__name__}: {in_short(str(untraced))}"
        try:
            found = self._measured(find)
        except Exception as error:
            if type(error) is type(untraced):
                raise PassError(f"{part}: {type(error).__name__}: {in_short(str(error))}") from error
            self.complete = False
            self._note(f"activations and FLOPs of {part} are not in this plan: it cannot be traced ({said})")
            return _only_bytes(0)
        self._note(f"activations and FLOPs of {part} follow from sequences of up to {_SHORT[-1]} tokens ({said})")
        return found

    def _refuse_length(self, part: str, find: Callable[[Tracer], Pass]) -> None:
        """Raise `PassError` if only sequences as long as these cannot be traced: then it is the model that fails."""
        if self.length <= _SHORT[-1]:
            return
        try:
            find(Tracer(self.model, self.structure, batch=self.batch, length=_SHORT[-1], zero3=self.zero3))
        except Exception:
            return
        error = self._untraced[part]
        raise PassError(f"{part}: {type(error).__name__}: {in_short(str(error))}") from error

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _measured(self, find: Callable[[Tracer], Pass]) -> Pass:
        """Measure on short sequences, and conclude from their lengths to `length`, quadratically."""
        found = [find(tracer) for tracer in self._real]
        powers = torch.tensor([[1.0, short, short**2] for short in _SHORT], dtype=torch.float64)

        def concluded(values: list[int]) -> int:
            once, each, squared = torch.linalg.solve(powers, torch.tensor(values, dtype=torch.float64)).tolist()
            return max(0, round(once + self.batch * (each * self.length + squared * self.length**2)))

        saved, peak, forward = (
            concluded([getattr(one.activations, name) for one in found]) for name in ("saved", "peak", "forward")
        )
        return Pass(
            Activations(saved=saved, peak=peak, forward=forward),
            forward=concluded([one.forward for one in found]),
            backward=concluded([one.backward for one in found]),
        )


def forward_bytes(blocks: Sequence[BlockPasses], outside: Pass) -> tuple[int, int]:
    """Return what `Passes.forward_bytes` returns, from passes in training at the same batch: each has run without
    gradients, too."""
    return max(block.passed.activations.forward for block in blocks), outside.activations.forward


def _only_bytes(size: int) -> Pass:
    return Pass(Activations(saved=0, peak=0, forward=size), forward=0, backward=0)


def step_parts(
    model: PreTrainedModel, structure: Structure, blocks: Sequence[Block], *, batch: int, length: int
) -> tuple[list[BlockFlops], BlockFlops]:
    """Return the FLOPs of each block, of which all `parameters` train, and of head and loss, for
    `trainer.accounting.step_flops`."""
    passes = Passes(model, structure, blocks, batch=batch, length=length)
    frozen, trained = (passes.outside(head=trains) for trains in (False, True))
    outside = BlockFlops(frozen.forward, passed=frozen.backward, active=trained.backward, entry=trained.backward)
    return [found.flops for found in passes.of_blocks()], outside
