"""The order of samples and the batches made of them.

The order of training samples is a pure function of (seed, step), so a checkpoint needs to save nothing but the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

IGNORED = -100  # a label without a target; cross entropy skips it by default


class Batches:
    """The sample indices of every optimizer step.

    The stream of samples is one permutation per epoch after another, each drawn from (seed, epoch); step s takes
    positions s * global_batch_size up to (s + 1) * global_batch_size, across the border of epochs where they fall so.
    Neither the number of ranks nor the micro-batch size changes what a step sees, and with equal micro-batch size the
    micro-batches themselves are the same, only dealt to other ranks.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        ranks: int,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; at least one sample is needed")
        if global_batch_size < 1 or global_batch_size % (micro_batch_size * ranks):
            raise ValueError(
                f"train.global_batch_size: {global_batch_size} is no multiple of train.micro_batch_size x ranks = "
                f"{micro_batch_size} x {ranks}"
            )
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank}; allowed: 0 to {ranks - 1}")
        self.num_samples = num_samples
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.ranks = ranks
        self.accumulation_steps = global_batch_size // (micro_batch_size * ranks)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> list[list[int]]:
        """This rank's micro-batches of an optimizer step: accumulation_steps lists of micro_batch_size indices."""
        positions = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        samples = np.empty_like(positions)
        for epoch in np.unique(positions // self.num_samples).tolist():
            within = positions // self.num_samples == epoch
            samples[within] = self._permutation(epoch)[positions[within] % self.num_samples]
        dealt = samples.reshape(self.accumulation_steps, self.ranks, self.micro_batch_size)
        return dealt[:, self.rank].tolist()

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            # The bit generator is named, because default_rng may change what it stands for.
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            self._order, self._epoch = generator.permutation(self.num_samples), epoch
        return self._order


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
    batches = [chosen[start : start + micro_batch_size] for start in range(0, count, micro_batch_size)]
    batches += [[]] * (-len(batches) % ranks)
    return batches[rank::ranks]


def collate(
    samples: Sequence[Mapping[str, Sequence[int]]], *, pad_id: int, pad_to: int | None = None
) -> dict[str, torch.Tensor]:
    """Pads samples of {input_ids, labels} on the right: input_ids, attention_mask, labels, int64 [samples, longest].

    The length is that of the longest sample, rounded up to a multiple of `pad_to` where it is given. Labels are -100 on
    padding.
    """
    longest = max(len(sample["input_ids"]) for sample in samples)
    length = -(-longest // (pad_to or 1)) * (pad_to or 1)
    batch = {
        "input_ids": torch.full((len(samples), length), pad_id),
        "attention_mask": torch.zeros((len(samples), length), dtype=torch.int64),
        "labels": torch.full((len(samples), length), IGNORED),
    }
    for index, sample in enumerate(samples):
        size = len(sample["input_ids"])
        batch["input_ids"][index, :size] = torch.tensor(sample["input_ids"])
        batch["attention_mask"][index, :size] = 1
        batch["labels"][index, :size] = torch.tensor(sample["labels"])
    return batch


def count_targets(labels: torch.Tensor) -> int:
    """Target tokens in labels [samples, length]; the first position is predicted by nothing and does not count.

    Reads the tensor's value: call it on the host, before the batch goes to the device.
    """
    return int((labels[:, 1:] != IGNORED).sum())
