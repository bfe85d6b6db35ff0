"""Strata: layer-wise fine-tuning of large language models on DeepSpeed.

`prepare` and `Sparse` are imported on first use, so that `import trainer` alone stays free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.api import prepare
    from trainer.engine.sparse import Sparse

__version__ = "0.1.0"

_PUBLIC = {"prepare": "trainer.api", "Sparse": "trainer.engine.sparse"}

__all__ = ["Sparse", "__version__", "prepare"]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
