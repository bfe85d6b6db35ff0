"""Take ranks from SLURM: translate srun's variables of a task to those that torch and DeepSpeed read."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, MutableMapping

from trainer.config.text import quoted, whole_number
from trainer.errors import StrataError

# Below the ports that Linux gives to outgoing connections (from 32768 on).
_FIRST_PORT, _NUM_PORTS = 10000, 20000
# The variables of a task of srun that determine its rank.
_OF_A_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE")
# The variables that are read as numbers here, by torch or by DeepSpeed.
_NUMBERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_JOB_NUM_NODES"),
    *("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)


class LaunchError(StrataError, RuntimeError):
    """Refuse a process that cannot be a rank of one run. `task` is its number among the processes of its launcher."""

    def __init__(self, message: str, task: int = 0) -> None:
        super().__init__(message)
        self.task = task


def take_rank(environment: MutableMapping[str, str], *, gpus: bool = True, dry_run: bool = False) -> str | None:
    """Make this process the rank that its launcher started it as.

    For a task of srun, sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR (the first host of the step's
    node list) and MASTER_PORT (from the job id); an address or port that is already set is kept. Changes nothing if
    another launcher has set RANK, or if the process is alone. Raises `LaunchError` if each of several processes would
    train alone, and with `gpus` also if a node does not have one task for each GPU.

    A dry run trains nothing, so it is allowed in the shell of a job of several tasks. The result is then advice on how
    to train there, else None.
    """
    _check_numbers(environment)
    if "RANK" in environment:
        if _count(environment, "WORLD_SIZE") < _count(environment, "SLURM_STEP_NUM_TASKS"):
            raise LaunchError(
                f"srun started {environment['SLURM_STEP_NUM_TASKS']} tasks, but RANK and WORLD_SIZE "
                f"({environment.get('WORLD_SIZE', 'not set')}) were set before, so each would train alone: unset them "
                "before srun",
                number(environment, "SLURM_PROCID") or 0,
            )
        if int(environment["RANK"]) >= _count(environment, "WORLD_SIZE"):
            raise LaunchError(
                f"RANK is {environment['RANK']}, but WORLD_SIZE is {environment.get('WORLD_SIZE', 'not set')}; allowed "
                "are ranks from 0 to WORLD_SIZE - 1. Unset both for a process that trains alone"
            )
        return None
    tasks = _count(environment, "SLURM_STEP_NUM_TASKS")
    if _count(environment, "OMPI_COMM_WORLD_SIZE") > 1:  # checked first: mpirun may start its processes with srun
        raise LaunchError(
            f"mpirun started {environment['OMPI_COMM_WORLD_SIZE']} processes, but RANK and WORLD_SIZE are not set, so "
            "each would train alone: start one process per node and let it run torchrun or deepspeed, or set RANK, "
            "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each",
            number(environment, "OMPI_COMM_WORLD_RANK") or 0,
        )
    if tasks > 1:
        _take_task(environment, tasks, gpus=gpus)
    # In an interactive shell of salloc, which is a step of one task, SLURM_NTASKS still has the job's number of tasks.
    for what, variable in (("tasks", "SLURM_NTASKS"), ("nodes", "SLURM_JOB_NUM_NODES")):
        alone = what == "nodes" and "SLURM_STEP_NUM_TASKS" in environment  # one task of srun, started so on purpose
        if tasks == 1 and not alone and _count(environment, variable) > 1:
            advice = "put srun before the command, as launch/slurm.sbatch does"
            if dry_run:
                return f"{advice}: this SLURM job has {environment[variable]} {what}"
            raise LaunchError(
                f"this SLURM job has {environment[variable]} {what}, but the process was started without srun and "
                f"would train alone: {advice}"
            )
    return None


def in_step(environment: Mapping[str, str]) -> bool:
    """Return whether this process is one of several tasks of srun."""
    return (number(environment, "SLURM_STEP_NUM_TASKS") or 1) > 1


def first_of_all(environment: Mapping[str, str]) -> bool:
    """Return whether this process is rank 0 according to its launcher, or alone."""
    return not (number(environment, "RANK" if "RANK" in environment else "SLURM_PROCID") or 0)


def cores_of_process(environment: Mapping[str, str]) -> int:
    """Return how many cores this process may use: its share, if it is one of several ranks on the machine."""
    # torchrun sets LOCAL_WORLD_SIZE (and `take_rank` for srun), DeepSpeed's launcher LOCAL_SIZE.
    processes = number(environment, "LOCAL_WORLD_SIZE") or number(environment, "LOCAL_SIZE") or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if in_step(environment) and cores < (number(environment, "SLURM_CPUS_ON_NODE") or 1):
        processes = 1  # srun has bound each task to its own cores
    return max(1, cores // processes)


def number(environment: Mapping[str, str], name: str) -> int | None:
    """Return the number in a launcher's variable; None if it is not set, or is not a whole number."""
    return whole_number(environment.get(name))


