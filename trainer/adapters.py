"""Put adapters on a model, with PEFT: made anew from its own configuration, or loaded to go on training."""

from __future__ import annotations

import copy
import re
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import deepspeed
import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    PeftModel,
    PeftType,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.blocks import full_shape
from trainer.config.errors import did_you_mean
from trainer.config.schema import AdapterSubstrate, FullSubstrate, RunConfig
from trainer.engine.suppression import has_adapters

# Why a method whose weights do sit inside blocks cannot be trained here.
_REFUSED = {
    PeftType.ADALORA: "it prunes ranks by calls during training that only its own trainer makes; use LORA",
    PeftType.POLY: "it wants the number of a task with every batch",
}
# Of LoRA, those that another process makes again from the base alone. The others need data, gradients or a quantiser,
# or change the base by random numbers (`pissa_niter_N`), so that an exported adapter would not fit it.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "pissa", "olora")
# Over weights of four bits PEFT has layers for more methods, but these are the ones that train here.
_ON_FOUR_BITS = (PeftType.LORA,)
# The other initialisations compute with the base, or would quantise it anew.
_INITIALISATIONS_ON_FOUR_BITS = (True, False, "gaussian")
# PEFT takes the shapes of these from weights that ZeRO-3 has in parts.
_OF_WHOLE_WEIGHTS = (PeftType.LOHA, PeftType.LN_TUNING)
_WEIGHTS = "adapter_model.safetensors"
_ANYTHING = "all-linear"  # PEFT's word for every linear module but the head


class AdapterError(ValueError):
    """The adapters cannot be made or loaded as asked; the message names the key to change."""


@dataclass(frozen=True)
class Adapted:
    """A model with adapters, and what belongs to them: the names of the parameters and buffers to save."""

    model: PeftModel
    names: frozenset[str]
    warnings: tuple[str, ...] = ()


def adapt(
    model: PreTrainedModel,
    config: AdapterSubstrate,
    *,
    stage: int = 0,
    quantization: str | None = None,
    empty: bool = False,
) -> Adapted:
    """`model` with the adapters of `config`, in the base's dtype; what they train requires gradients.

    `stage` is ZeRO's, `quantization` that of the base; `empty` leaves the adapters on the meta device, for the dry
    run. Raises `AdapterError`.
    """
    if has_adapters(model):
        raise AdapterError(
            "model.path: this model comes with adapters: set model.path to their base, and substrate.adapter to the "
            "folder of the adapters to go on with"
        )
    base = {id(tensor) for _, tensor in _tensors(model)}
    warnings = []
    if config.adapter is None:
        key, made = "substrate.peft", _configuration(config.peft or {}, quantization)
    else:
        key, made = "substrate.adapter", _read(config.adapter, quantization)
        if made.base_model_name_or_path and not _same(made.base_model_name_or_path, model.name_or_path):
            warnings.append(
                f"substrate.adapter: '{config.adapter}' was trained on {made.base_model_name_or_path}, and model.path "
                f"is {model.name_or_path or 'none'}"
            )
    if stage == 3 and PeftType(made.peft_type) in _OF_WHOLE_WEIGHTS:
        raise _partitioned(made, key)
    if config.adapter is None:
        _check_names(model, made, key)
    adapted = _put_on(model, made, key, stage=stage, empty=empty)
    _check_patterns(adapted, made, key)
    if config.adapter is not None:
        written = _check_weights(adapted, config.adapter, empty=empty)
        if not empty:
            with _gathered(written, modifier_rank=0):
                adapted.load_adapter(config.adapter, "default", is_trainable=True, autocast_adapter_dtype=False)
    # Of the base's tensors, those that PEFT trains as well: `bias`.
    names = frozenset(n for n, tensor in _tensors(adapted) if id(tensor) not in base or tensor.requires_grad)
    _check_saved(adapted, names, key)
    _freeze(adapted, config.frozen)
    # fp32 adapters in a bf16 model would be cast by DeepSpeed, and ZeRO holds fp32 masters of them anyway.
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype != model.dtype:
            parameter.data = parameter.data.to(model.dtype)
    return Adapted(adapted, names, tuple(warnings))


def reads_base(substrate: AdapterSubstrate | FullSubstrate) -> bool:
    """Whether adapters begin with something computed from the base's weights (DoRA's magnitudes, PiSSA, OLoRA, ...).
    That is done on the host, where an export finds the same bits again."""
    peft = getattr(substrate, "peft", None) or {}
    return bool(peft.get("use_dora")) or isinstance(peft.get("init_lora_weights"), str)


def twin(adapted: Adapted) -> PeftModel:
    """A second model with adapters, on the meta device but for buffers, which are copied."""
    base = adapted.model.get_base_model()
    with torch.device("meta"):
        model = type(base)(copy.deepcopy(base.config))
    config = _made_plainly(adapted.model.active_peft_config)  # PiSSA and its like would change the base again
    made = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    for name, buffer in adapted.model.named_buffers(remove_duplicate=False):  # also those that are never saved
        owner, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(owner), leaf, buffer.cpu())
    return made


def merged(adapted: Adapted) -> PreTrainedModel:
    """A second model with the adapters merged into their base, on the meta device.

    Raises whatever PEFT raises where it cannot merge them.
    """
    return twin(adapted).to("meta").merge_and_unload()


