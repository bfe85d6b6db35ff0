"""trainer/export/unfinished.py: several processes write the same folder, and some of them are killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.export.unfinished import Unfinished


def write(folder: Path, text: str) -> Unfinished:
    unfinished = Unfinished(folder)
    (unfinished.path / "model.txt").write_text(text)
    return unfinished


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_published_first_stays(tmp_path: Path) -> None:
    out = tmp_path / "a[b]*"
    first, second = write(out, "first"), write(out, "second")
    first.publish(replace=False)
    with pytest.raises(FileExistsError, match="was created by another process in the meantime"):
        second.publish(replace=False)
    second.remove()
    assert (out / "model.txt").read_text() == "first" and names(tmp_path) == [out.name] and names(out) == ["model.txt"]
    third = write(out, "third")
    third.publish(replace=True)
    assert (out / "model.txt").read_text() == "third" and names(tmp_path) == [out.name]
    for unfinished in (first, second, third):
        unfinished.close()


def test_an_empty_folder_is_filled_and_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    unfinished = write(tmp_path / "out", "x")
    unfinished.publish(replace=False)
    unfinished.close()
    assert names(tmp_path / "out") == ["model.txt"]
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    unfinished = write(tmp_path / "link", "x")
    with pytest.raises(FileExistsError):
        unfinished.publish(replace=False)
    assert not names(tmp_path / "target")
    unfinished.remove()
    unfinished.close()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    living = write(tmp_path / "out", "living")
    process = os.fork()
    if not process:
        write(tmp_path / "out", "killed")
        os._exit(0)  # nothing is closed or removed
    os.waitpid(process, 0)
    assert len(names(tmp_path)) == 2
    another = write(tmp_path / "out", "another")
    assert set(names(tmp_path)) == {living.path.name, another.path.name}
    for unfinished in (living, another):
        unfinished.remove()
        unfinished.close()
    assert not names(tmp_path)
