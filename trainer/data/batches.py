"""The order of samples and the batches made of them.

The order of training samples is a pure function of (seed, step), so a checkpoint needs to save nothing but the step,
and what shows that data and settings are still the same.
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


class Batches:
    """The sample indices of every optimizer step.

    `sizes` are the numbers of samples of the sources, which lie one after another. Without `weights` they are one pool:
    the stream of samples is one permutation of the pool per epoch after another, each drawn from (seed, epoch). With
    `weights`, source i takes its share weights[i] / sum(weights) of every stretch of the stream, as nearly as whole
    samples allow; within a source, permutations follow each other as they do in the pool.

    Step s takes positions s * global_batch_size up to (s + 1) * global_batch_size of the stream, across the border of
    epochs where they fall so. Neither the number of ranks nor the micro-batch size changes what a step sees, and with
    equal micro-batch size the micro-batches themselves are the same, only dealt to other ranks.
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
        self._identity = {
            "data": fingerprint,
            "sizes": list(sizes),
            "weights": None if weights is None else list(weights),
            "seed": seed,
            "global_batch_size": global_batch_size,
        }
        # A pool is a mix of one. Shares are whole numbers, so that no rounding decides whose turn it is.
        self._sizes = [sum(sizes)] if weights is None else list(sizes)
        self._shares = _whole([1.0] if weights is None else weights)
        self._keys = [[]] if weights is None else [[2 + source] for source in range(len(sizes))]
        self._offsets = np.cumsum([0, *self._sizes]).tolist()
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # by source: the epoch used last, and its order

    def indices(self, step: int) -> list[list[int]]:
        """This rank's micro-batches of an optimizer step: accumulation_steps lists of micro_batch_size indices."""
        first = step * self.global_batch_size
        samples = [self._sample(*turn) for turn in _turns(self._shares, first, first + self.global_batch_size)]
        return np.reshape(samples, self._shape)[:, self._rank].tolist()

    def state(self, step: int) -> dict[str, Any]:
        """What to save after `step` steps; plain JSON, the same on every rank."""
        return {"step": step, **self._identity}

    def resume(self, state: Mapping[str, Any]) -> int:
        """The step to go on with; DataError where the steps until there were not those of this object."""
        changed = [
            f"data position: {name} was {state.get(name)!r} when it was saved and is {value!r} now; resume with what "
            "was saved, or start a new run"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if changed:
            raise DataError(changed)
        return state["step"]

    def _sample(self, source: int, number: int) -> int:
        """The index of the sample that a source gives when its turn comes for the `number`-th time."""
        epoch, position = divmod(number, self._sizes[source])
        if self._orders.get(source, (None,))[0] != epoch:
            # The bit generator is named, because default_rng may change what it stands for.
            words = np.random.SeedSequence([self._seed, epoch, *self._keys[source]])
            order = np.random.Generator(np.random.PCG64(words)).permutation(self._sizes[source])
            self._orders[source] = (epoch, order)
        return self._offsets[source] + int(self._orders[source][1][position])


def _whole(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of the weights as they are written: 0.7 and 0.3 are 7 and 3."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    return [int(weight * scale) for weight in exact]


def _turns(shares: Sequence[int], start: int, stop: int) -> list[tuple[int, int]]:
    """Whose turn it is at positions `start` to `stop` of a mix: (source, how many turns it had before).

    With shares s of a total S, turn k of a source is due at time (k + 1/2) * S / s, and turns are taken in the order in
    which they are due. Until time t a source has had its t * s / S turns to within a half, so that all sources together
    had t to within half their number: the turns wanted are found in a window of time, without counting from 0. After
    every S positions each source has had exactly s turns.
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
    """How many turns of a source are due before a time: the k with (k + 1/2) * total / share < time."""
    return max(0, -((total - 2 * time * share) // (2 * total)))


def eval_batches(
    num_samples: int, *, micro_batch_size: int, rank: int, ranks: int, max_samples: int | None = None
) -> list[list[int]]:
    """This rank's share of an evaluation: every sample once over all ranks, the same number of batches on each.

    The last batches may be shorter, and empty on ranks that have run out: they must go through a forward all the same,
    which under ZeRO-3 is collective (take any sample, with all labels masked). `max_samples` takes samples at even
    distances, since files are often sorted.
    """
    count = num_samples if max_samples is None else min(num_samples, max_samples)
    chosen = [index * num_samples // count for index in range(count)]
    return deal(chosen, micro_batch_size=micro_batch_size, rank=rank, ranks=ranks)


def deal(samples: Sequence[int], *, micro_batch_size: int, rank: int, ranks: int) -> list[list[int]]:
    """This rank's micro-batches of `samples`; the last may be shorter, or empty so that all ranks have as many."""
    batches = [list(samples[start : start + micro_batch_size]) for start in range(0, len(samples), micro_batch_size)]
    batches += [[]] * (-len(batches) % ranks)
    return batches[rank::ranks]


def collate(
    samples: Sequence[Mapping[str, Sequence[int]]], *, pad_id: int, pad_to: int | None = None, flat: bool = False
) -> dict[str, torch.Tensor]:
    """Samples of {input_ids, labels} as one batch, padded on the right; tensors are int64 [samples, longest].

    The length is that of the longest sample, rounded up to a multiple of `pad_to` where it is given. Labels are -100 on
    padding. Whole samples come with an attention_mask. Packed rows, which have `seq_lengths`, come with position_ids
    instead, which start from 0 in every sample of a row: given these and no mask, transformers' models let each sample
    attend to itself alone. All their padding has position 0, so that each padding token is apart as well.

    `flat` puts packed rows one after another into a single row, without padding: flash attention tells samples apart by
    their positions in a batch of one only.
    """
    packed = "seq_lengths" in samples[0]
    if packed and flat:
        samples = [{name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}]
    longest = max(len(sample["input_ids"]) for sample in samples)
    shape = (len(samples), -(-longest // (pad_to or 1)) * (pad_to or 1))
    places = "position_ids" if packed else "attention_mask"
    batch = {
        "input_ids": torch.full(shape, pad_id),
        places: torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED),
    }
    for index, sample in enumerate(samples):
        size = len(sample["input_ids"])
        batch["input_ids"][index, :size] = torch.tensor(sample["input_ids"])
        batch["labels"][index, :size] = torch.tensor(sample["labels"])
        batch[places][index, :size] = torch.cat([torch.arange(n) for n in sample["seq_lengths"]]) if packed else 1
    return batch


def count_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Tokens of a batch from `collate` that are not padding. Reads values, as `count_targets` does."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    # A sample has two tokens at least, or it would have no target: one at position 0 for each at position 1.
    positions = batch["position_ids"]
    return int((positions > 0).sum() + (positions == 1).sum())


def count_targets(labels: torch.Tensor) -> int:
    """Target tokens in labels [samples, length]; the first position is predicted by nothing and does not count.

    Reads the tensor's value: call it on the host, before the batch goes to the device.
    """
    return int((labels[:, 1:] != IGNORED).sum())
