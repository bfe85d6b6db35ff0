"""Compute the order of samples, deal samples to ranks, and collate them to batches.

The order of training samples is a pure function of (seed, step). A checkpoint therefore saves only the step, and the
values by which `SampleOrder.resume` checks that data and settings are still the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np
import torch

from trainer.data.errors import DataError

IGNORED = -100  # a label without a target; cross entropy skips it by default


class SampleOrder:
    """Compute the sample indices of every optimizer step.

    `sizes` are the numbers of samples of the sources, which are numbered consecutively. Without `weights` they form one
    pool: the stream of samples is a sequence of permutations of the pool, one per epoch, each drawn from (seed, epoch).
    With `weights`, source i gets its share weights[i] / sum(weights) of every stretch of the stream, as nearly as whole
    samples allow; the samples of a source are permuted as those of the pool are.

    Step s uses positions s * global_batch_size up to (s + 1) * global_batch_size of the stream, and may span epochs.
    Neither the number of ranks nor the micro-batch size changes the samples of a step. With an equal micro-batch size
    the micro-batches are the same, too, only dealt to other ranks.

    `fingerprint` identifies the samples. `made_of` maps keys to what decided the samples, for messages, and
    `earlier_fingerprint` is what checkpoints recorded before they recorded `made_of` (see `cache.TokenisedData`).
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
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes are {list(sizes)}; at least one sample is needed, and one in every source")
        if weights is not None and (len(weights) != len(sizes) or min(weights) <= 0):
            raise ValueError(f"weights are {list(weights)}; one above 0 is needed for each of {len(sizes)} sources")
        if global_batch_size < 1 or global_batch_size % (micro_batch_size * ranks):
            raise ValueError(
                f"train.global_batch_size: {global_batch_size} is no multiple of train.micro_batch_size x ranks = "
                f"{micro_batch_size} x {ranks}"
            )
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank}; allowed: 0 to {ranks - 1}")
        self.global_batch_size = global_batch_size
        self.accumulation_steps = global_batch_size // (micro_batch_size * ranks)
        self._seed = seed
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
        # A pool is a mix of one source. Shares are integers, so that no rounding decides the order of turns.
        self._sizes = [sum(sizes)] if weights is None else list(sizes)
        self._shares = _whole([1.0] if weights is None else weights)
        self._keys = [[]] if weights is None else [[2 + source] for source in range(len(sizes))]
        self._offsets = np.cumsum([0, *self._sizes]).tolist()
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # source: its latest epoch and the order of that epoch

    def indices(self, step: int) -> list[list[int]]:
        """Return this rank's micro-batches of a step: `accumulation_steps` lists of micro_batch_size indices."""
        first = step * self.global_batch_size
        samples = [self._sample(*turn) for turn in _turns(self._shares, first, first + self.global_batch_size)]
        return np.reshape(samples, self._shape)[:, self._rank].tolist()

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

    def _sample(self, source: int, number: int) -> int:
        """Return the index of the sample that a source contributes at its turn `number`, counted from 0."""
        epoch, position = divmod(number, self._sizes[source])
        if self._orders.get(source, (None,))[0] != epoch:
            # PCG64 is named, because numpy may change the bit generator of default_rng.
            words = np.random.SeedSequence([self._seed, epoch, *self._keys[source]])
            order = np.random.Generator(np.random.PCG64(words)).permutation(self._sizes[source])
            self._orders[source] = (epoch, order)
        return self._offsets[source] + int(self._orders[source][1][position])


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


def _whole(weights: Sequence[float]) -> list[int]:
    """Return integers in the proportion of the weights as decimals: 7 and 3 for 0.7 and 0.3."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    return [int(weight * scale) for weight in exact]


def _turns(shares: Sequence[int], start: int, stop: int) -> list[tuple[int, int]]:
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


def eval_batches(
    num_samples: int, *, micro_batch_size: int, rank: int, ranks: int, max_samples: int | None = None
) -> list[list[int]]:
    """Return this rank's share of an evaluation: each sample is on one rank, and each rank has as many batches.

    The last batch of a rank may be shorter, or empty. The rank must run a forward for an empty one, too, because under
    ZeRO-3 that is collective (use any sample, with all labels masked). `max_samples` chooses samples at even distances,
    because files are often sorted.
    """
    count = num_samples if max_samples is None else min(num_samples, max_samples)
    chosen = [index * num_samples // count for index in range(count)]
    return deal(chosen, micro_batch_size=micro_batch_size, rank=rank, ranks=ranks)


def deal(samples: Sequence[int], *, micro_batch_size: int, rank: int, ranks: int) -> list[list[int]]:
    """Return this rank's micro-batches of `samples`: as many as others have. The last one may be shorter or empty."""
    batches = [list(samples[start : start + micro_batch_size]) for start in range(0, len(samples), micro_batch_size)]
    batches += [[]] * (-len(batches) % ranks)
    return batches[rank::ranks]


def collate(
    samples: Sequence[Mapping[str, Sequence[int] | np.ndarray]],
    *,
    pad_id: int,
    pad_to: int | None = None,
    flat: bool = False,
) -> dict[str, torch.Tensor]:
    """Return samples of {input_ids, labels} as one batch, padded on the right: int64 tensors [samples, longest].

    The length is that of the longest sample, rounded up to a multiple of `pad_to` if it is given. Labels are -100 on
    padding. A batch of whole samples has an attention_mask. A batch of packed rows, which have `seq_lengths`, has
    position_ids instead, which start from 0 in every sample of a row: given these and no mask, transformers' models let
    each sample attend only to itself. All padding has position 0, so that each padding token is separate as well.

    `flat` concatenates packed rows to a single row without padding: flash attention separates samples by their
    positions only in a batch of one.
    """
    packed = "seq_lengths" in samples[0]
    if packed and flat:
        samples = [{name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}]
    longest = max(len(sample["input_ids"]) for sample in samples)
    shape = (len(samples), -(-longest // (pad_to or 1)) * (pad_to or 1))
    layout = "position_ids" if packed else "attention_mask"
    batch = {
        "input_ids": torch.full(shape, pad_id),
        layout: torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED),
    }
    for index, sample in enumerate(samples):
        size = len(sample["input_ids"])
        batch["input_ids"][index, :size] = torch.tensor(sample["input_ids"])
        batch["labels"][index, :size] = torch.tensor(sample["labels"])
        batch[layout][index, :size] = torch.cat([torch.arange(n) for n in sample["seq_lengths"]]) if packed else 1
    return batch


def count_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Count the tokens of a batch from `collate` that are not padding. Reads values, as `count_targets` does."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    # A sample has at least two tokens (or it would have no target), so as many tokens are at position 0 as at 1.
    positions = batch["position_ids"]
    return int((positions > 0).sum() + (positions == 1).sum())


def count_targets(labels: torch.Tensor) -> int:
    """Count the target tokens in labels [samples, length]. The first position does not count: nothing predicts it.

    Reads the tensor's values: call it on the host, before the batch is moved to the device.
    """
    return int((labels[:, 1:] != IGNORED).sum())
