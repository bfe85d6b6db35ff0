"""build.initialise_process_group: a rank that waits in vain ends with an error, and soon; nothing stays in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launching import environment

WAITS = """
import sys

import pytest
from trainer.entry import prepare_process
prepare_process()
from trainer.build import initialise_process_group
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


SHARES = """
from trainer.entry import prepare_process
prepare_process()
from trainer.build import initialise_process_group
from deepspeed import comm as dist
import torch
initialise_process_group(timeout_minutes=1)
rank = dist.get_rank()
mapped = "deepspeed_allreduce_buffer" in open("/proc/self/maps").read()
for number in (10, 10**6):  # small ones and large ones take other ways through what they share
    summed = torch.full((number,), rank + 1.0)
    dist.all_reduce(summed)
    assert bool((summed == 3).all())
print("shared" if mapped else "apart", flush=True)
"""


def test_nothing_stays_in_shared_memory_not_even_after_a_kill() -> None:
    # By LOCAL_SIZE DeepSpeed knows that all ranks are on this machine.
    with two_ranks(SHARES + "import os; os.kill(os.getpid(), 9)", port=29714, LOCAL_SIZE="2") as processes:
        told = [process.communicate(timeout=120) for process in processes]
    assert {stdout.strip().splitlines()[-1] for stdout, _ in told} == {"shared"}, told
    assert not list(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*_29714_*"))


@contextmanager
def two_ranks(code: str, *, port: int, **variables: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes of one group that run `code`; killed in the end."""
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
