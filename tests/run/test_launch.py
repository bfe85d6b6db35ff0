"""Whole runs through the real launchers: what a user types, what is printed, and what lies in the run folder."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests import forked
from tests.launching import (
    RECIPES,
    SCRIPT,
    deepspeed,
    environment,
    launch,
    metrics,
    start,
    torchrun,
    write_inputs,
)
from tests.run.whole_runs import Run, evaluation_samples, evaluations, loss_by_hand, nothing_was_trained, numbers
from trainer.config import RunConfig, load
from trainer.selectors import build


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """LISA under ZeRO-3 on two ranks, started in a folder of its own."""
    workspace = tmp_path_factory.mktemp("run")
    write_inputs(workspace)
    return Run(workspace, launch(deepspeed("tiny.yaml"), workspace))


# --- a run that works --------------------------------------------------------------------------------------------


def test_the_run_ends_well(run: Run) -> None:
    assert run.finished.code == 0, run.finished.everything
    assert "Traceback" not in run.finished.everything
    assert {entry.name for entry in run.folder.iterdir()} == {"config.yaml", "metrics.jsonl", "checkpoints", "model"}


def test_the_saved_configuration_is_the_run_s(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.workspace)
    saved = load(str(run.folder / "config.yaml"))
    assert saved == load("tiny.yaml")
    assert isinstance(saved, RunConfig) and saved.selector.blocks == 2


def test_metrics_hold_each_step_with_the_blocks_that_the_selector_draws(run: Run) -> None:
    steps = [line for line in metrics(run.folder) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    selector = build("uniform", seed=0, blocks=2, interval=2)
    drawn = [list(selector.select((line["step"] - 1) // 2, 4)) for line in steps]
    assert [line["active_blocks"] for line in steps] == drawn
    assert len({tuple(blocks) for blocks in drawn}) > 1, "a seed that never switches shows nothing"
    for line in steps:
        assert line["grad_norm"] > 0 and line["tokens_per_second"] > 0 and line["step_seconds"] > 0
    # Warm-up from nothing to the peak, then down again.
    assert [line["lr"] for line in steps] == pytest.approx([5e-3 * share for share in (0, 1, 0.8, 0.6, 0.4, 0.2)])


def test_metrics_hold_evaluations_before_during_and_after(run: Run) -> None:
    evaluations = {line["step"]: line["eval_loss"] for line in metrics(run.folder) if "eval_loss" in line}
    assert list(evaluations) == [0, 4, 6]
    assert evaluations[0] == pytest.approx(math.log(261), abs=0.2)  # untrained: near uniform over the vocabulary
    assert evaluations[6] < evaluations[4] < evaluations[0]


def test_the_first_lines_name_method_model_folder_data_and_plan_once_and_in_this_order(run: Run) -> None:
    lines = run.finished.stderr.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("lisa on "))
    assert lines[first] == "lisa on a random llama (53,856 parameters, fp32), 2 ranks, ZeRO stage 3"
    begin = [
        "run folder runs/tiny: 2 of 4 blocks at a time (uniform, ",
        "train ",
        "eval ",
        "loss: plain ",
        "planned peak ",
    ]
    for line, expected in zip(lines[first + 1 :], begin, strict=False):
        assert line.startswith(expected)
    assert run.finished.everything.count("lisa on a random llama") == 1


def test_the_plan_is_said_before_the_run_and_stands_in_the_metrics_after_it(run: Run) -> None:
    """On CPUs, which do not count, nothing is measured, and that is said."""
    assert "planned peak " in run.finished.everything and "planned, not measured on a CPU." in run.finished.stdout
    last = metrics(run.folder)[-1]
    assert last["step"] == 6 and last["planned_peak_bytes"] > 0 and last["measured_peak_bytes"] is None


def test_the_saved_model_has_the_last_evaluation_loss(run: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model").eval()
    assert model.dtype == torch.float32
    last = evaluations(run.folder)[-1]
    assert last["step"] == 6
    assert loss_by_hand(model, evaluation_samples(run.workspace)) == pytest.approx(last["eval_loss"], abs=1e-4)


def test_the_report_says_what_trained_how_far_the_loss_fell_and_where_the_model_is(run: Run) -> None:
    lines = metrics(run.folder)
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    times = [sum(index in line.get("active_blocks", []) for line in lines) for index in range(4)]
    _, _, report = run.finished.stdout.partition("\nTrained ")
    assert report.startswith("6 steps on 32 samples; always on: embeddings, head, norm.\n")
    assert f"Evaluation loss fell from {evaluations[0]:.4f} to {evaluations[-1]:.4f}.\n" in report
    for index, number in enumerate(times):
        assert re.search(rf"^  block   {index} {number:>6} #{{{math.ceil(30 * number / max(times))}}}$", report, re.M)
    assert "\nModel: runs/tiny/model\n" in report
    assert run.finished.stdout.count("Model: ") == 1, "every rank reports"


def test_a_run_says_nothing_that_nobody_can_act_on(run: Run) -> None:
    """What is left of others' words is the launcher's."""
    launchers = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[[A-Z]+\] \[(runner|launch)\.py:")
    said = [line for line in run.finished.everything.splitlines() if not launchers.match(line)]
    for words in ("Warning", "deprecated", "Writing model shards", "built successfully", "accelerator"):
        assert [line for line in said if words in line] == []


def test_what_deepspeed_guesses_is_not_said(tmp_path: Path) -> None:
    guessing = {name: value for name, value in environment().items() if name != "DS_ACCELERATOR"}
    start = "from trainer.cli.process import set_up_process; set_up_process()"
    guess = "from deepspeed.accelerator import get_accelerator; print(get_accelerator().device_name())"
    done = launch([sys.executable, "-c", f"{start}; {guess}"], tmp_path, variables=guessing)
    assert (done.code, done.stderr) == (0, "") and done.stdout.strip() in ("cpu", "cuda")


def test_a_run_that_diverges_stops_without_a_model_and_beside_an_earlier_run(run: Run) -> None:
    before = {file: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()}
    values = ["output=~/runs/tiny", "optimizer.lr=1e15", "schedule.warmup_steps=0", "train.max_skipped_steps=2"]
    finished = forked.run(["tiny.yaml", *values], run.workspace, variables={"HOME": str(run.workspace)})
    assert finished.code == 2, finished.everything
    message = "stopped at step 4: 3 steps in a row had NaN or infinite loss or gradients (train.max_skipped_steps is 2)"
    assert finished.everything.count(message) == 1
    assert "no model was written. Lower optimizer.lr (1000000000000000.0)" in finished.stderr
    assert "Traceback" not in finished.everything and "Model: " not in finished.everything

    second = run.folder.with_name("tiny-2")
    assert {entry.name for entry in second.iterdir()} == {"config.yaml", "metrics.jsonl"}
    steps = [line for line in metrics(second) if "loss" in line]
    assert steps[0]["loss"] == metrics(run.folder)[1]["loss"], "the same seed, data and weights"
    assert [line["loss"] for line in steps[1:]] == [None, None], "JSON has no NaN"
    assert before == {file: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()}


# --- other launchers, other outputs ------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_trains_the_same(run: Run, workspace: Path) -> None:
    finished = launch(torchrun("tiny.yaml"), workspace)
    assert finished.code == 0, finished.everything
    assert numbers(workspace / "runs" / "tiny") == numbers(run.folder)


@pytest.mark.slow
def test_one_process_without_a_launcher_trains_the_same(run: Run, workspace: Path) -> None:
    finished = launch([sys.executable, str(SCRIPT), "tiny.yaml"], workspace)
    assert finished.code == 0, finished.everything
    alone, together = numbers(workspace / "runs" / "tiny"), numbers(run.folder)
    assert [line.get("active_blocks") for line in alone] == [line.get("active_blocks") for line in together]
    for key in ("loss", "eval_loss", "grad_norm"):
        found = [line[key] for line in alone if key in line]
        assert found == pytest.approx([line[key] for line in together if key in line], rel=1e-4), key


@pytest.mark.slow
def test_a_run_whose_last_step_ruins_the_model_writes_none(workspace: Path) -> None:
    """No step was skipped: the weights were finite, the evaluation after them was not."""
    values = ["train.steps=1", "optimizer.lr=1e15", "schedule.warmup_steps=0", "eval.every=null"]
    finished = forked.run(["tiny.yaml", *values], workspace, ranks=1)
    assert finished.code == 2, finished.everything
    assert "\nstopped at step 1: the loss is nan; no model was written." in finished.stderr
    folder = workspace / "runs" / "tiny"
    assert {entry.name for entry in folder.iterdir()} == {"config.yaml", "metrics.jsonl"}
    assert numbers(folder)[-1] == {"step": 1, "eval_loss": None}


@pytest.mark.slow
def test_packed_rows_a_fused_loss_8_bit_moments_and_what_bf16_loses(workspace: Path) -> None:
    values = ["train.fused_loss=true", "data.packing=true", "model.dtype=bf16", "optimizer.name=adamw_8bit"]
    finished = forked.run(["tiny.yaml", *values, "optimizer.lr=1.0e-8", "eval.every=null"], workspace)
    assert finished.code == 0, finished.everything
    assert "packed into" in finished.stderr
    assert finished.stderr.count("WARNING: nearly all that a block learns will be rounded away") == 1
    folder = workspace / "runs" / "tiny"
    steps = [line for line in metrics(folder) if "loss" in line]
    assert steps[0].get("rounded_away") is None and steps[-1]["rounded_away"] > 0.9
    assert AutoModelForCausalLM.from_pretrained(folder / "model").dtype == torch.bfloat16


@pytest.mark.slow
def test_a_task_of_srun_that_does_not_know_its_place_is_refused(workspace: Path) -> None:
    """As in a container that lets few variables in: they would train twice, beside each other."""
    variables = environment() | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    process = start([sys.executable, str(SCRIPT), "tiny.yaml"], workspace, env=variables, stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "srun started 2 tasks, but SLURM_LOCALID, SLURM_NODEID" in said, said
    assert nothing_was_trained(workspace)


@pytest.mark.slow
def test_tensorboard_holds_the_metrics_in_the_run_s_own_folder(workspace: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    earlier = workspace / "runs" / "tiny"
    earlier.mkdir(parents=True)
    (earlier / "config.yaml").write_text("")
    finished = forked.run(["tiny.yaml", "monitor.tensorboard=true"], workspace, ranks=1)
    assert finished.code == 0, finished.everything
    folder = workspace / "runs" / "tiny-2"
    events = EventAccumulator(str(folder / "tensorboard" / "strata")).Reload()
    losses = {line["step"]: line["loss"] for line in metrics(folder) if "loss" in line}
    assert {event.step: event.value for event in events.Scalars("Train/loss")} == pytest.approx(losses)
    assert [event.step for event in events.Scalars("Eval/loss")] == [0, 4, 6]
    assert [entry.name for entry in earlier.iterdir()] == ["config.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_dry_run_of_each_recipe(run: Run, workspace: Path, recipe: Path) -> None:
    own = [f"model.path={run.folder / 'model'}", "data.train=train.jsonl", "data.eval_fraction=0.1"]
    own.append("data.max_length=64")  # as many as that model has positions
    own += ["schedule.warmup_steps=0", "schedule.warmup_ratio=null"]  # the run has seven steps
    own += ["update.budget=1000"] * (recipe.stem == "id3")
    values = [] if recipe.stem == "quickstart" else own
    finished = forked.run([str(recipe), *values, "output=runs/tiny", "--dry-run"], workspace, ranks=1)
    assert finished.code == 0, finished.everything
    stage = yaml.safe_load(recipe.read_text())["deepspeed"].removeprefix("zero")[0]
    assert f"each of 1 ranks stores, under ZeRO stage {stage}" in finished.stdout
    assert nothing_was_trained(workspace)
