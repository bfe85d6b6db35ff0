"""Save checkpoints alongside training, verify them, and load them on any number of ranks.

`Checkpoints`, `Store` and their errors are imported on first use.
"""

from importlib import import_module

_PUBLIC = {"Checkpoints": "checkpoints", "CheckpointError": "store", "LeaseError": "lease", "Store": "store"}
__all__ = list(_PUBLIC)  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
