"""Publish files: whole or not at all, and through no link."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.run.folders import contents
from trainer.checkpoint import disk


def test_a_file_that_is_published_has_a_name_of_its_own_until_then(tmp_path: Path) -> None:
    """And neither a link nor a file that stands in its way is touched."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / ".target.partial").symlink_to(mine)
    (tmp_path / "target").symlink_to(mine)
    disk.publish(tmp_path / "target", b"new")
    assert (tmp_path / "target").read_bytes() == b"new" and not (tmp_path / "target").is_symlink()
    with pytest.raises(FileExistsError):
        disk.write(tmp_path / "target", [b"other"])
    with pytest.raises(FileExistsError):
        disk.write(tmp_path / ".target.partial", [b"other"])
    assert (tmp_path / "target").read_bytes() == b"new" and mine.read_text() == "mine"
    assert contents(tmp_path) == {"mine", ".target.partial", "target"}
    with pytest.raises(OSError, match="symbolic link"):
        disk.read(tmp_path / ".target.partial")


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_signal_while_a_file_is_published_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    (tmp_path / "target").write_text("old")
    monkeypatch.setattr(disk, "sync_folder", lambda folder: None)

    def told(*_: Any) -> None:
        raise SystemExit(75)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, moment, told)
        disk.publish(tmp_path / "target", b"new")
    assert contents(tmp_path) == {"target"} and (tmp_path / "target").read_text() == "old"
