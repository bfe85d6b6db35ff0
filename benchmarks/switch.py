"""What a switch costs: seconds and bytes, as ratios of the steady step of the same run.

    deepspeed --num_accelerators 2 benchmarks/switch.py --stage 3 --blocks 24 --hidden 256 --active 2 --interval 10 \\
        --switches 20 --bank cpu --json switch.json

Rank 0's figures. Memory is measured in a second pass over the same engine, because watching every storage is slow.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.entry import prepare_process  # noqa: E402

prepare_process()  # before torch is imported

import deepspeed  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from deepspeed import comm as dist  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.ops.adam import DeepSpeedCPUAdam  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import trainer  # noqa: E402
from trainer.accounting import measured_state, model_state  # noqa: E402
from trainer.blocks import full_numel  # noqa: E402
from trainer.config.deepspeed import size_buckets  # noqa: E402
from trainer.selectors import Uniform  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=3, choices=(0, 1, 2, 3), help="ZeRO stage")
    parser.add_argument("--blocks", type=int, default=24, help="blocks of the model")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--active", type=int, default=2, help="blocks that train at a time")
    parser.add_argument(
        "--interval", type=int, default=10, help="optimizer steps between switches, 6 or more for times"
    )
    parser.add_argument("--switches", type=int, default=20, help="switches to measure")
    parser.add_argument("--bank", default="discard", choices=("discard", "cpu"))
    parser.add_argument("--offload", action="store_true", help="optimizer state in host memory")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--frozen-embeddings", action="store_true", help="no always-on parts: backward depth varies")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--sequence", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences per rank and step")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--memory-only", action="store_true", help="skip the timed pass")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def build(args: argparse.Namespace) -> tuple[Any, trainer.Sparse, dict[str, Any]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=11 * args.hidden // 4,
        num_hidden_layers=args.blocks,
        num_attention_heads=max(4, args.hidden // 128),
        num_key_value_heads=max(4, args.hidden // 128),
        max_position_embeddings=args.sequence,
        use_cache=False,
    )
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    device = get_accelerator().current_device_name()
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    if args.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    sparse = trainer.prepare(
        model,
        selector=Uniform(blocks=args.active, interval=args.interval),
        bank=args.bank,
        always_on=() if args.frozen_embeddings else ("embeddings", "head", "norm"),
    )
    groups = sparse.param_groups(weight_decay=0.01)
    zero: dict[str, Any] = {"stage": args.stage, "overlap_comm": device != "cpu", "contiguous_gradients": True}
    if args.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device != "cpu"}
    ds = {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": args.dtype == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    largest_group = max(sum(p.numel() for p in group["params"]) for group in groups)
    largest = max(p.numel() for group in groups for p in group["params"])
    ds = size_buckets(ds, largest_parameter=largest, largest_group=largest_group, hidden=args.hidden)
    if args.offload:
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=device != "cpu")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds)
    sparse.attach(engine)
    return engine, sparse, ds


class Watch:
    """Hooks around the switch, which happens in the engine's forward pre-hook: ours stand before and after it."""

    def __init__(self, engine: Any, sparse: trainer.Sparse, args: argparse.Namespace) -> None:
        self.engine, self.sparse, self.args = engine, sparse, args
        self.switch_seconds: list[float] = []
        self.switch_peaks: list[int] = []
        self.live_after_switch: list[int] = []
        self.bank_bytes: list[int] = []
        self.memory_pass = False
        self.switches = 0  # of the memory pass; every tenth is looked at, because scanning all objects is slow
        self._tracker: Tracker | None = None
        self._before = 0
        self._started = 0.0
        engine.register_forward_pre_hook(self._enter, prepend=True)
        engine.register_forward_pre_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self._before = self.sparse.interval
        due = self.sparse.steps // self.args.interval != self._before
        if self.memory_pass and due and self.switches % 10 == 9:
            self._tracker = Tracker()
            self._tracker.__enter__()
        get_accelerator().synchronize()
        self._started = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        get_accelerator().synchronize()
        seconds = time.perf_counter() - self._started
        if self._tracker is not None:
            self._tracker.__exit__(None, None, None)
            self.switch_peaks.append(self._tracker.peak)
            self._tracker = None
        if self.sparse.interval == self._before:
            return
        if self.memory_pass:
            self.switches += 1
            self.bank_bytes.append(self.sparse.bank.num_bytes)
            if self.switches == 1 or self.switches % 10 == 0:
                self.live_after_switch.append(live_bytes(exclude=self.sparse.bank))
        else:
            self.switch_seconds.append(seconds)

    def step(self, number: int) -> float:
        generator = torch.Generator().manual_seed(1000 * number + dist.get_rank())
        shape = (self.args.batch, self.args.sequence)
        ids = torch.randint(self.args.vocabulary, shape, generator=generator).to(self.engine.device)
        get_accelerator().synchronize()
        started = time.perf_counter()
        self.engine.backward(self.engine(input_ids=ids, labels=ids).loss)
        self.engine.step()
        get_accelerator().synchronize()
        return time.perf_counter() - started


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
    if get_accelerator().device_name() != "cpu":
        return get_accelerator().memory_allocated()  # a bank lies in host memory
    banked = storages(t for piece in getattr(exclude, "_stored", {}).values() for t in piece.tensors.values())
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