def choose_merge(config: RunConfig, adapted: Adapted | None) -> tuple[bool, list[str]]:
    """Whether to merge in the end, tried now without weights; and what to tell the user of it.

    Raises `AdapterError` where a merge was asked for and PEFT has none.
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
        if config.substrate.merge is True:
            raise AdapterError(f"substrate.merge: true, but {why}; set substrate.merge=false") from error
        return False, [f"WARNING: no model/ will be written beside adapter/: {why}"]
    return True, []


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _put_on(model: PreTrainedModel, config: PeftConfig, key: str, *, stage: int, empty: bool) -> PeftModel:
    try:
        if empty:
            config = _made_plainly(config)  # other initialisations compute with the base's weights
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=empty)
        _check_readable(config)
    except Exception as error:  # PEFT checks with ValueError, TypeError, KeyError, AssertionError, ...
        why = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        more = ""
        if empty:
            more = "; a dry run has no weights to compute with"
        elif stage == 3:
            more = "; it may want whole weights, which ZeRO-3 has in parts: try deepspeed=zero2"
        raise AdapterError(
            f"{key}: PEFT refuses {config.peft_type.value} on {type(model).__name__}: {why}{more}"
        ) from error
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


def _check_readable(config: PeftConfig) -> None:
    """PEFT writes some configurations that it refuses to read: better known now than after training."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        PeftConfig.from_pretrained(folder)


def _configuration(fields: dict[str, Any], quantization: str | None) -> PeftConfig:
    wanted = str(fields["peft_type"]).upper()
    known = {str(kind.value): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if wanted not in known:
        raise AdapterError(
            f"substrate.peft.peft_type: '{fields['peft_type']}'{did_you_mean(wanted, known)}; allowed: "
            f"{', '.join(known)}"
        )
    _refuse(wanted, fields.get("init_lora_weights", True), "substrate.peft", quantization)
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
    """PEFT's configurations are dataclasses, which take anything."""
    hints = typing.get_type_hints(kind)
    for name, value in settings.items():
        if name == "init_lora_weights":
            continue  # `_refuse` has looked at it
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            raise AdapterError(f"substrate.peft.{name}: got {value!r}; allowed: {_spelt(hints[name])}") from error
        except PydanticUserError:  # a class of PEFT's own
            continue


def _spelt(hint: Any) -> str:
    """A type as a user would say it."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _check_values(settings: dict[str, Any]) -> None:
    """What PEFT takes, and what then trains nothing or something else."""
    for name, fine, allowed in (
        ("task_type", lambda value: value in (None, TaskType.CAUSAL_LM), "CAUSAL_LM"),
        ("inference_mode", lambda value: not value, "false"),
        ("lora_dropout", lambda value: 0 <= value < 1, "0 to below 1"),
        ("lora_alpha", lambda value: value > 0, "above 0"),
    ):
        if name in settings and not fine(settings[name]):
            raise AdapterError(f"substrate.peft.{name}: got {settings[name]!r}; allowed: {allowed}")


def _refuse(peft_type: str, start: Any, key: str, quantization: str | None) -> None:
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
    _refuse(config.peft_type, getattr(config, "init_lora_weights", True), "substrate.adapter", quantization)
    config.inference_mode = False
    return config


def _same(first: str, second: str) -> bool:
    return first == second or (bool(second) and Path(first).resolve() == Path(second).resolve())


def _check_weights(adapted: PeftModel, folder: str, *, empty: bool) -> list[nn.Parameter]:
    """The file has exactly what its configuration makes on this model: PEFT leaves out what does not fit.

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
                    with _gathered([parameters[name]]):
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


def _gathered(parameters: list[nn.Parameter], **options: Any) -> Any:
    """While inside, ZeRO-3's parameters are whole."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned), **options)


def _check_saved(adapted: PeftModel, names: frozenset[str], key: str) -> None:
    """Nothing may train that PEFT's format has no place for."""
    if adapted.active_peft_config.is_prompt_learning:
        return  # what is saved is computed, and no block has a part in it
    tensors = dict(_tensors(adapted))
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


def _check_names(model: nn.Module, config: PeftConfig, key: str) -> None:
    """Each name has to match: PEFT is content with one of them, and the others would be left out without a word."""
    modules = {name: module for name, module in model.named_modules() if name}
    leaves = [name for name, module in modules.items() if not list(module.children())]
    for field in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        wanted = getattr(config, field, None)
        if not wanted or wanted == _ANYTHING:
            continue
        if isinstance(wanted, str) and field == "modules_to_save":
            raise AdapterError(f"{key}.{field}: got '{wanted}'; allowed: a list of names, such as [{wanted}]")
        known = [name for name, _ in model.named_parameters()] if field == "target_parameters" else list(modules)
        _all_match(wanted, known, f"{key}.{field}", model, shown=known if field == "target_parameters" else leaves)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field, None) or ():
            _regex(pattern, f"{key}.{field}")
    indices = getattr(config, "trainable_token_indices", None) or []
    rows = full_shape(model.get_input_embeddings().weight)[0]
    for index in [i for chosen in (indices.values() if isinstance(indices, dict) else [indices]) for i in chosen]:
        if not 0 <= index < rows:
            raise AdapterError(f"{key}.trainable_token_indices: got {index}; allowed: 0 to {rows - 1}")


def _check_patterns(adapted: PeftModel, config: PeftConfig, key: str) -> None:
    """Patterns of ranks and alphas are looked up among the modules that have adapters."""
    targets = getattr(adapted.base_model, "targeted_module_names", [])
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
    raise AdapterError(
        f"{key}: {', '.join(lost)} match nothing in {type(model).__name__}{near} names there: {', '.join(endings)}"
    )


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
