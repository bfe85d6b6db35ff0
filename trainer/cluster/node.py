"""Check one node for training: a function for each finding."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from trainer.cluster.ranks import number

# Packages whose versions decide numbers, or which files can be read.
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "safetensors")
BUILD_SECONDS = 45
_STALE_LOCK_SECONDS = 600
# `is_compatible` is called first, because `load` compiles other code of async_io before it looks for libaio.
_BUILD = """
import sys
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
builder = {"cpu_adam": CPUAdamBuilder, "async_io": AsyncIOBuilder}[sys.argv[1]]()
if not builder.is_compatible(verbose=True):
    sys.exit(1)
builder.load()
"""
_LITTLE_DISK, _LITTLE_SHARED_MEMORY = 10 * 2**30, 2**30


@dataclass(frozen=True)
class Finding:
    """One result of the doctor. `advice` says what to do about a note or a failure."""

    name: str
    status: Literal["ok", "note", "FAIL"]
    said: str
    advice: str = ""


def versions() -> dict[str, str]:
    """Return the versions of Strata, Python and `PACKAGES`, by name; "missing" if a package is not installed."""
    from trainer import __version__

    by_name = {"strata": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            by_name[name] = version(name)
        except PackageNotFoundError:
            by_name[name] = "missing"
    return by_name


def check_versions() -> Finding:
    by_name = versions()
    said = ", ".join(f"{name} {number}" for name, number in by_name.items())
    if "missing" in by_name.values():
        return Finding("versions", "FAIL", said, "install Strata with its dependencies: pip install strata-trainer")
    return Finding("versions", "ok", said)


def check_compiler() -> Finding:
    """Check for a compiler and ninja, with which DeepSpeed compiles CPU Adam and its communication on CPUs."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    # Also look beside this Python: DeepSpeed's pip package installs ninja there.
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if compiler is None:
        return Finding("compiler", "FAIL", "no g++", "install g++, or load it (`module load gcc`) before the job")
    if ninja is None:
        return Finding("compiler", "FAIL", "no ninja", "pip install ninja")
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
    return Finding("compiler", "ok", said[0] if said else compiler)


def check_locks() -> Finding:
    """Check for locks that killed compilers left: every later process would wait for them silently."""
    cache = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(cache) / "torch_extensions"))
    now = time.time()
    stale = [str(lock) for lock in folder.glob("**/lock") if now - lock.stat().st_mtime > _STALE_LOCK_SECONDS]
    if stale:
        advice = f"no process compiles there, but every run waits for the lock: rm {' '.join(stale)}"
        return Finding("compiled", "FAIL", f"{len(stale)} lock(s) of a killed compiler in {folder}", advice)
    return Finding("compiled", "ok", f"no lock in {folder}")


def check_accelerator() -> Finding:
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    name, expected = accelerator.device_name(), number(os.environ, "SLURM_GPUS_ON_NODE") or 0
    if name == "cpu":
        said = f"none: the CPU, {os.cpu_count()} cores; torch for CUDA {torch.version.cuda or 'none'}"
        if expected and os.environ.get("DS_ACCELERATOR") != "cpu":
            advice = "torch cannot see them: install a torch for CUDA that the driver (nvidia-smi) can run"
            return Finding("accelerator", "FAIL", f"{said}; but the job has {expected} GPUs here", advice)
        return Finding("accelerator", "ok", said)
    count = accelerator.device_count()
    said = f"{count} x {name}"
    if name == "cuda":
        device = torch.cuda.get_device_properties(0)
        said = f"{count} x {device.name}, {device.total_memory / 2**30:.0f} GiB; torch for CUDA {torch.version.cuda}"
    if expected and count != expected:
        advice = "look at CUDA_VISIBLE_DEVICES and nvidia-smi on that node"
        return Finding("accelerator", "FAIL", f"{said}; but the job has {expected} GPUs here", advice)
    return Finding("accelerator", "ok", said)


