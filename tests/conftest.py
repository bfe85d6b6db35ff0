"""What all tests share: the CPU unless they say otherwise, and a place of their own for what DeepSpeed compiles.

`make test` runs them in several processes (pytest-xdist), a file at a time in each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

OPERATORS = Path(__file__).resolve().parent.parent / "build" / "torch_extensions"
# Begun first, so that no process is left alone with a long file at the end. The longest on top.
LONG = (
    "tests/engine/test_parity.py",
    "tests/checkpoint/test_resume.py",
    "tests/engine/",
    "tests/checkpoint/",
    "tests/docs/test_extending.py",
    "tests/docs/test_examples.py",
    "tests/run/",
    "tests/integrations/",
    "tests/export/",
    "tests/cli/",
    "tests/slurm/",
    "tests/benchmarks/",
    "tests/planner/",
    "tests/accounting/",
)


def pytest_sessionstart(session: pytest.Session) -> None:
    torch.set_num_threads(1)  # threads that wait for a core spin, and these tensors are small
    os.environ["DS_ACCELERATOR"] = "cpu"  # where there is a GPU, too; tests that need it say so to distributed.run
    os.environ["TORCH_EXTENSIONS_DIR"] = str(OPERATORS)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each process would compile all of Strata anew
    if hasattr(session.config, "workerinput"):  # one of several processes, which may compile already
        return
    # A test that is killed while it compiles leaves a lock, for which everybody after it would wait for ever.
    for lock in OPERATORS.glob("**/lock"):
        lock.unlink()


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Restore the environment after each test: libraries change it, too. PEFT's BOFT leaves CXX=gcc behind, with which
    DeepSpeed's operators would be compiled once more, and again without it."""
    with mock.patch.dict(os.environ):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=lambda item: next((i for i, start in enumerate(LONG) if item.nodeid.startswith(start)), len(LONG)))


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist tests run one after the other
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        """A file at a time, for the sake of its fixtures; all of tests/slurm together, which share one cluster."""

        def _split_scope(self, nodeid: str) -> str:
            return "tests/slurm" if nodeid.startswith("tests/slurm/") else nodeid.partition("::")[0]

    return ByFile(config, log)
