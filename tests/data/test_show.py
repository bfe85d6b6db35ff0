"""`python -m trainer prepare`: what it prints, and that training finds what it made."""

from __future__ import annotations

import os
from html.parser import HTMLParser

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


def test_a_page_marks_what_is_trained_on_and_escapes_the_rest(here, write, capsys):
    said = [{"role": "user", "content": "<b>&\n\x1b[31m"}, {"role": "assistant", "content": "</pre><script>"}]
    write({"messages": said}, *[CHAT] * 25)
    assert main(["prepare", *SETTINGS, "data.train=train.jsonl", "--html", "samples.html"]) == 0
    source = f"train {here / 'train.jsonl'}"
    summary = f"{source}: 26 samples (0 truncated, 0 dropped), 227 tokens, 115 trained on"
    assert capsys.readouterr().out.splitlines() == ["Samples: samples.html", summary]
    text = (here / "samples.html").read_text(encoding="utf-8")
    tree = Page(text)
    assert tree.marked[1:3] == ["</pre><script><|eos|>", "hé<|eos|>"], "the first mark is the legend's"
    assert tree.pieces[0] == "<|user|><b>&\n\\x1b[31m<|assistant|></pre><script><|eos|>"
    assert len(tree.pieces) == 20 and summary in tree.text
    assert tree.tags.isdisjoint({"script", "link", "img", "b"})

    assert main(["prepare", *SETTINGS, "data.train=train.jsonl", "--html=two.html", "--show", "2"]) == 0
    assert len(Page((here / "two.html").read_text(encoding="utf-8")).pieces) == 2


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        (".", "another kind of file; allowed: a name that ends in .html"),
        ("train.jsonl", "another kind of file; allowed: a name that ends in .html"),
        ("gone/page.html", "but gone is no folder; make it first"),
        ("folder.html", "a folder; name a file in it"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_anything_takes_long(here, write, capsys, file, problem):
    write(CHAT)
    (here / "folder.html").mkdir()
    before = (here / "train.jsonl").read_bytes()
    assert main(["prepare", *SETTINGS, "data.train=train.jsonl", "--html", file]) == 2
    assert capsys.readouterr().err.strip().endswith(f"--html: got {file!r}, {problem}")
    assert (here / "train.jsonl").read_bytes() == before and not (here / "runs").exists()


class Page(HTMLParser):
    """What a browser reads in a page: tags, all text, that of each <pre>, and that of each <mark>."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text, self.pieces, self.marked = "", [], []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self._open.append(tag)
        if tag in ("pre", "mark"):
            (self.pieces if tag == "pre" else self.marked).append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text += data
        if "pre" in self._open:
            self.pieces[-1] = (self.pieces[-1] + data).removeprefix("\n")
        if "mark" in self._open:
            self.marked[-1] += data


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
        ("--html", "--html: a value is missing, as in --html=samples.html"),
        ("--dry-run", "--dry-run: unknown option"),
    ],
)
def test_options(argument, problem, capsys):
    assert main(["prepare", argument]) == 2
    assert problem in capsys.readouterr().err


def test_help(capsys):
    assert main(["prepare", "--help"]) == 0
    assert "prepare RECIPE.yaml [key=value ...] [--show N] [--html FILE]" in capsys.readouterr().out
    assert main(["train", "--show", "3"]) == 2
    assert "--show: unknown option" in capsys.readouterr().err
