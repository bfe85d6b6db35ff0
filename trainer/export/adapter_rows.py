"""Add the rows of new tokens to an adapter in PEFT's format.

LoRA's has a place for rows of single tokens, `trainable_token_indices`. The others have one for whole tables, which
PEFT reads as weights of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.model.adapters import has_token_rows
from trainer.model.blocks import NEW_ROWS
from trainer.model.new_rows import fold

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"


def add_new_rows(model: PeftModel, weights: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Add the new rows among the `weights` of `model`, whole and on the host, to the adapter in `folder`. Returns them
    by the names that they have there."""
    rows = {name: tensor for name, tensor in weights.items() if name.rpartition(".")[2] == NEW_ROWS}
    if not rows:
        return {}
    paths = [name.rpartition(".")[0] for name in rows]
    if has_token_rows(model):
        added = {
            f"{path}.token_adapter.trainable_tokens_delta": rows[f"{path}.{NEW_ROWS}"].contiguous() for path in paths
        }
        config: Any = PeftConfig.from_pretrained(str(folder))
        config.trainable_token_indices = {
            path.removeprefix(_PREFIX): list(range(*_ids(model, path).indices(2**62))) for path in paths
        }
        config.save_pretrained(str(folder))
    else:
        tables = {name: weights[name] for path in paths for name in (f"{path}.{NEW_ROWS}", f"{path}.weight")}
        added = fold(model, tables)
    save_file(load_file(folder / _WEIGHTS) | added, folder / _WEIGHTS, metadata={"format": "pt"})
    return added


def _ids(model: PeftModel, path: str) -> slice:
    module: Any = model.get_submodule(path)
    return module.new_ids
