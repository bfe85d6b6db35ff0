"""Silence what libraries print for their own developers."""

from __future__ import annotations

import logging
import warnings

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Keep DeepSpeed's remarks and transformers' progress bars out of a command's output. Downloads keep theirs."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    downloads_are_shown = not are_progress_bars_disabled()
    with warnings.catch_warnings(action="ignore"):  # that an environment variable controls downloads
        transformers_logging.disable_progress_bar()  # which hides downloads as well
        if downloads_are_shown:
            enable_progress_bars()
