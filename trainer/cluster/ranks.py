"""Ranks from SLURM: what srun says of each of its tasks, in the variables that torch and DeepSpeed read."""

from __future__ import annotations

import re
import subprocess
from collections.abc import MutableMapping

# Below the ports that Linux gives to outgoing connections (from 32768 on).
_FIRST_PORT, _NUM_PORTS = 10000, 20000
# What srun says of each of its tasks, as far as ranks are made of it.
_OF_A_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE")


class LaunchError(RuntimeError):
    """This process cannot be a rank of one run; `task` is its number among those that were started like it."""

    def __init__(self, message: str, task: int = 0) -> None:
        super().__init__(message)
        self.task = task


def take_rank(environment: MutableMapping[str, str], *, gpus: bool = True) -> None:
    """Make this process the rank that its launcher meant it to be.

    For a task of srun, sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR (the first host of the step's
    node list) and MASTER_PORT (from the job id); an address or port that is set already stands. Leaves everything as it
    is where another launcher has set RANK, and for a process that is alone. Raises `LaunchError` where the process
    would train by itself beside others, and with `gpus` where tasks and GPUs of a node do not go one to one.
    """
    if "RANK" in environment:
        if int(environment.get("WORLD_SIZE", "1")) < int(environment.get("SLURM_STEP_NUM_TASKS", "1")):
            raise LaunchError(
                f"srun started {environment['SLURM_STEP_NUM_TASKS']} tasks, but RANK and WORLD_SIZE "
                f"({environment.get('WORLD_SIZE', 'not set')}) were set before, so each would train alone: unset them "
                "before srun",
                int(environment.get("SLURM_PROCID", "0")),
            )
        return
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:  # first: mpirun may have them started by srun
        raise LaunchError(
            f"mpirun started {environment['OMPI_COMM_WORLD_SIZE']} processes, but RANK and WORLD_SIZE are not set, so "
            "each would train alone: start one process per node and let it run torchrun or deepspeed, or set RANK, "
            "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each",
            int(environment.get("OMPI_COMM_WORLD_RANK", "0")),
        )
    if tasks > 1:
        _take_task(environment, tasks, gpus=gpus)
    # In a step srun says how many tasks that has; an interactive shell of salloc is a step, too, and has the job's.
    for what, variable in (("tasks", "SLURM_NTASKS"), ("nodes", "SLURM_JOB_NUM_NODES")):
        alone = what == "nodes" and "SLURM_STEP_NUM_TASKS" in environment  # a single task of srun is meant to be one
        if tasks == 1 and not alone and int(environment.get(variable, "1")) > 1:
            raise LaunchError(
                f"this SLURM job has {environment[variable]} {what}, but the process was started without srun and "
                "would train alone: put srun before the command, as launch/slurm.sbatch does"
            )


def in_step(environment: MutableMapping[str, str]) -> bool:
    """Whether this process is one of several tasks of srun."""
    return int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _check_gpus(environment: MutableMapping[str, str]) -> None:
    """A task for each GPU of its node, all of which each task sees; raises `LaunchError`. Without GPUs nothing."""
    here, node = _tasks_here(environment), environment.get("SLURMD_NODENAME", "this node")
    task = int(environment["SLURM_PROCID"])
    gpus = environment.get("SLURM_GPUS_ON_NODE")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if gpus and int(gpus) != here:
        raise LaunchError(
            f"srun started {here} tasks on {node}, where the job has {gpus} GPUs; a rank is one task with one GPU: set "
            f"--ntasks-per-node={gpus}, or --gpus-per-node={here}",
            task,
        )
    if gpus and visible and len(visible.split(",")) < here:
        raise LaunchError(
            f"task {task} on {node} sees only CUDA_VISIBLE_DEVICES={visible} of the job's {gpus} GPUs there, but a "
            "rank's number is that of its GPU among all: use --gpus-per-node, not --gpus-per-task or --gpu-bind",
            task,
        )


def _take_task(environment: MutableMapping[str, str], tasks: int, *, gpus: bool) -> None:
    wanted = [*_OF_A_TASK]
    wanted += [] if "MASTER_PORT" in environment else ["SLURM_JOB_ID"]
    wanted += [] if "MASTER_ADDR" in environment else ["SLURM_STEP_NODELIST"]
    missing = [name for name in wanted if name not in environment]
    if missing:
        raise LaunchError(
            f"srun started {tasks} tasks, but {', '.join(missing)} did not reach this one (a container that drops "
            "variables?), so each would train alone: let all of SLURM_* in, or set RANK, LOCAL_RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT for each",
            int(environment.get("SLURM_PROCID", "0")),
        )
    if gpus:
        _check_gpus(environment)
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=str(tasks),
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(_tasks_here(environment)),
    )
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_host(environment)
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _NUM_PORTS))


def _tasks_here(environment: MutableMapping[str, str]) -> int:
    """Of `2(x3),1`, tasks per node, the number for this node."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"]):
        counts += [int(count)] * int(times or 1)
    return counts[int(environment["SLURM_NODEID"])]


def _first_host(environment: MutableMapping[str, str]) -> str:
    """Where task 0 is. SLURM_LAUNCH_NODE_IPADDR, tempting as it looks, is where srun was typed."""
    nodes = environment["SLURM_STEP_NODELIST"]
    if not re.search(r"[\[,]", nodes):
        return nodes
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise LaunchError(
            f"`scontrol show hostnames {nodes}` names no host ({error}); where there is no scontrol (a container), "
            "set MASTER_ADDR to the first host of the job before srun",
            int(environment["SLURM_PROCID"]),
        ) from error
