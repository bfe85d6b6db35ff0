"""One shape and method of `seventy_b.py`, which starts this script for each: a model, its engine, what they measure."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from common import Tracker, around_switch, llama, start_engine, with_lora
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file
from seventy_b import SHAPES, arguments

import trainer
from trainer.accounting import measured_state, step_flops
from trainer.checkpoint.contents import parameters_by_unit, unit_of_block
from trainer.config import RunConfig, load
from trainer.config.methods import METHODS
from trainer.model.loss import Objective
from trainer.planner import Planner
from trainer.planner.passes import step_parts
from trainer.run.setup import initialise_process_group
from trainer.run.step import train_step
from trainer.selectors import build
from trainer.updates import Unmask


class Stopwatch:
    """Seconds of switches and of probes, which come before a forward, and of the optimizer's part of each step."""

    def __init__(self, sparse: Any, engine: Any) -> None:
        self.switches: list[float] = []
        self.probes: list[float] = []
        self.optimizer: list[float] = []
        self._sparse = sparse
        around_switch(sparse, self._enter, self._leave)
        inner = engine.step

        def step(*args: Any, **kwargs: Any) -> None:
            started = self._now()
            inner(*args, **kwargs)
            self.optimizer.append(self._now() - started)

        engine.step = step

    @staticmethod
    def _now() -> float:
        get_accelerator().synchronize()
        return time.perf_counter()

    def _enter(self) -> None:
        self._interval = self._sparse.interval
        self._probed = self._sparse.selector.needs(self._sparse.steps) is not None
        self._started = self._now()

    def _leave(self) -> None:
        seconds = self._now() - self._started
        if self._probed:
            self.probes.append(seconds)
        elif self._sparse.interval != self._interval:
            self.switches.append(seconds)

    def clear(self) -> None:
        for seconds in (self.switches, self.probes, self.optimizer):
            seconds.clear()


