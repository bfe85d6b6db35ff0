"""Commands of `python -m trainer` in forks of a process that has imported everything: milliseconds, not seconds, each.

A fork cannot hurt its parent: it has a limit of processor time, of memory and of wall-clock time, and files of its own
for what it prints.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.launching import Finished

# A case that computes for longer hangs. Wall-clock time depends on what else the machine does.
CPU_SECONDS, WALL_SECONDS = 10, 120
_MEMORY = 6 * 2**30  # more than the parent has


def import_everything() -> None:
    """What the commands import when they are needed, so that forks find it there."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork has no threads of its parent's
    import trainer.checkpoint
    import trainer.data.show
    import trainer.model.adapters
    import trainer.planner.dry_run
    import trainer.train  # noqa: F401
    from trainer.cli.main import COMMANDS
    from trainer.settings import implementation

    for command in COMMANDS.values():
        implementation(command.function)


def in_fork(act: Callable[[], int], *, folder: Path) -> Finished:
    """`act` in a fork of this process, in `folder`; its result is the exit code."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = os.fork()
        if process == 0:
            _child(act, folder, stdout.fileno(), stderr.fileno())
        code = _ended(process)
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return Finished(code, *texts)


def _child(act: Callable[[], int], folder: Path, stdout: int, stderr: int) -> None:
    code = 70  # EX_SOFTWARE of sysexits.h: an exception that nobody expected
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY, held + _MEMORY))
        os.chdir(folder)
        code = act()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ended(process: int) -> int:
    """The exit code of the fork, which is ended with all that it started once its time is over."""
    descriptor = os.pidfd_open(process)
    try:
        select.select([descriptor], [], [], WALL_SECONDS)
    finally:
        os.close(descriptor)
        try:
            os.killpg(process, signal.SIGKILL)
        except ProcessLookupError:
            pass
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)
