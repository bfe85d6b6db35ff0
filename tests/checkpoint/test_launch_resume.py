"""Runs stopped or killed under the real launcher, started again with the same command, come to the same end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.supervisor import after_step, supervise
from tests.launching import deepspeed, environment, launch, metrics, rank_process, start, write_inputs

VALUES = ["train.steps=120", "eval.every=30", "checkpoint.every=9", "bank.name=cpu", "selector.interval=3"]


def command(*more: str) -> list[str]:
    return deepspeed("tiny.yaml", *VALUES, *more)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("undisturbed")
    write_inputs(place)
    finished = launch(command(), place)
    assert finished.code == 0, finished.everything
    return place / "runs" / "tiny"


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines = [
        [{k: v for k, v in line.items() if k not in ("tokens_per_second", "step_seconds")} for line in metrics(folder)]
        for folder in (found, expected)
    ]
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_saves_and_the_same_command_goes_on(
    tmp_path: Path, undisturbed: Path, number: signal.Signals
) -> None:
    write_inputs(tmp_path)
    run = tmp_path / "runs" / "tiny"
    with open(tmp_path / "out", "w+") as out:
        process = start(command(), tmp_path, stdout=out, stderr=out)
        after_step(run, 15, process)
        os.kill(rank_process(process.pid, 1), number)
        code = process.wait(60)
        out.seek(0)
        said = out.read()
    assert code == 75, said
    last = metrics(run)[-1]["step"]
    assert f"Told to stop: saved after step {last}. The same command goes on from there." in said
    assert "Traceback" not in said and "ended before the run did" not in said
    assert (run / "checkpoints" / f"step-{last:08d}.json").exists() and not (run / "model").exists()
    again = launch(command(), tmp_path)
    assert again.code == 0, again.everything
    assert f"going on after step {last}, from " in again.stderr
    assert_same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_five_times_while_it_saves_comes_to_the_same_end(tmp_path: Path, undisturbed: Path) -> None:
    """One rank or all, at random moments, with a save under way nearly always."""
    write_inputs(tmp_path)
    run = tmp_path / "runs" / "tiny"
    done = supervise(tmp_path, run, ["tiny.yaml", *VALUES, "checkpoint.every=1"], kills=5, steps=110, seed=1)
    assert len(done) == 5
    assert_same(run, undisturbed)
    assert {entry.name for entry in (tmp_path / "runs").iterdir()} == {"tiny", "cache"}


@pytest.mark.slow
def test_another_run_goes_on_from_a_checkpoint_and_settings_must_fit(tmp_path: Path, undisturbed: Path) -> None:
    """On one rank under ZeRO-2, in a folder of its own."""
    write_inputs(tmp_path)
    # Where accumulation in the middle of a step would show: 234 micro-batches, of which a step now takes four.
    checkpoint = undisturbed / "checkpoints" / "step-00000117.json"
    values = [f"resume={checkpoint}", "deepspeed=zero2", "output=runs/other"]
    refused = launch(deepspeed("tiny.yaml", *VALUES, *values, "selector.blocks=3", ranks=1), tmp_path)
    assert refused.code == 2 and "selector.blocks: 2 in the checkpoint, 3 now" in refused.everything
    assert not (tmp_path / "runs" / "other").exists()
    finished = launch(deepspeed("tiny.yaml", *VALUES, *values, "train.log_every=3", ranks=1), tmp_path)
    assert finished.code == 0, finished.everything
    assert "train.log_every is 3 from here on, after 1" in finished.stderr
    assert f"going on after step 117, from {checkpoint}" in finished.stderr
    ours = load_file(tmp_path / "runs" / "other" / "model" / "model.safetensors")
    theirs = load_file(undisturbed / "model" / "model.safetensors")
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_a_run_at_once(tmp_path: Path) -> None:
    """With nothing to lose: exit code 75, on which SLURM scripts requeue, and no run folder left behind."""
    write_inputs(tmp_path)
    run = tmp_path / "runs" / "tiny"
    with open(tmp_path / "out", "w+") as out:
        process = start(command(), tmp_path, stdout=out, stderr=out)
        end = time.monotonic() + 120
        while not (run / "lease.json").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        pids = [rank_process(process.pid, rank) for rank in (0, 1)]
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        assert process.wait(60) == 75
        out.seek(0)
        assert "Traceback" not in out.read()
    assert not run.exists()


@pytest.mark.slow
def test_a_second_job_is_refused_while_the_first_trains_and_the_requeued_one_is_not(tmp_path: Path) -> None:
    """Its first start left no checkpoint."""
    write_inputs(tmp_path)
    run = tmp_path / "runs" / "tiny"
    first = {**environment(), "SLURM_JOB_ID": "7"}
    process = start(
        command("checkpoint.every=10000", "train.steps=5000", "eval.every=null"),
        tmp_path,
        stdout=-3,
        stderr=-3,
        env=first,
    )
    after_step(run, 3, process)
    second = launch(command(), tmp_path)
    assert second.code == 2
    assert f"another run trains in {run.relative_to(tmp_path)}: SLURM job 7 (process" in second.stderr
    for pid in [rank_process(process.pid, rank) for rank in (0, 1)]:
        os.kill(pid, signal.SIGKILL)
    process.wait(60)
    again = start(
        command("train.steps=6", "eval.every=null"),
        tmp_path,
        stdout=-3,
        stderr=-3,
        env={**first, "SLURM_RESTART_COUNT": "1"},
    )
    assert again.wait(120) == 0
    assert {entry.name for entry in (tmp_path / "runs").iterdir()} == {"tiny", "cache"}
    assert (run / "model").exists() and not (run / "lease.json").exists()
    for restart, code, words in (("2", 0, "SLURM job 7 had finished the run in"), ("0", 0, "Trained 6 steps")):
        values = command("train.steps=6", "eval.every=null")
        last = launch(values, tmp_path, variables={**first, "SLURM_RESTART_COUNT": restart})
        assert last.code == code and words in last.stdout, last.everything
    assert {entry.name for entry in (tmp_path / "runs").iterdir()} == {"tiny", "tiny-2", "cache"}
