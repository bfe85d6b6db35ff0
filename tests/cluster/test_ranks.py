"""trainer/cluster/ranks.py: ranks from srun's variables, and launches that could train only by mistake."""

from __future__ import annotations

import pytest

from trainer.cluster.ranks import LaunchError, first_of_all, in_step, take_rank

# As Slurm 22.05 sets them in the last of three tasks, two on node07 and one on node09.
LAST_OF_THREE = {
    "SLURM_JOB_ID": "90017",
    "SLURM_JOB_NODELIST": "node[07,09]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.77.0.1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_STEP_NODELIST": "node[07,09]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURMD_NODENAME": "node09",
}
RANK = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def test_a_task_of_srun_is_a_rank() -> None:
    """The address is given; tests/slurm uses the real scontrol."""
    environment = LAST_OF_THREE | {"MASTER_ADDR": "node07"}
    take_rank(environment)
    assert environment == LAST_OF_THREE | RANK | {"MASTER_ADDR": "node07", "MASTER_PORT": "20017"}


@pytest.mark.parametrize(
    ("counts", "node", "here"), [("8(x2)", "1", "8"), ("2(x2),1(x3)", "1", "2"), ("2(x2),1", "2", "1")]
)
def test_tasks_of_a_node_are_counted(counts: str, node: str, here: str) -> None:
    environment = LAST_OF_THREE | {"SLURM_STEP_TASKS_PER_NODE": counts, "SLURM_NODEID": node, "MASTER_ADDR": "mine"}
    take_rank(environment)
    assert environment["LOCAL_WORLD_SIZE"] == here


def test_an_address_and_a_port_that_are_given_stand() -> None:
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    environment = LAST_OF_THREE | given
    take_rank(environment)
    assert environment == LAST_OF_THREE | RANK | given


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="no-launcher"),
        pytest.param(LAST_OF_THREE | {"RANK": "5", "WORLD_SIZE": "16"}, id="torchrun-under-srun"),
        pytest.param({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, id="job-of-one-task"),
        pytest.param({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "2"}, id="one-of-srun"),
    ],
)
def test_everything_else_stays_as_it_is(environment: dict[str, str]) -> None:
    before = dict(environment)
    take_rank(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        pytest.param(
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"},
            "this SLURM job has 16 tasks, but the process was started without srun .* put srun before the command",
            id="without-srun",
        ),
        pytest.param(
            {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"},
            "this SLURM job has 2 nodes, but the process was started without srun .* put srun before the command",
            id="nodes-without-srun",
        ),
        pytest.param(
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"},
            "this SLURM job has 16 tasks, but the process was started without srun",
            id="interactive-shell",
        ),
        pytest.param(
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"},
            "SLURM_STEP_TASKS_PER_NODE, SLURM_JOB_ID, SLURM_STEP_NODELIST did not reach this one",
            id="variables-dropped",
        ),
        pytest.param(
            LAST_OF_THREE | {"SLURM_GPUS_ON_NODE": "8"},
            "1 tasks on node09, where the job has 8 GPUs; .* set --ntasks-per-node=8, or --gpus-per-node=1",
            id="fewer-tasks-than-gpus",
        ),
        pytest.param(
            LAST_OF_THREE
            | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "1"},
            "task 2 on node09 sees only CUDA_VISIBLE_DEVICES=1 of the job's 2 GPUs there, .* use --gpus-per-node",
            id="gpus-bound-to-tasks",
        ),
        pytest.param(LAST_OF_THREE, r"`scontrol show hostnames node\[07,09\]` names no host", id="no-scontrol"),
        pytest.param({"RANK": "first"}, "RANK: got 'first'; allowed: integer >= 0", id="no-number"),
        pytest.param({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE: got '-1'; allowed: integer >= 0", id="below-zero"),
        pytest.param({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE: got '0'; allowed: integer >= 1", id="of-none"),
        pytest.param({"RANK": "3", "WORLD_SIZE": "2"}, "RANK is 3, but WORLD_SIZE is 2", id="rank-too-high"),
        pytest.param({"SLURM_NTASKS": "many"}, "SLURM_NTASKS: got 'many'; allowed: integer", id="no-number-of-tasks"),
        pytest.param(
            LAST_OF_THREE | {"SLURM_NODEID": "7", "MASTER_ADDR": "x"},
            "SLURM_NODEID is 7, but .* names fewer",
            id="node",
        ),
        pytest.param(
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "SLURM_STEP_NUM_TASKS": "2"},
            "mpirun started 2 processes, but RANK and WORLD_SIZE are not set",
            id="mpirun",
        ),
    ],
)
def test_a_launch_that_can_be_no_run_is_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match=message):
        take_rank(dict(environment))


JOB_SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    "environment", [JOB_SHELL, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, {"SLURM_JOB_NUM_NODES": "2"}]
)
def test_a_dry_run_is_one_process_wherever_it_is_typed(environment: dict[str, str]) -> None:
    """In the shell of a job it returns what must precede the command to train."""
    before = dict(environment)
    said = take_rank(environment, dry_run=True)
    assert environment == before and said is not None and said.startswith("put srun before the command")


def test_a_dry_run_refuses_the_tasks_that_a_run_refuses() -> None:
    with pytest.raises(LaunchError, match="where the job has 8 GPUs"):
        take_rank(dict(LAST_OF_THREE | {"SLURM_GPUS_ON_NODE": "8"}), dry_run=True)
    assert take_rank(dict(LAST_OF_THREE | {"MASTER_ADDR": "x"}), dry_run=True) is None


def test_who_speaks_before_ranks_are_known() -> None:
    assert first_of_all({}) and first_of_all({"RANK": "0", "SLURM_PROCID": "3"}) and first_of_all(JOB_SHELL)
    assert not first_of_all({"RANK": "1"}) and not first_of_all({"SLURM_PROCID": "3"})
    assert not in_step(JOB_SHELL) and in_step(LAST_OF_THREE) and not in_step({"SLURM_STEP_NUM_TASKS": "x"})
