"""Read a checkpoint's tensors from an attached engine and write them back, on any number of ranks and ZeRO stage.

Tensors are grouped by *unit*, which is what changes together: a block or an always-on part. A file contains one rank's
share of one unit: flat ranges of full-shape parameters (as banks keep them), under the keys `master`, `exp_avg`, ...
or, if no optimizer state is kept, `weight`. Ranks of another number or ZeRO stage can read their own ranges from these
files.

A parameter that a sparse update rule trains has *entries* instead: `entries.indices`, flat positions in the parameter,
and as many values under `entries.weight`, `entries.master`, ... The other weights are the base model's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from trainer.checkpoint.agreement import agreed
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.store import CheckpointError, File, Store
from trainer.engine.sparse import Sparse
from trainer.engine.zero.slices import Slice

WEIGHT, MASTER = "weight", "master"
# Other units: states of each rank's random number generators; the base model's weights that never train.
RANDOM, REST = "random", "rest"
# Prefix of the keys of entries.
_ENTRIES = "entries."
_INDICES = f"{_ENTRIES}indices"
# Elements read at a time.
_CHUNK = 2**22
# Dtypes of weights, master weights, moments and scores, as safetensors names them. Indices are I64.
_VALUE_TYPES = ("BF16", "F16", "F32")
# Optimizer state has the names that the optimizer gives it.
_KEY = re.compile(r"[A-Za-z_]\w*")


def _checked_scalars(values: dict[str, float]) -> dict[str, float]:
    if values.get("step", 0) < 0:  # other scalars of an optimizer may have any sign
        raise ValueError(f"step {values['step']} is below 0")
    return values


class _Metadata(BaseModel):
    """Validate the metadata of a file, which `Share.metadata` wrote."""

    model_config = ConfigDict(strict=True)

    ranges: dict[str, tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]]
    scalars: dict[
        str, Annotated[dict[str, Annotated[float, Field(allow_inf_nan=False)]], AfterValidator(_checked_scalars)]
    ]


def unit_of_block(index: int) -> str:
    return f"block-{index:03d}"


def parameters_by_unit(sparse: Sparse) -> dict[str, dict[str, nn.Parameter]]:
    """Return all parameters that may train, by unit and stable name."""
    units = {unit_of_block(block.index): dict(block.parameters) for block in sparse.blocks}
    return units | {part: dict(parameters) for part, parameters in sparse.always_on.items()}


@dataclass(frozen=True)
class Share:
    """One rank's part of a unit: flat tensors by `key:parameter`, and the range [start, stop) of each parameter.

    `scalars` are the optimizer's numbers for each parameter, such as its step count. `settled` are the keys of tensors
    that will not be written to again.
    """

    tensors: dict[str, Tensor]
    ranges: dict[str, tuple[int, int]]
    scalars: dict[str, dict[str, float]]
    settled: set[str] = field(default_factory=set)

    def metadata(self) -> dict[str, str]:
        return {"ranges": json.dumps(self.ranges), "scalars": json.dumps(self.scalars)}


def collect_shares(sparse: Sparse, units: Iterable[str], *, on_base: Collection[str]) -> dict[str, Share]:
    """Return this rank's share of each of `units`. Tensors may be the engine's own, not copies.

    Units in `on_base` can be completed from the base model: of these, weights that a sparse update rule never changed
    are left out.
    """
    wanted = parameters_by_unit(sparse)
    shares = {unit: Share({}, {}, {}) for unit in units}
    owner = {name: unit for unit in shares for name in wanted[unit]}
    with torch.no_grad():
        for piece in sparse.optimizer_slices(owner):
            share = shares[owner[piece.name]]
            share.scalars[piece.name] = dict(piece.scalars)
            _add(share, piece.name, piece.start, piece.tensors)
            if piece.settled:
                share.settled.update(f"{key}:{piece.name}" for key in piece.tensors)
        for unit, share in shares.items():
            for name, parameter in wanted[unit].items():
                entries = sparse.entries(name, parameter)
                for key, tensor in entries.items():  # without elements if all weights are the base model's
                    share.tensors[f"{_ENTRIES}{key}:{name}"] = tensor
                if name not in share.ranges and not (entries and unit in on_base):  # no optimizer state is kept
                    start, weights = sparse.owned(parameter)
                    _add(share, name, start, {WEIGHT: weights})
    return shares


def stage_on_host(shares: Iterable[Share], staging: Staging) -> None:
    """Replace the tensors of `shares` by host memory, which `staging` fills when it runs. Until then the originals must
    not change. Tensors of a bank that are on the host already are not copied."""
    entries = [
        (share.tensors, name)
        for share in shares
        for name, tensor in share.tensors.items()
        if name not in share.settled or tensor.device.type != "cpu"
    ]
    for (tensors, name), copy in zip(entries, staging.lay_out([t[name] for t, name in entries]), strict=True):
        tensors[name] = copy


def _add(share: Share, name: str, start: int, tensors: Mapping[str, Tensor]) -> None:
    length = next(iter(tensors.values())).numel()
    share.ranges[name] = (start, start + length)
    if length:
        share.tensors.update({f"{key}:{name}": tensor for key, tensor in tensors.items()})


class Contents:
    """Read a checkpoint's tensors range by range; each rank reads only its own ranges."""

    def __init__(self, store: Store, units: Mapping[str, Sequence[File]]) -> None:
        self._store = store
        self.units = units
        self._pieces: dict[str, list[tuple[int, int, File]]] = {}
        self.scalars: dict[str, dict[str, float]] = {}
        self._keys: dict[str, set[str]] = {}
        self._entries: dict[str, list[File]] = {}
        self._unit_of: dict[str, str] = {}

    def learn(self, units: Iterable[str]) -> None:
        """Read the headers of the files of `units`. Raises `CheckpointError` if they contradict each other."""
        for unit, file in [(name, file) for name in units for file in self.units[name]]:
            with _readable(file), self._store.open(file) as opened:
                stored = {
                    name: (opened.get_slice(name).get_shape(), opened.get_slice(name).get_dtype())
                    for name in opened.keys()  # noqa: SIM118 - not a dictionary
                }
                texts = opened.metadata() or {}
                fields = {key: json.loads(texts[key]) for key in _Metadata.model_fields}
                metadata = _Metadata.model_validate_json(json.dumps(fields))
                keys = _keys_by_name(stored, metadata)
            for name in (*keys, *metadata.ranges):
                if self._unit_of.setdefault(name, unit) != unit:
                    raise CheckpointError(f"{file.name}: {name} is in {self._unit_of[name]} as well")
            for name, in_file in keys.items():
                known = self._keys.setdefault(name, set())
                # All files must have the same keys. Entries are compared separately: a rank whose range is empty has
                # only these.
                for is_entries in (False, True):
                    here = {key for key in in_file if key.startswith(_ENTRIES) == is_entries}
                    there = {key for key in known if key.startswith(_ENTRIES) == is_entries}
                    if here and there and here != there:
                        raise CheckpointError(
                            f"{file.name}: has {', '.join(sorted(in_file))} of {name}, but another file has "
                            f"{', '.join(sorted(known))}: the checkpoint is damaged"
                        )
                known |= in_file
                if _INDICES in in_file:
                    self._entries.setdefault(name, []).append(file)
            for name, (start, stop) in metadata.ranges.items():
                self._pieces.setdefault(name, []).append((start, stop, file))
            self.scalars.update(metadata.scalars)

    def misfit(self, name: str, numel: int) -> str | None:
        """Return why the stored parts do not make up the parameter `name` of `numel` elements, or None if they do."""
        pieces = sorted((start, stop) for start, stop, _ in self._pieces.get(name, ()) if stop > start)
        if pieces and pieces[-1][1] != numel:
            return f"{name} has {numel:,} elements here, but {pieces[-1][1]:,} in the checkpoint: it is another model"
        overlap = next(((first, second) for first, second in pairwise(pieces) if second[0] < first[1]), None)
        if overlap:
            return f"{name}: elements {overlap[1][0]} to {overlap[0][1]} are in two of the checkpoint's files"
        if name not in self._entries and numel and not pieces:
            return f"the checkpoint contains nothing of {name}"
        indices = self.entries(name, ("indices",)).get("indices", torch.empty(0, dtype=torch.int64))
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < numel:
            return f"{name}: entries at {int(indices.min())} to {int(indices.max())}, but it has {numel} elements here"
        if indices.unique().numel() != indices.numel():
            return f"{name}: several entries for the same element"
        return None

    @property
    def names(self) -> frozenset[str]:
        """Return the names of the stored parameters."""
        return frozenset(self._pieces) | self._entries.keys()

    def names_in(self, unit: str) -> set[str]:
        """Return the names of the stored parameters of a unit."""
        return {name for name, its_unit in self._unit_of.items() if its_unit == unit}

    def keys(self, name: str) -> set[str]:
        """Return which of `weight`, `master`, the moments and entries are stored for a parameter."""
        return self._keys.get(name, set())

    def moments(self, name: str) -> set[str]:
        """Return the names of the optimizer state with one value for each weight."""
        return {key for key in self.keys(name) if not key.startswith(_ENTRIES)} - {WEIGHT, MASTER}

    def read(self, key: str, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flat parameter `name`. Raises `CheckpointError` if some are missing."""
        parts: list[Tensor] = []
        reached = start
        for begin, end, file in sorted(self._pieces[name], key=lambda piece: piece[0]):
            if end <= reached or begin >= stop:
                continue
            if begin > reached:
                break
            with self._store.open(file) as opened:
                parts.append(opened.get_slice(f"{key}:{name}")[reached - begin : min(end, stop) - begin])
            reached = min(end, stop)
            if reached == stop:
                break
        if reached < stop:
            raise CheckpointError(f"{name}: elements {reached} to {stop} are in none of the checkpoint's files")
        return torch.cat(parts) if parts else torch.empty(0)

    def entries(self, name: str, keys: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return all ranks' `indices` and values, or only `keys`, of a parameter that a sparse update rule trains. The
        result is empty for any other parameter."""
        parts: dict[str, list[Tensor]] = {}
        wanted = {key for key in self.keys(name) if key.startswith(_ENTRIES)}
        if keys is not None:
            wanted &= {f"{_ENTRIES}{key}" for key in keys}
        for file in self._entries.get(name, []):
            with self._store.open(file) as opened:
                for key in sorted(wanted):
                    parts.setdefault(key.removeprefix(_ENTRIES), []).append(opened.get_tensor(f"{key}:{name}"))
        return {key: torch.cat(tensors) for key, tensors in parts.items()}

    def on_base(self, names: Iterable[str]) -> bool:
        """Return whether any of `names` needs the base model, because only its entries are stored."""
        return any(name in self._entries and WEIGHT not in self.keys(name) for name in names)

    def weights(self, name: str, into: Tensor) -> None:
        """Copy the weights of a parameter, or its fp32 master weights rounded, to all of the full-shape tensor `into`.
        If only entries are stored, the other elements of `into` do not change."""
        if self.on_base([name]):
            entries = self.entries(name, ("indices", WEIGHT))
            into.view(-1)[entries["indices"]] = entries[WEIGHT].to(into.dtype)
            return
        flat, key = into.view(-1), WEIGHT if WEIGHT in self.keys(name) else MASTER
        for start in range(0, flat.numel(), _CHUNK):  # fp32 master weights are twice as large as the weights
            stop = min(start + _CHUNK, flat.numel())
            flat[start:stop].copy_(self.read(key, name, start, stop))

    # Master weights and moments, for `Sparse.load_state_dict` (see `StateSource`).

    def has_state(self, names: Sequence[str]) -> bool:
        return all(MASTER in self.keys(name) for name in names)

    def layout(self, names: Sequence[str]) -> tuple[set[str], dict[str, float]]:
        moments = {key for name in names for key in self.moments(name)}
        return moments, next((self.scalars[name] for name in names if self.scalars.get(name)), {})

    def load(self, slices: Sequence[Slice]) -> None:
        for piece in slices:
            for key, tensor in piece.tensors.items():
                if key in self.keys(piece.name):
                    tensor.copy_(self.read(key, piece.name, piece.start, piece.stop))


@contextmanager
def _readable(file: File) -> Iterator[None]:
    """Raise `CheckpointError` if the header or metadata of a file is not as a save writes it."""
    try:
        yield
    except (SafetensorError, ValidationError, KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: is not a file of a checkpoint: {error}") from error


def _keys_by_name(stored: Mapping[str, tuple[Sequence[int], str]], metadata: _Metadata) -> dict[str, set[str]]:
    """Return the keys of each parameter in a file, from shapes and dtypes by `key:name`. Raises `ValueError`."""
    keys: dict[str, set[str]] = {}
    for full, (shape, kind) in stored.items():
        key, _, name = full.partition(":")
        is_entries = key.startswith(_ENTRIES)
        if is_entries:
            like = stored.get(f"{_INDICES}:{name}", ((), ""))[0]
        elif _KEY.fullmatch(key) and name in metadata.ranges:
            like = [metadata.ranges[name][1] - metadata.ranges[name][0]]
        else:
            raise ValueError(f"{full} is unknown")
        allowed: tuple[str, ...] = ("I64",)
        if key != _INDICES:  # with local bias correction, entries have integer step counts
            allowed = ("I32", *_VALUE_TYPES) if is_entries else _VALUE_TYPES
        if len(shape) != 1 or list(shape) != list(like) or kind not in allowed:
            raise ValueError(f"{full} has shape {tuple(shape)} and type {kind}; allowed: {list(like)}, {allowed}")
        keys.setdefault(name, set()).add(key)
    for name, (start, stop) in metadata.ranges.items():
        if stop < start or (stop > start and not {WEIGHT, MASTER} & keys.get(name, set())):
            raise ValueError(f"elements {start} to {stop} of {name} are missing")
    return keys


@torch.no_grad()
def restore_weights(sparse: Sparse, contents: Contents) -> None:
    """Write the weights of all units of `contents` into the engine. Collective."""
    units = parameters_by_unit(sparse)
    sparse.change()
    for unit in units:
        if unit in contents.units:
            # If one rank cannot read a file, the others must not wait for it in `publish`.
            agreed(partial(_restore_unit, sparse, contents, units[unit]))
            for parameter in units[unit].values():
                sparse.publish(parameter)


def _restore_unit(sparse: Sparse, contents: Contents, parameters: Mapping[str, nn.Parameter]) -> None:
    """Write this rank's ranges of the weights of `parameters`."""
    for name, parameter in parameters.items():
        start, weights = sparse.owned(parameter)
        if not contents.on_base([name]):
            key = WEIGHT if WEIGHT in contents.keys(name) else MASTER  # weights are rounded fp32 master weights
            weights.copy_(contents.read(key, name, start, start + weights.numel()))
        elif entries := contents.entries(name, ("indices", WEIGHT)):
            places = entries["indices"] - start
            mine = (places >= 0) & (places < weights.numel())
            weights[places[mine].to(weights.device)] = entries[WEIGHT][mine].to(weights)
