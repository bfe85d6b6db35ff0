"""Check what nodes must have in common, all nodes together: for the doctor and at the start of a run."""

from __future__ import annotations

import socket
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from trainer.cluster.node import Finding, versions
from trainer.config import ConfigError

# How long a file that another node has just written may stay unseen (NFS caches for a while that it does not exist).
_SEEN_SECONDS = 10.0
_CLOCK_SECONDS = 5.0
_BYTES, _ROUNDS = 64 * 2**20, 3


def check_nodes(output: Path) -> None:
    """Raise `ConfigError` unless all nodes have the same versions and can read and write the parent of `output`.

    Collective; every rank raises the same error. On one node nothing is checked.
    """
    by_rank = _gathered((socket.gethostname(), versions()))
    if len({host for host, _ in by_rank}) == 1:
        return
    problems = [f"nodes: {line}" for line in differences(dict(by_rank))]
    problems += [f"output: {line}" for line in unshared(output.expanduser().parent)]
    if problems:
        raise ConfigError(problems)


def differences(by_host: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a line for each package with several versions: `torch is 2.12.0 on node2, 2.13.0 on node1 node3; ...`."""
    lines = []
    for name in next(iter(by_host.values())):
        by_version: dict[str, list[str]] = defaultdict(list)
        for host, numbers in sorted(by_host.items()):
            by_version[numbers[name]].append(host)
        if len(by_version) > 1:
            named = ", ".join(f"{number} on {' '.join(hosts)}" for number, hosts in sorted(by_version.items()))
            lines.append(f"{name} is {named}; allowed: one version. Use one environment, in a folder that nodes share")
    return lines


def unshared(folder: Path) -> list[str]:
    """Return why `folder` is not one folder that every rank can write to, a line for each reason. Collective."""
    token = _gathered(uuid.uuid4().hex)[0]
    host, rank = socket.gethostname(), distributed.get_rank()
    ours = folder / f".strata-{token}-{rank}"
    failure = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours.touch(exist_ok=False)
    except OSError as error:
        failure = f"cannot be written on {host}: {error.strerror or error}"
    failures = _gathered(failure)
    written = [other for other, problem in enumerate(failures) if problem is None]
    unseen = _unseen(folder, token, written) if failure is None else []
    hosts = _gathered((host, unseen))
    with suppress(OSError):
        ours.unlink(missing_ok=True)
    problems = [f"{folder} {problem}" for problem in dict.fromkeys(filter(None, failures))]
    blind = {f"{name} does not see what {hosts[other][0]} writes" for name, missing in hosts for other in missing}
    if blind:
        problems.append(f"{folder} is not one folder: {'; '.join(sorted(blind)[:4])}")
    return [f"{line}. Set a folder on a file system that all nodes share and may write to" for line in problems]


def _unseen(folder: Path, token: str, ranks: list[int]) -> list[int]:
    """Return those of `ranks` whose files do not appear in `folder` within `_SEEN_SECONDS`."""
    end = time.monotonic() + _SEEN_SECONDS
    while True:
        names = {entry.name for entry in folder.glob(f".strata-{token}-*")}
        missing = [rank for rank in ranks if f".strata-{token}-{rank}" not in names]
        if not missing or time.monotonic() > end:
            return missing
        time.sleep(0.2)


def check_shared(folder: Path) -> Finding:
    """Return whether all nodes share `folder`. Collective."""
    problems = unshared(folder)
    if problems:
        return Finding("shared folder", "FAIL", "; ".join(problems), "choose another one with --folder")
    return Finding("shared folder", "ok", f"{folder.absolute()}: all nodes see it and can write to it")


def check_clock() -> Finding:
    """Compare this node's clock with the median of all, to some milliseconds. Collective."""
    distributed.barrier()
    now = time.time()
    times = sorted(_gathered(now))
    ahead = now - times[len(times) // 2]
    if abs(ahead) > _CLOCK_SECONDS:
        return Finding("clock", "FAIL", f"{ahead:+.1f} s from the others'", "synchronise its clock (NTP, chrony)")
    return Finding("clock", "ok", f"within {_CLOCK_SECONDS:g} s of the others'")


def check_bandwidth(device: torch.device) -> Finding:
    """Measure bytes per second over a rank's link in an all-reduce of 64 MiB (2 (n - 1) / n of them each way)."""
    ranks = distributed.get_world_size()
    values = torch.ones(_BYTES // 4, device=device)
    distributed.all_reduce(values)
    seconds = []
    for _ in range(_ROUNDS):
        distributed.barrier()
        started = time.monotonic()
        distributed.all_reduce(values)
        float(values[0])  # waits for the device
        seconds.append(time.monotonic() - started)
    rate = 2 * (ranks - 1) / ranks * _BYTES / min(seconds) / 1e9
    backend = "nccl" if device.type == "cuda" else "gloo"
    measured = f"{rate:.2f} GB/s at each of {ranks} nodes ({backend}, 64 MiB)"
    if device.type == "cuda" and rate < 1:
        advice = "slow: does NCCL use the fast network? See NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME and NCCL_IB_HCA"
        return Finding("all-reduce", "note", measured, advice)
    return Finding("all-reduce", "ok", measured)


def _gathered(value: Any) -> list[Any]:
    """Return the value of every rank, by rank. Collective."""
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, value)
    return everyone
