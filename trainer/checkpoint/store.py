"""Store checkpoints on disk: a kill at any moment leaves the last complete one intact, and nothing is used unchecked.

    checkpoints/
      step-00000100.json   a manifest: the checkpoint's contents, its files, their sizes and checksums
      pool/                those files, named after the step that wrote them; checkpoints share what did not change

A checkpoint exists from the moment its manifest has its name. Files are written and synced before that, and removed
once no kept manifest refers to them. There is no pickle: manifests are JSON, files are safetensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch import Tensor

from trainer.checkpoint import disk
from trainer.checkpoint.identity import Identity
from trainer.errors import StrataError

FORMAT = 1
LATEST = "latest"  # DeepSpeed's name for the file beside the folders of tags
_MANIFEST = re.compile(r"step-(\d{8})\.json")
_POOLED = re.compile(r"(\d{8})-[\w.-]+")
_CHUNK = 2**22


class CheckpointError(StrataError, RuntimeError):
    """A checkpoint cannot be written or used; the message names the file, and what to do."""


_Count = Annotated[int, Field(ge=0)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class File:
    """A file of the pool: its name, size in bytes, and SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint.

    `units` maps what changes together (a block, the embeddings, ...) to its files, one for each rank that wrote it;
    `state` contains everything else, as JSON.
    """

    step: int
    units: dict[str, list[File]]
    state: dict[str, Any]

    @property
    def files(self) -> list[File]:
        return [file for files in self.units.values() for file in files]


class _FileRecord(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    bytes: _Count
    sha256: str


class _SparseRecord(BaseModel):
    """Validate the keys of `Sparse.state_dict` that are read here; others are checked when they are used."""

    model_config = ConfigDict(strict=True, extra="allow")

    rule: str
    slots: list[_Count]
    times_active: list[_Count]
    learning_rates: list[_Finite]
    engine: dict[str, _Count]
    redrawn: Literal["reset", "keep"] | None = None


class _State(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    ranks: Annotated[int, Field(ge=1)]
    best: tuple[_Finite, _Count] | None
    base: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{16}$")]] = {}
    sparse: _SparseRecord | None = None
    run: dict[str, Any] = {}
    identity: Identity | None = None


class _Record(BaseModel):
    """Validate a manifest without its checksum, which another program may have computed as well."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[1]
    step: _Count
    units: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], Annotated[list[_FileRecord], Field(min_length=1)]]
    state: _State


