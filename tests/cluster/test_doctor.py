"""trainer/cluster/doctor.py and node.py on this machine; several nodes are tested in tests/slurm."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.launching import environment, launch
from trainer.cluster import doctor
from trainer.cluster.node import (
    BUILD_SECONDS,
    Finding,
    as_line,
    builds,
    check_build,
    check_compiler,
    check_disk,
    check_locks,
    check_network,
    from_line,
)


def test_a_finding_comes_back_from_its_line_and_other_lines_do_not() -> None:
    finding = Finding("disk", "FAIL", "0 GiB free", "make room")
    assert from_line(as_line("node1", finding)) == ("node1", finding)
    for line in ("", "Traceback", "3", "{}", '{"strata_doctor": "node1"}'):
        assert from_line(line) is None


def test_a_lock_that_nobody_holds_any_more_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert check_locks().status == "ok", "somebody compiles at this moment"
    os.utime(lock, (time.time() - 3600,) * 2)
    found = check_locks()
    assert found.status == "FAIL" and found.advice.endswith(f"rm {lock}")


def test_without_a_compiler_it_is_said_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_compiler().status == "ok"
    monkeypatch.setenv("PATH", "/nowhere")
    found = check_compiler()
    assert found.status == "FAIL" and found.said == "no g++" and "module load gcc" in found.advice


def test_a_folder_that_is_not_there_yet_is_judged_by_where_it_will_be(tmp_path: Path) -> None:
    found = check_disk(tmp_path / "runs" / "new")
    assert found.status == "ok" and found.said.startswith(f"{tmp_path} ")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written_fails() -> None:
    found = check_disk(Path("/proc/runs"))
    assert found.status == "FAIL" and found.said.startswith("/proc cannot be written")


def test_the_interface_is_that_of_the_host_s_address() -> None:
    found = check_network(alone=True)
    assert found.status == "ok"


def test_nodes_that_agree_are_one_line_and_those_that_differ_are_named() -> None:
    agreed = {name: Finding(name, "ok", "fine") for name in [*doctor.EACH, *doctor.TOGETHER]}
    other = agreed | {
        "versions": Finding("versions", "ok", "torch 1"),
        "async_io": Finding("async_io", "note", "no libaio", "install it"),
    }
    del other["clock"]
    lines, failures = doctor._report({"node1": agreed, "node2": other, "node3": agreed}, nodes=4)
    assert failures == 3
    assert lines[:2] == ["3 of 4 nodes: node1, node2, node3", "FAIL  nodes          not all have answered"]
    assert "ok    compiler       fine" in lines
    assert "ok    versions       torch 1 (node2)" in lines and "FAIL  versions       nodes differ" in lines
    assert lines[lines.index("note  async_io       no libaio (node2)") + 1] == "      -> install it"
    assert "FAIL  clock          no answer (node2)" in lines
    assert lines[-1] == "3 failures"


def test_on_cluster_needs_srun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert doctor.main(["--on-cluster"]) == 2
    assert "srun: no such command" in capsys.readouterr().err


def test_one_doctor_is_enough(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for task in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", task)
        assert doctor.main([]) == 2
    assert capsys.readouterr().err.count("leave srun out") == 1


@pytest.mark.slow
def test_what_the_compiler_says_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] || [ "$1" = -dumpfullversion ] && exec /usr/bin/g++ "$@"\n')
    broken.write_text(broken.read_text() + "echo 'cpu_adam.cpp:1: fatal error: no such header' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with builds(("cpu_adam",)) as running:
        found = check_build("cpu_adam", running["cpu_adam"], time.monotonic() + 4 * BUILD_SECONDS)
    assert found.status == "FAIL" and "fatal error: no such header" in found.said


@pytest.mark.slow
def test_this_machine(tmp_path: Path) -> None:
    """Run the whole command as a user does. It is no failure if a busy machine is still compiling."""
    variables = environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    done = launch(["python", "-m", "trainer", "doctor"], tmp_path, variables=variables | {"PYTHONPATH": os.getcwd()})
    assert done.code == 0, done.everything
    for name in doctor.EACH:
        assert f"  {name} " in done.stdout
    assert "FAIL" not in done.stdout and done.stdout.endswith("All fit.\n")
    assert list(tmp_path.iterdir()) == [], "the doctor leaves nothing behind"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "argument --nodes: got '0'; allowed: integer >= 1"),
        (["--nodes", "two"], "argument --nodes: got 'two'; allowed: integer >= 1"),
        (["--gpus", "-1"], "--gpus"),
        (["--partition", "a\nb"], r"argument --partition: got 'a\nb'; allowed: text without control characters"),
        (["--account", ""], "argument --account: got ''; allowed: text"),
        (["--folder", "~no-such-user-here/x"], "argument --folder: got '~no-such-user-here/x': no such home folder"),
        (["--folder", "a" * 300], ": File name too long; name another"),
    ],
)
def test_values_that_no_cluster_has_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--on-cluster", *words])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--nodes", "2"], ["--gpus", "8"], ["--partition", "x"], ["--account", "x"]])
def test_options_that_would_do_nothing_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main(words)
    message = f"argument {words[0]}: got {words[1]}, which is for --on-cluster; leave it out"
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_job_needs_no_job_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--on-cluster"])
    assert ended.value.code == 2 and "argument --on-cluster: this is a job already" in capsys.readouterr().err


def test_a_node_whose_variables_are_damaged_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "some")
    assert doctor.main(["--node"]) == doctor.EXIT_UNFIT
    found = from_line(capsys.readouterr().out)
    assert found is not None and found[1].name == "launch" and "SLURM_STEP_NUM_TASKS: got 'some'" in found[1].said
    lines, failures = doctor._report({found[0]: {"launch": found[1]}}, 1)
    assert failures and any(line.startswith("FAIL  launch         SLURM_STEP_NUM_TASKS") for line in lines)


def test_what_nodes_say_is_not_obeyed_by_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    finding = Finding("disk", "FAIL", "\x1b[2J", "\x1b]0;x\x07")
    code = f"print({as_line('a', finding)!r}); print('\\x1b[31mred')"
    found = doctor._collect([sys.executable, "-c", code], deadline=60)
    assert found == {"a": {"disk": finding}} and capsys.readouterr().err == "\\x1b[31mred\n"
