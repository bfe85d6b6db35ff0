"""Tokens per second and peak memory of full fine-tuning, LoRA, LISA, BAdam and ID3 on one engine and model, in one run.

    deepspeed --num_accelerators 2 benchmarks/throughput.py --json throughput.json

Every method starts from the same random Llama. Its speed is that of whole intervals, switches and guard included;
`allowed` is the speed-up over full fine-tuning that its FLOPs allow (`trainer/accounting/`), and `share` how much of
that was reached. `overhead` is the time of draws, guard, switches and metrics over that of the steps. `profile` shows
where the time of a step of full fine-tuning goes, by operator: FLOPs decide only where matrix products dominate.
ID3's mask is whole from the second step on; `over_full_passes` is a step's time over that of forward and backward of
full fine-tuning.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    Tracker,
    around_switch,
    finish,
    llama,
    quiet_collector,
    random_batch,
    start_engine,
    start_process,
    train_step,
    with_lora,
)
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch.profiler import profile as recording

import trainer
from trainer.accounting import step_flops
from trainer.planner.passes import step_parts
from trainer.run.progress import Progress
from trainer.selectors import All, Cyclic, Selector, Uniform
from trainer.updates import Unmask

PARTS = ("embeddings", "head", "norm")


@dataclass(frozen=True)
class Method:
    name: str
    selector: Callable[[int], Selector]  # by interval
    always_on: tuple[str, ...] = PARTS
    rank: int = 0  # of LoRA
    unmasked: float = 0.0  # share of the weights that ID3 trains


METHODS = (
    Method("full", lambda interval: All(interval=interval)),
    Method("lora r=8", lambda interval: All(interval=interval), always_on=(), rank=8),
    Method("lora r=128", lambda interval: All(interval=interval), always_on=(), rank=128),
    Method("lisa", lambda interval: Uniform(blocks=2, interval=interval)),
    Method("lisa without embeddings", lambda interval: Uniform(blocks=2, interval=interval), always_on=()),
    Method("badam", lambda interval: Cyclic(blocks=1, interval=interval), always_on=()),
    Method("id3", lambda interval: All(interval=interval), unmasked=0.001),  # 0.1 %
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2, 3), help="ZeRO stage")
    parser.add_argument("--blocks", type=int, default=12, help="blocks of the model")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model")
    parser.add_argument("--intermediate", type=int, help="width of the MLP; 2.75 times --hidden by default")
    parser.add_argument("--key-value-heads", type=int, help="as many as query heads by default")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences per rank and step")
    parser.add_argument("--interval", type=int, default=5, help="optimizer steps between switches")
    parser.add_argument("--intervals", type=int, default=6, help="intervals to measure")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--peak-flops", type=float, help="of the card, per second: adds the share that was reached")
    parser.add_argument("--methods", nargs="+", choices=[m.name for m in METHODS], help="beside full; all by default")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


class Clock:
    """Seconds spent on draws, the guard, switches and metrics."""

    def __init__(self, sparse: trainer.Sparse) -> None:
        self.seconds = 0.0
        around_switch(sparse, self._enter, self._leave)

    def _enter(self) -> None:
        get_accelerator().synchronize()
        self._started = time.perf_counter()

    @contextmanager
    def counting(self) -> Iterator[None]:
        self._enter()
        yield
        self._leave()

    def _leave(self) -> None:
        get_accelerator().synchronize()
        self.seconds += time.perf_counter() - self._started


def measure(args: argparse.Namespace, method: Method) -> dict[str, Any]:
    more = {"intermediate_size": args.intermediate, "num_key_value_heads": args.key_value_heads}
    model: Any = llama(
        blocks=args.blocks,
        hidden=args.hidden,
        vocabulary=args.vocabulary,
        length=args.length,
        dtype=args.dtype,
        checkpointing=args.checkpointing,
        **{key: value for key, value in more.items() if value},
    )
    if method.rank:
        model = with_lora(model, rank=method.rank, targets="all-linear")
    update = None
    if method.unmasked:
        budget = round(method.unmasked * sum(p.numel() for p in model.parameters()))
        update = Unmask(budget=budget, growth_steps=1, gradient_clipping=1.0)  # as DeepSpeed clips for the others
    sparse = trainer.prepare(
        model,
        selector=method.selector(args.interval),
        update=update,
        always_on=method.always_on,
        substrate="adapter" if method.rank else "full",
    )
    parts = step_parts(model, sparse.structure, sparse.blocks, batch=args.batch, length=args.length)
    engine, _ = start_engine(model, sparse, stage=args.stage, batch=args.batch, dtype=args.dtype)
    clock = Clock(sparse)
    folder = tempfile.TemporaryDirectory()
    total = args.interval * (args.intervals + 1) + 2
    progress = Progress(Path(folder.name), engine=engine, total_steps=total, rank=dist.get_rank())

    passes: list[float] = []  # forward and backward alone

    def step(number: int) -> float:
        ids = random_batch(engine, number, batch=args.batch, length=args.length, vocabulary=args.vocabulary)
        seconds = train_step(engine, ids, passes)
        with clock.counting():
            progress.step(number + 1, active=sparse.active, loss=0.0, lr=engine.get_lr()[0], tokens_per_second=1.0)
        return seconds

    for number in range(args.interval):  # the first steps of a process compile and allocate
        step(number)
    passes.clear()
    clock.seconds, seconds, flops = 0.0, [], []
    with quiet_collector():
        for number in range(args.interval, args.interval * (args.intervals + 1)):
            seconds.append(step(number))
            flops.append(
                step_flops(
                    *parts,
                    active=sparse.active,
                    embeddings="embeddings" in method.always_on,
                    train_head="head" in method.always_on,
                    checkpointing=args.checkpointing,
                )
            )
    with Tracker() as tracker:
        step(number + 1)
    figures = {
        "name": method.name,
        "step_seconds_median": statistics.median(seconds),
        "forward_backward_seconds_median": statistics.median(passes[: len(seconds)]),
        "tokens_per_second": args.batch * args.length * len(seconds) * dist.get_world_size() / sum(seconds),
        "overhead": clock.seconds / sum(seconds),
        "peak_bytes": tracker.peak,
        "flops": statistics.mean(flops),
        "profile": profile(lambda: step(number + 2)) if method.name == "full" else None,
    }
    if args.peak_flops:
        figures["share_of_peak_flops"] = statistics.mean(flops) * len(seconds) / sum(seconds) / args.peak_flops
    progress.close()
    folder.cleanup()
    engine.destroy()
    return figures


def profile(step: Callable[[], float]) -> dict[str, float]:
    """Shares of a step's own time on this rank, by operator: the eight largest."""
    with recording() as recorded:
        step()
    on_cpu = get_accelerator().device_name() == "cpu"
    events = {e.key: e.self_cpu_time_total if on_cpu else e.self_device_time_total for e in recorded.key_averages()}
    total = sum(events.values())
    return {key: events[key] / total for key in sorted(events, key=events.__getitem__, reverse=True)[:8]}


def main() -> None:
    args = arguments()
    start_process(args.local_rank)
    chosen = [m for m in METHODS if args.methods is None or m.name in ("full", *args.methods)]
    methods = [measure(args, method) for method in chosen]
    full = methods[0]
    for figures in methods:
        figures["speed_over_full"] = figures["tokens_per_second"] / full["tokens_per_second"]
        figures["memory_over_full"] = figures["peak_bytes"] / full["peak_bytes"]
        figures["allowed"] = full["flops"] / figures["flops"]
        figures["share"] = figures["speed_over_full"] / figures["allowed"]
        figures["over_full_passes"] = figures["step_seconds_median"] / full["forward_backward_seconds_median"]
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "local_rank")}
    finish({"methods": methods, "settings": settings}, args.json)


if __name__ == "__main__":
    main()
