"""`python -m trainer train` and launch/train.py: everything that can be refused without torch is refused before it is
imported."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from trainer.cli.process import EXIT_REFUSED, refuse, set_up_process
from trainer.cluster.ranks import LaunchError, first_of_all, take_rank
from trainer.config import RunConfig, help_text, load, parse_command_line
from trainer.config.command_line import wants_help
from trainer.config.deepspeed.resolve import resolve
from trainer.config.text import printable
from trainer.errors import refusals
from trainer.run.interruption import Interruption
from trainer.run.rank_watch import EXIT_FAILED, RankWatch


def main(argv: Sequence[str], *, default_recipe: Path | None = None) -> int:
    """Train, or describe a run, as `argv` says. Returns the exit code: 0; 2 after a message, if the request is refused
    or the run failed; 75 for a run that was told to stop and saved a checkpoint from which it resumes."""
    if wants_help(argv):  # before the launch is looked at, which may be wrong
        if first_of_all(os.environ):
            print(help_text(), end="")
        return 0
    try:
        alone = take_rank(os.environ, dry_run="--dry-run" in argv)
    except LaunchError as error:
        return refuse(str(error), error.task)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with refusals() as refused:
        command = parse_command_line(argv, default_recipe=str(default_recipe) if default_recipe else None)
        config = load(command.config_path, command.overrides)
        resolve(config, ranks)
    if refused:
        return refuse(refused[0], rank)
    if alone:
        print(f"\nWhat a single rank would do. To train, {printable(alone)}", file=sys.stderr)
    if command.dry_run:
        outcome = _run(lambda: _describe(config, rank, ranks))
        return outcome if isinstance(outcome, int) else refuse(outcome, rank)
    interruption, watch = Interruption(), RankWatch(rank, ranks)
    with interruption.listening(watch.fail) if config.saves else nullcontext(), watch.watching():
        try:
            outcome = _run(lambda: _train(config, interruption, watch))
        except BaseException as error:
            # Launchers send signals to a rank when another one has failed. It still has to print why, and must not exit
            # with the code of a rank that saved.
            interruption.ignore()
            if ranks == 1:
                raise
            _fail(error, watch)
        if ranks > 1 and not isinstance(outcome, int):
            interruption.ignore()
            watch.fail(EXIT_REFUSED, outcome)
    return outcome if isinstance(outcome, int) else refuse(outcome, rank)


def _fail(error: BaseException, watch: RankWatch) -> NoReturn:
    """End all ranks after an unexpected error, with its traceback, or after a signal, without one."""
    if isinstance(error, SystemExit):
        watch.fail(error.code if isinstance(error.code, int) else EXIT_FAILED, expected=False)
    if isinstance(error, KeyboardInterrupt):
        watch.fail(128 + signal.SIGINT, expected=False)
    watch.fail(EXIT_FAILED, "".join(traceback.format_exception(error)), expected=False)


def _train(config: RunConfig, interruption: Interruption, watch: RankWatch) -> int:
    from trainer.train import run

    return run(config, interruption, watch)


def _describe(config: RunConfig, rank: int, ranks: int) -> int:
    from trainer.planner.dry_run import describe  # on all ranks: launchers end a job soon after its first rank exits

    if rank == 0:
        print(printable(describe(config, ranks)))
    return 0


def _run(work: Callable[[], int]) -> int | str:
    """Return the exit code of `work`, or why it is refused or has failed."""
    set_up_process()
    with refusals() as refused:
        return work()
    return refused[0]
