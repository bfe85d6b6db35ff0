"""`python -m trainer prepare`: what it prints, and that training finds what it made."""

from __future__ import annotations

import os

import pytest

import trainer.data.cache
from trainer.cli.main import main
from trainer.config import load
from trainer.data.cache import tokenise_run

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hé"}]}
SETTINGS = ["model.random={model_type: llama}", "train.steps=1", "train.global_batch_size=1", "output=runs/here"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"})
    return tmp_path


def test_samples_are_shown_with_their_targets_in_brackets(here, write, capsys):
    write(CHAT, {"messages": [*CHAT["messages"], *CHAT["messages"]]}, CHAT)
    write({"text": "abc"}, name="b.jsonl")
    assert main(["prepare", *SETTINGS, "data.train=[train.jsonl, b.jsonl]", "--show", "2"]) == 0
    train, other = here / "train.jsonl", here / "b.jsonl"
    assert capsys.readouterr().out.splitlines() == [
        f"--- train {train}, sample 1: 8 tokens, 4 trained on",
        "<|user|>hi<|assistant|>⟦hé<|eos|>⟧",
        "",
        f"--- train {train}, sample 2: 16 tokens, 8 trained on",
        "<|user|>hi<|assistant|>⟦hé<|eos|>⟧<|user|>hi<|assistant|>⟦hé<|eos|>⟧",
        "",
        f"--- train {other}, sample 1: 4 tokens, 3 trained on",
        "a⟦bc<|eos|>⟧",
        "",
        f"train {train}: 3 samples (0 truncated, 0 dropped), 32 tokens, 16 trained on",
        f"train {other}: 1 samples (0 truncated, 0 dropped), 4 tokens, 3 trained on",
    ]


def test_colours_where_they_are_wanted(here, write, capsys, monkeypatch):
    write(CHAT)
    monkeypatch.setitem(os.environ, "FORCE_COLOR", "1")
    assert main(["prepare", *SETTINGS, "data.train=train.jsonl", "--show=1"]) == 0
    assert "<|user|>hi<|assistant|>\x1b[32mhé<|eos|>\x1b[0m" in capsys.readouterr().out


def test_packed_rows_are_taken_apart_and_shares_are_told(here, write, capsys):
    write(*[CHAT] * 4)
    write({"text": "abc"}, name="b.jsonl")
    sources = "data.train=[{path: train.jsonl, weight: 3}, {path: b.jsonl, weight: 1}]"
    assert main(["prepare", *SETTINGS, sources, "data.packing=true", "data.max_length=20", "--show", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("<|user|>hi<|assistant|>⟦hé<|eos|>⟧") == 4
    assert lines[-2].endswith("16 trained on; packed into 2 rows, 80.0% full; 75.0% of what is seen")
    assert lines[-1].endswith("packed into 1 rows, 20.0% full; 25.0% of what is seen")


def test_training_finds_what_was_prepared(here, write, capsys, monkeypatch, tokenizer):
    write(CHAT, CHAT)
    settings = [*SETTINGS, "data.train=train.jsonl", "data.eval_fraction=0.5"]
    assert main(["prepare", *settings]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["train", "eval"]
    monkeypatch.setattr(trainer.data.cache, "Builder", None)
    data = tokenise_run(load(None, [*settings, "output=runs/another"]), tokenizer)
    assert len(data.train) == 1 and (here / "runs" / "cache").is_dir()


def test_what_cannot_be_prepared_is_refused(here, write, capsys):
    write(b"{")
    assert main(["prepare", *SETTINGS, "data.train=train.jsonl"]) == 2
    assert "train.jsonl:1: not JSON" in capsys.readouterr().err
    assert main(["prepare", *SETTINGS, "data.train=gone.jsonl"]) == 2
    assert "data.train: no such file: 'gone.jsonl'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("--show=0", "--show: got '0'; allowed: integer >= 1"),
        ("--show=x", "--show: got 'x'; allowed: integer >= 1"),
        ("--show", "--show: a value is missing, as in --show=3"),
        ("--dry-run", "--dry-run: unknown option"),
    ],
)
def test_options(argument, problem, capsys):
    assert main(["prepare", argument]) == 2
    assert problem in capsys.readouterr().err


def test_help(capsys):
    assert main(["prepare", "--help"]) == 0
    assert "prepare RECIPE.yaml [key=value ...] [--show N]" in capsys.readouterr().out
    assert main(["train", "--show", "3"]) == 2
    assert "--show: unknown option" in capsys.readouterr().err
