"""trainer/cli/train.py: who speaks when a run is refused, and how many cores each process takes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from trainer.cli import process as entry
from trainer.cli.main import main


def test_importing_the_entry_point_needs_no_torch() -> None:
    """Help and refusals come at once."""
    slow = ("torch", "transformers", "deepspeed", "datasets")
    code = f"import sys, trainer.cli.train; print([name for name in {slow} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr) == ("[]\n", "")


@pytest.mark.parametrize("command", ["train", "prepare", "plan", "submit"])
def test_what_the_file_system_refuses_is_a_message(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(path: str, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    room = {"submit": "cluster"}.get(command, "cli")
    monkeypatch.setattr(importlib.import_module(f"trainer.{room}.{command}"), "load", load)
    job = ["--gpus", "1", "--time", "1:00:00"] if command == "submit" else []
    assert main([command, "closed.yaml", *job]) == 2
    assert "Permission denied: 'closed.yaml'" in capsys.readouterr().err


def test_rank_0_says_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.refuse("no such file", rank=0) == 2
    assert capsys.readouterr().err == "\nno such file\n"


def test_another_rank_speaks_where_rank_0_has_not_ended_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its machine may be the only one that lacks the file."""
    waited: list[float] = []
    monkeypatch.setattr(entry.time, "sleep", waited.append)
    assert entry.refuse("no such file", rank=3) == 2
    assert capsys.readouterr().err == "\nrank 3: no such file\n"
    assert waited and waited[0] > 3, "DeepSpeed's launcher looks every second"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    entry.refuse("no such file", rank=3)
    assert waited[1] > 40, (
        "rank 0 takes its time to leave on a busy node; srun waits for 20 seconds, as launch/slurm.sbatch calls it"
    )


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({}, 1),
        ({"LOCAL_SIZE": "2"}, 2),
        ({"LOCAL_WORLD_SIZE": "2"}, 2),
        ({"LOCAL_SIZE": "100000"}, 100000),
        # Tasks of srun: all on the same cores; and each bound to cores of its own, of more that the job has there.
        ({"LOCAL_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_CPUS_ON_NODE": "1"}, 2),
        ({"LOCAL_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_CPUS_ON_NODE": "100000"}, 1),
    ],
)
def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], share: int) -> None:
    monkeypatch.setattr(os, "environ", dict(variables))
    entry.set_up_process()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert os.environ["OMP_NUM_THREADS"] == str(max(1, cores // share))


def test_the_user_s_number_of_threads_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    entry.set_up_process()
    assert os.environ["OMP_NUM_THREADS"] == "7"
