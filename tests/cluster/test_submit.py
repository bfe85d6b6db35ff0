"""trainer/cluster/submit.py: the job's file, against launch/slurm.sbatch, and requests that are refused."""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import SCRIPT, write_inputs
from trainer.cli.main import main
from trainer.cluster.submit import _seconds

TEMPLATE = (SCRIPT.parent / "slurm.sbatch").read_text()
JOB = ["--nodes", "2", "--gpus", "2", "--time", "12:00:00"]


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", "tiny.yaml", *words, "--print"]) == 0
    return capsys.readouterr().out


def test_the_job_is_the_file_to_read_with_values_filled_in(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that were not given are left out, and nothing else differs."""
    script = printed(capsys, *JOB, "--partition", "gpu", "selector.blocks=1", "--sbatch=--exclusive")
    changes = [line for line in difflib.ndiff(TEMPLATE.splitlines(), script.splitlines()) if line[0] in "+-"]
    assert [line[2:] for line in changes if line[0] == "+"] == [
        "#SBATCH --job-name=tiny",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --partition=gpu",
        f"#SBATCH --chdir={workspace}",
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


def test_the_file_is_a_script(workspace: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(SCRIPT.parent / "slurm.sbatch")], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["train.steps=0"], "train.steps: got 0", id="configuration"),
        pytest.param(["--nodes", "3"], "is not a multiple of 6 ranks x train.micro_batch_size 1", id="ranks"),
        pytest.param(["--gpus", "0"], "argument --gpus: got '0'; allowed: integer >= 1", id="gpus"),
        pytest.param(["--time", "soon"], "argument --time: got 'soon'; allowed: hours:minutes:seconds", id="time"),
        pytest.param(
            ["--time", "6"], "--notice: got 300 seconds, .* leaves no time to train within --time 6", id="notice"
        ),
        pytest.param(["--gpus", "٣"], "argument --gpus: got '٣'; allowed: integer >= 1", id="other-digits"),
        pytest.param(["--gpus", "9" * 5000], "argument --gpus: got '999.*; allowed: integer >= 1", id="huge"),
        pytest.param(
            ["--time", "١:٠٠:٠٠"], "argument --time: got '١:٠٠:٠٠'; allowed: hours", id="time-in-other-digits"
        ),
        pytest.param(["--nodse", "3"], "unrecognized arguments: --nodse", id="unknown-option"),
    ],
)
def test_what_the_job_would_refuse_is_refused_before(
    words: list[str], message: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["submit", "tiny.yaml", *JOB, *words])
    except SystemExit as error:  # of argparse
        code = int(str(error))
    assert code == 2 and re.search(message, capsys.readouterr().err)
    assert not (workspace / "runs").exists()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("10", 600), ("10:30", 630), ("2:00:00", 7200), ("2-00:00:01", 172801), ("1-12", 129600), ("1-1:30", 91800)],
)
def test_limits_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert _seconds(time) == seconds


def test_values_with_spaces_are_one_value(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "tiny.yaml", *JOB, "output=runs/my run", "--print"]) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --output='runs/my run-%j.log'" in said and "#SBATCH --job-name='my run'" in said


def _submitted(*words: str) -> int:
    try:
        return main(["submit", "tiny.yaml", *JOB, *words, "--print"])
    except SystemExit as error:  # of argparse
        return int(str(error))


@pytest.mark.parametrize(
    "character", ["\n", "\r", "\t", "\v", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "\0", "\udcff"]
)
@pytest.mark.parametrize(
    ("words", "named"),
    [
        pytest.param(["--partition", "gpu{}#SBATCH --wrap=x"], "--partition: got", id="partition"),
        pytest.param(["--account", "a{}b"], "--account: got", id="account"),
        pytest.param(["--qos", "a{}b"], "--qos: got", id="qos"),
        pytest.param(["--mem", "1{}b"], "--mem: got", id="mem"),
        pytest.param(["--sbatch=--exclusive{}#SBATCH --x"], "exclusive", id="sbatch"),
        pytest.param(["output=runs/a{}b"], "output", id="output"),
        pytest.param(["data.train=[{}train.jsonl]"], "data.train", id="setting"),
        pytest.param(["model.random.a{}b=1"], "model.random", id="key"),
    ],
)
def test_no_value_becomes_a_line_of_the_job(
    words: list[str], named: str, character: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The terminal does not receive it unescaped either."""
    assert _submitted(*(word.format(character) if "{}" in word else word for word in words)) == 2
    said = capsys.readouterr()
    assert said.out == "" and named in said.err
    assert all(letter.isprintable() or letter == "\n" for letter in said.err)
    assert character == "\n" or character not in said.err
    assert "\n#SBATCH" not in said.err


def test_nor_does_the_name_of_the_recipe_or_of_the_current_folder(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workspace / "a\n#SBATCH --wrap=x"
    folder.mkdir()
    (folder / "tiny.yaml").write_bytes((workspace / "tiny.yaml").read_bytes())
    assert main(["submit", f"{folder}/tiny.yaml", *JOB, "data.train=train.jsonl", "--print"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "contains control characters" in said.err and "\n#SBATCH" not in said.err
    monkeypatch.chdir(folder)
    assert main(["submit", "tiny.yaml", *JOB, f"data.train={workspace}/train.jsonl", "--print"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "the current folder: got" in said.err and "\n#SBATCH" not in said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--partition", ""], "--partition: got nothing; leave the option out"),
        (["--partition", "a\\b"], "whose backslash sbatch would read as an escape character"),
        (["output=runs/a\\b"], "output: got 'a\\\\b', whose backslash sbatch would read"),
        (["output=runs/my-HetJob"], "output: got 'my-HetJob', in which sbatch reads hetjob or packjob"),
        (["--sbatch=exclusive"], "--sbatch: got 'exclusive'; allowed: an option of sbatch with its dashes"),
    ],
)
def test_values_that_sbatch_would_read_otherwise(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _submitted(*words) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err


def test_values_are_quoted_as_sbatch_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Test its comment sign, both kinds of quotes, and a percent sign before the job's number."""
    assert _submitted("--account", "a#b", 'output=runs/it\'s "5%"') == 0
    said = capsys.readouterr().out
    assert "\n#SBATCH --account='a#b'\n" in said
    assert """\n#SBATCH --output='runs/it'"'"'s "5%%"-%j.log'\n""" in said


def test_the_job_reads_its_words_as_submit_does(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the job, a file whose name looks like a setting would be one."""
    (workspace / "a=b.yaml").write_bytes((workspace / "tiny.yaml").read_bytes())
    assert main(["submit", "a=b.yaml", *JOB, "--print"]) == 2
    assert "RECIPE.yaml: missing; 'a=b.yaml' is a setting" in capsys.readouterr().err
    assert main(["submit", "./a=b.yaml", *JOB, "--print"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("output", [".", "..", "runs/.."])
def test_an_output_without_a_name_of_its_own(output: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _submitted(f"output={output}") == 0
    expected = (workspace / output).resolve()
    assert f"#SBATCH --output={expected}-%j.log" in capsys.readouterr().out


def test_without_slurm_there_is_nothing_to_submit_to(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", "tiny.yaml", *JOB]) == 2
    assert "sbatch: no such command" in capsys.readouterr().err and not (workspace / "runs").exists()
