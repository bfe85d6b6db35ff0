"""From the command line to a run: everything that can be refused without torch is refused before it is imported."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from trainer.cluster.ranks import LaunchError, in_step, take_rank
from trainer.config import ConfigError, RunConfig, help_text, load, parse_command_line
from trainer.config.command_line import Command
from trainer.config.deepspeed import resolve
from trainer.interruption import Interruption

EXIT_REFUSED = 2
PREPARE_USAGE = """Usage: python -m trainer prepare RECIPE.yaml [key=value ...] [--show N]

Tokenises the data of a recipe into its cache (data.cache), where training with the same data, tokenizer and settings
finds it, and says what became of every source. --show N prints the first N samples of each, with the tokens that are
trained on in green, or in ⟦brackets⟧ where the output is no terminal (FORCE_COLOR=1 colours all the same).
`python -m trainer train --help` lists the settings.
"""
# Launchers kill the job about a second after the first process leaves, srun after 20 as launch/slurm.sbatch calls it;
# rank 0, who speaks, must be that process.
_PATIENCE_SECONDS, _PATIENCE_SECONDS_UNDER_SRUN = 10, 45


def main(argv: Sequence[str], *, default_recipe: Path | None = None) -> int:
    """Run what `argv` asks for; returns the exit code: 0; 2 for a request that is refused, or a run that failed, with a
    message; 75 for a run that was told to stop and has saved a checkpoint to go on from."""
    try:
        take_rank(os.environ)
    except LaunchError as error:
        return refuse(str(error), error.task)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        command = parse_command_line(argv, default_recipe=str(default_recipe) if default_recipe else None)
        if command.show_help:
            if rank == 0:
                print(help_text(), end="")
            return 0
        config = load(command.config_path, command.overrides)
        resolve(config, ranks)
    except ConfigError as error:
        return refuse(str(error), rank)

    interruption = Interruption()
    with interruption.listening() if config.saves and not command.dry_run else nullcontext():
        outcome = _run(command, config, rank, ranks, interruption)
    # Out here a signal ends this process as ever: one that waits to be killed must not look like one that has saved.
    return outcome if isinstance(outcome, int) else refuse(outcome, rank)


def _run(command: Command, config: RunConfig, rank: int, ranks: int, interruption: Interruption) -> int | str:
    """The exit code, or why the run is refused or has failed."""
    prepare_process()
    from trainer.adapters import AdapterError
    from trainer.blocks import BlockError
    from trainer.checkpoint import CheckpointError
    from trainer.data.errors import DataError
    from trainer.describe import describe
    from trainer.engine.guard import GuardError
    from trainer.engine.registration import RegistrationError
    from trainer.export import ExportError
    from trainer.loss import LossError
    from trainer.model import ModelError
    from trainer.train import StoppedError, run

    try:
        if command.dry_run:
            if rank == 0:
                print(describe(config, ranks))
        else:
            return run(config, interruption)
    except (ConfigError, DataError, ModelError, AdapterError, BlockError, LossError, RegistrationError) as error:
        return str(error)
    except (StoppedError, GuardError, ExportError, CheckpointError) as error:
        return str(error)
    except OSError as error:  # a full disk, a folder that cannot be written
        return f"{type(error).__name__}: {error}"
    return 0


def prepare(argv: Sequence[str]) -> int:
    """Tokenise the data of the recipe in `argv` and say what became of it; returns the exit code, as `main` does."""
    try:
        command = parse_command_line(argv, options=("--show", "--help"))
        if command.show_help:
            print(PREPARE_USAGE, end="")
            return 0
        config = load(command.config_path, command.overrides)
    except ConfigError as error:
        return refuse(str(error), rank=0)

    prepare_process()
    from trainer.data import prepare_run
    from trainer.data.errors import DataError
    from trainer.data.show import describe, shown
    from trainer.data.tokenizer import load_tokenizer, tokenizer_name

    try:
        tokenizer = load_tokenizer(tokenizer_name(config.model), trust_remote_code=config.model.trust_remote_code)
        data = prepare_run(config, tokenizer)
    except DataError as error:
        return refuse(str(error), rank=0)
    except OSError as error:
        return refuse(f"{type(error).__name__}: {error}", rank=0)
    colour = sys.stdout.isatty() or "FORCE_COLOR" in os.environ
    print("\n".join(shown(data, tokenizer, command.show, colour=colour) + describe(data, config.data.max_length)))
    return 0


def prepare_process() -> None:
    """What the environment must hold before torch is imported.

    The path to the tools of this environment: DeepSpeed compiles operators with ninja, and finding another version
    of it than the last run did compiles them anew. And this process's part of the machine's cores, where the user has
    not said otherwise: DeepSpeed's launcher leaves every rank as many threads as there are cores, and ranks on the
    CPU then wait for each other's (a step took 15 times as long on two ranks and two busy cores).
    """
    tools = str(Path(sys.executable).parent)
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([tools, os.environ.get("PATH", "")])
    # torchrun says LOCAL_WORLD_SIZE (and `take_rank` for srun), DeepSpeed's launcher LOCAL_SIZE.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if in_step(os.environ) and cores < int(os.environ.get("SLURM_CPUS_ON_NODE", "1")):
        processes = 1  # srun has bound each task to cores of its own
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))


def refuse(message: str, rank: int) -> int:
    """Say `message` once for the whole job and return the exit code.

    Another rank speaks where rank 0 has not ended the job by then: its machine may be the only one without a file.
    """
    if rank > 0:
        time.sleep(_PATIENCE_SECONDS_UNDER_SRUN if in_step(os.environ) else _PATIENCE_SECONDS)
        message = f"rank {rank}: {message}"
    print(f"\n{message}", file=sys.stderr, flush=True)
    return EXIT_REFUSED
