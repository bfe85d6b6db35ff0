"""One job at a time in a run folder, and nothing published by one that has lost it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint.lease import FILE, Holder, Lease, LeaseError, lives, read, this_process

# Takes the lease as SLURM job 7 (or whatever SLURM_JOB_ID says), says so, publishes on demand, and waits.
HOLDER = """
import sys
from pathlib import Path
from trainer.checkpoint.lease import Lease, LeaseError, this_process
lease = Lease.take(Path(sys.argv[1]), this_process())
print("taken", flush=True)
for line in sys.stdin:
    try:
        with lease.held():
            print("published", flush=True)
    except LeaseError as error:
        print(f"refused: {error}", flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def start(folder: Path, **variables: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    return process


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def as_if(**changes: Any) -> Holder:
    return replace(this_process({}), **changes)


def test_a_second_job_is_refused_and_the_first_one_named(folder: Path) -> None:
    process = start(folder, SLURM_JOB_ID="7")
    try:
        with pytest.raises(LeaseError, match=rf"SLURM job 7 \(process {process.pid} on .*Wait for its end, or set"):
            Lease.take(folder, this_process({"SLURM_JOB_ID": "8"}))
        assert ask(process) == "published"
    finally:
        process.kill()
        process.wait()
    mine = Lease.take(folder, this_process({"SLURM_JOB_ID": "8"}))  # a killed process holds nothing
    mine.release()
    assert not (folder / FILE).exists()


def test_the_requeued_job_gets_in_and_what_is_left_of_it_publishes_no_more(folder: Path) -> None:
    zombie = start(folder, SLURM_JOB_ID="7")
    try:
        os.kill(zombie.pid, signal.SIGSTOP)  # its node was cut off
        again = Lease.take(folder, this_process({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}))
        os.kill(zombie.pid, signal.SIGCONT)
        assert "belongs to SLURM job 7, restart 1" in ask(zombie)
        with again.held():
            pass
        # Nor does it show life for its successor: what it has open is another file.
        before = os.stat(folder / FILE).st_ino
        zombie.stdin.close()  # type: ignore[union-attr]
        assert zombie.wait(10) == 0 and os.stat(folder / FILE).st_ino == before
        again.release()
    finally:
        zombie.kill()
        zombie.wait()


def test_a_holder_elsewhere_lives_while_its_lease_is_touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.checkpoint.lease._BEAT_SECONDS", 0.2)
    elsewhere = as_if(job="SLURM job 7", place="node2 pid:[1]")
    lease = Lease.take(folder, elsewhere)
    assert lives(folder, elsewhere, as_if(job="SLURM job 8"))
    lease._released.set()  # without removing the file: it died
    lease._beats.join()
    assert not lives(folder, elsewhere, as_if(job="SLURM job 8"))
    assert read(folder) == elsewhere


def test_a_process_number_given_to_another_process_is_not_the_holder(folder: Path) -> None:
    holder = as_if(started="another boot 17")
    assert not lives(folder, holder, as_if(job="another"))


def test_a_broken_lease_is_named(folder: Path) -> None:
    (folder / FILE).write_text(json.dumps({"job": "x"}))
    with pytest.raises(LeaseError, match="lease.json: cannot be read .* Remove it if no run trains there"):
        Lease.take(folder, as_if())
