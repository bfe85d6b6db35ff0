"""Load a causal language model, or build one from a configuration, so that a switch can work on it."""

from __future__ import annotations

import copy
import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
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
from transformers.utils import GENERATION_CONFIG_NAME, cached_file, is_flash_attn_2_available

from trainer.config.schema import ModelConfig
from trainer.config.text import quoted
from trainer.data.tokenizer import new_ids, vocabulary_size
from trainer.model.blocks import full_shape
from trainer.model.folder_checks import (
    ModelError,
    check_left_out,
    key_of,
    refuse_misfits,
    refuse_other_kinds,
    refuse_untied,
)
from trainer.model.growth import GrownFolder, grow, grown
from trainer.model.partitions import fill, freed_at_once, stored_tensors
from trainer.model.weights import ModelFolder, WeightsError

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    deepspeed: dict[str, Any],
    onto_device: bool = False,
    as_partitioned: bool = False,
) -> PreTrainedModel:
    """Load or build the model of `config` in its training dtype; under ZeRO-3 partitioned while it is created.

    `deepspeed` is the resolved DeepSpeed dictionary. With `onto_device` weights below ZeRO-3 are read directly onto
    this rank's device: otherwise host memory would contain the whole model once for each rank. If `tokenizer` has new
    tokens (`add_tokens`), the model has rows for them. `as_partitioned` draws random weights as transformers draws them
    under ZeRO-3, where a layer does not first draw its own. Raises `ModelError`.
    """
    architecture = _architecture(config, tokenizer)
    options = {"dtype": DTYPES[config.dtype], "attn_implementation": attention(config, architecture)}
    partitioned = deepspeed["zero_optimization"]["stage"] == 3 and config.quantization is None
    model, folder, ids = None, None, new_ids(tokenizer)
    # What is refused is refused before there are any weights.
    whole = _whole(config, _grown(architecture, ids), options, needed=partitioned)
    if config.path is not None:
        load_generation_config(config.path)
    if config.path is not None and whole is not None:
        folder = _open_folder(config, whole, ids, needed=partitioned)
    if whole is not None and folder is not None:
        for line in check_left_out(config, whole, folder.left_out):
            _say(line)
        if partitioned:
            model = _into_partitions(config, _grown(architecture, ids), options, deepspeed, whole, folder)
    if model is None:
        with partitioned_creation(deepspeed):
            if config.path is None:
                torch.manual_seed(seed)
                with no_init_weights() if as_partitioned else nullcontext():
                    model = _from_config(config, architecture, options)
                if as_partitioned:
                    model.initialize_weights()
            else:
                # What is quantised is placed in any case, and ZeRO-3 places partitions itself.
                onto_device = onto_device and config.quantization is None and not is_deepspeed_zero3_enabled()
                model, unexpected = _from_pretrained(config, architecture, options, onto_device=onto_device)
                if folder is None:  # no names could be compared before
                    for line in check_left_out(config, model, unexpected):
                        _say(line)
            grow(model, ids)
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
    """Build the model without any weights, for the dry run and, from `config.json` alone, for the planner, which needs
    a tokenizer with `model.random` only. Raises `ModelError`."""
    architecture = _grown(_architecture(config, tokenizer), new_ids(tokenizer))
    with torch.device("meta"):
        options = {"dtype": DTYPES[config.dtype], "attn_implementation": attention(config, architecture)}
        model = _from_config(config, architecture, options)
    if tokenizer is not None:
        _check_vocabulary(_embedded(model), tokenizer)
    return model


def check_files(config: ModelConfig, model: PreTrainedModel) -> list[str]:
    """Check for the dry run what `load` finds in the files of a local folder beside the weights themselves. Returns
    warnings; raises `ModelError`. `model` is on the meta device."""
    if config.path is None or not Path(config.path).is_dir():  # a Hub name is not downloaded for a dry run
        return []
    load_generation_config(config.path)
    folder = _open_folder(config, model, range(0))
    return [] if folder is None else check_left_out(config, model, folder.left_out)


