"""`python -m trainer plan`: what a recipe will need on a machine, and what to change where it does not fit."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import torch

from trainer.adapters import AdapterError
from trainer.blocks import BlockError
from trainer.config import ConfigError, RunConfig, load, parse_command_line
from trainer.data.errors import DataError
from trainer.entry import EXIT_REFUSED, refuse
from trainer.loss import LossError
from trainer.model import ModelError
from trainer.planner import report
from trainer.planner.advice import suggest
from trainer.planner.machine import Machine, parse_bytes, shortage
from trainer.planner.plan import Planner

EXIT_DOES_NOT_FIT = 1
_MEASURED = "measured"


def main(argv: Sequence[str]) -> int:
    """Plan what `argv` says; 0 where it fits, 1 where changes would make it fit, 2 where it is refused or cannot."""
    arguments, rest = _parser().parse_known_args(list(argv))
    try:
        command = parse_command_line(rest, options=())

        def load_with(settings: Sequence[str]) -> RunConfig:
            return _load(command.config_path, [*command.overrides, *settings])

        config = load_with(())
        machine = Machine(
            nodes=arguments.nodes,
            gpus=arguments.gpus,
            gpu_memory=arguments.gpu_memory,
            host_memory=arguments.host_memory,
            flops=_measured_flops(config) if arguments.flops == _MEASURED else arguments.flops,
            bandwidth=arguments.bandwidth,
            host_bandwidth=arguments.host_bandwidth,
        )
        planner = Planner()
        plan = planner.plan(config, machine.ranks, local_ranks=machine.gpus)
        missing = shortage(plan, machine)
        suggestions, least = suggest(planner, load_with, config, machine) if missing else ([], None)
    except (ConfigError, ModelError, AdapterError, BlockError, LossError, DataError) as error:
        return refuse(str(error), rank=0)
    if arguments.json:
        print(json.dumps(report.mapping(plan, machine, suggestions, samples=arguments.samples), indent=2))
    elif arguments.short:
        print(report.short(plan, machine))
    else:
        print(report.table(plan, machine, samples=arguments.samples))
        if suggestions:
            print(report.advice(suggestions, machine))
    if missing and not suggestions:
        print(f"\n{report.hopeless(plan, least, machine)}", file=sys.stderr)
        return EXIT_REFUSED
    return EXIT_DOES_NOT_FIT if missing else 0


def _load(path: str | None, overrides: Sequence[str]) -> RunConfig:
    """Data is not looked at, and need not be named."""
    try:
        return load(path, overrides, check_files=False)
    except ConfigError as error:
        if [problem.partition(":")[0] for problem in error.problems] != ["data.train"]:
            raise
        return load(path, [*overrides, "data.train=none"], check_files=False)


def _measured_flops(config: RunConfig) -> float:
    """Of matrix products on this machine, in the run's type: the most that training could sustain."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    size = 8192 if device.type != "cpu" else 1024
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.model.dtype]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    fastest = 0.0
    for _ in range(5):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        fastest = max(fastest, 2 * size**3 / (time.perf_counter() - started))
    return fastest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer plan",
        usage="%(prog)s RECIPE.yaml [key=value ...] [options]",
        description="What each rank will hold, compute and send, from the model's config.json alone; whether it fits, "
        "and if not, the smallest changes that make it fit. Exits with 0 where it fits, 1 where a change is needed, 2 "
        "where nothing helps.",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument("--gpus", type=_count, default=1, metavar="N", help="ranks on each (default 1)")
    parser.add_argument("--gpu-memory", type=_bytes, metavar="80GB", help="of a card, as it is sold")
    parser.add_argument("--host-memory", type=_bytes, metavar="1TB", help="of a machine")
    parser.add_argument(
        "--flops", type=_flops, metavar="400e12", help="that a rank sustains per second, or `measured`: of matrix "
        "products on this machine"
    )  # fmt: skip
    parser.add_argument("--bandwidth", type=_bytes, metavar="50GB", help="per second, from a rank to the others")
    parser.add_argument("--host-bandwidth", type=_bytes, metavar="25GB", help="per second, between card and host")
    parser.add_argument("--samples", type=_count, metavar="N", help="training samples, where the recipe says epochs")
    parser.add_argument("--short", action="store_true", help="a few lines, as in the headers of recipes")
    parser.add_argument("--json", action="store_true", help="for programs; sizes in bytes")
    return parser


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: integer >= 1")
    return int(text)


def _flops(text: str) -> float | str:
    if text == _MEASURED:
        return text
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: number > 0, such as 400e12, or {_MEASURED}")
    return value
