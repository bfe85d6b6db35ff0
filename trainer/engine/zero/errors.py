"""The error for engines that cannot be switched."""

from __future__ import annotations

from trainer.errors import StrataError


class RegistrationError(StrataError, RuntimeError):
    """This DeepSpeed engine cannot be switched; the message says what to change."""
