"""Read paths on command lines."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.config.text import has_control_characters, quoted


def path_argument(text: str) -> Path:
    """Return the path that `text` means, for argparse. Raises `ArgumentTypeError` if it cannot be a path."""
    if not text or has_control_characters(text):
        raise argparse.ArgumentTypeError(f"got {quoted(text)}; allowed: a path without control characters (line ends)")
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, or the home of an unknown user
        reason = getattr(error, "strerror", None) or error
        short = text if len(text) <= 60 else f"{text[:60]}..."
        raise argparse.ArgumentTypeError(f"got {short!r}: {reason}; allowed: a path") from error
    return path
