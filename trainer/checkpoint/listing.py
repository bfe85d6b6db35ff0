"""`python -m trainer checkpoints RUN`: what is there, and whether it is whole. Needs no accelerator and no model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint.store import CheckpointError, Store

USAGE = """Usage: python -m trainer checkpoints RUN

Lists the checkpoints of a run folder, newest first, and compares sizes and checksums of all their files. Exit code 1
where one is damaged.
"""


def main(argv: Sequence[str]) -> int:
    """0: all are whole; 1: some are not; 2: there are none, or the request is wrong."""
    if list(argv) in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if len(argv) != 1:
        print(USAGE, end="", file=sys.stderr)
        return 2
    store = Store(Path(argv[0]).expanduser())
    if not store.steps():
        print(f"no checkpoint in {store.folder}", file=sys.stderr)
        return 2
    damaged = False
    checked: dict[str, str | None] = {}  # files are shared
    for step in store.steps():
        try:
            manifest = store.read(step)
        except CheckpointError as error:
            damaged = True
            print(f"step {step:>8}  DAMAGED  {error}")
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
        state = f"DAMAGED  {problems[0]}" if problems else "whole"
        print(
            f"step {step:>8}  {size / 2**20:10.1f} MiB, {own / 2**20:.1f} of it written then, by "
            f"{manifest.state['ranks']} ranks  {state}{notes}"
        )
    return int(damaged)
