"""What a switch costs: seconds and bytes, as ratios of the steady step of the same run.

    deepspeed --num_accelerators 2 benchmarks/switch.py --stage 3 --blocks 24 --hidden 256 --active 2 --interval 10 \\
        --switches 20 --bank cpu --json switch.json
    deepspeed --num_accelerators 2 benchmarks/switch.py --substrate lora --order importance --active 6 \\
        --interval 1 --switches 60 --bank device

Rank 0's figures. Memory is measured in a second pass over the same engine, because watching every storage is slow.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

from common import (
    Tracker,
    around_switch,
    finish,
    live_bytes,
    llama,
    probe_batches,
    quiet_collector,
    random_batch,
    start_engine,
    start_process,
    summed_loss,
    train_step,
    with_lora,
)
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

import trainer
from trainer.accounting import measured_state, model_state
from trainer.model.blocks import full_numel
from trainer.selectors import Cyclic, Importance, Selector, Uniform


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
    parser.add_argument("--substrate", default="full", choices=("full", "lora"), help="what trains inside a block")
    parser.add_argument("--lora", type=int, default=8, help="rank of the adapters")
    parser.add_argument(
        "--order",
        default="random",
        choices=("random", "ascending", "descending", "importance"),
        help="importance probes every ten steps, with 16 sequences over all ranks",
    )
    parser.add_argument("--bank", default="discard", choices=("discard", "device", "cpu"))
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
    model = llama(
        blocks=args.blocks,
        hidden=args.hidden,
        vocabulary=args.vocabulary,
        length=args.sequence,
        dtype=args.dtype,
        checkpointing=args.checkpointing,
    )
    adapters = args.substrate == "lora"
    if adapters:
        model = with_lora(model, rank=args.lora)
    sparse = trainer.prepare(
        model,
        selector=build_selector(args),
        bank=args.bank,
        always_on=() if adapters or args.frozen_embeddings else ("embeddings", "head", "norm"),
        substrate="adapter" if adapters else "full",
    )
    measures: dict[str, Any] = {}
    if sparse.selector.measures:
        probes = probe_batches(length=args.sequence, vocabulary=args.vocabulary)
        measures = {"probe_batches": probes, "loss_function": summed_loss}
    engine, ds = start_engine(
        model, sparse, stage=args.stage, batch=args.batch, dtype=args.dtype, offload=args.offload, **measures
    )
    return engine, sparse, ds


def build_selector(args: argparse.Namespace) -> Selector:
    if args.order == "importance":
        return Importance(active_share=args.active / args.blocks, interval=args.interval)
    if args.order == "random":
        return Uniform(blocks=args.active, interval=args.interval)
    return Cyclic(blocks=args.active, interval=args.interval, order=args.order)


class Watch:
    """Looks at time and memory before and after each switch."""

    def __init__(self, engine: Any, sparse: trainer.Sparse, args: argparse.Namespace) -> None:
        self.engine, self.sparse, self.args = engine, sparse, args
        self.switch_seconds: list[float] = []
        self.probe_seconds: list[float] = []  # of switches that began with an update of what is learned
        self.switch_peaks: list[int] = []
        self.live_after_switch: list[int] = []
        self.bank_bytes: list[int] = []
        self.memory_pass = False
        self.switches = 0  # of the memory pass; every tenth is looked at, because scanning all objects is slow
        self._tracker: Tracker | None = None
        self._before = 0
        self._probes = False
        self._started = 0.0
        self._spent = 0.0  # in the step that runs, on switching and probing
        around_switch(sparse, self._enter, self._leave)

    def _enter(self) -> None:
        self._before = self.sparse.interval
        self._probes = self.sparse.selector.needs(self.sparse.steps) is not None
        due = self.sparse.steps // self.args.interval != self._before
        if self.memory_pass and due and self.switches % 10 == 9:
            self._tracker = Tracker()
            self._tracker.__enter__()
        get_accelerator().synchronize()
        self._started = time.perf_counter()

    def _leave(self) -> None:
        get_accelerator().synchronize()
        seconds = self._spent = time.perf_counter() - self._started
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
            (self.probe_seconds if self._probes else self.switch_seconds).append(seconds)

    def step(self, number: int) -> tuple[float, float]:
        """(seconds of the step, seconds without the switch and the probes in it)."""
        args, self._spent = self.args, 0.0
        ids = random_batch(self.engine, number, batch=args.batch, length=args.sequence, vocabulary=args.vocabulary)
        seconds = train_step(self.engine, ids)
        return seconds, seconds - self._spent


def timed_pass(watch: Watch, args: argparse.Namespace) -> dict[str, float | None]:
    steps: list[list[float]] = []
    without: list[float] = []
    with quiet_collector():
        for number in range((args.switches + 1) * args.interval):
            if number % args.interval == 0:
                steps.append([])
            seconds, alone = watch.step(number)
            steps[-1].append(seconds)
            without.append(alone)
    # Intervals too short to have steps far from a switch give those steps without it.
    steady = [t for interval in steps[1:] for t in interval[4:]] or without[args.interval :]
    ratios = [max(interval[:3]) / statistics.median(interval[4:]) for interval in steps[1:] if len(interval) > 4]
    step, switch = statistics.median(steady), statistics.median(watch.switch_seconds)
    return {
        "step_seconds_median": step,
        "switch_seconds_median": switch,
        "switch_over_step": switch / step,
        "probe_seconds_median": statistics.median(watch.probe_seconds) if watch.probe_seconds else None,
        "after_switch_ratio": statistics.median(ratios) if ratios else None,
        "after_switch_ratio_max": max(ratios, default=None),
        "after_switches": len(ratios),
    }


def memory_pass(watch: Watch, args: argparse.Namespace, start: int) -> dict[str, float]:
    """Switch every other step, watching storages; the peak of a step is taken in one without a switch."""
    watch.memory_pass = True
    args.interval = 2
    watch.sparse.selector = watch.sparse.selector.model_copy(update={"interval": 2})
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
    start_process(args.local_rank)
    asked = {key: value for key, value in vars(args).items() if key not in ("json", "local_rank")}
    engine, sparse, ds = build(args)
    watch = Watch(engine, sparse, args)
    figures: dict[str, Any] = {}
    if not args.memory_only:
        figures |= timed_pass(watch, args)
    figures |= memory_pass(watch, args, sparse.steps)
    figures |= state_bytes(sparse, engine, ds, args)
    finish(figures | {"settings": asked}, args.json)


if __name__ == "__main__":
    main()
