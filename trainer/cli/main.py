"""Dispatch `python -m trainer COMMAND ...` to the commands, by their names."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from trainer.cli.process import EXIT_REFUSED, set_up_process
from trainer.config.command_line import wants_help
from trainer.config.errors import hint
from trainer.config.text import quoted
from trainer.settings import implementation


@dataclass(frozen=True)
class Command:
    """A command: its function as "module:function", and its arguments and purpose for the usage text.

    The module is imported when the command is called. `imports_torch`: the import of the module imports torch, before
    which the process must be prepared. Other commands prepare the process themselves, once they need torch.
    """

    function: str
    arguments: str
    purpose: str
    imports_torch: bool = False

    def run(self, argv: Sequence[str]) -> int:
        """Run the command with `argv`. Returns its exit code."""
        if self.imports_torch:
            set_up_process()
        code: int = implementation(self.function)(argv)
        return code


COMMANDS = {
    "train": Command(
        "trainer.cli.train:main",
        "RECIPE.yaml [key=value ...] [--dry-run] [--help]",
        "does what launch/train.py does; to start several ranks: torchrun --nproc_per_node N -m trainer train ...",
    ),
    "prepare": Command(
        "trainer.cli.prepare:main",
        "RECIPE.yaml [key=value ...] [--show N] [--html FILE]",
        "tokenises the data into the cache, where training finds it, and reports on every source; needs no GPU. "
        "--show N prints N samples of every source, --html FILE writes them to a page",
    ),
    "plan": Command(
        "trainer.cli.plan:main",
        "RECIPE.yaml [key=value ...] [options] [--help]",
        "says what each rank will store, compute and send on the machine that the options describe, from config.json "
        "alone; whether it fits, and what to change if not",
        imports_torch=True,
    ),
    "checkpoints": Command(
        "trainer.cli.checkpoints:main",
        "RUN",
        "lists the checkpoints of a run folder and verifies them",
        imports_torch=True,
    ),
    "export": Command(
        "trainer.cli.export:export",
        "RUN OUT [--step N | --best] [--delta]",
        "writes the model of a checkpoint as a Hugging Face folder, or only the blocks that differ from its base "
        "(a delta)",
    ),
    "apply": Command("trainer.cli.export:apply", "BASE DELTA OUT", "applies such a delta to its base"),
    "submit": Command(
        "trainer.cluster.submit:main",
        "RECIPE.yaml --nodes N --gpus N --time T [key=value ...] [--print]",
        "writes a job for SLURM beside the run folder and submits it; it saves before its time limit and resumes by "
        "itself",
    ),
    "doctor": Command(
        "trainer.cluster.doctor:main",
        "[--on-cluster]",
        "checks whether this machine, or every node of a cluster, is fit for training, and says what to do if it is "
        "not",
    ),
}
# Columns of the usage text.
_LEFT, _RIGHT = 57, 61


def usage() -> str:
    """Return the usage of `python -m trainer`: every command, with its arguments and purpose beside each other."""
    lines = ["Usage: python -m trainer COMMAND [argument ...]", ""]
    for name, command in COMMANDS.items():
        left = textwrap.wrap(f"{name} {command.arguments}", _LEFT - 2, subsequent_indent=" " * 8)
        right = textwrap.wrap(command.purpose, _RIGHT, break_on_hyphens=False)
        lines += [
            f"  {arguments:<{_LEFT}}{purpose}".rstrip() for arguments, purpose in zip_longest(left, right, fillvalue="")
        ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Run the command with which `argv` begins. Returns its exit code, or 2 for an unknown command."""
    argv = list(argv)
    while argv and argv[0].startswith("--local"):  # DeepSpeed's launcher puts its own argument first
        argv = argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if argv else EXIT_REFUSED
    if argv[0] not in COMMANDS:
        print(f"unknown command {quoted(argv[0])}{hint(argv[0], COMMANDS)}\n\n{usage()}", end="", file=sys.stderr)
        return EXIT_REFUSED
    # A request for help, anywhere in the line, overrides everything else.
    return COMMANDS[argv[0]].run(["--help"] if wants_help(argv[1:]) else argv[1:])
