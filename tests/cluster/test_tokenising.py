"""Tokenising holds no process group waiting: however long it takes, nothing that could time out has begun."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from tests.launching import launch, start, torchrun, write_inputs


def _ranks(launcher: int) -> list[psutil.Process]:
    below = psutil.Process(launcher).children(recursive=True)
    return [process for process in below if "RANK" in process.environ()]


@pytest.mark.slow
def test_ranks_that_wait_for_the_data_have_no_connection_yet(tmp_path: Path) -> None:
    """The test tokenises very slowly: it holds the lock of the cache, as the one who comes first does."""
    write_inputs(tmp_path)
    prepared = launch(["python", "-m", "trainer", "prepare", "tiny.yaml"], tmp_path)
    assert prepared.code == 0, prepared.everything
    (lock,) = (tmp_path / "runs" / "cache").glob("*.lock")
    out = tmp_path / "out"
    with out.open("w") as file, FileLock(lock):
        shutil.rmtree(lock.with_suffix(""))
        process = start(torchrun("tiny.yaml"), tmp_path, stdout=file, stderr=subprocess.STDOUT)
        end = time.monotonic() + 180
        while out.read_text().count("waiting for another process to tokenise the data") < 2:  # said after 30 s
            assert process.poll() is None and time.monotonic() < end, out.read_text()
            time.sleep(0.2)
        assert [rank.net_connections() for rank in _ranks(process.pid)] == [[], []]
    assert process.wait(180) == 0, out.read_text()
