"""trainer/data/rows.py: the formats, how they are told apart, and what is refused."""

from __future__ import annotations

import json

import pytest

from tests.data.conftest import rows_of
from trainer.config.sources import FORMATS as DESCRIPTIONS
from trainer.data.errors import DataError
from trainer.data.formats import FORMATS
from trainer.data.formats.fields import braces
from trainer.data.rows import detect

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}


def only(write, row, **keys):
    (found,) = rows_of(write(row), **keys)
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_the_help_names_the_columns_of_a_format(name):
    """And no others: the help says once for all formats that system_prompt is another name of system."""
    columns, _, optional = DESCRIPTIONS[name].partition("optionally ")
    assert columns.startswith(braces(FORMATS[name].columns))
    named = optional.split(", ") if optional else []
    assert sorted(named) == sorted(set(FORMATS[name].optional) - {"system_prompt"})


def test_alpaca_is_rendered_as_published(write):
    row = {"instruction": "Add {this}.", "input": "1 2", "output": "3"}
    found = only(write, row)
    assert found.prompt.startswith("Below is an instruction that describes a task, paired with an input")
    assert found.prompt.endswith("### Instruction:\nAdd {this}.\n\n### Input:\n1 2\n\n### Response:\n")
    assert found.answer == "3"
    for without in ({**row, "input": ""}, {**row, "input": None}, {"instruction": "Add {this}.", "output": "3"}):
        found = only(write, without)
        assert found.prompt.endswith("request.\n\n### Instruction:\nAdd {this}.\n\n### Response:\n")


def test_plain_text_has_no_prompt(write):
    row = only(write, {"text": "once", "id": 4})
    assert (row.prompt, row.answer) == ("", "once")


def test_sharegpt_becomes_messages(write):
    turns = [("system", "s"), ("human", "h"), ("gpt", "g"), ("tool", "t"), ("assistant", "a")]
    row = only(write, {"conversations": [{"from": who, "value": what} for who, what in turns], "tools": [TOOL]})
    assert [(message["role"], message["content"]) for message in row.messages] == [
        ("system", "s"), ("user", "h"), ("assistant", "g"), ("tool", "t"), ("assistant", "a"),
    ]  # fmt: skip
    assert all(set(message) == {"role", "content"} for message in row.messages)
    assert row.tools == (TOOL,) and row.trains == (True, True)


def test_sharegpt_with_calls_in_values(write):
    """As LLaMA-Factory writes them."""
    call, pair = {"name": "add", "arguments": {"a": 1}}, [{"name": "add", "arguments": {"a": i}} for i in (2, 3)]
    turns = [
        ("human", "h"),
        ("function_call", json.dumps(call)),
        ("observation", "1"),
        ("function_call", json.dumps(pair)),
        ("observation", ""),
        ("gpt", "g"),
    ]
    row = only(write, {"conversations": [{"from": who, "value": what} for who, what in turns], "tools": [TOOL]})
    assert [message["role"] for message in row.messages] == "user assistant tool assistant tool assistant".split()
    calls = [[call["function"] for call in message.get("tool_calls", [])] for message in row.messages]
    assert calls == [[], [call], [], pair, [], []] and row.messages[1]["content"] == ""
    assert row.trains == (True, True, True)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"value": "add(1)"}, r"conversations\[1\]\.value: string .*, but a call {name, arguments}, or a list of them"),
        ({"value": "3"}, r"conversations\[1\]\.value: string"),
        ({"value": '{"arguments": {}}'}, r"conversations\[1\]\.tool_calls\[0\]: "),
        ({"value": '["add"]'}, r"conversations\[1\]\.tool_calls\[0\]: "),
        ({"value": '{"name": "add"}', "tool_calls": [CALL]}, "a call, and others in tool_calls"),
    ],
)
def test_what_is_no_call_is_refused(write, message, words):
    with pytest.raises(DataError, match=words):
        turns = [{"from": "human", "value": "h"}, {"from": "function_call", **message}]
        only(write, {"conversations": turns})


def test_prompts_and_completions_may_be_conversations(write):
    """As in TRL; only the completion trains."""
    row = only(write, {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT], "system": "s", "tools": [TOOL]})
    assert row.messages == ({"role": "system", "content": "s"}, USER, ASSISTANT, USER, ASSISTANT)
    assert row.trains == (False, True) and row.tools == (TOOL,) and not row.prompt


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"prompt": [USER], "completion": "hello"},
            "prompt: list .*, and completion: string .*; both must be texts, or",
        ),
        ({"prompt": "hi", "completion": [ASSISTANT]}, "both must be texts, or both lists of messages"),
        ({"prompt": [USER], "completion": [USER]}, "completion: no message with role 'assistant'"),
        ({"prompt": [], "completion": [ASSISTANT]}, "prompt: empty list, but a non-empty list"),
        ({"prompt": [{"role": "user"}], "completion": [ASSISTANT]}, r"prompt\[0\]: {role}, but {role, content}"),
        (
            {"prompt": [USER], "completion": [{**ASSISTANT, "train": False}]},
            "completion: no message of the assistant is",
        ),
        (
            {"prompt": [{"role": "system", "content": "a"}], "completion": [ASSISTANT], "system": "b"},
            r"prompt\[0\]: a s",
        ),
        ({"prompt": "hi", "completion": "hello", "tools": [TOOL]}, r"has {tools}, which would not be in the sample"),
        ({"prompt": "hi", "completion": "hello", "system": "s"}, r"has {system}, which would not be in the sample"),
    ],
)
def test_conversations_in_prompts_are_checked(write, row, words):
    with pytest.raises(DataError, match=words):
        only(write, row)


