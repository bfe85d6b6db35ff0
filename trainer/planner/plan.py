"""Plan what each rank will store, compute and send, from shapes alone: no weights, no accelerator."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from trainer.accounting import (
    Activations,
    BlockFlops,
    Memory,
    ModelState,
    StepShape,
    Volume,
    Zero,
    banked_bytes,
    fused_loss,
    memory,
    model_state,
    nf4_bytes,
    step_flops,
    step_volume,
)
from trainer.config import RunConfig, resolve_batch
from trainer.config.deepspeed.buckets import zero_size
from trainer.config.deepspeed.resolve import resolve
from trainer.data.tokenizer import load_run_tokenizer
from trainer.engine.slots import PLACEHOLDER
from trainer.engine.sparse import Sparse
from trainer.model import load as models
from trainer.model.blocks import Block, find, full_numel
from trainer.model.fused_head import obstacle
from trainer.model.loss import LossChoice
from trainer.planner.passes import BlockPasses, PassError, Passes, forward_bytes
from trainer.planner.tracing import Pass
from trainer.run.setup import Built, build_model, offload_device
from trainer.updates import Footprint


@dataclass(frozen=True)
class Plan:
    """The memory, compute and traffic of one rank. `flops` and `volume` (in bytes) are per optimizer step."""

    config: RunConfig
    ranks: int
    stage: int
    loss: LossChoice
    parameters: int  # weights of the model
    trained: int  # of them, at a time
    num_blocks: int
    active: int  # blocks that train at a time
    state: ModelState
    memory: Memory
    flops: int
    volume: Volume
    offloaded: int  # bytes copied between card and host in a step
    banked: int  # bytes that the bank stores once all blocks have been drawn
    rule: Footprint  # of the update rule's own state
    notes: tuple[str, ...]  # what could not be traced
    complete: bool  # whether activations and FLOPs of all parts are in it


@dataclass(frozen=True)
class Traced:
    """Passes through each block, and through norm, head and plain loss (`outside`). In bytes: `hidden`, a block's
    input, and `evaluated`, a forward in evaluation, (of a block, of the loss)."""

    blocks: list[BlockPasses]
    outside: Pass
    hidden: int
    evaluated: tuple[int, int]
    notes: tuple[str, ...]
    complete: bool

    def largest(self, kind: str) -> Activations:
        """Return those of the blocks with the highest peak, if they all train (`active`) or none (`passed`)."""
        return max((getattr(block, kind).activations for block in self.blocks), key=lambda found: found.peak)

    def saved(self, lowest: int, num_active: int) -> int:
        """Return the most that forward keeps of the blocks from `lowest` on, of which `num_active` train."""
        blocks = [(block.passed.activations.saved, block.active.activations.saved) for block in self.blocks[lowest:]]
        more = sorted((active - passed for passed, active in blocks), reverse=True)
        return sum(passed for passed, _ in blocks) + sum(more[:num_active])


class Planner:
    """Plan configurations; models and their traces are cached between plans. `on_cpu`: the planned ranks are CPUs."""

    def __init__(self, *, on_cpu: bool = False) -> None:
        self._on_cpu = on_cpu
        self._models: dict[str, PreTrainedModel] = {}
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self._traced: dict[str, Traced] = {}
        self._obstacles: dict[str, str | None] = {}  # to fusing the loss

    def plan(self, config: RunConfig, ranks: int, *, local_ranks: int | None = None) -> Plan:
        """Plan a run on `ranks` ranks, `local_ranks` on each machine (by default what the launcher says).

        Raises what a run with `config` raises before it loads weights: `ConfigError`, `ModelError`, ...
        """
        ds = resolve(config, ranks, local_ranks=local_ranks)
        built = build_model(
            config,
            ds,
            self._tokenizer(config),
            # None if it depends on the number of samples, which is not known here.
            num_steps=config.train.steps,
            empty=True,
            base=self._model(config),
            find_obstacle=partial(self._obstacle, config),
        )
        return self.plan_built(config, ranks, built)

    def plan_built(self, config: RunConfig, ranks: int, built: Built) -> Plan:
        """Plan a run whose empty model is already built. Raises `ModelError` if a pass through one block fails."""
        try:
            traced = self._passes(config, built)
        except PassError as error:
            key = "model.random" if config.model.path is None else "model.path"
            raise models.ModelError(
                f"{key}: a pass through one block of this model, with data.max_length={config.data.max_length} and "
                f"train.micro_batch_size={config.train.micro_batch_size}, fails: {error}"
            ) from error
        return _planned(config, ranks, built, traced, on_cpu=self._on_cpu)

    def _obstacle(self, config: RunConfig) -> str | None:
        key = self._key(config)
        if key not in self._obstacles:
            model = self._model(config)
            self._obstacles[key] = obstacle(model, find(model, path=config.model.blocks).path)
        return self._obstacles[key]

    @staticmethod
    def _key(config: RunConfig) -> str:
        return config.model.model_dump_json(exclude={"activation_checkpointing"})

    def _model(self, config: RunConfig) -> PreTrainedModel:
        key = self._key(config)
        if key not in self._models:
            self._models[key] = models.on_meta(config.model, self._tokenizer(config))
        return self._models[key]

    def _tokenizer(self, config: RunConfig) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer if the model's size depends on it: by default, or because tokens are added to it."""
        if config.model.path is not None and not config.model.add_tokens:
            return None
        key = self._key(config)
        if key not in self._tokenizers:
            self._tokenizers[key] = load_run_tokenizer(config.model)
        return self._tokenizers[key]

    def _passes(self, config: RunConfig, built: Built) -> Traced:
        model, base, sparse, stage = built.model, built.base, built.sparse, built.ds["zero_optimization"]["stage"]
        key = json.dumps(
            [
                config.model.model_dump(exclude={"activation_checkpointing"}),
                config.substrate.model_dump(),
                config.always_on.model_dump(),
                config.data.max_length,
                config.train.micro_batch_size,
                config.eval.micro_batch_size,
                stage == 3,
            ],
            default=str,
        )
        if key not in self._traced:
            batch, length = config.train.micro_batch_size, config.data.max_length
            training = Passes(model, sparse.structure, sparse.blocks, batch=batch, length=length, zero3=stage == 3)
            eval_batch = config.eval.micro_batch_size or batch
            blocks = training.of_blocks()
            outside = training.outside(head=base.get_output_embeddings().weight.requires_grad)
            evaluating = training if eval_batch == batch else replace(training, batch=eval_batch)
            evaluated = evaluating.forward_bytes() if evaluating is not training else forward_bytes(blocks, outside)
            self._traced[key] = Traced(
                blocks=blocks,
                outside=outside,
                hidden=training.hidden_bytes,
                evaluated=evaluated,
                notes=tuple(training.notes),
                complete=training.complete and evaluating.complete,
            )
        return self._traced[key]


