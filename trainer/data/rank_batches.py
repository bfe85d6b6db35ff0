"""Make padded batches from samples, on the host and for one rank."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from deepspeed import comm as dist

from trainer.config import ConfigError, RunConfig
from trainer.data.batches import SampleOrder, collate, deal, eval_batches
from trainer.data.pictures import Pictures
from trainer.data.stream import Streams
from trainer.data.tokenised import TokenisedData
from trainer.selectors import MeasuringSelector

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class ProbeBatches(Iterator[list[dict[str, torch.Tensor]]]):
    """Yield the batches of one probe after another, endlessly. `go_to` skips probes without making their batches."""

    def __init__(self, batches: Callable[[int], list[dict[str, torch.Tensor]]]) -> None:
        self._batches = batches
        self._number = 0

    def __next__(self) -> list[dict[str, torch.Tensor]]:
        self._number += 1
        return self._batches(self._number - 1)

    def go_to(self, number: int) -> None:
        self._number = number


class RankBatches:
    """Make this rank's batches of training (by index), of evaluation and of probes."""

    def __init__(
        self, config: RunConfig, data: TokenisedData, *, pad_id: int, flat: bool, pictures: Pictures | None = None
    ) -> None:
        """`pictures` makes the pixels, if the data has images."""
        self._config = config
        self._data = data
        self._collate = partial(collate, pad_id=pad_id, flat=flat)
        self._pictures = pictures if data.has_images else None
        self._this_rank = {"rank": dist.get_rank(), "ranks": dist.get_world_size()}

    @property
    def has_evaluation(self) -> bool:
        return self._data.eval is not None

    def micro_batches(self, chosen: list[list[Any]]) -> list[dict[str, torch.Tensor]]:
        """Return the batches of samples that `Order.choose` has chosen, or of their indices."""
        if self._data.streams is not None:
            return list(map(self._collate, chosen))
        return [self._batch(self._data.train, indices) for indices in chosen]

    def eval_batches(self) -> list[dict[str, torch.Tensor]]:
        assert self._data.eval is not None
        dealt = eval_batches(
            len(self._data.eval),
            micro_batch_size=self._eval_size,
            max_samples=self._config.eval.max_samples,
            **self._this_rank,
        )
        return self._batches_of(self._data.eval, dealt)

    def probe_batches(self) -> ProbeBatches:
        """Return the batches of all probes. Their order is independent of training's and passes over all the data."""
        selector = self._config.selector
        if not isinstance(selector, MeasuringSelector):
            raise ConfigError(
                [
                    f"selector.name: {selector.name} measures, but its class {type(selector).__name__} does not say "
                    "what its probes look at; derive it from trainer.selectors.MeasuringSelector"
                ]
            )
        probe = selector.probe
        held_out = probe.data == "eval"
        if self._data.streams is not None and not held_out:
            return ProbeBatches(partial(self._streamed_probe, self._data.streams, probe.batch_size))
        samples: Any = self._data.eval if held_out else self._data.train
        size = min(probe.batch_size, len(samples))
        # Seeds of training are below 2**63, so no probe has the order of training.
        order = SampleOrder(
            [len(samples)] if held_out else self._data.sizes,
            weights=None if held_out else self._data.weights,
            seed=self._config.seed + 2**63,
            global_batch_size=size,
            micro_batch_size=size,
            rank=0,
            ranks=1,
        )

        def batches(number: int) -> list[dict[str, torch.Tensor]]:
            dealt = deal(order.indices(number)[0], micro_batch_size=self._probe_share(size), **self._this_rank)
            return self._batches_of(samples, dealt)

        return ProbeBatches(batches)

    def _streamed_probe(self, streams: Streams, size: int, number: int) -> list[dict[str, torch.Tensor]]:
        """Return the batches of a probe, whose samples begin an epoch of streams in an order that is not training's."""
        probe = streams.another(self._config.seed + 2**63, shuffle_rows=size, epoch=number)
        samples = probe.samples(number * size, size)
        dealt = deal(range(size), micro_batch_size=self._probe_share(size), **self._this_rank)
        return self._batches_of(samples, dealt)

    def _probe_share(self, size: int) -> int:
        """Return the micro-batch size of a probe. It has few sequences: with micro-batches as large as an evaluation's,
        some ranks would get none."""
        return min(self._eval_size, -(-size // self._this_rank["ranks"]))

    @property
    def _eval_size(self) -> int:
        return self._config.eval.micro_batch_size or self._config.train.micro_batch_size

    def _batches_of(self, samples: Any, dealt: list[list[int]]) -> list[dict[str, torch.Tensor]]:
        batches = []
        for chosen in dealt:
            # A rank without samples must run the forward, too: under ZeRO-3 it is collective.
            batch = self._batch(samples, chosen or [0])
            if not chosen:
                batch["labels"].fill_(-100)
            batches.append(batch)
        return batches

    def _batch(self, samples: Any, chosen: list[int]) -> dict[str, torch.Tensor]:
        found = [samples[i] for i in chosen]
        if self._pictures is None:
            return self._collate(found)
        parts = self._data.train_parts if samples is self._data.train else self._data.eval_parts
        ends = list(accumulate(len(part.samples) for part in parts))
        places = [parts[bisect_right(ends, index)].places for index in chosen]
        dtype = getattr(torch, _DTYPES[self._config.model.dtype])
        return self._pictures.add(found, places, self._collate, dtype=dtype)
