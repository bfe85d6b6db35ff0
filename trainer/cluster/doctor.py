"""`python -m trainer doctor`: check whether this machine, or every node of a job, is fit for training.

The command starts itself once on every node (under SLURM with srun). Each node prints a line of JSON for each finding
as soon as it is made, so that a node that hangs later, or is cut off from the others, is still heard. This process
collects the lines and prints the report.
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
from trainer.cluster.ranks import LaunchError, first_of_all, in_step, number, take_rank
from trainer.config.arguments import Parser, count, one_line
from trainer.config.reading import obstacle
from trainer.config.text import printable, quoted

# The findings of every node, and those that several nodes make together.
EACH = ("versions", "compiler", "cpu_adam", "async_io", "compiled", "accelerator", "disk", "network")
TOGETHER = ("shared folder", "clock", "all-reduce")
LAUNCH = "launch"  # reported only if it failed
EXIT_UNFIT = 1
_RENDEZVOUS_SECONDS = 25
# Within a job, in case a node hangs. From a login node there is no deadline, because srun may wait in the queue first.
_DEADLINE_SECONDS = 150


def main(argv: Sequence[str]) -> int:
    """Check, print the report, and return 0, 1 if something failed, or 2 for a request that cannot be followed."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.node:
        return _check_node(arguments.folder)
    if in_step(os.environ):
        if first_of_all(os.environ):
            print(
                "\nsrun: started several doctors, but one looks at all nodes of a job: leave srun out", file=sys.stderr
            )
        return 2
    unused = [name for name in ("nodes", "gpus", "partition", "account") if getattr(arguments, name) is not None]
    if "SLURM_JOB_ID" in os.environ and arguments.on_cluster:
        parser.error("argument --on-cluster: this is a job already, whose nodes are checked without it; leave it out")
    if unused and not arguments.on_cluster:
        value = getattr(arguments, unused[0])
        parser.error(f"argument --{unused[0]}: got {value}, which is for --on-cluster; leave it out")
    nodes = 1
    launcher: list[str] = []
    if "SLURM_JOB_ID" in os.environ or arguments.on_cluster:
        if shutil.which("srun") is None:
            print("\nsrun: no such command; --on-cluster is for a login node of a SLURM cluster", file=sys.stderr)
            return 2
        nodes, launcher = _srun(arguments)
    command = [*launcher, sys.executable, "-m", "trainer", "doctor", "--node", "--folder", str(arguments.folder)]
    findings = _collect(command, deadline=None if arguments.on_cluster else _DEADLINE_SECONDS)
    report, failures = _report(findings, nodes)
    print(printable("\n".join(report)))
    return EXIT_UNFIT if failures else 0


def _srun(arguments: argparse.Namespace) -> tuple[int, list[str]]:
    """Return (number of nodes, srun command with a task on each), for this process's job or for a job of its own."""
    if "SLURM_JOB_ID" in os.environ:
        nodes = number(os.environ, "SLURM_JOB_NUM_NODES") or 1
        own = ["--overlap"]  # a shell of the job may occupy its cores
    else:
        nodes = arguments.nodes or 2
        given = {"gpus-per-node": arguments.gpus, "partition": arguments.partition, "account": arguments.account}
        own = [f"--{name}={value}" for name, value in given.items() if value is not None]
        own += ["--time=5", "--job-name=doctor"]
    return nodes, ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0", *own]


def _collect(command: Sequence[str], *, deadline: float | None) -> dict[str, dict[str, Finding]]:
    """Run `command` for up to `deadline` seconds. Return the findings by host and name; print other lines to stderr."""
    findings: dict[str, dict[str, Finding]] = defaultdict(dict)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        process.terminate()  # srun ends its tasks
        output, _ = process.communicate()
    for line in output.splitlines():
        if (parsed := from_line(line)) is None:
            print(printable(line), file=sys.stderr)
        else:
            host, finding = parsed
            findings[host][finding.name] = finding
    return findings


