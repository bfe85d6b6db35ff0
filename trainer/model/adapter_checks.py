"""Check PEFT configurations and saved adapters, before and after PEFT reads them."""

from __future__ import annotations

import copy
import re
import typing
from collections.abc import Iterator
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    PeftModel,
    PeftType,
    TaskType,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.config.errors import did_you_mean
from trainer.errors import StrataError
from trainer.model.blocks import full_shape
from trainer.model.towers import modules_outside, towers_of

# Why a method whose weights do sit inside blocks cannot be trained here.
_REFUSED = {
    PeftType.ADALORA: "it prunes ranks by calls during training that only its own trainer makes; use LORA",
    PeftType.POLY: "it needs the number of a task with every batch",
    PeftType.XLORA: "it loads the other adapters that its configuration names, from wherever they are",
}


# LoRA's initialisations that another process can repeat from the base alone. The others need data, gradients or a
# quantiser, or change the base by random numbers (`pissa_niter_N`), so that an exported adapter would not fit it.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "pissa", "olora")


# Over weights of four bits PEFT has layers for more methods, but these are the ones that train here.
_ON_FOUR_BITS = (PeftType.LORA,)


# The other initialisations compute with the base, or would quantise it anew.
_INITIALISATIONS_ON_FOUR_BITS = (True, False, "gaussian")


# PEFT takes the shapes of these from the weights, which ZeRO-3 partitions.
OF_WHOLE_WEIGHTS = (PeftType.LOHA, PeftType.LN_TUNING)


_ANYTHING = "all-linear"  # PEFT's word for every linear module but the head


class AdapterError(StrataError, ValueError):
    """The adapters cannot be made or loaded as asked; the message names the key to change."""


def check_readable(config: PeftConfig) -> None:
    """Raise now, rather than after training, if PEFT cannot read the configuration that it writes."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        PeftConfig.from_pretrained(folder)


def read_configuration(fields: dict[str, Any], quantization: str | None) -> PeftConfig:
    """Return the PEFT configuration of the `fields` of substrate.peft. Raises `AdapterError`."""
    wanted = str(fields["peft_type"]).upper()
    known = {str(kind.value): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if wanted not in known:
        raise AdapterError(
            f"substrate.peft.peft_type: '{fields['peft_type']}'{did_you_mean(wanted, known)}; allowed: "
            f"{', '.join(known)}"
        )
    refuse_method(wanted, fields.get("init_lora_weights", True), "substrate.peft", quantization)
    kind = known[wanted]
    settings = {k: v for k, v in fields.items() if k != "peft_type"}
    names = [name for name in settings if name not in kind.__dataclass_fields__]
    if names:
        near = "".join(f"; {name}: unknown{did_you_mean(name, kind.__dataclass_fields__)}" for name in names)
        raise AdapterError(f"substrate.peft: {wanted} takes no {', '.join(names)}{near}")
    _check_types(kind, settings)
    _check_values(settings)
    try:
        return kind(**{"task_type": TaskType.CAUSAL_LM, **settings})
    except Exception as error:  # a value, or a package that the method needs
        raise AdapterError(f"substrate.peft: PEFT refuses {fields}: {error}") from error


def _check_types(kind: type[PeftConfig], settings: dict[str, Any]) -> None:
    """Raise `AdapterError` for values of a wrong type, which PEFT's dataclasses accept."""
    hints = typing.get_type_hints(kind)
    for name, value in settings.items():
        if name == "init_lora_weights":
            continue  # `refuse_method` has looked at it
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            raise AdapterError(f"substrate.peft.{name}: got {value!r}; allowed: {_spelt(hints[name])}") from error
        except PydanticUserError:  # a class of PEFT's own
            continue


