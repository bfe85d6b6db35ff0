"""trainer/run/rank_watch.py: the end of one rank is the end of all, said once, whoever started them."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.launching import SCRIPT, deepspeed, environment, launch, start, torchrun, write_inputs
from trainer.run.interruption import Interruption
from trainer.run.rank_watch import RankWatch

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="ranks watch processes by Linux's pidfd_open")

# A rank that waits where no exception and no signal handler of Python can reach it, as in a collective.
RANK = """
import ctypes, os, sys
from datetime import timedelta
from trainer.run.interruption import Interruption
from trainer.run.rank_watch import RankWatch

rank, ranks, what = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[1]
watch, interruption = RankWatch(rank, ranks), Interruption()

def stuck():
    os.write(1, b"stuck\\n")  # in one piece: the other rank writes to the same pipe
    mutex = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)  # held by itself; no signal interrupts this

with watch.watching(), interruption.listening(watch.fail):
    if what == "alone":
        stuck()
    watch.meet(timedelta(seconds=60))
    if what == "meet" or rank != int(what):
        stuck()
    sys.stdin.readline()
    watch.fail(7, "the disk is full", expected=len(sys.argv) == 2)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def ranks(
    what: str, number: int = 2, *, port: int | None = None, before: Sequence[str] = (), **variables: str
) -> Iterator[list[subprocess.Popen[str]]]:
    shared = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), **variables}
    shared |= {"WORLD_SIZE": str(number), "PYTHONPATH": os.getcwd()}
    processes = [
        subprocess.Popen(
            [*before, sys.executable, "-c", RANK, *what.split()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=shared | {"RANK": str(rank)},
        )
        for rank in range(number)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def ends(processes: Sequence[subprocess.Popen[str]], seconds: float = 40) -> tuple[list[int], str]:
    """Exit codes of all, and what they said together. `seconds` leaves room for a busy machine."""
    said = "".join(process.communicate(timeout=seconds)[1] for process in processes)
    return [process.returncode for process in processes], said


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_one_rank_fails_with_is_said_once_and_ends_all(failing: int) -> None:
    with ranks(str(failing), 3) as processes:
        for rank, process in enumerate(processes):
            assert rank == failing or process.stdout.readline() == "stuck\n"
        processes[failing].stdin.write("\n")
        processes[failing].stdin.flush()
        codes, said = ends(processes)
    assert codes == [7, 7, 7]
    assert said == ("\nthe disk is full\n" if failing == 0 else f"\nrank {failing}: the disk is full\n")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["alone", "meet"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_the_others_before_and_after_they_have_met(what: str, victim: int) -> None:
    with ranks(what, 3) as processes:
        for process in processes:
            assert process.stdout.readline() == "stuck\n"
        if what == "alone":
            time.sleep(1)  # the look at each other comes twice a second
        processes[victim].kill()
        codes, said = ends(processes)
    assert codes[victim] == -signal.SIGKILL and {*codes} == {-signal.SIGKILL, 1}
    assert said.count("ended before the run did") == 1
    assert f"\nrank {victim} (process {processes[victim].pid}) ended before the run did" in said


class _SlowStore:
    """A store that takes its time to answer."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def add(self, key: str, number: int) -> int:
        self.asked.set()
        time.sleep(0.5)
        return 1

    def check(self, keys: list[str]) -> bool:
        return False


def test_no_thread_is_in_the_store_when_a_finished_rank_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would end it there, in C++, and the process with it: "terminate called without an active exception"."""
    store = _SlowStore()
    monkeypatch.setattr(RankWatch, "_join", lambda *_: store)
    watch = RankWatch(0, 2)
    watch.meet(timedelta(seconds=1))
    assert store.asked.wait(5)
    watch.finish()
    assert "store watch" not in [thread.name for thread in threading.enumerate()]


def test_a_second_signal_does_not_interrupt_what_the_first_one_began() -> None:
    """Launchers pass on to every rank what they were told themselves."""
    interruption, done = Interruption(), []
    with pytest.raises(SystemExit) as left, interruption.listening():
        try:
            signal.raise_signal(signal.SIGUSR1)
            done.append("went on")
        finally:
            signal.raise_signal(signal.SIGTERM)
            done.append("tidied up")
    assert left.value.code == 75 and done == ["tidied up"]


@pytest.mark.slow
def test_a_signal_reaches_a_rank_that_waits_in_a_collective() -> None:
    with ranks("meet") as processes:
        for process in processes:
            assert process.stdout.readline() == "stuck\n"
        time.sleep(1)  # "stuck" is printed just before
        processes[1].terminate()
        codes, said = ends(processes)
    assert (codes, said) == ([75, 75], "")


@pytest.mark.slow
def test_a_rank_that_meets_another_run_leaves_it_alone() -> None:
    port = free_port()
    with ranks("meet", port=port) as processes:
        for process in processes:
            assert process.stdout.readline() == "stuck\n"
        with ranks("meet", port=port) as late:
            codes, said = ends(late, 60)
        assert 0 not in codes and f"MASTER_PORT={port}" in said
        time.sleep(2)
        assert [process.poll() for process in processes] == [None, None]


def _separate_hosts() -> list[str]:
    """A command that gives a process a host of its own, as far as ranks can see: name and processes."""
    command = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0 or subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        pytest.skip("a host of its own for each rank needs root and Linux's namespaces")
    return command


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_those_on_other_machines(victim: int) -> None:
    with ranks("meet", 3, before=_separate_hosts()) as processes:
        for process in processes:
            assert process.stdout.readline() == "stuck\n"
        time.sleep(2)  # until all know each other
        processes[victim].kill()
        codes, said = ends(processes)
    assert codes[victim] == -signal.SIGKILL and {*codes} == {-signal.SIGKILL, 1}
    assert said.count(f"\nrank {victim} (process ") == said.count("ended before the run did") == 1


@pytest.mark.slow
def test_a_failure_ends_those_on_other_machines() -> None:
    with ranks("1 traceback", 2, before=_separate_hosts()) as processes:
        assert processes[0].stdout.readline() == "stuck\n"
        processes[1].stdin.write("\n")
        processes[1].stdin.flush()
        codes, said = ends(processes)
    assert (codes, said) == ([7, 7], "\nrank 1: the disk is full\n")


LAUNCHER = """
import os, subprocess, sys
for rank in range(2):
    subprocess.Popen([sys.executable, "-c", sys.argv[1], "alone"], env=os.environ | {"RANK": str(rank)})
sys.stdin.read()
"""


@pytest.mark.parametrize("of_launcher", ["TORCHELASTIC_RUN_ID", "CROSS_RANK", None])
def test_ranks_end_with_their_launcher_and_not_with_a_shell(of_launcher: str | None) -> None:
    variables = environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables |= {"PYTHONPATH": os.getcwd()} | ({of_launcher: "0"} if of_launcher else {})
    command = [sys.executable, "-c", LAUNCHER, RANK]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables
    )
    children = []
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["stuck\n"] * 2
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        time.sleep(1)
        process.kill()
        end = time.monotonic() + (40 if of_launcher else 8)
        while any(map(lives, children)) and time.monotonic() < end:
            time.sleep(0.1)
        assert [lives(child) for child in children] == [of_launcher is None] * 2
    finally:
        process.kill()
        for child in children:
            if lives(child):
                os.kill(child, signal.SIGKILL)
        said = process.communicate()[0]
    assert said.count("The launcher has ended") == (of_launcher is not None)
    assert "ended before the run did" not in said


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- whole runs --------------------------------------------------------------------------------------------------


@contextmanager
def runs(workspace: Path, *values: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks of a run that were started by hand, one beside the other."""
    write_inputs(workspace)
    shared = environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        start(
            [sys.executable, str(SCRIPT), "tiny.yaml", *values],
            workspace,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_the_run_starts_ends_the_other(tmp_path: Path, victim: int) -> None:
    """No process group exists yet in which the other could notice."""
    with runs(tmp_path) as processes:
        # A rank watches before it imports torch. One that died before the other looked leaves nothing to be seen.
        maps = [Path(f"/proc/{process.pid}/maps") for process in processes]
        end = time.monotonic() + 120
        while not all("libtorch" in path.read_text() for path in maps):
            assert time.monotonic() < end
            time.sleep(0.02)
        processes[victim].kill()
        other = processes[1 - victim]
        _, said = other.communicate(timeout=60)
        assert other.returncode == 1
    assert said.count(f"\nrank {victim} (process {processes[victim].pid}) ended before the run did") == 1


@pytest.mark.slow
def test_what_rank_0_alone_cannot_do_ends_both_ranks_and_is_said_once(tmp_path: Path) -> None:
    with runs(tmp_path, "train.steps=100000", "eval.every=null", "schedule.warmup_steps=null") as processes:
        # Rank 0 writes metrics beside a model that trains, and its disk is full.
        file = tmp_path / "runs" / "tiny" / "metrics.jsonl"
        end = time.monotonic() + 240
        while not file.exists():
            assert [process.poll() for process in processes] == [None, None] and time.monotonic() < end
            time.sleep(0.02)
        resource.prlimit(processes[0].pid, resource.RLIMIT_FSIZE, (1, 1))
        codes, said = ends(processes, 120)
    assert codes == [2, 2], said
    assert said.count("OSError: [Errno 27] File too large") == 1 and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("started", [deepspeed, torchrun])
def test_an_error_of_one_rank_is_said_once_with_its_traceback(tmp_path: Path, started: Any) -> None:
    """A file of sitecustomize breaks rank 1 in the middle of its start, as a fault of its machine would."""
    write_inputs(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    variables = environment() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    finished = launch(started("tiny.yaml"), tmp_path, variables=variables, deadline=240)
    assert finished.code == 1, finished.everything
    assert finished.everything.count("ZeroDivisionError: the machine of rank 1") == 1, finished.everything
    assert finished.stderr.count("\nrank 1: Traceback") == 1
    assert finished.everything.count("Traceback") == 1 + (started is torchrun)  # torchrun has one of its own


FAULT = """
import os, sys
if os.environ.get("RANK") == "1":
    class Fault:
        def find_spec(self, name, path=None, target=None):
            if name == "trainer.planner.watch":
                import trainer.engine.sparse as sparse
                def fail(*_, **__):
                    raise ZeroDivisionError("the machine of rank 1")
                sparse.Sparse.attach = fail
    sys.meta_path.insert(0, Fault())
"""
