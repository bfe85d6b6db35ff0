"""What all tests share: the CPU unless they say otherwise, and a place of their own for what DeepSpeed compiles."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

OPERATORS = Path(__file__).resolve().parent.parent / "build" / "torch_extensions"


def pytest_sessionstart(session: pytest.Session) -> None:
    """A test that is killed while it compiles leaves a lock, for which everybody after it would wait for ever."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # where there is a GPU, too; tests that need it say so to distributed.run
    os.environ["TORCH_EXTENSIONS_DIR"] = str(OPERATORS)
    for lock in OPERATORS.glob("**/lock"):
        lock.unlink()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
