"""The real launchers as subprocesses, each with a deadline, and small inputs for them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent.parent / "launch" / "train.py"
RECIPES = sorted((SCRIPT.parent / "recipes").glob("*.yaml"))
OF_LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS"}

# Six steps of LISA in three intervals. Eight samples to evaluate on in batches of three over two ranks: a short batch,
# and an empty one. The recipe holds relative paths, as a user's would.
RECIPE = """\
method: lisa
output: runs/tiny
model:
  random:
    model_type: llama
    hidden_size: 32
    intermediate_size: 64
    num_hidden_layers: 4
    num_attention_heads: 4
    num_key_value_heads: 2
    max_position_embeddings: 64
  tokenizer: bytes
  dtype: fp32
selector: {blocks: 2, interval: 2}
optimizer: {lr: 5.0e-3}
schedule: {name: linear, warmup_steps: 1}
train: {steps: 6, global_batch_size: 4, micro_batch_size: 1, guard_every: 1}
eval: {every: 4, micro_batch_size: 3}
data: {train: train.jsonl, eval_fraction: 0.2, max_length: 48}
"""


@dataclass(frozen=True)
class Finished:
    """What a launcher left: its exit code, and what it and all ranks printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def everything(self) -> str:
        return self.stdout + self.stderr


def write_inputs(folder: Path) -> None:
    """`tiny.yaml` and 40 rows of `train.jsonl`, of different lengths."""
    rows = [{"question": f"{i} plus {i % 7}?" + "?" * (i % 5), "answer": str(i + i % 7)} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(RECIPE)


def deepspeed(*arguments: str, ranks: int = 2) -> list[str]:
    """The command of DeepSpeed's launcher, on a free port."""
    return [
        "deepspeed",
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        str(SCRIPT),
        *arguments,
    ]


def torchrun(*arguments: str, ranks: int = 2) -> list[str]:
    return [
        "torchrun",
        "--nproc_per_node",
        str(ranks),
        "--master_port",
        str(free_port()),
        str(SCRIPT),
        *arguments,
    ]


def environment() -> dict[str, str]:
    """A user's: the CPU, no network, commands from beside this Python, and nothing of an outer launcher."""
    inherited = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    # First, as in tests/distributed.py: DeepSpeed's operators are compiled anew whenever another `ninja` is found.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return inherited | {"PATH": path, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def start(command: list[str], folder: Path, **options: Any) -> subprocess.Popen[str]:
    """Start `command` in `folder`, in a process group of its own."""
    options = {"env": environment(), **options}
    return subprocess.Popen(command, cwd=folder, text=True, start_new_session=True, **options)


def launch(
    command: list[str],
    folder: Path,
    *,
    deadline: float = 180,
    variables: dict[str, str] | None = None,
) -> Finished:
    """Run `command` in `folder` to its end; a hang is ended with all its processes and raises `AssertionError`.

    `variables` is its environment, instead of a user's own.
    """
    variables = environment() if variables is None else variables
    process = start(command, folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables)
    try:
        stdout, stderr = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"{command} was not done after {deadline} s\n{stdout}\n{stderr}") from None
    return Finished(process.returncode, stdout, stderr)


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, read as strictly as JSON is defined."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"metrics.jsonl is no JSON: {constant}")

    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def rank_process(launcher: int, rank: int) -> int:
    """The process id of a local rank of DeepSpeed's launcher, found in /proc."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and f"--local_rank={rank}" in _command_line(entry):
            ancestors = {_parent(int(entry.name)), _parent(_parent(int(entry.name)))}
            if launcher in ancestors:
                return int(entry.name)
    raise AssertionError(f"launcher {launcher} has no rank {rank}")


def _command_line(entry: Path) -> list[str]:
    try:
        return (entry / "cmdline").read_text().split("\0")
    except OSError:  # it has just ended
        return []


def _parent(pid: int) -> int:
    match = re.search(r"^PPid:\s+(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
