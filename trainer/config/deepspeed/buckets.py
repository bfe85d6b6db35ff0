"""Derive the sizes of ZeRO's buffers and of prefetching from the model."""

import copy
from collections.abc import Mapping
from typing import Any

from trainer.config.deepspeed.keys import ZERO_ALIASES
from trainer.config.deepspeed.values import AUTO
from trainer.config.errors import ConfigError

_PREFETCH_DEFAULT = 5 * 10**7
_LIVE_DEFAULT = 10**9
_PERSISTENCE_DEFAULT = 10**5
# Keys that `size_buckets` fills; they may be "auto" until then.
SIZED = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
)


def zero_size(ds: Mapping[str, Any], name: str) -> int:
    """Return a size of `zero_optimization` by the name of its field, in either spelling; 0 if it is missing."""
    zero = ds["zero_optimization"]
    return int(zero.get(name, zero.get(ZERO_ALIASES.get(name, name), 0)))


def size_buckets(
    ds: Mapping[str, Any], *, largest_parameter: int, largest_group: int, largest_block: int, hidden: int
) -> dict[str, Any]:
    """Return a copy of `ds` with the buffer and prefetch sizes of its ZeRO stage filled in ("auto" or missing ones).

    All sizes count elements, not bytes. largest_parameter: the largest that may train. largest_group: the largest group
    of the optimizer. largest_block: the largest block, with parameters that never train. hidden: the model's hidden
    size. A value in `ds` is kept. Raises ConfigError for a sub_group_size below largest_group on stage 3.
    """
    given = (largest_parameter, largest_group, largest_block, hidden)
    assert min(given) >= 1, given
    sized = copy.deepcopy(dict(ds))
    zero = sized["zero_optimization"]
    # The spelling of each key: the one in `ds`, else the documented one.
    spelled = {name: name if name in zero else ZERO_ALIASES.get(name, name) for name in SIZED}
    sizes = _sizes(zero["stage"], *given)
    for name, key in spelled.items():
        if zero.get(key, AUTO) == AUTO:
            zero.pop(key, None)
            if name in sizes:
                zero[key] = sizes[name]
    # Else a group's state is split over several flat partitions, which banks cannot address.
    if zero["stage"] == 3 and (limit := zero[spelled["sub_group_size"]]) < largest_group:
        problem = (
            f"deepspeed: zero_optimization.sub_group_size is {limit} but the largest group of parameters has "
            f'{largest_group} elements and must fit in one; raise it, or write "auto"'
        )
        raise ConfigError([problem])
    return sized


def _sizes(stage: int, largest_parameter: int, largest_group: int, largest_block: int, hidden: int) -> dict[str, int]:
    if stage == 0:
        return {}
    # Every rank allocates a buffer of this many elements (two on stages 1 and 2 with overlap_comm). DeepSpeed's 5e8 is
    # a gigabyte in bf16 for any model. A smaller one would also be correct, but a gradient that does not fit is reduced
    # outside of it, in memory that every backward allocates anew.
    sizes = {"reduce_bucket_size": largest_parameter}
    if stage < 3:
        # Only backends without all_gather_into_tensor gather in pieces of this size. DeepSpeed asserts that it is even.
        return sizes | {"allgather_bucket_size": largest_parameter + largest_parameter % 2}
    fetched = max(largest_group, largest_block)  # at a time
    return sizes | {
        # The limit of one sub-group. It reserves no memory, so it is DeepSpeed's own unless a group is larger.
        "sub_group_size": max(_LIVE_DEFAULT, largest_group),
        # Gathered ahead of use, at each module: at most one block, else a small model would be gathered whole.
        "prefetch_bucket_size": min(_PREFETCH_DEFAULT, fetched),
        # Norms and biases (a few times `hidden`) stay whole on every rank: gathering them costs latency, saves little.
        # The last bound keeps hidden x hidden matrices partitioned in models of ten columns or fewer.
        "param_persistence_threshold": min(_PERSISTENCE_DEFAULT, 10 * hidden, max(hidden, hidden * hidden - 1)),
        # Prefetching stops at this many gathered elements: a block in use, the next one, and one large matrix (the
        # head). DeepSpeed's 1e9 would let it run ahead through the whole of a small model.
        "max_live_parameters": min(_LIVE_DEFAULT, 2 * fetched + largest_parameter),
        # Weights that are used again within this distance are not released: the last block between forward and
        # backward, and with activation checkpointing each block between its recomputation and its backward. At 1e9
        # nothing of a small model is ever released.
        "max_reuse_distance": min(_LIVE_DEFAULT, fetched),
    }
