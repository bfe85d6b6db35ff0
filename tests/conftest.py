"""What all tests share: a place of their own for the operators that DeepSpeed compiles."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

OPERATORS = Path(__file__).resolve().parent.parent / "build" / "torch_extensions"


def pytest_sessionstart(session: pytest.Session) -> None:
    """A test that is killed while it compiles leaves a lock, for which everybody after it would wait for ever."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(OPERATORS)
    for lock in OPERATORS.glob("**/lock"):
        lock.unlink()
