"""What a checkpoint holds of an attached engine, taken out of it and put back, free of ranks and ZeRO stage.

Tensors are grouped by *unit*, what changes together: a block, an always-on part. A file holds one rank's share of one
unit: flat ranges of full-shape parameters (as banks keep them), under the keys `master`, `exp_avg`, ... or, where no
optimizer state is kept, `weight`. Any number of ranks under any stage finds its own ranges in them again.

Of what a sparse update rule trains there are *entries* instead: `entries.indices`, flat positions in the parameter, and
as many values under `entries.weight`, `entries.master`, ... The other weights are the base model's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainer.checkpoint.staging import Staging
from trainer.checkpoint.store import CheckpointError, File, Store
from trainer.engine.attach import Sparse
from trainer.engine.registration import MOMENTS, Slice

WEIGHT, MASTER = "weight", "master"
# Units beside those that train: each rank's random number generators, and of the base what never trains.
RANDOM, REST = "random", "rest"
# Before the keys of tensors that hold some of a parameter's weights.
_ENTRIES = "entries."
_CHUNK = 2**22


def unit_of_block(index: int) -> str:
    return f"block-{index:03d}"


def parameters_by_unit(sparse: Sparse) -> dict[str, dict[str, nn.Parameter]]:
    """Everything that may train, by unit and stable name."""
    units = {unit_of_block(block.index): dict(block.parameters) for block in sparse.blocks}
    return units | {part: dict(parameters) for part, parameters in sparse.always_on.items()}


@dataclass(frozen=True)
class Share:
    """One rank's part of a unit: tensors by `key:parameter`, which of them nobody writes to any more, and which range
    of it each parameter has."""

    tensors: dict[str, Tensor]
    ranges: dict[str, tuple[int, int]]
    scalars: dict[str, dict[str, float]]
    settled: set[str] = field(default_factory=set)

    def metadata(self) -> dict[str, str]:
        return {"ranges": json.dumps(self.ranges), "scalars": json.dumps(self.scalars)}


def take(sparse: Sparse, units: Iterable[str], *, on_base: Collection[str]) -> dict[str, Share]:
    """This rank's part of `units`, as it lies in the engine.

    Of units in `on_base` it leaves out what a sparse update rule never changed.
    """
    wanted = parameters_by_unit(sparse)
    shares = {unit: Share({}, {}, {}) for unit in units}
    owner = {name: unit for unit in shares for name in wanted[unit]}
    with torch.no_grad():
        for piece in sparse.optimizer_slices(owner):
            share = shares[owner[piece.name]]
            share.scalars[piece.name] = dict(piece.scalars)
            _put(share, piece.name, piece.start, piece.tensors)
            if piece.settled:
                share.settled.update(f"{key}:{piece.name}" for key in piece.tensors)
        for unit, share in shares.items():
            for name, parameter in wanted[unit].items():
                entries = sparse.entries(name, parameter)
                for key, tensor in entries.items():  # also none, which says that all is the base's
                    share.tensors[f"{_ENTRIES}{key}:{name}"] = tensor
                if name not in share.ranges and not (entries and unit in on_base):  # no optimizer state is kept
                    start, weights = sparse.owned(parameter)
                    _put(share, name, start, {WEIGHT: weights})
    return shares


def put_on_host(shares: Iterable[Share], staging: Staging) -> None:
    """Give `shares` tensors in host memory, which hold what they are to hold when `staging` has run: until then nothing
    may change. What a bank has there stays where it is."""
    places = [
        (share.tensors, name)
        for share in shares
        for name, tensor in share.tensors.items()
        if name not in share.settled or tensor.device.type != "cpu"
    ]
    for (tensors, name), copy in zip(places, staging.place([t[name] for t, name in places]), strict=True):
        tensors[name] = copy


def _put(share: Share, name: str, start: int, tensors: Mapping[str, Tensor]) -> None:
    length = next(iter(tensors.values())).numel()
    share.ranges[name] = (start, start + length)
    if length:
        share.tensors.update({f"{key}:{name}": tensor for key, tensor in tensors.items()})


class Contents:
    """A checkpoint's tensors, read range by range: each rank reads its own."""

    def __init__(self, store: Store, units: Mapping[str, Sequence[File]]) -> None:
        self._store = store
        self.units = units
        self._pieces: dict[str, list[tuple[int, int, File]]] = {}
        self.scalars: dict[str, dict[str, float]] = {}
        self._keys: dict[str, set[str]] = {}
        self._entries: dict[str, list[File]] = {}

    def learn(self, units: Iterable[str]) -> None:
        """Read what the files of `units` say of themselves."""
        for file in (file for unit in units for file in self.units[unit]):
            with self._store.open(file) as opened:
                metadata = opened.metadata()
                for stored in opened.keys():  # noqa: SIM118 - not a dictionary
                    key, _, name = stored.partition(":")
                    self._keys.setdefault(name, set()).add(key)
                    if key == f"{_ENTRIES}indices":
                        self._entries.setdefault(name, []).append(file)
            for name, (start, stop) in json.loads(metadata["ranges"]).items():
                self._pieces.setdefault(name, []).append((start, stop, file))
            self.scalars.update(json.loads(metadata["scalars"]))

    @property
    def names(self) -> frozenset[str]:
        """The parameters that there is something of."""
        return frozenset(self._pieces) | self._entries.keys()

    def size(self, name: str) -> int | None:
        """Elements of the whole parameter; None where there are entries alone."""
        return max((stop for _, stop, _ in self._pieces[name]), default=None) if name in self._pieces else None

    def keys(self, name: str) -> set[str]:
        """Which of `weight`, `master` and the moments there are of a parameter."""
        return self._keys.get(name, set())

    def read(self, key: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flat parameter `name`; raises `CheckpointError` where some are nowhere."""
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
        """Of a parameter that a sparse update rule trains, all ranks' `indices` and values, or of these `keys`; empty
        for any other."""
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
        """Whether of some of `names` there are entries alone."""
        return any(name in self._entries and WEIGHT not in self.keys(name) for name in names)

    def weights(self, name: str, into: Tensor) -> None:
        """Copy the weights of a parameter, or its master rounded to them, into the whole tensor `into`. Where there are
        entries alone, the other weights stay as they are there."""
        if self.on_base([name]):
            entries = self.entries(name, ("indices", WEIGHT))
            into.view(-1)[entries["indices"]] = entries[WEIGHT].to(into.dtype)
            return
        flat, key = into.view(-1), WEIGHT if WEIGHT in self.keys(name) else MASTER
        for start in range(0, flat.numel(), _CHUNK):  # a master is twice as large as the weights
            stop = min(start + _CHUNK, flat.numel())
            flat[start:stop].copy_(self.read(key, name, start, stop))

    # Masters and moments, as `Sparse.load_state_dict` wants them.

    def has_state(self, names: Sequence[str]) -> bool:
        return all(MASTER in self.keys(name) for name in names)

    def layout(self, names: Sequence[str]) -> tuple[set[str], dict[str, float]]:
        moments = {key for name in names for key in self.keys(name)} & set(MOMENTS)
        return moments, next((self.scalars[name] for name in names if self.scalars.get(name)), {})

    def load(self, slices: Sequence[Slice]) -> None:
        for piece in slices:
            for key, tensor in piece.tensors.items():
                if key in self.keys(piece.name):
                    tensor.copy_(self.read(key, piece.name, piece.start, piece.stop))


@torch.no_grad()
def put_weights_back(sparse: Sparse, contents: Contents) -> None:
    """The weights of all units of `contents`. Collective."""
    units = parameters_by_unit(sparse)
    sparse.change()
    for unit in units:
        if unit in contents.units:
            for name, parameter in units[unit].items():
                start, weights = sparse.owned(parameter)
                if not contents.on_base([name]):
                    key = WEIGHT if WEIGHT in contents.keys(name) else MASTER  # weights are masters, rounded
                    weights.copy_(contents.read(key, name, start, start + weights.numel()))
                elif entries := contents.entries(name, ("indices", WEIGHT)):
                    places = entries["indices"] - start
                    mine = (places >= 0) & (places < weights.numel())
                    weights[places[mine].to(weights.device)] = entries[WEIGHT][mine].to(weights)
                sparse.publish(parameter)
