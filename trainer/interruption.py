"""SIGTERM and SIGUSR1, by which schedulers announce a time limit or preemption.

While a run has nothing to lose they end it at once; from its first step on they are remembered until a step is over.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h: the same command goes on where this one stopped.
EXIT_INTERRUPTED = 75


class Interrupted(RuntimeError):
    """A rank was told to stop; raised on all ranks, at the same point."""


class Interruption:
    """Whether this process was told to stop. Schedulers tell one process or all: ranks must ask each other."""

    def __init__(self) -> None:
        self.received = False
        self._patient = False

    def anywhere(self, device: torch.device) -> bool:
        """Whether any rank was. Collective."""
        import torch  # not before signals are listened to: importing it takes seconds
        from deepspeed import comm as dist

        told = torch.tensor(int(self.received), device=device)
        dist.all_reduce(told)
        return bool(told)

    def check(self, device: torch.device) -> None:
        """Raise `Interrupted` on all ranks if any was told to stop. Collective."""
        if self.anywhere(device):
            raise Interrupted

    def remember(self) -> None:
        """From here on a signal is remembered, and somebody asks for it."""
        self._patient = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While inside, signals do not kill the process: they end it with `EXIT_INTERRUPTED`, at once before
        `remember` was called."""

        def told(number: int, frame: FrameType | None) -> None:
            self.received = True
            if not self._patient:
                raise SystemExit(EXIT_INTERRUPTED)

        before = {number: signal.signal(number, told) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