def _count(environment: Mapping[str, str], name: str) -> int:
    """Return the number of processes, tasks or nodes in a variable, at least 1; 1 if it is not set."""
    return max(1, number(environment, name) or 1)


def _check_numbers(environment: Mapping[str, str]) -> None:
    """Raise `LaunchError` if a launcher's variable is not the number that it should be."""
    for name in _NUMBERS:
        if name in environment and number(environment, name) is None:
            raise LaunchError(f"{name}: got {quoted(environment[name])}; allowed: integer >= 0, as launchers set it")
    if environment.get("WORLD_SIZE") == "0":
        raise LaunchError("WORLD_SIZE: got '0'; allowed: integer >= 1, as launchers set it")


def _check_gpus(environment: MutableMapping[str, str]) -> None:
    """Raise `LaunchError` if the node has not one task for each GPU, or a task does not see all GPUs."""
    here, node = _tasks_here(environment), environment.get("SLURMD_NODENAME", "this node")
    task = int(environment["SLURM_PROCID"])
    gpus = number(environment, "SLURM_GPUS_ON_NODE")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if gpus and gpus != here:
        raise LaunchError(
            f"srun started {here} tasks on {node}, where the job has {gpus} GPUs; a rank is one task with one GPU: set "
            f"--ntasks-per-node={gpus}, or --gpus-per-node={here}",
            task,
        )
    if gpus and visible and len(visible.split(",")) < here:
        raise LaunchError(
            f"task {task} on {node} sees only CUDA_VISIBLE_DEVICES={visible} of the job's {gpus} GPUs there, but a "
            "rank finds its GPU by its number among all: use --gpus-per-node, not --gpus-per-task or --gpu-bind",
            task,
        )


def _take_task(environment: MutableMapping[str, str], tasks: int, *, gpus: bool) -> None:
    required = [*_OF_A_TASK]
    required += [] if "MASTER_PORT" in environment else ["SLURM_JOB_ID"]
    required += [] if "MASTER_ADDR" in environment else ["SLURM_STEP_NODELIST"]
    missing = [name for name in required if name not in environment]
    if missing:
        raise LaunchError(
            f"srun started {tasks} tasks, but {', '.join(missing)} did not reach this one (a container that drops "
            "variables?), so each would train alone: pass all of SLURM_* to it, or set RANK, LOCAL_RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT for each",
            number(environment, "SLURM_PROCID") or 0,
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
    """Return the number of tasks on this node, from the tasks per node in a notation such as `2(x3),1`."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"]):
        counts += [int(count)] * int(times or 1)
    node = int(environment["SLURM_NODEID"])
    if node >= len(counts):
        raise LaunchError(
            f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE names fewer nodes "
            f"({quoted(environment['SLURM_STEP_TASKS_PER_NODE'])}): pass SLURM_* to the tasks as srun sets them",
            int(environment["SLURM_PROCID"]),
        )
    return counts[node]


def _first_host(environment: MutableMapping[str, str]) -> str:
    """Return the host of task 0. (SLURM_LAUNCH_NODE_IPADDR is not it, but the host on which srun was called.)"""
    nodes = environment["SLURM_STEP_NODELIST"]
    if not re.search(r"[\[,]", nodes):
        return nodes
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise LaunchError(
            f"`scontrol show hostnames {nodes}` names no host ({error}); if there is no scontrol (in a container), "
            "set MASTER_ADDR to the first host of the job before srun",
            int(environment["SLURM_PROCID"]),
        ) from error
