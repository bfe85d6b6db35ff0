"""Compute fingerprints of tensors, whole and in parts."""

from __future__ import annotations

import torch

from trainer.checkpoint.fingerprint import Fingerprint


def test_fingerprints_do_not_depend_on_how_a_tensor_is_cut() -> None:
    weights = torch.randn(1000, dtype=torch.bfloat16)
    whole, parts = Fingerprint(), Fingerprint()
    whole.add("x", weights)
    for start in (700, 0, 300):
        parts.add("x", weights[start : {0: 300, 300: 700, 700: 1000}[start]], start)
    other = Fingerprint()
    other.add("y", weights)
    assert str(whole) == str(parts) != str(other) and len(str(whole)) == 16
