"""Whole runs through the real launchers: what a user types, what is printed, and what lies in the run folder."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.launching import (
    RECIPES,
    SCRIPT,
    Finished,
    deepspeed,
    environment,
    launch,
    metrics,
    rank_process,
    start,
    torchrun,
    write_inputs,
)
from trainer.config import RunConfig, help_text, load
from trainer.config.schema import TrainSource
from trainer.data import prepare
from trainer.data.tokenizer import bytes_tokenizer
from trainer.selectors import build


@dataclass(frozen=True)
class Run:
    """A training run that several tests look at."""

    place: Path  # where it was started
    finished: Finished

    @property
    def folder(self) -> Path:
        return self.place / "runs" / "tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """LISA under ZeRO-3 on two ranks, started in a folder of its own."""
    place = tmp_path_factory.mktemp("run")
    write_inputs(place)
    return Run(place, launch(deepspeed("tiny.yaml"), place))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    return tmp_path


def evaluation_samples(place: Path) -> Iterable[Mapping[str, Any]]:
    prepared = prepare(
        train=[TrainSource(path=str(place / "train.jsonl"))],
        eval=(),
        eval_fraction=0.2,
        tokenizer=bytes_tokenizer(),
        max_length=48,
        overflow="truncate",
        packing=False,
        cache=place / "cache-of-test",
        seed=0,
    )
    assert prepared.eval is not None
    return prepared.eval


def loss_by_hand(model: nn.Module, samples: Iterable[Mapping[str, Any]]) -> float:
    """Mean loss over the target tokens of `samples`, one sample at a time."""
    total, count = 0.0, 0
    for sample in samples:
        ids, labels = (torch.tensor(sample[key]).long() for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        chosen = [position for position in range(1, len(ids)) if labels[position] != -100]
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        total -= sum(float(logprobs[position - 1, labels[position]]) for position in chosen)
        count += len(chosen)
    return total / count


def nothing_was_trained(place: Path) -> bool:
    """No run folder and no model; a cache of tokenised data and its lock may lie there."""
    runs = place / "runs"
    return not runs.exists() or {entry.name for entry in runs.iterdir()} <= {"cache"}


# --- a run that works --------------------------------------------------------------------------------------------


def evaluations(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that hold an evaluation."""
    return [line for line in metrics(run_folder) if "eval_loss" in line]


def test_the_run_ends_well(run: Run) -> None:
    assert run.finished.code == 0, run.finished.everything
    assert "Traceback" not in run.finished.everything
    assert {entry.name for entry in run.folder.iterdir()} == {"config.yaml", "metrics.jsonl", "checkpoints", "model"}


def test_the_saved_configuration_is_the_run_s(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.place)
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
    assert loss_by_hand(model, evaluation_samples(run.place)) == pytest.approx(last["eval_loss"], abs=1e-4)


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


def test_a_run_that_diverges_stops_without_a_model_and_beside_an_earlier_run(run: Run) -> None:
    before = {file: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()}
    values = ["output=~/runs/tiny", "optimizer.lr=1e15", "schedule.warmup_steps=0", "train.max_skipped_steps=2"]
    finished = launch(deepspeed("tiny.yaml", *values), run.place, home=run.place)
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


# --- no run at all -----------------------------------------------------------------------------------------------


def test_help(place: Path) -> None:
    finished = launch([sys.executable, str(SCRIPT), "--help"], place)
    assert (finished.code, finished.stdout, finished.stderr) == (0, help_text(), "")


