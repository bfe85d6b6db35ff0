"""The parts of a run that its configuration names: process group, blocks and what trains, buckets, optimizer."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch.distributed import distributed_c10d

from trainer import selectors, updates
from trainer.blocks import PARTS, full_numel, full_shape
from trainer.config import ConfigError, RunConfig
from trainer.config import deepspeed as ds_config
from trainer.engine.attach import Sparse
from trainer.engine.attach import prepare as prepare_sparse
from trainer.engine.registration import SHARED_MEMORY
from trainer.updates import UpdateRule
from trainer.updates.adam import AdamSettings


def check_hardware(config: RunConfig) -> None:
    """Half precision that the hardware has. What torch calls supported includes an emulation of bf16 that is slower
    than fp32."""
    accelerator = get_accelerator()
    on_cuda = accelerator.device_name() == "cuda"
    has = {
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else accelerator.is_bf16_supported(),
        "fp16": bool(accelerator.is_fp16_supported()),
        "fp32": True,
    }
    if not has[config.model.dtype]:
        name = torch.cuda.get_device_name() if on_cuda else accelerator.device_name()
        allowed = ", ".join(dtype for dtype, present in has.items() if present)
        raise ConfigError([f"model.dtype: {config.model.dtype}, which {name} does not have; allowed here: {allowed}"])


def check_length(config: RunConfig, model: torch.nn.Module) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        raise ConfigError(
            [
                f"data.max_length: {config.data.max_length} tokens, but the model has {positions} positions "
                f"(max_position_embeddings); allowed: 1 to {positions}"
            ]
        )


def initialise_process_group(*, timeout_minutes: float) -> None:
    """From the launcher's variables; a process started by itself is a group of one. A rank that waits longer than
    `timeout_minutes` for the others in a collective fails."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if not on_cpu:
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    patience = timedelta(minutes=timeout_minutes)
    # DeepSpeed makes the groups that ZeRO talks in without saying how long to wait: for those torch looks here.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = patience
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else None, auto_mpi_discovery=False, timeout=patience)
    if on_cpu:
        leave_nothing_in_shared_memory()


def leave_nothing_in_shared_memory() -> None:
    """What DeepSpeed's collectives on CPUs share, 66 MiB a rank, would stay in memory after the run, for good. Without
    a name it stays as long as somebody has it open, as all ranks do by now. Collective."""
    dist.barrier()
    address, port, rank = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    name = SHARED_MEMORY.format(user=os.getuid(), address=address, port=port, rank=rank)
    Path(name).unlink(missing_ok=True)


def prepare_model(config: RunConfig, model: torch.nn.Module, num_steps: int) -> Sparse:
    """`model` with the blocks and parts of it that `config` trains, in a run of `num_steps` optimizer steps."""
    adapters = config.substrate.name == "adapter"
    # Outside the blocks PEFT decides what trains: `modules_to_save`.
    parts = None if adapters else [part for part in PARTS if getattr(config.always_on, part)]
    settings = {key: value for key, value in config.selector.model_dump().items() if key not in ("name", "probe")}
    selector = selectors.build(config.selector.name, seed=config.seed, **settings)
    try:
        return prepare_sparse(
            model,
            selector=selector,
            update=build_update(config, num_steps),
            bank=config.bank.name,
            always_on=parts,
            substrate=config.substrate.name,
            blocks=config.model.blocks,
        )
    except ValueError as error:  # more blocks than there are, a larger budget than there are weights
        raise ConfigError([str(error)]) from error


def build_update(config: RunConfig, num_steps: int) -> UpdateRule:
    settings = config.update.model_dump(exclude={"name"})
    if config.update.name == "unmask":  # which makes the step itself
        chosen = config.optimizer
        settings["growth_steps"] = growth = config.update.growth_steps or num_steps
        if growth > num_steps:  # the budget would never be reached
            allowed = f"allowed: null, or up to {num_steps}, which are the run's steps"
            raise ConfigError([f"update.growth_steps: {growth}; {allowed}"])
        settings["adam"] = AdamSettings(chosen.betas, chosen.eps, chosen.weight_decay, chosen.name == "adamw")
        settings["gradient_clipping"] = config.train.gradient_clipping
    return updates.build(config.update.name, **settings)


def size_buckets(ds: dict[str, Any], sparse: Sparse, model: torch.nn.Module) -> dict[str, Any]:
    # Where an update rule reduces gradients itself, DeepSpeed has none.
    candidates = sparse.ever_in_optimizer()
    outside = [sum(full_numel(p) for p in part.values()) for part in sparse.always_on.values()]
    return ds_config.size_buckets(
        ds,
        largest_block=max(sum(full_numel(p) for p in block.module.parameters()) for block in sparse.blocks),
        largest_parameter=max(full_numel(p) for p in candidates),
        largest_group=max([block.numel for block in sparse.blocks] + outside),
        hidden=full_shape(model.get_input_embeddings().weight)[-1],
    )


def build_optimizer(config: RunConfig, sparse: Sparse, *, offload: bool) -> torch.optim.Optimizer:
    chosen = config.optimizer
    groups = sparse.param_groups(lr=chosen.lr, weight_decay=chosen.weight_decay, lr_always_on=chosen.lr_always_on)
    settings: dict[str, Any] = {"lr": chosen.lr, "betas": chosen.betas, "eps": chosen.eps}
    decoupled = chosen.name == "adamw"
    if offload:
        return DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **settings)
    if chosen.name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **settings)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(groups, fused=get_accelerator().device_name() == "cuda", **settings)


def offload_device(ds: dict[str, Any], what: str) -> str:
    return ds["zero_optimization"].get(f"offload_{what}", {}).get("device", "none")
