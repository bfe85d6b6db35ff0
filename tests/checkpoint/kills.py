"""Kills runs at any moment, the first and the last included, and starts the same command again until it is done.

    python -m tests.checkpoint.kills --kills 60 --seed 0

In the end there must be one run folder and exit code 0, and the model, the metrics and the names of all files must be
those of a run that nobody disturbed. Kills fall at seeded file operations (before a settings file exists, in the middle
of a checkpoint, between the model and the exit, ...) and at seeded times, on one rank or on all.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import forked
from tests.conftest import OPERATORS
from tests.launching import metrics, write_inputs

RANKS = 2
_STEPS = ["train.steps=9", "eval.every=3", "checkpoint.every=2", "checkpoint.keep=2", "selector.interval=3"]
_TRAINED_ADAPTER = ["substrate.peft.r=4", "substrate.peft.target_modules=[q_proj,v_proj]", "substrate.merge=true"]
_LEARNS = ["selector.active_share=0.5", "selector.update_every=2", "selector.probe.batch_size=4"]
KINDS = {
    "LISA, ZeRO-2": [*_STEPS, "deepspeed=zero2", "bank.name=cpu"],
    "LISA, ZeRO-3": [*_STEPS, "bank.name=cpu"],
    "IST, merged": ["method=ist", *_STEPS[:-1], *_TRAINED_ADAPTER, *_LEARNS, "deepspeed=zero2"],
}
# How many operations at either end of a run are as likely as all of those between them.
_ENDS = 8
_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Operations:
    """Writes down what each rank is about to do to files in `workspace`, and kills rank `victim` before operation
    `last`, counted from 1, or before the first one in which the pattern `like` is found."""

    workspace: Path
    victim: int | None = None
    last: int = 0
    like: str | None = None

    def log(self, rank: int) -> Path:
        return self.workspace / f"operations-{rank}"

    def read(self, rank: int) -> list[str]:
        return self.log(rank).read_text().splitlines()

    def __call__(self, rank: int) -> None:
        """Watch the rank that this process is."""
        log = os.open(self.log(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        done = 0

        def look(event: str, args: tuple[Any, ...]) -> None:
            nonlocal done
            if event not in _OPERATIONS or not isinstance(args[0], str | os.PathLike):
                return
            if event == "open" and not args[2] & _WRITES:
                return
            path = os.path.abspath(args[0])
            if not path.startswith(f"{self.workspace}/runs"):
                return
            done += 1
            said = f"{event} {os.path.relpath(path, self.workspace)}"
            os.write(log, f"{said}\n".encode())
            if rank == self.victim and (done == self.last or (self.like and re.search(self.like, said))):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)


@dataclass(frozen=True)
class Undisturbed:
    """A run from beginning to end."""

    workspace: Path
    arguments: list[str]
    seconds: float
    operations: list[list[str]]

    @property
    def run(self) -> Path:
        return self.workspace / "runs" / "tiny"


def undisturbed(workspace: Path, values: Sequence[str]) -> Undisturbed:
    """Train in `workspace` without a kill."""
    forked.context()  # not to be counted into the seconds
    write_inputs(workspace)
    arguments, watch = ["tiny.yaml", *values], Operations(workspace)
    began = time.monotonic()
    finished = forked.run(arguments, workspace, before=watch)
    assert finished.code == 0, finished.everything
    return Undisturbed(workspace, arguments, time.monotonic() - began, [watch.read(rank) for rank in range(RANKS)])


def kill_until_done(workspace: Path, expected: Undisturbed, chance: random.Random, kills: int) -> list[str]:
    """Run in `workspace` with up to `kills` kills, and compare what is left; returns what was killed and where."""
    write_inputs(workspace)
    run, done = workspace / "runs" / "tiny", []
    for _ in range(kills):
        said = _attempt(workspace, expected, chance)
        if said is None:
            break
        done.append(said)
        _assert_whole(run, done)
    last = forked.run(expected.arguments, workspace)
    assert last.code == 0, (done, last.everything)
    again = forked.run(expected.arguments, workspace)
    said = again.everything
    assert again.code == 0 and f"The run in {run.relative_to(workspace)} is finished" in said, (done, said)
    assert_same(workspace, expected, done)
    return done


def _attempt(workspace: Path, expected: Undisturbed, chance: random.Random) -> str | None:
    """Start the run and kill it; returns what was done, or None where it was over before."""
    patience = chance.choice([0.0, 1.0])
    if chance.random() < 0.25:
        ranks = forked.start(expected.arguments, workspace)
        moment = chance.random() * expected.seconds
        time.sleep(moment)
        victims = chance.choice([[0], [1], [0, 1]])
        for rank in victims:
            ranks.processes[rank].kill()
        what = f"ranks {victims} after {moment:.1f} s"
    else:
        rank = chance.choice([0, 0, 0, 1])
        total = len(expected.operations[rank])
        place_of = chance.choice(["begin", "middle", "end"])
        first, stop = {"begin": (1, _ENDS), "middle": (1, total), "end": (total - _ENDS, total)}[place_of]
        watch = Operations(workspace, rank, chance.randint(first, stop))
        ranks = forked.start(expected.arguments, workspace, before=watch)
        what = f"rank {rank} at operation {watch.last} of {total}"
    finished = ranks.wait(patience=patience)
    if finished.code == 0:
        return None
    assert -signal.SIGKILL in [process.exitcode for process in ranks.processes], finished.everything
    return f"{what}, {watch.read(rank)[-1]}" if "operation" in what else what


def _assert_whole(run: Path, done: list[str]) -> None:
    """All checkpoints that there are."""
    from trainer.cli.checkpoints import main as list_checkpoints

    if list((run / "checkpoints").glob("step-*.json")):
        assert list_checkpoints([str(run)]) == 0, done


def assert_same(workspace: Path, expected: Undisturbed, done: object = "") -> None:
    """One run folder in `workspace`, with the models, metrics and names of files of `expected`; `done` is shown where
    that fails."""
    assert {entry.name for entry in (workspace / "runs").iterdir()} == {"tiny", "cache"}, done
    found = workspace / "runs" / "tiny"
    assert _names(found) == _names(expected.run), done
    for file in expected.run.glob("*/*.safetensors"):
        assert (found / file.relative_to(expected.run)).read_bytes() == file.read_bytes(), (file.name, done)
    assert _records(found) == _records(expected.run), done


def _names(run: Path) -> Counter[str]:
    """All files, without the random part that the pool's names have."""
    files = (str(file.relative_to(run)) for file in run.rglob("*") if file.is_file())
    return Counter(re.sub(r"-[0-9a-f]{8}-r(?=\d{5})", "-r", name) for name in files)


