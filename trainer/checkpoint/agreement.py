"""Make all ranks agree on what rank 0 found, and on whether every rank succeeded.

If one rank alone raised an exception, the others would wait for it in the next collective.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from deepspeed import comm as dist

Result = TypeVar("Result")


def ask_rank_0(look: Callable[[], Any]) -> Any:
    """Return on all ranks what `look` returns on rank 0, or raise on all ranks what it raises there. Collective."""
    message: list[Any] = [None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            message = [pickle.dumps((look(), None))]
        except Exception as error:
            failure = error
            message = [pickle.dumps((None, portable(error)))]
    torch.distributed.broadcast_object_list(message)
    answer, raised = pickle.loads(message[0])
    if raised is not None:
        raise failure or raised
    return answer


def agreed(work: Callable[[], Result]) -> Result:
    """Return what `work` returns on this rank; if it raises on any rank, raise on all ranks.

    A rank without an error of its own raises the error of the lowest rank that failed. Collective; `work` itself must
    not communicate.
    """
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    failures: list[Exception | None] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(failures, None if failure is None else portable(failure))
    if failure is not None:
        raise failure
    for rank, elsewhere in enumerate(failures):
        if elsewhere is not None:
            elsewhere.add_note(f"on rank {rank}")
            raise elsewhere
    return result


def portable(error: Exception) -> Exception:
    """Return `error` if it survives pickling, else an error of its nearest base class that does, with its message."""
    for kind in type(error).__mro__:
        try:
            copy = error if kind is type(error) else kind(_text(error))
            restored = pickle.loads(pickle.dumps(copy))
        except Exception:  # of any kind: an exception class may define how it is pickled
            continue
        if type(restored) is kind and str(restored) == str(copy):
            return copy
    return RuntimeError(_text(error))


def _text(error: Exception) -> str:
    try:
        return str(error) or type(error).__name__
    except Exception:
        return type(error).__name__
