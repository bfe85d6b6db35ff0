"""Comparisons of figures fail on NaN, wherever it is."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch

from tests.comparing import largest, largest_difference

FOLDERS = [Path(__file__).parent, Path(__file__).parent.parent / "benchmarks"]


@pytest.mark.parametrize("values", [[math.nan, 1.0], [1.0, math.nan], [math.nan], [0.0, math.nan, 2.0]])
def test_nan_is_larger_than_every_bar(values: list[float]) -> None:
    assert largest(values) == math.inf
    tensors = {str(workspace): torch.tensor([0.0, value]) for workspace, value in enumerate(values)}
    assert largest_difference(tensors, {name: torch.zeros(2) for name in tensors}) == math.inf


def test_numbers_are_compared_as_numbers() -> None:
    assert largest([1.0, -3.0, 2.0]) == 2.0
    assert largest_difference({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([1.0, -1.0])}) == 3.0


def _problems(tree: ast.AST) -> list[int]:
    """Lines of `if found > BAR`, which lets NaN through: written `if not found <= BAR` it does not."""
    bars = ("TOLERANCE", "tolerance")
    lines = []
    for node in ast.walk(tree):
        tests = [node.test] if isinstance(node, ast.If | ast.IfExp) else []
        for compared in (inner for test in tests for inner in ast.walk(test) if isinstance(inner, ast.Compare)):
            bar = compared.comparators[0]
            small = isinstance(bar, ast.Constant) and isinstance(bar.value, float) and 0 < bar.value < 1e-2
            named = isinstance(bar, ast.Name) and bar.id in bars
            if isinstance(compared.ops[0], ast.Gt | ast.GtE) and (small or named):
                lines.append(compared.lineno)
    return lines


def test_no_comparison_reports_only_what_is_greater_than_a_bar() -> None:
    found = {
        f"{file.name}:{line}"
        for folder in FOLDERS
        for file in folder.rglob("*.py")
        for line in _problems(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert not found
    assert _problems(ast.parse("if difference > 1e-6: pass\nx = 1 if off > TOLERANCE else 2")) == [1, 2]
