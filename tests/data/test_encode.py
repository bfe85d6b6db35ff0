"""trainer/data/encode.py: which tokens of conversations, tools and plain text are trained on."""

from __future__ import annotations

import sys

import pytest

from tests.data.conftest import rows_of
from tests.data.files import encode
from trainer.data.encode import Report
from trainer.data.errors import DataError
from trainer.data.tokenizer import bytes_tokenizer

USER = {"role": "user", "content": "hi"}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def samples_of(path, tokenizer, max_length=1000, overflow="truncate"):
    samples = []
    report = encode(str(path), rows_of(path), tokenizer, max_length=max_length, overflow=overflow, keep=samples.append)
    return samples, report


def texts(path, tokenizer):
    """Return the whole text of the only sample, and each run of its targets."""
    ((sample,), _) = samples_of(path, tokenizer)
    ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    runs = [[]]
    for label in labels:
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    return tokenizer.decode(ids), [tokenizer.decode(run) for run in runs if run]


def test_plain_text_is_a_target_as_a_whole_and_ends(write, tokenizer):
    whole, targets = texts(write({"text": "once é"}), tokenizer)
    assert (whole, targets) == ("once é<|eos|>", ["nce é<|eos|>"])  # nothing predicts the first token


def test_long_plain_text_follows_overflow(write, tokenizer):
    path = write({"text": "abcdef"}, {"text": "ab"})
    samples, report = samples_of(path, tokenizer, max_length=4)
    assert [tokenizer.decode(sample["input_ids"]) for sample in samples] == ["abcd", "ab<|eos|>"]
    assert report == Report(samples=2, truncated=1, dropped=0, tokens=7, target_tokens=5)
    assert samples_of(path, tokenizer, max_length=4, overflow="drop")[1].dropped == 1


def test_alpaca_trains_on_the_output(write, tokenizer):
    whole, targets = texts(write({"instruction": "Add.", "input": "1 1", "output": "2"}), tokenizer)
    assert whole.endswith("### Input:\n1 1\n\n### Response:\n2<|eos|>") and targets == ["2<|eos|>"]


def test_sharegpt_goes_through_the_template(write, tokenizer):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert texts(write({"conversations": turns}), tokenizer) == ("<|user|>q<|assistant|>a<|eos|>", ["a<|eos|>"])


# Messages that opt out


@pytest.mark.parametrize("out", [{"train": False}, {"weight": 0}])
def test_a_message_that_opts_out_is_no_target_and_its_neighbours_are(write, tokenizer, out):
    messages = [USER, assistant("one"), assistant("two", **out), assistant("three"), USER, assistant("four", **out)]
    whole, targets = texts(write({"messages": messages}), tokenizer)
    assert whole.count("<|assistant|>") == 4 and "two<|eos|>" in whole and "four<|eos|>" in whole
    assert targets == ["one<|eos|>", "three<|eos|>"]


def test_neighbours_with_nothing_between_them_are_told_apart(write):
    """A mask of tokens would show one run here, without the end of each message."""
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    path = write({"messages": [USER, assistant("same"), assistant("same", train=False), assistant("é")]})
    ((sample,), _) = samples_of(path, tokenizer)
    labels = sample["labels"].tolist()
    assert bytes(sample["input_ids"].tolist()).decode() == "hisamesameé"
    assert labels == [-100] * 2 + list(b"same") + [-100] * 4 + list("é".encode())


def test_a_template_that_marks_messages_in_pieces_cannot_opt_out(write):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% generation %}.{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    fine = {"messages": [USER, assistant("one"), assistant("two")]}
    assert texts(write(fine), tokenizer)[1] == ["one.two."]
    with pytest.raises(DataError, match=r"train\.jsonl:2: train: false .* marks 4 spans in 2 assistant messages"):
        samples_of(write(fine, {"messages": [USER, assistant("one"), assistant("two", train=False)]}), tokenizer)


# Tools

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
WITH_TOOLS = {
    "messages": [
        USER,
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "content": "2"},
        assistant("It is 2."),
    ],
    "tools": [TOOL],
}


def test_calls_are_targets_and_what_tools_say_is_not(write, tokenizer):
    whole, targets = texts(write(WITH_TOOLS), tokenizer)
    assert whole == (
        '<|system|>Tools: [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]'
        '<|user|>hi<|assistant|><tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|eos|>'
        "<|user|><tool_response>2</tool_response><|assistant|>It is 2.<|eos|>"
    )
    assert targets == ['<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|eos|>', "It is 2.<|eos|>"]


