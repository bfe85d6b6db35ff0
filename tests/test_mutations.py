"""A share of the campaign in tests/mutations.py: `make mutations` runs more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.launching import environment, launch


@pytest.mark.slow
def test_damaged_files_are_named_or_do_not_matter(tmp_path: Path) -> None:
    """In a process of its own, which has no threads when it forks."""
    command = [sys.executable, "-m", "tests.mutations", "--cases", "40", "--seed", "11"]
    root = str(Path(__file__).parent.parent)
    finished = launch(command, tmp_path, deadline=900, variables=environment() | {"PYTHONPATH": root})
    assert finished.code == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
