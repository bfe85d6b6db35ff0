"""One answer for all ranks: what rank 0 finds, or why it could not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed import comm as dist

from trainer.checkpoint.store import CheckpointError


def told_by_rank_0(look: Callable[[], Any]) -> Any:
    """What `look` returns on rank 0, on all ranks. Its `CheckpointError` or `OSError` is raised on all. Collective."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told = [look(), None]
        except (CheckpointError, OSError) as error:
            told = [None, error]
    torch.distributed.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]
