"""What a run changed of its base model, as a folder of its own, and putting it on again.

    delta.json            the format, the base's name and fingerprints (by unit), what changed, SHA-256 of its tensors
    delta.safetensors     the changed blocks whole, by the names that transformers gives parameters; or several shards.
                          Of what a sparse update rule trained the unmasked weights alone (`sparse_delta.py`)
    tokenizer ...         as the tokenizer saves itself

A base is the right one when its fingerprints in the dtype of training are those recorded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer import model as models
from trainer.blocks import Piece, pieces
from trainer.config.schema import ModelConfig
from trainer.data.tokenizer import load_tokenizer
from trainer.export_run import BaseCheck, TrainedRun, Units, take_generation_config
from trainer.shards import Alone, ExportError, Shards, complete_or_not_at_all, digest, meta_of, write_model
from trainer.sparse_delta import keys_of, pack, put
from trainer.weights import ModelFolder

FORMAT = 1
_INFO = "delta.json"
_KEYS = {"base": str, "dtype": str, "blocks": str, "fingerprints": dict, "sha256": dict}


def write_delta(run: TrainedRun, folder: Path, *, shard_size: int | str) -> None:
    """Write what `run` changed of its base into `folder`, and read it back. Raises `ExportError`."""
    if run.has_adapters:
        raise ExportError("--delta: adapters are a delta already; export them without --delta")
    if run.config.model.path is None:
        raise ExportError("--delta: this run began from model.random and a seed, so there is no base to put a delta on")
    units, check = run.units, BaseCheck(run.base_name, run.recorded, run.units)
    parts = [
        Piece(piece.path, {name: t for name, t in piece.tensors.items() if run.trained(t)})
        for piece in pieces(run.model)
    ]
    planned: dict[str, Tensor] = {}
    for piece in parts:
        for name, tensor in piece.tensors.items():
            planned |= _planned(run, name, tensor)
    with complete_or_not_at_all(folder, Alone()) as unfinished:
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
        info = {
            "format": FORMAT,
            "base": run.base_name,
            "step": run.manifest.step,
            "dtype": run.config.model.dtype,
            "blocks": units.path,
            "fingerprints": {**run.recorded, **{unit: check[unit] for unit in run.changed}},
            "sha256": dict(sorted(shards.digests.items())),
        }
        (unfinished / _INFO).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        run.tokenizer.save_pretrained(unfinished)


def _planned(run: TrainedRun, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Of a tensor that was trained, without storage."""
    if not run.partly(tensor):
        return {name: meta_of(tensor)}
    return {key: meta_of(found) for key, found in pack(name, **run.entries(tensor)).items()}


def apply_delta(base: Path, delta: Path, folder: Path, *, shard_size: int | str) -> None:
    """Write the model that `delta` makes of `base` into `folder`, a shard at a time.

    Raises `ExportError` where the base is another one, with the block that differs, or the delta was changed.
    """
    info = _read_info(delta)
    tokenizer = load_tokenizer(str(delta.absolute()))
    dtype = models.DTYPES[info["dtype"]]
    model = models.on_meta(ModelConfig(path=str(base), dtype=info["dtype"]), tokenizer).to(dtype)
    take_generation_config(model, str(base))
    source = ModelFolder(base, model)
    units = Units(model, set(info["fingerprints"]), path=info["blocks"])
    check = BaseCheck(str(base), info["fingerprints"], units)
    lost = sorted({unit for unit, _ in units.of.values()} - info["fingerprints"].keys())
    if lost:
        raise ExportError(f"{delta / _INFO}: was changed: it has no fingerprint of {lost[0]}, to know the base by")
    files = _files(delta, info)
    names = {name for piece in pieces(model) for name in piece.tensors}
    foreign = sorted(files.keys() - names - {key for name in names for key in keys_of(name)})
    if foreign:
        raise ExportError(f"{files[foreign[0]]}: {foreign[0]} is not in the base model in {base}")

    def read(piece: Piece) -> dict[str, Tensor]:
        found = source.read(piece.tensors, dtype)
        for name, weights in found.items():
            if (known := units.of.get(id(piece.tensors[name]))) is not None:
                check.add(*known, weights)
        for name in found:
            if name in files:
                found[name] = _changed(delta, files[name], name, info)
            elif sparse := [key for key in keys_of(name) if key in files]:
                found[name] = put(name, found[name], {key: _changed(delta, files[key], key, info) for key in sparse})
        return found

    write_model(model, tokenizer, folder, read, shard_size=shard_size)


def _read_info(delta: Path) -> dict[str, Any]:
    path = delta / _INFO
    try:
        info = json.loads(path.read_bytes())
        written = info["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExportError(
            f"{path}: cannot be read ({error}); give a folder as `export RUN OUT --delta` writes it"
        ) from error
    if written != FORMAT:
        raise ExportError(f"{path}: format {written}; this version of Strata reads format {FORMAT}")
    for key, kind in _KEYS.items():
        value = info.get(key)
        if not isinstance(value, kind) or (key == "dtype" and value not in models.DTYPES):
            raise ExportError(f"{path}: was changed: {key} is {value!r}")
    return info


def _files(delta: Path, info: dict[str, Any]) -> dict[str, Path]:
    """Where each changed tensor lies."""
    files = {}
    for path in sorted(delta.glob("delta*.safetensors")):
        try:
            with safe_open(path, framework="pt") as opened:
                files |= dict.fromkeys(opened.keys(), path)
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{path}: cannot be read ({error})") from error
    lost = sorted(info["sha256"].keys() ^ files.keys())
    if lost:
        raise ExportError(f"{delta}: {_INFO} and the files beside it do not fit: {lost[0]} is in only one of them")
    return files


def _changed(delta: Path, file: Path, name: str, info: dict[str, Any]) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor = opened.get_tensor(name)
    if digest(tensor) != info["sha256"][name]:
        raise ExportError(f"{file}: {name} was changed: its SHA-256 is not that in {_INFO}")
    return tensor