def _planned(config: RunConfig, ranks: int, built: Built, traced: Traced, *, on_cpu: bool) -> Plan:
    ds, base, sparse, choice = built.ds, built.base, built.sparse, built.loss
    stage = ds["zero_optimization"]["stage"]
    weight_bytes = 4 if config.model.dtype == "fp32" else 2
    gradient_bytes = 4 if ds["data_types"]["grad_accum_dtype"] in ("fp32", "float32") else 2
    groups = [[full_numel(p) for p in group.values()] for group in sparse.groups() if PLACEHOLDER not in group]
    dense = [full_numel(p) for p in sparse.trainable_parameters()]  # backward computes all their gradients
    offload = offload_device(ds, "optimizer") != "none"
    quantised = quantised_weights(config, base)
    # A tensor in four bits counts as the number of weights in the model's dtype that take as many bytes.
    numels = [
        nf4_bytes(p.numel()) // weight_bytes if id(p) in quantised else p.numel() for p in sparse.model.parameters()
    ]
    accumulation = resolve_batch(config, ranks).accumulation_steps
    rule = _footprint(sparse, ranks=ranks, weight_bytes=weight_bytes, accumulation=accumulation)
    state = model_state(
        numels,
        groups,
        stage=stage,
        ranks=ranks,
        weight_bytes=weight_bytes,
        gradient_bytes=gradient_bytes,
        moment_bytes=2 if config.optimizer.name == "adamw_8bit" else 8,
        offload=offload,
    )
    state = replace(
        state,
        gradients=state.gradients + rule.gradients,
        masters=state.masters + rule.masters,
        moments=state.moments + rule.moments,
        indices=state.indices + rule.indices,
    )
    in_optimizer = sum(map(sum, groups))
    trained = in_optimizer + rule.trained
    banked = _banked(config, sparse, ranks)
    lowest = _lowest(sparse)
    vocabulary, hidden = base.get_output_embeddings().weight.shape
    tokens = config.train.micro_batch_size * config.data.max_length
    train_head = base.get_output_embeddings().weight.requires_grad
    loss, evaluated = traced.outside.activations, traced.evaluated
    eval_tokens = (config.eval.micro_batch_size or config.train.micro_batch_size) * config.data.max_length
    if choice.fused:
        fused = partial(
            fused_loss, hidden=hidden, vocabulary=vocabulary, weight_bytes=weight_bytes, tiles=7 if on_cpu else 0
        )
        loss = fused(tokens=tokens, trains=train_head)
        evaluated = (evaluated[0], fused(tokens=eval_tokens, trains=False).forward)
    evaluates = config.data.eval is not None or config.data.eval_fraction > 0
    embeddings = base.get_input_embeddings().weight
    shape = StepShape(
        active=traced.largest("active"),
        passed=traced.largest("passed"),
        loss=loss,
        evaluation=(eval_tokens * hidden * weight_bytes + max(evaluated)) if evaluates else 0,
        embedded=traced.hidden,
        depth=len(sparse.blocks) - lowest,
        num_active=len(sparse.active),
        saved=traced.saved(lowest, len(sparse.active)),
        checkpointing=config.model.activation_checkpointing,
        largest=max(dense),
        embeddings=embeddings.numel() if embeddings.requires_grad else 0,
        total=sum(p.numel() for p in sparse.model.parameters()),
        groups=tuple(map(sum, groups)),
        rule={part.name: part.size for part in rule.backward},
    )
    zero = Zero(
        stage=stage,
        ranks=ranks,
        weight_bytes=weight_bytes,
        gradient_bytes=gradient_bytes,
        reduce_bucket=zero_size(ds, "reduce_bucket_size"),
        overlap=bool(ds["zero_optimization"].get("overlap_comm")),
        max_live=zero_size(ds, "max_live_parameters"),
        offload=offload,
        machine_ranks=zero_size(ds, "zero_hpz_partition_size"),
        temporaries=on_cpu and not offload,
        offload_param=offload_device(ds, "param") != "none",
        nvme_buffers=_nvme_buffers(ds),
    )
    below = sum(sum(full_numel(p) for p in b.module.parameters()) for b in sparse.blocks[:lowest])
    in_blocks = sum(sum(full_numel(p) for p in b.module.parameters()) for b in sparse.blocks)
    head = base.get_output_embeddings().weight.numel()
    return Plan(
        config=config,
        ranks=ranks,
        stage=stage,
        loss=choice,
        parameters=shape.total,
        trained=trained,
        num_blocks=len(sparse.blocks),
        active=shape.num_active,
        state=state,
        memory=memory(
            state,
            shape,
            zero,
            host=_on_host(config, sparse, shape, zero, in_optimizer, banked, rule),
            # What the update rule keeps of inactive blocks stays on the device under any bank.
            banked=rule.kept + (banked if config.bank.place == "device" and not offload else 0),
        ),
        flops=accumulation
        * step_flops(
            [block.flops for block in traced.blocks],
            BlockFlops(*[traced.outside.forward] + [traced.outside.backward] * 3),
            active=[lowest, *range(len(sparse.blocks) - shape.num_active + 1, len(sparse.blocks))],
            embeddings=_train_embeddings(sparse),
            train_head=train_head,
            checkpointing=shape.checkpointing,
        ),
        volume=step_volume(
            stage=stage,
            ranks=ranks,
            weight_bytes=weight_bytes,
            # An update rule with state of its own receives gradients in fp32.
            gradient_bytes=4 if rule.trained else gradient_bytes,
            trained=sum(dense),
            forward=shape.total,
            backward=in_blocks - below + head,
            micro_batches=accumulation,
            machine_copies=zero.machine_ranks > 1,
        ),
        offloaded=_through_host(zero, shape, in_optimizer, accumulation),
        banked=banked + rule.kept,
        rule=rule,
        notes=traced.notes,
        complete=traced.complete,
    )


