"""`python -m trainer`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import write_inputs
from trainer.cli.main import COMMANDS, Command, main


def test_usage_is_made_of_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(COMMANDS, "weigh", Command("no.such.module:main", "[--heavy] RUN", "says what a run weighs"))
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    left = " ".join(" ".join(line[:59] for line in lines).split())
    right = " ".join(" ".join(line[59:] for line in lines[2:]).split())
    for name, command in COMMANDS.items():
        assert f"{name} {command.arguments}" in left
        assert command.purpose in right
    assert re.search(r"^  weigh \[--heavy\] RUN +says what a run weighs$", "\n".join(lines), re.MULTILINE)
    assert main([]) == 2


def test_a_command_is_imported_when_it_is_called() -> None:
    code = "import sys, trainer.cli.main; print(sorted(name for name in sys.modules if name in sys.argv[1:]))"
    modules = [command.function.partition(":")[0] for command in COMMANDS.values()]
    found = subprocess.run([sys.executable, "-c", code, "torch", *modules], capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr) == ("[]\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_modules_that_import_torch_are_marked(command: str) -> None:
    """The process is prepared before torch is imported."""
    module = COMMANDS[command].function.partition(":")[0]
    code = f"import sys, {module}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.stdout == f"{COMMANDS[command].imports_torch}\n", found.stderr


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "unknown command 'trian'" in (text := capsys.readouterr().err) and "train" in text.splitlines()[0]


def test_train_is_the_entry_point(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert "train.global_batch_size" in capsys.readouterr().out
    assert main(["train", "train.steps=0"]) == 2
    assert "train.steps" in capsys.readouterr().err


# What the shell of `salloc --nodes 2 --ntasks 16` has in its environment.
JOB_SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"}


def _code(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as error:  # of argparse
        return int(str(error))


@pytest.fixture
def in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shell of a job of several tasks, in a folder with a recipe."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, value in JOB_SHELL.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.usefixtures("in_a_job")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("words", [["-h"], ["--help"], ["--no-such", "a", "b=", "--help"], ["--gpus", "x", "-h"]])
def test_help_comes_wherever_it_is_asked_for(
    command: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _code(command, *words) == 0
    said = capsys.readouterr()
    assert said.out.lower().startswith("usage: ") and said.err == ""


def test_one_rank_of_several_prints_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert main(["train", "--help"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("in_a_job")
def test_a_dry_run_in_the_shell_of_a_job_is_of_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny.yaml", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "each of 1 ranks stores" in said.out
    assert "What a single rank would do. To train, put srun before the command" in said.err
    assert "16 tasks" in said.err


@pytest.mark.usefixtures("in_a_job")
def test_training_in_the_shell_of_a_job_is_refused_still(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny.yaml"]) == 2
    assert "put srun before the command" in capsys.readouterr().err


@pytest.mark.usefixtures("in_a_job")
def test_other_commands_work_in_the_shell_of_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny.yaml", "--gpus", "2"]) == 0
    assert main(["prepare", "tiny.yaml", "--show", "1"]) == 0
    assert main(["submit", "tiny.yaml", "--gpus", "2", "--time", "1:00:00", "--print"]) == 0
    capsys.readouterr()
    assert main(["checkpoints", "runs/tiny"]) == 2
    assert "no checkpoint in runs/tiny" in capsys.readouterr().err
    assert main(["export", "runs/tiny", "out"]) == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("resume=/nonexistent", "resume: no such folder: /nonexistent"),
        ("resume=runs/other/checkpoints/step-00000001.json", "step-00000001.json"),
        ("resume=ds.json", "resume: ds.json is no checkpoint"),
        ("output=/proc/x", "output: '/proc/x' cannot be written"),
        ("deepspeed=ds.json", "deepspeed: DeepSpeed refuses this configuration: ValidationError"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(
    setting: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "wandb": {"enabled": [1]}}')
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny.yaml", setting, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_counts_the_steps_of_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    more = ["train.steps=null", "train.epochs=1", "schedule.warmup_steps=50", "--dry-run"]
    assert main(["train", "tiny.yaml", *more]) == 2
    assert "schedule.warmup_steps: 50, but the run has 8 steps" in capsys.readouterr().err


@pytest.mark.parametrize("command", [*COMMANDS, "no-such-\x1b[31mcommand"])
@pytest.mark.parametrize(
    "word", ["\x1b[31mred", "--\x1b]0;title\x07", "a=\x1b[2J", "\x9b31m.yaml", "--gpus=\x1b[m", "\udcff"]
)
def test_what_is_echoed_is_not_obeyed_by_a_terminal(
    command: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _code(command, word, word, word) == 2
    said = "".join(capfd.readouterr())
    assert said and all(letter.isprintable() or letter == "\n" for letter in said)