def _spelt(hint: Any) -> str:
    """Return a type as a user would write it."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _check_values(settings: dict[str, Any]) -> None:
    """Raise `AdapterError` for values that PEFT accepts but that train nothing, or something else."""
    for name, fine, allowed in (
        ("task_type", lambda value: value in (None, TaskType.CAUSAL_LM), "CAUSAL_LM"),
        ("inference_mode", lambda value: not value, "false"),
        ("lora_dropout", lambda value: 0 <= value < 1, "0 to below 1"),
        ("lora_alpha", lambda value: value > 0, "above 0"),
    ):
        if name in settings and not fine(settings[name]):
            raise AdapterError(f"substrate.peft.{name}: got {settings[name]!r}; allowed: {allowed}")


def refuse_method(peft_type: str, start: Any, key: str, quantization: str | None) -> None:
    """Raise `AdapterError` for a method, or a value `start` of init_lora_weights, that cannot be trained here."""
    kind = PeftType(peft_type)
    if kind in _REFUSED:
        raise AdapterError(f"{key}: {kind.value} cannot be trained here: {_REFUSED[kind]}")
    if quantization is not None and kind not in _ON_FOUR_BITS:
        allowed = ", ".join(kind.value for kind in _ON_FOUR_BITS)
        raise AdapterError(
            f"{key}: {kind.value} on a base in four bits (model.quantization={quantization}); allowed there: {allowed}"
        )
    possible = _INITIALISATIONS if quantization is None else _INITIALISATIONS_ON_FOUR_BITS
    if start not in possible:
        why = "needs more than the base to be made again" if quantization is None else "computes with the whole weights"
        raise AdapterError(
            f"{key}: init_lora_weights: '{start}' {why}; allowed: {', '.join(str(c).lower() for c in possible)}"
        )


def check_saved(adapted: PeftModel, names: frozenset[str], key: str) -> None:
    """Raise `AdapterError` if something trains that PEFT's format has no place for."""
    if adapted.active_peft_config.is_prompt_learning:
        return  # what is saved is computed, and is not in blocks
    tensors = dict(adapter_tensors(adapted))
    saved = get_peft_model_state_dict(
        adapted, state_dict={name: tensors[name] for name in tensors if name in names}, save_embedding_layers=False
    )
    kept = {id(tensor) for tensor in saved.values()}
    lost = [name for name, tensor in tensors.items() if tensor.requires_grad and id(tensor) not in kept]
    if lost:
        raise AdapterError(
            f"{key}: {len(lost)} of the weights that this trains, for instance {lost[0]}, would not be in the exported "
            f"adapter: PEFT does not save them; with bias, set bias=none"
        )


def check_names(model: PreTrainedModel, config: PeftConfig, key: str) -> None:
    """Raise `AdapterError` unless each name matches: PEFT requires one match and silently ignores the other names."""
    modules = {name: module for name, module in model.named_modules() if name}
    leaves = [name for name, module in modules.items() if not list(module.children())]
    for field in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        wanted = getattr(config, field, None)
        if not wanted or wanted == _ANYTHING:
            continue
        if isinstance(wanted, str) and field == "modules_to_save":
            raise AdapterError(f"{key}.{field}: got '{wanted}'; allowed: a list of names, such as [{wanted}]")
        if field == "target_parameters":
            known = shown = [name for name, _ in model.named_parameters()]
        else:
            known, shown = [*modules, *_stacked_by_peft(model, config)], leaves
        _all_match(wanted, known, f"{key}.{field}", model, shown=shown)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field, None) or ():
            _regex(pattern, f"{key}.{field}")
    indices = getattr(config, "trainable_token_indices", None) or []
    rows = full_shape(model.get_input_embeddings().weight)[0]
    for index in [i for chosen in (indices.values() if isinstance(indices, dict) else [indices]) for i in chosen]:
        if not 0 <= index < rows:
            raise AdapterError(f"{key}.trainable_token_indices: got {index}; allowed: 0 to {rows - 1}")


def _stacked_by_peft(model: PreTrainedModel, config: PeftConfig) -> list[str]:
    """Return the names of target_modules that PEFT replaces by parameters in which transformers stacks experts."""
    if isinstance(config.target_modules, str):
        return []
    converted = copy.deepcopy(config)
    with suppress(ValueError):  # PEFT says it again when it makes the adapters
        convert_peft_config_for_transformers(converted, model, None)
        return sorted(set(config.target_modules or ()) - set(converted.target_modules or ()))
    return list(config.target_modules or ())


def stacked_parameters(model: nn.Module) -> list[str]:
    """Return the last names of parameters with three dimensions outside convolutions: weights of several experts."""
    found = set()
    for module in model.modules():
        if not isinstance(module, nn.modules.conv._ConvNd):
            found |= {name for name, p in module.named_parameters(recurse=False) if len(full_shape(p)) == 3}
    return sorted(found)


def leave_out_routers(model: PreTrainedModel, config: PeftConfig, key: str) -> None:
    """Exclude linear modules that return more than one tensor, such as Llama 4's routers, from `all-linear`: an adapter
    adds to a single one. Raises `AdapterError` if they are named."""
    wanted = getattr(config, "target_modules", None)
    if not wanted:
        return
    routers = [name for name, module in model.named_modules() if _returns_more(module)]
    if wanted == _ANYTHING:
        excluded = config.exclude_modules
        if isinstance(excluded, str):
            config.exclude_modules = "|".join([f"(?:{excluded})", *map(re.escape, routers)]) if routers else excluded
        elif routers:
            config.exclude_modules = {*(excluded or ()), *routers}
        return
    for name in routers:
        if check_target_module_exists(config, name):
            kind = type(model.get_submodule(name)).__name__
            raise AdapterError(
                f"{key}.target_modules: {name} is a {kind}, which returns more than one tensor, and an adapter adds to "
                f"a single one: leave it out, or exclude it by exclude_modules: [{name.rsplit('.', 1)[-1]}]"
            )


