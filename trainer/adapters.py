"""Put adapters on a model, with PEFT: made anew from its own configuration, or loaded to go on training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, PeftType, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.config.errors import did_you_mean
from trainer.config.schema import AdapterSubstrate

# Why a method whose weights do sit inside blocks cannot be trained here.
_REFUSED = {
    PeftType.ADALORA: "it prunes ranks by calls during training that only its own trainer makes; use LORA",
    PeftType.POLY: "it wants the number of a task with every batch",
}


class AdapterError(ValueError):
    """The adapters cannot be made or loaded as asked; the message names the key to change."""


@dataclass(frozen=True)
class Adapted:
    """A model with adapters, and what belongs to them: the names of their parameters and buffers."""

    model: PeftModel
    names: frozenset[str]


def adapt(model: PreTrainedModel, config: AdapterSubstrate, *, empty: bool = False) -> Adapted:
    """`model` with the adapters of `config`, in the base's dtype; what they train requires gradients.

    `empty` leaves them on the meta device, for the dry run. Raises `AdapterError`.
    """
    base = {id(tensor) for _, tensor in _tensors(model)}
    if config.adapter is not None:
        adapted = _load(model, config.adapter, empty=empty)
    else:
        adapted = _make(model, config.peft or {}, empty=empty)
    _freeze(adapted, config.frozen)
    # fp32 adapters in a bf16 model would be cast by DeepSpeed, and ZeRO holds fp32 masters of them anyway.
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype != model.dtype:
            parameter.data = parameter.data.to(model.dtype)
    return Adapted(adapted, frozenset(name for name, tensor in _tensors(adapted) if id(tensor) not in base))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _make(model: PreTrainedModel, fields: dict[str, Any], *, empty: bool) -> PeftModel:
    config = _configuration(fields, empty=empty)
    _check_targets(model, getattr(config, "target_modules", None))
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=empty)
    except Exception as error:  # PEFT checks with ValueError, TypeError, KeyError, ...
        raise AdapterError(f"substrate.peft: PEFT refuses {fields}: {error}") from error


def _configuration(fields: dict[str, Any], *, empty: bool) -> PeftConfig:
    wanted = str(fields["peft_type"]).upper()
    known = {str(kind.value): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if wanted not in known:
        raise AdapterError(
            f"substrate.peft.peft_type: '{fields['peft_type']}'{did_you_mean(wanted, known)}; allowed: "
            f"{', '.join(known)}"
        )
    _refuse(PeftType(wanted), "substrate.peft.peft_type")
    settings = {"task_type": TaskType.CAUSAL_LM, **{k: v for k, v in fields.items() if k != "peft_type"}}
    if empty and "init_lora_weights" in settings:
        settings["init_lora_weights"] = True  # others compute with the base's weights
    try:
        return known[wanted](**settings)
    except TypeError as error:
        names = [name for name in settings if name not in known[wanted].__dataclass_fields__]
        near = "".join(f"; {name}: unknown{did_you_mean(name, known[wanted].__dataclass_fields__)}" for name in names)
        raise AdapterError(f"substrate.peft: {wanted} takes no {', '.join(names) or fields}{near or error}") from error
    except Exception as error:  # a value, or a package that the method needs
        raise AdapterError(f"substrate.peft: PEFT refuses {fields}: {error}") from error


def _refuse(kind: PeftType, key: str) -> None:
    if kind in _REFUSED:
        raise AdapterError(f"{key}: {kind.value} cannot be trained here: {_REFUSED[kind]}")


def _load(model: PreTrainedModel, folder: str, *, empty: bool) -> PeftModel:
    try:
        config = PeftConfig.from_pretrained(folder)
        _refuse(PeftType(config.peft_type), "substrate.adapter")
        config.inference_mode = False
        if empty:
            return get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        adapted = PeftModel.from_pretrained(
            model, folder, config=config, is_trainable=True, autocast_adapter_dtype=False
        )
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"substrate.adapter: cannot load '{folder}': {error}") from error
    return adapted


def _check_targets(model: nn.Module, targets: Any) -> None:
    """Each name has to match: PEFT is content with one of them, and the others would be left out without a word."""
    if not isinstance(targets, list | set | tuple):
        return  # a pattern, "all-linear", or PEFT's own choice for the architecture
    names = [name for name, module in model.named_modules() if name and not list(module.children())]
    lost = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name, _ in model.named_modules())]
    if lost:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
        near = did_you_mean(lost[0], leaves) or ";"
        raise AdapterError(
            f"substrate.peft.target_modules: {', '.join(sorted(lost))} match no module of {type(model).__name__}{near} "
            f"modules there: {', '.join(leaves)}"
        )


def _freeze(model: nn.Module, parts: Iterable[str]) -> None:
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
