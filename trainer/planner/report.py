"""Render a plan: a table for people, a line before a run, a mapping for programs."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

from trainer.accounting import readable
from trainer.planner.advice import Suggestion
from trainer.planner.machine import Machine, Times, needed, num_steps, shortage, times
from trainer.planner.plan import Plan

_WIDTH = 34


def one_line(plan: Plan) -> str:
    """Return the peak of a step and its parts, for the start of a run."""
    parts = sorted(plan.memory.parts.items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {readable(size)}" for name, size in parts[:4])
    host = f"; in host memory {readable(plan.memory.total_host)}" if plan.memory.total_host else ""
    return f"planned peak {readable(plan.memory.peak)} on each rank ({plan.memory.highest}: {shown}){host}"


def short(plan: Plan, machine: Machine) -> str:
    """Return a few lines: what trains, the peak, whether it fits."""
    lines = [
        f"{plan.parameters:,} parameters, of which {plan.trained:,} train at a time",
        f"each rank needs {readable(plan.memory.peak)} at the peak of a step ({plan.memory.highest}):",
    ]
    parts = [f"{name} {readable(size)}" for name, size in plan.memory.parts.items()]
    lines += textwrap.wrap(", ".join(parts), 100, initial_indent="  ", subsequent_indent="  ")
    memory = f"with context and slack {readable(needed(plan))}"
    if machine.gpu_memory is not None:
        memory += f" of {readable(machine.gpu_memory)}"
    if plan.memory.total_host:
        memory += f"; host memory of a node {readable(plan.memory.total_host * machine.gpus)}"
    lines.append(memory)
    lines += plan.notes
    if machine.gpu_memory is not None or machine.host_memory is not None:
        lines.append(_verdict(plan, machine))
    return "\n".join(lines)


def table(plan: Plan, machine: Machine, *, samples: int | None = None) -> str:
    """Return all of the plan, as lines."""
    config = plan.config
    always_on = ", ".join(config.always_on.parts) or "nothing else"
    lines = [
        f"{plan.parameters:,} parameters; {plan.active} of {plan.num_blocks} blocks train at a time, with {always_on}: "
        f"{plan.trained:,} parameters",
        f"{plan.ranks} rank{'s' * (plan.ranks > 1)}, ZeRO stage {plan.stage} ({config.deepspeed}), "
        f"{config.train.micro_batch_size} x {config.data.max_length} tokens in each forward pass, "
        f"{'' if config.model.activation_checkpointing else 'no '}activation checkpointing",
        f"each rank, at the peak of a step ({plan.memory.highest}):",
    ]
    lines += [_row(name, size) for name, size in plan.memory.parts.items()]
    lines.append(_row("peak", plan.memory.peak))
    if machine.gpu_memory is not None:
        lines.append(_row("with context and slack", needed(plan)) + f" of {readable(machine.gpu_memory)}")
    if plan.memory.host:
        lines.append("host memory of a rank:")
        lines += [_row(name, size) for name, size in plan.memory.host.items() if size]
        node = plan.memory.total_host * machine.gpus
        of = f" of {readable(machine.host_memory)}" if machine.host_memory is not None else ""
        lines.append(_row(f"node, {machine.gpus} rank{'s' * (machine.gpus > 1)}", node) + of)
    if plan.memory.disk:
        lines.append(f"on NVMe, for each rank: {readable(sum(plan.memory.disk.values()))}")
    lines.append(
        f"a step: {plan.flops:.2e} FLOPs and {readable(plan.volume.sent(plan.ranks))} sent by each rank"
        + (
            f" ({readable(plan.volume.within_machine)} more gathered within its machine)"
            if plan.volume.within_machine
            else ""
        )
        + (f", {readable(plan.offloaded)} copied between card and host" if plan.offloaded else "")
    )
    lines += _time_lines(plan, machine, samples)
    lines += plan.notes
    if machine.gpu_memory is not None or machine.host_memory is not None:
        lines.append(_verdict(plan, machine))
    return "\n".join(lines)


def _verdict(plan: Plan, machine: Machine) -> str:
    missing = shortage(plan, machine)
    if missing:
        return "does not fit: " + ", ".join(missing)
    return "fits" if plan.complete else "fits without what is not in this plan"


def _row(name: str, size: int) -> str:
    return f"  {name:<{_WIDTH}}{readable(size):>12}"


def _time_lines(plan: Plan, machine: Machine, samples: int | None) -> list[str]:
    spent = times(plan, machine)
    if spent is None:
        wanted = ["--flops"] + ["--bandwidth"] * (plan.ranks > 1) + ["--host-bandwidth"] * bool(plan.offloaded)
        return [f"time: unknown without {', '.join(wanted)} (of one rank)"]
    lines = [f"time: {_span(spent)} s a step, {_rate(spent)} steps per second"]
    steps = num_steps(plan.config, samples)
    if steps is not None:
        hours = Times(spent.shortest * steps / 3600, spent.longest * steps / 3600)
        lines[0] += f"; {_span(hours)} hours for {steps:,} steps"
    return lines


def _span(spent: Times) -> str:
    low, high = f"{spent.shortest:.3g}", f"{spent.longest:.3g}"
    return low if low == high else f"{low} (full overlap) to {high} (no overlap)"


def _rate(spent: Times) -> str:
    return (
        _span(Times(1 / spent.longest, 1 / spent.shortest)).replace(" (full overlap)", "").replace(" (no overlap)", "")
    )


def advice(suggestions: list[Suggestion], machine: Machine) -> str:
    """Return numbered lines, cheapest first."""
    lines = ["changes that make it fit, cheapest first:"]
    for number, suggestion in enumerate(suggestions, start=1):
        lines.append(f"  {number}. {suggestion.settings}")
        host = suggestion.plan.memory.total_host * machine.gpus
        on_host = f" and {readable(host)} of host memory on each node" if host else ""
        lines.append(f"     needs {readable(needed(suggestion.plan))} on each card{on_host}; costs: {suggestion.cost}")
    return "\n".join(lines)


def hopeless(plan: Plan, least: Plan | None, machine: Machine) -> str:
    """Return the message for a run that no known change makes fit."""
    tail = ""
    if least is not None:
        parts = ", ".join(f"{name} {readable(size)}" for name, size in least.memory.parts.items())
        tail = (
            f". The smallest plan found, with deepspeed={least.config.deepspeed}, needs {readable(needed(least))} on "
            f"each card ({parts}) and {readable(least.memory.total_host * machine.gpus)} of host memory on each node"
        )
    return (
        f"{plan.parameters:,} parameters do not fit on {machine.nodes} x {machine.gpus} cards with any known "
        f"change: {', '.join(shortage(plan, machine))}{tail}. Use more or larger cards, a smaller model, or shorter "
        "sequences (data.max_length)"
    )


def mapping(plan: Plan, machine: Machine, suggestions: list[Suggestion], *, samples: int | None) -> dict[str, Any]:
    """Return the plan for `--json`; sizes in bytes."""
    spent = times(plan, machine)
    fits = not shortage(plan, machine)
    return {
        "parameters": plan.parameters,
        "trained": plan.trained,
        "ranks": plan.ranks,
        "stage": plan.stage,
        "moment": plan.memory.highest,
        "parts": plan.memory.parts,
        "peak": plan.memory.peak,
        "needed": needed(plan),
        "host": plan.memory.host,
        "disk": plan.memory.disk,
        "moments": plan.memory.moments,
        "flops": plan.flops,
        "volume": asdict(plan.volume) | {"sent": plan.volume.sent(plan.ranks)},
        "seconds": asdict(spent) if spent else None,
        "steps": num_steps(plan.config, samples),
        "notes": plan.notes,
        "fits": None if fits and not plan.complete else fits,
        "suggestions": [{"settings": s.settings, "needed": needed(s.plan), "cost": s.cost} for s in suggestions],
    }
