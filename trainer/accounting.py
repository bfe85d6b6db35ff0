"""Bytes and FLOPs of a run by formula, from shapes alone. The dry run and the benchmarks print these figures."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.blocks import Block, full_shape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelState:
    """Bytes on one rank, measured after a step: weights, resident gradients, fp32 masters, Adam's two moments, and of a
    sparse update rule the indices of what it trains.

    With `offload` masters, moments and gradients lie in host memory.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    offload: bool = False
    indices: int = 0

    @property
    def device(self) -> int:
        return self.weights if self.offload else self.total

    @property
    def host(self) -> int:
        return self.total - self.device

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments + self.indices


def model_state(
    parameters: Sequence[int],
    groups: Sequence[Sequence[int]],
    *,
    stage: int,
    ranks: int,
    weight_bytes: int,
    gradient_bytes: int | None = None,
    moment_bytes: int = 8,
    offload: bool = False,
) -> ModelState:
    """The minimum that ZeRO `stage` holds on a rank.

    `parameters`: elements of every parameter of the model; `groups`: of those that the optimizer holds, by group.
    `weight_bytes` is 2 (bf16, fp16) or 4 (fp32); `gradient_bytes`, those of an accumulated gradient, default to it;
    `moment_bytes` are both of Adam's together, 2 for an 8-bit Adam, whose scales of blocks are not counted.

    Stages 1 and 2 replicate weights, cut each group into equal parts, and free gradients within the step. Stage 3
    cuts each parameter, keeps a partition of the gradients, and uses fp32 weights as their own masters. Stage 0 is
    plain fp32 training: no extra masters, gradients freed after the step.
    """
    held = [numel for group in groups for numel in group]
    gradient_bytes = gradient_bytes or weight_bytes
    if stage == 0:
        return ModelState(4 * sum(parameters), 0, 0, moment_bytes * sum(held))
    if stage == 3:
        mine, active = (sum(-(-n // ranks) for n in numels) for numels in (parameters, held))
        own_masters = weight_bytes == 4 and not offload
        # Offloading keeps the accumulated partition and, beside it, the gradient of the fp32 master.
        gradients = gradient_bytes * active + (4 * active if offload else 0)
        return ModelState(
            weight_bytes * mine, gradients, 0 if own_masters else 4 * active, moment_bytes * active, offload
        )
    active = sum(-(-sum(group) // ranks) for group in groups)
    return ModelState(
        weight_bytes * sum(parameters), 4 * active if offload else 0, 4 * active, moment_bytes * active, offload
    )


def unmasked_state(
    parameters: Sequence[int],
    budget: int,
    *,
    stage: int,
    ranks: int,
    weight_bytes: int,
    local_steps: bool = False,
) -> ModelState:
    """What a rank holds while `budget` unmasked weights train (update rule `unmask`), before activations.

    Master and moments (12 bytes, and 4 more for `local_steps`) of those that the rank owns, if they are spread evenly;
    gradient and index (4 and 8 bytes) of all of them. `parameters` are elements of every parameter of the model.
    """
    weights = sum(-(-n // ranks) for n in parameters) if stage == 3 else sum(parameters)
    own = -(-budget // ranks)
    moments = (12 if local_steps else 8) * own
    return ModelState(weight_bytes * weights, 4 * budget, 4 * own, moments, indices=8 * budget)


def growing_bytes(trained: Sequence[int], increment: int, *, ranks: int, accumulation: int) -> tuple[int, int]:
    """What a rank holds beside `unmasked_state` in backward while the mask grows: (candidates, accumulated gradients).

    Score, position and gradient of as many candidates as a step unmasks, and with several micro-batches to a step the
    fp32 sum of its share of all gradients. `trained` are elements of every parameter that may train now.
    """
    accumulated = 4 * sum(-(-n // ranks) for n in trained) if accumulation > 1 else 0
    return 16 * increment, accumulated


def nf4_bytes(numel: int) -> int:
    """A matrix in NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3): four bits for a weight, a byte for
    the scale of 64 of them, and four for the scale of 256 such scales."""
    scales = -(-numel // 64)
    return -(-numel // 2) + scales + 4 * -(-scales // 256)


def banked_bytes(blocks: Iterable[int], *, ranks: int) -> int:
    """What a bank keeps on a rank of blocks of so many elements: fp32 masters and Adam's two moments."""
    return sum(12 * -(-numel // ranks) for numel in blocks)


def measured_state(held: Mapping[str, Iterable[Tensor]], *, offload: bool = False) -> ModelState:
    """The same figures from live tensors by kind (`Sparse.held()`), each storage counted once, under its first kind."""
    seen: set[int] = set()
    totals = {}
    for kind in ("weights", "gradients", "masters", "moments", "indices"):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held[kind]}
        totals[kind] = sum(size for pointer, size in storages.items() if pointer not in seen)
        seen |= storages.keys()
    return ModelState(**totals, offload=offload)


@dataclass(frozen=True)
class BlockShape:
    """What the products of a block's forward depend on: `linear`, the sum of in x out over the weights that a token
    meets, and `attention`, heads x head dimension.

    With LoRA also `adapter`, the sum of rank x (in + out), and what backward is spared where the block's input needs no
    gradient: `entry`, the part of `linear` that reads that input, and `adapter_entry`, rank x in of its adapters.
    """

    linear: int
    attention: int
    adapter: int = 0
    entry: int = 0
    adapter_entry: int = 0


def block_shape(block: Block, config: Any, *, entry: Collection[str] = ()) -> BlockShape:
    """From the shapes of a block's weights and a transformers configuration.

    Matrices are met by every token. Weights of three dimensions are stacked experts [experts, ...], of which a token
    meets `config.num_experts_per_tok`. An attention layer is assumed wherever the configuration has heads. `entry`
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
    """The least FLOPs of one forward and backward over `batch` sequences of `length` tokens, product by product.

    `head` is hidden size x vocabulary; `active` are the blocks whose weights all train, or with LoRA their adapters.
    Forward runs through all. Gradients of activations are needed down to the lowest active block, or through all blocks
    if the embeddings train; gradients of weights for what trains; recomputation, where backward goes. A multiplication
    and an addition count as two. `attention_backward` is 2 for eager attention and 2.5 for fused kernels, which compute
    the scores again.
    """
    tokens = batch * length
    linear = [2 * tokens * (block.linear + block.adapter) for block in blocks]
    trained = [2 * tokens * (block.adapter or block.linear) for block in blocks]
    attention = [4 * tokens * length * block.attention for block in blocks]
    passed = range(0 if embeddings else min(active), len(blocks))
    total = sum(linear) + sum(attention) + 2 * tokens * head
    total += sum(linear[i] + attention_backward * attention[i] for i in passed) + 2 * tokens * head
    lowest = blocks[passed[0]]
    if lowest.adapter and not embeddings:
        total -= 2 * tokens * (lowest.entry + lowest.adapter_entry)
    total += sum(trained[i] for i in active) + 2 * tokens * head * train_head
    if checkpointing:
        total += sum(linear[i] + attention[i] for i in passed)
    return round(total)


def readable(num_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
