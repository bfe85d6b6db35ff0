"""Dispatch `python -m trainer COMMAND ...` to the commands, by their names."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trainer.cli.export import apply, export
from trainer.cli.prepare import main as prepare
from trainer.cli.process import EXIT_REFUSED, prepare_process
from trainer.cli.train import main as train
from trainer.cluster.doctor import main as doctor
from trainer.cluster.submit import main as submit
from trainer.config.command_line import wants_help
from trainer.config.errors import hint
from trainer.config.text import quoted


def checkpoints(argv: Sequence[str]) -> int:
    """Call `trainer.cli.checkpoints.main`, which imports torch."""
    from trainer.cli.checkpoints import main as list_checkpoints

    return list_checkpoints(argv)


def plan(argv: Sequence[str]) -> int:
    """Call `trainer.cli.plan.main`, which imports torch."""
    prepare_process()
    from trainer.cli.plan import main as plan_recipe

    return plan_recipe(argv)


COMMANDS = {
    "train": train,
    "prepare": prepare,
    "plan": plan,
    "checkpoints": checkpoints,
    "export": export,
    "apply": apply,
    "submit": submit,
    "doctor": doctor,
}
USAGE = """Usage: python -m trainer COMMAND [argument ...]

  train RECIPE.yaml [key=value ...] [--dry-run] [--help]   what launch/train.py does; start it with a launcher for
                                                           several ranks: torchrun --nproc_per_node N -m trainer ...
  prepare RECIPE.yaml [key=value ...] [--show N]           tokenises the data into the cache, where training finds it,
                                                           and reports on every source; needs no accelerator.
                                                           --show N prints N samples of every source
  plan RECIPE.yaml [key=value ...] [options] [--help]      what each rank will store, compute and send on the machine
                                                           that the options describe, from config.json alone; whether
                                                           it fits, and what to change if not
  checkpoints RUN                                          lists the checkpoints of a run folder and verifies them
  export RUN OUT [--step N | --best] [--delta]             writes the model of a checkpoint as a Hugging Face folder,
                                                           or only the blocks that differ from its base (a delta)
  apply BASE DELTA OUT                                     applies such a delta to its base
  submit RECIPE.yaml --nodes N --gpus N --time T           writes a job for SLURM beside the run folder and submits it;
                                [key=value ...] [--print]  it saves before its time limit and resumes by itself
  doctor [--on-cluster]                                    checks whether this machine, or every node of a cluster, is
                                                           fit for training, and says what to do if it is not
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with which `argv` begins. Returns its exit code, or 2 for an unknown command."""
    argv = list(argv)
    while argv and argv[0].startswith("--local"):  # DeepSpeed's launcher puts its own argument first
        argv = argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else EXIT_REFUSED
    if argv[0] not in COMMANDS:
        print(f"unknown command {quoted(argv[0])}{hint(argv[0], COMMANDS)}\n\n{USAGE}", end="", file=sys.stderr)
        return EXIT_REFUSED
    # A request for help, anywhere in the line, overrides everything else.
    return COMMANDS[argv[0]](["--help"] if wants_help(argv[1:]) else argv[1:])
