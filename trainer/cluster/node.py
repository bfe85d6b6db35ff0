"""What there is on one node, and whether it will do for training: one function for each thing looked at."""

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

# Those whose versions decide numbers, or what can be read.
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "safetensors")
BUILD_SECONDS = 45
_STALE_LOCK_SECONDS = 600
# What is missing is asked first: DeepSpeed compiles what async_io stands on before it looks for libaio.
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
    """What was found in one respect. `advice` says what to do about a note or a failure."""

    name: str
    status: Literal["ok", "note", "FAIL"]
    said: str
    advice: str = ""


def versions() -> dict[str, str]:
    """Of Strata, Python and what it stands on."""
    from trainer import __version__

    found = {"strata": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def check_versions() -> Finding:
    found = versions()
    said = ", ".join(f"{name} {number}" for name, number in found.items())
    if "missing" in found.values():
        return Finding("versions", "FAIL", said, "install Strata with all it needs: pip install strata-trainer")
    return Finding("versions", "ok", said)


def check_compiler() -> Finding:
    """DeepSpeed compiles what it needs on the spot: CPU Adam for offload, its communication on CPUs."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    # Beside this Python too: DeepSpeed's pip package brings its own.
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if compiler is None:
        return Finding("compiler", "FAIL", "no g++", "install g++, or load it (`module load gcc`) before the job")
    if ninja is None:
        return Finding("compiler", "FAIL", "no ninja", "pip install ninja")
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
    return Finding("compiler", "ok", said[0] if said else compiler)


def check_locks() -> Finding:
    """A compiler that was killed leaves a lock, for which everybody after it waits without a word."""
    cache = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(cache) / "torch_extensions"))
    now = time.time()
    stale = [str(lock) for lock in folder.glob("**/lock") if now - lock.stat().st_mtime > _STALE_LOCK_SECONDS]
    if stale:
        advice = f"nobody compiles there any more, but every run waits for it: rm {' '.join(stale)}"
        return Finding("compiled", "FAIL", f"{len(stale)} lock(s) of a killed compiler in {folder}", advice)
    return Finding("compiled", "ok", f"no lock in {folder}")


def check_accelerator() -> Finding:
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    name, expected = accelerator.device_name(), int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
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
    """Free space where checkpoints go, where compilers and libraries write, and in the memory that processes share."""
    folder = folder.expanduser().absolute()
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        said = f"{existing} cannot be written: {error.strerror or error}"
        return Finding("disk", "FAIL", said, "--folder (a run's output) must be a folder that you may write to")
    temporary, shared = Path(tempfile.gettempdir()), Path("/dev/shm")
    free = {place: shutil.disk_usage(place).free for place in (existing, temporary, shared) if place.exists()}
    said = ", ".join(f"{place} {size / 2**30:.0f} GiB free" for place, size in free.items())
    if free[existing] < _LITTLE_DISK:
        advice = "a checkpoint holds 16 bytes for each trained parameter, a model 2: make room, or use another folder"
        return Finding("disk", "FAIL", said, advice)
    if free.get(shared, _LITTLE_SHARED_MEMORY) < _LITTLE_SHARED_MEMORY:
        return Finding("disk", "note", said, "NCCL needs some shared memory; with containers: --shm-size=8g")
    return Finding("disk", "ok", said)


def check_network(*, alone: bool) -> Finding:
    """The interface by whose address other nodes find this one."""
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
        advice = f"export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, to one of: {others}; or correct /etc/hosts"
        return Finding("network", "FAIL", f"{host} is {address}, which other nodes cannot reach", advice)
    return Finding("network", "ok", said)


@contextmanager
def builds(operators: tuple[str, ...] = ("cpu_adam", "async_io")) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Builds of DeepSpeed's operators that run beside what happens inside, in a place of their own.

    Not where the user's are: one that is stopped leaves a lock there.
    """
    running: dict[str, subprocess.Popen[str]] = {}
    with tempfile.TemporaryDirectory(prefix="strata-doctor-", ignore_cleanup_errors=True) as place:
        for name in operators:
            running[name] = subprocess.Popen(
                [sys.executable, "-c", _BUILD, name],
                env=os.environ | {"TORCH_EXTENSIONS_DIR": str(Path(place) / name)},
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
    """How the build of an operator came out by `end` (of time.monotonic)."""
    try:
        output, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        said = f"still being compiled after {BUILD_SECONDS} s, without an error so far"
        return Finding(name, "note", said, "try again when the node is idle")
    if process.returncode == 0:
        return Finding(name, "ok", "compiled")
    said = _real_error(output)
    if name == "async_io":  # for one kind of offload only
        advice = "NVMe offload needs it: install libaio's headers (libaio-dev, libaio-devel). Without it all else works"
        return Finding(name, "note", said, advice)
    advice = "CPU offload needs it: give it the compiler it wants (a CUDA toolkit must be of the version of torch's)"
    return Finding(name, "FAIL", said, advice)


def _real_error(output: str) -> str:
    """The compiler's complaint if there is one, else what was raised; at most three lines."""
    plain = re.sub(r"\x1b\[\d*m|\[WARNING\]", "", output)
    lines = [line.strip() for line in plain.splitlines() if line.strip()] or ["it ended without a word"]
    complaints = [line for line in lines if re.search(r"\berror: |^\w+ requires ", line)]
    return "; ".join(complaints[:3] or lines[-1:])[:600]


def as_line(host: str, finding: Finding) -> str:
    """One line that `from_line` reads."""
    return json.dumps({"strata_doctor": host, **finding.__dict__})


def from_line(line: str) -> tuple[str, Finding] | None:
    """(host, finding) of a line that `as_line` made, None for any other."""
    try:
        values = json.loads(line)
        return values.pop("strata_doctor"), Finding(**values)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
