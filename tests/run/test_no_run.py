"""What ends before training, or in the middle of it: help, dry runs, refusals, and a rank that is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import forked
from tests.launching import (
    SCRIPT,
    Finished,
    deepspeed,
    launch,
    rank_process,
    start,
)
from tests.run.whole_runs import nothing_was_trained
from trainer.config import help_text
from trainer.run.setup import emulates


def test_help(workspace: Path) -> None:
    finished = launch([sys.executable, str(SCRIPT), "--help"], workspace)
    assert (finished.code, finished.stdout, finished.stderr) == (0, help_text(), "")


def test_dry_run_prints_blocks_always_on_parts_and_bytes_and_trains_nothing(workspace: Path) -> None:
    finished = forked.run(["tiny.yaml", "--dry-run", "model.dtype=bf16", "always_on.head=false"], workspace)
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
    assert "\nloss: plain (train.fused_loss: auto, and the vocabulary of 261 is smaller than 32768)\n" in said
    assert ("WARNING: this CPU has no arithmetic for model.dtype=bf16 and emulates it" in said) == emulates("bf16")
    assert nothing_was_trained(workspace)


def by_launcher(arguments: list[str], workspace: Path) -> Finished:
    return launch(deepspeed(*arguments), workspace)


def by_forks(arguments: list[str], workspace: Path) -> Finished:
    return forked.run(arguments, workspace)


BERT = "model.random={model_type: bert, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 4, " + (
    "num_attention_heads: 4, max_position_embeddings: 64}"
)


@pytest.mark.parametrize(
    ("start_ranks", "values", "messages"),
    [
        pytest.param(
            by_launcher,
            ["selector.block=3", "data.train=trian.jsonl"],
            [
                "2 problems in the configuration:\n",
                "  - selector.block: unknown key for selector uniform; nearest: 'selector.blocks'\n",
                "  - data.train: no such file: 'trian.jsonl'; nearest: 'train.jsonl'\n",
            ],
            id="before-torch",
        ),
        pytest.param(
            by_forks,
            ["train.micro_batch_size=4"],
            [
                "  - train.global_batch_size: 4 is not a multiple of 2 ranks x train.micro_batch_size 4 = 8; "
                "nearest valid: train.global_batch_size=8, or train.micro_batch_size=2\n"
            ],
            id="with-the-ranks",
        ),
        pytest.param(
            by_forks,
            ["data.train=odd.jsonl"],
            ["odd.jsonl:2: column question, answer missing: the row has {text}, but the format is qa "],
            id="with-the-data",
        ),
        pytest.param(
            by_forks,
            ["selector.blocks=5"],
            ["  - selector.blocks: 5; allowed: 1 to 4, the number of blocks of this model\n"],
            id="with-the-model",
        ),
        pytest.param(
            by_forks,
            [BERT, "model.tokenizer=bytes", "deepspeed=zero3"],
            ["model.random: BertLMHeadModel sees tokens that come later, so it cannot be trained to predict them"],
            id="with-the-engine",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_once_and_leaves_nothing(
    workspace: Path, start_ranks: Callable[[list[str], Path], Finished], values: list[str], messages: list[str]
) -> None:
    rows = '{"question": "One and one?", "answer": "Two"}\n{"text": "free"}\n'
    (workspace / "odd.jsonl").write_text(rows)
    finished = start_ranks(["tiny.yaml", *values], workspace)
    assert finished.code == 2, finished.everything
    for message in messages:
        assert finished.everything.count(message) == 1, finished.everything
    assert "Traceback" not in finished.everything
    assert nothing_was_trained(workspace)


@pytest.fixture
def endless(workspace: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run that is in the middle of its training, and the file that its output goes to."""
    output = workspace / "output.txt"
    with output.open("w") as file:
        values = ["train.steps=1000000", "schedule.warmup_steps=null", "eval.every=null"]
        process = start(deepspeed("tiny.yaml", *values), workspace, stdout=file, stderr=subprocess.STDOUT)
        try:
            written = workspace / "runs" / "tiny" / "metrics.jsonl"
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
