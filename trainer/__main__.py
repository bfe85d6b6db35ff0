"""`python -m trainer COMMAND ...`: the commands of an installed Strata."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trainer.cluster.doctor import main as doctor
from trainer.cluster.submit import main as submit
from trainer.config.errors import hint
from trainer.entry import EXIT_REFUSED, prepare, prepare_process
from trainer.entry import main as train
from trainer.export_command import apply, export


def checkpoints(argv: Sequence[str]) -> int:
    """As `trainer.checkpoint.listing.main`, which imports torch."""
    from trainer.checkpoint.listing import main as list_checkpoints

    return list_checkpoints(argv)


def plan(argv: Sequence[str]) -> int:
    """As `trainer.planner.command.main`, which imports torch."""
    prepare_process()
    from trainer.planner.command import main as plan_recipe

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
                                                           and says what became of it; no accelerator is needed.
                                                           --show N prints N samples of every source
  plan RECIPE.yaml [key=value ...] [options] [--help]      what each rank will hold, compute and send on the machine
                                                           that the options describe, from config.json alone; whether
                                                           it fits, and what to change if not
  checkpoints RUN                                          lists the checkpoints of a run folder and verifies them
  export RUN OUT [--step N | --best] [--delta]             writes the model of a checkpoint as a Hugging Face folder,
                                                           or what it changed of its base
  apply BASE DELTA OUT                                     puts such a delta on its base
  submit RECIPE.yaml --nodes N --gpus N --time T           writes a job for SLURM beside the run folder and submits it;
                                [key=value ...] [--print]  it saves before its time limit and goes on by itself
  doctor [--on-cluster]                                    looks whether this machine, or every node of a cluster, is
                                                           fit for training, and says what to do where it is not
"""


def main(argv: Sequence[str]) -> int:
    """Run the command that `argv` begins with; 0, or 2 for one that there is not."""
    while argv and argv[0].startswith("--local"):  # DeepSpeed's launcher puts its own argument first
        argv = argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else EXIT_REFUSED
    if argv[0] not in COMMANDS:
        print(f"unknown command {argv[0]!r}{hint(argv[0], COMMANDS)}\n\n{USAGE}", end="", file=sys.stderr)
        return EXIT_REFUSED
    return COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
