"""Train once for all tests of exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import distributed
from tests.export.trained_run import Trained, train, write_base


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export_run")
    write_base(place / "base")
    return place


@pytest.fixture(scope="session")
def trained(place: Path) -> Trained:
    return distributed.run(train, place, ranks=2)[0]
