"""Define `DataError`, collect rows that cannot be used, and shorten the messages of other libraries."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from trainer.errors import StrataError

MAX_PROBLEMS = 10  # one broken line is often one of thousands


class DataError(StrataError, ValueError):
    """Report data that cannot be trained on: one line for each of `problems`, with file and line or key to change."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)

    def __reduce__(self) -> tuple[type[DataError], tuple[list[str]]]:
        return type(self), (self.problems,)  # processes that tokenise send it


class BadRows:
    """Collect the rows of a source that cannot be used: `count` them, and keep what is wrong with the first ten.

    With `drop` they are left out, unless they are more than the others. Otherwise the tenth ends the reading, and
    `check` raises for fewer, with `advice` as a last line.
    """

    def __init__(self, path: str, *, drop: bool = False, advice: str = "") -> None:
        self._path, self._drop = path, drop
        self._advice = [advice] if advice else []
        self.count = 0
        self._first: list[tuple[str, str]] = []

    @property
    def first(self) -> list[str]:
        """Return where the first ten are, and what is wrong with them: places of a stream are costly to write out."""
        return [f"{where}: {problem}" for where, problem in self._first]

    def add(self, where: str, problem: object) -> None:
        """Record a row and what is wrong with it. Raises `DataError` at the tenth, unless they are dropped."""
        self.count += 1
        if len(self._first) < MAX_PROBLEMS:
            self._first.append((where, str(problem)))
        if len(self._first) == MAX_PROBLEMS and not self._drop:
            raise DataError([*self.first, f"{self._path}: stopped after {MAX_PROBLEMS} problems", *self._advice])

    def add_all(self, later: BadRows) -> None:
        """Add the rows that another one has collected from the rows after those of `self`."""
        for where, problem in later._first:
            self.add(where, problem)
        self.count += later.count - len(later._first)

    def check(self, num_used: int) -> None:
        """Raise `DataError` if there is any, unless they are dropped and not more than the `num_used` others."""
        if self._first and not self._drop:
            raise DataError([*self.first, *self._advice])
        if self.count > num_used > 0:
            raise DataError(
                [
                    *self.first,
                    f"{self._path}: {self.count} rows cannot be used, more than the {num_used} that can; "
                    "data.on_bad_row=drop is for a few: mend the file, or state its format",
                ]
            )


def in_short(error: BaseException) -> str:
    """Return the message of an error, or its type if it has none, as one line of at most 300 characters."""
    return textwrap.shorten(str(error) or type(error).__name__, width=300, placeholder=" ...")
