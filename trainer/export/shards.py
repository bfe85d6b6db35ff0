"""Write a model as a Hugging Face folder from tensors that arrive a block at a time, never all of it in memory.

Memory contains the shard in progress and the current block (twice if transformers splits fused experts in it). Names
and shards are those of transformers' `save_pretrained`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from trainer.config.reading import read_file
from trainer.data.errors import in_short
from trainer.errors import StrataError
from trainer.export.published import restore_published
from trainer.export.unfinished import Unfinished
from trainer.model.blocks import Piece, full_shape, pieces
from trainer.model.new_rows import fold

SHARD_SIZE = "5GB"
_MOST_JSON_BYTES = 2**28
# The weight map of an index: the file of each tensor.
_CONTENT = TypeAdapter(Annotated[dict[str, Annotated[str, Field(pattern=r"^[\w.-]+$")]], Field(min_length=1)])


class ExportError(StrataError, RuntimeError):
    """A model cannot be written, or what was written differs from the model."""


class LocalSteps:
    """Run the steps of an export in a process without others."""

    writes = True  # whether this process runs the steps

    def __call__(self, work: Callable[[], None], *, last: bool = False) -> None:
        """Run `work`. `last` marks the step that completes the export, after which nothing can stop it."""
        work()

    def share(self, value: Any) -> Any:
        """Return `value` of the process that runs the steps."""
        return value


class Shards:
    """Write tensors, as they arrive, into the safetensors files that `planned` is split into.

    `planned` contains names, shapes and dtypes in the order of arrival; `shard_size` is in bytes, or a string such as
    "5GB". A shard is written, and its tensors are released, once its last tensor has arrived.
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
        """Take over tensors (the dictionary is empty afterwards). Raises `ExportError` for one that was not planned."""
        for name in list(tensors):
            tensor = tensors.pop(name)
            wanted = self._planned.get(name)
            if wanted is None or (wanted.shape, wanted.dtype) != (tensor.shape, tensor.dtype) or name in self.digests:
                raise ExportError(f"{self._folder}: {name} {_described(tensor)} does not belong to this model")
            self.digests[name] = digest(tensor)
            file = self._split.tensor_to_filename[name]
            self._open.setdefault(file, {})[name] = _own(tensor)
            if len(self._open[file]) == len(self._split.filename_to_tensors[file]):
                save_file(self._open.pop(file), self._folder / file, metadata={"format": "pt"})
                # safetensors makes files that only their owner can read; the folder's mode follows the umask.
                (self._folder / file).chmod(self._folder.stat().st_mode & 0o666)

    def finish(self) -> None:
        """Write the index, if there is more than one file. Raises `ExportError` if tensors are missing."""
        missing = [name for name in self._planned if name not in self.digests]
        if missing:
            raise ExportError(f"{self._folder} lacks {len(missing)} of the model's tensors, for instance {missing[0]}")
        if self._split.is_sharded:
            total = sum(tensor.numel() for tensor in self._planned.values())
            metadata = {"total_parameters": total, **self._split.metadata}
            index = {"metadata": metadata, "weight_map": self._split.tensor_to_filename}
            path = self._folder / f"{self._stem}.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def verify(self, file: str) -> None:
        """Reopen a file. Raises `ExportError` unless its tensors are those that were added, by their SHA-256."""
        with safe_open(self._folder / file, framework="pt") as opened:
            names = set(opened.keys())
            if names != set(self._split.filename_to_tensors[file]):
                raise ExportError(f"{self._folder / file}: the names in it are not those that were written")
            for name in names:
                tensor, wanted = opened.get_tensor(name), self._planned[name]
                same = (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype)
                if not same or digest(tensor) != self.digests[name]:
                    raise ExportError(f"{self._folder / file}: {name} {_described(tensor)} differs from the model's")


def damage_of(folder: Path, *, adapter: bool) -> str | None:
    """Return what a written model or adapter lacks, judged by its files' names, headers and sizes, or None."""
    stem, config = ("adapter_model", "adapter_config.json") if adapter else ("model", "config.json")
    index = folder / f"{stem}.safetensors.index.json"
    try:
        _mapping(folder / config)
        tensors: dict[str, set[str]] = {f"{stem}.safetensors": set()}
        if index.exists():
            tensors = {}
            for name, file in _CONTENT.validate_python(_mapping(index).get("weight_map")).items():
                tensors.setdefault(file, set()).add(name)
    except (OSError, ValueError, RecursionError) as error:
        return f"{folder}: is not a complete model ({in_short(error)})"
    for file, names in tensors.items():
        path = folder / file
        if not path.is_file():
            return f"{path}: is missing"
        try:
            with safe_open(path, framework="pt") as opened:
                missing = names - set(opened.keys())
        except (SafetensorError, OSError) as error:
            return f"{path}: cannot be read ({error})"
        if missing:
            return f"{path}: lacks {min(missing)}"
    return None


