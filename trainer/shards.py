"""Write a model as a Hugging Face folder from tensors that come a block at a time: nobody ever holds all of it.

What is held is the shard in progress and the block that comes in (where transformers takes fused experts apart, that
block twice). Names and shards are those of transformers' `save_pretrained`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from trainer.blocks import Piece, full_shape, pieces
from trainer.checkpoint import disk

SHARD_SIZE = "5GB"


class ExportError(RuntimeError):
    """What is to be written cannot be, or what was written is not what the model holds."""


class Alone:
    """Takes the steps of an export in a process without others."""

    writes = True  # whether it is this process that takes them

    def __call__(self, work: Callable[[], None], *, last: bool = False) -> None:
        """`last`: it is done with this, and nobody can stop it any more."""
        work()

    def share(self, value: Any) -> Any:
        """`value` of the process that takes the steps."""
        return value


class Shards:
    """Writes tensors as they come into the safetensors files that `planned` (in the same order) is split into.

    `planned` says names, shapes and dtypes; `shard_size` is bytes, or a string such as "5GB". A shard is written, and
    its tensors are let go, once its last tensor came.
    """

    def __init__(self, folder: Path, planned: Mapping[str, Tensor], shard_size: int | str, *, stem: str = "model"):
        self._folder = folder
        self._stem = stem
        self._planned = planned
        self._split = split_torch_state_dict_into_shards(
            dict(planned), filename_pattern=stem + "{suffix}.safetensors", max_shard_size=shard_size
        )
        self._open: dict[str, dict[str, Tensor]] = {}
        self.digests: dict[str, str] = {}

    @property
    def files(self) -> list[str]:
        return list(self._split.filename_to_tensors)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors over (the dictionary is empty afterwards). Raises `ExportError` for one that was not planned."""
        for name in list(tensors):
            tensor = tensors.pop(name)
            wanted = self._planned.get(name)
            if wanted is None or (wanted.shape, wanted.dtype) != (tensor.shape, tensor.dtype) or name in self.digests:
                raise ExportError(f"{self._folder}: {name} {_of(tensor)} is not of this model")
            self.digests[name] = digest(tensor)
            file = self._split.tensor_to_filename[name]
            self._open.setdefault(file, {})[name] = _own(tensor)
            if len(self._open[file]) == len(self._split.filename_to_tensors[file]):
                save_file(self._open.pop(file), self._folder / file, metadata={"format": "pt"})
                # safetensors makes files that only their owner reads; the folder is as the user's umask wants it.
                (self._folder / file).chmod(self._folder.stat().st_mode & 0o666)

    def finish(self) -> None:
        """The index, where there is more than one file. Raises `ExportError` where tensors did not come."""
        lost = [name for name in self._planned if name not in self.digests]
        if lost:
            raise ExportError(f"{self._folder} lacks {len(lost)} of the model's tensors, for instance {lost[0]}")
        if self._split.is_sharded:
            total = sum(tensor.numel() for tensor in self._planned.values())
            metadata = {"total_parameters": total, **self._split.metadata}
            index = {"metadata": metadata, "weight_map": self._split.tensor_to_filename}
            path = self._folder / f"{self._stem}.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def verify(self, file: str) -> None:
        """Reopen a file: each of its tensors is the one that was added, by its SHA-256. Raises `ExportError`."""
        with safe_open(self._folder / file, framework="pt") as opened:
            names = set(opened.keys())
            if names != set(self._split.filename_to_tensors[file]):
                raise ExportError(f"{self._folder / file}: the names in it are not those that were written")
            for name in names:
                tensor, wanted = opened.get_tensor(name), self._planned[name]
                same = (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype)
                if not same or digest(tensor) != self.digests[name]:
                    raise ExportError(f"{self._folder / file}: {name} {_of(tensor)} differs from the model's")


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    read: Callable[[Piece], dict[str, Tensor]],
    *,
    prepare: Callable[[Piece, dict[str, Tensor]], dict[str, Tensor]] = lambda piece, tensors: tensors,
    shard_size: int | str = SHARD_SIZE,
    step: Alone | None = None,
) -> None:
    """Write `folder`, which `from_pretrained` opens; it appears complete or not at all, after it was read back.

    `model` says what there is and brings its configuration; its weights may be on the meta device, or in parts.
    `read` gives the whole tensors of a piece, in host memory, by the model's own names; all ranks call it together.
    `prepare` makes of them what is to be written; it and all writing happen in the process that `step` chooses.
    """
    step = step or Alone()
    parts = pieces(model)
    planned = _plan(model, parts)
    with complete_or_not_at_all(folder, step) as partial_folder:
        shards = Shards(partial_folder, planned, shard_size)
        step(partial(_write_configuration, model, partial_folder))  # first: transformers clears other shards away

        def take(piece: Piece, tensors: dict[str, Tensor]) -> None:
            made = _on_disk(model, prepare(piece, tensors))
            tensors.clear()  # what was taken apart is held no longer
            shards.add(made)

        for piece in parts:
            step(partial(take, piece, read(piece)))
        step(shards.finish)
        step(partial(tokenizer.save_pretrained, partial_folder))
        for file in shards.files:
            step(partial(shards.verify, file))


@contextmanager
def complete_or_not_at_all(folder: Path, step: Alone) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when all went well."""
    # A name that no other attempt has, living or lost.
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")

    def begin() -> None:
        for left in folder.parent.glob(f".{folder.name}.????????.partial"):
            shutil.rmtree(left, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def publish() -> None:
        for path in [*unfinished.rglob("*"), unfinished]:
            disk.sync_folder(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        disk.sync_folder(folder.parent)

    try:
        step(begin)
        yield unfinished
        step(publish, last=True)
    except BaseException:
        if step.writes:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal; `tensor` is in host memory."""
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def meta_of(tensor: Tensor) -> Tensor:
    """Shape and dtype of the whole tensor, also where ZeRO-3 holds only a partition of it here."""
    return torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta")


def _plan(model: PreTrainedModel, parts: list[Piece]) -> dict[str, Tensor]:
    """What will be written, on the meta device, in the order in which it comes."""
    planned: dict[str, Tensor] = {}
    for piece in parts:
        planned |= _on_disk(model, {name: meta_of(tensor) for name, tensor in piece.tensors.items()})
    # transformers converts whole models; a conversion that went across pieces would show here.
    whole = _on_disk(model, {name: meta_of(t) for piece in parts for name, t in piece.tensors.items()})
    differing = {name: t.shape for name, t in whole.items()}.items() ^ {n: t.shape for n, t in planned.items()}.items()
    if differing:
        name = min(name for name, _ in differing)
        raise ExportError(f"{type(model).__name__} cannot be written block by block, for instance not {name}")
    return planned


def _on_disk(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named and cut as in published checkpoints; experts, for instance, stand one by one there. In the order of names:
    transformers' depends on where a model came from."""
    return dict(sorted(revert_weight_conversion(model, tensors).items()))


def _write_configuration(model: PreTrainedModel, folder: Path) -> None:
    """Everything but the weights: configurations, and the code of a model that brings its own."""
    was_caching, model.config.use_cache = model.config.use_cache, True  # training only switched it off
    model.save_pretrained(folder, state_dict={})
    model.config.use_cache = was_caching


def _own(tensor: Tensor) -> Tensor:
    """A view would hold the whole block that it is of."""
    tensor = tensor.detach()
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _of(tensor: Tensor) -> str:
    return f"({tuple(tensor.shape)}, {tensor.dtype})"
