"""Compute the FLOPs of a step by formula, from shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.model.blocks import Block, full_shape


@dataclass(frozen=True)
class BlockShape:
    """Sizes that determine the FLOPs of a block: `linear`, the sum of in x out over the weights that a token is
    multiplied with, and `attention`, heads x head dimension.

    With LoRA also `adapter`, the sum of rank x (in + out), and what backward skips if the block's input needs no
    gradient: `entry`, the part of `linear` that reads that input, and `adapter_entry`, rank x in of its adapters.
    """

    linear: int
    attention: int
    adapter: int = 0
    entry: int = 0
    adapter_entry: int = 0


def block_shape(block: Block, config: Any, *, entry: Collection[str] = ()) -> BlockShape:
    """Return the sizes of `block`, from the shapes of its weights and a transformers configuration.

    Every token is multiplied with all matrices. Weights of three dimensions are stacked experts [experts, ...]; a token
    uses `config.num_experts_per_tok` of them. Every block is assumed to have an attention layer. `entry`
    names the layers that read the block's input through a norm (q_proj, k_proj, v_proj of a Llama); only adapters, with
    which norms are frozen, make a difference there.
    """
    config = config.get_text_config()
    shapes = {name: full_shape(p) for name, p in block.module.named_parameters()}
    lora = {name: shape for name, shape in shapes.items() if ".lora_A." in name or ".lora_B." in name}
    base = {name: shape for name, shape in shapes.items() if name not in lora}
    matrices = {name: shape[0] * shape[1] for name, shape in base.items() if len(shape) == 2}
    experts = (config.num_experts_per_tok * s[1] * s[2] for s in base.values() if len(s) == 3)

    def reads_input(name: str) -> bool:
        return not set(name.split(".")).isdisjoint(entry)

    heads = config.num_attention_heads
    return BlockShape(
        linear=sum(matrices.values()) + sum(experts),
        attention=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        adapter=sum(shape[0] * shape[1] for shape in lora.values()),
        entry=sum(size for name, size in matrices.items() if reads_input(name)),
        adapter_entry=sum(s[0] * s[1] for name, s in lora.items() if ".lora_A." in name and reads_input(name)),
    )


def step_flops(
    blocks: Sequence[BlockShape],
    *,
    head: int,
    batch: int,
    length: int,
    active: Collection[int],
    embeddings: bool,
    train_head: bool,
    checkpointing: bool,
    attention_backward: float = 2.0,
) -> int:
    """Return the minimum FLOPs of one forward and backward over `batch` sequences of `length` tokens.

    `head` is hidden size x vocabulary; `active` are the blocks whose weights all train, or with LoRA their adapters.
    Forward runs through all. Gradients of activations are needed down to the lowest active block, or through all blocks
    if the embeddings train; gradients of weights for what trains; recomputation for the blocks that backward passes. A
    multiplication and an addition count as two. `attention_backward` is 2 for eager attention, and 2.5 for fused
    kernels, which compute the scores again.
    """
    tokens = batch * length
    linear = [2 * tokens * (block.linear + block.adapter) for block in blocks]
    trained = [2 * tokens * (block.adapter or block.linear) for block in blocks]
    attention = [4 * tokens * length * block.attention for block in blocks]
    passed = range(0 if embeddings else min(active), len(blocks))
    total: float = sum(linear) + sum(attention) + 2 * tokens * head
    total += sum(linear[i] + attention_backward * attention[i] for i in passed) + 2 * tokens * head
    lowest = blocks[passed[0]]
    if lowest.adapter and not embeddings:
        total -= 2 * tokens * (lowest.entry + lowest.adapter_entry)
    total += sum(trained[i] for i in active) + 2 * tokens * head * train_head
    if checkpointing:
        total += sum(linear[i] + attention[i] for i in passed)
    return round(total)
