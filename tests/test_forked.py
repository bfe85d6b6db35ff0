"""The process that forks ranks has nothing that a fork would miss or share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forked


def _state(queue: Any) -> None:
    import torch

    threads = sorted(
        Path(f"/proc/{os.getppid()}/task/{task}/comm").read_text().strip()
        for task in os.listdir(f"/proc/{os.getppid()}/task")
    )
    in_use = torch.distributed.is_initialized() or torch.cuda.is_initialized()
    queue.put((threads, "trainer.train" in sys.modules, in_use))


@pytest.mark.slow
def test_the_process_that_forks_has_one_thread_and_has_imported_everything() -> None:
    context = forked.context()
    queue = context.SimpleQueue()
    process = context.Process(target=_state, args=(queue,))
    process.start()
    threads, imported, in_use = queue.get()
    process.join()
    assert len(threads) == 1, threads
    assert imported and not in_use
