"""From a configuration to what each rank will hold, compute and send: shapes alone, no weights, no accelerator."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer import model as models
from trainer.accounting import (
    Memory,
    ModelState,
    StepShape,
    Volume,
    Zero,
    banked_bytes,
    block_shape,
    dense_gradient_bytes,
    fused_loss,
    growing_bytes,
    memory,
    model_state,
    nf4_bytes,
    step_flops,
    step_volume,
    unmasked_state,
)
from trainer.accounting.peak import Activations
from trainer.activations import Tracer
from trainer.adapters import adapt
from trainer.blocks import full_numel
from trainer.build import offload_device, prepare_model, size_buckets
from trainer.config import RunConfig, resolve_batch
from trainer.config.deepspeed import resolve, zero_size
from trainer.data.tokenizer import load_tokenizer, tokenizer_name
from trainer.engine.attach import Sparse
from trainer.loss import choose_fused
from trainer.updates import Unmask


@dataclass(frozen=True)
class Plan:
    """What one rank holds, computes and sends. `flops` and `volume` are of an optimizer step, `volume` in bytes."""

    config: RunConfig
    ranks: int
    stage: int
    parameters: int
    trained: int
    num_blocks: int
    active: int  # blocks that train at a time
    state: ModelState
    memory: Memory
    flops: int
    volume: Volume
    offloaded: int  # bytes that cross between card and host in a step


@dataclass(frozen=True)
class Traced:
    """A block that trains, one that passes gradients on, norm and head and plain loss; and in evaluation the bytes of a
    block's forward and of the loss's."""

    active: Activations
    passed: Activations
    outside: Activations
    evaluated: tuple[int, int]


class Planner:
    """Plans configurations; what it learned of a model it keeps for the next one. `on_cpu`: for ranks on CPUs."""

    def __init__(self, *, on_cpu: bool = False) -> None:
        self._on_cpu = on_cpu
        self._models: dict[str, PreTrainedModel] = {}
        self._traced: dict[str, Traced] = {}

    def plan(self, config: RunConfig, ranks: int, *, local_ranks: int | None = None) -> Plan:
        """Of `ranks` ranks, `local_ranks` on each machine (by default what the launcher says).

        Raises what a run with `config` raises before it loads weights: `ConfigError`, `ModelError`, ...
        """
        ds = resolve(config, ranks, local_ranks=local_ranks)
        base = self._model(config)
        model: Any = base
        if config.substrate.name == "adapter":  # changes the model
            stage = ds["zero_optimization"]["stage"]
            base = copy.deepcopy(base)
            model = adapt(base, config.substrate, stage=stage, quantization=config.model.quantization, empty=True).model
        # How many samples, and so how many steps, there are in an epoch is not known here.
        steps = config.train.steps or getattr(config.update, "growth_steps", None) or 1
        sparse = prepare_model(config, model, steps)
        ds = size_buckets(ds, sparse, model)
        traced = self._activations(config, model, sparse, ds["zero_optimization"]["stage"])
        return _planned(config, ranks, ds, base, sparse, traced, on_cpu=self._on_cpu)

    def _model(self, config: RunConfig) -> PreTrainedModel:
        key = config.model.model_dump_json(exclude={"activation_checkpointing"})
        if key not in self._models:
            tokenizer = None
            if config.model.path is None:  # whose vocabulary the model has, where nothing else is said
                tokenizer = load_tokenizer(tokenizer_name(config.model))
            self._models[key] = models.on_meta(config.model, tokenizer)
        return self._models[key]

    def _activations(self, config: RunConfig, model: Any, sparse: Sparse, stage: int) -> Traced:
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
            block = max(sparse.blocks, key=lambda b: sum(full_numel(p) for p in b.module.parameters()))
            names = [name.removeprefix(f"{block.path}.") for name in block.parameters]

            def tracer(batch: int) -> Tracer:
                return Tracer(model, sparse.structure, batch=batch, length=config.data.max_length, zero3=stage == 3)

            training = tracer(config.train.micro_batch_size)
            passed = training.block(block.module, trains=(), input_requires_grad=True)
            outside = training.outside()
            evaluated = config.eval.micro_batch_size or config.train.micro_batch_size
            other = tracer(evaluated) if evaluated != config.train.micro_batch_size else None
            self._traced[key] = Traced(
                active=training.block(block.module, trains=names, input_requires_grad=True),
                passed=passed,
                outside=outside,
                evaluated=(
                    (other.block(block.module, trains=(), input_requires_grad=False) if other else passed).forward,
                    (other.outside() if other else outside).forward,
                ),
            )
        return self._traced[key]


def _planned(
    config: RunConfig,
    ranks: int,
    ds: dict[str, Any],
    base: PreTrainedModel,
    sparse: Sparse,
    traced: Traced,
    *,
    on_cpu: bool,
) -> Plan:
    stage = ds["zero_optimization"]["stage"]
    weight_bytes = 4 if config.model.dtype == "fp32" else 2
    gradient_bytes = 4 if ds["data_types"]["grad_accum_dtype"] in ("fp32", "float32") else 2
    groups = [[full_numel(p) for p in group.values()] for group in sparse.groups()]
    dense = [full_numel(p) for p in sparse.trainable_parameters()]  # whose gradients backward makes
    offload = offload_device(ds, "optimizer") != "none"
    quantised = quantised_weights(config, base)
    # What is in four bits counts as so many weights of the dtype.
    numels = [
        nf4_bytes(p.numel()) // weight_bytes if id(p) in quantised else p.numel() for p in sparse.model.parameters()
    ]
    accumulation = resolve_batch(config, ranks).accumulation_steps
    outside: dict[str, int] = {}
    if isinstance(sparse.update, Unmask):
        local = config.update.bias_correction == "local"
        budget = config.update.budget
        state = unmasked_state(numels, budget, stage=stage, ranks=ranks, weight_bytes=weight_bytes, local_steps=local)
        candidates, sums = growing_bytes(dense, sparse.update.increment, ranks=ranks, accumulation=accumulation)
        gradient = dense_gradient_bytes(max(dense), ranks=ranks, weight_bytes=weight_bytes)
        outside = {"dense gradient": gradient, "candidates": candidates, "sums": sums}
        trained = budget
    else:
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
        trained = sum(dense)
    lowest = _lowest(config, sparse)
    vocabulary, hidden = base.get_output_embeddings().weight.shape
    tokens = config.train.micro_batch_size * config.data.max_length
    train_head = base.get_output_embeddings().weight.requires_grad
    loss, evaluated = traced.outside, traced.evaluated
    eval_tokens = (config.eval.micro_batch_size or config.train.micro_batch_size) * config.data.max_length
    if choose_fused(config.train.fused_loss, base):
        fused = partial(
            fused_loss, hidden=hidden, vocabulary=vocabulary, weight_bytes=weight_bytes, tiles=7 if on_cpu else 0
        )
        loss = fused(tokens=tokens, trains=train_head)
        evaluated = (evaluated[0], fused(tokens=eval_tokens, trains=False).forward)
    evaluates = config.data.eval is not None or config.data.eval_fraction > 0
    embeddings = base.get_input_embeddings().weight
    shape = StepShape(
        active=traced.active,
        passed=traced.passed,
        loss=loss,
        evaluation=(eval_tokens * hidden * weight_bytes + max(evaluated)) if evaluates else 0,
        embedded=tokens * hidden * weight_bytes,
        depth=len(sparse.blocks) - lowest,
        num_active=len(sparse.active),
        checkpointing=config.model.activation_checkpointing,
        largest=max(dense),
        embeddings=embeddings.numel() if embeddings.requires_grad else 0,
        total=sum(p.numel() for p in sparse.model.parameters()),
        groups=tuple(map(sum, groups)),
        sparse=outside,
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
        parameters=shape.total,
        trained=trained,
        num_blocks=len(sparse.blocks),
        active=shape.num_active,
        state=state,
        memory=memory(
            state,
            shape,
            zero,
            host=_on_host(config, sparse, shape, zero, trained),
            banked=_banked(sparse, shape, ranks) if config.bank.name == "device" and not offload else 0,
        ),
        flops=accumulation
        * step_flops(
            [block_shape(block, base.config) for block in sparse.blocks],
            head=hidden * vocabulary,
            batch=config.train.micro_batch_size,
            length=config.data.max_length,
            active=[lowest, *range(len(sparse.blocks) - shape.num_active + 1, len(sparse.blocks))],
            embeddings=bool(shape.embeddings),
            train_head=train_head,
            checkpointing=shape.checkpointing,
            attention_backward=2.5,
        ),
        volume=step_volume(
            stage=stage,
            ranks=ranks,
            weight_bytes=weight_bytes,
            # While a mask grows all gradients are reduced, in fp32; afterwards only those of the unmasked weights.
            gradient_bytes=4 if outside else gradient_bytes,
            trained=sum(dense),
            forward=shape.total,
            backward=in_blocks - below + head,
            micro_batches=accumulation,
            machine_copies=zero.machine_ranks > 1,
        ),
        offloaded=_through_host(zero, shape, trained, accumulation),
    )


def _lowest(config: RunConfig, sparse: Sparse) -> int:
    """The lowest block that trains in the deepest of all draws."""
    embeddings_train = any(p.requires_grad for p in sparse.always_on.get("embeddings", {}).values())
    return sparse.active[0] if config.selector.name == "fixed" and not embeddings_train else 0


def _nvme_buffers(ds: dict[str, Any]) -> int:
    """DeepSpeed's `offload_optimizer.buffer_count`, if that is what NVMe has."""
    if offload_device(ds, "optimizer") != "nvme":
        return 0
    return ds["zero_optimization"]["offload_optimizer"].get("buffer_count", 4)


