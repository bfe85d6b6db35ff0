"""trainer/cluster/together.py with real processes; several nodes are tested in tests/slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import distributed
from trainer.cluster.together import check_clock, check_nodes, check_shared, differences, unshared


def test_what_differs_is_said_with_its_hosts() -> None:
    ours, theirs = {"torch": "2.13.0", "peft": "0.21.2"}, {"torch": "2.12.0", "peft": "0.21.2"}
    assert differences({"node1": ours, "node2": ours}) == []
    (line,) = differences({"node1": ours, "node2": theirs, "node3": ours})
    assert line.startswith("torch is 2.12.0 on node2, 2.13.0 on node1 node3; allowed: one version")


def _look(rank: int, workspace: Path) -> tuple[list[str], str, str]:
    check_nodes(workspace / "runs" / "strata")  # one host: nothing is looked at
    assert not (workspace / "runs").exists()
    return unshared(workspace / "file" / "below"), check_shared(workspace / "runs").status, check_clock().status


@pytest.mark.slow
def test_ranks_write_and_see_each_other_s_files_and_leave_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answers = distributed.run(_look, tmp_path, ranks=2)
    assert answers[0] == answers[1]
    problems, shared, clock = answers[0]
    assert len(problems) == 1 and f"{tmp_path / 'file' / 'below'} cannot be written on " in problems[0]
    assert (shared, clock) == ("ok", "ok") and list((tmp_path / "runs").iterdir()) == []
