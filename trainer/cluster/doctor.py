"""`python -m trainer doctor`: whether this machine, or every node of a job, is fit for training, in under a minute.

The command starts itself once on every node (under SLURM by srun). Each node prints what it finds as it goes, a line of
JSON for each finding, so that one that is stuck, or cut off from the others, is heard all the same; this process puts
together what they say.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from trainer.cluster.node import (
    BUILD_SECONDS,
    Finding,
    as_line,
    builds,
    check_accelerator,
    check_build,
    check_compiler,
    check_disk,
    check_locks,
    check_network,
    check_versions,
    from_line,
)
from trainer.cluster.ranks import in_step, take_rank

# What every node says, and what several nodes find out together.
EACH = ("versions", "compiler", "cpu_adam", "async_io", "compiled", "accelerator", "disk", "network")
TOGETHER = ("shared folder", "clock", "all-reduce")
EXIT_UNFIT = 1
_RENDEZVOUS_SECONDS = 25
# Within a job, should a node hang all the same. From a login node srun may first wait in the queue.
_DEADLINE_SECONDS = 150


def main(argv: Sequence[str]) -> int:
    """Look, say what was found, and return 0; 1 where something fails; 2 for a request that cannot be followed."""
    arguments = _parser().parse_args(argv)
    if arguments.node:
        return _look(arguments.folder)
    if in_step(os.environ):
        if os.environ["SLURM_PROCID"] == "0":
            print(
                "\nsrun: started several doctors, but one looks at all nodes of a job: leave srun out", file=sys.stderr
            )
        return 2
    nodes, launcher = 1, []
    if "SLURM_JOB_ID" in os.environ or arguments.on_cluster:
        if shutil.which("srun") is None:
            print("\nsrun: no such command; --on-cluster is for a login node of a SLURM cluster", file=sys.stderr)
            return 2
        nodes, launcher = _srun(arguments)
    command = [*launcher, sys.executable, "-m", "trainer", "doctor", "--node", "--folder", str(arguments.folder)]
    found = _heard(command, deadline=None if arguments.on_cluster else _DEADLINE_SECONDS)
    report, failures = _report(found, nodes)
    print("\n".join(report))
    return EXIT_UNFIT if failures else 0


def _srun(arguments: argparse.Namespace) -> tuple[int, list[str]]:
    """(nodes, srun with a task on each): of the job that this process is in, or of a job of their own."""
    if "SLURM_JOB_ID" in os.environ:
        nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
        own = ["--overlap"]  # a shell of the job may hold its cores
    else:
        nodes = arguments.nodes
        given = {"gpus-per-node": arguments.gpus, "partition": arguments.partition, "account": arguments.account}
        own = [f"--{name}={value}" for name, value in given.items() if value is not None]
        own += ["--time=5", "--job-name=doctor"]
    return nodes, ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0", *own]


def _heard(command: Sequence[str], *, deadline: float | None) -> dict[str, dict[str, Finding]]:
    """What each host found, by the name of the finding; whatever else is printed goes to stderr."""
    found: dict[str, dict[str, Finding]] = defaultdict(dict)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        process.terminate()  # srun ends its tasks
        output, _ = process.communicate()
    for line in output.splitlines():
        if (said := from_line(line)) is None:
            print(line, file=sys.stderr)
        else:
            host, finding = said
            found[host][finding.name] = finding
    return found


def _report(found: Mapping[str, Mapping[str, Finding]], nodes: int) -> tuple[list[str], int]:
    """(lines, number of failures): each thing once, with the nodes that it was found on where not all agree."""
    lines, failures = [f"{len(found)} of {nodes} node{'s' if nodes > 1 else ''}: {', '.join(sorted(found))}"], 0
    if len(found) < nodes:
        failures += 1
        lines.append("FAIL  nodes          not all have answered")
        lines.append("      -> see what srun and Python say above: is Strata installed there?")
    for name in [*EACH, *(TOGETHER if nodes > 1 else ())]:
        hosts: dict[Finding, list[str]] = defaultdict(list)
        for host in sorted(found):
            hosts[found[host].get(name, _unanswered(name))].append(host)
        for finding, where in hosts.items():
            place = f" ({', '.join(where)})" if len(hosts) > 1 else ""
            lines.append(f"{finding.status:<5} {finding.name:<14} {finding.said}{place}")
            lines += [f"      -> {finding.advice}"] if finding.advice and finding.status != "ok" else []
            failures += finding.status == "FAIL"
        if name == "versions" and len(hosts) > 1:
            failures += 1
            lines.append("FAIL  versions       nodes differ")
            lines.append("      -> use one environment, in a folder that all nodes share")
    lines.append(f"{failures} failure{'s' if failures != 1 else ''}" if failures else "All fit.")
    return lines, failures


def _unanswered(name: str) -> Finding:
    if name in TOGETHER:
        return Finding(name, "FAIL", "no answer", "the nodes lost each other: NCCL_DEBUG=INFO shows what NCCL does")
    return Finding(name, "FAIL", "no answer", "see what was printed above")


# --- On a node


def _look(folder: Path) -> int:
    """All findings of this node, printed as they come."""
    end = time.monotonic() + BUILD_SECONDS
    host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    take_rank(os.environ, gpus=False)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1

    def say(finding: Finding) -> None:
        print(as_line(host, finding), flush=True)

    with builds() as running:
        for finding in (check_versions(), check_compiler(), check_locks(), check_disk(folder)):
            say(finding)
        say(check_network(alone=alone))
        say(check_accelerator())
        if not alone:
            _look_together(folder, say)
        for name, process in running.items():
            say(check_build(name, process, end))
    return 0


def _look_together(folder: Path, say: Callable[[Finding], None]) -> None:
    """What the nodes find out together, if they find each other."""
    import torch
    from deepspeed.accelerator import get_accelerator
    from torch import distributed

    from trainer.cluster.together import check_bandwidth, check_clock, check_shared

    cuda = get_accelerator().device_name() == "cuda"
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=_RENDEZVOUS_SECONDS)
        )
        say(check_shared(folder))
        say(check_clock())
        say(check_bandwidth(torch.device("cuda", 0) if cuda else torch.device("cpu")))
        distributed.destroy_process_group()
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        lines = str(error).splitlines() or [type(error).__name__]
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        advice = f"let nodes connect to each other, first of all to {address}; GLOO_SOCKET_IFNAME and "
        say(Finding("all-reduce", "FAIL", lines[0], advice + "NCCL_SOCKET_IFNAME name the interface"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer doctor",
        description="Looks whether this machine, or every node of a SLURM job, is fit for training: versions, "
        "compiler and DeepSpeed's operators, accelerator, disk, network, and between nodes a shared folder, clocks and "
        "an all-reduce. Says what to do about each failure; exits with 1 if there is one. Takes less than a minute.",
        allow_abbrev=False,
    )
    parser.add_argument("--on-cluster", action="store_true", help="from a login node, in a job of its own")
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="with --on-cluster: how many (default 2)")
    parser.add_argument("--gpus", type=int, metavar="N", help="with --on-cluster: GPUs of each node")
    parser.add_argument("--partition", metavar="X", help="with --on-cluster: as sbatch's")
    parser.add_argument("--account", metavar="X", help="with --on-cluster: as sbatch's")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs go, on all nodes (default runs)")
    parser.add_argument("--node", action="store_true", help=argparse.SUPPRESS)
    return parser
