"""Damage files of a run folder, its base, its cache and its delta, one in each case, and use them.

    python -m tests.mutations --cases 300 --seed 0

A case must end with the model that undamaged files make, or with a sentence and exit code 2. Another model, a traceback
or a case that does not end is a failure. Cases run in forks of this process, which has imported everything once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

STEPS, STOP = 6, 4  # a run of so many steps, and one that was killed after the checkpoint of an earlier one
DEADLINE_SECONDS = 120  # of a case: eight times what a resume takes on a busy machine
RUN, BASE, CACHE, DELTA = "runs/run", "base", "cache", "delta"
COMMANDS = {
    RUN: ("export", "export", "delta", "resume", "checkpoints"),
    BASE: ("export", "apply", "resume"),
    CACHE: ("resume", "prepare"),
    DELTA: ("apply",),
}
RECIPE = """\
method: lisa
output: runs/run
model: {path: base, dtype: fp32}
selector: {blocks: 1, interval: 2}
optimizer: {lr: 5.0e-3}
bank: {name: cpu}
always_on: {embeddings: false, head: false, norm: true}
train: {steps: 6, global_batch_size: 4, micro_batch_size: 4}
eval: {every: 3, micro_batch_size: 4}
checkpoint: {every: 2, keep: 9}
data: {train: train.jsonl, eval_fraction: 0.2, max_length: 48, cache: cache}
"""


@dataclass(frozen=True)
class Case:
    """A file, what is done to it, and the command that then uses it. `seed` decides where in the file."""

    workspace: str
    file: str
    damage: str
    command: str
    seed: int

    def __str__(self) -> str:
        return f"{self.damage} {self.workspace}/{self.file}, then {self.command} (seed {self.seed})"


# --- damage ----------------------------------------------------------------------------------------------------


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def flip_at_the_start(path: Path, draw: random.Random) -> None:
    """Where headers are."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(min(len(data), 200))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def empty(path: Path, draw: random.Random) -> None:
    os.truncate(path, 0)


def zero(path: Path, draw: random.Random) -> None:
    """As after a power cut: the size is right, the last part is not on the disk."""
    data = path.read_bytes()
    kept = draw.randrange(len(data))
    path.write_bytes(data[:kept] + bytes(len(data) - kept))


def append(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 50)))


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def swap(path: Path, draw: random.Random) -> None:
    """With another file of its kind."""
    others = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path and p.suffix == path.suffix)
    if not others:
        return empty(path, draw)
    other = draw.choice(others)
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)
    return None


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    damage.__name__: damage for damage in (flip, flip, flip_at_the_start, cut, empty, zero, append, remove, swap)
}


def edit(**fields: object) -> Callable[[Path, random.Random], None]:
    """Other values in a JSON file, as somebody would set them who tries something out."""

    def change(path: Path, draw: random.Random) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


# With these a base is another one, whatever else happens: they must be refused.
EDITS: dict[str, tuple[str, Callable[[Path, random.Random], None]]] = {
    "rope_theta": ("config.json", edit(rope_parameters={"rope_theta": 500.0, "rope_type": "default"})),
    "rms_norm_eps": ("config.json", edit(rms_norm_eps=0.1)),
    "temperature": ("generation_config.json", edit(temperature=0.5)),
    "special tokens": ("tokenizer_config.json", edit(eos_token="<|pad|>")),
}


# --- commands --------------------------------------------------------------------------------------------------


def strata(*argv: str) -> int:
    """A command of Strata in this process; for `train` its only rank."""
    from trainer.cli.main import main

    return main(argv)


def use(command: str) -> tuple[int, Path | None]:
    """The exit code, and the folder of the model that was written."""
    if command == "resume":
        return strata("train", "recipe.yaml"), Path(RUN, "model")
    if command == "apply":
        return strata("apply", BASE, DELTA, "out"), Path("out")
    if command == "export":
        return strata("export", RUN, "out", "--base", BASE), Path("out")
    if command == "delta":
        code = strata("export", RUN, "made", "--delta", "--base", BASE)
        return (code or strata("apply", BASE, "made", "out")), Path("out")
    if command == "prepare":
        return strata("prepare", "recipe.yaml"), None
    return strata("checkpoints", RUN), None


def another(found: Path, expected: Path) -> str | None:
    """What makes one model folder another model than the other, if anything does."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer.checkpoint.identity import differences, identity_of

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (found, expected))
    if ours.keys() != theirs.keys():
        return "names of weights"
    for name, weights in theirs.items():
        if ours[name].dtype != weights.dtype or not torch.equal(ours[name], weights):
            return f"weights of {name}"
    first, second = (
        identity_of(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), blocks="")
        for folder in (found, expected)
    )
    return "; ".join(differences(second, first)) or None


def judge(case: Case, pristine: Path, code: int, written: Path | None, said: str, changed: bool) -> str | None:
    """Why the outcome of a case is a failure, if it is."""
    if "Traceback" in said:
        return "a traceback"
    if code == 0 and case.damage in EDITS:
        return "it was not noticed"
    if code == 0 and written is not None:
        if not written.is_dir():
            return f"exit code 0, and no {written}"
        differing = another(written, pristine / ("model" if case.command == "resume" else "exported"))
        return f"another model: {differing}" if differing else None
    if code == 0 and case.command == "checkpoints":
        held = case.file.startswith("checkpoints/") and changed
        return "a damaged checkpoint is called whole" if held else None
    if code == 0:
        return None
    if code != 2 and not (code == 1 and case.command == "checkpoints"):
        return f"exit code {code}"
    return None if said.strip() else "not a word"


# --- forks -----------------------------------------------------------------------------------------------------


def in_a_fork(work: Callable[[], int], output: Path) -> int:
    """Start `work` in a fork whose output goes to a file; returns its process id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setpgid(0, 0)
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(process: int, end: float) -> int | None:
    """The exit code of a fork; None after it was killed because it did not end."""
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def settle(workspace: Path) -> None:
    """Use `workspace` as a user's current folder, without network."""
    os.chdir(workspace)
    sys.stdin = open(os.devnull)  # noqa: SIM115


