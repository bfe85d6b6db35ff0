"""Compute the order of samples, deal samples to ranks, and collate them to batches.

The order of training samples is a pure function of (seed, step). A checkpoint therefore saves only the step, and the
values by which `SampleOrder.resume` checks that data and settings are still the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trainer.data.order import Order, due_turns, whole_shares

IGNORED = -100  # a label without a target; cross entropy skips it by default


class SampleOrder(Order):
    """Compute the sample indices of every optimizer step.

    `sizes` are the numbers of samples of the sources, which are numbered consecutively. Without `weights` they form one
    pool: the stream of samples is a sequence of permutations of the pool, one per epoch, each drawn from (seed, epoch).
    With `weights`, source i gets its share weights[i] / sum(weights) of every stretch of the stream, as nearly as whole
    samples allow; the samples of a source are permuted as those of the pool are.

    A step may span epochs. Which positions it uses, and what identifies the samples: see `Order`. With an equal
    micro-batch size the micro-batches are the same on any number of ranks, only dealt to others.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        **settings: Any,
    ) -> None:
        """Take `settings` as `Order` does."""
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes are {list(sizes)}; at least one sample is needed, and one in every source")
        if weights is not None and (len(weights) != len(sizes) or min(weights) <= 0):
            raise ValueError(f"weights are {list(weights)}; one above 0 is needed for each of {len(sizes)} sources")
        super().__init__(sizes, seed=seed, weights=weights, **settings)
        self._seed = seed
        # A pool is a mix of one source. Shares are integers, so that no rounding decides the order of turns.
        self._sizes = [sum(sizes)] if weights is None else list(sizes)
        self._shares = whole_shares([1.0] if weights is None else weights)
        self._keys = [[]] if weights is None else [[2 + source] for source in range(len(sizes))]
        self._offsets = np.cumsum([0, *self._sizes]).tolist()
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # source: its latest epoch and the order of that epoch

    def indices(self, step: int) -> list[list[int]]:
        """Return this rank's micro-batches of a step: `accumulation_steps` lists of micro_batch_size indices."""
        return self.choose(step)

    def _of_step(self, first: int) -> list[int]:
        turns = due_turns(self._shares, first, first + self.global_batch_size)
        return [self._sample(*turn) for turn in turns]

    def _sample(self, source: int, number: int) -> int:
        """Return the index of the sample that a source contributes at its turn `number`, counted from 0."""
        epoch, position = divmod(number, self._sizes[source])
        if self._orders.get(source, (None,))[0] != epoch:
            # PCG64 is named, because numpy may change the bit generator of default_rng.
            words = np.random.SeedSequence([self._seed, epoch, *self._keys[source]])
            order = np.random.Generator(np.random.PCG64(words)).permutation(self._sizes[source])
            self._orders[source] = (epoch, order)
        return self._offsets[source] + int(self._orders[source][1][position])


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
