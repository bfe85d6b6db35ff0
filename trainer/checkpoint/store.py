"""Checkpoints on disk: a kill at any moment leaves the last complete one whole, and nothing is used unchecked.

    checkpoints/
      step-00000100.json   a manifest: what is in the checkpoint, in which files, their sizes and checksums
      pool/                those files, named after the step that wrote them; checkpoints share what did not change

A checkpoint exists from the moment its manifest has its name. Files are written and synced before that, and removed
when no manifest that is kept refers to them. There is no pickle: manifests are JSON, files are safetensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.checkpoint import disk

FORMAT = 1
_MANIFEST = re.compile(r"step-(\d{8})\.json")
_POOLED = re.compile(r"(\d{8})-[\w.-]+")
_CHUNK = 2**22


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or used; the message names the file, and what to do."""


@dataclass(frozen=True)
class File:
    """A file of the pool: its name, size in bytes, and SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is made of.

    `units` maps what changes together (a block, the embeddings, ...) to its files, one for each rank that wrote it;
    `state` is everything that is no tensor, as JSON.
    """

    step: int
    units: dict[str, list[File]]
    state: dict[str, Any]

    @property
    def files(self) -> list[File]:
        return [file for files in self.units.values() for file in files]


class Store:
    """The checkpoints of one run folder."""

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / "checkpoints"
        self._pool = self.folder / "pool"

    # --- writing -----------------------------------------------------------------------------------------------

    def write(self, step: int, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> File:
        """A file of the pool with `tensors` (on the host); it is on the disk when this returns."""
        self._refuse_links()
        parts = _safetensors(tensors, metadata)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        file = File(f"{step:08d}-{name}.safetensors", sum(map(len, parts)), digest.hexdigest())
        self._pool.mkdir(parents=True, exist_ok=True)
        disk.write(self._pool / file.name, parts)
        return file

    def announce(self, step: int, name: str, value: Any) -> None:
        """Leave `value` (JSON) in the pool for the rank that will publish."""
        disk.publish(self._pool / f"{step:08d}-{name}.json", json.dumps(value).encode())

    def announced(self, step: int, name: str) -> Any | None:
        """What `announce` left under that name, or None so far."""
        try:
            return json.loads((self._pool / f"{step:08d}-{name}.json").read_bytes())
        except FileNotFoundError:
            return None

    def publish(self, manifest: Manifest) -> None:
        """From here on the checkpoint exists. Its files must have been written."""
        body = {"format": FORMAT, **asdict(manifest)}
        disk.sync_folder(self._pool)
        disk.publish(self._path(manifest.step), _sealed(body))

    def prune(self, keep: int, also: Iterable[int] = ()) -> None:
        """Remove all but the `keep` newest checkpoints and those of the steps `also`, and files of no checkpoint.

        Files of a step after the newest checkpoint are left alone: they may be on their way into one. So are all files
        where a manifest cannot be read: who knows what it refers to.
        """
        steps = self.steps()
        kept = {*steps[:keep], *also}
        for step in steps:
            if step not in kept:
                disk.remove(self._path(step))
        try:
            used = {file.name for step in self.steps() for file in self.read(step).files}
        except CheckpointError:
            return
        for path in self._pool.iterdir():
            named = _POOLED.match(path.name.removeprefix("."))
            if named and steps and int(named[1]) <= steps[0] and path.name not in used:
                disk.remove(path)

    def withdraw(self, step: int, attempt: str) -> None:
        """Remove the files of a save that will not be published: on a full disk they are in the way."""
        for path in self._pool.glob(f"{step:08d}-*{attempt}*"):
            disk.remove(path)

    def abandon_after(self, step: int) -> None:
        """Checkpoints after `step` are not of the run that goes on from there."""
        for later in self.steps():
            if later > step:
                disk.rename(self._path(later), self.folder / f"abandoned-{self._path(later).name}")

    # --- reading -----------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, newest first; whether they are whole is not known yet."""
        if not self.folder.is_dir():
            return []
        found = (_MANIFEST.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def read(self, step: int) -> Manifest:
        """The manifest of a step. Raises `CheckpointError` where it is missing, broken or of another format."""
        path = self._path(step)
        self._refuse_links(path)
        try:
            body = json.loads(path.read_bytes())
            checksum = body.pop("checksum")
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        if json.loads(_sealed(body))["checksum"] != checksum:
            raise CheckpointError(f"{path}: its checksum does not fit: it was changed or cut short")
        if body.get("step") != step:
            raise CheckpointError(f"{path}: holds the checkpoint after step {body.get('step')}, under another's name")
        if body.pop("format") != FORMAT:
            raise CheckpointError(f"{path}: written in another format by another version of Strata")
        units = {unit: [File(**file) for file in files] for unit, files in body["units"].items()}
        for file in (file for files in units.values() for file in files):
            if Path(file.name).name != file.name:
                raise CheckpointError(f"{path}: refers to {file.name!r}, which is not in its pool")
        return Manifest(body["step"], units, body["state"])

    def problem(self, file: File) -> str | None:
        """What is wrong with a file, or None: it has the size and the checksum that its manifest says."""
        path = self._pool / file.name
        try:
            return self._look_for_problem(path, file)
        except OSError as error:
            return f"{path}: {error.strerror or error}"

    def _look_for_problem(self, path: Path, file: File) -> str | None:
        if not path.is_file():
            return f"{path}: missing"
        if path.is_symlink():
            return f"{path}: a link, which is never followed"
        if path.stat().st_size != file.bytes:
            return f"{path}: {path.stat().st_size} bytes instead of {file.bytes}"
        digest = hashlib.sha256()
        with open(path, "rb") as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
        return None if digest.hexdigest() == file.sha256 else f"{path}: its checksum does not fit, it was changed"

    def open(self, file: File) -> Any:
        """A reader of a file's tensors and of what was given to `write` beside them, as `safetensors.safe_open`."""
        return safe_open(self._pool / file.name, framework="pt")

    def offered_before(self, step: int, damaged: set[str]) -> int | None:
        """The newest checkpoint before `step` that can be read and has none of the files `damaged`."""
        for older in self.steps():
            if older < step:
                with suppress(CheckpointError):
                    if not damaged & {file.name for file in self.read(older).files}:
                        return older
        return None

    def _refuse_links(self, *paths: Path) -> None:
        """What is read and written lies in the run folder."""
        for path in (self.folder, self._pool, *paths):
            if path.is_symlink():
                raise CheckpointError(f"{path}: a link, which is never followed")

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.json"


def _sealed(body: Mapping[str, Any]) -> bytes:
    """JSON of `body` with a checksum over the rest of it."""
    canonical = json.dumps(body, sort_keys=True, allow_nan=False)
    return json.dumps({**body, "checksum": hashlib.sha256(canonical.encode()).hexdigest()}, indent=1).encode()


# Of the safetensors format (https://huggingface.co/docs/safetensors), as far as checkpoints hold them.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """A file of that format, in parts: its header, and the tensors where they lie.

    The library's own `save` copies all of it into one object, and no other thread of Python runs meanwhile: training
    would stand still for as long again as the copy into host memory takes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts: list[bytes | memoryview] = []
    end = 0
    # Large elements first, so that each tensor is aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].contiguous()
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        parts.append(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *parts]
