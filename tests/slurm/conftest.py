"""One cluster for all tests of this folder, and a place that its nodes share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    lab = Lab(tmp_path_factory.mktemp("lab"))
    lab.local.mkdir()
    try:
        lab.control("up")
        yield lab
    finally:
        lab.control("down")


@pytest.fixture
def lab(cluster: Lab) -> Iterator[Lab]:
    """The cluster with all its nodes and no job."""
    yield cluster
    cluster.clear()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return tmp_path
