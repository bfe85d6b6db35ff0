"""trainer/run/swap_folder.py: no run reads another's optimizer state, and none is left on the disk."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launching import SCRIPT, environment, start, write_inputs
from trainer.config import load
from trainer.config.deepspeed.resolve import resolve
from trainer.run.swap_folder import fresh_folder, own_swap_folder


def settings(path: Path | str) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": str(path)}}}


def path_in(ds: dict[str, Any]) -> Path:
    return Path(ds["zero_optimization"]["offload_optimizer"]["nvme_path"])


@pytest.mark.parametrize("path", ["auto", "given"])
def test_two_runs_with_one_output_and_path_have_a_folder_each(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir(mode=0o777)
    config = load(str(tmp_path / "tiny.yaml"), ["deepspeed=zero3_nvme"])
    ds = resolve(config, 1) if path == "auto" else settings(tmp_path / "temporary")
    with own_swap_folder(ds) as first, own_swap_folder(ds) as second:
        folders = {path_in(first), path_in(second)}
        assert len(folders) == 2 and all(folder.stat().st_mode & 0o777 == 0o700 for folder in folders)
        assert all(folder.parent == tmp_path / "temporary" for folder in folders)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_no_folder_without_nvme() -> None:
    ds = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    with own_swap_folder(ds) as same:
        assert same is ds


def test_it_goes_also_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), fresh_folder(tmp_path / "new") as folder:
        (folder / "optimizer").mkdir()
        raise RuntimeError
    assert list((tmp_path / "new").iterdir()) == []


HOLDS = """
import sys
from pathlib import Path
from trainer.run.swap_folder import fresh_folder
with fresh_folder(Path(sys.argv[1])) as folder:
    (folder / "state.swp").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_run_left_goes_with_the_next_one_and_nothing_else(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        killed, living = (Path(process.stdout.readline().strip()) for process in processes)
        processes[0].kill()
        processes[0].wait()
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "data").touch()
        link = killed.with_name(f"{killed.name}-link")
        link.symlink_to(elsewhere)
        foreign = tmp_path / "strata-swap-1-otherhost-x"
        foreign.mkdir()
        with fresh_folder(tmp_path) as own:
            assert not killed.exists() and (living / "state.swp").exists() and own.is_dir()
        assert (elsewhere / "data").exists() and foreign.exists() and link.is_symlink()
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_run_swaps_into_a_folder_of_its_own_and_removes_it(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    # Wide enough: DeepSpeed leaves groups of less than 1 MiB in memory.
    wide = [
        "model.random.hidden_size=256",
        "model.random.intermediate_size=256",
        "bank.name=cpu",
        "train.steps=100000",
        "eval.every=null",
    ]
    command = [sys.executable, str(SCRIPT), "tiny.yaml", "deepspeed=zero3_nvme", *wide, "schedule.warmup_steps=null"]
    with open(tmp_path / "out", "w+") as out:
        variables = environment() | {"TMPDIR": str(temporary)}
        process = start(command, tmp_path, stdout=out, stderr=out, env=variables)
        try:
            end = time.monotonic() + 240
            while not (list(temporary.rglob("*.swp")) and (tmp_path / "runs/tiny/metrics.jsonl").exists()):
                assert process.poll() is None and time.monotonic() < end, (tmp_path / "out").read_text()
                time.sleep(0.1)
            (folder,) = temporary.glob("strata-swap-*")
            assert folder.stat().st_mode & 0o777 == 0o700
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 75, (tmp_path / "out").read_text()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    assert not list(temporary.glob("strata-*"))
