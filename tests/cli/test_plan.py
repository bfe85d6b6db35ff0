"""trainer/cli/plan.py: options that would do nothing are refused, and the same options elsewhere are not."""

from __future__ import annotations

import json

import pytest

from trainer.cli.plan import main

TINY = (
    "model.random={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 2}",
    "model.tokenizer=bytes",
    "train.global_batch_size=2",
    "data.max_length=16",
)
STEPS = "train.steps=100"
EPOCHS = "train.epochs=2"
OFFLOAD = "deepspeed=zero3_offload"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((STEPS, "--samples", "1000"), "--samples has no effect because train.steps=100 is the length of the run"),
        ((STEPS, "--bandwidth", "50GB"), "--bandwidth has no effect because one rank sends nothing"),
        ((STEPS, OFFLOAD, "--bandwidth", "50GB"), "--bandwidth has no effect because one rank sends nothing"),
        ((STEPS, "--host-bandwidth", "25GB"), "--host-bandwidth has no effect because deepspeed=zero3 copies nothing"),
        (
            (STEPS, "deepspeed=zero2", "--gpus", "2", "--bandwidth", "50GB", "--host-bandwidth", "25GB"),
            "--host-bandwidth has no effect because deepspeed=zero2 copies nothing",
        ),
        ((STEPS, "--short", "--flops", "measured"), "--flops has no effect because --short shows no times"),
        ((STEPS, "--short", "--gpus", "2", "--bandwidth", "1GB"), "--bandwidth has no effect because --short shows"),
        ((STEPS, OFFLOAD, "--short", "--host-bandwidth", "1GB"), "--host-bandwidth has no effect because --short"),
        ((EPOCHS, "--short", "--samples", "1000"), "--samples has no effect because --short shows no times"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_option_that_would_do_nothing_is_refused(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"\n{message}") and ": leave " in said.err
    assert said.out == ""


def test_the_same_options_are_used_where_they_have_an_effect(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus", "2", "--flops", "1e12", "--bandwidth", "1GB", "--host-bandwidth", "2GB", "--samples", "1000"]
    assert main([*TINY, EPOCHS, OFFLOAD, *options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["seconds"]["longest"] > 0 and plan["steps"] == 1000
