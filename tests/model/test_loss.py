"""model/loss.py, and the step that divides it: ranks, accumulation and padding make no difference to the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor

import trainer
from tests import distributed
from tests.comparing import largest
from tests.engine.parity import Cell as EngineCell
from tests.engine.parity import deepspeed_config, full_weights, largest_difference
from tests.models import tiny_llama
from trainer.data.batches import IGNORED, SampleOrder, collate, count_targets
from trainer.model.loss import Objective, summed_loss
from trainer.run.step import train_step
from trainer.selectors import All

STEPS = 3
GLOBAL_BATCH = 8
NUM_SAMPLES = 20  # the third step crosses into the second epoch
CLIPPING = 0.5  # below the norms of all steps; it hides a wrong factor before all gradients, so not in every cell
# Adam's eps is large, so that a changed summation order is not amplified.
ADAM: dict[str, Any] = {"lr": 3e-3, "eps": 1e-3, "weight_decay": 0.0}


@dataclass(frozen=True)
class Cell:
    stage: int
    micro_batch_size: int
    clipping: float


# By number of ranks; accumulation is 8 down to 1.
CELLS = {
    1: [Cell(2, 8, 0.0), Cell(3, 1, CLIPPING)],
    2: [Cell(2, 1, CLIPPING), Cell(3, 2, 0.0)],
    4: [Cell(2, 2, 0.0), Cell(3, 1, 0.0)],
}


# --- the loss by hand --------------------------------------------------------------------------------------------


def test_loss_by_hand() -> None:
    """Two rows of three positions over two tokens; positions 0 and 1 predict labels 1 and 2."""
    logits = torch.zeros(2, 3, 2)
    logits[0, 0] = torch.tensor([0.0, 1.0])
    logits[0, 1] = torch.tensor([2.0, 0.0])
    logits[:, 2] = torch.tensor([50.0, -50.0])  # predicts what comes after the end
    labels = torch.tensor([[1, 1, 1], [0, IGNORED, 0]])
    # log(e^0 + e^1) - 1, log(e^2 + e^0) - 0, log 2
    by_hand = 0.3132616875 + 2.1269280110 + 0.6931471806
    assert summed_loss(logits, labels).item() == pytest.approx(by_hand, abs=1e-6)
    assert count_targets(labels) == 3


def test_loss_of_no_target_is_zero_and_has_a_gradient() -> None:
    """A rank may have none of a step's targets, and must still run backward."""
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = summed_loss(logits, torch.full((2, 3), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and not logits.grad.any()


def test_loss_of_bf16_logits_is_summed_in_fp32() -> None:
    logits = torch.zeros(1, 1001, 3, dtype=torch.bfloat16)
    loss = summed_loss(logits, torch.zeros(1, 1001, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1000 * 1.0986122887, rel=1e-5)  # bf16 has 1096 and 1104


# --- one step, however it is dealt -------------------------------------------------------------------------------


def ragged_samples() -> list[dict[str, list[int]]]:
    """3 to 16 tokens, of which between 1 and all but the first are targets."""
    generator = torch.Generator().manual_seed(11)
    samples = []
    for index in range(NUM_SAMPLES):
        length = 3 + (index * 5) % 14
        ids = torch.randint(64, (length,), generator=generator).tolist()
        num_masked = 1 + (index * 3) % (length - 1)
        samples.append({"input_ids": ids, "labels": [IGNORED] * num_masked + ids[num_masked:]})
    return samples


def micro_batches(step: int, *, micro_batch_size: int, rank: int, ranks: int) -> list[dict[str, Tensor]]:
    samples = ragged_samples()
    dealt = SampleOrder(
        [NUM_SAMPLES],
        seed=0,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=micro_batch_size,
        rank=rank,
        ranks=ranks,
    )
    return [collate([samples[i] for i in chosen], pad_id=0) for chosen in dealt.indices(step)]


def differences(rank: int, ranks: int, cells: list[Cell]) -> list[tuple[float, float]]:
    """Return how far losses and final weights of each cell are from the reference, at most; runs in each rank."""
    found = []
    for cell in cells:
        losses, weights = train(rank, ranks, cell)
        expected_losses, expected, _ = reference(cell.clipping)
        loss_difference = largest(abs(a - b) for a, b in zip(losses, expected_losses, strict=True))
        found.append((loss_difference, largest_difference(weights, expected)))
    return found


def train(rank: int, ranks: int, cell: Cell) -> tuple[list[float], dict[str, Tensor]]:
    """Return mean losses and final weights, through the loop's own step."""
    model = tiny_llama(layers=2).train()
    sparse = trainer.prepare(model, selector=All())
    accumulation = GLOBAL_BATCH // (ranks * cell.micro_batch_size)
    settings = EngineCell(stage=cell.stage, ranks=ranks, accumulation=accumulation, clipping=cell.clipping)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(sparse.param_groups(), **ADAM),
        config=deepspeed_config(settings, micro_batch=cell.micro_batch_size),
    )
    sparse.attach(engine)
    losses = []
    for step in range(STEPS):
        batches = micro_batches(step, micro_batch_size=cell.micro_batch_size, rank=rank, ranks=ranks)
        assert len(batches) == accumulation
        result = train_step(engine, Objective(model), batches)
        assert result.applied
        losses.append(float(result.loss_sum / result.targets))
    weights = full_weights(engine)
    engine.destroy()
    return losses, weights


def reference(clipping: float) -> tuple[list[float], dict[str, Tensor], list[float]]:
    """Return the same of one process without DeepSpeed: the mean over all target tokens of the global batch."""
    model = tiny_llama(layers=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses, norms = [], []
    for step in range(STEPS):
        (batch,) = micro_batches(step, micro_batch_size=GLOBAL_BATCH, rank=0, ranks=1)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clipping or math.inf)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}, norms


def test_the_data_is_ragged_enough_to_show_a_mean_of_means() -> None:
    """Every rank and micro-batch of a step has another number of targets, and clipping always binds."""
    counts = [
        [count_targets(b["labels"]) for b in micro_batches(0, micro_batch_size=2, rank=rank, ranks=2)]
        for rank in (0, 1)
    ]
    assert len({count for rank in counts for count in rank}) == 4
    assert sum(counts[0]) != sum(counts[1])
    assert min(reference(CLIPPING)[2]) > CLIPPING


@pytest.mark.parametrize("ranks", CELLS)
def test_ranks_accumulation_and_padding_do_not_change_the_weights(ranks: int) -> None:
    for answer in distributed.run(differences, ranks, CELLS[ranks], ranks=ranks):
        assert len(answer) == len(CELLS[ranks])
        for cell, found in zip(CELLS[ranks], answer, strict=True):
            assert max(found) <= 1e-6, (cell, found)