class Store:
    """The checkpoints of one run folder."""

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / "checkpoints"
        self._pool = self.folder / "pool"

    # --- writing -----------------------------------------------------------------------------------------------

    def write(self, step: int, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> File:
        """Write `tensors` (on the host) into a file of the pool; it is on the disk when this returns."""
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
        self._pool.mkdir(parents=True, exist_ok=True)
        disk.publish(self._pool / f"{step:08d}-{name}.json", json.dumps(value).encode())

    def announced(self, step: int, name: str) -> Any | None:
        """Return what `announce` left under that name, or None if there is nothing yet."""
        try:
            return json.loads(disk.read(self._pool / f"{step:08d}-{name}.json"))
        except FileNotFoundError:
            return None

    def publish(self, manifest: Manifest) -> None:
        """Make the checkpoint exist. Its files must have been written."""
        body = {"format": FORMAT, **asdict(manifest)}
        disk.sync_folder(self._pool)
        disk.publish(self._path(manifest.step), sealed(body))

    def prune(self, keep: int, also: Iterable[int] = ()) -> None:
        """Remove all but the `keep` newest checkpoints and those of the steps `also`, and files of no checkpoint.

        Files of a step after the newest checkpoint stay, since a save may be in progress. All files stay if a manifest
        cannot be read, since it may refer to any of them.
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

    def remove_leftovers(self) -> None:
        """Remove the files of saves that were killed before they became checkpoints. No save may be in progress.

        Files of abandoned checkpoints stay; all files stay if a manifest cannot be read.
        """
        try:
            used = {file.name for step in self.steps() for file in self.read(step).files}
            for abandoned in self.folder.glob("abandoned-*.json"):
                used.update(re.findall(r"\d{8}-[\w-]+\.safetensors", disk.read(abandoned).decode(errors="replace")))
            for path in self._pool.iterdir():
                if _POOLED.match(path.name.removeprefix(".")) and path.name not in used:
                    disk.remove(path)
        except (CheckpointError, OSError):  # leftovers only take space
            return

    def withdraw(self, step: int, attempt: str) -> None:
        """Remove the files of a save that will not be published, to make room on a full disk."""
        for path in self._pool.glob(f"{step:08d}-*{attempt}*"):
            disk.remove(path)

    def abandon_after(self, step: int) -> None:
        """Set aside checkpoints after `step`, which do not belong to a run that resumes there."""
        for later in self.steps():
            if later > step:
                disk.rename(self._path(later), self.folder / f"abandoned-{self._path(later).name}")

    # --- reading -----------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, newest first. They may be damaged."""
        if not self.folder.is_dir():
            return []
        matches = (_MANIFEST.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def read(self, step: int) -> Manifest:
        """Return the manifest of a step. Raises `CheckpointError` if it is missing, broken or in another format."""
        path = self._path(step)
        self._refuse_links(path)
        try:
            body = json.loads(disk.read(path))
            checksum = body.pop("checksum")
            expected = json.loads(sealed(body))["checksum"]
        except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        if expected != checksum:
            raise CheckpointError(f"{path}: its checksum does not match: it was changed or cut short")
        if body.get("format") != FORMAT:
            raise CheckpointError(f"{path}: written in another format by another version of Strata")
        try:
            record = _Record.model_validate_json(json.dumps(body))
        except ValidationError as error:
            raise CheckpointError(f"{path}: is not a manifest: {in_a_line(error)}") from error
        if record.step != step:
            raise CheckpointError(f"{path}: contains the checkpoint after step {record.step}, unlike its name")
        units = {unit: [File(**file.model_dump()) for file in files] for unit, files in record.units.items()}
        for file in (file for files in units.values() for file in files):
            if Path(file.name).name != file.name or not file.name.isprintable():
                raise CheckpointError(f"{path}: refers to {file.name!r}, which is not in its pool")
        return Manifest(step, units, body["state"])

    def problem(self, file: File) -> str | None:
        """Return what is wrong with a file, or None if it has the size and checksum that the manifest records."""
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
        return None if digest.hexdigest() == file.sha256 else f"{path}: its checksum does not match: it was changed"

    def open(self, file: File) -> Any:
        """Return a reader (`safetensors.safe_open`) of the tensors and metadata that were given to `write`."""
        return safe_open(self._pool / file.name, framework="pt")

    def offered_before(self, step: int, damaged: set[str]) -> int | None:
        """Return the newest checkpoint before `step` that can be read and has none of the files `damaged`, or None."""
        for older in self.steps():
            if older < step:
                with suppress(CheckpointError):
                    if not damaged & {file.name for file in self.read(older).files}:
                        return older
        return None

    def _refuse_links(self, *paths: Path) -> None:
        """Raise `CheckpointError` for a link, which may lead out of the run folder."""
        for path in (self.folder, self._pool, *paths):
            if path.is_symlink():
                raise CheckpointError(f"{path}: a link, which is never followed")

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.json"


def open_store(folder: Path) -> Store:
    """Return the store of a run folder, or of a tag in a folder of `engine.save_checkpoint`: the tag that its file
    `latest` names, or the only one."""
    if Store(folder).steps():
        return Store(folder)
    if (folder / LATEST).exists():
        return Store(tagged(folder))
    inside = sorted(path.parent for path in folder.glob("*/checkpoints") if Store(path.parent).steps())
    return Store(inside[0] if len(inside) == 1 else folder)


def tagged(folder: Path) -> Path:
    """Return the folder in `folder` that its file `latest` names."""
    path = folder / LATEST
    try:
        tag = disk.read(path).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if Path(tag).name != tag or tag == ".." or not tag.isprintable():
        raise CheckpointError(f"{path}: names {tag[:100]!r}, which is not a folder in {folder}")
    return folder / tag


def in_a_line(error: ValidationError) -> str:
    """Return the first of the problems that pydantic found, with the key and the value received."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"])) or "all of it"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{key}: {first['msg']}, got {str(first['input'])[:100]!r}{more}"


def sealed(body: Mapping[str, Any]) -> bytes:
    """Return `body` as JSON, with a checksum of it."""
    canonical = json.dumps(body, sort_keys=True, allow_nan=False)
    return json.dumps({**body, "checksum": hashlib.sha256(canonical.encode()).hexdigest()}, indent=1).encode()


# Dtypes of checkpoints in the safetensors format (https://huggingface.co/docs/safetensors).
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
    """Return a file of that format in parts: its header, and the memory of the tensors, which is not copied.

    The library's own `save` copies everything into one object while no other Python thread runs: training would pause
    for as long as the copy into host memory takes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts: list[bytes | memoryview] = []
    end = 0
    # Large elements first, so that each tensor is aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].contiguous()
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        parts.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *parts]
