"""Build the parts of a run that its configuration names: process group, model and what trains in it, optimizer."""

from __future__ import annotations

import copy
import io
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedConfig
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from peft import PeftModel
from torch import nn
from torch.distributed import distributed_c10d
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer import updates
from trainer.api import prepare as prepare_sparse
from trainer.config import ConfigError, RunConfig
from trainer.config.deepspeed.buckets import size_buckets as size_deepspeed_buckets
from trainer.config.text import in_short
from trainer.data.batches import SampleOrder
from trainer.data.order import Order
from trainer.data.stream_order import StreamOrder
from trainer.data.tokenised import TokenisedData
from trainer.data.tokenizer import new_ids
from trainer.engine import banks
from trainer.engine.sparse import Sparse
from trainer.engine.zero.private_names import SHARED_MEMORY
from trainer.model import load as models
from trainer.model.adapters import Adapted, adapt, reads_base
from trainer.model.blocks import PARTS, find, full_numel, full_shape, refused_tower
from trainer.model.fused_head import obstacle
from trainer.model.loss import LossChoice, choose_fused
from trainer.model.new_rows import split
from trainer.model.towers import towers_of

# Flags in Linux's /proc/cpuinfo of CPUs that compute in a dtype.
_HALF_PRECISION_OF_CPUS = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"}}


def check_hardware(config: RunConfig) -> None:
    """Raise `ConfigError` if the hardware does not support `model.dtype`. Emulated bf16, which torch
    counts as support, does not suffice: it is slower than fp32."""
    accelerator = get_accelerator()
    on_cuda = accelerator.device_name() == "cuda"
    supported = {
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else accelerator.is_bf16_supported(),
        "fp16": bool(accelerator.is_fp16_supported()),
        "fp32": True,
    }
    if not supported[config.model.dtype]:
        name = torch.cuda.get_device_name() if on_cuda else accelerator.device_name()
        allowed = ", ".join(dtype for dtype, supports in supported.items() if supports)
        raise ConfigError(
            [f"model.dtype: {config.model.dtype}, which {name} does not support; allowed here: {allowed}"]
        )


