"""The doctor on a real cluster, nodes that do not fit together, and the other launchers on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import SCRIPT
from tests.slurm.lab import Lab, thorough
from tests.slurm.test_submit import write_inputs
from trainer.cluster.doctor import EACH, TOGETHER

pytestmark = pytest.mark.slow

DOCTOR = ["python", "-m", "trainer", "doctor"]


@thorough
def test_doctor_from_the_login_node(lab: Lab, workspace: Path) -> None:
    done = lab.login([*DOCTOR, "--on-cluster", "--nodes", "2", "--gpus", "1"], workspace, deadline=240)
    assert done.code == 0 and done.stdout.startswith("2 of 2 nodes: node1, node2\n"), done.everything
    for name in [*EACH, *TOGETHER]:
        assert f"  {name} " in done.stdout
    assert "eth0 (10.77.0.11)" in done.stdout and "GB/s at each of 2 nodes (gloo" in done.stdout
    assert "All fit." in done.stdout


@thorough
def test_doctor_passes_a_partition_on(lab: Lab, workspace: Path) -> None:
    done = lab.login([*DOCTOR, "--on-cluster", "--nodes", "2", "--partition", "nowhere"], workspace, deadline=60)
    assert done.code == 1 and "invalid partition specified: nowhere" in done.stderr, done.everything


@thorough
def test_doctor_inside_a_job_finds_what_is_wrong(lab: Lab, workspace: Path) -> None:
    """A folder that each node has for itself, and GPUs that torch cannot see."""
    job = ["salloc", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"]
    doctor = ["env", "-u", "DS_ACCELERATOR", *DOCTOR, "--folder", str(lab.local)]
    done = lab.login([*job, *doctor], workspace, deadline=240)
    assert done.code == 1, done.everything
    assert f"FAIL  shared folder  {lab.local} is not one folder: node1 does not see what node2 writes" in done.stdout
    assert "but the job has 2 GPUs here" in done.stdout and "2 failures" in done.stdout


@thorough
def test_a_run_on_nodes_of_different_versions_or_without_a_common_folder_is_refused(lab: Lab, workspace: Path) -> None:
    write_inputs(workspace)
    old = workspace / "old" / "datasets-4.9.9.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 4.9.9\n")
    values = f"output={lab.local}/runs/strata data.cache={workspace}/cache"
    run = (
        f"[ $SLURM_NODEID = 0 ] || export PYTHONPATH={old.parent}:$PYTHONPATH; exec python -m trainer train small.yaml"
    )
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--wait=3", "bash", "-c"]
    done = lab.login([*command, f"{run} {values}"], workspace, deadline=240)
    assert done.code != 0 and "2 problems in the configuration" in done.stderr, done.everything
    assert done.stderr.count("nodes: datasets is 4.9.9 on node2, ") == 1
    assert done.stderr.count(f"output: {lab.local}/runs is not one folder: ") == 1


@thorough
def test_deepspeed_with_a_hostfile_trains_as_well(lab: Lab, workspace: Path) -> None:
    """Its launcher once on every node, which is how it starts without ssh."""
    write_inputs(workspace)
    (workspace / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    launcher = "deepspeed --hostfile hosts --no_ssh --node_rank $SLURM_NODEID --master_addr node1 --master_port 29501"
    values = "train.steps=2 eval.every=null data.eval_fraction=0 checkpoint.every=null"
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "bash", "-c"]
    done = lab.login([*srun, f"{launcher} {SCRIPT} small.yaml {values}"], workspace, deadline=300)
    assert done.code == 0 and "Trained 2 steps" in done.stdout, done.everything


@thorough
def test_torchrun_trains_as_well(lab: Lab, workspace: Path) -> None:
    write_inputs(workspace)
    launcher = (
        "torchrun --nnodes 2 --nproc_per_node 1 --node_rank $SLURM_NODEID --master_addr node1 --master_port 29502"
    )
    values = "train.steps=2 eval.every=null data.eval_fraction=0 checkpoint.every=null"
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "bash", "-c"]
    done = lab.login([*srun, f"{launcher} -m trainer train small.yaml {values}"], workspace, deadline=300)
    assert done.code == 0 and "Trained 2 steps" in done.stdout, done.everything
