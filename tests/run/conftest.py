from pathlib import Path

import pytest

from tests.launching import write_inputs


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder with a small recipe and its data."""
    write_inputs(tmp_path)
    return tmp_path
