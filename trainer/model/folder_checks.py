"""Check that the files of a model's folder, and the model's kind, can be trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from trainer.config.schema import ModelConfig
from trainer.errors import StrataError
from trainer.model.partitions import stored_tensors
from trainer.model.towers import has_language_inside, towers_of
from trainer.model.weights import ModelFolder

# What a configuration calls the parts of a model that take something other than text.
_OTHER_MODALITY = re.compile("vision|visual|image|video|audio|speech|sound|codec|vq_")


# Stored by old versions of transformers, and computed since: in buffers, or not at all.
_NO_WEIGHTS = {"inv_freq", "original_inv_freq", "position_ids", "masked_bias", "version"}


class ModelError(StrataError, ValueError):
    """The model cannot be loaded or built as asked; the message names the key to change."""


def auto_class(architecture: PretrainedConfig) -> Any:
    """Return transformers' auto class that builds the whole model of a configuration: of a multimodal one, too."""
    own = getattr(architecture, "auto_map", None) or {}
    whole = has_language_inside(architecture) and (
        type(architecture) in MODEL_FOR_MULTIMODAL_LM_MAPPING or AutoModelForMultimodalLM.__name__ in own
    )
    return AutoModelForMultimodalLM if whole and AutoModelForCausalLM.__name__ not in own else AutoModelForCausalLM


def refuse_other_kinds(config: ModelConfig, architecture: PretrainedConfig, model: PreTrainedModel) -> None:
    """Raise `ModelError` for a model that does not say where in it the language model is, or that was built as one
    alone although its configuration has more: the rest would be lost."""
    if architecture.is_encoder_decoder:
        raise ModelError(
            f"{key_of(config)}: a model of type '{architecture.model_type}' has an encoder and a decoder, and its "
            "decoder does not work alone: choose a decoder-only model"
        )
    whole = has_language_inside(architecture) and type(model.config) is type(architecture)
    if whole and towers_of(model) is not None and model.get_output_embeddings() is not None:
        return
    parts = [
        name
        for name, value in vars(architecture).items()
        if isinstance(value, dict | PretrainedConfig) and value and _OTHER_MODALITY.search(name)
    ]
    if parts or has_language_inside(architecture):
        raise ModelError(
            f"{key_of(config)}: a model of type '{architecture.model_type}' is more than a language model: its "
            f"configuration also has {', '.join(parts) or 'a text_config inside'}. transformers does not say which "
            f"part of {type(model).__name__} is the language model, and that part alone is not the whole: choose "
            "another model"
        )


def key_of(config: ModelConfig) -> str:
    """Return the configuration key that names the model."""
    return "model.path" if config.path is not None else "model.random"


def check_left_out(
    config: ModelConfig, model: PreTrainedModel, left_out: Mapping[str, tuple[int, ...] | None]
) -> list[str]:
    """Return a warning for weights in the files that are known to be no part of `model`, such as layers that predict
    further tokens; raise `ModelError` for others. `left_out` are the names in the files, with shapes if known."""
    computed = {name for name, _ in model.named_buffers()}
    left = [
        name
        for name, shape in left_out.items()
        if name not in computed and name.rpartition(".")[2] not in _NO_WEIGHTS and not _is_mask(shape)
    ]
    known = [*(model._keys_to_ignore_on_load_unexpected or ()), *_further_predictions(model.config)]
    dropped = [name for name in left if any(re.search(pattern, name) for pattern in known)]
    kind = type(model).__name__
    if unknown := [name for name in left if name not in dropped]:
        saved = ", ".join(getattr(model.config, "architectures", None) or ())
        of_another = f" Its config.json says {saved}." if saved and saved != kind else ""
        raise ModelError(
            f"model.path: '{config.path}' has {len(unknown)} weights that {kind} has no place for, for instance "
            f"{', '.join(unknown[:3])}: they would not be trained, nor be in what the run saves.{of_another} Choose "
            "the folder of a model without them"
        )
    if not dropped:
        return []
    return [
        f"WARNING: {len(dropped)} weights in '{config.path}' are not part of {kind}, for instance "
        f"{', '.join(dropped[:3])}: they are not trained, and not in what the run saves"
    ]


def _is_mask(shape: tuple[int, ...] | None) -> bool:
    """Return whether a tensor of this shape is a causal mask, which old files contain."""
    return shape is not None and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]


def _further_predictions(architecture: PretrainedConfig) -> list[str]:
    """Return patterns of the weights that predict tokens after the next one, which transformers' classes leave out."""
    patterns = [r"(^|\.)mtp(\.|_)"]
    layers = getattr(architecture.get_text_config(), "num_hidden_layers", 0)
    further = getattr(architecture, "num_nextn_predict_layers", None) or 0  # stored as layers behind the last one
    return patterns + [rf"(^|\.)layers\.{layers + index}\." for index in range(further)]


def refuse_untied(whole: PreTrainedModel, folder: ModelFolder) -> None:
    """Raise `ModelError` if the files contain a tied weight under both its names and the two differ: transformers
    (5.23) then unties them, but drops one of them under ZeRO-3."""
    for names, _ in stored_tensors(whole):
        first, *others = [name for name in names if name in folder.shapes] or [""]
        for other in others:
            if not torch.equal(*folder.read([first, other]).values()):
                raise ModelError(
                    f"model.path: config.json in '{folder.path}' ties {first} and {other}, but the weights differ: set "
                    "tie_word_embeddings to false in that file"
                )


def refuse_misfits(
    config: ModelConfig, missing: Iterable[str], mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]]
) -> None:
    """Raise `ModelError` for weights that the files lack, or contain in another shape (name, stored, wanted)."""
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
