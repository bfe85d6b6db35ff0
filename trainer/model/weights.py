"""Read the weights of a Hugging Face folder under the model's own names, a few at a time.

The files may differ from the model: transformers renames weights while it loads them, and stacks experts that are
stored one by one. Its own functions do that here as well, for the requested weights rather than for all files at once,
so that the result equals that of `from_pretrained`, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from trainer.config.errors import did_you_mean
from trainer.errors import StrataError


class WeightsError(StrataError, ValueError):
    """These weights cannot be read name by name: no safetensors, no such name, or a conversion that fails."""


@dataclass
class _Origin:
    """Sources of a weight of the model, or of several: names in the files, each with the pattern that it matched.

    Without a converter it is one tensor, unchanged.
    """

    name: str
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)

    def make(self, tensors: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the model's weights by name. Empties `tensors`, so that a conversion can free what it has read."""
        if self.converter is None:
            return {self.name: tensors.pop(self.sources[0][0])}
        converter = deepcopy(self.converter)  # it collects what it is given
        for key, pattern in self.sources:
            converter.add_tensor(self.name, key, pattern, tensors.pop(key))
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: found[0] if isinstance(found, list) else found for name, found in made.items()}


class ModelFolder:
    """The weights of a folder in safetensors, or of a Hub name, by the names that they have in `model`.

    `model` says how the files are to be read and is not changed. It may be on the meta device, but not partitioned
    (ZeRO-3). Every file is opened once for its header. `shapes` maps the model's weights in the folder to their shapes,
    `left_out` the tensors in the files that the model has no place for.

    Raises `WeightsError` if there are no safetensors, or if they are damaged or cannot be converted, and `OSError` if a
    file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], model: PreTrainedModel) -> None:
        self.path = os.fspath(path)
        self._model = model
        self._files: dict[str, str] = {}
        on_meta: dict[str, Tensor] = {}
        for file in _weight_files(self.path, model):
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118 - not a dictionary
                        self._files[key] = file
                        on_meta[key] = torch.empty(opened.get_slice(key).get_shape(), device="meta")
            except SafetensorError as error:
                raise WeightsError(f"{file}: cannot be read ({error})") from error
        self._origins: dict[str, _Origin] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        own = model.state_dict()
        origins, left_out = _match(self._files, model)
        self.left_out = {name: tuple(on_meta[name].shape) for name in left_out}
        for origin in origins:
            try:  # on shapes alone: what cannot be converted is known before anything is read
                made = origin.make({key: on_meta[key] for key, _ in origin.sources}, model)
            except Exception as error:  # of many types
                raise WeightsError(f"'{self.path}': transformers cannot convert {origin.name}: {error}") from error
            self.shapes |= {name: tuple(tensor.shape) for name, tensor in made.items() if name in own}
            self._origins |= {name: origin for name in made if name in own}

    @torch.no_grad()
    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the weights `names`, in host memory; floating-point ones as `dtype`, if given.

        A weight that needs no conversion is a view of the mapped file, which the system reads on use and may drop
        again. A converted one is a copy, made from views. Nothing is cached here. Raises `WeightsError` for a name that
        is not in the folder.
        """
        wanted = list(dict.fromkeys(names))
        for name in wanted:
            if name not in self._origins:
                near = did_you_mean(name, self._origins)
                raise WeightsError(f"'{self.path}' has no weight '{name}' for this model{near}")
        found: dict[str, Tensor] = {}
        for name in wanted:
            if name not in found:
                origin = self._origins[name]
                made = origin.make(self._stored([key for key, _ in origin.sources], dtype), self._model)
                found |= {name: made[name] for name in wanted if name in made}
        return {name: found[name] for name in wanted}

    def _stored(self, keys: list[str], dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Return tensors as they are in the files, by their names there. Each file is opened once."""
        tensors = {}
        for file in dict.fromkeys(self._files[key] for key in keys):
            with safe_open(file, framework="pt") as opened:
                for key in keys:
                    if self._files[key] == file:
                        tensor = opened.get_tensor(key)
                        cast = dtype is not None and tensor.is_floating_point()
                        tensors[key] = tensor.to(dtype) if cast else tensor
        return tensors


def _weight_files(path: str, model: PreTrainedModel) -> list[str]:
    """Return the files with weights, where `from_pretrained` looks for them; downloads from the Hub if necessary."""
    explicit = getattr(model.config, "transformers_weights", None)
    for name in [explicit] if explicit else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if file is not None and name.endswith(".json"):
            return list(get_checkpoint_shard_files(path, file)[0])
        if file is not None and name.endswith(".safetensors"):
            return [file]
    raise WeightsError(f"'{path}' has no file named {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}")


def _match(keys: Iterable[str], model: PreTrainedModel) -> tuple[list[_Origin], list[str]]:
    """Find which of the model's weights each name in the files belongs to, and the names that belong to none; as
    transformers 5.23 does it in `convert_and_load_state_dict_in_model`, in its order, on which the order of stacked
    experts depends."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    origins: dict[str, _Origin] = {}
    left_out: list[str] = []
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:  # renamed though it is the model's own name already
            name, pattern = rename_source_key(key, [], [], prefix, own)
        if name not in own:
            left_out.append(key)
            continue
        origin = origins.setdefault(name, _Origin(name, by_pattern[pattern] if pattern is not None else None))
        origin.sources.append((key, pattern or key))
    return list(origins.values()), left_out
