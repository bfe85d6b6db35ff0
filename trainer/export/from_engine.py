"""Write what a live engine has trained: the model as a Hugging Face folder, adapters in PEFT's format.

Weights are gathered a block at a time and written by rank 0, which needs memory for a shard and a block (`shards.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
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

from trainer.checkpoint.lease import LeaseError
from trainer.data.tokenizer import new_ids
from trainer.export.adapter_rows import add_new_rows
from trainer.export.shards import (
    ExportError,
    LocalSteps,
    complete_or_not_at_all,
    digest,
    save_tokenizer,
    write_model,
)
from trainer.model.adapters import Adapted
from trainer.model.blocks import Piece, is_partitioned, pieces
from trainer.model.merging import Merger, plain_twin

__all__ = ["ExportError", "export", "export_adapter", "export_merged", "save", "write_adapter", "write_merged"]


class RankZeroSteps(LocalSteps):
    """Run the steps of an export on rank 0. After each, all ranks learn whether it failed, and call `stop`.

    `stop` is called on all ranks at the same points, may communicate, and ends the export by raising. The last step,
    which gives what was written its final name, runs inside `publishing`.
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
            except Exception as error:  # reported first to the other ranks, which wait for this one
                failure = error
        reported = self.share(None if failure is None else f"{type(failure).__name__}: {failure}")
        if isinstance(failure, ExportError | LeaseError):
            raise failure
        if reported is not None:  # the same value on all ranks
            raise ExportError(f"rank 0 could not write: {reported}") from failure
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
    step: RankZeroSteps | None = None,
) -> tuple[list[tuple[str, str]], ExportError | None]:
    """Write what was trained into a run folder. Returns what was written, as (label, path or what changed), and the
    error of merging.

    Whole models are written to `model/`. The adapters of all blocks are written to `adapter/` in PEFT's format; before
    that, with `merge`, the base with merged adapters to `model/`. A run is finished when what it writes last exists.
    `step` runs the steps of the export.
    """
    if adapters is None:
        changed = export(engine, tokenizer, folder / "model", step=step)
        return _model(folder, changed), None
    written, failure = [("Adapter", str(folder / "adapter"))], None
    if merge:
        try:
            changed = export_merged(engine, adapters, tokenizer, folder / "model", step=step)
            written += _model(folder, changed)
        except ExportError as error:
            failure = error
    export_adapter(engine, adapters, folder / "adapter", tokenizer=tokenizer, step=step)
    return written, failure


def _model(folder: Path, changed: list[str]) -> list[tuple[str, str]]:
    return [("Model", str(folder / "model")), *(("  changed there", line) for line in changed)]


def export(
    engine: DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    step: RankZeroSteps | None = None,
    **options: Any,
) -> list[str]:
    """Gather the weights block by block and write `folder`, which `from_pretrained` opens. Returns, on rank 0, what
    `write_model` does.

    All ranks take part; rank 0 writes. The folder appears complete or not at all, and only after it was read back and
    compared with the model. `options` are those of `write_model`. Raises `ExportError` on the other ranks if rank 0
    fails.
    """
    engine.empty_partition_cache()  # an evaluation leaves prefetched parameters in flight
    return write_model(
        engine.module, tokenizer, folder, lambda piece: _gather(piece.tensors), step=step or RankZeroSteps(), **options
    )


def export_adapter(
    engine: DeepSpeedEngine,
    adapters: Adapted,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    step: RankZeroSteps | None = None,
) -> None:
    """Write the adapters of all blocks in PEFT's format, which `PeftModel.from_pretrained` opens on the base. If
    `tokenizer` has new tokens, it is written beside them.

    Only adapters are gathered, and rank 0 needs memory for all of them. As in `export`, all ranks take part, and the
    folder is compared before it appears.
    """
    engine.empty_partition_cache()
    everything = adapters.model.state_dict(keep_vars=True)
    weights = _gather({name: everything[name] for name in everything if name in adapters.names})
    write_adapter(adapters.model, weights, folder, tokenizer=tokenizer, step=step or RankZeroSteps())


def export_merged(
    engine: DeepSpeedEngine,
    adapters: Adapted,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    step: RankZeroSteps | None = None,
) -> list[str]:
    """Write the base with the adapters merged into it, as `export` writes a model."""
    engine.empty_partition_cache()
    return write_merged(adapters, _gather, tokenizer, folder, step=step or RankZeroSteps())


def write_adapter(
    model: PeftModel,
    weights: dict[str, Tensor],
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    step: LocalSteps | None = None,
    replace: bool = True,
) -> None:
    """Write `weights` (whole, on the host) as an adapter of `model`, and verify it."""
    step = step or LocalSteps()
    with complete_or_not_at_all(folder, step, replace=replace) as unfinished:

        def write() -> None:
            # Embeddings with adapters belong to the base, but PEFT would write them as well.
            model.save_pretrained(unfinished, state_dict=dict(weights), save_embedding_layers=False)
            named = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
            _verify(unfinished, named | add_new_rows(model, weights, unfinished))
            if tokenizer is not None and new_ids(tokenizer):
                save_tokenizer(tokenizer, unfinished)
            config = PeftConfig.from_pretrained(str(unfinished))
            if config.peft_type != model.active_peft_config.peft_type:
                raise ExportError(f"{folder}: adapter_config.json says {config.peft_type}")

        step(write)


def write_merged(
    adapters: Adapted,
    gather: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    step: LocalSteps | None = None,
) -> list[str]:
    """Merge block by block and write the model. `gather` copies live tensors, whole, into host memory. Raises
    `ExportError` if PEFT cannot merge."""
    step = step or LocalSteps()
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
    return write_model(
        plain_twin(adapters, tied=tied),
        tokenizer,
        folder,
        lambda piece: gather(merger.tensors(piece)),
        convert=merge,
        step=step,
    )


def _still_tied(adapters: Adapted, gather: Callable[[dict[str, Tensor]], dict[str, Tensor]], step: LocalSteps) -> bool:
    """Return whether the embeddings and the head of a tied base are equal after merging the adapters of either."""
    model, merger = plain_twin(adapters, tied=False), Merger(adapters)
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    digests: list[str] = []

    def note(piece: Piece, tensors: dict[str, Tensor]) -> None:
        merged = merger.merge(piece, tensors)
        digests.extend(digest(merged[name]) for name, t in piece.tensors.items() if any(t is end for end in ends))

    for piece in pieces(model):
        if any(t is end for t in piece.tensors.values() for end in ends):
            tensors = gather(merger.tensors(piece))
            step(partial(note, piece, tensors))
    return step.share(len(set(digests)) == 1)


@torch.no_grad()
def _gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in host memory on rank 0, and nothing on other ranks. Tensors are gathered one at a time; names
    that share a tensor share its copy."""
    writes = dist.get_rank() == 0
    copies: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in copies:
            with deepspeed.zero.GatheredParameters([tensor], enabled=is_partitioned(tensor)):
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if writes else tensor
    return {name: copies[id(tensor)] for name, tensor in tensors.items()} if writes else {}


def _verify(folder: Path, weights: dict[str, Tensor]) -> None:
    """Reopen a written adapter. Raises `ExportError` if it does not contain exactly `weights`."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as opened:
        stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
    for name in stored.keys() | weights.keys():
        if name not in stored:
            raise ExportError(f"{folder} lacks {name}")
        tensor = stored[name]
        same = name in weights and tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name])
        if not same:
            raise ExportError(f"{folder}: {name} ({tuple(tensor.shape)}, {tensor.dtype}) differs from the model's")
