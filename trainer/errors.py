"""Define the root of all errors that a user can cause and mend, and how every command turns them into a message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class StrataError(Exception):
    """Report a request that cannot be carried out.

    The message names the value received, what is allowed and what to change; commands print it without a traceback.
    Every error class of this package that reaches a user derives from this one.
    """


@contextmanager
def refusals() -> Iterator[list[str]]:
    """Catch errors that a user can mend, and append their message to the list that the context yields.

    These are every `StrataError`, and errors of files and file systems: a full disk, a folder that cannot be written.
    """
    from safetensors import SafetensorError  # imported late: most commands read no weights

    messages: list[str] = []
    try:
        yield messages
    except StrataError as error:
        messages.append(str(error))
    except (OSError, SafetensorError) as error:
        messages.append(f"{type(error).__name__}: {error}")
