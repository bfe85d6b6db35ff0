"""Load a causal language model, or build one from a configuration, so that a switch can work on it."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed import zero
from deepspeed.accelerator import get_accelerator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import prevent_arange_dtype_change
from transformers.utils import is_flash_attn_2_available

from trainer.blocks import full_shape
from trainer.config.schema import ModelConfig
from trainer.partitions import fill, freed_at_once, stored_tensors
from trainer.weights import ModelFolder, WeightsError

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ModelError(ValueError):
    """The model cannot be loaded or built as asked; the message names the key to change."""


def load(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    deepspeed: dict[str, Any],
    place: bool = False,
) -> PreTrainedModel:
    """The model of `config` in its training dtype; under ZeRO-3 partitioned while it is created.

    `deepspeed` is the resolved DeepSpeed dictionary. With `place` weights below ZeRO-3 are read straight onto the
    device where they are to be used: with a rank for each card, and all of the model on each, host memory would have
    to hold it as many times. Raises `ModelError`.
    """
    architecture = _architecture(config, tokenizer)
    options = {"dtype": DTYPES[config.dtype], "attn_implementation": attention(config, architecture)}
    model = None
    if config.path is not None and deepspeed["zero_optimization"]["stage"] == 3 and config.quantization is None:
        model = _into_partitions(config, architecture, options, deepspeed)
    if model is None:
        with partitioned_creation(deepspeed):
            if config.path is None:
                torch.manual_seed(seed)
                model = _from_config(config, architecture, options)
            else:
                # What is quantised is placed in any case, and ZeRO-3 places partitions itself.
                place = place and config.quantization is None and not is_deepspeed_zero3_enabled()
                model = _from_pretrained(config, architecture, options, place=place)
    _check_vocabulary(_embedded(model), tokenizer)
    model.config.use_cache = False
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack four-bit weights for inference in the first evaluation, and after that let no
            # gradient through (0.50.2, `Linear4bit.forward`).
            module.support_avx512bf16_for_cpu = False
    if config.activation_checkpointing:
        # Non-reentrant, and without the hook that makes embeddings require gradients: with it, backward would always
        # run down to the first block.
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    return model


def on_meta(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    """The model without any weights, for the dry run and, from `config.json` alone, for the planner, which needs a
    tokenizer with `model.random` only. Raises `ModelError`."""
    architecture = _architecture(config, tokenizer)
    with torch.device("meta"):
        options = {"dtype": DTYPES[config.dtype], "attn_implementation": attention(config, architecture)}
        model = _from_config(config, architecture, options)
    if tokenizer is not None:
        _check_vocabulary(_embedded(model), tokenizer)
    return model


def attention(config: ModelConfig, architecture: PretrainedConfig) -> str:
    """The attention kernel to use: the one asked for, or the fastest that machine, dtype and architecture have.

    Raises `ModelError` where the one asked for cannot be had.
    """
    obstacle = _flash_obstacle(config)
    if config.attention == "flash_attention_2" and obstacle:
        raise ModelError(
            f"model.attention: flash_attention_2, but {obstacle}: pip install 'strata-trainer[flash]' on a machine "
            "with a supported card, or set model.attention to sdpa"
        )
    if config.attention != "auto":
        return config.attention
    kernels = ["sdpa", "eager"] if obstacle else ["flash_attention_2", "sdpa", "eager"]
    for kernel in kernels[:-1]:
        try:
            with torch.device("meta"):
                _from_config(config, architecture, {"attn_implementation": kernel, "dtype": DTYPES[config.dtype]})
            return kernel
        except ModelError:  # not for this architecture, or no kernel is: then the real attempt says why
            continue
    return kernels[-1]


def _flash_obstacle(config: ModelConfig) -> str | None:
    """Why FlashAttention 2 cannot be used here (its cards: Ampere and later, in half precision), if so."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not is_flash_attn_2_available():
        return "flash-attn is not installed"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than its kernels"
    return "model.dtype is fp32" if config.dtype == "fp32" else None


