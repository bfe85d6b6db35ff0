"""No room: found before anything is written where that can be known, and survived where it cannot."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import distributed
from tests.engine.parity import Cell, start, train_step
from trainer.checkpoint import CheckpointError, Checkpoints, Store

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", place]).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def _fill(rank: int, place: Path) -> dict[str, Any]:
    engine, sparse = start(Cell(stage=3, bank="cpu"), rank)
    checkpoints = Checkpoints(sparse, place / "run", keep=2, asynchronous=True)
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
        space = os.statvfs(place)
        (place / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - 20_000))
    found["known"] = save_after_step(1)
    checkpoints.require_space = lambda *arguments: None  # type: ignore[method-assign]  # a quota, which nobody sees
    found["unknown"] = save_after_step(2)
    found["steps"] = Store(place / "run").steps()
    found["left"] = [p for p in (place / "run/checkpoints/pool").iterdir() if not p.name.startswith("00000001-")]
    if rank == 0:
        (place / "filler").unlink()
    del checkpoints.require_space  # type: ignore[method-assign]
    found["then"] = save_after_step(3)
    newest = Store(place / "run").read(4)
    found["problems"] = [problem for file in newest.files if (problem := Store(place / "run").problem(file))]
    engine.destroy()
    return found


def test_a_full_disk_ends_a_save_and_leaves_the_last_good_one(small_disk: Path) -> None:
    for found in distributed.run(_fill, small_disk, ranks=2):
        assert found["first"] == ""
        assert re.match(
            r"the checkpoint after step 2 was not written: it takes [\d.]+ MiB, and .* has 0\.0 MiB free; the one "
            r"after step 1 is whole\. Make room, lower checkpoint\.keep \(2 here\)",
            found["known"],
        )
        assert "step 3 was not written: rank" in found["unknown"] and "No space left on device" in found["unknown"]
        assert "the one after step 1 is whole" in found["unknown"]
        assert found["steps"] == [1] and found["left"] == [], "what is of no use only takes room"
        assert found["then"] == "" and found["problems"] == []
