"""Planned bytes against measured ones on the real engine, in a few of the cases of benchmarks/memory_plan.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import distributed

CASES = (
    *("stage 2, embeddings frozen", "stage 2, gpt2", "stage 3, offload", "stage 3, checkpointing"),
    *(f"stage 2, {family}" for family in ("gemma3", "qwen3-moe")),
)


def _compare(rank: int) -> list[tuple[str, float]]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from memory_plan import CASES as ALL
    from memory_plan import Size, compare

    size = Size(blocks=4, vocabulary=1024, length=128)  # as exact as the benchmark's, in half the time
    return [(case.name, compare(case, size)["ratio"]) for case in ALL if case.name in CASES]


@pytest.mark.slow
def test_planned_peaks_are_within_a_twentieth_of_measured_ones() -> None:
    for ratios in distributed.run(_compare, ranks=2, deadline=280):
        assert len(ratios) == len(CASES)
        assert all(0.95 <= ratio <= 1.05 for _, ratio in ratios), ratios