def _mapping(path: Path) -> dict[str, Any]:
    content = json.loads(read_file(path, most_bytes=_MOST_JSON_BYTES))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    read: Callable[[Piece], dict[str, Tensor]],
    *,
    convert: Callable[[Piece, dict[str, Tensor]], dict[str, Tensor]] = lambda piece, tensors: tensors,
    shard_size: int | str = SHARD_SIZE,
    step: LocalSteps | None = None,
    replace: bool = True,
    tokenizer_folder: Path | None = None,
) -> list[str]:
    """Write `folder`, which `from_pretrained` opens; it appears complete or not at all, after it was read back.

    Everything but the weights is as the model's base was published, but for what the run changed: returns a line for
    each such key, in the process that writes (see `published.py`).

    `model` provides names, shapes and configuration; its weights may be on the meta device, or partitioned.
    `read` returns the whole tensors of a piece, in host memory, by the model's own names; all ranks call it together.
    `convert` turns them into what is written. It and all writing happen in the process that `step` chooses.
    `replace` is that of `complete_or_not_at_all`. `tokenizer_folder` has the tokenizer's published files, if they are
    not where it was loaded from.
    """
    step = step or LocalSteps()
    parts = pieces(model)
    planned = _plan(model, parts)
    changed: list[str] = []
    with complete_or_not_at_all(folder, step, replace=replace) as partial_folder:
        shards = Shards(partial_folder, planned, shard_size)
        step(partial(_write_configuration, model, partial_folder))  # first: transformers removes other shards

        def take(piece: Piece, tensors: dict[str, Tensor]) -> None:
            made = _on_disk(model, convert(piece, tensors))
            tensors.clear()  # release what was split
            shards.add(made)

        for piece in parts:
            step(partial(take, piece, read(piece)))
        step(shards.finish)
        step(partial(save_tokenizer, tokenizer, partial_folder))
        restore = partial(restore_published, model, tokenizer, partial_folder, tokenizer_folder=tokenizer_folder)
        step(lambda: changed.extend(restore()))
        for file in shards.files:
            step(partial(shards.verify, file))
    return changed


@contextmanager
def complete_or_not_at_all(folder: Path, step: LocalSteps, *, replace: bool = True) -> Iterator[Path]:
    """Yield a folder to write into, and rename it to `folder` if all went well. An existing `folder` is replaced if
    `replace`; otherwise it stays, and `ExportError` is raised."""
    made: list[Unfinished] = []

    def publish() -> None:
        try:
            made[0].publish(replace=replace)
        except FileExistsError as error:
            raise ExportError(f"{error}; name another OUT") from error

    try:
        step(lambda: made.append(Unfinished(folder)))
        yield made[0].path if made else folder  # only the process that writes has one
        step(publish, last=True)
    finally:
        for unfinished in made:
            unfinished.remove()
            unfinished.close()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's files into `folder`. Raises `ExportError` if one of its named chat templates, each of which
    becomes a file of its name, would be written elsewhere."""
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    for name in templates:
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable() or len(name) > 100:
            raise ExportError(
                f"the tokenizer has a chat template named {str(name)[:100]!r}, which cannot be the name of a file: "
                "rename it in the tokenizer's files"
            )
    tokenizer.save_pretrained(folder)


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, in hexadecimal; `tensor` is in host memory."""
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def meta_of(tensor: Tensor) -> Tensor:
    """Return a meta tensor with shape and dtype of the whole tensor, even if ZeRO-3 has only a partition here."""
    return torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta")


def _plan(model: PreTrainedModel, parts: list[Piece]) -> dict[str, Tensor]:
    """Return what will be written, on the meta device, in the order of writing."""
    planned: dict[str, Tensor] = {}
    for piece in parts:
        planned |= _on_disk(model, {name: meta_of(tensor) for name, tensor in piece.tensors.items()})
    # transformers converts whole models: find conversions that involve several pieces.
    whole = _on_disk(model, {name: meta_of(t) for piece in parts for name, t in piece.tensors.items()})
    differing = {name: t.shape for name, t in whole.items()}.items() ^ {n: t.shape for n, t in planned.items()}.items()
    if differing:
        name = min(name for name, _ in differing)
        raise ExportError(f"{type(model).__name__} cannot be written block by block, for instance not {name}")
    return planned


def _on_disk(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors named and split as in published checkpoints: experts one by one, the rows of new tokens in their
    tables. They are sorted by name: transformers' order depends on where a model was loaded from."""
    return dict(sorted(revert_weight_conversion(model, fold(model, tensors)).items()))


def _write_configuration(model: PreTrainedModel, folder: Path) -> None:
    """Write everything but the weights: configurations, and the code of a model that has its own."""
    was_caching, model.config.use_cache = model.config.use_cache, True  # switched off for training
    model.save_pretrained(folder, state_dict={})
    model.config.use_cache = was_caching


def _own(tensor: Tensor) -> Tensor:
    """Clone views: a view would keep its whole block in memory."""
    tensor = tensor.detach()
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _described(tensor: Tensor) -> str:
    return f"({tuple(tensor.shape)}, {tensor.dtype})"