def make_pristine(workspace: Path) -> None:
    """In `workspace`, a run that was killed, its base, cache and delta; `model` of the run that was not killed, and
    `exported`, what the checkpoint of the other becomes."""
    from tests.models import tiny_model
    from trainer.data.tokenizer import bytes_tokenizer

    def make() -> int:
        settle(workspace)
        tokenizer = bytes_tokenizer()
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        tiny_model("llama", vocab_size=len(tokenizer), **ids).save_pretrained("base")
        tokenizer.save_pretrained("base")
        rows = [{"question": f"{i} plus {i % 7}?", "answer": str(i + i % 7)} for i in range(40)]
        Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path("recipe.yaml").write_text(RECIPE)
        return strata("train", "recipe.yaml")

    def derive() -> int:
        settle(workspace)
        run = Path(RUN)
        os.rename(run / "model", "model")
        for path in run.glob(f"checkpoints/**/*{STEPS:08d}*"):
            path.unlink()
        return strata("export", RUN, "exported") or strata("export", RUN, DELTA, "--delta")

    for work in (make, derive):
        code = finish(in_a_fork(work, workspace / "output"), time.monotonic() + 5 * DEADLINE_SECONDS)
        assert code == 0, (workspace / "output").read_text()


def draw_cases(pristine: Path, count: int, seed: int) -> Iterator[Case]:
    draw = random.Random(seed)
    files = {
        workspace: sorted(
            str(p.relative_to(pristine / workspace)) for p in (pristine / workspace).rglob("*") if p.stat().st_size
        )
        for workspace in COMMANDS
    }
    files = {
        workspace: [name for name in names if (pristine / workspace / name).is_file()]
        for workspace, names in files.items()
    }
    for name, (file, _) in EDITS.items():
        for command in ("export", "resume") if file.startswith("tokenizer") else ("export", "apply", "resume"):
            yield Case(BASE, file, name, command, 0)
    for _ in range(count):
        workspace = draw.choices(list(COMMANDS), weights=[5, 3, 1, 3])[0]
        file, damage, command = (
            draw.choice(options) for options in (files[workspace], list(DAMAGES), COMMANDS[workspace])
        )
        yield Case(workspace, file, damage, command, draw.randrange(10**6))


def run_case(case: Case, pristine: Path, workspace: Path) -> int:
    """In a fork: 0, or 1 with the reason as the last line of the output."""
    for name in (RUN, BASE, CACHE, DELTA, "train.jsonl", "recipe.yaml"):
        copy = shutil.copytree if (pristine / name).is_dir() else shutil.copy2
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        copy(pristine / name, workspace / name)
    settle(workspace)
    path = Path(case.workspace, case.file)
    before = path.read_bytes()
    damage = EDITS[case.damage][1] if case.damage in EDITS else DAMAGES[case.damage]
    damage(path, random.Random(case.seed))
    changed = not path.exists() or path.read_bytes() != before
    code, written = use(case.command)
    sys.stdout.flush()
    sys.stderr.flush()
    reason = judge(case, pristine, code, written, (workspace / "output").read_text(errors="replace"), changed)
    print(f"\nexit code {code}\n{reason or 'fine'}")
    return int(reason is not None)


def campaign(cases: int, seed: int, folder: Path, *, at_once: int = 2) -> list[str]:
    """The failures, each with the case and the end of what it said."""
    pristine = folder / "pristine"
    pristine.mkdir()
    make_pristine(pristine)
    waiting = list(enumerate(draw_cases(pristine, cases, seed)))[::-1]
    running: dict[int, tuple[int, Case, float]] = {}
    failures, outcomes = [], Counter()
    while waiting or running:
        while waiting and len(running) < at_once:
            number, case = waiting.pop()
            workspace = folder / str(number)
            workspace.mkdir()
            process = in_a_fork(lambda c=case, p=workspace: run_case(c, pristine, p), workspace / "output")
            running[process] = (number, case, time.monotonic() + DEADLINE_SECONDS)
        for process, (number, case, end) in list(running.items()):
            done, status = os.waitpid(process, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else -1
            if not done and time.monotonic() > end:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
            elif not done:
                continue
            del running[process]
            said = (folder / str(number) / "output").read_text(errors="replace")
            outcomes["FAILED" if code else "same model" if "exit code 0\n" in said[-400:] else "named"] += 1
            if code != 0:
                why = f"exit {code}" if code > 0 else f"not done after {DEADLINE_SECONDS} s, or killed"
                failures.append(f"--- {case}: {why}\n{said[-1500:]}")
            shutil.rmtree(folder / str(number), ignore_errors=True)
        time.sleep(0.02)
    print(f"{sum(outcomes.values())} cases (seed {seed}): {dict(outcomes)}", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="cases that run at the same time (%(default)s)")
    arguments = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    # DeepSpeed's operators are compiled anew whenever another `ninja` is found.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # What all cases need is imported before the first fork; with one thread, so that nothing is lost by forking.
    import torch

    torch.set_num_threads(1)
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl  # noqa: F401

    import trainer.data.show
    import trainer.export.delta
    import trainer.planner.dry_run
    import trainer.train  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        failures = campaign(arguments.cases, arguments.seed, Path(folder), at_once=arguments.at_once)
    print("\n".join(failures))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
