"""Figures that are compared with a bar: one that is not a number passes none.

`nan > bar` is False, and `max` drops NaN or not, depending on the order: such comparisons would pass on NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor


def largest(values: Iterable[float]) -> float:
    """The largest of `values`, infinite if any is not a number."""
    return max(math.inf if math.isnan(value) else value for value in values)


def largest_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """max |a - b| over tensors of the same names, infinite if any difference is not a number."""
    assert a.keys() == b.keys()
    return largest(float((a[name].float() - b[name].float()).abs().max()) for name in a)
