"""The same command in the same place: one folder and the same model, whatever happened to the run and its files."""

from __future__ import annotations

import filecmp
import json
import signal
import sys
from pathlib import Path

import pytest

from tests import forked
from tests.checkpoint.kills import KINDS, Operations, Undisturbed, assert_same, campaign, undisturbed
from tests.launching import environment, launch, metrics, write_inputs
from trainer.config import load

pytestmark = pytest.mark.slow
VALUES = KINDS["LISA, ZeRO-2"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), VALUES)


def killed(workspace: Path, expected: Undisturbed, operation: str) -> Path:
    """Kill all ranks before the first such operation of rank 0 (a pattern); returns the run folder."""
    write_inputs(workspace)
    watch = Operations(workspace, victim=0, like=operation)
    finished = forked.start(expected.arguments, workspace, before=watch).wait(patience=0)
    assert finished.code == -signal.SIGKILL, finished.everything
    return workspace / "runs" / "tiny"


def once_more(workspace: Path, expected: Undisturbed, *more: str) -> str:
    """What a start of the same command, with `more`, prints; it ends well."""
    finished = forked.run([*expected.arguments, *more], workspace)
    assert finished.code == 0 and "Traceback" not in finished.everything, finished.everything
    return finished.everything


@pytest.mark.timeout(1200)
def test_kills_at_any_moment_change_nothing(tmp_path: Path) -> None:
    """A share of the 60 kills of `make kills`."""
    assert len(list(campaign(tmp_path, "LISA, ZeRO-2", kills=6, seed=1))) == 6


def test_the_command_of_the_campaign() -> None:
    alone = {name: value for name, value in environment().items() if name != "TORCH_EXTENSIONS_DIR"}
    command = [sys.executable, "-m", "tests.checkpoint.kills", "--kind", "IST, merged", "--kills", "2", "--seed", "1"]
    done = launch(command, Path(__file__).parents[2], variables=alone, deadline=600)
    assert done.code == 0 and "2 kills: one folder each" in done.stdout, done.everything


@pytest.mark.parametrize("operation", [r"metrics\.jsonl", r"rename .*/\.step-00000002\.json"])
def test_a_run_killed_before_its_first_checkpoint_begins_in_the_same_folder(
    tmp_path: Path, expected: Undisturbed, operation: str
) -> None:
    killed(tmp_path, expected, operation)
    assert "Trained 9 steps" in once_more(tmp_path, expected)
    assert_same(tmp_path, expected)


@pytest.mark.parametrize("operation", [r"remove .*/pool/00000009-.*\.json", r"remove .*/model/\.lock"])
def test_what_the_last_steps_of_a_killed_run_left_goes(tmp_path: Path, expected: Undisturbed, operation: str) -> None:
    """Also where no further checkpoint, and no further model, follows."""
    killed(tmp_path, expected, operation)
    once_more(tmp_path, expected)
    assert_same(tmp_path, expected)


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        (r"rename .*/\.model\.", "resuming after step 9, from "),
        (r"remove .*/lease\.json", "The run in runs/tiny is finished, and there is nothing left to do: see runs/tiny"),
    ],
    ids=["before", "after"],
)
def test_a_run_killed_around_the_moment_of_its_end_is_finished(
    tmp_path: Path, expected: Undisturbed, operation: str, said: str
) -> None:
    """Before and after its model has its name."""
    killed(tmp_path, expected, operation)
    assert said in once_more(tmp_path, expected)
    assert_same(tmp_path, expected)


def test_what_a_power_cut_leaves_is_survived_and_said(tmp_path: Path, expected: Undisturbed) -> None:
    """Settings of no length, and a metrics file in which two lines cannot be read."""
    run = killed(tmp_path, expected, r"rename .*/\.step-00000006\.json")
    (run / "config.yaml").write_bytes(b"")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert json.loads(lines[2])["step"] == 2
    lines[2] = bytes(len(lines[2]))  # the next line is damaged with it
    (run / "metrics.jsonl").write_bytes(b"".join(lines) + bytes(100))
    said = once_more(tmp_path, expected)
    assert "config.yaml is empty: its settings are those of its newest checkpoint" in said
    assert "metrics.jsonl: 2 lines (3," in said and "resuming after step 4, from " in said
    assert load(str(run / "config.yaml")).train.steps == 9
    assert not filecmp.dircmp(run / "model", expected.run / "model").diff_files
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == [1, 4, 5, 6, 7, 8, 9]
    assert "is finished" in once_more(tmp_path, expected)
    assert names(tmp_path) == {"tiny", "cache"}


def test_more_steps_after_the_end_begin_anew_and_name_the_way_on(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path, VALUES)
    before = {file: file.read_bytes() for file in expected.run.rglob("*") if file.is_file()}
    said = once_more(tmp_path, expected, "train.steps=10")
    found = "runs/tiny contains a finished run with other settings (train.steps: 9 there, 10 now)"
    way = f"resume=runs/tiny resumes from it; this run starts anew in {tmp_path}/runs/tiny-2"
    assert f"{found}; {way}" in said and "Trained 10 steps" in said
    for words in ("resuming after step 9, from runs/tiny/checkpoints/step-00000009.json", "tiny-3 is finished"):
        assert words in once_more(tmp_path, expected, "train.steps=10", "resume=runs/tiny")
    assert names(tmp_path) == {"tiny", "tiny-2", "tiny-3", "cache"}
    assert {file: file.read_bytes() for file in expected.run.rglob("*") if file.is_file()} == before


def names(workspace: Path) -> set[str]:
    return {entry.name for entry in (workspace / "runs").iterdir()}
