"""trainer/cluster/submit.py: the job's file, against launch/slurm.sbatch, and requests that are refused."""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import SCRIPT, write_inputs
from trainer.__main__ import main
from trainer.cluster.submit import _seconds

TEMPLATE = (SCRIPT.parent / "slurm.sbatch").read_text()
JOB = ["--nodes", "2", "--gpus", "2", "--time", "12:00:00"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", "tiny.yaml", *words, "--print"]) == 0
    return capsys.readouterr().out


def test_the_job_is_the_file_to_read_with_values_filled_in(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that nobody gave are left out, and nothing else is different."""
    script = printed(capsys, *JOB, "--partition", "gpu", "selector.blocks=1", "--sbatch=--exclusive")
    changes = [line for line in difflib.ndiff(TEMPLATE.splitlines(), script.splitlines()) if line[0] in "+-"]
    assert [line[2:] for line in changes if line[0] == "+"] == [
        "#SBATCH --job-name=tiny",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --partition=gpu",
        f"#SBATCH --chdir={place}",
        "#SBATCH --output=runs/tiny-%j.log",
        "#SBATCH --exclusive",
        f"command=({sys.executable} -m trainer train tiny.yaml selector.blocks=1)",
    ]
    for line in (line[2:] for line in changes if line[0] == "-"):
        assert (
            line.startswith(("##SBATCH --", "#SBATCH --job-name", "#SBATCH --output", "command=("))
            or "-per-node=" in line
        )


def test_every_value_reaches_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    values = ["--account", "me", "--qos", "high", "--mem", "0", "--cpus", "12", "--notice", "600"]
    script = printed(capsys, *JOB, *values)
    for line in ("account=me", "qos=high", "mem=0", "cpus-per-task=12", "signal=USR1@600", "time=12:00:00", "nodes=2"):
        assert f"\n#SBATCH --{line}\n" in script
    assert "##SBATCH" not in script and "--partition" not in script


def test_settings_are_quoted_for_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    setting = "data.train=[{path: train.jsonl, weight: 2}]"
    script = printed(capsys, *JOB, setting)
    line = next(line for line in script.splitlines() if line.startswith("command=("))
    words = subprocess.run(["bash", "-c", line + '; printf "%s\\n" "${command[@]}"'], capture_output=True, text=True)
    assert words.stdout.splitlines() == [sys.executable, "-m", "trainer", "train", "tiny.yaml", setting]


def test_the_file_is_a_script(place: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(SCRIPT.parent / "slurm.sbatch")], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["train.steps=0"], "train.steps: got 0", id="configuration"),
        pytest.param(["--nodes", "3"], "is not a multiple of 6 ranks x train.micro_batch_size 1", id="ranks"),
        pytest.param(["--gpus", "0"], "argument --gpus: got '0'; allowed: integer >= 1", id="gpus"),
        pytest.param(["--time", "soon"], "argument --time: got 'soon'; allowed: hours:minutes:seconds", id="time"),
        pytest.param(["--time", "6"], "--notice: got 300 seconds, .* leaves nothing of --time 6", id="notice"),
        pytest.param(["--nodse", "3"], "unrecognized arguments: --nodse", id="unknown-option"),
    ],
)
def test_what_the_job_would_refuse_is_refused_before(
    words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["submit", "tiny.yaml", *JOB, *words])
    except SystemExit as error:  # of argparse
        code = int(str(error))
    assert code == 2 and re.search(message, capsys.readouterr().err)
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("10", 600), ("10:30", 630), ("2:00:00", 7200), ("2-00:00:01", 172801), ("1-12", 129600), ("1-1:30", 91800)],
)
def test_limits_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert _seconds(time) == seconds


def test_values_with_spaces_are_one_value(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "tiny.yaml", *JOB, "output=runs/my run", "--print"]) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --output='runs/my run-%j.log'" in said and "#SBATCH --job-name='my run'" in said


def test_without_slurm_there_is_nothing_to_submit_to(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", "tiny.yaml", *JOB]) == 2
    assert "sbatch: no such command" in capsys.readouterr().err and not (place / "runs").exists()
