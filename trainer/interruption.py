"""SIGTERM and SIGUSR1, by which schedulers announce a time limit or preemption: remembered until a step is over."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from deepspeed import comm as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h: the same command goes on where this one stopped.
EXIT_INTERRUPTED = 75


class Interruption:
    """Whether this process was told to stop. Schedulers tell one process or all: ranks must ask each other."""

    def __init__(self) -> None:
        self.received = False

    def anywhere(self, device: torch.device) -> bool:
        """Whether any rank was. Collective."""
        told = torch.tensor(int(self.received), device=device)
        dist.all_reduce(told)
        return bool(told)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While inside, the signals are remembered instead of ending the process."""

        def remember(number: int, frame: FrameType | None) -> None:
            self.received = True

        before = {number: signal.signal(number, remember) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
