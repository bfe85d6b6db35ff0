"""DataError, and how the messages of others are quoted in it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


class DataError(ValueError):
    """Data that cannot be trained on. `problems` holds one line each, with file and line or the key to change."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def in_short(error: BaseException) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, width=300, placeholder=" ...")
