"""Show how far tokenising is: a bar on a terminal, and else a line now and then."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from trainer.config.text import printable

_LINE_SECONDS = 10.0


class RowProgress:
    """Count rows of a source on stderr, with rows per second and the time left. Short work prints no line."""

    def __init__(self, path: str) -> None:
        self._path = printable(path)
        self._started = self._last_line = time.monotonic()
        self._rows = 0
        self._bar = (
            tqdm(desc=f"tokenising {self._path}", unit=" rows", dynamic_ncols=True, leave=False, delay=0.5)
            if sys.stderr.isatty()
            else None
        )

    def add(self, rows: int, share: float) -> None:
        """Count rows that are done; `share` of the source has been read, a number up to 1."""
        self._rows += rows
        if self._bar is not None:
            self._bar.total = max(self._rows, round(self._rows / share)) if share > 0 else None
            self._bar.update(rows)
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            seconds = now - self._started
            line = f"tokenising {self._path}: {self._rows:,} rows, {self._rows / seconds:,.0f} rows/s"
            if share > 0:
                line += f", {seconds * max(0.0, 1 - share) / share:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
