"""examples/: each is short and runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import forked
from tests.docs.pages import ROOT
from tests.launching import environment, free_port, launch

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What the last lines of some say: that something was learned.
SAID = {"trl_dpo": "'rewards/accuracies': '1'"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_runs(example: Path, tmp_path: Path) -> None:
    assert len(example.read_text().splitlines()) < 60
    finished = forked.script(example, tmp_path)
    assert finished.code == 0, finished.everything
    assert SAID.get(example.stem, "") in finished.everything


def test_the_loop_exports_as_its_first_lines_say(tmp_path: Path) -> None:
    example = ROOT / "examples" / "own_loop.py"
    port = ["--master_port", str(free_port())]
    variables = environment() | {"PYTHONPATH": str(ROOT)}
    trained = launch(["deepspeed", "--num_accelerators", "2", *port, str(example)], tmp_path, variables=variables)
    assert trained.code == 0, trained.everything
    words = next(line for line in example.read_text().splitlines() if "trainer export" in line).split()
    assert words[:3] == ["python", "-m", "trainer"]
    exported = forked.command(words[3:], tmp_path)
    assert exported.code == 0 and (tmp_path / words[5] / "model.safetensors").exists(), exported.everything