def emulates(dtype: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether training in `dtype` would run on a CPU without arithmetic for it; False if that is unknown."""
    if dtype == "fp32" or get_accelerator().device_name() != "cpu" or not cpuinfo.exists():
        return False
    # One line for each core, called flags on x86 and Features on ARM.
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    return flags is not None and not _HALF_PRECISION_OF_CPUS[dtype] & set(flags[1].split())


def check_length(config: RunConfig, model: PreTrainedModel) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Models with relative positions have no limit, which XLNet expresses as -1.
    if isinstance(positions, int) and 0 < positions < config.data.max_length:
        raise ConfigError(
            [
                f"data.max_length: {config.data.max_length} tokens, but the model has {positions} positions "
                f"(max_position_embeddings); allowed: 1 to {positions}"
            ]
        )


def check_images(data: TokenisedData, model: nn.Module) -> None:
    """Raise `ConfigError` if the data has images and `model` does not read any."""
    towers = towers_of(model)
    if data.has_images and (towers is None or not any(towers.outside.values())):
        raise ConfigError(
            ["data.train: has rows with images, but the model reads text only; give rows of text, or another model"]
        )


def initialise_process_group(*, timeout_minutes: float) -> None:
    """Initialise the process group from the launcher's variables, or as a group of one without a launcher. A rank fails
    if it waits longer than `timeout_minutes` for the others in a collective."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if not on_cpu:
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(minutes=timeout_minutes)
    # DeepSpeed creates ZeRO's groups without a timeout, for which torch uses these defaults.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):  # each rank would print the name of an operator that DeepSpeed built
            deepspeed.init_distributed("gloo" if on_cpu else None, auto_mpi_discovery=False, timeout=timeout)
    except BaseException:
        print(printed.getvalue(), end="")
        raise
    if on_cpu:
        leave_nothing_in_shared_memory()


def leave_nothing_in_shared_memory() -> None:
    """Unlink the shared memory of DeepSpeed's collectives on CPUs (66 MiB per rank), which would otherwise outlive the
    run. The ranks, which all have it open, can still use it. Collective."""
    dist.barrier()
    address, port, rank = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    name = SHARED_MEMORY.format(user=os.getuid(), address=address, port=port, rank=rank)
    Path(name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Built:
    """A run's model and everything decided about it before the engine exists. `ds` includes the buckets' sizes."""

    base: PreTrainedModel  # the language model; with adapters they are inside
    model: nn.Module  # for the engine: `base`, or PEFT's model around it
    adapters: Adapted | None
    loss: LossChoice
    sparse: Sparse
    ds: dict[str, Any]

    @property
    def warnings(self) -> Sequence[str]:
        """Return what a user should know about the adapters."""
        return () if self.adapters is None else self.adapters.warnings


def build_model(
    config: RunConfig,
    ds: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    num_steps: int | None,
    empty: bool,
    base: PreTrainedModel | None = None,
    find_obstacle: Callable[[], str | None] | None = None,
) -> Built:
    """Build the model of a run of `num_steps` optimizer steps: load, add adapters, freeze all but the first active set.

    Training, the dry run and the planner all use this. `empty`: build without weights, on the meta device;
    `base` may then be an empty model built earlier, which is copied before it is changed. `ds` is the resolved
    DeepSpeed dictionary. `find_obstacle` returns why the loss cannot be fused, or None if it can; by default this is
    tried on an empty model. Raises `ConfigError`, `ModelError`, `AdapterError`, `BlockError` or `LossError`.
    """
    stage = ds["zero_optimization"]["stage"]
    if not empty:
        torch.manual_seed(config.seed)
        onto_device = not reads_base(config.substrate)
        base = models.load(config.model, tokenizer, seed=config.seed, deepspeed=dict(ds), onto_device=onto_device)
    elif base is None:
        base = models.on_meta(config.model, tokenizer)
    elif config.substrate.name == "adapter" or config.always_on.new_rows:
        base = copy.deepcopy(base)
    check_length(config, base)
    split(base, new_ids(tokenizer), config.always_on.new_rows)
    model, adapters = base, None
    if config.substrate.name == "adapter":
        if not empty:
            torch.manual_seed(config.seed)
        with nullcontext() if empty else models.partitioned_creation(dict(ds)):
            adapters = adapt(
                base,
                config.substrate,
                stage=stage,
                quantization=config.model.quantization,
                vision=config.model.vision,
                empty=empty,
            )
        model = adapters.model
    find_obstacle = find_obstacle or partial(_obstacle, config, tokenizer)
    loss = choose_fused(config.train.fused_loss, base, find_obstacle)
    sparse = make_sparse(config, model, num_steps)
    return Built(base, model, adapters, loss, sparse, size_buckets(ds, sparse, model))


def _obstacle(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    model = models.on_meta(config.model, tokenizer)
    return obstacle(model, find(model, path=config.model.blocks).path)


def make_sparse(config: RunConfig, model: nn.Module, num_steps: int | None) -> Sparse:
    """Freeze all of `model` but the blocks and parts that `config` trains first, in a run of `num_steps` steps."""
    adapters = config.substrate.name == "adapter"
    # With adapters, PEFT's `modules_to_save` decides what trains outside the blocks.
    parts = None if adapters else [part for part in (*PARTS, "projector") if getattr(config.always_on, part)]
    if parts is not None and config.model.vision == "train":
        parts.append("vision")
    try:
        sparse = prepare_sparse(
            model,
            selector=config.selector.seeded(config.seed),
            update=updates.rule(config.update.name).from_config(config, num_steps=num_steps),
            bank=banks.build(config.bank.name, **config.bank.model_dump(exclude={"name"})),
            always_on=parts,
            substrate=config.substrate.name,
            blocks=config.model.blocks,
        )
    except ConfigError:
        raise
    except ValueError as error:  # such as more blocks, or a larger budget, than the model has
        raise ConfigError([str(error)]) from error
    if config.model.vision == "train" and not sparse.always_on.get("vision"):  # with adapters; others are refused above
        raise ConfigError([refused_tower("vision", sparse.structure)])
    _check_rule(config, sparse)
    return sparse


def _check_rule(config: RunConfig, sparse: Sparse) -> None:
    """Raise `TypeError` if the settings of the update rule say something else of it than it does: settings are what
    refuses a configuration before weights are loaded."""
    settings, rule = config.update, sparse.update
    own_state = bool(sparse.trained_by_rule(range(len(sparse.blocks))))
    if own_state != settings.own_state:
        raise TypeError(f"{type(settings).__name__}.own_state is {settings.own_state}, but for this model {own_state}")
    if settings.clips and rule.gradient_clipping != config.train.gradient_clipping:
        raise TypeError(
            f"{type(settings).__name__}.clips is True, but {type(rule).__name__}.from_config ignores "
            "train.gradient_clipping"
        )


def bytes_to_write(config: RunConfig, built: Built, *, merge: bool) -> int:
    """Return the bytes that all ranks together write: the first checkpoint (master and two moments in fp32, and what
    the update rule saves of its own), and the model at the end unless adapters are written instead."""
    sparse, written = built.sparse, 0
    if config.saves:
        in_optimizer = [full_numel(p) for group in sparse.groups() for p in group.values()]
        own = [full_numel(p) for p in sparse.trained_by_rule(sparse.active).values()]
        rule = sparse.update.footprint(own, [], ranks=1, weight_bytes=4, accumulation=1)
        written = 12 * sum(in_optimizer) + rule.saved
    if built.adapters is None or merge:
        written += sum(full_numel(p) * p.element_size() for p in built.model.parameters())
    return written


def build_batches(config: RunConfig, data: TokenisedData, *, rank: int, ranks: int) -> Order:
    """Return the order in which `rank` sees the samples of `data`."""
    build = partial(SampleOrder, data.sizes) if data.streams is None else partial(StreamOrder, data.streams)
    return build(
        weights=data.weights,
        fingerprint=data.fingerprint,
        made_of=data.made_of,
        earlier_fingerprint=data.earlier_fingerprint,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=rank,
        ranks=ranks,
    )


def size_buckets(ds: Mapping[str, Any], sparse: Sparse, model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Return `ds` with sizes for the buckets that are "auto". Raises `ConfigError` for what DeepSpeed refuses."""
    # Gradients of what an update rule trains itself are not in DeepSpeed's buckets.
    candidates = sparse.ever_in_optimizer()
    outside = [sum(full_numel(p) for p in part.values()) for part in sparse.always_on.values()]
    sized = size_deepspeed_buckets(
        ds,
        largest_block=max(sum(full_numel(p) for p in block.module.parameters()) for block in sparse.blocks),
        largest_parameter=max(full_numel(p) for p in candidates),
        largest_group=max([block.numel for block in sparse.blocks] + outside),
        hidden=full_shape(model.get_input_embeddings().weight)[-1],
    )
    _refuse_what_deepspeed_refuses(sized)
    return sized


def _refuse_what_deepspeed_refuses(ds: dict[str, Any]) -> None:
    """Raise `ConfigError` with DeepSpeed's own message. Needs no engine, which a dry run lacks."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1  # as many as DeepSpeed checks the batch for
    batch = ds["train_micro_batch_size_per_gpu"] * ds["gradient_accumulation_steps"] * ranks
    try:
        DeepSpeedConfig(copy.deepcopy(ds) | {"train_batch_size": batch})
    except Exception as error:  # pydantic's, AssertionError, KeyError, ...
        message = in_short(" ".join(str(error).split()), 500)
        raise ConfigError(
            [f"deepspeed: DeepSpeed refuses this configuration: {type(error).__name__}: {message}"]
        ) from error


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
    return (ds["zero_optimization"].get(f"offload_{what}") or {}).get("device", "none")