def _records(run: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_second", "step_seconds")
    return [{key: value for key, value in line.items() if key not in timed} for line in metrics(run)]


def campaign(workspace: Path, kind: str, *, kills: int, seed: int) -> Iterator[str]:
    """Kill runs of a kind `kills` times, one to three times each; yields what was killed and where."""
    chance = random.Random(f"{kind} {seed}")
    (workspace / "undisturbed").mkdir(parents=True)
    expected = undisturbed(workspace / "undisturbed", KINDS[kind])
    done = 0
    while done < kills:
        own = Path(tempfile.mkdtemp(dir=workspace))
        for said in kill_until_done(own, expected, chance, min(chance.choice([1, 2, 3]), kills - done)):
            done += 1
            yield said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    args = parser.parse_args()
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(OPERATORS))
    kinds, done = args.kind or list(KINDS), 0
    for index, kind in enumerate(kinds):
        share = args.kills // len(kinds) + (index < args.kills % len(kinds))
        with tempfile.TemporaryDirectory() as workspace:
            for line in campaign(Path(workspace), kind, kills=share, seed=args.seed):
                done += 1
                print(f"{done:3} {kind}: {line}", flush=True)
    print(f"{done} kills: one folder each, exit code 0, models, metrics and files as without them")


if __name__ == "__main__":
    main()