def _lowest(sparse: Sparse) -> int:
    """Return the index of the lowest block that ever trains; 0 if the embeddings, below all blocks, train."""
    return 0 if _train_embeddings(sparse) else min(sparse.selector.reachable(len(sparse.blocks)))


def _train_embeddings(sparse: Sparse) -> bool:
    """Return whether any weights of the embeddings train, such as the rows of new tokens."""
    return any(p.requires_grad for p in sparse.always_on.get("embeddings", {}).values())


def _in_optimizer(sparse: Sparse, block: Block) -> int:
    """Return how many of a block's weights DeepSpeed's optimizer trains."""
    names = sparse.update.in_optimizer(block)
    return sum(full_numel(p) for name, p in block.parameters.items() if name in names)


def _footprint(sparse: Sparse, *, ranks: int, weight_bytes: int, accumulation: int) -> Footprint:
    active = sparse.trained_by_rule(sparse.active)
    kept = sparse.trained_by_rule(sparse.selector.reachable(len(sparse.blocks))) if sparse.bank.keeps else {}
    return sparse.update.footprint(
        [full_numel(p) for p in active.values()],
        [full_numel(p) for name, p in kept.items() if name not in active],
        ranks=ranks,
        weight_bytes=weight_bytes,
        accumulation=accumulation,
    )


