"""Train once for all tests of exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import distributed
from tests.export.trained_run import Trained, train, write_base


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("export_run")
    write_base(workspace / "base")
    return workspace


@pytest.fixture(scope="session")
def trained(workspace: Path) -> Trained:
    return distributed.run(train, workspace, ranks=2)[0]