def load_generation_config(path: str) -> GenerationConfig | None:
    """Return the generation settings of a folder or Hub name, or None if it has none. Raises `ModelError` for a file
    that cannot be read: transformers would silently use its defaults."""
    file = cached_file(
        path,
        GENERATION_CONFIG_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return None
    try:
        return GenerationConfig.from_pretrained(path)
    except Exception as error:  # OSError for no JSON, TypeError for no mapping, ...
        raise ModelError(
            f"model.path: {file} cannot be read ({_in_short(error)}): mend this file, or remove it if the model needs "
            "no generation settings of its own"
        ) from error


def attention(config: ModelConfig, architecture: PretrainedConfig) -> str:
    """Return the attention kernel: the one asked for, or the fastest that machine, dtype and architecture support.

    Raises `ModelError` if the one asked for is not available.
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
    """Return why FlashAttention 2 cannot be used here (it requires Ampere or later and half precision), or None."""
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
        fields.setdefault("vocab_size", vocabulary_size(tokenizer))
        for name in ("pad", "bos", "eos"):
            fields.setdefault(f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        if isinstance(fields["vocab_size"], int):  # before a model fails over token ids that it does not embed
            _check_vocabulary(fields["vocab_size"], tokenizer, random=True)
        try:
            return AutoConfig.for_model(**fields)
        except Exception as error:  # transformers validates with several exception types
            raise ModelError(
                f"model.random: transformers refuses {quoted(config.random)}: {_in_short(error)}"
            ) from error
    try:
        architecture = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise ModelError(f"model.path: cannot read a model configuration from '{config.path}': {error}") from error
    ids, rows = new_ids(tokenizer), getattr(architecture.get_text_config(), "vocab_size", None)
    if ids and (rows is None or rows < ids.start):
        raise ModelError(
            f"model.add_tokens: the tokenizer had {ids.start} tokens before, but the model embeds {rows}: set "
            "model.tokenizer to the tokenizer that belongs to this model"
        )
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
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(architecture),  # decoders without their encoder write into it
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    except Exception as error:  # not a decoder, a kernel or activation that it lacks: ValueError, KeyError, ...
        raise ModelError(
            f"{key_of(config)}: transformers cannot build a causal language model of type '{architecture.model_type}': "
            f"{_in_short(error)}"
        ) from error
    refuse_other_kinds(config, architecture)
    return model


def _from_pretrained(
    config: ModelConfig, architecture: PretrainedConfig, options: dict[str, Any], *, onto_device: bool
) -> tuple[PreTrainedModel, dict[str, None]]:
    """Load the model as transformers does; also return the names in the files that it has no place for."""
    refuse_other_kinds(config, architecture)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            config.path,
            config=architecture,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            # So that they can be named; under ZeRO-3 transformers names them itself.
            ignore_mismatched_sizes=not is_deepspeed_zero3_enabled(),
            **_quantized(config),
            **({"device_map": {"": get_accelerator().current_device_name()}} if onto_device else {}),
            **options,
        )
    except Exception as error:
        raise ModelError(f"model.path: cannot load '{config.path}': {error}") from error
    refuse_misfits(config, info["missing_keys"], info["mismatched_keys"])
    return model, dict.fromkeys(sorted(info["unexpected_keys"]))


def _whole(
    config: ModelConfig, architecture: PretrainedConfig, options: dict[str, Any], *, needed: bool
) -> PreTrainedModel | None:
    """Build the model without weights, to compare its names and shapes with those in the files. Returns None for code
    that does not work without weights, unless the model is `needed`."""
    try:
        with torch.device("meta"):
            return _from_config(config, architecture, options)
    except ModelError:
        if needed or not config.trust_remote_code:
            raise
        return None


def _grown(architecture: PretrainedConfig, ids: range) -> PretrainedConfig:
    """Return the configuration of the model with rows for the new tokens `ids`."""
    if not ids:
        return architecture
    made = copy.deepcopy(architecture)
    grown(made, ids)
    return made


def _open_folder(
    config: ModelConfig, whole: PreTrainedModel, ids: range, *, needed: bool = False
) -> GrownFolder | None:
    """Open the weights of `config.path`, with rows for the new tokens `ids`, or return None if only transformers can
    read them, which is logged if it makes a difference (`needed`)."""
    assert config.path is not None
    try:
        if whole.is_custom_code():
            raise WeightsError(f"'{config.path}' is a model with code of its own")
        return GrownFolder(config.path, whole, ids)
    except WeightsError as error:
        if needed:
            _say(f"model.path: transformers loads all of the model before it is partitioned: {error}")
        return None
    except Exception as error:
        raise ModelError(f"model.path: cannot load '{config.path}': {error}") from error


def _say(line: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning("%s", line)


def _into_partitions(
    config: ModelConfig,
    architecture: PretrainedConfig,
    options: dict[str, Any],
    deepspeed: dict[str, Any],
    whole: PreTrainedModel,
    folder: ModelFolder,
) -> PreTrainedModel | None:
    """Load the model of `config.path` under ZeRO-3, weight by weight; return None if only `from_pretrained` can.

    `from_pretrained` maps all files of the model on rank 0 while it fills the partitions. Here host memory contains a
    rank's own partition and one weight. Wrong files are found on all ranks, before any partition is filled.
    """
    refuse_untied(whole, folder)
    tensors = stored_tensors(whole)
    missing = [names[0] for names, _ in tensors if not any(name in folder.shapes for name in names)]
    if missing and whole._keys_to_ignore_on_load_missing:  # transformers knows which may be missing, and makes them
        return None
    shapes = [
        (name, folder.shapes[name], tensor.shape)
        for names, tensor in tensors
        for name in names
        if name in folder.shapes
    ]
    refuse_misfits(config, missing, [(name, found, wanted) for name, found, wanted in shapes if found != wanted])
    with freed_at_once():
        with no_init_weights(), prevent_arange_dtype_change(), zero.Init(config_dict_or_path=deepspeed):
            model = _from_config(config, architecture, options)
        model.tie_weights()
        fill(model, folder)
    if (settings := load_generation_config(folder.path)) is not None:
        model.generation_config = settings
    return model.eval()


def _quantized(config: ModelConfig) -> dict[str, Any]:
    """Return options for NF4 with quantised scales (QLoRA, https://arxiv.org/abs/2305.14314) on this rank's device."""
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
    """Return how many tokens the model embeds, even if this rank stores only a partition of the table (ZeRO-3)."""
    return full_shape(model.get_input_embeddings().weight)[0]


def _check_vocabulary(embedded: int, tokenizer: PreTrainedTokenizerBase, *, random: bool = False) -> None:
    size = vocabulary_size(tokenizer)
    if size > embedded:
        more = f", or model.random.vocab_size to at least {size}" if random else ""
        raise ModelError(
            f"model.tokenizer: {size} tokens, but the model embeds {embedded}: set model.tokenizer to the tokenizer "
            f"that belongs to this model{more}"
        )


def _in_short(error: Exception) -> str:
    """Return an error's message, shortened: transformers lists every model that it knows."""
    return textwrap.shorten(str(error) or type(error).__name__, width=300, placeholder=" ...")


@contextmanager
def partitioned_creation(deepspeed: dict[str, Any]) -> Iterator[None]:
    """Let transformers create and load parameters partitioned while inside, if the stage is 3, and PEFT gather those
    that it computes with."""
    keep = HfDeepSpeedConfig(deepspeed) if deepspeed["zero_optimization"]["stage"] == 3 else None
    try:
        yield
    finally:
        del keep
