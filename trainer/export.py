"""Write the trained model as a Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from trainer.adapters import Adapted, merged

_HEARTBEAT_SECONDS = 10


class ExportError(RuntimeError):
    """What was written is not what the model holds."""


def save(
    engine: DeepSpeedEngine, tokenizer: PreTrainedTokenizerBase, folder: Path, adapters: Adapted | None, *, merge: bool
) -> tuple[list[tuple[str, Path]], ExportError | None]:
    """Write what was trained into a run folder; returns what there is now, as (label, path).

    `model/` for whole models; `adapter/` in PEFT's format for adapters, those of all blocks, and with `merge` also the
    model that they make of their base. Where that fails, the error is returned with what there is.
    """
    if adapters is None:
        export(engine, tokenizer, folder / "model")
        return [("Model", folder / "model")], None
    export_adapter(engine, adapters, folder / "adapter")
    written = [("Adapter", folder / "adapter")]
    if not merge:
        return written, None
    try:
        export_merged(engine, adapters, tokenizer, folder / "model")
    except ExportError as error:
        return written, error
    return [*written, ("Model", folder / "model")], None


def export(engine: DeepSpeedEngine, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Gather the weights parameter by parameter and write `folder`, which `from_pretrained` opens.

    All ranks take part; rank 0 holds the whole model in host memory and writes. The folder appears complete or not at
    all, and only after it was read back and compared with the model.
    """
    weights = _gather(engine, engine.module.state_dict(keep_vars=True))
    _write_together(engine, lambda: _write_model(engine.module, weights, tokenizer, folder))


def export_adapter(engine: DeepSpeedEngine, adapters: Adapted, folder: Path) -> None:
    """Write the adapters of all blocks in PEFT's format, which `PeftModel.from_pretrained` opens on the base.

    Only they are gathered. As `export`: all ranks take part, and the folder is compared before it appears.
    """
    everything = adapters.model.state_dict(keep_vars=True)
    weights = _gather(engine, {name: everything[name] for name in everything if name in adapters.names})
    _write_together(engine, lambda: _write_adapter(adapters.model, weights, folder))


def export_merged(engine: DeepSpeedEngine, adapters: Adapted, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the base with the adapters merged into it, as `export` writes a model."""
    weights = _gather(engine, adapters.model.state_dict(keep_vars=True))
    _write_together(engine, lambda: _write_merged(adapters, weights, tokenizer, folder))


def _gather(engine: DeepSpeedEngine, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory on rank 0, one tensor at a time. Names that share a tensor share its copy."""
    engine.empty_partition_cache()  # an evaluation leaves prefetched parameters in flight
    speaks = dist.get_rank() == 0
    copies: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in copies:
            with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                copies[id(tensor)] = tensor.detach().cpu().clone() if speaks else tensor
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}


def _write_together(engine: DeepSpeedEngine, write: Callable[[], None]) -> None:
    """`write` on rank 0, in the background; the others wait."""
    with ThreadPoolExecutor(max_workers=1) as background:
        written = background.submit(write) if dist.get_rank() == 0 else None
        _wait_together(written, engine.device)
    if written is not None:
        written.result()  # raises what writing raised


def _wait_together(written: Future[None] | None, device: torch.device) -> None:
    """Until rank 0 has `written`. In short collectives: a large model takes longer than one may last."""
    done = torch.zeros((), device=device)
    while not done:
        if written is not None:
            wait([written], timeout=_HEARTBEAT_SECONDS)
            done.fill_(written.done())
        dist.broadcast(done, src=0)


@contextmanager
def _complete_or_not_at_all(folder: Path) -> Iterator[Path]:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _write_model(
    model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    with _complete_or_not_at_all(folder) as partial:
        was_caching, model.config.use_cache = model.config.use_cache, True  # training only switched it off
        model.save_pretrained(partial, state_dict=dict(weights))  # it empties what it is given
        model.config.use_cache = was_caching
        tokenizer.save_pretrained(partial)
        # On disk experts stand one by one, as in the checkpoints that other tools read.
        _verify(partial, revert_weight_conversion(model, dict(weights)))


def _write_adapter(model: PeftModel, weights: dict[str, Tensor], folder: Path) -> None:
    with _complete_or_not_at_all(folder) as partial:
        # Embeddings that adapters sit on are the base's: PEFT would write them as well.
        model.save_pretrained(partial, state_dict=dict(weights), save_embedding_layers=False)
        named = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
        _verify(partial, {name: tensor.contiguous() for name, tensor in named.items()})
        config = PeftConfig.from_pretrained(str(partial))
        if config.peft_type != model.active_peft_config.peft_type:
            raise ExportError(f"{folder}: adapter_config.json says {config.peft_type}")


def _write_merged(
    adapters: Adapted, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """A second model in host memory, of the gathered tensors, because the engine's own is in parts."""
    base = adapters.model.get_base_model()
    try:
        model = merged(adapters, weights)
    except Exception as error:  # NotImplementedError, RuntimeError, ...: not every method can be merged
        raise ExportError(
            f"substrate.merge: PEFT cannot merge {adapters.model.active_peft_config.peft_type.value} into "
            f"{type(base).__name__}: {error}. The adapter was written to {folder.with_name('adapter')}; set "
            "substrate.merge=false"
        ) from error
    _tie_again(model, base)
    model.generation_config = base.generation_config
    _write_model(model, dict(model.state_dict(keep_vars=True)), tokenizer, folder)


def _tie_again(model: PreTrainedModel, base: PreTrainedModel) -> None:
    """PEFT unties embeddings and head in a merged model, also where no adapter made them differ."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if base.config.get_text_config().tie_word_embeddings and torch.equal(embeddings, head):
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = True
        model.tie_weights()


def _verify(folder: Path, weights: dict[str, Tensor]) -> None:
    """Reopen what was written. Of names that share a tensor one is enough."""
    owners = {name: id(tensor) for name, tensor in weights.items()}
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                tensor = opened.get_tensor(name)
                if name not in weights or not torch.equal(tensor, weights[name]) or tensor.dtype != weights[name].dtype:
                    raise ExportError(
                        f"{folder}: {name} ({tuple(tensor.shape)}, {tensor.dtype}) differs from the model's"
                    )
                found.add(owners[name])
    lost = [name for name in weights if owners[name] not in found]
    if lost:
        raise ExportError(f"{folder} lacks {len(lost)} of the model's tensors, for instance {lost[0]}")
