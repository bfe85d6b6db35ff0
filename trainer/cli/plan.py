"""`python -m trainer plan`: what a recipe will need on a machine, and what to change if it does not fit."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import torch

from trainer.cli.process import EXIT_REFUSED, refuse
from trainer.config import ConfigError, RunConfig, load, parse_command_line
from trainer.config.arguments import Parser, count
from trainer.config.text import printable, quoted
from trainer.errors import refusals
from trainer.planner import report
from trainer.planner.advice import suggest
from trainer.planner.machine import Machine, num_steps, parse_bytes, shortage
from trainer.planner.plan import Planner

EXIT_DOES_NOT_FIT = 1
_MEASURED = "measured"


def main(argv: Sequence[str]) -> int:
    """Plan what `argv` says. Returns 0 if it fits, 1 if changes would make it fit, 2 if none would or it is refused."""
    arguments, rest = _parser().parse_known_args(list(argv))
    with refusals() as refused:
        command = parse_command_line(rest, options=())

        def load_with(settings: Sequence[str]) -> RunConfig:
            return _load(command.config_path, [*command.overrides, *settings])

        config = load_with(())
        if unused := _unused(arguments, config):
            return refuse(unused, rank=0)
        machine = Machine(
            nodes=arguments.nodes,
            gpus=arguments.gpus,
            gpu_memory=arguments.gpu_memory,
            host_memory=arguments.host_memory,
            flops=_measured_flops(config) if arguments.flops == _MEASURED else arguments.flops,
            bandwidth=arguments.bandwidth,
            host_bandwidth=arguments.host_bandwidth,
        )
        num_steps(config, arguments.samples)  # refuses more than can be counted
        planner = Planner()
        plan = planner.plan(config, machine.ranks, local_ranks=machine.gpus)
        if arguments.host_bandwidth is not None and not plan.offloaded:
            return refuse(
                f"--host-bandwidth has no effect because deepspeed={config.deepspeed} copies nothing between GPU and "
                "host in a step: leave it out, or choose a preset with offload",
                rank=0,
            )
        missing = shortage(plan, machine)
        suggestions, least = suggest(planner, load_with, config, machine) if missing else ([], None)
    if refused:
        return refuse(refused[0], rank=0)
    if arguments.json:
        print(json.dumps(report.mapping(plan, machine, suggestions, samples=arguments.samples), indent=2))
    elif arguments.short:
        print(printable(report.short(plan, machine)))
    else:
        print(printable(report.table(plan, machine, samples=arguments.samples)))
        if suggestions:
            print(printable(report.advice(suggestions, machine)))
    if missing and not suggestions:
        print(f"\n{printable(report.hopeless(plan, least, machine))}", file=sys.stderr)
        return EXIT_REFUSED
    return EXIT_DOES_NOT_FIT if missing else 0


def _load(path: str | None, overrides: Sequence[str]) -> RunConfig:
    """Load the configuration without looking at its data, which need not be named."""
    try:
        return load(path, overrides, check_files=False)
    except ConfigError as error:
        if [problem.partition(":")[0] for problem in error.problems] != ["data.train"]:
            raise
        return load(path, [*overrides, "data.train=none"], check_files=False)


def _unused(arguments: argparse.Namespace, config: RunConfig) -> str | None:
    """Return a message about an option that the plan would not use, whatever its value; None if there is none."""
    if arguments.short:
        for name in ("flops", "bandwidth", "host_bandwidth", "samples"):
            if getattr(arguments, name) is not None:
                option = f"--{name.replace('_', '-')}"
                return f"{option} has no effect because --short shows no times: leave one of them out"
    if arguments.samples is not None and config.train.steps is not None:
        return (
            f"--samples has no effect because train.steps={config.train.steps} is the length of the run: leave it out, "
            "or set train.steps=null and train.epochs"
        )
    if arguments.bandwidth is not None and arguments.nodes * arguments.gpus == 1:
        return "--bandwidth has no effect because one rank sends nothing: leave it out, or raise --gpus or --nodes"
    return None


def _measured_flops(config: RunConfig) -> float:
    """Measure matrix products on this machine, in the run's dtype: the most FLOP/s that training could sustain."""
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = current or torch.device("cpu")
    size = 8192 if device.type != "cpu" else 1024
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.model.dtype]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    fastest = 0.0
    for _ in range(5):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        fastest = max(fastest, 2 * size**3 / (time.perf_counter() - started))
    return fastest


def _parser() -> Parser:
    parser = Parser(
        prog="python -m trainer plan",
        usage="%(prog)s RECIPE.yaml [key=value ...] [options]",
        description="Print what each rank will store, compute and send, from the model's config.json alone; whether it "
        "fits, and if not, the smallest changes that make it fit. Exits with 0 if it fits, 1 if a change is needed, 2 "
        "if nothing helps.",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=count, default=1, metavar="N", help="nodes (default 1)")
    parser.add_argument(
        "--gpus", type=count, default=1, metavar="N", help="GPUs on each node, one rank on each (default 1)"
    )
    parser.add_argument("--gpu-memory", type=_bytes, metavar="80GB", help="memory of one GPU, as it is sold")
    parser.add_argument("--host-memory", type=_bytes, metavar="1TB", help="memory of one node")
    parser.add_argument(
        "--flops", type=_flops, metavar="400e12", help="FLOP/s that a rank sustains, or `measured`: those of matrix "
        "products on this machine"
    )  # fmt: skip
    parser.add_argument("--bandwidth", type=_bytes, metavar="50GB", help="per second, from a rank to the others")
    parser.add_argument("--host-bandwidth", type=_bytes, metavar="25GB", help="per second, between GPU and host")
    parser.add_argument(
        "--samples", type=count, metavar="N", help="number of training samples, if the recipe says epochs"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--short", action="store_true", help="a few lines, as in the headers of recipes")
    form.add_argument("--json", action="store_true", help="for programs; sizes in bytes")
    return parser


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# From a slow single core to a hundred times the fastest GPU.
_LEAST_FLOPS, _MOST_FLOPS = 1e6, 1e18


def _flops(text: str) -> float | str:
    if text == _MEASURED:
        return text
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not _LEAST_FLOPS <= value <= _MOST_FLOPS:
        allowed = f"{_LEAST_FLOPS:g} to {_MOST_FLOPS:g} per second, such as 400e12, or {_MEASURED}"
        raise argparse.ArgumentTypeError(f"got {quoted(text)}; allowed: {allowed}")
    return value
