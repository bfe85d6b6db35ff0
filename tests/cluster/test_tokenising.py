"""Tokenising holds no process group waiting: however long it takes, nothing that could time out has begun."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from tests.launching import deepspeed, launch, start, torchrun, write_inputs
from tests.slurm.lab import until


def _at_the_lock(launcher: int, lock: Path) -> list[psutil.Process]:
    """The ranks, once all of them have been seen to try the lock of the data."""
    seen: dict[int, psutil.Process] = {}

    def both() -> bool:
        for process in psutil.Process(launcher).children(recursive=True):
            try:
                if any(Path(file.path) == lock for file in process.open_files()):
                    seen[process.pid] = process
            except psutil.Error:  # it has just ended
                pass
        return len(seen) == 2

    until(both, "two ranks wait for the data", 120)
    return list(seen.values())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_ranks_that_wait_for_the_data_have_no_connection_yet(tmp_path: Path, launcher: object) -> None:
    """The test tokenises very slowly: it holds the lock of the cache, as the one who comes first does."""
    write_inputs(tmp_path)
    prepared = launch(["python", "-m", "trainer", "prepare", "tiny.yaml"], tmp_path)
    assert prepared.code == 0, prepared.everything
    (lock,) = (tmp_path / "runs" / "cache").glob("*.lock")
    with open(tmp_path / "out", "w") as out, FileLock(lock):
        shutil.rmtree(lock.with_suffix(""))
        process = start(launcher("tiny.yaml"), tmp_path, stdout=out, stderr=subprocess.STDOUT)  # type: ignore[operator]
        ranks = _at_the_lock(process.pid, lock)
        for _ in range(20):
            assert [rank.net_connections() for rank in ranks] == [[], []]
            time.sleep(0.1)
    assert process.wait(180) == 0, (tmp_path / "out").read_text()
