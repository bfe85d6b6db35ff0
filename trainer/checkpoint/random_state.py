"""Save and restore the random number generators of a process as tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """Return the states of torch (CPU and GPU), Python and NumPy in this process."""
    kind, internal, gauss = random.getstate()
    # NumPy's annotation says a dictionary, which it returns for legacy=False.
    _, keys, position, has_gauss, cached = cast(tuple[str, Any, int, int, float], np.random.get_state())
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([kind, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        state["accelerator"] = accelerator.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, *internal = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((kind, tuple(internal), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(state["numpy_gauss"][0]))
    )
    if "accelerator" in state:
        get_accelerator().set_rng_state(state["accelerator"])