def test_the_templates_of_others_get_the_tools_too(write):
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    whole, targets = texts(write(WITH_TOOLS), tokenizer)
    assert '<tools>\n{"type": "function", "function": {"name": "add"' in whole and "<tool_response>\n2" in whole
    assert '{"name": "add", "arguments": {"a": 1}}' in targets[0] and "It is 2." in targets[1]
    assert len(targets) == 2


def test_a_template_without_a_place_for_tools_is_refused(write):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = "{% generation %}{{ messages[1].content }}{% endgeneration %}"
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: has tools and tool_calls, for which .* template has no place"
    ):
        samples_of(write(WITH_TOOLS), tokenizer)


# Nothing to train on


def test_every_sample_masked_out_is_an_error(write):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"
    path = write(
        *[{"messages": [USER, assistant("x")]}] * 2, {"messages": [{**USER, "content": "long"}, assistant("x")]}
    )
    with pytest.raises(DataError, match=r"none of 3 samples is left: 3 have no token to train on.*chat template"):
        samples_of(path, tokenizer)
    with pytest.raises(DataError, match=r"2 have no token to train on .*all are masked.*1 are longer .*=drop"):
        samples_of(path, tokenizer, max_length=3, overflow="drop")


# Rows that a template refuses


def test_refused_rows_are_named_up_to_ten_across_chunks(write, tokenizer, monkeypatch):
    monkeypatch.setattr(sys.modules[encode.__module__], "ROWS_PER_CHUNK", 2)
    good, critic = (
        {"messages": [USER, assistant("b")]},
        {"messages": [USER, assistant("b"), {**USER, "role": "critic"}]},
    )
    path = write(good, critic, good, critic, critic, good)
    with pytest.raises(DataError) as few:
        samples_of(path, tokenizer)
    refused = "the tokenizer's chat template refuses the row: unknown role 'critic'"
    assert [problem.partition("; ")[0] for problem in few.value.problems] == [
        f"{path}:{n}: {refused}" for n in (2, 4, 5)
    ]
    with pytest.raises(DataError) as many:
        samples_of(write(*[critic] * 30), tokenizer)
    assert len(many.value.problems) == 11 and many.value.problems[-1] == f"{path}: stopped after 10 problems"


# Tokenizers with several templates


def templates(**named):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = {name: mark + tokenizer.chat_template for name, mark in named.items()}
    return tokenizer


def test_rows_with_tools_go_through_the_template_for_tools(write):
    """It is the template that transformers uses for them."""
    tokenizer = templates(default="D", tool_use="T")
    rows = [{"messages": [USER, assistant("b")], "tools": tools} for tools in ([], [TOOL])]
    whole = [tokenizer.decode(sample["input_ids"]) for sample in samples_of(write(*rows), tokenizer)[0]]
    assert [text[0] for text in whole] == ["D", "T"] and "add" in whole[1]


def test_a_tokenizer_without_a_default_template_is_told_which_it_has(write):
    path = write({"messages": [USER, assistant("b")]})
    with pytest.raises(
        DataError, match=r"chat templates called rag, tool_use, but none called default.*chat_template\.jinja"
    ):
        samples_of(path, templates(rag="R", tool_use="T"))


@pytest.mark.parametrize(("max_length", "length"), [(31, 30), (30, 30), (29, 20), (20, 20), (19, 10), (10, 10), (9, 9)])
def test_long_conversations_are_cut_after_a_whole_answer(write, tokenizer, max_length, length):
    """Of three turns: a mark, three letters, a mark, and an answer of four letters and an end. Without a whole answer
    the end is cut, as in plain text."""
    path = write({"messages": [{"role": "user", "content": "ask"}, assistant("tell")] * 3})
    ((whole,), _) = samples_of(path, tokenizer)
    ((cut,), report) = samples_of(path, tokenizer, max_length=max_length, overflow="truncate_at_turn")
    assert len(whole["input_ids"]) == 30
    for name in ("input_ids", "labels"):
        assert cut[name].tolist() == whole[name][:length].tolist()
    assert report == Report(1, int(length < 30), 0, length, length // 10 * 5 + (length == 9) * 4)
    (text,), _ = samples_of(write({"text": "abcdef"}), tokenizer, max_length=4, overflow="truncate_at_turn")
    assert tokenizer.decode(text["input_ids"]) == "abcd"
