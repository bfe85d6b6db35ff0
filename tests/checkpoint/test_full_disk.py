"""No room: found before anything is written where that can be known, and survived where it cannot."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import distributed, forked
from tests.checkpoint.supervisor import after_step
from tests.engine import parity
from tests.engine.parity import Cell, train_step
from tests.launching import write_inputs
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.store import CheckpointError, Store

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of two MiB, or of as many as a test asks for."""
    workspace = tmp_path / "disk"
    workspace.mkdir()
    size = f"size={getattr(request, 'param', 2)}m"
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", workspace]).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        yield workspace
    finally:
        subprocess.run(["umount", workspace], check=True)


def _fill(rank: int, workspace: Path) -> dict[str, Any]:
    engine, sparse = parity.start(Cell(stage=3, bank="cpu"), rank)
    checkpoints = Checkpoints(sparse, workspace / "run", keep=2, asynchronous=True)
    found: dict[str, Any] = {}

    def save_after_step(step: int) -> str:
        train_step(Cell(stage=3, bank="cpu"), engine, step, rank)
        try:
            checkpoints.save(step + 1, {})
            checkpoints.finish()
        except CheckpointError as error:
            return str(error)
        return ""

    found["first"] = save_after_step(0)
    if rank == 0:
        space = os.statvfs(workspace)
        (workspace / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - 20_000))
    found["known"] = save_after_step(1)
    checkpoints.require_space = lambda *arguments: None  # type: ignore[method-assign]  # a quota, which nobody sees
    found["unknown"] = save_after_step(2)
    found["steps"] = Store(workspace / "run").steps()
    found["left"] = [p for p in (workspace / "run/checkpoints/pool").iterdir() if not p.name.startswith("00000001-")]
    if rank == 0:
        (workspace / "filler").unlink()
    del checkpoints.require_space  # type: ignore[method-assign]
    found["then"] = save_after_step(3)
    newest = Store(workspace / "run").read(4)
    found["problems"] = [problem for file in newest.files if (problem := Store(workspace / "run").problem(file))]
    engine.destroy()
    return found


def test_a_full_disk_ends_a_save_and_leaves_the_last_good_one(small_disk: Path) -> None:
    for found in distributed.run(_fill, small_disk, ranks=2):
        assert found["first"] == ""
        assert re.match(
            r"the checkpoint after step 2 was not written: it needs [\d.]+ MiB, but .* has 0\.0 MiB free; the one "
            r"after step 1 is intact\. Make room, lower checkpoint\.keep \(2 here\)",
            found["known"],
        )
        assert "step 3 was not written: rank" in found["unknown"] and "No space left on device" in found["unknown"]
        assert "the one after step 1 is intact" in found["unknown"]
        assert found["steps"] == [1] and found["left"] == [], "what is of no use only takes room"
        assert found["then"] == "" and found["problems"] == []


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", [16], indirect=True)
@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_run_whose_disk_is_full_stops_or_goes_on_as_it_was_told(
    small_disk: Path, tmp_path: Path, choice: str
) -> None:
    write_inputs(tmp_path)
    run = small_disk / "runs" / "tiny"
    values = ["train.steps=40", "checkpoint.every=5", f"checkpoint.on_failure={choice}", f"output={run}"]
    ranks = forked.start(["tiny.yaml", *values, "eval.every=null"], tmp_path)
    after_step(run, 10, ranks)
    space = os.statvfs(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(space.f_bavail * space.f_frsize - 200_000))  # what else a run writes has room
    if choice == "continue":
        after_step(run, 25, ranks)
        filler.unlink()
    finished = ranks.wait()
    code, said = finished.code, finished.everything
    full = r"the checkpoint after step \d+ was not written: it needs [\d.]+ MiB, but .* one after step \d+ is intact"
    if choice == "continue":
        assert code == 0 and re.search(f"WARNING: {full}", said), said
        assert (run / "model").exists() and 40 in Store(run).steps()
    else:
        assert code == 2 and re.search(full, said), said
        assert "Traceback" not in said and not (run / "model").exists()
    newest = Store(run).read(Store(run).steps()[0])
    assert [problem for file in newest.files if (problem := Store(run).problem(file))] == []
