"""`python -m trainer checkpoints RUN`: list checkpoints and verify them. Needs no GPU and no model."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence

from trainer.checkpoint.store import CheckpointError, open_store
from trainer.config.argument_paths import path_argument
from trainer.config.reading import obstacle
from trainer.config.text import in_short, printable, quoted

USAGE = """Usage: python -m trainer checkpoints RUN

Lists the checkpoints of a run folder (or of a folder of engine.save_checkpoint), newest first, and compares sizes and
checksums of all their files. The exit code is 1 if one is damaged.
"""


def main(argv: Sequence[str]) -> int:
    """Print each checkpoint of the folder in `argv`. Returns 0 if all are whole, 1 if some are not, 2 if there are
    none or the request is wrong."""
    if list(argv) in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if len(argv) != 1:
        got = in_short(" ".join(map(quoted, argv))) or "nothing"
        print(f"RUN: got {got}; allowed: one run folder\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        store = open_store(path_argument(argv[0]))
        reason, steps = obstacle(store.folder), store.steps()
    except (ArgumentTypeError, CheckpointError, OSError) as error:
        print(printable(f"RUN: {error}"), file=sys.stderr)
        return 2
    if not steps:
        print(printable(f"no checkpoint in {store.folder}" + (f": {reason}" if reason else "")), file=sys.stderr)
        return 2
    damaged = False
    checked: dict[str, str | None] = {}  # checkpoints share files
    for step in steps:
        try:
            manifest = store.read(step)
        except CheckpointError as error:
            damaged = True
            print(f"step {step:>8}  DAMAGED  {printable(str(error))}")
            continue
        for file in manifest.files:
            if file.name not in checked:
                checked[file.name] = store.problem(file)
        problems = [checked[file.name] for file in manifest.files if checked[file.name]]
        damaged = damaged or bool(problems)
        own = sum(file.bytes for file in manifest.files if file.name.startswith(f"{step:08d}-"))
        size = sum(file.bytes for file in manifest.files)
        best = manifest.state.get("best")
        notes = "  best evaluation loss" if best and best[1] == step else ""
        state = f"DAMAGED  {printable(str(problems[0]))}" if problems else "whole"
        print(
            f"step {step:>8}  {size / 2**20:10.1f} MiB, {own / 2**20:.1f} of it written then, by "
            f"{manifest.state['ranks']} ranks  {state}{notes}"
        )
    return int(damaged)
