"""How a benchmark was called, for the file of its results."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

# Where results and data lay, and what a launcher adds, says nothing about them.
LEFT_OUT = ("--json", "--save", "--data", "--local_rank")


def command(launcher: str = "python") -> str:
    """The command line of this process, but for options that say nothing about its results."""
    words, skip = [], False
    for word in sys.argv[1:]:
        name = word.partition("=")[0]
        if not skip and name not in LEFT_OUT:
            words.append(word)
        skip = not skip and word in LEFT_OUT
    return shlex.join([launcher, f"benchmarks/{Path(sys.argv[0]).name}", *words])
