"""Put adapters on a model, with PEFT: made anew from its own configuration, or loaded to continue training."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from trainer.config.schema import AdapterSubstrate, FullSubstrate, RunConfig
from trainer.model.adapter_checks import (
    OF_WHOLE_WEIGHTS,
    AdapterError,
    adapter_tensors,
    check_frozen_towers,
    check_names,
    check_patterns,
    check_readable,
    check_saved,
    leave_out_routers,
    leave_out_towers,
    read_configuration,
    refuse_method,
)
from trainer.model.blocks import NEW_ROWS, full_shape
from trainer.model.new_rows import WithNewRows, gathered
from trainer.model.partitions import created_whole

_WEIGHTS = "adapter_model.safetensors"
# The names that PEFT gives a module inside its own.
_WRAPPED = re.compile(r"(\.token_adapter)?\.(base_layer|original_module|modules_to_save\..+)$")


def has_adapters(model: nn.Module) -> bool:
    """Return whether PEFT has put layers of its own into `model`."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@dataclass(frozen=True)
class Adapted:
    """A model with adapters, and the names of the parameters and buffers to save."""

    model: PeftModel
    names: frozenset[str]
    warnings: tuple[str, ...] = ()


def adapt(
    model: PreTrainedModel,
    config: AdapterSubstrate,
    *,
    stage: int = 0,
    quantization: str | None = None,
    vision: str = "frozen",
    empty: bool = False,
) -> Adapted:
    """Put the adapters of `config` on `model`, in the base's dtype; what they train requires gradients.

    `stage` is ZeRO's, `quantization` that of the base, `vision` whether adapters may sit on a multimodal model's
    towers ("train" or "frozen"); `empty` leaves the adapters on the meta device, for the dry run. Raises
    `AdapterError`.
    """
    if has_adapters(model):
        raise AdapterError(
            "model.path: this model comes with adapters: set model.path to their base, and substrate.adapter to the "
            "folder of the adapters to continue with"
        )
    base = {id(tensor) for _, tensor in adapter_tensors(model)}
    warnings = []
    if config.adapter is None:
        key, made = "substrate.peft", read_configuration(config.peft or {}, quantization)
    else:
        key, made = "substrate.adapter", _read(config.adapter, quantization)
        if made.base_model_name_or_path and not _same(made.base_model_name_or_path, model.name_or_path):
            warnings.append(
                f"substrate.adapter: '{config.adapter}' was trained on {made.base_model_name_or_path}, and model.path "
                f"is {model.name_or_path or 'none'}"
            )
    if getattr(made, "megatron_config", None):
        module = getattr(made, "megatron_core", None)
        raise AdapterError(f"{key}.megatron_config: PEFT would import {module!r} for it; allowed: null")
    if stage == 3 and PeftType(made.peft_type) in OF_WHOLE_WEIGHTS:
        raise _partitioned(made, key)
    if config.adapter is None:
        check_names(model, made, key)
    leave_out_routers(model, made, key)
    if vision == "frozen":
        leave_out_towers(model, made, key)
    asked = copy.deepcopy(made)  # PEFT adds targets and patterns of its own for stacked experts
    adapted = _put_on(model, made, key, stage=stage, empty=empty)
    check_patterns(adapted, asked, key)
    if vision == "frozen":
        check_frozen_towers(adapted, key)
    if config.adapter is not None:
        written = _check_weights(adapted, config.adapter, empty=empty)
        if not empty:
            with gathered(written, modifier_rank=0):
                adapted.load_adapter(config.adapter, "default", is_trainable=True, autocast_adapter_dtype=False)
    # Of the base's tensors, those that PEFT trains as well: `bias`.
    names = frozenset(n for n, tensor in adapter_tensors(adapted) if id(tensor) not in base or tensor.requires_grad)
    check_saved(adapted, names, key)
    _freeze(adapted, config.frozen)
    names |= _with_new_rows(adapted, key)
    # fp32 adapters in a bf16 model would be cast by DeepSpeed, and ZeRO keeps fp32 masters of them anyway.
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype != model.dtype:
            parameter.data = parameter.data.to(model.dtype)
    return Adapted(adapted, names, tuple(warnings))