def _through_host(zero: Zero, shape: StepShape, trained: int, accumulation: int) -> int:
    """Bytes of a step between a rank's card and host, as DeepSpeed 0.19.8 sends them: gradients go out with every
    micro-batch and come in to be added to, out in fp32 at the end, and updated weights in; offloaded weights come in
    for every forward and backward."""
    crossed = 0
    if zero.offload:
        added = 2 * accumulation * zero.gradient_bytes
        if zero.stage < 3:  # a single micro-batch goes out at the end only
            added = (2 * accumulation - 1) * zero.weight_bytes if accumulation > 1 else 0
        crossed += (added + 4 + zero.weight_bytes) * -(-trained // zero.ranks)
    if zero.offload_param:
        crossed += 2 * accumulation * zero.weight_bytes * -(-shape.total // zero.ranks)
    return crossed


def _banked(sparse: Sparse, shape: StepShape, ranks: int) -> int:
    """What a bank holds at most: of all blocks but those that train."""
    if not sparse.bank.keeps or isinstance(sparse.update, Unmask):  # whose state is not a bank's
        return 0
    reachable = [sparse.blocks[index].numel for index in sparse.selector.reachable(len(sparse.blocks))]
    return banked_bytes(sorted(reachable, reverse=True)[shape.num_active :], ranks=ranks)


def _on_host(config: RunConfig, sparse: Sparse, shape: StepShape, zero: Zero, trained: int) -> dict[str, int]:
    """Bytes of one rank in host memory, masters and moments that are offloaded apart."""
    part = -(-trained // zero.ranks)
    held: dict[str, int] = {}
    if zero.offload and zero.stage < 3:  # weights on their way back, and two buffers of the largest gradient
        held["offload buffers"] = zero.weight_bytes * (part + shape.largest)
    banked = _banked(sparse, shape, zero.ranks)
    largest = sorted((b.numel for b in sparse.blocks), reverse=True)
    on_host = config.bank.name == "cpu" or zero.offload  # bank device: where the state is
    if on_host:
        held["full bank"] = banked
    if config.saves and shape.sparse:
        held["checkpoint, while it is written"] = 20 * part  # masters, moments and indices of unmasked weights
    elif config.saves:
        draws = -(-config.checkpoint.every // config.selector.interval)
        changed = sum(largest[: draws * shape.num_active])
        outside = trained - sum(sparse.blocks[i].numel for i in sparse.active)
        weights = zero.weight_bytes * -(-(changed + outside) // zero.ranks)
        # What lies in host memory is written from there, also what a switch takes out of the bank meanwhile.
        copied = min(banked, banked_bytes(largest[: shape.num_active], ranks=zero.ranks)) if on_host else banked
        held["checkpoint, while it is written"] = weights + 12 * part + copied
    return held


def quantised_weights(config: RunConfig, model: PreTrainedModel) -> set[int]:
    """Ids of the weights that `model.quantization` stores in four bits: transformers leaves out the head."""
    if config.model.quantization is None:
        return set()
    kept = {id(model.get_output_embeddings().weight), id(model.get_input_embeddings().weight)}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    return linear - kept
