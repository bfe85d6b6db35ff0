"""metrics.jsonl: what a run that goes on keeps of it, and what a damaged one costs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from trainer.run.importance_plot import draw_importance
from trainer.run.progress import Progress, read_metrics

RECORDS: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 3.0},
    {"step": 1, "importance": [0.5, 0.25]},
    {"step": 1, "loss": 2.0},
    {"step": 2, "loss": None},
    {"step": 2, "importance": [0.1, 1e-17]},
    {"step": 3, "loss": 1.0},
    {"step": 4, "loss": 0.5},
    {"step": 4, "planned_peak_bytes": 7, "measured_peak_bytes": None},
]
LINES = [json.dumps(record).encode() + b"\n" for record in RECORDS]


def go_on(folder: Path, capsys: pytest.CaptureFixture[str], step: int = 4) -> tuple[Progress, str]:
    """The progress of a run that resumes after `step`, and what it said."""
    progress = Progress(folder, engine=None, total_steps=9, rank=0, first_step=step)  # type: ignore[arg-type]
    return progress, capsys.readouterr().err


def test_what_came_later_and_the_summary_are_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"".join(LINES))
    progress, said = go_on(tmp_path, capsys)
    assert file.read_bytes() == b"".join(LINES[:-1]) and said == ""
    progress.summary(9, planned_peak_bytes=7, measured_peak_bytes=None)
    progress.close()
    assert [record.get("planned_peak_bytes") for _, record in read_metrics(file)[0]].count(7) == 1
    go_on(tmp_path, capsys, step=2)[0].close()
    assert file.read_bytes() == b"".join(LINES[:5])


def test_what_was_learned_before_is_no_news(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"".join(LINES[:-1]))
    progress, _ = go_on(tmp_path, capsys)
    progress.importance(5, (0.1, 1e-17))
    progress.importance(6, (0.2, 1e-17))
    progress.close()
    assert file.read_bytes() == b"".join(LINES[:-1]) + b'{"step": 6, "importance": [0.2, 1e-17]}\n'


DAMAGED = {
    "NULs": bytes(40) + b"\n",
    "NULs in a line": LINES[2][:9] + bytes(4) + LINES[2][9:],
    "no UTF-8": b'{"step": 2, "\xff": 1}\n',
    "binary": b"\x80" + os.urandom(30).replace(b"\n", b"") + b"\n",
    "a cut line": LINES[2][:12] + b"\n",
    "two lines in one": LINES[2][:12] + LINES[3],
    "no record": b"7\n",
    "no step": b'{"loss": 1.0}\n',
    "a step that is none": b'{"step": "2", "loss": 1.0}\n',
    "true": b'{"step": true, "loss": 1.0}\n',
    "NaN": b'{"step": 2, "loss": NaN}\n',
    "deep": b"[" * 100_000 + b"\n",
    "a number of 9,000 digits": b'{"step": ' + b"9" * 9000 + b"}\n",
    "nothing": b"\n",
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_dropped_and_named_and_the_others_are_kept(
    tmp_path: Path, damaged: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"".join([*LINES[:2], damaged, *LINES[2:6], damaged, damaged, *LINES[6:-1]]))
    progress, said = go_on(tmp_path, capsys)
    progress.close()
    assert file.read_bytes() == b"".join(LINES[:-1])
    assert said == f"{file}: 3 lines (3,8-9) cannot be read, as after a power cut, and dropped; the others are kept\n"
    assert draw_importance(tmp_path, [1, 2])[0][1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("left", [b"", bytes(300), LINES[0][:-1], os.urandom(300).replace(b"\n", b"")])
def test_so_is_a_whole_file(tmp_path: Path, left: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(left)
    progress, said = go_on(tmp_path, capsys)
    progress.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"" and ("cannot be read" in said) == bool(left)
    assert draw_importance(tmp_path, [1, 2]) == []


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("there", [True, False])
def test_no_link_is_followed(tmp_path: Path, step: int, there: bool, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    if there:
        mine.write_bytes(b"".join(LINES))
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.jsonl", ".metrics.jsonl.partial"):
        (folder / name).symlink_to(mine)
    progress, said = go_on(folder, capsys, step)
    progress.summary(9, planned_peak_bytes=7)
    progress.close()
    assert (folder / "metrics.jsonl").read_bytes() == b'{"step": 9, "planned_peak_bytes": 7}\n'
    assert not (folder / "metrics.jsonl").is_symlink() and ("was a link" in said) == bool(step)
    assert (mine.read_bytes() == b"".join(LINES)) if there else not mine.exists()


def test_the_picture_takes_the_place_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(LINES))
    (tmp_path / "importance.png").symlink_to(tmp_path / "mine")
    draw_importance(tmp_path, [1, 2])
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "importance.png").is_symlink()
