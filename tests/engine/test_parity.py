"""Invariant 3: training through Strata equals a plain single-process PyTorch loop with the same draws."""

from __future__ import annotations

import itertools
import pickle
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests import distributed
from tests.engine.parity import Cell, largest_difference, make_selector, reference, strata

TOLERANCE = 1e-6
# A reward rate at which the scores of these little models change draws within a few updates.
LOUD = 1.0e5

# What is crossed in `make test-slow`, and covered pair by pair in `make test` together with the further axes.
CROSS: dict[str, tuple] = {
    "stage": (0, 1, 2, 3),
    "ranks": (1, 2, 4),
    "bank": ("discard", "cpu"),
    "accumulation": (1, 2),
    "clipping": (0.0, 0.3),
    "schedule": (None, "cosine"),
}
FURTHER: dict[str, tuple] = {"weight_decay": (0.1, 0.0), "offload": (False, True), "interval": (2, 1)}
AXES = CROSS | FURTHER

# Beyond the cross: selectors, parts, structures, evaluation in between.
SPECIAL = [
    Cell(selector="all", blocks=0, weight_decay=0.1),
    Cell(selector="all", blocks=0, weight_decay=0.1, stage=2),
    Cell(selector="cyclic", blocks=1, interval=1, always_on=()),
    Cell(selector="cyclic", blocks=1, interval=1, always_on=(), stage=2, bank="cpu"),
    Cell(selector="fixed", blocks=(0, -1), stage=2),
    Cell(tied=True, checkpointing=True),
    Cell(tied=True, stage=1),
    Cell(checkpointing=True, always_on=("norm",), bank="cpu"),
    Cell(evaluate=True, extra={"zero": {"stage3_prefetch_bucket_size": 100_000, "stage3_max_live_parameters": 10**6}}),
    Cell(evaluate=True, stage=2, bank="cpu"),
    Cell(interval=1, blocks=3, bank="cpu"),
    Cell(family="mixtral", steps=6),
    Cell(family="gpt2", steps=6, stage=2),
    Cell(lora=4, weight_decay=0.1),
    Cell(lora=4, weight_decay=0.1, stage=2, bank="cpu", checkpointing=True),
    # IST: scores, draws and weights, at intervals of one step.
    *(
        Cell(selector="importance", lora=4, interval=1, bank="device", stage=stage, ranks=ranks, weight_decay=0.1)
        for stage in (0, 1, 2, 3)
        for ranks in (1, 2)
    ),
    Cell(selector="importance", lora=4, interval=2, bank="cpu", stage=3, accumulation=2, clipping=0.3),
    # What is learned decides what is drawn.
    Cell(selector="importance", lora=4, interval=1, bank="device", reward_rate=LOUD, dora=True),
    Cell(selector="importance", interval=1, bank="device", reward_rate=LOUD),
    Cell(selector="importance", interval=1, bank="device", reward_rate=LOUD, stage=2),
    Cell(lora=4, dora=True, selector="cyclic", blocks=1, interval=1, bank="device"),
    Cell(lora=4, selector="fixed", blocks=(0, -1), stage=2, bank="device"),
    Cell(bank="device", interval=1, blocks=2),
    Cell(bank="device", interval=1, blocks=2, stage=2, offload=True),
    # Buckets smaller than a gradient, and hooks replaced by a reduction at the boundary.
    Cell(stage=2, extra={"zero": {"reduce_bucket_size": 500, "overlap_comm": True}}, accumulation=2),
    Cell(stage=1, extra={"zero": {"contiguous_gradients": False}}, accumulation=2),
    Cell(stage=2, extra={"zero": {"parameter_alignment": True}}, bank="cpu"),
    Cell(stage=3, extra={"zero": {"contiguous_gradients": False, "reduce_bucket_size": 500}}),
]


def test_importance_changes_draws_where_it_should() -> None:
    """If these were equal, the cells above would show nothing."""
    for cell in SPECIAL:
        if cell.reward_rate == LOUD:
            _, draws = reference(replace(cell, stage=0, ranks=1))
            deaf = make_selector(cell)
            assert draws != [deaf.select(step, cell.depth) for step in range(cell.steps)], cell


def _cell(values: dict) -> Cell:
    """Return cells of four draws each."""
    return Cell(**values, steps=4 * values["interval"])