@pytest.mark.parametrize("tools", [[TOOL], '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'])
def test_openai_messages_with_tools(write, tools):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 1"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        ASSISTANT,
    ]
    row = only(write, {"messages": messages, "tools": tools})
    assert row.messages == (
        {"role": "user", "content": "1 + 1"},
        # The object, which templates write as JSON: the string would be quoted once more.
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**CALL, "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "", "tool_call_id": "1"},
        ASSISTANT,
    )
    assert row.tools == (TOOL,)


@pytest.mark.parametrize("out", [{"train": False}, {"weight": 0}, {"train": True, "weight": 0}])
def test_a_message_can_opt_out(write, out):
    row = only(write, {"messages": [USER, {**ASSISTANT, **out}, {**ASSISTANT, "train": True, "weight": 1}]})
    assert row.trains == (False, True)
    assert row.messages[1:] == (ASSISTANT, ASSISTANT)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{**ASSISTANT, "train": False}], r"no message of the assistant is a target, so there is nothing to train on"),
        ([USER, {**ASSISTANT, "train": 1}], r"messages\[1\]\.train: number 1; allowed: true \| false"),
        ([USER, {**ASSISTANT, "weight": 0.5}], r"messages\[1\]\.weight: number 0\.5; allowed: 0 \| 1"),
        ([{**USER, "train": True}, ASSISTANT], r"messages\[0\]\.train: boolean true on a message of role 'user'"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT],
            r"messages\[0\]\.content\[0\]: {url}, but {type: image, path \| url \| image \| base64} is needed",
        ),
        ([{"role": "user", "content": []}, ASSISTANT], r"messages\[0\]\.content: empty list, but a non-empty string"),
        ([{**ASSISTANT, "tool_calls": "add"}], r"messages\[0\]\.tool_calls: string \"add\", but a list"),
        ([{**ASSISTANT, "tool_calls": [{}]}], r"messages\[0\]\.tool_calls\[0\]: {}, but {type, function"),
        ([{**USER, "tool_calls": [CALL]}, ASSISTANT], r"messages\[0\]\.tool_calls: in a message of role 'user'"),
        (
            [{**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}],
            r"messages\[0\]\.tool_calls\[0\]\.function\.arguments: string \"x\", but an object is needed",
        ),
    ],
)
def test_bad_messages_are_named(write, messages, problem):
    with pytest.raises(DataError, match=rf"train\.jsonl:1: .*{problem}"):
        only(write, {"messages": messages})


@pytest.mark.parametrize(
    ("tools", "problem"), [("x", r"tools: string \"x\", but"), ([3], r"tools\[0\]: number 3, but")]
)
def test_bad_tools_are_named(write, tools, problem):
    with pytest.raises(DataError, match=problem):
        only(write, {"messages": [USER, ASSISTANT], "tools": tools})


def test_bad_conversations_are_named_by_their_own_keys(write):
    with pytest.raises(DataError, match=r"conversations\[0\]\.from: got 'bot'; allowed: human \| user \| gpt"):
        only(write, {"conversations": [{"from": "bot", "value": "x"}]})
    with pytest.raises(DataError, match=r"conversations\[0\]: {role, content}, but {from, value} is needed"):
        only(write, {"conversations": [USER, ASSISTANT]})


# Detected or stated

ALPACA_WITH_TEXT = {"instruction": "a", "output": "b", "text": "a b"}


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ("instruction output", "alpaca"),
        ("instruction input output id", "alpaca"),
        ("question answer", "qa"),
        ("prompt completion", "prompt"),
        ("prompt messages", "messages"),
        ("messages tools", "messages"),
        ("conversations", "sharegpt"),
        ("text meta", "text"),
    ],
)
def test_columns_name_the_format(columns, format):
    assert detect(dict.fromkeys(columns.split())) == format


def test_columns_that_name_none_or_several_are_refused(write):
    with pytest.raises(DataError, match=r"train\.jsonl:1: .*format: alpaca \| text}"):
        only(write, ALPACA_WITH_TEXT)
    with pytest.raises(DataError, match=r"\(format: auto\): the row has {q, a}; known are {instruction"):
        only(write, {"q": "x", "a": "y"})


def test_a_stated_format_decides(write):
    assert only(write, ALPACA_WITH_TEXT, format="text").answer == "a b"
    assert only(write, ALPACA_WITH_TEXT, format="alpaca").answer == "b"
    with pytest.raises(
        DataError, match=r":1: column question, answer missing: .*format is qa {question, answer} as stated"
    ):
        only(write, ALPACA_WITH_TEXT, format="qa")