def _nvme_buffers(ds: dict[str, Any]) -> int:
    """Return DeepSpeed's `offload_optimizer.buffer_count`; 0 unless optimizer state is on NVMe."""
    if offload_device(ds, "optimizer") != "nvme":
        return 0
    return ds["zero_optimization"]["offload_optimizer"].get("buffer_count", 4)


def _through_host(zero: Zero, shape: StepShape, in_optimizer: int, accumulation: int) -> int:
    """Return the bytes that a step copies between a rank's card and host, as in DeepSpeed 0.19.8, if the optimizer
    contains `in_optimizer` weights. To the host: gradients with every micro-batch, and in fp32 at the end. To the card:
    gradients of earlier micro-batches, updated weights, and offloaded weights for every forward and backward."""
    crossed = 0
    if zero.offload:
        added = 2 * accumulation * zero.gradient_bytes
        if zero.stage < 3:  # with a single micro-batch, only those at the end
            added = (2 * accumulation - 1) * zero.weight_bytes if accumulation > 1 else 0
        crossed += (added + 4 + zero.weight_bytes) * -(-in_optimizer // zero.ranks)
    if zero.offload_param:
        crossed += 2 * accumulation * zero.weight_bytes * -(-shape.total // zero.ranks)
    return crossed


def _banked(config: RunConfig, sparse: Sparse, ranks: int) -> int:
    """Return the bytes that a bank stores on a rank once all blocks have been drawn: masters and moments of all blocks
    but those that train. Beside live state those are the first set; alone in host memory, at most all but the smallest.
    """
    if not sparse.bank.keeps:
        return 0
    reachable = sparse.selector.reachable(len(sparse.blocks))
    if config.bank.place == "host":
        stored = sorted(_in_optimizer(sparse, sparse.blocks[i]) for i in reachable)[len(sparse.active) :]
    else:
        stored = [_in_optimizer(sparse, sparse.blocks[i]) for i in reachable if i not in sparse.active]
    return banked_bytes(stored, ranks=ranks)


def _on_host(
    config: RunConfig, sparse: Sparse, shape: StepShape, zero: Zero, in_optimizer: int, banked: int, rule: Footprint
) -> dict[str, int]:
    """Return what a rank stores in host memory, in bytes by part, without offloaded masters and moments."""
    part = -(-in_optimizer // zero.ranks)
    held: dict[str, int] = {}
    if zero.offload and zero.stage < 3:  # weights on their way back, and two buffers of the largest gradient
        held["offload buffers"] = zero.weight_bytes * (part + shape.largest)
    reachable = sparse.selector.reachable(len(sparse.blocks))
    by_size = sorted((_in_optimizer(sparse, sparse.blocks[i]) for i in reachable), reverse=True)
    on_host = config.bank.place == "host" or zero.offload  # place "device": beside the live state
    if on_host:
        held["full bank"] = banked
    if config.saves:
        draws = -(-(config.checkpoint.every or 0) // config.selector.interval)
        changed = sum(by_size[: draws * shape.num_active])
        outside = in_optimizer - sum(_in_optimizer(sparse, sparse.blocks[i]) for i in sparse.active)
        weights = zero.weight_bytes * -(-(changed + outside) // zero.ranks)
        # State in host memory is written in place; what a switch takes out of the bank is kept until then.
        copied = min(banked, banked_bytes(by_size[: shape.num_active], ranks=zero.ranks)) if on_host else banked
        own = -(-rule.saved // zero.ranks)
        held["checkpoint, while it is written"] = weights + 12 * part + copied + own
    return held


def quantised_weights(config: RunConfig, model: PreTrainedModel) -> set[int]:
    """Return the ids of the weights that `model.quantization` stores in four bits, from which transformers excludes the
    head."""
    if config.model.quantization is None:
        return set()
    excluded = {id(model.get_output_embeddings().weight), id(model.get_input_embeddings().weight)}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    return linear - excluded
