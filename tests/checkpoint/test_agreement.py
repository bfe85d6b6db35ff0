"""trainer/checkpoint/agreement.py: what one rank finds wrong ends all ranks' call, whatever kind of exception it is."""

from __future__ import annotations

import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from tests import distributed
from tests.engine import parity
from tests.engine.parity import Cell, train_step
from trainer.checkpoint.agreement import agreed, ask_rank_0, portable
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.store import CheckpointError, Store


class Unpicklable(CheckpointError):
    """Holds what cannot be sent."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class NeedsTwo(ValueError):
    """Pickles, and cannot be put together again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def raised(work: Any) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), OSError),
        (KeyError("rank"), KeyError),
        (Unpicklable("damaged"), CheckpointError),
        (NeedsTwo("no", "number"), ValueError),
    ],
)
def test_an_exception_arrives_as_the_nearest_class_that_can_be_sent(error: Exception, kind: type) -> None:
    sent = pickle.loads(pickle.dumps(portable(error)))
    assert type(sent) is kind and str(sent) == str(error)


def _tells(rank: int, folder: Path) -> list[str]:
    """Every call is followed by another: a rank that left one early would not be there."""
    engine, sparse = parity.start(Cell(stage=3), rank)
    found = []

    def fail(error: Exception) -> Any:
        raise error

    # Rank 0 alone.
    for error in (
        ValueError("bad"),
        Unpicklable("held"),
        NeedsTwo("one", "two"),
        MemoryError("all"),
        CheckpointError("c"),
    ):
        found.append(raised(lambda error=error: ask_rank_0(lambda: fail(error))))
    found.append(raised(lambda: ask_rank_0(threading.Lock)))  # an answer that cannot be sent
    found.append(str(ask_rank_0(lambda: "well")))
    # Rank 1 alone.
    found.append(raised(lambda: agreed(lambda: fail(RuntimeError("of rank 1")) if rank == 1 else None)))
    # A save that one rank cannot make room or a thread for; the next one is whole.
    checkpoints = Checkpoints(sparse, folder / "run", keep=2, asynchronous=True)
    train_step(Cell(stage=3), engine, 0, rank)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(shutil, "disk_usage", lambda *_: fail(PermissionError("no statvfs")))
        found.append(raised(lambda: checkpoints.save(1, {})))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Staging, "_make_room", lambda *_, **__: fail(MemoryError("no host memory")))
        found.append(raised(lambda: checkpoints.save(1, {})))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(threading.Thread, "start", lambda *_: fail(RuntimeError("no more threads")))
        found.append(raised(lambda: checkpoints.save(1, {})))
    found.append(raised(lambda: checkpoints.save(1, {})))
    checkpoints.finish()
    # A file that one rank cannot read when its checksum has been compared.
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Store, "open", lambda *_: fail(OSError(5, "Input/output error")))
        found.append(raised(lambda: checkpoints.resume(Store(folder / "run"), 1)))
    found.append(raised(lambda: checkpoints.resume(Store(folder / "run"), 1)))
    return [*found, str(Store(folder / "run").steps())]


@pytest.mark.slow
def test_what_fails_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    of_both = distributed.run(_tells, tmp_path, ranks=2, deadline=150)
    expected = ["bad", "held", "one two", "all", "c", "pickle", "well", "of rank 1"]
    expected += ["no statvfs", "no host memory", "no more threads", "nothing", "Input/output error", "nothing", "[1]"]
    for found in of_both:
        assert len(found) == len(expected)
        for said, words in zip(found, expected, strict=True):
            assert words in said, found