def test_dry_run_prints_blocks_always_on_parts_and_bytes_and_trains_nothing(place: Path) -> None:
    finished = launch(deepspeed("tiny.yaml", "--dry-run", "model.dtype=bf16", "always_on.head=false"), place)
    assert finished.code == 0, finished.everything
    said = finished.stdout
    # A block: q and o 32 x 32, k and v 16 x 32, three MLP matrices 64 x 32, two norms.
    block, embeddings, norm = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32, 261 * 32, 32
    assert "blocks: 4 at model.layers, 9,280 parameters in the first" in said and block == 9280
    assert f"always on: embeddings, {embeddings:,} parameters (model.embed_tokens.weight)" in said
    assert f"always on: norm, {norm} parameters (model.norm.weight)" in said
    assert "always on: head" not in said
    assert f"trained at a time: {2 * block + embeddings + norm:,} parameters; 2 of 4 blocks at a time" in said
    total, trained = 4 * block + 2 * embeddings + norm, 2 * block + embeddings + norm
    for name, size in (("weights", 2 * total), ("gradients", 2 * trained), ("masters", 4 * trained)):
        assert re.search(rf"^  {name} +{size / 2 / 1024:.1f} KiB$", said, re.M), (name, said)
    assert said.count("blocks: 4 at") == 1, "every rank describes the run"
    assert nothing_was_trained(place)


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        pytest.param(
            ["selector.block=3", "data.train=trian.jsonl"],
            [
                "2 problems in the configuration:\n",
                "  - selector.block: unknown key for selector uniform; nearest: 'selector.blocks'\n",
                "  - data.train: no such file: 'trian.jsonl'; nearest: 'train.jsonl'\n",
            ],
            id="before-torch",
        ),
        pytest.param(
            ["train.micro_batch_size=4"],
            [
                "  - train.global_batch_size: 4 is not a multiple of 2 ranks x train.micro_batch_size 4 = 8; "
                "nearest valid: train.global_batch_size=8, or train.micro_batch_size=2\n"
            ],
            id="with-the-ranks",
        ),
        pytest.param(
            ["data.train=odd.jsonl"],
            ["odd.jsonl:2: column question, answer missing: the row has {text}, but the format is qa "],
            id="with-the-data",
        ),
        pytest.param(
            ["selector.blocks=5"],
            ["  - selector.blocks: 5; allowed: 1 to 4, the number of blocks of this model\n"],
            id="with-the-model",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_once_and_leaves_nothing(
    place: Path, values: list[str], messages: list[str]
) -> None:
    rows = '{"question": "One and one?", "answer": "Two"}\n{"text": "free"}\n'
    (place / "odd.jsonl").write_text(rows)
    finished = launch(deepspeed("tiny.yaml", *values), place)
    assert finished.code == 2, finished.everything
    for message in messages:
        assert finished.everything.count(message) == 1, finished.everything
    assert "Traceback" not in finished.everything
    assert nothing_was_trained(place)


@pytest.fixture
def endless(place: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run that is in the middle of its training, and the file that its output goes to."""
    output = place / "output.txt"
    with output.open("w") as file:
        values = ["train.steps=1000000", "schedule.warmup_steps=null", "eval.every=null"]
        process = start(deepspeed("tiny.yaml", *values), place, stdout=file, stderr=subprocess.STDOUT)
        try:
            written = place / "runs" / "tiny" / "metrics.jsonl"
            end = time.monotonic() + 120
            while not (written.exists() and '"step": 3,' in written.read_text()):
                assert process.poll() is None and time.monotonic() < end, output.read_text()
                time.sleep(0.1)
            yield process, output
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


# Rank 0, because DeepSpeed's launcher blames the last rank whoever died.
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="ranks watch each other through Linux's pidfd_open")
def test_a_killed_rank_ends_the_job_which_says_which_one_it_was(
    endless: tuple[subprocess.Popen[str], Path],
) -> None:
    process, output = endless
    victim = rank_process(process.pid, 0)
    os.kill(victim, signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    said = output.read_text()
    assert said.count("ended before the run did") == 1, said
    assert f"\nrank 0 (process {victim}) ended before the run did" in said
    assert not (output.parent / "runs" / "tiny" / "model").exists()


# --- other launchers, other outputs ------------------------------------------------------------------------------


def numbers(run_folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    timed = {"tokens_per_second", "step_seconds"}
    return [{key: value for key, value in line.items() if key not in timed} for line in metrics(run_folder)]


@pytest.mark.slow
def test_torchrun_trains_the_same(run: Run, place: Path) -> None:
    finished = launch(torchrun("tiny.yaml"), place)
    assert finished.code == 0, finished.everything
    assert numbers(place / "runs" / "tiny") == numbers(run.folder)


@pytest.mark.slow
def test_one_process_without_a_launcher_trains_the_same(run: Run, place: Path) -> None:
    finished = launch([sys.executable, str(SCRIPT), "tiny.yaml"], place)
    assert finished.code == 0, finished.everything
    alone, together = numbers(place / "runs" / "tiny"), numbers(run.folder)
    assert [line.get("active_blocks") for line in alone] == [line.get("active_blocks") for line in together]
    for key in ("loss", "eval_loss", "grad_norm"):
        found = [line[key] for line in alone if key in line]
        assert found == pytest.approx([line[key] for line in together if key in line], rel=1e-4), key


@pytest.mark.slow
def test_a_run_whose_last_step_ruins_the_model_writes_none(place: Path) -> None:
    """No step was skipped: the weights were finite, the evaluation after them was not."""
    values = ["train.steps=1", "optimizer.lr=1e15", "schedule.warmup_steps=0", "eval.every=null"]
    finished = launch([sys.executable, str(SCRIPT), "tiny.yaml", *values], place)
    assert finished.code == 2, finished.everything
    assert "\nstopped at step 1: the loss is nan; no model was written." in finished.stderr
    folder = place / "runs" / "tiny"
    assert {entry.name for entry in folder.iterdir()} == {"config.yaml", "metrics.jsonl"}
    assert numbers(folder)[-1] == {"step": 1, "eval_loss": None}


@pytest.mark.slow
def test_packed_rows_a_fused_loss_8_bit_moments_and_what_bf16_loses(place: Path) -> None:
    values = ["train.fused_loss=true", "data.packing=true", "model.dtype=bf16", "optimizer.name=adamw_8bit"]
    finished = launch(deepspeed("tiny.yaml", *values, "optimizer.lr=1.0e-8", "eval.every=null"), place)
    assert finished.code == 0, finished.everything
    assert "packed into" in finished.stderr
    assert finished.stderr.count("WARNING: nearly all that a block learns will be rounded away") == 1
    folder = place / "runs" / "tiny"
    steps = [line for line in metrics(folder) if "loss" in line]
    assert steps[0].get("rounded_away") is None and steps[-1]["rounded_away"] > 0.9
    assert AutoModelForCausalLM.from_pretrained(folder / "model").dtype == torch.bfloat16


@pytest.mark.slow
def test_a_task_of_srun_that_does_not_know_its_place_is_refused(place: Path) -> None:
    """As in a container that lets few variables in: they would train twice, beside each other."""
    variables = environment() | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    process = start([sys.executable, str(SCRIPT), "tiny.yaml"], place, env=variables, stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "srun started 2 tasks, but SLURM_LOCALID, SLURM_NODEID" in said, said
    assert nothing_was_trained(place)


@pytest.mark.slow
def test_tensorboard_holds_the_metrics_in_the_run_s_own_folder(place: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    earlier = place / "runs" / "tiny"
    earlier.mkdir(parents=True)
    (earlier / "config.yaml").write_text("")
    finished = launch([sys.executable, str(SCRIPT), "tiny.yaml", "monitor.tensorboard=true"], place)
    assert finished.code == 0, finished.everything
    folder = place / "runs" / "tiny-2"
    events = EventAccumulator(str(folder / "tensorboard" / "strata")).Reload()
    losses = {line["step"]: line["loss"] for line in metrics(folder) if "loss" in line}
    assert {event.step: event.value for event in events.Scalars("Train/loss")} == pytest.approx(losses)
    assert [event.step for event in events.Scalars("Eval/loss")] == [0, 4, 6]
    assert [entry.name for entry in earlier.iterdir()] == ["config.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_dry_run_of_each_recipe(run: Run, place: Path, recipe: Path) -> None:
    own = [f"model.path={run.folder / 'model'}", "data.train=train.jsonl", "data.eval_fraction=0.1"]
    own.append("data.max_length=64")  # as many as that model has positions
    own += ["update.budget=1000"] * (recipe.stem == "id3")
    values = [] if recipe.stem == "quickstart" else own
    finished = launch([sys.executable, str(SCRIPT), str(recipe), *values, "output=runs/tiny", "--dry-run"], place)
    assert finished.code == 0, finished.everything
    stage = yaml.safe_load(recipe.read_text())["deepspeed"].removeprefix("zero")[0]
    assert f"each of 1 ranks holds, under ZeRO stage {stage}" in finished.stdout
    assert nothing_was_trained(place)


# --- real data ---------------------------------------------------------------------------------------------------

GSM8K = SCRIPT.parent.parent.parent / "shared" / "data" / "gsm8k"
GSM8K_LENGTH = 288  # bytes: a short row, of which there are 471 to train and 74 to evaluate on
GSM8K_RECIPE = f"""\
method: lisa
model:
  random:
    model_type: llama
    hidden_size: 256
    intermediate_size: 768
    num_hidden_layers: 6
    num_attention_heads: 4
    num_key_value_heads: 2
    max_position_embeddings: {GSM8K_LENGTH}
  dtype: fp32
selector: {{blocks: 2, interval: 10}}
optimizer: {{lr: 1.0e-3}}
schedule: {{name: cosine, warmup_steps: 20}}
train: {{steps: 200, global_batch_size: 4, micro_batch_size: 2}}
eval: {{micro_batch_size: 8}}
data: {{train: train.jsonl, eval: test.jsonl, max_length: {GSM8K_LENGTH}, overflow: error}}
deepspeed: zero3
"""
# What is always on trains as in the other run. The blocks' rate is so small that adding an update to a weight gives
# that weight again, which the guard would stop.
EMBEDDINGS_ONLY = ["optimizer.lr=1e-30", "optimizer.lr_always_on=1e-3", "train.guard_every=0"]


def copy_short_rows(folder: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        lines = (GSM8K / name).read_text(encoding="utf-8").splitlines()
        texts = [(line, json.loads(line)) for line in lines]
        short = [
            line
            for line, row in texts
            if len(f"Question: {row['question']}\nAnswer: {row['answer']}".encode()) < GSM8K_LENGTH
        ]
        (folder / name).write_text("\n".join(short), encoding="utf-8")


def blocks_of(model_folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Weights by block."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(model_folder / "model.safetensors").items():
        if match := re.match(r"model\.layers\.(\d+)\.", name):
            found.setdefault(int(match[1]), {})[name] = tensor
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs GSM8K in {GSM8K}")
def test_lisa_learns_more_of_gsm8k_than_embeddings_alone(tmp_path: Path) -> None:
    """The same weights, samples and steps on two ranks under ZeRO-3, once with blocks and once without."""
    copy_short_rows(tmp_path)
    (tmp_path / "gsm8k.yaml").write_text(GSM8K_RECIPE)
    for name, values in (("lisa", []), ("embeddings", EMBEDDINGS_ONLY)):
        finished = launch(deepspeed("gsm8k.yaml", *values, f"output=runs/{name}"), tmp_path, deadline=800)
        assert finished.code == 0, finished.everything
    lisa, embeddings = tmp_path / "runs" / "lisa", tmp_path / "runs" / "embeddings"
    assert metrics(lisa)[0] == metrics(embeddings)[0], "the same weights to start from"
    assert evaluations(lisa)[-1]["step"] == evaluations(embeddings)[-1]["step"] == 200
    assert evaluations(lisa)[-1]["eval_loss"] < evaluations(embeddings)[-1]["eval_loss"]
    assert evaluations(embeddings)[-1]["eval_loss"] < evaluations(lisa)[0]["eval_loss"]

    trained, untrained = blocks_of(lisa / "model"), blocks_of(embeddings / "model")
    drawn = {index for line in metrics(lisa) for index in line.get("active_blocks", [])}
    assert len(drawn) > 2
    for index, weights in trained.items():
        for name, tensor in weights.items():
            assert torch.equal(tensor, untrained[index][name]) == (index not in drawn), name
            assert "norm" not in name or bool((untrained[index][name] == 1).all()), "a weight moved at rate 1e-30"

    model = AutoModelForCausalLM.from_pretrained(lisa / "model").eval()
    assert 4.5e6 < model.num_parameters() < 5.5e6
    prepared = prepare(
        train=[TrainSource(path=str(tmp_path / "test.jsonl"))],
        eval=(),
        eval_fraction=0.0,
        tokenizer=bytes_tokenizer(),
        max_length=GSM8K_LENGTH,
        overflow="error",
        packing=False,
        cache=tmp_path / "cache-of-test",
        seed=0,
    )
    assert loss_by_hand(model, prepared.train) == pytest.approx(evaluations(lisa)[-1]["eval_loss"], abs=1e-4)
