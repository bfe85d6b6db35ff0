"""Jobs of `python -m trainer submit` on a real cluster: what they train, how they end, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.comparing import largest_difference
from tests.launching import metrics
from tests.slurm.lab import Lab, thorough

pytestmark = pytest.mark.slow

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
LENGTH = 288

RECIPE = f"""\
method: lisa
model:
  random:
    model_type: llama
    hidden_size: 64
    intermediate_size: 128
    num_hidden_layers: 4
    num_attention_heads: 4
    num_key_value_heads: 2
    max_position_embeddings: {LENGTH}
  dtype: fp32
selector: {{blocks: 2, interval: 2}}
optimizer: {{lr: 1.0e-3}}
train: {{steps: 8, global_batch_size: 8, micro_batch_size: 1}}
eval: {{micro_batch_size: 8}}
data: {{train: train.jsonl, eval_fraction: 0.1, max_length: {LENGTH}}}
"""


def write_inputs(workspace: Path) -> None:
    """The small GSM8K run, on its first short rows; made-up ones where the data set is not at hand."""
    if GSM8K.exists():
        lines = GSM8K.read_text(encoding="utf-8").splitlines()
        rows = [line for line in lines if len(line) < LENGTH][:80]
    else:
        rows = [json.dumps({"question": f"{i} plus {i % 7}?", "answer": str(i + i % 7)}) for i in range(80)]
    (workspace / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (workspace / "small.yaml").write_text(RECIPE)


def difference(ours: Path, theirs: Path) -> float:
    """The largest of any weight of two run folders' models."""
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (ours, theirs))
    return largest_difference(first, second)


def test_four_ranks_of_two_nodes_train_what_four_of_one_do(lab: Lab, workspace: Path) -> None:
    write_inputs(workspace)
    two = lab.submit(workspace, "small.yaml", "output=runs/two", nodes=2, gpus=2)
    two.wait("COMPLETED", deadline=300)
    assert two.fields()["ExitCode"] == "0:0" and two.fields()["NodeList"] == "node[1-2]"
    one = lab.submit(workspace, "small.yaml", "output=runs/one", nodes=1, gpus=4)
    one.wait("COMPLETED", deadline=300)
    assert [line["step"] for line in metrics(workspace / "runs" / "two") if "loss" in line] == list(range(1, 9))
    assert difference(workspace / "runs" / "two", workspace / "runs" / "one") <= 1e-6
    assert "Trained 8 steps" in two.said() and two.said().count("Model: ") == 1
    assert {entry.name for entry in (workspace / "runs").iterdir()} == {
        *("one", "one.sbatch", one.log.name, "two", "two.sbatch", two.log.name, "cache")
    }


@thorough
def test_a_finished_run_exits_with_0_every_time(lab: Lab, workspace: Path) -> None:
    """Twenty in a row, two ranks each, on two nodes."""
    write_inputs(workspace)
    values = ["train.steps=1", "eval.every=null", "data.eval_fraction=0", "checkpoint.every=null"]
    jobs = [lab.submit(workspace, "small.yaml", f"output=runs/{i}", *values) for i in range(20)]
    for job in jobs:
        job.wait("COMPLETED", "FAILED", deadline=300)
    assert [job.fields()["ExitCode"] for job in jobs] == ["0:0"] * 20, "\n".join(job.said() for job in jobs)


@pytest.mark.parametrize(
    ("options", "tasks", "message"),
    [
        pytest.param(
            ["--gpus-per-node=4"], 1, "1 tasks on node1, where the job has 4 GPUs", id="fewer-tasks-than-gpus"
        ),
        pytest.param(["--gpus-per-task=1"], 2, "sees only CUDA_VISIBLE_DEVICES=0 of the job's 2 GPUs", id="bound-gpus"),
    ],
)
def test_tasks_that_are_not_one_for_each_gpu_are_refused(
    lab: Lab, workspace: Path, options: list[str], tasks: int, message: str
) -> None:
    write_inputs(workspace)
    command = ["srun", "--nodes=2", f"--ntasks-per-node={tasks}", "--wait=3", *options]
    done = lab.login([*command, "python", "-m", "trainer", "train", "small.yaml"], workspace)
    assert done.code != 0 and done.stderr.count(message) == 1, done.everything
    assert not (workspace / "runs").exists()


def test_a_job_without_srun_is_refused(lab: Lab, workspace: Path) -> None:
    write_inputs(workspace)
    script = "#!/bin/bash\npython -m trainer train small.yaml\n"
    (workspace / "wrong.sbatch").write_text(script)
    done = lab.login(
        ["sbatch", "--wait", "--nodes=2", "--ntasks-per-node=2", "--output=log", "wrong.sbatch"], workspace
    )
    assert done.code == 2 and "4 tasks, but the process was started without srun" in (workspace / "log").read_text()


def test_what_sbatch_says_against_a_job_is_passed_on(lab: Lab, workspace: Path) -> None:
    write_inputs(workspace)
    command = ["python", "-m", "trainer", "submit", "small.yaml", "--nodes", "2", "--gpus", "2", "--time", "10"]
    done = lab.login([*command, "--partition", "gpus"], workspace)
    assert done.code == 2 and "sbatch refuses runs/strata.sbatch: " in done.stderr
    assert "invalid partition specified: gpus" in done.stderr
