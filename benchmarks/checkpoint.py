"""What a checkpoint costs: bytes, seconds, how long training stands still, and host memory, by save and by resume.

    deepspeed --num_accelerators 2 benchmarks/checkpoint.py --stage 3 --blocks 24 --hidden 512 --bank cpu --json FILE

Layer-wise training saves asynchronously, at the end of an interval (the next thing is a switch, which waits until
everything is copied) and in the middle of one; beside it, in the same run, full fine-tuning of the same model saves
through DeepSpeed's own `engine.save_checkpoint`, and a plain copy of as many bytes in memory is timed. Seconds are the
largest of any rank, bytes those of all ranks, host memory what rank 0's process grew by at most.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import finish, llama, quiet_collector, random_batch, start_engine, start_process, train_step
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

import trainer
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.store import Store
from trainer.model.blocks import full_numel
from trainer.selectors import All, Uniform


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=3, choices=(1, 2, 3), help="ZeRO stage")
    parser.add_argument("--blocks", type=int, default=24, help="blocks of the model")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model")
    parser.add_argument("--active", type=int, default=2, help="blocks that train at a time")
    parser.add_argument("--saves", type=int, default=6, help="checkpoints")
    parser.add_argument("--intervals", type=int, default=1, help="of two steps, from one checkpoint to the next")
    parser.add_argument("--bank", default="discard", choices=("discard", "device", "cpu"))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--sequence", type=int, default=32, help="tokens per sequence")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; by default a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def start(args: argparse.Namespace, selector: Any, bank: str) -> tuple[Any, trainer.Sparse]:
    gc.collect()  # an engine before this one is a cycle of objects
    model = llama(
        blocks=args.blocks, hidden=args.hidden, vocabulary=args.vocabulary, length=args.sequence, dtype=args.dtype
    )
    sparse = trainer.prepare(model, selector=selector, bank=bank)
    engine, _ = start_engine(model, sparse, stage=args.stage, batch=1, dtype=args.dtype)
    return engine, sparse


def steps(engine: Any, args: argparse.Namespace, number: int, intervals: int = 1) -> None:
    for step in range(2 * number * intervals, 2 * (number + 1) * intervals):
        train_step(engine, random_batch(engine, step, batch=1, length=args.sequence, vocabulary=args.vocabulary))


def measured(action: Callable[[], Any]) -> dict[str, float]:
    """Of `action` on all ranks, which begin together: seconds of the slowest, and what this process grew by."""
    dist.barrier()
    before = _reset_peak()
    started = time.perf_counter()
    action()
    get_accelerator().synchronize()
    seconds = time.perf_counter() - started
    return {"seconds": _largest(seconds), "host_bytes": _peak() - before}


def _reset_peak() -> int:
    """This process's resident bytes now, from which its peak is counted again."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def _largest(value: float) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=get_accelerator().current_device_name())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def least_bytes(sparse: trainer.Sparse, changed: set[int], args: argparse.Namespace) -> int:
    """What has to be written: fp32 masters and two moments of what trains and, with a bank, of what trained since the
    last checkpoint; without one its weights."""
    kept = 12 if sparse.bank.keeps else (2 if args.dtype == "bf16" else 4)
    blocks = [(12 if index in sparse.active else kept) * sparse.blocks[index].numel for index in changed]
    return sum(blocks) + 12 * sum(full_numel(p) for part in sparse.always_on.values() for p in part.values())


def plain_copy(num_bytes: int) -> Callable[[], float]:
    """Times one copy of this rank's `num_bytes` into host memory that is there already."""
    device = get_accelerator().current_device_name()
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)  # zeros would be one page, read again and again
    target = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=device != "cpu")

    def copy() -> float:
        dist.barrier()
        started = time.perf_counter()
        target.copy_(source)
        get_accelerator().synchronize()
        return _largest(time.perf_counter() - started)

    return copy


def save(checkpoints: Checkpoints, sparse: trainer.Sparse, step: int) -> None:
    """Until weights and state may change, as they do at once where a new interval begins."""
    checkpoints.save(step, {})
    sparse.change()