def _report(findings: Mapping[str, Mapping[str, Finding]], nodes: int) -> tuple[list[str], int]:
    """Return (lines, number of failures). A line names its nodes if the nodes do not agree."""
    lines, failures = [f"{len(findings)} of {nodes} node{'s' if nodes > 1 else ''}: {', '.join(sorted(findings))}"], 0
    if len(findings) < nodes:
        failures += 1
        lines.append("FAIL  nodes          not all have answered")
        lines.append("      -> see the messages of srun and Python above: is Strata installed there?")
    failed_launches = [host for host in sorted(findings) if LAUNCH in findings[host]]
    for name in [*([LAUNCH] if failed_launches else ()), *EACH, *(TOGETHER if nodes > 1 else ())]:
        hosts: dict[Finding, list[str]] = defaultdict(list)
        for host in failed_launches if name == LAUNCH else sorted(findings):
            hosts[findings[host].get(name, _unanswered(name))].append(host)
        for finding, alike in hosts.items():
            named = f" ({', '.join(alike)})" if len(hosts) > 1 else ""
            lines.append(f"{finding.status:<5} {finding.name:<14} {finding.said}{named}")
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
        return Finding(name, "FAIL", "no answer", "connection lost: NCCL_DEBUG=INFO shows what NCCL does")
    return Finding(name, "FAIL", "no answer", "see the output above")


# --- On a node


def _check_node(folder: Path) -> int:
    """Print each finding of this node as soon as it is made, and return an exit code."""
    end = time.monotonic() + BUILD_SECONDS
    host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    try:
        take_rank(os.environ, gpus=False)
    except LaunchError as error:
        print(as_line(host, Finding(LAUNCH, "FAIL", str(error))), flush=True)
        return EXIT_UNFIT
    alone = number(os.environ, "WORLD_SIZE") in (None, 1)

    def report(finding: Finding) -> None:
        print(as_line(host, finding), flush=True)

    with builds() as running:
        for finding in (check_versions(), check_compiler(), check_locks(), check_disk(folder)):
            report(finding)
        report(check_network(alone=alone))
        report(check_accelerator())
        if not alone:
            _check_together(folder, report)
        for name, process in running.items():
            report(check_build(name, process, end))
    return 0


def _check_together(folder: Path, report: Callable[[Finding], None]) -> None:
    """Report what the nodes find out together, or that they cannot connect."""
    import torch
    from deepspeed.accelerator import get_accelerator
    from torch import distributed

    from trainer.cluster.together import check_bandwidth, check_clock, check_shared

    cuda = get_accelerator().device_name() == "cuda"
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=_RENDEZVOUS_SECONDS)
        )
        report(check_shared(folder))
        report(check_clock())
        report(check_bandwidth(torch.device("cuda", 0) if cuda else torch.device("cpu")))
        distributed.destroy_process_group()
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        lines = str(error).splitlines() or [type(error).__name__]
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        advice = f"let nodes connect to each other, in particular to {address}; GLOO_SOCKET_IFNAME and "
        report(Finding("all-reduce", "FAIL", lines[0], advice + "NCCL_SOCKET_IFNAME name the interface"))


def _folder(text: str) -> Path:
    path = os.path.expanduser(one_line(text))
    if reason := "no such home folder" if path.startswith("~") else obstacle(path):
        raise argparse.ArgumentTypeError(f"got {quoted(text)}: {reason}; name another")
    return Path(path)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m trainer doctor",
        description="Check whether this machine, or every node of a SLURM job, is fit for training: versions, "
        "compiler and DeepSpeed's operators, GPUs, disk, network, and between nodes a shared folder, clocks and "
        "an all-reduce. Advice follows each failure; the exit code is 1 if there is one. Takes less than a minute.",
        allow_abbrev=False,
    )
    parser.add_argument("--on-cluster", action="store_true", help="on a login node: submit a job that checks the nodes")
    parser.add_argument("--nodes", type=count, metavar="N", help="with --on-cluster: nodes (default 2)")
    parser.add_argument("--gpus", type=count, metavar="N", help="with --on-cluster: GPUs of each node")
    parser.add_argument("--partition", type=one_line, metavar="X", help="with --on-cluster: passed to sbatch")
    parser.add_argument("--account", type=one_line, metavar="X", help="with --on-cluster: passed to sbatch")
    parser.add_argument(
        "--folder", type=_folder, default=Path("runs"), help="where runs are stored, on all nodes (default runs)"
    )
    parser.add_argument("--node", action="store_true", help=argparse.SUPPRESS)
    return parser
