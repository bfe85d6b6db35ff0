"""Deal the samples of a stream to ranks, step after step, and resume where a checkpoint was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.encode import Sample
from trainer.data.errors import DataError
from trainer.data.order import Order
from trainer.data.stream import Streams

_ON_BAD_ROW = "data.on_bad_row"


class StreamOrder(Order):
    """Take the samples of every step from streams. Every rank reads and tokenises all of them, and keeps its own.

    Steps must follow each other; `resume` goes to that of a checkpoint, which records the place of each stream, and
    which keys of messages the chat template has written so far.
    """

    def __init__(self, streams: Streams, **settings: Any) -> None:
        super().__init__([len(source.units) for source in streams.sources], **settings)
        self._streams = streams
        self._step = 0

    def _of_step(self, first: int) -> list[Sample]:
        assert first == self._step * self.global_batch_size, "the steps of a stream must follow each other"
        self._step += 1
        return self._streams.samples(first, self.global_batch_size)

    def state(self, step: int) -> dict[str, Any]:
        assert step == self._step, "the steps of a stream must follow each other"
        return {
            **super().state(step),
            "streams": [stream.state for stream in self._streams.streams],
            "written": [source.keys.written for source in self._streams.sources],
        }

    def _changes_of_data(self, state: Mapping[str, Any]) -> list[str]:
        """A run that bad rows ended may go on without them: none was bad before the checkpoint."""
        before, now = state.get("made_of") or {}, self._made_of
        if (before.get(_ON_BAD_ROW), now.get(_ON_BAD_ROW)) == ("error", "drop"):
            before = {**before, _ON_BAD_ROW: "drop"}
            if before == now:
                return []
        return super()._changes_of_data({**state, "made_of": before})

    def resume(self, state: Mapping[str, Any]) -> int:
        self._step = super().resume(state)
        places, written = state.get("streams"), state.get("written", [])
        if not isinstance(places, list) or len(places) != len(self._streams.streams):
            raise DataError(["data.streaming: the checkpoint does not record where its streams were; start anew"])
        for source, kinds in zip(self._streams.sources, written, strict=False):  # earlier versions recorded none
            source.keys.remember(kinds)
        for stream, place in zip(self._streams.streams, places, strict=True):
            stream.go_to(place)
        return self._step