def leave_out_towers(model: PreTrainedModel, config: PeftConfig, key: str) -> None:
    """Exclude all of a multimodal model but its language model from what PEFT finds by the ends of names, which a
    vision tower's layers share. Raises `AdapterError` for names that match nothing in the language model."""
    paths = modules_outside(model)
    if not paths or not hasattr(config, "exclude_modules"):
        return
    outside = re.compile(rf"(?:{'|'.join(map(re.escape, paths))})(?:\..*)?")
    wanted = getattr(config, "target_modules", None)
    names = [name for name, _ in model.named_modules()]
    for want in [wanted] if isinstance(wanted, str) else sorted(wanted or ()):
        regex = re.compile(want if isinstance(wanted, str) else rf"(?:.*\.)?{re.escape(want)}")
        matched = [name for name in names if regex.fullmatch(name)]
        if want != _ANYTHING and matched and all(outside.fullmatch(name) for name in matched):
            raise AdapterError(
                f"{key}.target_modules: {want} is not in the language model, only in {matched[0]}, which is frozen; "
                "set model.vision=train to train adapters there"
            )
    own = config.exclude_modules or ()
    if not isinstance(own, str):
        own = "|".join(rf"(?:.*\.)?{re.escape(name)}" for name in sorted(own))
    config.exclude_modules = outside.pattern if not own else f"{outside.pattern}|{own}"


def check_frozen_towers(adapted: PeftModel, key: str) -> None:
    """Raise `AdapterError` if something in a tower trains although `model.vision` is frozen; a projector may be in
    PEFT's `modules_to_save`."""
    towers = towers_of(adapted)
    trained = [name for name, p in (towers.vision if towers else {}).items() if p.requires_grad]
    if trained:
        raise AdapterError(
            f"{key}: {len(trained)} weights of the model's towers would train, for instance {trained[0]}, but "
            "model.vision is frozen; set model.vision=train, or name modules of the language model by their whole paths"
        )


def _returns_more(module: nn.Module) -> bool:
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind.forward is nn.Linear.forward:
        return False
    tried = copy.copy(module)
    tried._parameters = {
        name: None if p is None else nn.Parameter(torch.empty(full_shape(p), dtype=p.dtype, device="meta"), False)
        for name, p in module._parameters.items()
    }
    try:
        with torch.no_grad():
            return not isinstance(kind.forward(tried, torch.empty(1, module.in_features, device="meta")), Tensor)
    except Exception:  # nothing is known of it, as of quantised ones
        return False


def check_patterns(adapted: PeftModel, config: PeftConfig, key: str) -> None:
    """Raise `AdapterError` for patterns of ranks or alphas that match no module with adapters."""
    tuner = adapted.base_model
    targets = [*getattr(tuner, "targeted_module_names", []), *getattr(tuner, "targeted_parameter_names", [])]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field, None) or ():
            if targets and not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):  # as PEFT does
                _no_match([pattern], f"{key}.{field}", adapted.get_base_model(), targets)


def _regex(given: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(given)
    except re.error as error:
        raise AdapterError(
            f"{key}: '{given}' is no regular expression ({error}); allowed: one, such as .*q_proj, or a list of names"
        ) from error


def _all_match(wanted: Any, known: list[str], key: str, model: nn.Module, *, shown: list[str]) -> None:
    if isinstance(wanted, str):
        regex = _regex(wanted, key)
        if not any(regex.fullmatch(name) for name in known):
            _no_match([wanted], key, model, shown)
        return
    strange = [name for name in wanted if not isinstance(name, str)]
    if strange:
        raise AdapterError(f"{key}: got {strange[0]!r} in {list(wanted)}; allowed: names")
    lost = sorted(want for want in wanted if not any(name == want or name.endswith(f".{want}") for name in known))
    if lost:
        _no_match(lost, key, model, shown)


def _no_match(lost: list[str], key: str, model: nn.Module, known: list[str]) -> typing.NoReturn:
    endings = sorted({name.rsplit(".", 1)[-1] for name in known})
    near = f"; write [{lost[0]}] for a name;" if lost[0] in endings else did_you_mean(lost[0], endings) or ";"
    stacked = stacked_parameters(model)
    experts = (
        f". Its experts are stacked in parameters: name them in target_parameters: [{', '.join(stacked)}]"
        if stacked and key.endswith("target_modules")
        else ""
    )
    raise AdapterError(
        f"{key}: {', '.join(lost)} match nothing in {type(model).__name__}{near} names there: {', '.join(endings)}"
        f"{experts}"
    )


def adapter_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
