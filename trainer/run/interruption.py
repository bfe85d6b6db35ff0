"""Handle SIGTERM and SIGUSR1, by which schedulers announce a time limit or preemption.

Before the first step they end a run at once, for nothing is lost. From then on they are remembered until the current
step is complete.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h: the same command resumes where this one stopped.
EXIT_INTERRUPTED = 75
# How long the main thread may take to exit, and clean up.
_GRACE_SECONDS = 5.0


class Interrupted(RuntimeError):
    """Raised on all ranks, at the same point, after one of them was told to stop."""


class Interruption:
    """Note that this process was told to stop. Schedulers tell one process or all: ranks must ask each other."""

    def __init__(self) -> None:
        self.received = False
        self._patient = False
        self._leaving = False

    def anywhere(self, device: torch.device) -> bool:
        """Return whether any rank was told to stop. Collective."""
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
        """Remember signals from here on: the caller asks for them by `check` or `anywhere`."""
        self._patient = True

    def ignore(self) -> None:
        """Ignore signals from here on: this process is about to exit, and may have to print why first."""
        self._leaving = True

    @contextmanager
    def listening(self, leave: Callable[[int], object] = os._exit) -> Iterator[None]:
        """Handle signals within a `with` block, instead of being killed by them: before `remember` is called they end
        the process at once, with `EXIT_INTERRUPTED`.

        The main thread raises `SystemExit`. If it cannot, because it waits in a collective, `leave` is called with the
        exit code, in another thread.
        """

        ending = False

        def told(number: int, frame: FrameType | None) -> None:
            nonlocal ending
            self.received = True
            # Once: a launcher forwards the signal it received, and a second one would interrupt the cleaning up.
            if not self._patient and not self._leaving and not ending:
                ending = True
                raise SystemExit(EXIT_INTERRUPTED)

        before = {number: signal.signal(number, told) for number in SIGNALS}
        heard, hears = socket.socketpair()
        hears.setblocking(False)
        earlier = signal.set_wakeup_fd(hears.fileno(), warn_on_full_buffer=False)
        left = threading.Event()
        threading.Thread(target=self._insist, args=(heard, left, leave), name="signals", daemon=True).start()
        try:
            yield
        finally:
            left.set()
            signal.set_wakeup_fd(earlier)
            hears.close()  # ends the thread
            for number, handler in before.items():
                signal.signal(number, handler)

    def _insist(self, heard: socket.socket, left: threading.Event, leave: Callable[[int], object]) -> None:
        """End the process if the main thread does not: Python runs signal handlers there, and only between its own
        instructions, while the system's handler writes into this socket at once."""
        with heard:
            while number := heard.recv(1):
                at_once = number[0] in SIGNALS and not self._patient and not self._leaving
                if at_once and not left.wait(_GRACE_SECONDS):
                    leave(EXIT_INTERRUPTED)
