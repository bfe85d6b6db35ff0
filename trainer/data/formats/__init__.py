"""Register the formats of rows: each is a file with a `FORMAT`, and a name in `trainer.config.sources.FORMATS`."""

from importlib import import_module

from trainer.config.sources import FORMATS as _NAMES
from trainer.data.formats.base import Format

FORMATS: dict[str, Format] = {name: import_module(f"{__name__}.{name}").FORMAT for name in _NAMES}