class Run:
    """A model, its engine and what drives them."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Takes the card: the model is built there, and DeepSpeed's engine around it."""
        self.args, self.shape, self.method = args, SHAPES[args.shape[0]], args.method[0]
        self.accelerator = get_accelerator()
        self.offload = args.offload == "always"
        point = METHODS[self.method]
        model: Any = llama(
            blocks=self.shape.blocks,
            hidden=self.shape.hidden,
            vocabulary=self.shape.vocabulary,
            length=max(args.lengths),
            dtype="bf16",
            checkpointing=True,
            intermediate_size=self.shape.intermediate,
            num_attention_heads=self.shape.heads,
            num_key_value_heads=self.shape.key_value_heads,
        )
        self.objective = Objective(model, fused=True)
        if point["substrate"]["name"] == "adapter":
            lora = point["substrate"]["peft"]
            model = with_lora(model, rank=lora["r"], targets=lora["target_modules"])
        selector = {key: value for key, value in point["selector"].items() if key != "name"}
        if "interval" in selector:  # IST draws at every step
            selector["interval"] = args.interval
        if self.method == "lisa":
            selector["blocks"] = args.gamma
        update = None
        if self.method == "id3":  # clipped as DeepSpeed clips for the others
            unmask = {key: value for key, value in point["update"].items() if key not in ("name", "budget")}
            update = Unmask(budget=args.budget, growth_steps=args.growth_steps, gradient_clipping=1.0, **unmask)
        self.sparse = trainer.prepare(
            model,
            selector=build(point["selector"]["name"], seed=0, **selector),
            update=update,
            bank=point["bank"]["name"],
            always_on=[part for part, on in point["always_on"].items() if on and not args.frozen_embeddings],
            substrate=point["substrate"]["name"],
        )
        self.parts = {  # before DeepSpeed's hooks are on the model
            length: step_parts(model, self.sparse.structure, self.sparse.blocks, batch=args.batch, length=length)
            for length in args.lengths
        }
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        measures: dict[str, Any] = {}
        if self.sparse.selector.measures:
            measures = {"probe_batches": self.probe_batches(), "loss_function": self.probe_loss}
        self.length = args.lengths[0]
        self.engine, self.ds = start_engine(
            model, self.sparse, stage=2, batch=args.batch, dtype="bf16", offload=self.offload, **measures
        )
        self.watch = Stopwatch(self.sparse, self.engine)

    def batch(self, number: int, sequences: int) -> dict[str, Any]:
        """Random tokens [sequences, length] on the host, all of them targets."""
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(self.shape.vocabulary, (sequences, self.length), generator=generator)
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    def probe_batches(self) -> Iterator[dict[str, Any]]:
        number = 1_000_000
        while True:
            yield self.batch(number, 16)
            number += 1

    def probe_loss(self, module: Any, batch: Mapping[str, Any]) -> tuple[Any, int]:
        device = {key: value.to(self.engine.device) for key, value in batch.items()}
        return self.objective(module, device)[0], batch["labels"][:, 1:].numel()

    def plan(self) -> dict[str, int]:
        """What `python -m trainer plan` says of a run of this length: bytes on the card, and on the host."""
        on_cpu = self.accelerator.device_name() == "cpu"
        plan = Planner(on_cpu=on_cpu).plan(configuration(self.args, self.length), 1)
        return {
            "weights": plan.state.weights,
            "state_on_card": plan.state.device - plan.state.weights,
            "state_on_host": plan.state.host,
            "peak_on_card": plan.memory.peak,
            "trained_parameters": plan.trained,
        }

    def measure(self, length: int) -> dict[str, Any]:
        """Steps, memory and FLOPs at sequences of `length` tokens."""
        self.length = length
        on = self.sparse.always_on

        def step(number: int) -> tuple[float, float]:
            batch = self.batch(number, self.args.batch)
            started = Stopwatch._now()
            result = train_step(self.engine, self.objective, [batch])
            return Stopwatch._now() - started, float(result.loss_sum / result.targets)

        steps = self.args.steps
        if self.sparse.selector.measures:  # as many probes as a run has of them
            steps = self.sparse.selector.update_every * -(-steps // self.sparse.selector.update_every)
        on_card = self.accelerator.device_name() != "cpu"
        if on_card:
            self.accelerator.empty_cache()  # cut to the sizes of another length
        for number in range(2):
            step(number)
        gc.collect()
        self.watch.clear()
        if on_card:
            self.accelerator.reset_peak_memory_stats()
        seconds, losses, flops = [], [], []
        for number in range(steps):
            one, loss = step(2 + number)
            seconds.append(one)
            losses.append(loss)
            flops.append(
                step_flops(
                    *self.parts[length],
                    active=self.sparse.active,
                    embeddings="embeddings" in on,
                    train_head="head" in on,
                    checkpointing=True,
                )
            )
        if on_card:
            peak = self.accelerator.max_memory_allocated()
        else:  # watching every storage is slow
            with Tracker() as tracker:
                step(2 + steps)
            peak = tracker.peak
        plan, tokens, watch = self.plan(), self.args.batch * length, self.watch
        apart = sum(seconds) - sum(watch.probes)
        figures = {
            "tokens": tokens,
            "length": length,
            "steps": steps,
            # Without a card all of it lies in one memory.
            "plan_bytes": plan["peak_on_card"] + (0 if on_card else plan["state_on_host"]),
            "peak_bytes": peak,
            "reserved_bytes": self.accelerator.max_memory_reserved() if on_card else None,
            "step_seconds": seconds,
            "step_seconds_median": statistics.median(seconds),
            "optimizer_seconds_median": statistics.median(watch.optimizer),
            "switch_seconds_median": statistics.median(watch.switches) if watch.switches else None,
            "probe_seconds_median": statistics.median(watch.probes) if watch.probes else None,
            "tokens_per_second": tokens * steps / sum(seconds),
            "tokens_per_second_without_probes": tokens * steps / apart,
            "flops_per_step": statistics.mean(flops),
            "flops_per_second": sum(flops) / apart,
            "losses": losses,
            "outcome": "measured",
        }
        if self.args.peak_flops:
            figures["share_of_peak_flops"] = figures["flops_per_second"] / self.args.peak_flops
        return figures

    def save_trained(self, folder: Path) -> dict[str, Any]:
        """Weights of everything that has trained, a file for each block and part; the rest is the base's."""
        folder.mkdir(parents=True, exist_ok=True)
        trained = {unit_of_block(index) for index, times in enumerate(self.sparse.times_active) if times}
        started, written = time.perf_counter(), 0
        for unit, parameters in parameters_by_unit(self.sparse).items():
            if unit in trained or unit in self.sparse.always_on:
                file = folder / f"{unit}.safetensors"
                save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, file)
                written += file.stat().st_size
        return {"bytes": written, "seconds": time.perf_counter() - started, "blocks": len(trained)}


