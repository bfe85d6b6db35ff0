"""Runs whose ranks are forks of a process that has imported everything: a start costs a second instead of eight.

The process that forks is multiprocessing's fork server. It imports, and does nothing else: it has one thread, no
process group and no tensors, so that a fork of it is as good as a fresh process (`tests/test_forked.py`).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from tests.launching import Finished, environment, free_port

_MODULES = (
    "trainer.train",
    "trainer.export.from_checkpoint",
    "trainer.export.delta",
    "datasets",
    "matplotlib.backends.backend_agg",
    "transformers.models.llama.modeling_llama",
    "tests.forked",
    "tests.operators",
)
# Libraries that start threads when they are imported: OpenBLAS, and the allocator of Arrow.
_WITHOUT_THREADS = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


@cache
def context() -> Any:
    """The context in which `Process` is a fork with these modules imported; they are when this returns."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(_MODULES))
    with mock.patch.dict(os.environ, {**environment(), **_WITHOUT_THREADS}):
        forkserver.ensure_running()
    first = found.Process(target=os.getpid)
    first.start()
    first.join()
    return found


@dataclass
class Ranks:
    """The ranks of a run, started by `start`."""

    processes: list[BaseProcess]
    stdout: Path
    stderr: Path

    @property
    def said(self) -> str:
        """What they have printed so far."""
        return self.stdout.read_text() + self.stderr.read_text()

    def poll(self) -> int | None:
        """The exit code, or None while a rank lives."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def wait(self, *, patience: float = 1.0, deadline: float = 180) -> Finished:
        """Wait for the end as launchers do, which end the other ranks `patience` seconds after the first one failed. A
        hang raises `AssertionError`."""
        end = time.monotonic() + deadline
        failed = None
        while living := [process for process in self.processes if process.is_alive()]:
            now = time.monotonic()
            if failed is None and any(process.exitcode for process in self.processes):
                failed = now
            if failed is not None and now >= failed + patience:
                self.kill()
            elif now > end:
                self.kill()
                raise AssertionError(f"not done after {deadline} s\n{self.said}")
            connection.wait([process.sentinel for process in living], timeout=0.2)
        code = self.poll()
        assert code is not None
        return Finished(code, self.stdout.read_text(), self.stderr.read_text())


def start(
    arguments: Sequence[str],
    workspace: Path,
    *,
    ranks: int = 2,
    variables: dict[str, str] | None = None,
    before: Callable[[int], None] | None = None,
) -> Ranks:
    """Start `python -m trainer train ARGUMENTS` in `workspace`; each rank first calls `before` (picklable) with its
    number.

    `variables` are added to a user's.
    """
    return _start(["train", *arguments], workspace, ranks, variables or {}, before)


def run(arguments: Sequence[str], workspace: Path, **options: Any) -> Finished:
    """Start a run and wait for its end."""
    return start(arguments, workspace, **options).wait()


def command(arguments: Sequence[str], workspace: Path) -> Finished:
    """Run `python -m trainer ARGUMENTS` in `workspace` to its end."""
    return _start(arguments, workspace, 1, {}, None).wait()


def script(path: Path, workspace: Path) -> Finished:
    """Run `python PATH` in `workspace` to its end."""
    return _start([str(path)], workspace, 1, {"MASTER_PORT": str(free_port())}, None).wait()


def _start(
    arguments: Sequence[str],
    workspace: Path,
    ranks: int,
    variables: dict[str, str],
    before: Callable[[int], None] | None,
) -> Ranks:
    said = Path(tempfile.mkdtemp(prefix="said-", dir=workspace.parent))
    output = said / "stdout", said / "stderr"
    for path in output:
        path.touch()
    forking, port, processes = context(), str(free_port()), []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        if arguments[0].endswith(".py"):  # started by no launcher
            own = {}
        args = (list(arguments), workspace, {**environment(), **own, **variables}, output, before)
        processes.append(forking.Process(target=_rank, args=args, daemon=True))
    for process in processes:
        process.start()
    return Ranks(processes, *output)


def _rank(
    arguments: list[str],
    workspace: Path,
    variables: dict[str, str],
    output: tuple[Path, Path],
    before: Callable[[int], None] | None,
) -> None:
    import gc

    import torch

    from trainer.cli.main import main

    os.environ.clear()
    os.environ.update(variables)
    os.chdir(workspace)
    for stream, path in zip((1, 2), output, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage when it builds an optimizer; the modules need no second look
    if before is not None:
        before(int(variables["RANK"]))
    if arguments[0].endswith(".py"):
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        sys.exit(main(arguments))
