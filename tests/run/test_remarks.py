"""trainer/run/remarks.py: the first line of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.launching import write_inputs
from trainer.config import load
from trainer.config.deepspeed.resolve import resolve
from trainer.data.tokenizer import load_run_tokenizer
from trainer.run.remarks import title
from trainer.run.setup import build_model


@pytest.mark.parametrize(
    ("values", "ranks", "expected"),
    [
        ([], 2, "lisa on a random llama (53,856 parameters, fp32), 2 ranks, ZeRO stage 3"),
        (["bank.name=cpu"], 1, "lisa with bank cpu on a random llama (53,856 parameters, fp32), 1 rank, ZeRO stage 3"),
        (
            ["method=null", "selector.name=cyclic", "deepspeed=zero1"],
            2,
            "substrate full, selector cyclic, update dense, bank discard on a random llama (53,856 parameters, fp32), "
            "2 ranks, ZeRO stage 1",
        ),
        (
            ["method=lora", "substrate.peft.r=2", "substrate.peft.target_modules=[q_proj]", "deepspeed=zero2"],
            1,
            "lora on a random llama (54,368 parameters, fp32), 1 rank, ZeRO stage 2",
        ),
    ],
)
def test_the_title_names_the_method_and_the_model(
    values: list[str], ranks: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = load("tiny.yaml", values)
    built = build_model(config, resolve(config, ranks), load_run_tokenizer(config.model), num_steps=6, empty=True)
    assert title(config, built, ranks) == expected


def test_the_title_counts_packed_weights_and_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes stores two weights in a byte, and ZeRO-3 a part of each parameter."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    values = ["method=lora", "model.path=base", "model.quantization=nf4", "deepspeed=zero2"]
    config = load("tiny.yaml", ["model.random=null", "model.tokenizer=null", *values], check_files=False)
    packed, partitioned = torch.empty(32, 1), torch.empty(10)
    packed.quant_state = SimpleNamespace(shape=torch.Size([8, 8]))  # type: ignore[attr-defined]
    partitioned.ds_numel = 20  # type: ignore[attr-defined]
    model = SimpleNamespace(parameters=lambda: [packed, partitioned])
    built = SimpleNamespace(model=model, ds={"zero_optimization": {"stage": 2}})
    assert title(config, built, 1) == "lora on base (84 parameters, fp32, base in nf4), 1 rank, ZeRO stage 2"  # type: ignore[arg-type]
