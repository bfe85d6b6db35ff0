"""One job at a time in a run folder, and nothing published by one that has lost it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from trainer.checkpoint.lease import FILE, Holder, Lease, LeaseError, lives, read, this_process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@dataclass
class Other:
    """Another process that holds the lease until `close`."""

    process: BaseProcess
    connection: Connection

    def publish(self) -> str:
        """Let it publish something, and return what it says."""
        self.connection.send(None)
        return self.connection.recv()


def hold(folder: Path, variables: dict[str, str], connection: Connection) -> None:
    """Take the lease, and publish on demand until the connection ends; runs in the other process."""
    os.environ.update(variables)
    lease = Lease(folder, this_process()).take()
    connection.send("taken")
    with suppress(EOFError):
        while True:
            connection.recv()
            try:
                with lease.held():
                    connection.send("published")
            except LeaseError as error:
                connection.send(f"refused: {error}")


def start(folder: Path, **variables: str) -> Other:
    ours, theirs = forked.context().Pipe()
    process = forked.context().Process(target=hold, args=(folder, variables, theirs), daemon=True)
    process.start()
    theirs.close()
    assert ours.recv() == "taken"
    return Other(process, ours)


def as_if(**changes: Any) -> Holder:
    return replace(this_process({}), **changes)


def test_a_second_job_is_refused_and_the_first_one_named(folder: Path) -> None:
    other = start(folder, SLURM_JOB_ID="7")
    try:
        number = other.process.pid
        with pytest.raises(LeaseError, match=rf"SLURM job 7 \(process {number} on .*Wait for its end, or set"):
            Lease(folder, this_process({"SLURM_JOB_ID": "8"})).take()
        assert other.publish() == "published"
    finally:
        other.process.kill()
        other.process.join()
    mine = Lease(folder, this_process({"SLURM_JOB_ID": "8"})).take()  # a killed process holds nothing
    mine.release()
    assert not (folder / FILE).exists()


def test_the_requeued_job_gets_in_and_what_is_left_of_it_publishes_no_more(folder: Path) -> None:
    zombie = start(folder, SLURM_JOB_ID="7")
    try:
        os.kill(zombie.process.pid, signal.SIGSTOP)  # its node was cut off
        again = Lease(folder, this_process({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})).take()
        os.kill(zombie.process.pid, signal.SIGCONT)
        assert "belongs to SLURM job 7, restart 1" in zombie.publish()
        with again.held():
            pass
        # Nor does it show life for its successor: what it has open is another file.
        before = os.stat(folder / FILE).st_ino
        zombie.connection.close()
        zombie.process.join(10)
        assert zombie.process.exitcode == 0 and os.stat(folder / FILE).st_ino == before
        again.release()
    finally:
        zombie.process.kill()
        zombie.process.join()


def test_a_holder_elsewhere_lives_while_its_lease_is_touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.checkpoint.lease._BEAT_SECONDS", 0.2)
    elsewhere = as_if(job="SLURM job 7", place="node2 pid:[1]")
    lease = Lease(folder, elsewhere).take()
    assert lives(folder, elsewhere, as_if(job="SLURM job 8"))
    lease._released.set()  # without removing the file: it died
    lease._beats.join()
    assert not lives(folder, elsewhere, as_if(job="SLURM job 8"))
    assert read(folder) == elsewhere


def test_a_process_number_given_to_another_process_is_not_the_holder(folder: Path) -> None:
    started = this_process({}).started
    assert lives(folder, as_if(), as_if(job="another"))
    assert not lives(folder, as_if(started=f"{started}0"), as_if(job="another"))
    assert not lives(folder, as_if(started="another boot 17"), as_if(job="another"))


# Ends, and waits to be asked for its exit code by a parent that does not ask.
ENDED = "pass"
STOPPED = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
# Its first thread ends, and another one does not: the system shows the process as a zombie, too.
FIRST_THREAD_ENDED = """
import ctypes, threading, time
sleep = ctypes.CDLL(None).sleep
threading.Thread(target=sleep, args=(100,)).start()
time.sleep(0.2)
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.mark.parametrize(
    ("code", "state", "expected"),
    [(ENDED, "Z", False), (STOPPED, "T", True), (FIRST_THREAD_ENDED, "Z", True)],
    ids=["ended", "stopped", "first-thread-ended"],
)
def test_a_process_that_has_ended_does_not_live_though_its_number_is_taken(
    folder: Path, code: str, state: str, expected: bool
) -> None:
    """As in a container without a first process that asks for exit codes. A lease of it is free at once."""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        status = Path(f"/proc/{process.pid}/stat")
        end = time.monotonic() + 20
        while f") {state} " not in status.read_text():
            assert time.monotonic() < end, status.read_text()
            time.sleep(0.01)
        born = status.read_text().rpartition(")")[2].split()[19]
        boot = this_process({}).started.split()[0]
        holder = as_if(job="another", process=process.pid, started=f"{boot} {born}")
        (folder / FILE).write_text(json.dumps(asdict(holder)))
        assert lives(folder, holder, this_process({})) is expected
        if not expected:
            Lease(folder, this_process({})).take().release()
    finally:
        process.kill()
        process.wait()


def test_another_machine_of_the_same_name_is_not_looked_for_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is not to be found on this one; its lease shows whether it lives."""
    monkeypatch.setattr("trainer.checkpoint.lease._BEAT_SECONDS", 0.1)
    elsewhere = as_if(job="SLURM job 7", process=2**22 + 1, started="another-boot 17")
    lease = Lease(folder, elsewhere).take()
    assert lives(folder, elsewhere, as_if(job="another"))
    lease._released.set()
    lease._beats.join()
    assert not lives(folder, elsewhere, as_if(job="another"))


@pytest.mark.parametrize("data", [b"", bytes(180), b"\n"])
def test_an_empty_lease_is_free_when_nobody_shows_life(
    folder: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.checkpoint.lease._BEAT_SECONDS", 0.1)
    living = Lease(folder, as_if()).take()
    with open(folder / FILE, "r+b") as file:  # the file that its holder has
        file.truncate(0)
        file.write(data)
    with pytest.raises(LeaseError, match=r"another run trains in .*: an unknown run \(lease.json is"):
        Lease(folder, as_if(job="another")).take()
    living._released.set()
    living._beats.join()
    Lease(folder, as_if(job="another")).take().release()


WHOLE = asdict(Holder("SLURM job 7", 0, "node2", 1, "boot 2", "token"))


@pytest.mark.parametrize(
    "content",
    [
        {"job": "x"},
        {**WHOLE, "restart": "1"},
        {**WHOLE, "restart": None},
        {**WHOLE, "process": 1.5},
        {**WHOLE, "place": 1},
        {**WHOLE, "started": []},
        [],
        "x",
        None,
    ],
)
def test_a_broken_lease_is_named(folder: Path, content: Any) -> None:
    (folder / FILE).write_text(json.dumps(content))
    with pytest.raises(LeaseError, match="lease.json: cannot be read .* Remove it if no run trains there"):
        Lease(folder, as_if()).take()


@pytest.mark.parametrize("data", [b"\xff\xfe", b"{", b"[" * 5000, os.urandom(200)])
def test_so_is_one_that_is_no_json(folder: Path, data: bytes) -> None:
    (folder / FILE).write_bytes(data)
    with pytest.raises(LeaseError, match="lease.json: cannot be read .* Remove it if no run trains there"):
        Lease(folder, as_if()).take()


def test_a_number_that_no_process_can_have_is_nobody_s(folder: Path) -> None:
    assert not lives(folder, as_if(job="another", process=10**30), as_if())
