"""A training run that several tests look at, and what is read from run folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.launching import (
    Finished,
    metrics,
)
from trainer.config.schema import TrainSource
from trainer.data.cache import tokenise
from trainer.data.tokenizer import bytes_tokenizer


@dataclass(frozen=True)
class Run:
    """A training run that several tests look at."""

    workspace: Path  # where it was started
    finished: Finished

    @property
    def folder(self) -> Path:
        return self.workspace / "runs" / "tiny"


def evaluation_samples(workspace: Path) -> Iterable[Mapping[str, Any]]:
    prepared = tokenise(
        train=[TrainSource(path=str(workspace / "train.jsonl"))],
        eval=(),
        eval_fraction=0.2,
        tokenizer=bytes_tokenizer(),
        max_length=48,
        overflow="truncate",
        packing=False,
        cache=workspace / "cache-of-test",
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


def nothing_was_trained(workspace: Path) -> bool:
    """No run folder and no model; a cache of tokenised data and its lock may lie there."""
    runs = workspace / "runs"
    return not runs.exists() or {entry.name for entry in runs.iterdir()} <= {"cache"}


def evaluations(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that hold an evaluation."""
    return [line for line in metrics(run_folder) if "eval_loss" in line]


def numbers(run_folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    timed = {"tokens_per_second", "step_seconds"}
    return [{key: value for key, value in line.items() if key not in timed} for line in metrics(run_folder)]
