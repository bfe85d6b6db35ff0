"""Add up the FLOPs of a step from those of its parts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockFlops:
    """FLOPs of one micro-batch in a block, or in what follows the blocks: of `forward`, and of a backward pass that
    computes gradients of the input alone (`passed`), of input and weights (`active`), or of weights alone (`entry`)."""

    forward: int
    passed: int
    active: int
    entry: int


def step_flops(
    blocks: Sequence[BlockFlops],
    outside: BlockFlops,
    *,
    active: Collection[int],
    embeddings: bool,
    train_head: bool,
    checkpointing: bool,
) -> int:
    """Return the minimum FLOPs of one forward and backward over a micro-batch.

    `outside` is final norm, head and loss; `active` are the blocks that train. Forward runs through all. Gradients of
    activations are needed down to the lowest active block, or through all blocks if the embeddings train; gradients of
    weights for what trains; recomputation for the blocks that backward passes. A multiplication and an addition count
    as two.
    """
    lowest = min(active)
    passed = range(0 if embeddings else lowest, len(blocks))
    total = sum(block.forward for block in blocks) + outside.forward
    total += outside.active if train_head else outside.passed
    for index in passed:
        block = blocks[index]
        if index not in active:
            total += block.passed
        else:
            total += block.entry if index == lowest and not embeddings else block.active
        total += block.forward if checkpointing else 0
    return total
