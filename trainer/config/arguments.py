"""Code shared by the argparse command lines: how they refuse, and types of arguments."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from trainer.config.text import has_control_characters, in_short, printable, quoted, whole_number


class Parser(argparse.ArgumentParser):
    """Refuses on stderr with exit code 2, as the other commands do, and escapes what it quotes."""

    def error(self, message: str) -> NoReturn:
        print(f"\n{printable(in_short(message, 2000))}\n\n{self.format_usage()}", file=sys.stderr)
        sys.exit(2)


def count(text: str) -> int:
    """Read an integer of at least 1, in digits. Raises `ArgumentTypeError`."""
    number = whole_number(text)
    if not number:
        raise argparse.ArgumentTypeError(f"got {quoted(text)}; allowed: integer >= 1")
    return number


def one_line(text: str) -> str:
    """Return a value for another program: text on one line. Raises `ArgumentTypeError`."""
    if not text or has_control_characters(text):
        raise argparse.ArgumentTypeError(f"got {quoted(text)}; allowed: text without control characters (line ends)")
    return text
