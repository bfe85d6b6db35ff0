"""Write what a run changed in its base model as a delta, and apply a delta to a base model.

    delta.json            the format, the base's name and fingerprints (by unit), what changed, SHA-256 of its tensors
                          and of the tokenizer's files, and the identity of the base (`checkpoint/identity.py`)
    delta.safetensors     the changed blocks whole, under transformers' names of the parameters; or several shards.
                          For a sparse update rule only the unmasked weights (`sparse_delta.py`)
    tokenizer ...         as the tokenizer saves itself

A base is the right one if its fingerprints in the dtype of training are those recorded.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.checkpoint.checks import NOT_RECORDED
from trainer.checkpoint.identity import Identity
from trainer.checkpoint.store import in_a_line
from trainer.config.reading import read_file
from trainer.config.schema import ModelConfig
from trainer.data.errors import DataError
from trainer.data.tokenizer import load_tokenizer, mark_new, new_ids
from trainer.export.base import BaseCheck, Permissions, Units, refuse_another, refuse_code, take_generation_config
from trainer.export.from_checkpoint import TrainedRun
from trainer.export.published import restore_tokenizer
from trainer.export.shards import (
    ExportError,
    LocalSteps,
    Shards,
    complete_or_not_at_all,
    digest,
    meta_of,
    save_tokenizer,
    write_model,
)
from trainer.export.sparse_delta import keys_of, pack, put
from trainer.model import load as models
from trainer.model.blocks import Piece, pieces
from trainer.model.growth import GrownFolder
from trainer.model.new_rows import split

logger = logging.getLogger(__name__)

FORMAT: Final = 1
_INFO = "delta.json"
_MOST_INFO_BYTES, _MOST_TOKENIZER_BYTES = 2**28, 2**30
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Info(BaseModel):
    """The content of delta.json. What an earlier version did not write is None."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[1]
    base: str
    step: Annotated[int, Field(ge=0)]
    dtype: Literal["bf16", "fp16", "fp32"]
    blocks: str
    fingerprints: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{16}$")]]
    sha256: dict[str, _Sha256]
    files: dict[str, _Sha256] | None = None
    identity: Identity | None = None
    # Ids (start, stop) of the tokens that the run added, and the parts of which only their rows trained.
    new_ids: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = None
    new_rows: tuple[Literal["embeddings", "head"], ...] = ()


