"""Runs stopped or killed under the real launcher, started again with the same command, come to the same end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import forked
from tests.checkpoint.supervisor import after_step, supervise
from tests.comparing import largest_difference
from tests.launching import deepspeed, metrics, rank_process, start, write_inputs
from trainer.cli.main import main

VALUES = ["train.steps=30", "eval.every=10", "checkpoint.every=9", "bank.name=cpu", "selector.interval=3"]


def command(*more: str) -> list[str]:
    return deepspeed("tiny.yaml", *VALUES, *more)


def used_seconds(process: int) -> float:
    """The processor time of a process so far, without what its beats and watches use: to a tenth of a second."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return round((int(user) + int(system)) / os.sysconf("SC_CLK_TCK"), 1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("undisturbed")
    write_inputs(workspace)
    finished = forked.run(["tiny.yaml", *VALUES], workspace)
    assert finished.code == 0, finished.everything
    return workspace / "runs" / "tiny"


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
    assert f"Told to stop: saved after step {last}. The same command resumes there." in said
    assert "Traceback" not in said and "ended before the run did" not in said
    assert (run / "checkpoints" / f"step-{last:08d}.json").exists() and not (run / "model").exists()
    again = forked.run(["tiny.yaml", *VALUES], tmp_path)
    assert again.code == 0, again.everything
    assert f"resuming after step {last}, from " in again.stderr
    assert_same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_five_times_while_it_saves_comes_to_the_same_end(tmp_path: Path, undisturbed: Path) -> None:
    """One rank or all, at random moments, with a save under way nearly always."""
    write_inputs(tmp_path)
    run = tmp_path / "runs" / "tiny"
    done = supervise(tmp_path, run, ["tiny.yaml", *VALUES, "checkpoint.every=1"], kills=5, steps=27, seed=1)
    assert len(done) == 5
    assert_same(run, undisturbed)
    assert {entry.name for entry in (tmp_path / "runs").iterdir()} == {"tiny", "cache"}


@pytest.mark.slow
def test_another_run_goes_on_from_a_checkpoint_and_settings_must_fit(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one rank under ZeRO-2, in a folder of its own."""
    write_inputs(tmp_path)
    # Where accumulation in the middle of a step would show: 54 micro-batches, of which a step now takes four.
    checkpoint = undisturbed / "checkpoints" / "step-00000027.json"
    values = [f"resume={checkpoint}", "deepspeed=zero2", "output=runs/other"]
    refused = forked.run(["tiny.yaml", *VALUES, *values, "selector.blocks=3"], tmp_path, ranks=1)
    assert refused.code == 2 and "selector.blocks: 2 in the checkpoint, 3 now" in refused.everything
    monkeypatch.chdir(tmp_path)
    dry_run = ["train", "tiny.yaml", *VALUES, *values, "--dry-run"]
    assert main([*dry_run, "selector.blocks=3"]) == 2
    assert "selector.blocks: 2 in the checkpoint, 3 now" in capsys.readouterr().err
    assert main([*dry_run, "data.eval_fraction=0.4"]) == 2, "other samples"
    assert main(dry_run) == 0
    assert not (tmp_path / "runs" / "other").exists()
    finished = forked.run(["tiny.yaml", *VALUES, *values, "train.log_every=3"], tmp_path, ranks=1)
    assert finished.code == 0, finished.everything
    assert "train.log_every is 3 from here on, after 1" in finished.stderr
    assert f"resuming after step 27, from {checkpoint}" in finished.stderr
    ours = load_file(tmp_path / "runs" / "other" / "model" / "model.safetensors")
    theirs = load_file(undisturbed / "model" / "model.safetensors")
    assert largest_difference(ours, theirs) < 1e-5


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
def test_a_rank_that_waits_for_another_leaves_nothing_either(tmp_path: Path) -> None:
    """In a collective the main thread runs neither signal handlers nor `finally`, so that another thread cleans up."""
    write_inputs(tmp_path)
    run = tmp_path / "runs" / "tiny"
    ranks = forked.start(["tiny.yaml", *VALUES], tmp_path)
    first, second = ranks.processes
    assert first.pid is not None and second.pid is not None
    end = time.monotonic() + 120
    while not (run / "lease.json").exists():
        assert ranks.poll() is None and time.monotonic() < end, ranks.said
        time.sleep(0.01)
    os.kill(second.pid, signal.SIGSTOP)
    try:
        before = -1.0
        while before != (before := used_seconds(first.pid)):
            assert time.monotonic() < end
            time.sleep(1)
        assert (run / "lease.json").exists()
        os.kill(first.pid, signal.SIGTERM)
        first.join(60)
        assert first.exitcode == 75, ranks.said
    finally:
        ranks.kill()
    assert not run.exists()


@pytest.mark.slow
def test_a_second_job_is_refused_while_the_first_trains_and_the_requeued_one_is_not(tmp_path: Path) -> None:
    """Its first start left no checkpoint."""
    write_inputs(tmp_path)
    run = tmp_path / "runs" / "tiny"
    first = {"SLURM_JOB_ID": "7"}
    endless = ["checkpoint.every=10000", "train.steps=5000", "eval.every=null"]
    ranks = forked.start(["tiny.yaml", *VALUES, *endless], tmp_path, variables=first)
    after_step(run, 3, ranks)
    second = forked.run(["tiny.yaml", *VALUES], tmp_path)
    assert second.code == 2
    assert f"another run trains in {run.relative_to(tmp_path)}: SLURM job 7 (process" in second.stderr
    ranks.kill()
    ranks.wait(deadline=60)
    short = ["tiny.yaml", *VALUES, "train.steps=6", "eval.every=null"]
    again = forked.run(short, tmp_path, variables={**first, "SLURM_RESTART_COUNT": "1"})
    assert again.code == 0, again.everything
    assert {entry.name for entry in (tmp_path / "runs").iterdir()} == {"tiny", "cache"}
    assert (run / "model").exists() and not (run / "lease.json").exists()
    for restart in ("2", "0"):  # requeued once more, and submitted anew
        last = forked.run(short, tmp_path, variables={**first, "SLURM_RESTART_COUNT": restart})
        assert last.code == 0 and "The run in runs/tiny is finished" in last.stdout, last.everything
        assert "Trained" not in last.stdout and last.stdout.count("is finished") == 1
    assert {entry.name for entry in (tmp_path / "runs").iterdir()} == {"tiny", "cache"}
