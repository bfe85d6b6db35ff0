"""Work on the pieces of a long input with several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from typing import Any, TypeVar

from trainer.data.errors import DataError

Piece = TypeVar("Piece")
Made = TypeVar("Made")

# Fewer pieces are not worth starting processes for.
_MOST_IN_PROCESS = 8
# Pieces for each process that are under way or done: enough to keep it busy while a result is taken, and no more, since
# they take memory.
_AHEAD = 3
_THREADS = "TOKENIZERS_PARALLELISM"


def in_order(work: Callable[[Piece], Made], pieces: Iterable[Piece], *, processes: int) -> Generator[Made, None, None]:
    """Yield `work(piece)` for each piece, in order, from up to so many processes. A few pieces are done in this one.

    Processes are forks, which inherit `work`; pieces and results are pickled. Pieces are taken from the iterable as
    they are needed. Raises `DataError` if a process was killed.
    """
    pieces = iter(pieces)
    first = list(islice(pieces, _MOST_IN_PROCESS + 1))
    # Processes that multiprocessing calls daemons may not have children.
    alone = processes < 2 or multiprocessing.current_process().daemon
    if alone or len(first) <= _MOST_IN_PROCESS or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, chain(first, pieces))
        return
    with _one_core_each(), ExitStack() as ended:
        yield work(first.pop(0))  # what it imports and compiles is there for all forks
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(work,))
        ended.callback(pool.shutdown, cancel_futures=True)
        waiting: deque[Future[Any]] = deque()
        try:
            for piece in chain(first, pieces):
                waiting.append(pool.submit(_run, piece))
                if len(waiting) >= _AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                [
                    "data: a process that tokenises was killed, perhaps for lack of memory; free memory, or use fewer "
                    "cores (taskset)"
                ]
            ) from error


@contextmanager
def _one_core_each() -> Iterator[None]:
    """Keep tokenizers from starting threads, of which there would be as many in every process as there are cores.
    Nor may they have started before a fork."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


_work: Callable[[Any], Any]


def _begin(work: Callable[[Any], Any]) -> None:
    """Set up a process: it has inherited this one's signal handlers, and must not outlive it."""
    global _work
    _work = work
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGUSR1):  # they reach all processes, and the parent ends the others
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the pool ends processes by it
    if torch := sys.modules.get("torch"):  # which processors of images use: a fork has none of its parent's threads
        torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes no queue: the other processes have it open, and would wait for ever. They also hold the
    lock of the cache, which is released when the last of them ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(piece: Any) -> Any:
    return _work(piece)
