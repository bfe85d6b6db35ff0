"""A share of the cases of `make fuzz`, in a process of its own: it forks, and no other test's threads must be there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.forks import in_fork
from tests.config.fuzz import Case, wrong
from tests.launching import Finished, environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_no_configuration_ends_in_a_traceback_or_hangs_and_refusals_name_the_key() -> None:
    command = [sys.executable, "-m", "tests.config.fuzz", "--cases", "200", "--seed", "20261128"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 cases" in done.stdout and "0 wrong" in done.stdout


CASE = Case(("train", "x.yaml"), {}, ("optimizer.lr", "optimizer"))


@pytest.mark.parametrize(
    ("outcome", "found"),
    [
        (Finished(0, "all well", ""), None),
        (Finished(1, "does not fit", ""), None),
        (Finished(2, "", "optimizer.lr: got 0"), None),
        (Finished(2, "", "something is wrong"), "none of ('optimizer.lr', 'optimizer') is named"),
        (Finished(70, "", "Traceback (most recent call last):\n  x\nKeyError: 'a'\n"), "KeyError: 'a'"),
        (Finished(0, "", "Traceback (most recent call last):\n  x\nKeyError: 'a'\n"), "KeyError: 'a'"),
        (Finished(-24, "", ""), "exit code -24"),
        (Finished(3, "", ""), "exit code 3"),
        (Finished(2, "", "optimizer.lr: got \x1b[2J"), "control characters ['\\x1b'] on the terminal"),
        (Finished(2, "", "optimizer.lr" * 10_000), "a message of 120,000 characters"),
    ],
)
def test_what_the_fuzzer_takes_for_wrong(outcome: Finished, found: str | None) -> None:
    assert wrong(CASE, outcome) == found


def test_a_fork_says_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself, with an exception, or by one of its limits."""
    monkeypatch.setattr("tests.config.forks.CPU_SECONDS", 1)
    monkeypatch.setattr("tests.config.forks.WALL_SECONDS", 5)
    assert in_fork(lambda: print("said") or 2, folder=tmp_path) == Finished(2, "said\n", "")
    failed = in_fork(lambda: 1 // 0, folder=tmp_path)
    assert failed.code == 70 and "ZeroDivisionError" in failed.stderr
    assert in_fork(lambda: sys.exit(5), folder=tmp_path).code == 5

    def spin() -> int:
        while True:
            pass

    def wait() -> int:
        import time

        time.sleep(60)
        return 0

    assert in_fork(spin, folder=tmp_path).code in (-24, -9)  # SIGXCPU, or the wall clock on a busy machine
    assert in_fork(wait, folder=tmp_path).code == -9
    assert "MemoryError" in in_fork(lambda: len(bytearray(2**36)), folder=tmp_path).stderr
