"""Samples to padded batches on the host, for one rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist

from trainer.config import RunConfig
from trainer.data import Prepared
from trainer.data.batches import Batches, collate, deal, eval_batches


class Feed:
    """This rank's batches of training (by index), evaluation and probes."""

    def __init__(self, config: RunConfig, data: Prepared, *, pad_id: int, flat: bool) -> None:
        self._config = config
        self._data = data
        self._collate = partial(collate, pad_id=pad_id, flat=flat)
        self._place = {"rank": dist.get_rank(), "ranks": dist.get_world_size()}

    @property
    def has_evaluation(self) -> bool:
        return self._data.eval is not None

    def micro_batches(self, indices: list[list[int]]) -> list[dict[str, torch.Tensor]]:
        return [self._collate([self._data.train[i] for i in chosen]) for chosen in indices]

    def eval_batches(self) -> list[dict[str, torch.Tensor]]:
        assert self._data.eval is not None
        dealt = eval_batches(
            len(self._data.eval),
            micro_batch_size=self._eval_size,
            max_samples=self._config.eval.max_samples,
            **self._place,
        )
        return self._batches_of(self._data.eval, dealt)

    def probe_batches(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        """For each probe its sequences, in an order of their own: one pass over the data after another."""
        probe = self._config.selector.probe
        held_out = probe.data == "eval"
        samples = self._data.eval if held_out else self._data.train
        size = min(probe.batch_size, len(samples))
        # Seeds of training are below 2**63.
        order = Batches(
            [len(samples)] if held_out else self._data.sizes,
            weights=None if held_out else self._data.weights,
            seed=self._config.seed + 2**63,
            global_batch_size=size,
            micro_batch_size=size,
            rank=0,
            ranks=1,
        )
        # A few sequences: in micro-batches as large as an evaluation's, some ranks would get none.
        share = min(self._eval_size, -(-size // self._place["ranks"]))
        for number in itertools.count():
            dealt = deal(order.indices(number)[0], micro_batch_size=share, **self._place)
            yield self._batches_of(samples, dealt)

    @property
    def _eval_size(self) -> int:
        return self._config.eval.micro_batch_size or self._config.train.micro_batch_size

    def _batches_of(self, samples: Any, dealt: list[list[int]]) -> list[dict[str, torch.Tensor]]:
        batches = []
        for chosen in dealt:
            # A rank without samples left goes through the forward all the same: under ZeRO-3 it is collective.
            batch = self._collate([samples[i] for i in chosen or [0]])
            if not chosen:
                batch["labels"].fill_(-100)
            batches.append(batch)
        return batches