def _with_new_rows(adapted: PeftModel, key: str) -> set[str]:
    """Let the rows of new tokens train beside the adapters. Returns what is saved because of them: the rows, and their
    tables unless PEFT's format has rows of this kind. Raises `AdapterError` for adapters on their modules."""
    for name, module in adapted.named_modules():
        if isinstance(module, WithNewRows) and (wrapped := _WRAPPED.search(name)):
            raise AdapterError(
                f"{key}: PEFT would also train {name[: wrapped.start()].removeprefix('base_model.model.')}, of which "
                "always_on trains the new rows; take it out of target_modules, modules_to_save and "
                "trainable_token_indices, or set always_on.embeddings and always_on.head to false"
            )
    names = set()
    for name, parameter in adapted.named_parameters():
        path, _, leaf = name.rpartition(".")
        if leaf == NEW_ROWS:
            parameter.requires_grad_(True)
            names |= {name} if has_token_rows(adapted) else {name, f"{path}.weight"}
    return names


def has_token_rows(adapted: PeftModel) -> bool:
    """Return whether PEFT's format for these adapters has rows of single tokens (`trainable_token_indices`), with which
    PEFT leaves out a head's bias."""
    head: Any = adapted.get_base_model().get_output_embeddings()
    return hasattr(adapted.active_peft_config, "trainable_token_indices") and head.bias is None


def reads_base(substrate: AdapterSubstrate | FullSubstrate) -> bool:
    """Return whether adapters begin with something computed from the base's weights (DoRA's magnitudes, PiSSA, OLoRA).
    That is done on the host, where an export finds the same bits again."""
    peft = getattr(substrate, "peft", None) or {}
    return bool(peft.get("use_dora")) or isinstance(peft.get("init_lora_weights"), str)


def twin(adapted: Adapted) -> PeftModel:
    """Return a second model with adapters, on the meta device except for its buffers, which are copies."""
    base = adapted.model.get_base_model()
    with torch.device("meta"), created_whole():
        model = type(base)(copy.deepcopy(base.config))
    config = _made_plainly(adapted.model.active_peft_config)  # PiSSA and its like would change the base again
    made = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    for name, buffer in adapted.model.named_buffers(remove_duplicate=False):  # also those that are never saved
        owner, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(owner), leaf, buffer.cpu())
    return made


def merged(adapted: Adapted) -> PreTrainedModel:
    """Return a second model with the adapters merged into their base, on the meta device.

    Raises whatever PEFT raises if it cannot merge them.
    """
    return twin(adapted).to("meta").merge_and_unload()


def choose_merge(config: RunConfig, adapted: Adapted | None) -> tuple[bool, list[str]]:
    """Return whether to merge after training, tried now without weights, and the lines to tell the user.

    Raises `AdapterError` if a merge was asked for and PEFT has none.
    """
    if adapted is None or not config.merges:
        return False, []
    try:
        merged(adapted)
    except Exception as error:  # NotImplementedError, ValueError, AttributeError, ...
        if "meta" in str(error):  # a formula that the meta device lacks says nothing of the real merge
            return True, []
        kind, base = adapted.model.active_peft_config.peft_type.value, type(adapted.model.get_base_model()).__name__
        why = f"PEFT cannot merge {kind} into {base}: {type(error).__name__}: {error}"
        if isinstance(config.substrate, AdapterSubstrate) and config.substrate.merge is True:
            raise AdapterError(f"substrate.merge: true, but {why}; set substrate.merge=false") from error
        return False, [f"WARNING: no model/ will be written beside adapter/: {why}"]
    return True, []


def _put_on(model: PreTrainedModel, config: PeftConfig, key: str, *, stage: int, empty: bool) -> PeftModel:
    # BOFT leaves another compiler in CC and CXX, with which DeepSpeed would compile its operators anew.
    environment = dict(os.environ)
    try:
        if empty:
            config = _made_plainly(config)  # other initialisations compute with the base's weights
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=empty)
        check_readable(config)
    except Exception as error:  # PEFT checks with ValueError, TypeError, KeyError, AssertionError, ...
        why = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        more = ""
        if "lora_dropout" in why:  # adapters of parameters, such as stacked experts, have none
            more = f"; set {key}.lora_dropout=0"
        elif empty and "meta" in why:
            more = "; a dry run has no weights to compute with"
        elif stage == 3:
            more = "; it may want whole weights, which ZeRO-3 has in parts: try deepspeed=zero2"
        raise AdapterError(
            f"{key}: PEFT refuses {config.peft_type.value} on {type(model).__name__}: {why}{more}"
        ) from error
    finally:
        os.environ.clear()
        os.environ.update(environment)
    hollow = [name for name, p in adapted.named_parameters() if p.requires_grad and 0 in full_shape(p)]
    if hollow and stage == 3:
        raise _partitioned(config, key)
    if hollow:
        raise AdapterError(f"{key}: with this {config.peft_type.value} {hollow[0]} would be an empty tensor")
    return adapted


