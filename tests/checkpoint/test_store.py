"""Files of checkpoints: whole at any moment of a kill, checked before use, removed when nothing refers to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer.checkpoint import disk
from trainer.checkpoint.contents import Contents
from trainer.checkpoint.store import CheckpointError, Manifest, Store
from trainer.cli.checkpoints import main as list_checkpoints


def save(
    store: Store, step: int, changed: dict[str, float], earlier: Manifest | None = None, keep: int = 2
) -> Manifest:
    """A checkpoint of two ranks, in which unit u has ten elements of value changed[u]."""
    units = dict(earlier.units) if earlier else {}
    for unit, value in changed.items():
        units[unit] = [
            store.write(
                step,
                f"{unit}-r{rank}",
                {f"weight:{unit}": torch.full((5,), float(value))},
                {"ranges": json.dumps({unit: [5 * rank, 5 * rank + 5]}), "scalars": "{}"},
            )
            for rank in range(2)
        ]
    manifest = Manifest(step, units, {"best": None, "ranks": 2})
    store.publish(manifest)
    store.prune(keep)
    return manifest


def values(store: Store, step: int) -> dict[str, float]:
    """What a checkpoint holds, after all its files were checked."""
    manifest = store.read(step)
    assert [store.problem(file) for file in manifest.files] == [None] * len(manifest.files)
    contents = Contents(store, manifest.units)
    contents.learn(manifest.units)
    found = {unit: contents.read("weight", unit, 0, 10) for unit in manifest.units}
    assert all(bool((tensor == tensor[0]).all()) and tensor.numel() == 10 for tensor in found.values())
    return {unit: float(tensor[0]) for unit, tensor in found.items()}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """The file operations from here on."""
    operations: list[tuple[str, tuple[Any, ...]]] = []

    def record(name: str) -> Callable[..., None]:
        real = getattr(disk, name)

        def recording(*arguments: Any) -> None:
            operations.append((name, arguments))
            real(*arguments)

        return recording

    for name in ("write", "rename", "remove"):
        monkeypatch.setattr(disk, name, record(name))
    return operations


def test_every_prefix_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, recorded: list[tuple[str, tuple[Any, ...]]]
) -> None:
    """The third save, which shares files with the second and removes the first. A write may also be cut short."""
    run = tmp_path / "run"
    store = Store(run)
    first = save(store, 10, {"a": 1.0, "b": 1.0, "c": 1.0})
    second = save(store, 20, {"a": 2.0}, first)
    shutil.copytree(run, tmp_path / "before")
    recorded.clear()
    save(store, 30, {"a": 3.0, "b": 3.0}, second)
    operations = list(recorded)
    assert {name for name, _ in operations} == {"write", "rename", "remove"}
    before, after = {"a": 2.0, "b": 1.0, "c": 1.0}, {"a": 3.0, "b": 3.0, "c": 1.0}
    outcomes = []
    for count in range(len(operations) + 1):
        for torn in (False, True):
            shutil.rmtree(run)
            shutil.copytree(tmp_path / "before", run)
            for name, arguments in operations[:count]:
                _REAL[name](*arguments)
            if torn and count < len(operations) and operations[count][0] == "write":
                path, parts = operations[count][1]
                data = b"".join(parts)
                path.write_bytes(data[: len(data) // 2])
            found = values(store, store.steps()[0])
            assert found == (after if store.steps()[0] == 30 else before)
            outcomes.append(store.steps()[0])
            # And the run goes on: another save works, whatever lies about.
            save(store, 40, {"a": 4.0}, store.read(store.steps()[0]))
            assert values(store, 40) == {**found, "a": 4.0}
    assert outcomes == sorted(outcomes) and set(outcomes) == {20, 30}


_REAL = {"write": disk.write, "rename": disk.rename, "remove": disk.remove}


def test_files_are_safetensors(tmp_path: Path) -> None:
    """Written by hand, read by the library."""
    dtypes = (torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.float16, torch.float64, torch.int32)
    tensors = {f"{dtype}": torch.arange(7).to(dtype) for dtype in dtypes}
    tensors |= {"none": torch.empty(0), "matrix": torch.arange(6.0).reshape(2, 3).T}
    file = Store(tmp_path).write(1, "x", tensors, {"a": "ä"})
    found = load_file(tmp_path / "checkpoints" / "pool" / file.name)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(found[name].dtype == tensors[name].dtype for name in tensors)
    with Store(tmp_path).open(file) as opened:
        assert opened.metadata() == {"a": "ä"}
    assert Store(tmp_path).problem(file) is None


def test_files_go_with_the_last_checkpoint_that_refers_to_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    manifest = None
    for step in range(10, 70, 10):
        manifest = save(store, step, {"a": step, "b": 0.0} if step == 10 else {"a": step}, manifest, keep=3)
    assert store.steps() == [60, 50, 40]
    names = {path.name for path in (tmp_path / "checkpoints" / "pool").iterdir()}
    kept = [(10, "b"), (40, "a"), (50, "a"), (60, "a")]
    assert names == {f"{step:08d}-{unit}-r{rank}.safetensors" for step, unit in kept for rank in range(2)}
    (tmp_path / "checkpoints" / "pool" / "mine.txt").write_text("x")
    store.prune(1, also=[50])
    assert store.steps() == [60, 50] and values(store, 50) == {"a": 50.0, "b": 0.0}
    assert (tmp_path / "checkpoints" / "pool" / "mine.txt").exists(), "of somebody else"


def test_going_back_leaves_what_came_later_behind(tmp_path: Path) -> None:
    store = Store(tmp_path)
    manifest = None
    for step in (10, 20, 30):
        manifest = save(store, step, {"a": step}, manifest, keep=3)
    store.abandon_after(10)
    assert store.steps() == [10]
    save(store, 20, {"b": 5.0}, store.read(10), keep=3)
    assert store.steps() == [20, 10] and values(store, 20) == {"a": 10.0, "b": 5.0}


def test_what_killed_saves_left_is_removed_when_nobody_saves(tmp_path: Path) -> None:
    """Before and after the newest checkpoint; not what one that was left behind refers to, which may be put back."""
    store, pool = Store(tmp_path), tmp_path / "checkpoints" / "pool"
    manifest = save(store, 20, {"b": 2.0}, save(store, 10, {"a": 1.0}))
    later = save(store, 30, {"a": 3.0}, manifest)
    store.abandon_after(20)
    store.write(40, "a-r0", {"weight:a": torch.ones(5)}, {})
    store.announce(20, "r0", {})
    (pool / ".00000040-r0.json.0123456789abcdef.partial").touch()
    (pool / "mine.txt").touch()
    kept = {file.name for each in (manifest, later) for file in each.files} | {"mine.txt"}
    assert {path.name for path in pool.iterdir()} > kept
    store.remove_leftovers()
    assert {path.name for path in pool.iterdir()} == kept
    (tmp_path / "checkpoints" / "step-00000020.json").write_text("{")
    store.announce(20, "r0", {})
    store.remove_leftovers()
    assert len(list(pool.iterdir())) == len(kept) + 1, "while a manifest cannot be read"


def test_nothing_is_removed_while_a_manifest_cannot_be_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = save(store, 10, {"a": 1.0})
    (tmp_path / "checkpoints" / "step-00000010.json").write_text("{")
    save(store, 20, {"b": 1.0}, keep=2)
    assert [store.problem(file) for file in first.files] == [None, None]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "bytes instead of"),
        (flip, "its checksum does not match"),
        (Path.unlink, "missing"),
        (link, "a link, which is never followed"),
    ],
)
def test_a_damaged_file_is_found_and_named(
    tmp_path: Path, damage: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    first = save(store, 10, {"a": 1.0, "b": 1.0})
    save(store, 20, {"a": 2.0}, first)
    assert list_checkpoints([str(tmp_path)]) == 0
    damage(tmp_path / "checkpoints" / "pool" / "00000020-a-r1.safetensors")
    problems = [store.problem(file) for file in store.read(20).files]
    assert [p for p in problems if p] and all(p is None or (words in p and "00000020-a-r1" in p) for p in problems)
    assert values(store, 10) == {"a": 1.0, "b": 1.0}
    capsys.readouterr()
    assert list_checkpoints([str(tmp_path)]) == 1
    newest, older = capsys.readouterr().out.splitlines()
    assert "DAMAGED" in newest and words in newest and older.endswith("whole")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-20], "cannot be read"),
        (lambda text: text.replace('"step": 10', '"step": 11'), "its checksum does not match"),
        (lambda text: "[]", "cannot be read"),
        (lambda text: "{}", "cannot be read"),
    ],
)
def test_a_damaged_manifest_is_found(tmp_path: Path, change: Callable[[str], str], words: str) -> None:
    store = Store(tmp_path)
    save(store, 10, {"a": 1.0})
    path = tmp_path / "checkpoints" / "step-00000010.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(CheckpointError, match=f"step-00000010.json: {words}"):
        store.read(10)


def test_a_manifest_cannot_refer_to_files_elsewhere(tmp_path: Path) -> None:
    store = Store(tmp_path)
    manifest = save(store, 10, {"a": 1.0})
    manifest.units["a"][0] = type(manifest.units["a"][0])("../../secret", 3, "00")
    (tmp_path / "checkpoints" / "step-00000010.json").unlink()
    store.publish(manifest)
    with pytest.raises(CheckpointError, match="refers to '../../secret', which is not in its pool"):
        store.read(10)


def test_ranges_of_other_ranks_are_read_from_the_files_that_have_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    files = [
        store.write(
            1,
            f"u-r{rank}",
            {"weight:x": torch.arange(start, stop, dtype=torch.float32)},
            {"ranges": json.dumps({"x": [start, stop]}), "scalars": "{}"},
        )
        for rank, (start, stop) in enumerate([(0, 3), (3, 3 + 4), (7, 12)])
    ]
    contents = Contents(store, {"u": files})
    contents.learn(["u"])
    for start in range(12):
        for stop in range(start, 13):
            assert contents.read("weight", "x", start, stop).tolist() == list(range(start, stop))
    lacking = Contents(store, {"u": [files[0], files[2]]})
    lacking.learn(["u"])
    with pytest.raises(CheckpointError, match="x: elements 3 to 9 are in none of the checkpoint's files"):
        lacking.read("weight", "x", 1, 9)
