"""Deal the samples of every step to ranks, and record in checkpoints what decides which samples these are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm
from typing import Any

from trainer.data.errors import DataError


class Order(ABC):
    """Deal the samples of steps to ranks.

    Step s uses positions s * global_batch_size up to (s + 1) * global_batch_size. Neither the number of ranks nor the
    micro-batch size changes the samples of a step. `fingerprint` identifies the samples. `made_of` maps keys to what
    decided them, for messages, and `earlier_fingerprint` is what checkpoints recorded before they recorded `made_of`
    (see `cache.TokenisedData`).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        ranks: int,
        weights: Sequence[float] | None = None,
        fingerprint: str = "",
        made_of: Mapping[str, Any] | None = None,
        earlier_fingerprint: str | None = None,
    ) -> None:
        if global_batch_size < 1 or global_batch_size % (micro_batch_size * ranks):
            raise ValueError(
                f"train.global_batch_size: {global_batch_size} is no multiple of train.micro_batch_size x ranks = "
                f"{micro_batch_size} x {ranks}"
            )
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank}; allowed: 0 to {ranks - 1}")
        self.global_batch_size = global_batch_size
        self.accumulation_steps = global_batch_size // (micro_batch_size * ranks)
        self._shape = (self.accumulation_steps, ranks, micro_batch_size)
        self._rank = rank
        self._fingerprint = fingerprint
        self._made_of = dict(made_of or {})
        self._earlier_fingerprint = earlier_fingerprint
        # The names are those of the checkpoint's format.
        self._order = {
            "seed": seed,
            "global_batch_size": global_batch_size,
            "weights": None if weights is None else list(weights),
            "sizes": list(sizes),
        }

    @abstractmethod
    def _of_step(self, first: int) -> list[Any]:
        """Return the samples of a step of all ranks, from position `first` on."""

    def choose(self, step: int) -> list[list[Any]]:
        """Return this rank's micro-batches of a step: `accumulation_steps` lists of micro_batch_size samples, or of
        their indices."""
        samples = self._of_step(step * self.global_batch_size)
        _, ranks, size = self._shape
        starts = [(part * ranks + self._rank) * size for part in range(self.accumulation_steps)]
        return [samples[start : start + size] for start in starts]

    def state(self, step: int) -> dict[str, Any]:
        """Return what to save after `step` steps, as plain JSON. It is the same on every rank."""
        return {"step": step, "data": self._fingerprint, "made_of": self._made_of, **self._order}

    def resume(self, state: Mapping[str, Any]) -> int:
        """Return the step to resume from. Raise `DataError`, with the keys that changed, if the order of samples would
        be another one than in the checkpoint."""
        data_changes = self._changes_of_data(state)
        order_changes = [
            f"{key}: {state.get(name)!r} in the checkpoint, {self._order[name]!r} now"
            for name, key in _ORDER_KEYS.items()
            if state.get(name) != self._order[name]
            and not (name == "sizes" and data_changes)  # sizes follow from the data
        ]
        if data_changes or order_changes:
            advice = "change it back, or start anew with resume=never or another output"
            raise DataError([f"{problem}; {advice}" for problem in data_changes + order_changes])
        return state["step"]

    def not_recorded(self, state: Mapping[str, Any]) -> list[str]:
        """Return lines about what `resume` cannot check, because an earlier version of Strata did not record it."""
        if not self._made_of or "made_of" in state:
            return []
        if self._earlier_fingerprint is None:
            return [
                "the checkpoint does not record how its data was read, and folders are now read in another way, file "
                "by file: only the number of samples was checked"
            ]
        return ["the checkpoint does not record what its samples were made of; files and settings are the same"]

    def _changes_of_data(self, state: Mapping[str, Any]) -> list[str]:
        if state.get("data") == self._fingerprint:
            return []
        before = state.get("made_of")
        if before:
            changes = [
                _change(key, before, self._made_of)
                for key in dict.fromkeys([*self._made_of, *before])
                if before.get(key, _ABSENT) != self._made_of.get(key, _ABSENT)
            ]
            return list(dict.fromkeys(changes)) or ["data.train: other samples"]
        if self._made_of and self._earlier_fingerprint in (None, state.get("data")):
            return []
        return [
            "data.train: not the samples of the run to resume. Samples depend on their files, data.max_length, "
            "data.overflow, data.packing, data.eval_fraction, the tokenizer, its chat template and the version of trl; "
            "this checkpoint does not record which of them changed"
        ]


_ABSENT = object()
_ORDER_KEYS = {
    "seed": "seed",
    "global_batch_size": "train.global_batch_size",
    "weights": "data.train[].weight",
    "sizes": "samples of each source of data.train",
}


def _change(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if key not in before or key not in now:
        source = key.rpartition(".")[0] if key.startswith("data.train[") else key
        return f"{source}: {'only in the checkpoint' if key in before else 'not in the checkpoint'}"
    if isinstance(now[key], Mapping):  # a digest
        subject = "its content" if key.startswith("data.train[") else "it"
        return f"{key}: {subject} is not the same as in the checkpoint"
    return f"{key}: {before[key]!r} in the checkpoint, {now[key]!r} now"


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Return integers in the proportion of the weights as decimals: 7 and 3 for 0.7 and 0.3."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    return [int(weight * scale) for weight in exact]


def due_turns(shares: Sequence[int], start: int, stop: int) -> list[tuple[int, int]]:
    """Return the turns at positions `start` to `stop` of a mix, as (source, number of its turns before).

    With shares s of a total S, turn k of a source is due at time (k + 1/2) * S / s, and turns are taken in the order in
    which they are due. Until time t a source has had t * s / S turns to within a half, and all sources together t to
    within half their number. So the requested turns are in a known window of time, and nothing is counted from 0.
    After every S positions each source has had exactly s turns.
    """
    total, unit = sum(shares), lcm(*shares)
    begin, end = max(0, start - len(shares)), stop + len(shares)
    turns = [range(_turns_until(begin, share, total), _turns_until(end, share, total)) for share in shares]
    due = sorted(
        ((2 * turn + 1) * (unit // share), source, turn)
        for source, (share, own) in enumerate(zip(shares, turns, strict=True))
        for turn in own
    )
    before = sum(own.start for own in turns)
    return [(source, turn) for _, source, turn in due[start - before : stop - before]]


def _turns_until(time: int, share: int, total: int) -> int:
    """Count the turns of a source that are due before a time: those k with (k + 1/2) * total / share < time."""
    return max(0, -((total - 2 * time * share) // (2 * total)))
