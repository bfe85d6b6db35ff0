"""`python -m trainer`."""

from __future__ import annotations

import pytest

from trainer.__main__ import main


def test_usage_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "train RECIPE.yaml" in text and "prepare RECIPE.yaml" in text
    assert main([]) == 2


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "unknown command 'trian'" in (text := capsys.readouterr().err) and "train" in text.splitlines()[0]


def test_train_is_the_entry_point(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert "train.global_batch_size" in capsys.readouterr().out
    assert main(["train", "train.steps=0"]) == 2
    assert "train.steps" in capsys.readouterr().err