def timed_pass(watch: Watch, args: argparse.Namespace) -> dict[str, float]:
    steps: list[list[float]] = []
    with quiet_collector():
        for number in range((args.switches + 1) * args.interval):
            if number % args.interval == 0:
                steps.append([])
            steps[-1].append(watch.step(number))
    steady = [t for interval in steps[1:] for t in interval[4:]] or [t for interval in steps[1:] for t in interval]
    ratios = [max(interval[:3]) / statistics.median(interval[4:]) for interval in steps[1:] if len(interval) > 4]
    step, switch = statistics.median(steady), statistics.median(watch.switch_seconds)
    return {
        "step_seconds_median": step,
        "switch_seconds_median": switch,
        "switch_over_step": switch / step,
        "after_switch_ratio": statistics.median(ratios) if ratios else float("nan"),
    }


def memory_pass(watch: Watch, args: argparse.Namespace, start: int) -> dict[str, float]:
    """Switch every other step, watching storages; the peak of a step is taken in one without a switch."""
    watch.memory_pass = True
    watch.sparse.selector.interval = args.interval = 2
    step_peaks = []
    number = start
    while watch.switches < 10 * math.ceil(args.switches / 10):
        steady = watch.sparse.steps % 2 == 1 and len(step_peaks) < 3
        if steady:
            with Tracker() as tracker:
                watch.step(number)
            step_peaks.append(tracker.peak)
        else:
            watch.step(number)
        number += 1
    return {
        "live_bytes_first": watch.live_after_switch[0],
        "live_bytes_last": watch.live_after_switch[-1],
        "live_bytes_largest": max(watch.live_after_switch),
        "bank_bytes": watch.bank_bytes[-1],
        "bank_bytes_largest": max(watch.bank_bytes),
        "switch_peak_bytes": max(watch.switch_peaks),
        "step_peak_bytes": max(step_peaks),
    }


def state_bytes(sparse: trainer.Sparse, engine: Any, ds: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    held = measured_state(sparse.held(), offload=args.offload)
    weight_bytes = 2 if args.dtype == "bf16" else 4
    minimum = model_state(
        [full_numel(p) for p in engine.module.parameters()],
        [[full_numel(p) for p in group.values()] for group in sparse.groups()],
        stage=args.stage,
        ranks=dist.get_world_size(),
        weight_bytes=weight_bytes,
        offload=args.offload,
    )
    zero = ds["zero_optimization"]
    buffers = 2 if zero["overlap_comm"] and args.stage in (1, 2) else 1
    inactive = sum(b.numel for b in sparse.blocks if b.index not in sparse.active)
    return {
        "model_state_bytes": held.total,
        "model_state_minimum_bytes": minimum.total,
        "bucket_bytes": buffers * weight_bytes * zero.get("reduce_bucket_size", 0),
        "inactive_parameters": inactive,
    }


def main() -> None:
    args = arguments()
    on_cpu = get_accelerator().device_name() == "cpu"
    if not on_cpu:
        get_accelerator().set_device(args.local_rank)
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else None)
    command = "deepspeed benchmarks/" + " ".join(
        [Path(sys.argv[0]).name, *(a for a in sys.argv[1:] if "local_rank" not in a)]
    )
    asked = vars(args) | {"json": None, "local_rank": None}
    engine, sparse, ds = build(args)
    engine.train()
    watch = Watch(engine, sparse, args)
    figures: dict[str, Any] = {}
    if not args.memory_only:
        figures |= timed_pass(watch, args)
    start = sparse.steps
    figures |= memory_pass(watch, args, start)
    figures |= state_bytes(sparse, engine, ds, args)
    figures["settings"] = {key: value for key, value in asked.items() if value is not None}
    figures["environment"] = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "ranks": dist.get_world_size(),
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
        "versions": {m.__name__: m.__version__ for m in (torch, deepspeed, transformers)},
    }
    if dist.get_rank() == 0:
        print(json.dumps(figures, indent=2), flush=True)
        if args.json:
            args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
