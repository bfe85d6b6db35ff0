"""build.initialise_process_group: a rank that waits for another in vain ends with an error, and soon."""

from __future__ import annotations

import os
import subprocess
import sys

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
    shared = environment() | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29713"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WAITS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=shared | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": os.getcwd()},
        )
        for rank in range(2)
    ]
    try:
        stdout, stderr = processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert "together" in stdout and processes[0].returncode != 0
    assert "Timed out" in stderr or "timeout" in stderr.lower()