def write_delta(run: TrainedRun, folder: Path, *, shard_size: int | str) -> list[str]:
    """Write what `run` changed in its base into `folder`, and verify it. Returns what `restore_tokenizer` does; raises
    `ExportError`."""
    if run.has_adapters:
        raise ExportError("--delta: adapters are a delta already; export them without --delta")
    if run.origin.model.path is None:
        raise ExportError("--delta: this run began from model.random and a seed, so there is no base for a delta")
    units, check = run.units, BaseCheck(run.base_name, run.recorded, run.units, run.identity)
    parts = [
        Piece(piece.path, {name: t for name, t in piece.tensors.items() if run.trained(t)})
        for piece in pieces(run.model)
    ]
    planned: dict[str, Tensor] = {}
    for piece in parts:
        for name, tensor in piece.tensors.items():
            planned |= _planned(run, name, tensor)
    with complete_or_not_at_all(folder, LocalSteps(), replace=False) as unfinished:
        shards = Shards(unfinished, planned, shard_size, stem="delta")
        for piece in parts:
            for name, weights in run.base.read(piece.tensors, run.dtype).items():
                check.add(*units.of[id(piece.tensors[name])], weights)
            for name, tensor in piece.tensors.items():
                entries = run.entries(tensor) if run.partly(tensor) else None
                shards.add({name: run.from_checkpoint(tensor)} if entries is None else pack(name, **entries))
        shards.finish()
        for file in shards.files:
            shards.verify(file)
        save_tokenizer(run.tokenizer, unfinished)
        changed = restore_tokenizer(run.tokenizer, unfinished)
        info = _Info(
            format=FORMAT,
            base=run.base_name,
            step=run.manifest.step,
            dtype=run.origin.model.dtype,
            blocks=units.path,
            fingerprints={**run.recorded, **{unit: check[unit] for unit in run.changed}},
            sha256=dict(sorted(shards.digests.items())),
            files={path: hashlib.sha256((unfinished / path).read_bytes()).hexdigest() for path in _beside(unfinished)},
            identity=run.identity,
            new_ids=(added.start, added.stop) if (added := new_ids(run.tokenizer)) else None,
            new_rows=run.origin.new_rows,
        )
        (unfinished / _INFO).write_text(info.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return changed


def _beside(folder: Path) -> list[str]:
    """Return the paths of the tokenizer's files in a delta."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if not path.startswith(("delta.", "delta-", ".")))


def _planned(run: TrainedRun, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return what a delta contains for a trained tensor, on the meta device."""
    if not run.partly(tensor):
        return {name: meta_of(tensor)}
    return {key: meta_of(packed) for key, packed in pack(name, **run.entries(tensor)).items()}


def apply_delta(
    base: Path, delta: Path, folder: Path, *, shard_size: int | str, trust_remote_code: bool = False
) -> list[str]:
    """Apply `delta` to `base` and write the model into `folder`, a shard at a time. Returns what `write_model` does.

    Raises `ExportError` if the base is a different one, naming the block that differs, or if the delta was changed.
    """
    info = _read_info(delta)
    if info.identity is None:
        logger.warning(NOT_RECORDED, delta)
    else:
        refuse_code(info.identity, Permissions(trust_remote_code=trust_remote_code), f"the run of {delta}")
    with _verified(delta, info) as files:
        try:
            tokenizer = load_tokenizer(str(files.absolute()), trust_remote_code=trust_remote_code)
        except DataError as error:
            raise ExportError(f"{delta}: its tokenizer cannot be read: {error}") from error
        tokenizer.name_or_path = str(delta)  # not the temporary folder
        if info.new_ids is not None:
            mark_new(tokenizer, range(*info.new_ids))
        return _apply(
            base,
            delta,
            info,
            tokenizer,
            folder,
            shard_size=shard_size,
            trust_remote_code=trust_remote_code,
            tokenizer_folder=files,
        )


def _apply(
    base: Path,
    delta: Path,
    info: _Info,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    shard_size: int | str,
    trust_remote_code: bool,
    tokenizer_folder: Path,
) -> list[str]:
    dtype = models.DTYPES[info.dtype]
    config = ModelConfig(path=str(base), dtype=info.dtype, trust_remote_code=trust_remote_code)
    model = models.on_meta(config, tokenizer).to(dtype)
    take_generation_config(model, str(base))
    refuse_another(info.identity, model, tokenizer, str(base), adapters=False)
    split(model, new_ids(tokenizer), info.new_rows)
    source = GrownFolder(base, model, new_ids(tokenizer))
    units = Units(model, set(info.fingerprints), path=info.blocks)
    check = BaseCheck(str(base), info.fingerprints, units, info.identity)
    missing = sorted({unit for unit, _ in units.of.values()} - info.fingerprints.keys())
    if missing:
        raise ExportError(f"{delta / _INFO}: was changed: it has no fingerprint of {missing[0]} to check the base with")
    files = _files(delta, info)
    names = {name for piece in pieces(model) for name in piece.tensors}
    foreign = sorted(files.keys() - names - {key for name in names for key in keys_of(name)})
    if foreign:
        raise ExportError(f"{files[foreign[0]]}: {foreign[0]} is not in the base model in {base}")

    def read(piece: Piece) -> dict[str, Tensor]:
        tensors = source.read(piece.tensors, dtype)
        for name, weights in tensors.items():
            if (known := units.of.get(id(piece.tensors[name]))) is not None:
                check.add(*known, weights)
            else:
                check.add_buffer(name, weights, dtype)
        for name in tensors:
            if name in files:
                tensors[name] = _read_changed(files[name], name, info)
            elif sparse := [key for key in keys_of(name) if key in files]:
                tensors[name] = put(name, tensors[name], {key: _read_changed(files[key], key, info) for key in sparse})
        return tensors

    return write_model(
        model, tokenizer, folder, read, shard_size=shard_size, replace=False, tokenizer_folder=tokenizer_folder
    )


def _read_info(delta: Path) -> _Info:
    path = delta / _INFO
    try:
        info = json.loads(read_file(path, most_bytes=_MOST_INFO_BYTES))
        written = info["format"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ExportError(
            f"{path}: cannot be read ({error}); give a folder that `export RUN OUT --delta` wrote"
        ) from error
    if type(written) is not int or written != FORMAT:
        raise ExportError(f"{path}: format {written!r}; this version of Strata reads format {FORMAT}")
    try:
        return _Info.model_validate_json(json.dumps(info))
    except ValidationError as error:
        raise ExportError(f"{path}: was changed: {in_a_line(error)}") from error


@contextmanager
def _verified(delta: Path, info: _Info) -> Iterator[Path]:
    """Yield a folder with the tokenizer's files only, after comparing each with its recorded checksum."""
    if info.files is None:
        yield delta
        return
    with TemporaryDirectory() as place:
        for name, expected in info.files.items():
            parts = PurePosixPath(name).parts
            if not parts or parts[0] == "/" or ".." in parts or not name.isprintable():
                raise ExportError(f"{delta / _INFO}: was changed: {name!r} is not a file in a delta")
            copy = Path(place, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                content = read_file(delta / name, most_bytes=_MOST_TOKENIZER_BYTES)
            except OSError as error:
                raise ExportError(f"{delta / name}: cannot be read ({error.strerror or error})") from error
            if hashlib.sha256(content).hexdigest() != expected:
                raise ExportError(f"{delta / name}: was changed: its SHA-256 is not that in {_INFO}")
            copy.write_bytes(content)
        yield Path(place)


def _files(delta: Path, info: _Info) -> dict[str, Path]:
    """Return the file of each changed tensor."""
    files: dict[str, Path] = {}
    for path in sorted(delta.glob("delta*.safetensors")):
        if not path.is_file():  # opening a pipe would wait
            raise ExportError(f"{path}: cannot be read (not a regular file)")
        try:
            with safe_open(path, framework="pt") as opened:
                files |= dict.fromkeys(opened.keys(), path)
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{path}: cannot be read ({error})") from error
    differing = sorted(info.sha256.keys() ^ files.keys())
    if differing:
        raise ExportError(f"{delta}: {_INFO} and its files do not match: {differing[0]} is in only one of both")
    return files


def _read_changed(file: Path, name: str, info: _Info) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor = opened.get_tensor(name)
    if digest(tensor) != info.sha256[name]:
        raise ExportError(f"{file}: {name} was changed: its SHA-256 is not that in {_INFO}")
    return tensor
