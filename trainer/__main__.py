"""`python -m trainer COMMAND ...`: the commands of an installed Strata."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trainer.config.errors import hint
from trainer.entry import EXIT_REFUSED, prepare
from trainer.entry import main as train
from trainer.export_command import apply, export


def checkpoints(argv: Sequence[str]) -> int:
    """As `trainer.checkpoint.listing.main`, which imports torch."""
    from trainer.checkpoint.listing import main as list_checkpoints

    return list_checkpoints(argv)


COMMANDS = {"train": train, "prepare": prepare, "checkpoints": checkpoints, "export": export, "apply": apply}
USAGE = """Usage: python -m trainer COMMAND [argument ...]

  train RECIPE.yaml [key=value ...] [--dry-run] [--help]   what launch/train.py does; start it with a launcher for
                                                           several ranks: torchrun --nproc_per_node N -m trainer ...
  prepare RECIPE.yaml [key=value ...] [--show N]           tokenises the data into the cache, where training finds it,
                                                           and says what became of it; no accelerator is needed.
                                                           --show N prints N samples of every source
  checkpoints RUN                                          lists the checkpoints of a run folder and verifies them
  export RUN OUT [--step N | --best] [--delta]             writes the model of a checkpoint as a Hugging Face folder,
                                                           or what it changed of its base
  apply BASE DELTA OUT                                     puts such a delta on its base
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
