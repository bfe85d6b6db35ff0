"""Record what determines a run's results besides the weights, and compare it when the run is used again.

Checkpoints and deltas leave to the base model what never trained. `fingerprint.py` recognises its weights. This module
recognises the rest: the configuration from which the model is built, its buffers, code in a model folder, the adapters'
configuration and the tokenizer. The same weights with a different `rope_theta` are a different model.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from trainer.data.tokenizer import tokenizer_identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys of a configuration for names, places, versions, the dtype of the weights and what a call returns. All other keys
# are compared, whatever a model calls them.
_BOOKKEEPING = frozenset(
    "_name_or_path name_or_path _commit_hash transformers_version architectures auto_map dtype torch_dtype use_cache "
    "_attn_implementation attn_implementation quantization_config return_dict output_hidden_states output_attentions "
    "return_dict_in_generate output_scores output_logits "
    "_from_model_config base_model_name_or_path revision peft_version inference_mode auto_mapping task_type "
    "runtime_config init_lora_weights".split()
)
# A loop may take these from the tokenizer: `transformers.Trainer` does.
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Attributes of a tokenizer that change what it returns, besides those of `tokenizer_identity`.
CALL_SETTINGS = ("padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces")
_SHORT = 200

# What each part of a record is called in messages.
_PARTS = {
    "kind": "the model's ",
    "config": "config.json: ",
    "generation": "generation_config.json: ",
    "code": "the model's own code: ",
    "buffers": "the model's buffer ",
    "adapters": "adapter configuration: ",
    "tokenizer": "tokenizer: ",
}


class Identity(BaseModel):
    """A record of a model. `dtype` and `blocks` (the path of the list of blocks) tell how to read a checkpoint and
    are not compared; `versions` explain differences."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    kind: str
    dtype: str
    blocks: str
    config: dict[str, Any]
    generation: dict[str, Any]
    code: dict[str, str]
    buffers: dict[str, str] | None
    adapters: dict[str, Any]
    tokenizer: dict[str, Any] | None
    versions: dict[str, str]


def identity_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, *, blocks: str, buffers: bool = True
) -> Identity:
    """Record `model`, with or without adapters, and the tokenizer that it is trained with.

    Pass `buffers=False` for a model whose weights are not loaded.
    """
    adapters = getattr(model, "peft_config", {})
    unwrap = getattr(model, "get_base_model", None)
    base = unwrap() if adapters and unwrap is not None else model
    dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)
    return Identity(
        kind=type(base).__name__,
        dtype=str(dtype).removeprefix("torch."),
        blocks=blocks,
        config=plain_settings(getattr(base, "config", None)),
        generation=plain_settings(getattr(base, "generation_config", None)),
        code=_code(base),
        buffers=_buffers(base, dtype) if buffers else None,
        adapters={str(name): plain_settings(config) for name, config in adapters.items()},
        tokenizer=None if tokenizer is None else _tokenizer(tokenizer),
        versions={name: version(name) for name in ("transformers", "peft")},
    )


def buffer_digest(buffer: Tensor, dtype: torch.dtype) -> str:
    """Return the SHA-256 of a buffer in the dtype of the weights: DeepSpeed casts buffers under some stages only."""
    buffer = buffer.detach().cpu()
    buffer = buffer.to(dtype) if buffer.is_floating_point() else buffer
    return hashlib.sha256(buffer.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def differences(before: Identity, now: Identity) -> list[str]:
    """Return a line for each key that differs, with both values.

    A part that one of the records lacks (None) is not compared. If library versions differ, a key that only one of them
    writes is not a difference: its value is what the other version assumes.
    """
    lines = []
    for part, label in _PARTS.items():
        old, new = getattr(before, part), getattr(now, part)
        if old is None or new is None:
            continue
        other_version = part in ("config", "generation", "adapters") and before.versions != now.versions
        ours, theirs = (dict(_flat("", values if part != "kind" else {"class": values})) for values in (old, new))
        for key in sorted({*ours, *theirs}):
            if other_version and (key not in ours or key not in theirs):
                continue
            first, second = ours.get(key), theirs.get(key)
            if first != second:
                lines.append(f"{label}{key} is {_short(second)}, and was {_short(first)} when the run began")
    if lines and before.versions != now.versions:
        lines.append(f"(with {_versions(now)}, and then with {_versions(before)})")
    return lines


def new_versions(before: Identity, now: Identity) -> str | None:
    """Return a warning if libraries that build the model have changed their version since the run began, else None."""
    if before.versions == now.versions:
        return None
    return f"the run began with {_versions(before)}, but this is {_versions(now)}: defaults may have changed"


def _versions(identity: Identity) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(identity.versions.items()))


def plain_settings(config: Any) -> dict[str, Any]:
    """Return a configuration of transformers or PEFT as plain JSON, the same in every process, without bookkeeping."""
    if config is None or not hasattr(config, "to_dict"):
        return {}
    return _plain(config.to_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items() if str(key) not in _BOOKKEEPING}
    if isinstance(value, set | frozenset):
        return sorted((_plain(entry) for entry in value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(getattr(value, "value", value))  # enumerations, dtypes


def _code(model: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of each code file of a model folder that the model uses, by name."""
    from transformers.dynamic_module_utils import get_relative_import_files  # listing checkpoints must not import it

    files: set[str] = set()
    for kind in (type(model), type(getattr(model, "config", None))):
        if kind.__module__.startswith("transformers_modules."):
            file = inspect.getfile(kind)
            files |= {file, *get_relative_import_files(file)}
    return {Path(file).name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in sorted(files)}


def _buffers(base: nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """Return digests of the buffers that are saved with the weights; the others follow from the configuration."""
    saved = set(base.state_dict(keep_vars=True))
    own = {
        name.replace(".base_layer.", "."): buffer
        for name, buffer in base.named_buffers()
        if name in saved and not _of_adapter(base, name)
    }
    return {name: buffer_digest(buffer, dtype) for name, buffer in sorted(own.items())}


def _of_adapter(base: nn.Module, name: str) -> bool:
    """Return whether a buffer belongs to PEFT's wrapper around a layer, and not to the layer itself."""
    path = name.split(".")[:-1]
    around = [i for i in range(len(path)) if hasattr(base.get_submodule(".".join(path[: i + 1])), "base_layer")]
    return bool(around) and "base_layer" not in path[around[-1] :]


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    record = tokenizer_identity(tokenizer)
    record.pop("patched_by")  # what a library makes of the template is checked with the data
    template = record["template"]
    # Templates can be long: record checksums, by name if there are several.
    record["template"] = None if template is None else _checksums(template)
    return json.loads(json.dumps(record | {name: getattr(tokenizer, name, None) for name in CALL_SETTINGS}))


def _checksums(template: Any) -> Any:
    if isinstance(template, Mapping):
        return {name: _checksums(text) for name, text in template.items()}
    return f"sha256:{hashlib.sha256(str(template).encode()).hexdigest()}"


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings by dotted keys."""
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), entry)
    elif prefix:
        yield prefix, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]} ..."
