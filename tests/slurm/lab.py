"""A Slurm cluster on this machine (lab.sh), and jobs on it that are followed with deadlines."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launching import Finished, environment, launch

# What a change that is not about clusters need not wait for: CI has time for runs through `submit`.
thorough = pytest.mark.skipif("SLURM_TESTS" not in os.environ, reason="takes long: `make test-slurm` runs it")
SCRIPT = Path(__file__).parent / "lab.sh"
REPOSITORY = SCRIPT.parent.parent.parent


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "needs root: every node is a set of namespaces"
    absent = [name for name in ("slurmctld", "slurmd", "munged", "ip", "nsenter") if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)}: tests/slurm/lab.sh install"
    namespaces = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"]
    probe = subprocess.run(namespaces, capture_output=True)
    return f"needs namespaces: {probe.stderr.decode().strip()}" if probe.returncode else None


@dataclass(frozen=True)
class Lab:
    """Three nodes of four CPUs and four GPUs, as Slurm believes. `folder` holds its files."""

    folder: Path

    @property
    def local(self) -> Path:
        """A folder of which every node has its own."""
        return self.folder / "own"

    @property
    def variables(self) -> dict[str, str]:
        # Nodes see the same files, operators compiled before among them; the warnings are torch's, once per collective.
        size = {"SLURM_LAB_NODES": "3", "SLURM_LAB_CPUS": "4", "SLURM_LAB_GPUS": "4"}
        own = {"SLURM_LAB_DIR": str(self.folder / "lab"), "SLURM_LAB_LOCAL": str(self.local)}
        here = {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore::FutureWarning", "OMP_NUM_THREADS": "1"}
        return environment() | size | own | here

    def control(self, *words: str) -> None:
        """`lab.sh WORDS`: up, down, cut node1, ..."""
        done = subprocess.run([str(SCRIPT), *words], env=self.variables, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    def login(self, command: Sequence[str], workspace: Path, *, deadline: float = 60, **variables: str) -> Finished:
        """Run `command` on the login node, in `workspace`."""
        return launch(
            [str(SCRIPT), "run", *command], workspace, variables=self.variables | variables, deadline=deadline
        )

    def on(self, node: str, *command: str) -> Finished:
        """Run `command` on a node, outside any job."""
        return launch([str(SCRIPT), "on", node, *command], self.folder, variables=self.variables, deadline=60)

    def submit(self, workspace: Path, *words: str, nodes: int = 2, gpus: int = 1, limit: str = "10") -> Job:
        """A job of `python -m trainer submit`, by a user who sits in `workspace`."""
        command = ["python", "-m", "trainer", "submit", *words]
        command += ["--nodes", str(nodes), "--gpus", str(gpus), "--time", limit]
        done = self.login(command, workspace)
        found = re.search(r"Submitted job (\d+) \((.*)\.sbatch\)", done.stdout)
        assert done.code == 0 and found, done.everything
        return Job(self, found[1], workspace / f"{found[2]}-{found[1]}.log")

    def clear(self) -> None:
        """No job, and all nodes there."""
        self.login(["scancel", "--user", "root"], self.folder)
        for node in ("node1", "node2", "node3"):
            self.control("heal", node)
        self.control("up")  # waits until all are ready
        until(lambda: not self.login(["squeue", "-h"], self.folder).stdout.strip(), "no job is left", 60)


@dataclass(frozen=True)
class Job:
    """A job of the cluster."""

    lab: Lab
    number: str
    log: Path

    def fields(self) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts, BatchHost, ..."""
        shown = self.lab.login(["scontrol", "show", "job", self.number], self.lab.folder)
        assert shown.code == 0, shown.everything
        return dict(re.findall(r"(\w+)=(\S*)", shown.stdout))

    def wait(self, *states: str, deadline: float, restarts: int = 0) -> dict[str, str]:
        """Its fields once it is in one of `states`, after at least so many restarts."""

        def reached() -> dict[str, str] | None:
            fields = self.fields()
            there = fields["JobState"] in states and int(fields["Restarts"]) >= restarts
            assert there or fields["JobState"] not in ENDED or fields["Requeue"] == "1", f"{fields}\n{self.said()}"
            return fields if there else None

        return until(reached, f"job {self.number} is {' or '.join(states)}", deadline, self.said)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")


def until(look: Callable[[], Any], what: str, deadline: float, details: Callable[[], str] = str) -> Any:
    """The first true answer of `look`; AssertionError where none comes within `deadline` seconds."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        if answer := look():
            return answer
        time.sleep(0.2)
    raise AssertionError(f"not within {deadline} s: {what}\n{details()}")
