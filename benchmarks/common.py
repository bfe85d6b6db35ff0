"""What the benchmarks share: random-weight models, DeepSpeed settings for them, live bytes, and the results' file."""

from __future__ import annotations

import datetime
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.provenance import command  # noqa: E402
from trainer.cli.train import set_up_process  # noqa: E402

set_up_process()  # before torch is imported

import deepspeed  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from deepspeed import comm as dist  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.ops.adam import DeepSpeedCPUAdam  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

import trainer  # noqa: E402
from trainer.config.deepspeed.buckets import size_buckets  # noqa: E402
from trainer.engine.banks.device import Device  # noqa: E402
from trainer.run.setup import leave_nothing_in_shared_memory  # noqa: E402

# Of the published IST point.
IST_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def start_process(local_rank: int) -> None:
    """Join the process group of the launcher."""
    on_cpu = get_accelerator().device_name() == "cpu"
    if not on_cpu:
        get_accelerator().set_device(local_rank)
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else None)
    if on_cpu:
        leave_nothing_in_shared_memory()


def llama(
    *,
    blocks: int,
    hidden: int,
    vocabulary: int,
    length: int,
    dtype: str = "fp32",
    checkpointing: bool = False,
    **more: Any,
) -> LlamaForCausalLM:
    """A Llama of random weights with heads of 64 and an MLP of 2.75 times the width."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": max(4, hidden // 64), "num_key_value_heads": max(4, hidden // 64)}
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=blocks,
        max_position_embeddings=length,
        use_cache=False,
        **{"intermediate_size": 11 * hidden // 4, **heads, **more},
    )
    # On the device and in its dtype from the first: a large model does not fit twice.
    with torch.device(get_accelerator().current_device_name()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    return model


def with_lora(model: LlamaForCausalLM, *, rank: int, targets: str | list[str] = IST_TARGETS) -> PeftModel:
    """`model` with LoRA of `rank`, in the model's dtype."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def start_engine(
    model: torch.nn.Module,
    sparse: trainer.Sparse,
    *,
    stage: int,
    batch: int,
    dtype: str = "fp32",
    offload: bool = False,
    lr: float = 1e-4,
    **attach: Any,
) -> tuple[Any, dict[str, Any]]:
    """The engine of a prepared model with AdamW, attached, and its DeepSpeed settings: buckets as train.py has them."""
    on_cpu = get_accelerator().device_name() == "cpu"
    groups = sparse.param_groups(weight_decay=0.01)
    # One rank has nothing to overlap, and pays for it with a second bucket.
    overlap = not on_cpu and dist.get_world_size() > 1
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": overlap, "contiguous_gradients": True}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": not on_cpu}
    ds = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # as train.py has it: else every forward waits for the device
    }
    ds = size_buckets(
        ds,
        largest_block=max(sum(p.numel() for p in block.module.parameters()) for block in sparse.blocks),
        largest_parameter=max(p.numel() for group in groups for p in group["params"]),
        largest_group=max(sum(p.numel() for p in group["params"]) for group in groups),
        hidden=model.config.hidden_size,
    )
    if offload:
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, lr=lr)
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=not on_cpu)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds)
    sparse.attach(engine, **attach)
    engine.train()
    return engine, ds


def around_switch(sparse: trainer.Sparse, enter: Callable[[], None], leave: Callable[[], None]) -> None:
    """Call `enter` before and `leave` after what Strata does ahead of each forward: draws, switches, the guard."""
    inner = sparse._before_forward

    def before_forward() -> None:
        enter()
        inner()
        leave()

    sparse._before_forward = before_forward  # type: ignore[method-assign]


def random_batch(engine: Any, step: int, *, batch: int, length: int, vocabulary: int) -> torch.Tensor:
    """Token ids [batch, length] of this rank for `step`."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randint(vocabulary, (batch, length), generator=generator).to(engine.device)


def probe_batches(*, length: int, vocabulary: int) -> Iterator[torch.Tensor]:
    """Token ids [16 / ranks, length] of this rank for each probe."""
    device = get_accelerator().current_device_name()
    for number in itertools.count():
        generator = torch.Generator().manual_seed(9_000_000 + 100 * number + dist.get_rank())
        yield torch.randint(vocabulary, (-(-16 // dist.get_world_size()), length), generator=generator).to(device)


def summed_loss(module: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(cross-entropy summed over the predicted tokens of `ids`, their number)."""
    count = ids[:, 1:].numel()
    return module(input_ids=ids, labels=ids).loss * count, count


def train_step(engine: Any, ids: torch.Tensor, passes: list[float] | None = None) -> float:
    """Seconds of one optimizer step; those of its forward and backward are added to `passes`."""
    get_accelerator().synchronize()
    started = time.perf_counter()
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    if passes is not None:
        get_accelerator().synchronize()
        passes.append(time.perf_counter() - started)
    engine.step()
    get_accelerator().synchronize()
    return time.perf_counter() - started


def finish(figures: dict[str, Any], file: Path | None) -> None:
    """Print rank 0's figures with what they were measured on, write them to `file`, and leave the process group."""
    on_cpu = get_accelerator().device_name() == "cpu"
    figures["environment"] = {
        "command": command("deepspeed"),
        "date": datetime.date.today().isoformat(),
        "ranks": dist.get_world_size(),
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
        "versions": {module.__name__: module.__version__ for module in (torch, deepspeed, transformers)},
    }
    if dist.get_rank() == 0:
        print(json.dumps(figures, indent=2), flush=True)
        if file:
            file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    torch.distributed.destroy_process_group()


def live_tensors() -> Iterator[torch.Tensor]:
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):  # isinstance would wake lazy modules
            yield found
            if not found._is_view() and found.is_leaf and found.grad is not None:
                yield found.grad


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes by storage address; tensors without storage (meta) do not count."""
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.device.type != "meta" and t.numel()
    }


def live_bytes(*, exclude: Any = None) -> int:
    """Bytes of all live storages of this process, those of the bank apart. The device's own count where it has one."""
    gc.collect()
    banked = storages(t for piece in getattr(exclude, "_stored", {}).values() for t in piece.tensors.values())
    if get_accelerator().device_name() != "cpu":
        return get_accelerator().memory_allocated() - (sum(banked.values()) if type(exclude) is Device else 0)
    return sum(size for pointer, size in storages(live_tensors()).items() if pointer not in banked)


class Tracker(TorchDispatchMode):
    """The largest sum of live storages while it is entered: the device's counter, or every result of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __enter__(self) -> Tracker:
        gc.collect()
        if get_accelerator().device_name() != "cpu":
            get_accelerator().reset_peak_memory_stats()
        for tensor in live_tensors():
            self._add(tensor)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        if get_accelerator().device_name() != "cpu":
            self.peak = get_accelerator().max_memory_allocated()
        self._live.clear()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if get_accelerator().device_name() == "cpu":
            new = [self._add(t) for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            if any(new):
                self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
                self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result

    def _add(self, tensor: torch.Tensor) -> bool:
        if tensor.device.type == "meta":
            return False
        storage = tensor.untyped_storage()
        known = self._live.get(storage._cdata)
        if known is not None and not known[0].expired():
            return False
        self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return True


@contextmanager
def quiet_collector() -> Iterator[None]:
    """A collection in the middle of a timed step would be counted as the step's."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