def full_cross() -> list[Cell]:
    """Return every point of the cross; the further axes take turns."""
    turns = itertools.cycle(_points(FURTHER))
    cells = []
    for point in _points(CROSS):
        values = point | next(turns)
        cells.append(_cell(values if values["stage"] else values | {"offload": False}))
    return cells


def _points(axes: dict[str, tuple]) -> list[dict]:
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def pairwise_cover() -> list[Cell]:
    """Return a few cells of the cross in which every pair of values of two axes occurs at least once."""
    generator = random.Random(0)
    points = [p for p in _points(AXES) if p["stage"] or not p["offload"]]  # stage 0 has no offload
    pairs = {_pair(p, a, b) for p in points for a, b in itertools.combinations(AXES, 2)}
    chosen = []
    while pairs:
        sample = generator.sample(points, 60)
        best = max(sample, key=lambda p: sum(_pair(p, a, b) in pairs for a, b in itertools.combinations(AXES, 2)))
        pairs -= {_pair(best, a, b) for a, b in itertools.combinations(AXES, 2)}
        chosen.append(_cell(best))
    return chosen


def _pair(point: dict, a: str, b: str) -> tuple:
    return a, point[a], b, point[b]


def _plain(cell: Cell) -> Cell:
    """Return the cell that says how the plain loop trains; a router's loss is a rank's own."""
    ranks = cell.ranks if cell.family else 1
    return replace(cell, stage=0, ranks=ranks, offload=False, evaluate=False, checkpointing=False, extra={})


def _references(rank: int, plains: Sequence[Cell]) -> dict[Cell, tuple]:
    """Return the plain loop's results for this rank's share of the cells."""
    return {plain: reference(plain) for plain in plains[rank::2]}


def _compare(rank: int, cells: Sequence[Cell], pickled: bytes) -> list[str]:
    """Return which cells of one process group differ from the references."""
    references: dict[Cell, tuple] = pickle.loads(pickled)
    problems = []
    for cell in cells:
        weights, draws = strata(rank, cell)
        expected, expected_draws = references[_plain(cell)]
        difference = largest_difference(weights, expected)
        if not difference <= TOLERANCE or draws != expected_draws:
            problems.append(f"{cell}: off by {difference:.2e}, draws equal: {draws == expected_draws}")
    return problems


def _run(cells: list[Cell], deadline: float) -> None:
    by_ranks: dict[int, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_ranks[cell.ranks].append(cell)
    plains = list(dict.fromkeys(map(_plain, cells)))
    first, second = distributed.run(_references, plains, ranks=2, deadline=deadline)
    references = pickle.dumps(first | second)  # by value: each shared tensor would take a file descriptor
    problems = []
    for ranks, group in sorted(by_ranks.items()):
        for found in distributed.run(_compare, group, references, ranks=ranks, deadline=deadline):
            problems += found
    assert not problems, "\n".join(problems)


def test_pairwise_cover_is_one() -> None:
    cells = pairwise_cover()
    assert len(cells) < 30
    for a, b in itertools.combinations(AXES, 2):
        seen = {(getattr(c, a), getattr(c, b)) for c in cells}
        wanted = set(itertools.product(AXES[a], AXES[b])) - ({(0, True)} if (a, b) == ("stage", "offload") else set())
        assert seen == wanted, (a, b, wanted - seen)


def test_pairs_of_settings() -> None:
    _run(pairwise_cover(), deadline=800)


@pytest.mark.parametrize("cells", [SPECIAL[::3], pytest.param(SPECIAL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_selectors_parts_and_structures(cells: list[Cell]) -> None:
    _run(cells, deadline=800)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_full_cross() -> None:
    cells = full_cross()
    assert len(cells) == 4 * 3 * 2**4
    assert len({tuple(getattr(c, a) for a in CROSS) for c in cells}) == len(cells)
    _run(cells, deadline=2400)


def test_reference_can_tell_a_wrong_bank() -> None:
    """The tolerance is far below what a mistake costs: state that is kept where it should be dropped shows."""
    discard, _ = reference(Cell(bank="discard"))
    kept, _ = reference(Cell(bank="cpu"))
    assert largest_difference(discard, kept) > 1000 * TOLERANCE
