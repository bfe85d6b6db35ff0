"""Where a run writes, and what is left there when it is refused after it began to write."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import distributed as torch_distributed

from tests import distributed
from trainer.config import RunConfig, load
from trainer.run_folder import start_run_folder


def _config(output: Path) -> RunConfig:
    values = ["method=lisa", "train.steps=1", "train.global_batch_size=1", "data.train=x.jsonl", "model.path=/x"]
    return load(None, [*values, f"output={output}"], check_files=False)


def _contents(folder: Path) -> set[str]:
    return {str(entry.relative_to(folder)) for entry in folder.rglob("*")}


def _refused(rank: int, place: Path) -> None:
    with pytest.raises(ZeroDivisionError), start_run_folder(_config(place)) as run:
        folder = run.path
        if rank == 0:
            assert (folder / "config.yaml").exists()
            (folder / "tensorboard" / "deep").mkdir(parents=True)
            (folder / "tensorboard" / "deep" / "events").write_text("x")
        torch_distributed.barrier()
        raise ZeroDivisionError
    torch_distributed.barrier()


def _cases(rank: int, place: Path) -> str:
    _refused(rank, place / "new" / "run")
    assert not (place / "new" / "run").exists()
    before = _contents(place / "mine")
    torch_distributed.barrier()  # rank 0 writes there next, and once more after that
    _refused(rank, place / "mine")
    assert _contents(place / "mine") == before
    torch_distributed.barrier()

    with start_run_folder(_config(place / "mine")) as run:
        folder = run.path
        assert folder == place / "mine"
        (folder / "metrics.jsonl").touch()
        torch_distributed.barrier()
    torch_distributed.barrier()
    with start_run_folder(_config(place / "mine")) as second:
        assert second.path == place / "mine-2"
        (second.path / "metrics.jsonl").touch()
        torch_distributed.barrier()
    torch_distributed.barrier()
    return (folder / "config.yaml").read_text()


def _beside(rank: int, place: Path) -> str:
    with start_run_folder(_config(place)) as run:
        return run.path.name


@pytest.mark.parametrize("name", ["metrics.jsonl", "adapter", "importance.png", "model"])
def test_what_a_run_writes_is_never_written_over(tmp_path: Path, name: str) -> None:
    """Also where somebody has kept only that."""
    (tmp_path / "run" / name).mkdir(parents=True)
    assert distributed.run(_beside, tmp_path / "run", ranks=1) == ["run-2"]


def test_a_refused_run_leaves_nothing_of_its_own_and_all_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "mine" / "notes").mkdir(parents=True)
    (tmp_path / "mine" / "train.py").write_text("mine")
    first, second = distributed.run(_cases, tmp_path, ranks=2)
    assert first == second and "method: lisa" in first
    assert (tmp_path / "mine" / "train.py").read_text() == "mine"
    assert (tmp_path / "mine-2" / "config.yaml").exists()