def check_disk(folder: Path) -> Finding:
    """Check the free space in the folder of runs, in that for temporary files, and in shared memory."""
    folder = folder.expanduser().absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        said = f"{existing} cannot be written: {error.strerror or error}"
        return Finding("disk", "FAIL", said, "--folder (a run's output) must be a folder that you may write to")
    temporary, shared = Path(tempfile.gettempdir()), Path("/dev/shm")
    free = {path: shutil.disk_usage(path).free for path in (existing, temporary, shared) if path.exists()}
    said = ", ".join(f"{path} {size / 2**30:.0f} GiB free" for path, size in free.items())
    if free[existing] < _LITTLE_DISK:
        advice = (
            "a checkpoint needs 12 bytes for each trained parameter, and a bf16 model 2 for each parameter: make room, "
            "or use another folder"
        )
        return Finding("disk", "FAIL", said, advice)
    if free.get(shared, _LITTLE_SHARED_MEMORY) < _LITTLE_SHARED_MEMORY:
        return Finding("disk", "note", said, "NCCL needs some shared memory; with containers: --shm-size=8g")
    return Finding("disk", "ok", said)


def check_network(*, alone: bool) -> Finding:
    """Check the interface whose address other nodes use for this one, unless the node is `alone`."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        status: Literal["ok", "FAIL"] = "ok" if alone else "FAIL"
        advice = "put the node's name into DNS or /etc/hosts"
        return Finding("network", status, f"{host} has no address: {error}", advice)
    up = psutil.net_if_stats()
    named = {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries}
    interface = named.get(address, "no interface")
    said = f"{interface} ({address})"
    if interface in up and up[interface].speed:
        said += f", {up[interface].speed / 1000:g} Gbit/s"
    fabric = sorted(entry.name for entry in Path("/sys/class/infiniband").glob("*"))
    if fabric:
        said += f"; InfiniBand or RoCE: {', '.join(fabric)}"
    if not alone and address.startswith("127."):
        others = ", ".join(name for name, state in up.items() if state.isup and name != "lo")
        advice = f"set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to one of: {others}; or correct /etc/hosts"
        return Finding("network", "FAIL", f"{host} is {address}, which other nodes cannot reach", advice)
    return Finding("network", "ok", said)


@contextmanager
def builds(operators: tuple[str, ...] = ("cpu_adam", "async_io")) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Build DeepSpeed's operators in the background, by name, and kill unfinished builds on exit.

    They are built in a temporary folder, because a build that is killed leaves a lock in its folder.
    """
    running: dict[str, subprocess.Popen[str]] = {}
    with tempfile.TemporaryDirectory(prefix="strata-doctor-", ignore_cleanup_errors=True) as folder:
        for name in operators:
            running[name] = subprocess.Popen(
                [sys.executable, "-c", _BUILD, name],
                env=os.environ | {"TORCH_EXTENSIONS_DIR": str(Path(folder) / name)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        try:
            yield running
        finally:
            for process in running.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                if process.stdout is not None:
                    process.stdout.close()


def check_build(name: str, process: subprocess.Popen[str], end: float) -> Finding:
    """Return the result of the build of an operator, for which it waits until `end` (in `time.monotonic()`)."""
    try:
        output, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        said = f"still compiling after {BUILD_SECONDS} s, without an error so far"
        return Finding(name, "note", said, "try again when the node is idle")
    if process.returncode == 0:
        return Finding(name, "ok", "compiled")
    said = _real_error(output)
    if name == "async_io":  # only one kind of offload needs it
        advice = "NVMe offload needs it: install libaio's headers (libaio-dev, libaio-devel). All else works without it"
        return Finding(name, "note", said, advice)
    advice = "CPU offload needs it: install the compiler that it names (a CUDA toolkit must have torch's CUDA version)"
    return Finding(name, "FAIL", said, advice)


def _real_error(output: str) -> str:
    """Return up to three errors of the compiler, or else the last line, such as the exception of Python."""
    plain = re.sub(r"\x1b\[\d*m|\[WARNING\]", "", output)
    lines = [line.strip() for line in plain.splitlines() if line.strip()] or ["it ended without a message"]
    errors = [line for line in lines if re.search(r"\berror: |^\w+ requires ", line)]
    return "; ".join(errors[:3] or lines[-1:])[:600]


def as_line(host: str, finding: Finding) -> str:
    """Return a finding as one line, which `from_line` reads."""
    return json.dumps({"strata_doctor": host, **finding.__dict__})


def from_line(line: str) -> tuple[str, Finding] | None:
    """Return (host, finding) of a line that `as_line` made, None for any other line."""
    try:
        values = json.loads(line)
        return values.pop("strata_doctor"), Finding(**values)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