def _architecture(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
    if config.path is None:
        assert config.random is not None and tokenizer is not None  # one of path and random, by validation
        fields = dict(config.random)
        fields.setdefault("vocab_size", len(tokenizer))
        for name in ("pad", "bos", "eos"):
            fields.setdefault(f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        if isinstance(fields["vocab_size"], int):  # before a model fails over token ids that it does not embed
            _check_vocabulary(fields["vocab_size"], tokenizer)
        try:
            return AutoConfig.for_model(**fields)
        except Exception as error:  # transformers validates with several exception types
            raise ModelError(f"model.random: transformers refuses {config.random}: {_in_short(error)}") from error
    try:
        architecture = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise ModelError(f"model.path: cannot read a model configuration from '{config.path}': {error}") from error
    quantised = getattr(architecture, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise ModelError(
            f"model.path: the weights in '{config.path}' are quantised already ({method}): give the model in "
            "bf16 or fp32, which model.quantization=nf4 quantises while it is loaded"
        )
    return architecture


def _from_config(config: ModelConfig, architecture: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.trust_remote_code, **options)
    except Exception as error:  # not a decoder, a kernel or activation that it lacks: ValueError, KeyError, ...
        key = "model.path" if config.path is not None else "model.random"
        raise ModelError(
            f"{key}: transformers cannot build a causal language model of type '{architecture.model_type}': "
            f"{_in_short(error)}"
        ) from error


def _from_pretrained(
    config: ModelConfig, architecture: PretrainedConfig, options: dict[str, Any], *, place: bool
) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            config.path,
            config=architecture,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            # So that they can be named; under ZeRO-3 transformers names them itself.
            ignore_mismatched_sizes=not is_deepspeed_zero3_enabled(),
            **_quantized(config),
            **({"device_map": {"": get_accelerator().current_device_name()}} if place else {}),
            **options,
        )
    except Exception as error:
        raise ModelError(f"model.path: cannot load '{config.path}': {error}") from error
    _refuse_misfits(config, info["missing_keys"], info["mismatched_keys"])
    return model


def _into_partitions(
    config: ModelConfig, architecture: PretrainedConfig, options: dict[str, Any], deepspeed: dict[str, Any]
) -> PreTrainedModel | None:
    """The model of `config.path` under ZeRO-3, read weight by weight; None if that is for `from_pretrained` to do.

    `from_pretrained` maps all files of the model on rank 0 while it fills the partitions. Here host memory holds a
    rank's own partition and one weight. What is wrong with the files is found on all ranks, before any is filled.
    """
    with torch.device("meta"):
        whole = _from_config(config, architecture, options)
    try:
        if whole.is_custom_code():
            raise WeightsError(f"'{config.path}' is a model with code of its own")
        folder = ModelFolder(config.path, whole)
    except WeightsError as error:
        if dist.get_rank() == 0:
            logger.warning("model.path: transformers loads all of the model before it is partitioned: %s", error)
        return None
    except Exception as error:
        raise ModelError(f"model.path: cannot load '{config.path}': {error}") from error
    _refuse_untied(whole, folder)
    tensors = stored_tensors(whole)
    missing = [names[0] for names, _ in tensors if not any(name in folder.shapes for name in names)]
    if missing and whole._keys_to_ignore_on_load_missing:  # some may be: transformers knows which, and makes them
        return None
    shapes = [
        (name, folder.shapes[name], tensor.shape)
        for names, tensor in tensors
        for name in names
        if name in folder.shapes
    ]
    _refuse_misfits(config, missing, [(name, found, wanted) for name, found, wanted in shapes if found != wanted])
    with freed_at_once():
        with no_init_weights(), prevent_arange_dtype_change(), zero.Init(config_dict_or_path=deepspeed):
            model = _from_config(config, architecture, options)
        model.tie_weights()
        fill(model, folder)
    with suppress(OSError):  # a folder need not have one
        model.generation_config = GenerationConfig.from_pretrained(config.path)
    return model.eval()


def _refuse_untied(whole: PreTrainedModel, folder: ModelFolder) -> None:
    """Files may hold a tied weight under both its names. Where these differ transformers leaves them apart, but not
    under ZeRO-3, where it drops one of them (5.23)."""
    for names, _ in stored_tensors(whole):
        first, *others = [name for name in names if name in folder.shapes] or [""]
        for other in others:
            if not torch.equal(*folder.read([first, other]).values()):
                raise ModelError(
                    f"model.path: config.json in '{folder.path}' ties {first} and {other}, but the weights differ: set "
                    "tie_word_embeddings to false in that file"
                )


def _refuse_misfits(
    config: ModelConfig, missing: Iterable[str], mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]]
) -> None:
    if mismatched := sorted(mismatched):
        name, stored, wanted = mismatched[0]
        raise ModelError(
            f"model.path: '{config.path}' has {len(mismatched)} weights of another shape than its "
            f"config.json says, for instance {name}: {tuple(stored)} instead of {tuple(wanted)}"
        )
    if missing := sorted(missing):
        raise ModelError(
            f"model.path: '{config.path}' lacks {len(missing)} weights, for instance {', '.join(missing[:3])}: is this "
            "folder complete?"
        )


def _quantized(config: ModelConfig) -> dict[str, Any]:
    """NF4 with quantised scales (QLoRA, https://arxiv.org/abs/2305.14314), on the device where it is to be used."""
    if config.quantization is None:
        return {}
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[config.dtype],
        # One byte is what DeepSpeed's broadcast at the start understands.
        bnb_4bit_quant_storage=torch.uint8,
    )
    return {"quantization_config": settings, "device_map": {"": get_accelerator().current_device_name()}}


def _embedded(model: PreTrainedModel) -> int:
    """How many tokens the model embeds, also where ZeRO-3 holds a partition of the table here."""
    return full_shape(model.get_input_embeddings().weight)[0]


def _check_vocabulary(embedded: int, tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > embedded:
        raise ModelError(
            f"model.tokenizer: {len(tokenizer)} tokens, but the model embeds {embedded}: set model.tokenizer to the "
            "tokenizer that belongs to this model"
        )


def _in_short(error: Exception) -> str:
    """transformers lists every model that it knows."""
    return textwrap.shorten(str(error) or type(error).__name__, width=300, placeholder=" ...")


@contextmanager
def partitioned_creation(deepspeed: dict[str, Any]) -> Iterator[None]:
    """While inside, transformers creates and loads parameters partitioned, if the stage is 3, and PEFT gathers those
    that it computes with."""
    keep = HfDeepSpeedConfig(deepspeed) if deepspeed["zero_optimization"]["stage"] == 3 else None
    try:
        yield
    finally:
        del keep
