"""Bank `discard`: a block that is drawn twice in a row starts anew; always-on parts keep their state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests import distributed
from tests.checkpoint import test_resume
from tests.checkpoint.test_resume import STEPS, resumed, saved, undisturbed
from tests.engine.dense_id3 import Case, compared
from tests.engine.parity import ADAM, Cell, batch, build_model, largest_difference, make_selector, reference, strata
from trainer.engine.sparse import Sparse

TOLERANCE = 1e-6
# Three of four blocks at each step: most are drawn again.
AGAIN = Cell(interval=1, blocks=3)
CELLS = (
    AGAIN,
    replace(AGAIN, stage=0, weight_decay=0.1),
    replace(AGAIN, stage=1, accumulation=2, clipping=0.3),
    replace(AGAIN, stage=2, offload=True),
    replace(AGAIN, stage=3, offload=True, interval=2, weight_decay=0.1),
    replace(AGAIN, stage=2, redrawn="keep"),
    replace(AGAIN, stage=3, redrawn="keep"),
    replace(AGAIN, lora=4),
    replace(AGAIN, selector="cyclic", always_on=()),  # a round of four ends with blocks of its first turn
)
# The same blocks throughout: nothing is drawn.
STANDING = (
    Cell(selector="fixed", blocks=(0, -1), interval=2),
    Cell(blocks=4, interval=2, stage=2),
    Cell(selector="cyclic", blocks=4, interval=2),
)


def _differences(rank: int, cells: tuple[Cell, ...]) -> list[str]:
    problems = []
    for cell in cells:
        weights, draws = strata(rank, cell)
        if rank == 0:
            expected, expected_draws = reference(cell)
            difference = largest_difference(weights, expected)
            if draws != expected_draws or not difference <= TOLERANCE:
                problems.append(f"{cell}: {difference:.2e}")
    return problems


def test_state_begins_anew_with_every_draw() -> None:
    # Or the reset would not show: kept state gives other weights.
    kept = reference(replace(AGAIN, redrawn="keep"))[0]
    assert largest_difference(reference(AGAIN)[0], kept) > 100 * TOLERANCE
    assert not distributed.run(_differences, (CELLS[0], CELLS[3], STANDING[1]), ranks=2)[0]


@pytest.mark.slow
def test_state_begins_anew_in_every_mode() -> None:
    assert not distributed.run(_differences, CELLS + STANDING, ranks=2, deadline=600)[0]


def test_selectors_know_whether_their_blocks_change() -> None:
    for cell, changes in (
        (Cell(), True),
        (Cell(blocks=4), False),
        (Cell(selector="all"), False),
        (Cell(selector="fixed", blocks=(0, -1)), False),
        (Cell(selector="cyclic", blocks=1), True),
        (Cell(selector="importance"), True),
    ):
        assert make_selector(cell).changes(4) == changes, cell


def _plain_adamw(cell: Cell) -> dict[str, Tensor]:
    model = build_model(cell)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": cell.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **ADAM)
    for step in range(cell.steps):
        optimizer.zero_grad()
        for rank in range(cell.ranks):
            ids = batch(step, 0, ranks=cell.ranks, rank=rank)
            (model(input_ids=ids, labels=ids).loss / cell.ranks).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_full_fine_tuning_is_plain_adamw(stage: int) -> None:
    """Over two borders of intervals."""
    cell = Cell(selector="all", blocks=0, depth=6, steps=18, interval=8, weight_decay=0.1, stage=stage)
    weights, _ = distributed.run(strata, cell, ranks=2)[0]
    assert largest_difference(weights, _plain_adamw(cell)) <= TOLERANCE


def _resumed_without_a_record(rank: int, cell: Cell, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint as 678ef04 wrote it, which did not record what became of such blocks (it kept their state)."""
    kept = replace(cell, redrawn="keep")
    expected = undisturbed(rank, kept)
    whole = Sparse.state_dict
    with mock.patch.object(Sparse, "state_dict", lambda self: {k: v for k, v in whole(self).items() if k != "redrawn"}):
        saved(rank, kept, folder, 5)
    return expected, resumed(rank, cell, folder)


def test_a_checkpoint_without_a_record_goes_on_as_it_began(tmp_path: Path) -> None:
    cell = replace(AGAIN, stage=2, steps=STEPS)
    expected, found = distributed.run(_resumed_without_a_record, cell, tmp_path, ranks=2)[0]
    assert largest_difference(expected, found) == 0.0


@pytest.mark.slow
def test_resuming_is_exact_where_blocks_are_drawn_again(tmp_path: Path) -> None:
    cells = [replace(AGAIN, steps=STEPS, stage=stage, interval=interval) for stage in (0, 2, 3) for interval in (1, 2)]
    cells.append(replace(AGAIN, steps=STEPS, redrawn="keep"))
    problems = distributed.run(test_resume._exact, cells, tmp_path, ranks=2)[0]
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("redrawn", ["reset", "keep"])
@pytest.mark.parametrize("stage", [2, 3])
def test_what_a_sparse_rule_keeps_begins_anew_too(stage: int, redrawn: str) -> None:
    cell = Cell(stage=stage, blocks=3, interval=1, redrawn=redrawn)
    for problems in distributed.run(compared, Case(cell, bias_correction="local"), ranks=2):
        assert not problems
