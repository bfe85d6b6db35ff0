"""Define `DataError`, and shorten the messages of other libraries for it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from trainer.errors import StrataError


class DataError(StrataError, ValueError):
    """Report data that cannot be trained on: one line for each of `problems`, with file and line or key to change."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def in_short(error: BaseException) -> str:
    """Return the message of an error, or its type if it has none, as one line of at most 300 characters."""
    return textwrap.shorten(str(error) or type(error).__name__, width=300, placeholder=" ...")
