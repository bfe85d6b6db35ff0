"""trainer/export/sparse_delta.py: indices and values through a file and onto the base, and what does not fit it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.export.shards import ExportError
from trainer.export.sparse_delta import pack, put


def test_a_delta_through_a_file_onto_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        base = {"a": torch.randn(3, 5).to(dtype), "b": torch.randn(7).to(dtype), "c": torch.randn(2).to(dtype)}
        trained = {name: weights.clone() for name, weights in base.items()}
        unmasked = {"a": torch.tensor([14, 0, 6]), "b": torch.tensor([], dtype=torch.int64)}
        trained["a"].view(-1)[unmasked["a"]] += 1
        tensors: dict[str, torch.Tensor] = {}
        for name, indices in unmasked.items():
            tensors |= pack(name, indices=indices, weight=trained[name].view(-1)[indices])
        assert sum(t.numel() for t in tensors.values()) == 2 * 3
        save_file(tensors, tmp_path / "delta.safetensors")
        read = load_file(tmp_path / "delta.safetensors")
        for name in unmasked:
            before = base[name].clone()
            assert torch.equal(put(name, base[name], read), trained[name])
            assert torch.equal(base[name], before)


def test_what_does_not_fit_the_base() -> None:
    weights = torch.arange(6.0).view(2, 3)
    good = pack("a", indices=torch.tensor([1, 4]), weight=torch.tensor([7.0, 8.0]))
    for changed, message in (
        ({"indices:a": torch.tensor([1, 6])}, "indices run from 1 to 6; the base has 6 weights there"),
        ({"indices:a": torch.tensor([-1, 4])}, "indices run from -1 to 4"),
        ({"indices:a": torch.tensor([4, 4])}, "from 4 to 4 and are not ascending"),
        ({"indices:a": torch.tensor([4])}, r"\(1,\) indices of torch.int64 and \(2,\) values"),
        ({"indices:a": torch.tensor([1, 4], dtype=torch.int32)}, "indices of torch.int32"),
        ({"values:a": good["values:a"].half()}, "values are torch.float16, but the base's weights torch.float32"),
    ):
        with pytest.raises(ExportError, match=f"^a: .*{message}"):
            put("a", weights, good | changed)
    with pytest.raises(ExportError, match="^a: the delta has no values:a"):
        put("a", weights, {"indices:a": good["indices:a"]})
