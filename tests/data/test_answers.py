"""Find what the assistant says without marks: the same tokens as with them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.templates import MARKED, TOKENS, without_marks
from trainer.data.answers import RefusedRow
from trainer.data.formats.base import Row
from trainer.data.rendering import render
from trainer.data.tokenizer import bytes_tokenizer


def turns(*contents: str, system: str | None = None) -> tuple[dict[str, Any], ...]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return (*([{"role": "system", "content": system}] if system else []), *messages)


REASONED = "<think>\nfour and four\n</think>\n\neight"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
CONVERSATIONS = {
    "one turn": turns("hi", "hello"),
    "two turns": turns("hi", "hello", "and?", "more"),
    "system": turns("hi", "hello", "and?", "more", system="Be kind."),
    "the same answer again": turns("yes?", "yes", "yes", "yes", "yes?", "yes"),
    "space around": turns(" hi ", " hello\n", "and", "  more  "),
    "headers in the text": turns("what is <|im_start|>?", "a mark", "and [/INST] ?", "another <start_of_turn>model"),
    "reasoning in an earlier turn": turns("4+4?", REASONED, "and 1?", "nine"),
    "many lines": turns("a\n\nb", "c\n\nd\n", "e", "f"),
}
WITH_TOOLS = {
    "call and answer": (
        *turns("1+2?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three"},
    ),
    "an earlier call after reasoning": (
        *turns("1+2?"),
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\nLet me see.", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\nthree"},
        *turns("sure?", "yes"),
    ),
    "an earlier call alone after reasoning": (
        *turns("1+2?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\nthree"},
        *turns("sure?", "yes"),
    ),
}


TOKENS_OF_ALL = ["<s>", "</s>", *TOKENS]


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = bytes_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": TOKENS})
    tokenizer.chat_template = template
    return tokenizer


def said(template: str, messages: tuple[dict[str, Any], ...]) -> list[str]:
    row = Row(where="here", messages=messages, trains=(True,) * sum(m["role"] == "assistant" for m in messages))
    text, spans = render(row, tokenizer_with(template), template, TOKENS_OF_ALL)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", MARKED.values(), ids=MARKED)
def test_the_same_is_trained_on_as_with_marks(template: str, conversation: tuple[dict[str, Any], ...]) -> None:
    plain = without_marks(template)
    assert "generation -" not in plain
    assert said(plain, conversation) == said(template, conversation)


@pytest.mark.parametrize("conversation", WITH_TOOLS.values(), ids=WITH_TOOLS)
def test_calls_are_trained_on_as_with_marks(conversation: tuple[dict[str, Any], ...]) -> None:
    assert said(without_marks(MARKED["qwen-3"]), conversation) == said(MARKED["qwen-3"], conversation)


def test_a_greeting_before_the_first_question_is_found() -> None:
    messages = ({"role": "assistant", "content": "Welcome!"}, *turns("hi", "hello"))
    assert said(without_marks(MARKED["chatml"]), messages) == ["Welcome!<|im_end|>", "hello<|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        # What follows the content depends on how many messages there are.
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + (messages | length) | string }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
    ],
)
def test_what_cannot_be_told_apart_is_refused(template: str) -> None:
    with pytest.raises(RefusedRow, match=r"message [24] of 4.*\{% generation %\}"):
        said(template, turns("a", "b", "c", "d"))