def in_an_interval(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """How long training stands still for saves in the middle of an interval, where copies run beside a forward and a
    backward: in the call, and before the step."""
    engine, sparse = start(args, Uniform(blocks=args.active, interval=4), args.bank)
    checkpoints = Checkpoints(sparse, folder, keep=1, asynchronous=True)
    ratios = []
    with quiet_collector():
        for number in range(0, 2 * args.saves, 2):
            steps(engine, args, number)
            checkpoints.finish()
            step = 2 * number + 2
            stall = measured(lambda step=step: checkpoints.save(step, {}))["seconds"]
            ids = random_batch(engine, step, batch=1, length=args.sequence, vocabulary=args.vocabulary)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            stall += measured(sparse.change)["seconds"]
            engine.step()
            checkpoints.finish()
            ratios.append(stall / copy_seconds(folder, step))
            train_step(engine, ids)
    engine.destroy()
    return {"stall_over_copy": statistics.median(ratios[1:])}


def copy_seconds(folder: Path, step: int) -> float:
    """Of a plain copy of what a save wrote, which ranks did in equal parts, but for less than a parameter."""
    copy = plain_copy(-(-written_at(folder, step) // dist.get_world_size()))
    copy()
    return statistics.median(copy() for _ in range(5))


def written_at(folder: Path, step: int) -> int:
    return sum(file.bytes for file in Store(folder).read(step).files if file.name.startswith(f"{step:08d}-"))


def layerwise(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Saves at the end of each interval, after which the next thing is a switch."""
    selector = Uniform(blocks=args.active, interval=2)
    engine, sparse = start(args, selector, args.bank)
    checkpoints = Checkpoints(sparse, folder, keep=2, asynchronous=True)
    saves: list[dict[str, float]] = []
    with quiet_collector():
        for number in range(args.saves):
            before = list(sparse.times_active)
            steps(engine, args, number, args.intervals)
            changed = {i for i, (old, new) in enumerate(zip(before, sparse.times_active, strict=True)) if old != new}
            if number == 0:
                changed |= set(sparse.active)
            # What a run does between two saves takes longer than to write one.
            checkpoints.finish()
            step = 2 * args.intervals * (number + 1)
            stall = measured(lambda step=step: save(checkpoints, sparse, step))
            whole = measured(checkpoints.finish)
            written, copied = written_at(folder, step), copy_seconds(folder, step)
            least = least_bytes(sparse, changed, args)
            saves.append(
                {
                    "bytes": written,
                    "bytes_over_least": written / least,
                    "stall_seconds": stall["seconds"],
                    "copy_seconds": copied,
                    "stall_over_copy": stall["seconds"] / copied,
                    "seconds": stall["seconds"] + whole["seconds"],
                    "host_bytes": max(stall["host_bytes"], whole["host_bytes"] + stall["host_bytes"]),
                }
            )
    engine.destroy()
    engine, sparse = start(args, selector, args.bank)
    checkpoints = Checkpoints(sparse, folder, keep=2, asynchronous=True)
    last = 2 * args.intervals * args.saves
    resume = measured(lambda: checkpoints.resume(Store(folder), last))
    engine.destroy()
    # The first save allocates the memory that later ones copy into.
    return {
        "saves": saves,
        "bytes_over_least": max(save["bytes_over_least"] for save in saves),
        "stall_over_copy": statistics.median(save["stall_over_copy"] for save in saves[1:]),
        "resume": resume | {"bytes": sum(file.bytes for file in Store(folder).read(last).files)},
    }


def full(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Full fine-tuning by DeepSpeed alone: everything trains, and the engine saves as it always does."""
    engine, sparse = start(args, All(), "discard")
    for name in ("save_checkpoint", "load_checkpoint"):
        delattr(engine, name)  # ours; the class has its own
    steps(engine, args, 0)
    save = measured(lambda: engine.save_checkpoint(folder))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    resume = measured(lambda: engine.load_checkpoint(folder))
    engine.destroy()
    return {"save": save | {"bytes": size}, "resume": resume | {"bytes": size}}


def main() -> None:
    args = arguments()
    start_process(args.local_rank)
    asked = {key: value for key, value in vars(args).items() if key not in ("json", "local_rank", "folder")}
    place = [args.folder or Path(tempfile.mkdtemp(prefix="strata-checkpoint-"))]
    torch.distributed.broadcast_object_list(place)
    try:
        ours = layerwise(args, place[0] / "layerwise")
        between = in_an_interval(args, place[0] / "in-an-interval")
        theirs = full(args, place[0] / "full")
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            for name in ("layerwise", "in-an-interval", "full"):
                shutil.rmtree(place[0] / name, ignore_errors=True)
    last = ours["saves"][-1]
    compared = {
        "full_over_layerwise_bytes": theirs["save"]["bytes"] / last["bytes"],
        "full_over_layerwise_stall": theirs["save"]["seconds"] / last["stall_seconds"],
    }
    finish({"layerwise": ours, "in_an_interval": between, "full": theirs, **compared, "settings": asked}, args.json)


if __name__ == "__main__":
    main()
