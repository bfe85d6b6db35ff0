"""What goes wrong on clusters: jobs end where it can be seen, go on where they are asked to, and train the same."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.launching import metrics
from tests.slurm.lab import Job, Lab, thorough, until
from tests.slurm.test_submit import difference, write_inputs

pytestmark = pytest.mark.slow

# In the middle of intervals, of an epoch, and between two checkpoints.
STEPS, FAULT_AFTER = 60, 15
VALUES = ["checkpoint.every=6", "bank.name=cpu", "selector.interval=5", "eval.every=null", "data.eval_fraction=0"]
VALUES += ["schedule.name=constant", "optimizer.eps=1e-3"]


def command(steps: int = STEPS) -> list[str]:
    return ["small.yaml", *VALUES, f"train.steps={steps}"]


def last_step(workspace: Path) -> int:
    """The last step that the run in `workspace` has recorded."""
    file = workspace / "runs" / "strata" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    steps = [int(found[1]) for line in lines if line.endswith("\n") and (found := re.match(r'\{"step": (\d+)', line))]
    return steps[-1] if steps else 0


def started(lab: Lab, workspace: Path, *words: str) -> Job:
    """A job in the middle of its training."""
    write_inputs(workspace)
    job = lab.submit(workspace, *(words or command()))
    until(lambda: last_step(workspace) >= FAULT_AFTER, f"step {FAULT_AFTER}", 300, job.said)
    return job


@pytest.fixture(scope="module")
def undisturbed(cluster: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("undisturbed")
    write_inputs(workspace)
    cluster.submit(workspace, *command()).wait("COMPLETED", deadline=300)
    return workspace / "runs" / "strata"


def assert_went_on(job: Job, workspace: Path, undisturbed: Path) -> None:
    """From a checkpoint, to the same weights, in the same folder and log."""
    assert re.search(r"resuming after step \d+, from ", job.said()), job.said()
    assert difference(workspace / "runs" / "strata", undisturbed) == 0.0
    assert {entry.name for entry in (workspace / "runs").iterdir() if entry.is_dir()} == {"strata", "cache"}
    steps = [line["step"] for line in metrics(workspace / "runs" / "strata") if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@thorough
# Rank 0's, which writes manifests and runs the job's script, and the other.
@pytest.mark.parametrize(("fault", "node"), [("cut", "node1"), ("crash", "node2")])
def test_a_lost_node_is_replaced(lab: Lab, workspace: Path, undisturbed: Path, fault: str, node: str) -> None:
    """The job goes on with the third node; ranks of the old one, if they live, wake up and change nothing."""
    job = started(lab, workspace)
    lab.control(fault, node)
    job.wait("PENDING", "RUNNING", "COMPLETED", restarts=1, deadline=120)
    done = job.wait("COMPLETED", restarts=1, deadline=300)
    assert done["Restarts"] == "1" and node not in done["NodeList"]
    assert_went_on(job, workspace, undisturbed)
    before = contents(workspace / "runs" / "strata")
    ranks = ["pgrep", "-f", "trainer train small.yaml"]
    if fault == "cut":
        assert lab.on(node, *ranks).code == 0, "there was no zombie to show anything"
    lab.control("heal", node)
    # Slurm asks the node what runs there within a minute.
    until(lambda: lab.on(node, *ranks).code != 0, "no process is left on the node", 150)
    assert contents(workspace / "runs" / "strata") == before


@thorough
def test_a_killed_rank_fails_the_job_and_submitting_it_again_goes_on(
    lab: Lab, workspace: Path, undisturbed: Path
) -> None:
    job = started(lab, workspace)
    assert lab.on("node2", "pkill", "-KILL", "-f", "trainer train small.yaml").code == 0
    failed = job.wait("FAILED", deadline=60)
    assert failed["ExitCode"] == f"{128 + signal.SIGKILL}:0" and failed["Restarts"] == "0"
    assert "node2: task 1: Killed" in job.said()
    again = lab.submit(workspace, *command())
    again.wait("COMPLETED", deadline=300)
    assert_went_on(again, workspace, undisturbed)


@thorough
def test_a_requeued_job_saves_and_goes_on(lab: Lab, workspace: Path, undisturbed: Path) -> None:
    """By somebody else: preemption and administrators do it so."""
    job = started(lab, workspace)
    lab.login(["scontrol", "requeue", job.number], workspace)
    job.wait("COMPLETED", restarts=1, deadline=300)
    assert_went_on(job, workspace, undisturbed)
    assert "Told to stop: saved after step" in job.said()


@thorough
def test_a_time_limit_saves_and_the_job_goes_on(lab: Lab, workspace: Path, undisturbed: Path) -> None:
    """The run is endless at first, since limits come when they come; once the job waits again, it gets its end."""
    endless = 10**6
    write_inputs(workspace)
    text = (workspace / "small.yaml").read_text()
    (workspace / "small.yaml").write_text(text.replace("steps: 8", f"steps: {endless}"))
    job = lab.submit(workspace, "small.yaml", *VALUES, "--notice", "20")
    until(lambda: last_step(workspace) >= FAULT_AFTER, f"step {FAULT_AFTER}", 300, job.said)
    lab.login(["scontrol", "update", f"jobid={job.number}", "timelimit=1"], workspace)
    job.wait("PENDING", restarts=1, deadline=120)
    lab.login(["scontrol", "update", f"jobid={job.number}", "timelimit=10"], workspace)
    saved = last_step(workspace)
    steps = saved + 10
    (workspace / "small.yaml").write_text(text.replace("steps: 8", f"steps: {steps}"))
    done = job.wait("COMPLETED", restarts=1, deadline=300)
    assert done["Restarts"] == "1" and f"resuming after step {saved}, from " in job.said()
    assert f"The run was told to stop: job {job.number} goes back into the queue." in job.said()
    other = workspace / "other"
    other.mkdir()
    write_inputs(other)
    lab.submit(other, *command(steps)).wait("COMPLETED", deadline=300)
    assert difference(workspace / "runs" / "strata", other / "runs" / "strata") == 0.0


@thorough
def test_a_cancelled_job_stays_cancelled(lab: Lab, workspace: Path) -> None:
    """It may save; it does not put itself back into the queue."""
    job = started(lab, workspace)
    lab.login(["scancel", job.number], workspace)
    job.wait("CANCELLED", deadline=60)
    until(lambda: not lab.login(["squeue", "-h"], workspace).stdout.strip(), "the queue is empty", 60)
    assert job.fields()["JobState"] == "CANCELLED" and job.fields()["Restarts"] == "0"


@thorough
def test_a_second_job_in_the_folder_of_a_run_is_refused(lab: Lab, workspace: Path) -> None:
    job = started(lab, workspace, *command(steps=10**6))
    second = lab.submit(workspace, *command(steps=10**6))
    second.wait("FAILED", deadline=300)
    refusal = f"output: another run trains in {Path('runs') / 'strata'}: SLURM job {job.number} (process "
    assert second.said().count(refusal) == 1, second.said()
    before = last_step(workspace)
    until(lambda: last_step(workspace) > before, "the first job goes on", 30)
    assert {entry.name for entry in (workspace / "runs").iterdir() if entry.is_dir()} == {"strata", "cache"}
