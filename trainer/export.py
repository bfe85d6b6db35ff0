"""Write what a live engine has trained: the model as a Hugging Face folder, adapters in PEFT's format.

Weights are gathered a block at a time and written by rank 0, which holds a shard and a block (`trainer/shards.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.adapters import Adapted
from trainer.blocks import Piece, pieces
from trainer.checkpoint import LeaseError
from trainer.merging import Merger, plain_twin
from trainer.shards import Alone, ExportError, complete_or_not_at_all, digest, write_model

__all__ = ["ExportError", "export", "export_adapter", "export_merged", "save", "write_adapter", "write_merged"]


class Together(Alone):
    """Rank 0 takes the steps; after each, all ranks know whether it failed, and ask `stop` whether to go on.

    `stop` is called on all ranks at the same points, may communicate, and ends the export by raising. What was written
    takes its place inside `publishing`.
    """

    def __init__(
        self,
        stop: Callable[[], None] | None = None,
        publishing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.writes = dist.get_rank() == 0
        self._stop = stop
        self._publishing = publishing

    def __call__(self, work: Callable[[], None], *, last: bool = False) -> None:
        failure = None
        if self.writes:
            try:
                with self._publishing() if last else nullcontext():
                    work()
            except Exception as error:  # told to the other ranks first, which would wait for this one
                failure = error
        told = self.share(None if failure is None else f"{type(failure).__name__}: {failure}")
        if isinstance(failure, ExportError | LeaseError):
            raise failure
        if told is not None:  # the same on all ranks, which then take the same way on
            raise ExportError(f"rank 0 could not write: {told}") from failure
        if self._stop is not None and not last:
            self._stop()

    def share(self, value: Any) -> Any:
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]


def save(
    engine: DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    adapters: Adapted | None,
    *,
    merge: bool,
    step: Together | None = None,
) -> tuple[list[tuple[str, Path]], ExportError | None]:
    """Write what was trained into a run folder; returns what there is now, as (label, path).

    `model/` for whole models; for adapters `adapter/` in PEFT's format, those of all blocks, and before it, with
    `merge`, the model that they make of their base: a run is finished when what it writes last is there. Where merging
    fails, the error is returned with what there is. `step` is how, and whether, ranks go on together.
    """
    if adapters is None:
        export(engine, tokenizer, folder / "model", step=step)
        return [("Model", folder / "model")], None
    written, failure = [("Adapter", folder / "adapter")], None
    if merge:
        try:
            export_merged(engine, adapters, tokenizer, folder / "model", step=step)
            written.append(("Model", folder / "model"))
        except ExportError as error:
            failure = error
    export_adapter(engine, adapters, folder / "adapter", step=step)
    return written, failure


def export(
    engine: DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    step: Together | None = None,
    **options: Any,
) -> None:
    """Gather the weights block by block and write `folder`, which `from_pretrained` opens.

    All ranks take part; rank 0 writes. The folder appears complete or not at all, and only after it was read back and
    compared with the model. `options` are those of `write_model`. Raises `ExportError` on the other ranks where rank 0
    fails.
    """
    engine.empty_partition_cache()  # an evaluation leaves prefetched parameters in flight
    write_model(
        engine.module, tokenizer, folder, lambda piece: _gather(piece.tensors), step=step or Together(), **options
    )


def export_adapter(engine: DeepSpeedEngine, adapters: Adapted, folder: Path, *, step: Together | None = None) -> None:
    """Write the adapters of all blocks in PEFT's format, which `PeftModel.from_pretrained` opens on the base.

    Only they are gathered, and rank 0 holds them. As `export`: all ranks take part, and the folder is compared before
    it appears.
    """
    engine.empty_partition_cache()
    everything = adapters.model.state_dict(keep_vars=True)
    weights = _gather({name: everything[name] for name in everything if name in adapters.names})
    write_adapter(adapters.model, weights, folder, step=step or Together())


def export_merged(
    engine: DeepSpeedEngine,
    adapters: Adapted,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    step: Together | None = None,
) -> None:
    """Write the base with the adapters merged into it, as `export` writes a model."""
    engine.empty_partition_cache()
    write_merged(adapters, _gather, tokenizer, folder, step=step or Together())


def write_adapter(model: PeftModel, weights: dict[str, Tensor], folder: Path, *, step: Alone | None = None) -> None:
    """Write `weights` (whole, on the host) as an adapter of `model`, and compare."""
    step = step or Alone()
    with complete_or_not_at_all(folder, step) as partial:

        def write() -> None:
            # Embeddings that adapters sit on are the base's: PEFT would write them as well.
            model.save_pretrained(partial, state_dict=dict(weights), save_embedding_layers=False)
            named = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
            _verify(partial, named)
            config = PeftConfig.from_pretrained(str(partial))
            if config.peft_type != model.active_peft_config.peft_type:
                raise ExportError(f"{folder}: adapter_config.json says {config.peft_type}")

        step(write)


def write_merged(
    adapters: Adapted,
    gather: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    step: Alone | None = None,
) -> None:
    """Merge block by block; `gather` makes live tensors whole, in host memory. Raises `ExportError` where PEFT cannot
    merge."""
    step = step or Alone()
    base = adapters.model.get_base_model()
    merger = Merger(adapters)

    def merge(piece: Piece, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            return merger.merge(piece, tensors)
        except Exception as error:  # NotImplementedError, RuntimeError, ...: not every method can be merged
            raise ExportError(
                f"substrate.merge: PEFT cannot merge {adapters.model.active_peft_config.peft_type.value} into "
                f"{type(base).__name__}: {error}. The adapter was written to {folder.with_name('adapter')}; set "
                "substrate.merge=false"
            ) from error

    tied = base.config.get_text_config().tie_word_embeddings and _still_tied(adapters, gather, step)
    write_model(
        plain_twin(adapters, tied=tied),
        tokenizer,
        folder,
        lambda piece: gather(merger.tensors(piece.path)),
        prepare=merge,
        step=step,
    )


def _still_tied(adapters: Adapted, gather: Callable[[dict[str, Tensor]], dict[str, Tensor]], step: Alone) -> bool:
    """Whether embeddings and head of a tied base are equal with the adapters that sit on one of them, or both."""
    model, merger = plain_twin(adapters, tied=False), Merger(adapters)
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    found: list[str] = []

    def note(piece: Piece, tensors: dict[str, Tensor]) -> None:
        merged = merger.merge(piece, tensors)
        found.extend(digest(merged[name]) for name, t in piece.tensors.items() if any(t is end for end in ends))

    for piece in pieces(model):
        if any(t is end for t in piece.tensors.values() for end in ends):
            tensors = gather(merger.tensors(piece.path))
            step(lambda piece=piece, tensors=tensors: note(piece, tensors))
    return step.share(len(set(found)) == 1)


@torch.no_grad()
def _gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory on rank 0, one tensor at a time; nothing on the others. Names that share a tensor share
    its copy."""
    speaks = dist.get_rank() == 0
    copies: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in copies:
            with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if speaks else tensor
    return {name: copies[id(tensor)] for name, tensor in tensors.items()} if speaks else {}


def _verify(folder: Path, weights: dict[str, Tensor]) -> None:
    """Reopen an adapter that was written."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
    for name in found.keys() | weights.keys():
        if name not in found:
            raise ExportError(f"{folder} lacks {name}")
        tensor = found[name]
        same = name in weights and tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name])
        if not same:
            raise ExportError(f"{folder}: {name} ({tuple(tensor.shape)}, {tensor.dtype}) differs from the model's")
