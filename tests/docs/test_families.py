"""docs/families.md says what a tiny model of each family does."""

import pytest

from tests.docs.families import page
from tests.docs.pages import ROOT


@pytest.mark.slow
def test_the_table_of_families_is_true() -> None:
    assert (ROOT / "docs" / "families.md").read_text() == page()