def _partitioned(config: PeftConfig, key: str) -> AdapterError:
    return AdapterError(
        f"{key}: {config.peft_type.value} is made from whole weights, which ZeRO-3 has in parts; set deepspeed=zero2"
    )


def _made_plainly(config: PeftConfig) -> PeftConfig:
    config = copy.deepcopy(config)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True
    return config


def _read(folder: str, quantization: str | None) -> PeftConfig:
    for name in ("adapter_config.json", _WEIGHTS):
        if not (Path(folder) / name).is_file():
            raise AdapterError(
                f"substrate.adapter: cannot load '{folder}': no {name} there; give a folder as PEFT's save_pretrained "
                "writes it"
            )
    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # broken JSON, KeyError for a method that this PEFT does not know, ...
        raise AdapterError(f"substrate.adapter: cannot load '{folder}': {type(error).__name__}: {error}") from error
    refuse_method(config.peft_type, getattr(config, "init_lora_weights", True), "substrate.adapter", quantization)
    config.inference_mode = False
    return config


def _same(first: str, second: str) -> bool:
    return first == second or (bool(second) and Path(first).resolve() == Path(second).resolve())


def _check_weights(adapted: PeftModel, folder: str, *, empty: bool) -> list[nn.Parameter]:
    """Raise `AdapterError` unless the file contains exactly what its configuration makes on this model: PEFT ignores
    the rest.

    Returns the parameters of the base that are in the file as well: biases, and embeddings under an adapter, which PEFT
    saves although they have not changed.
    """
    tensors = adapted.state_dict(keep_vars=True)  # ZeRO-3's shapes are attributes of parameters
    expected = {
        name: list(full_shape(tensor))
        for name, tensor in get_peft_model_state_dict(adapted, state_dict=tensors, save_embedding_layers=False).items()
    }
    parameters = dict(adapted.named_parameters())
    try:
        with safe_open(Path(folder) / _WEIGHTS, framework="pt") as file:
            stored = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            for name in stored.keys() - expected.keys():
                if name.endswith(".base_layer.weight") and name in parameters:
                    with gathered([parameters[name]]):
                        same = empty or torch.equal(parameters[name].cpu(), file.get_tensor(name).to(adapted.dtype))
                    if same:
                        expected[name] = stored[name]
    except Exception as error:  # truncated, or no safetensors at all
        raise AdapterError(f"substrate.adapter: cannot load '{folder}': {error}") from error
    base = type(adapted.get_base_model()).__name__
    for what, names in (
        (f"lacks {{}} weights of its adapters on this {base}", sorted(expected.keys() - stored.keys())),
        (f"has {{}} weights that its adapters do not have on this {base}", sorted(stored.keys() - expected.keys())),
        ("has {} weights of other shapes", [n for n in expected if n in stored and stored[n] != expected[n]]),
    ):
        if names:
            shapes = f": {stored[names[0]]} instead of {expected[names[0]]}" if "shapes" in what else ""
            raise AdapterError(
                f"substrate.adapter: '{folder}' {what.format(len(names))}, for instance {names[0]}{shapes}; set "
                "model.path to the model that it was trained on"
            )
    return [parameters[name] for name in stored if name in parameters]


def _freeze(model: nn.Module, parts: Collection[str]) -> None:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in parts:
        found = [parameter for name, parameter in trained.items() if part in name]
        if not found:
            raise AdapterError(
                f"substrate.frozen: '{part}' is in no name of a trained weight; such names: "
                f"{', '.join(list(trained)[:4])}"
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if trained and not any(parameter.requires_grad for parameter in trained.values()):
        raise AdapterError(f"substrate.frozen: {', '.join(parts)} leaves nothing to train; take some of them out")
