"""Tell a multimodal model's language model from what prepares images, video and sound for it.

The parts are found by structure and by transformers' public functions, never by the names of classes: the *language
model* is what `get_decoder` returns, with the embeddings of its tokens and its head. The *towers* are the encoders of
the other modalities. The *projector* is what is left: it turns what a tower returns into what the language model reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

_MODALITIES = ("image", "video", "audio")
# An encoder whose first argument is one of these reads what another module has made.
_NOT_RAW = ("input_ids", "inputs_embeds")


@dataclass(frozen=True)
class Towers:
    """The parts of a multimodal model: the path of its language model, and what is neither inside it nor its embeddings
    or its head, by parameter name."""

    language: str
    vision: dict[str, nn.Parameter]
    projector: dict[str, nn.Parameter]

    @property
    def outside(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the parameters of towers and projector, by part."""
        return {"projector": self.projector, "vision": self.vision}


def has_language_inside(config: Any) -> bool:
    """Return whether `config` is that of a model of which a language model is only a part."""
    return isinstance(config, PretrainedConfig) and config.get_text_config() is not config


def towers_of(model: nn.Module) -> Towers | None:
    """Return the parts of `model`, with or without adapters, or None if it is a language model and nothing else, or
    does not say where in it the language model is."""
    config: Any = getattr(model, "config", None)
    if not has_language_inside(config):
        return None
    paths = {id(module): name for name, module in model.named_modules()}
    language = paths.get(id(_called(model, "get_decoder")), "")
    embeddings, head = _called(model, "get_input_embeddings"), _called(model, "get_output_embeddings")
    if not language or embeddings is None:
        return None
    own = {id(p) for part in (model.get_submodule(language), embeddings, head) if part for p in part.parameters()}
    others = {name: p for name, p in model.named_parameters() if id(p) not in own}
    encoders = _encoders(model, language, paths)
    inside = {id(p) for encoder in encoders for p in encoder.parameters()}
    projector = {name: p for name, p in others.items() if id(p) not in inside}
    if not projector:
        width = config.get_text_config().hidden_size
        projecting = {id(p) for encoder in encoders for module in _last(encoder, width) for p in module.parameters()}
        projector = {name: p for name, p in others.items() if id(p) in projecting}
    return Towers(language, {name: p for name, p in others.items() if name not in projector}, projector)


def modules_outside(model: nn.Module) -> list[str]:
    """Return the paths of the outermost modules that have parameters of towers and projector, and no others."""
    towers = towers_of(model)
    if towers is None:
        return []
    ids = {id(p) for part in towers.outside.values() for p in part.values()}
    found: list[str] = []
    for name, module in model.named_modules():
        parameters = [id(p) for p in module.parameters()]
        if parameters and ids.issuperset(parameters) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def caching(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Return the configurations that say whether `model` caches keys and values: its own, and its language model's."""
    parts = {id(part): part for part in (model.config, model.config.get_text_config())}
    return [part for part in parts.values() if hasattr(part, "use_cache")]


def replace_special(ids: Tensor, config: PretrainedConfig, vocabulary: int) -> Tensor:
    """Return token ids without those to which a multimodal configuration gives a meaning: the places of images, ..."""
    if not has_language_inside(config):
        return ids
    named = (value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index")))
    special = {value for value in named if isinstance(value, int)}
    plain = next(token for token in range(vocabulary) if token not in special)
    return ids.where(~torch.isin(ids, torch.tensor(sorted(special), device=ids.device)), plain)


def _called(model: Any, method: str) -> nn.Module | None:
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError):  # a model that does not say
        return None


def _encoders(model: nn.Module, language: str, paths: dict[int, str]) -> list[nn.Module]:
    """Return the outermost encoders outside the language model: those that `get_encoder` knows, and those that read
    pixels or sound. A model of transformers beside them that reads features belongs to the projector."""
    named = {id(encoder) for encoder in _known_encoders(model)}
    around = ["", *(language[:end] for end, letter in enumerate(language) if letter == ".")]
    siblings = [
        module
        for holder in around
        for module in model.get_submodule(holder).children()
        if isinstance(module, PreTrainedModel) and _apart(paths[id(module)], language)
    ]
    raw = [module for module in siblings if id(module) in named or module.main_input_name not in _NOT_RAW]
    return raw or siblings


def _known_encoders(model: Any) -> Iterator[nn.Module]:
    for modality in _MODALITIES:
        try:
            found = model.get_encoder(modality=modality)
        except (AttributeError, TypeError, ValueError, NotImplementedError):
            continue
        if isinstance(found, nn.Module):
            yield found


def _apart(path: str, language: str) -> bool:
    return path != language and not path.startswith(f"{language}.") and not language.startswith(f"{path}.")


def _last(encoder: nn.Module, width: int) -> list[nn.Module]:
    """Return the modules of an encoder that project: those that come after its layers and have a matrix whose result
    is as wide as the language model (Qwen's mergers)."""
    children = list(encoder.children())
    sizes = [len(list(child.modules())) for child in children]
    layers = max(range(len(children)), key=sizes.__getitem__, default=0)
    return [child for child in children[layers + 1 :] if any(_makes(module, width) for module in child.modules())]


def _makes(module: nn.Module, width: int) -> bool:
    # Not by the shapes of weights, which ZeRO-3 partitions.
    return width in (getattr(module, "out_features", None), getattr(module, "out_channels", None))
