"""Kills a run at random moments and starts it again until it is done, as an unlucky cluster would.

    python tests/checkpoint/supervisor.py FOLDER RUN RECIPE.yaml [key=value ...] --kills 10 --seed 0

starts two ranks of `launch/train.py RECIPE.yaml ...` in FOLDER, where RUN is its run folder, and says for each start
what was killed and when.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests import forked
from tests.launching import metrics
from trainer.cli.checkpoints import main as list_checkpoints


def supervise(folder: Path, run: Path, arguments: Sequence[str], *, kills: int, steps: int, seed: int) -> list[str]:
    """Run to the end with `kills` kills of one rank or all, spread over its `steps`; returns what was done.

    After each kill the newest checkpoint must be whole: `AssertionError` where it is not, or where a start fails.
    """
    chance = random.Random(seed)
    done = []
    for target in sorted(chance.sample(range(1, steps), kills)):
        victims = chance.choice([[0], [1], [0, 1]])
        ranks = forked.start(arguments, folder)
        after_step(run, target, ranks)
        time.sleep(chance.random() * 0.2)  # in the middle of whatever is going on
        for rank in victims:
            ranks.processes[rank].kill()
        assert ranks.wait(deadline=60).code != 0
        done.append(f"killed ranks {victims} after step {target}")
        if (run / "checkpoints").exists() and list((run / "checkpoints").glob("step-*.json")):
            assert list_checkpoints([str(run)]) == 0, done
    finished = forked.start(arguments, folder).wait(deadline=1800)
    assert finished.code == 0, finished.everything
    return done


class Process(Protocol):
    def poll(self) -> int | None: ...


def after_step(run: Path, step: int, process: Process, deadline: float = 300) -> None:
    """Wait until the run has recorded `step`."""
    end = time.monotonic() + deadline
    while time.monotonic() < end and process.poll() is None:
        if (run / "metrics.jsonl").exists() and any(line.get("step", 0) >= step for line in metrics(run)[:-1]):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached, exit code {process.poll()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("arguments", nargs="+")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200, help="of the whole run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    done = supervise(args.folder, args.run, args.arguments, kills=args.kills, steps=args.steps, seed=args.seed)
    print("\n".join(done))


if __name__ == "__main__":
    main()
