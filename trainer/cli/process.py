"""Code shared by all commands: exit codes, how a refusal is printed, and the set-up before torch is imported."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from pathlib import Path

from trainer.cluster.ranks import in_step, number
from trainer.config.text import printable

EXIT_REFUSED = 2
# Launchers kill the job about a second after the first process exits, srun after 20 as slurm.sbatch calls it. Rank 0
# prints the message, so it must be that process.
_PATIENCE_SECONDS, _PATIENCE_SECONDS_UNDER_SRUN = 10, 45
# Libraries whose deprecations concern their authors or this package's: no user of a command can act on them.
_LIBRARIES = "accelerate|bitsandbytes|datasets|deepspeed|peft|torch|transformers"


def set_up_process() -> None:
    """Set up the environment and the filters of warnings. Call this before torch is imported.

    The tools of this Python environment are put first in PATH: DeepSpeed compiles operators with ninja, and compiles
    them again if it finds another version of it. OMP_NUM_THREADS becomes this process's share of the machine's cores,
    unless the user has set it: DeepSpeed's launcher gives every rank as many threads as there are cores, and ranks on
    the CPU then wait for each other's (a step took 15 times as long on two ranks and two busy cores).
    """
    tools = str(Path(sys.executable).parent)
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([tools, os.environ.get("PATH", "")])
    # torchrun sets LOCAL_WORLD_SIZE (and `take_rank` for srun), DeepSpeed's launcher LOCAL_SIZE.
    processes = number(os.environ, "LOCAL_WORLD_SIZE") or number(os.environ, "LOCAL_SIZE") or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if in_step(os.environ) and cores < (number(os.environ, "SLURM_CPUS_ON_NODE") or 1):
        processes = 1  # srun has bound each task to its own cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # On processors with AVX-512: that a package is missing with which 4-bit weights would be faster on the CPU.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # The run's first lines and `doctor` say on what it runs.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    if sys.warnoptions:  # python -W or PYTHONWARNINGS
        return
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=rf"({_LIBRARIES})(\.|$)")
    warnings.filterwarnings("ignore", category=UserWarning, module="_distutils_hack")  # of imports by torch and ninja


def refuse(message: str, rank: int) -> int:
    """Print `message` once for the whole job and return the exit code.

    Another rank waits first, and prints only if rank 0 has not ended the job: its node may be the only one on which
    a file is missing.
    """
    if rank > 0:
        time.sleep(_PATIENCE_SECONDS_UNDER_SRUN if in_step(os.environ) else _PATIENCE_SECONDS)
        message = f"rank {rank}: {message}"
    print(f"\n{printable(message)}", file=sys.stderr, flush=True)
    return EXIT_REFUSED