def configuration(args: argparse.Namespace, length: int) -> RunConfig:
    """The same run as `train.py` would be told to do it."""
    shape = SHAPES[args.shape[0]]
    model = {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": max(args.lengths),
    }
    values = [f"method={args.method[0]}", f"model.random={json.dumps(model)}", "model.tokenizer=bytes"]
    values += ["model.activation_checkpointing=true", "train.fused_loss=true", "data.train=none.jsonl"]
    values += [f"train.micro_batch_size={args.batch}", f"train.global_batch_size={args.batch}"]
    values += [f"data.max_length={length}", "data.eval_fraction=0", "eval.every=null", "checkpoint.every=null"]
    if args.method[0] == "id3":  # whose mask grows in all steps
        values += [f"update.budget={args.budget}", f"train.steps={args.growth_steps}"]
    else:
        values.append("train.steps=1")
    values += [f"deepspeed={'zero2_offload' if args.offload == 'always' else 'zero2'}"]
    if args.method[0] == "lisa":
        values.append(f"selector.blocks={args.gamma}")
    if args.frozen_embeddings:
        values += [f"always_on.{part}=false" for part in ("embeddings", "head", "norm")]
    return load(None, values, check_files=False)


def main() -> int:
    args = arguments()
    accelerator = get_accelerator()
    initialise_process_group(timeout_minutes=30)
    started = time.perf_counter()
    figures: dict[str, Any] = {"shape": args.shape[0], "method": args.method[0]}
    figures["parameters"] = SHAPES[args.shape[0]].numel
    on_card = accelerator.device_name() != "cpu"
    figures["environment"] = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_card else "cpu",
        "device_bytes": torch.cuda.get_device_properties(0).total_memory if on_card else None,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {module.__name__: module.__version__ for module in (torch, deepspeed, transformers)},
        "settings": {key: value for key, value in vars(args).items() if key not in ("json", "save", "seconds")},
    }

    def note(**more: Any) -> None:
        figures.update(more)
        figures["host_peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if args.json:
            args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

    run = Run(args)
    if on_card:
        accelerator.synchronize()
    plan = run.plan()
    print(
        f"{figures['shape']} {figures['method']}: {figures['parameters']:,} parameters, "
        f"{plan['trained_parameters']:,} train ({len(run.sparse.active)} blocks, "
        f"{', '.join(run.sparse.always_on) or 'nothing else'}); plan: {plan['peak_on_card'] / 1e9:.1f} GB on the card, "
        f"{plan['state_on_host'] / 1e9:.1f} GB on the host",
        flush=True,
    )
    note(
        plan=plan,
        seconds_to_start=time.perf_counter() - started,
        weight_bytes=run.weight_bytes,
        bytes_after_starting=accelerator.memory_allocated() if on_card else None,
        peak_bytes_until_started=accelerator.max_memory_allocated() if on_card else None,
        lengths=[],
    )
    code = 0
    for length in args.lengths:
        try:
            found = run.measure(length)
        except torch.OutOfMemoryError as error:  # longer ones will not do either
            found, code = {"tokens": args.batch * length, "outcome": f"out of memory: {error}"[:300]}, 1
        figures["lengths"].append(found)
        note()
        print(json.dumps({key: value for key, value in found.items() if key != "step_seconds"}), flush=True)
        if code:
            break
    state = measured_state(run.sparse.held(), offload=run.offload)
    note(measured={"weights": state.weights, "state_on_card": state.device - state.weights, "host": state.host})
    if isinstance(run.sparse.update, Unmask):
        note(unmasked=run.sparse.update.unmasked)
    if args.save:
        note(saved=run.save_trained(args.save))
    torch.distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
