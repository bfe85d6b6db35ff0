"""initialise_process_group: a rank that waits in vain ends with an error, and soon; nothing stays in shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from deepspeed import comm as dist

from tests import forked
from tests.launching import environment, free_port
from trainer.run.setup import initialise_process_group

WAITS = """
import sys

import pytest
from trainer.cli.train import set_up_process
set_up_process()
from trainer.run.setup import initialise_process_group
from deepspeed import comm as dist
import torch
initialise_process_group(timeout_minutes=0.25)  # the first meeting of the two has to fit into it as well
torch.distributed.all_reduce(torch.ones(1))
theirs = torch.distributed.new_group([0, 1])  # as DeepSpeed makes its own
if dist.get_rank() == 0:
    print("together", flush=True)
    torch.distributed.all_reduce(torch.ones(1), group=theirs)  # alone
else:
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_rank_that_waits_in_vain_fails_after_the_timeout() -> None:
    with two_ranks(WAITS, port=29713) as processes:
        stdout, stderr = processes[0].communicate(timeout=120)
        assert "together" in stdout and processes[0].returncode != 0
    assert "Timed out" in stderr or "timeout" in stderr.lower()


def _share_and_die(rank: int, variables: dict[str, str], workspace: Path) -> None:
    os.environ.clear()
    os.environ.update(variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    initialise_process_group(timeout_minutes=1)
    mapped = "deepspeed_allreduce_buffer" in Path("/proc/self/maps").read_text()
    for number in (10, 10**6):  # small and large tensors are reduced in different ways
        summed = torch.full((number,), rank + 1.0)
        dist.all_reduce(summed)
        assert bool((summed == 3).all())
    (workspace / str(rank)).write_text("shared" if mapped else "apart")
    os.kill(os.getpid(), signal.SIGKILL)


def test_nothing_stays_in_shared_memory_not_even_after_a_kill(tmp_path: Path) -> None:
    # By LOCAL_SIZE DeepSpeed knows that all ranks are on this machine.
    port = str(free_port())
    shared = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    processes = [forked.context().Process(target=_share_and_die, args=(rank, shared, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        process.kill()
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["shared", "shared"]
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))


@contextmanager
def two_ranks(code: str, *, port: int, **variables: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes of one group that run `code`; killed at exit."""
    shared = environment() | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | variables
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=shared | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": os.getcwd()},
        )
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
