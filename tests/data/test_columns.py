"""Columns that a format does not require: used if their meaning is established, refused or named otherwise."""

from __future__ import annotations

import re

import pytest

from tests.data.conftest import rows_of, tokenised
from trainer.data.errors import DataError
from trainer.data.rows import Unused, read_rows
from trainer.data.show import describe
from trainer.data.tokenizer import bytes_tokenizer

SAID = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
SYSTEM = {"role": "system", "content": "be kind"}


def texts(tmp_path, tokenizer, path, **keys):
    found = tokenised(tmp_path, tokenizer, {"path": str(path), **keys}, max_length=2000)
    return [tokenizer.decode(sample["input_ids"]) for sample in found.train], found


# Used


@pytest.mark.parametrize("row", [{"messages": SAID}, {"conversations": TURNS}], ids=["messages", "sharegpt"])
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_column_is_the_system_turn(write, tmp_path, tokenizer, row, name):
    path = write({**row, name: "be kind"}, {**row, name: ""}, {**row, name: None}, row)
    found, _ = texts(tmp_path, tokenizer, path)
    without = "<|user|>hi<|assistant|>hello<|eos|>"
    assert found == [f"<|system|>be kind{without}", without, without, without]


def test_a_system_column_beside_a_system_message_must_be_the_same(write):
    (row,) = rows_of(write({"messages": [SYSTEM, *SAID], "system": "be kind"}))
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant"]
    with pytest.raises(DataError, match=r":1: messages\[0\]: a system message, and another one in the column system"):
        rows_of(write({"messages": [SYSTEM, *SAID], "system": "be brief"}))
    with pytest.raises(
        DataError, match=r":1: {system, system_prompt}: both have a value; .* ignore: \[system_prompt\]"
    ):
        rows_of(write({"messages": SAID, "system": "a", "system_prompt": "b"}))
    with pytest.raises(DataError, match=r":1: system: number 3, but a non-empty string is needed"):
        rows_of(write({"messages": SAID, "system": 3}))


def test_a_context_stands_before_the_question(write):
    rows = rows_of(
        write(
            {"context": "It is red.", "question": "Which?", "answer": "red"},
            {"context": "", "question": "Which?", "answer": "red"},
            {"system": "Be brief.", "context": "It is red.", "question": "Which?", "answer": "red"},
        )
    )
    assert [row.prompt for row in rows] == [
        "Context: It is red.\nQuestion: Which?\nAnswer: ",
        "Question: Which?\nAnswer: ",
        "Be brief.\n\nContext: It is red.\nQuestion: Which?\nAnswer: ",
    ]


def test_alpaca_with_a_system_prompt_and_earlier_turns(write):
    turn = {"instruction": "Now?", "output": "no"}
    rows = rows_of(
        write(
            {**turn, "system": "Be brief.", "input": "x"},
            {**turn, "history": [["First?", "yes"], ["Then?", "{well}"]]},
            {**turn, "history": [["First?", "yes"]], "system": "Be brief."},
        )
    )
    published = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    assert [row.prompt for row in rows] == [
        "### System:\nBe brief.\n\n### Instruction:\nNow?\n\n### Input:\nx\n\n### Response:\n",
        f"{published}\n\n### Instruction:\nFirst?\n\n### Response:\nyes\n\n### Instruction:\nThen?\n\n### Response:\n"
        "{well}\n\n### Instruction:\nNow?\n\n### Response:\n",
        "### System:\nBe brief.\n\n### Instruction:\nFirst?\n\n### Response:\nyes\n\n### Instruction:\nNow?\n\n"
        "### Response:\n",
    ]
    for wrong in ("x", [["a"]], [["a", 3]], [{"a": "b"}]):
        with pytest.raises(DataError, match=r":1: history"):
            rows_of(write({**turn, "history": wrong}))


# Refused, or left out by name


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({"question": "a", "answer": "b", "hint": "c"}, "hint"),
        ({"question": "a", "answer": "b", "history": [["c", "d"]], "choices": ["e"]}, "history, choices"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "system"),
        ({"text": "a", "title": "c"}, "title"),
        ({"instruction": "a", "output": "b", "context": "c"}, "context"),
        ({"messages": SAID, "functions": [{"name": "f"}]}, "functions"),
        ({"messages": SAID, "prompt": "another"}, "prompt"),
        ({"conversations": TURNS, "chosen": 0}, "chosen"),
    ],
)
def test_a_column_that_would_be_lost_is_refused_by_name_and_key(write, tmp_path, tokenizer, row, lost):
    path = write(row)
    with pytest.raises(DataError) as error:
        tokenised(tmp_path, tokenizer, path)
    (problem,) = error.value.problems
    assert problem.startswith(f"{path}:1: has {{{lost}}}, which would not be in the sample")
    assert problem.endswith(f"leave it out by naming the source as {{path: {path}, ignore: [{lost}]}}")
    found, left = texts(tmp_path, tokenizer, path, ignore=lost.split(", "))
    assert len(found) == 1 and left.train_parts[0].ignored == tuple(lost.split(", "))
    assert f"0 dropped), {left.train_report.tokens} tokens" in describe(left, 64)[0]
    assert f"; ignored: {lost}" in describe(left, 64)[0]


def test_a_column_of_a_single_row_counts_and_empty_ones_do_not(write, tmp_path, tokenizer):
    rows = [{"question": "a", "answer": "b", "hint": empty} for empty in (None, "", [], {})]
    assert tokenised(tmp_path, tokenizer, write(*rows)).train_parts[0].ignored == ()
    with pytest.raises(DataError, match=r"train\.jsonl:5: has {hint}"):
        tokenised(tmp_path, tokenizer, write(*rows, {"question": "a", "answer": "b", "hint": 0}))


def test_what_says_where_a_row_comes_from_is_left_out_and_named(write, tmp_path, tokenizer):
    about = {"id": 3, "prompt_id": "x", "Source": "y", "url": "z", "meta": {"a": 1}, "created_at": "2024", "idx": 0}
    _, found = texts(tmp_path, tokenizer, write({"question": "a", "answer": "b", **about}))
    assert found.train_parts[0].ignored == tuple(about)
    assert describe(found, 64)[0].endswith("; ignored: id, prompt_id, Source, url, meta, created_at, idx")
    again = tokenised(tmp_path, tokenizer, {"path": found.train_parts[0].path}, max_length=2000)
    assert again.train_parts[0].ignored == tuple(about), "from the cache as well"


def test_what_the_sample_says_anyway_is_not_lost(write, tmp_path, tokenizer):
    row = {"messages": [{"role": "user", "content": "why so?"}, *SAID[1:]], "prompt": "why so?"}
    assert tokenised(tmp_path, tokenizer, write(row)).train_parts[0].ignored == ("prompt",)
    row = {"instruction": "a", "output": "b", "text": "other"}
    stated = tokenised(tmp_path, tokenizer, {"path": str(write(row)), "format": "alpaca"}, max_length=2000)
    assert stated.train_parts[0].ignored == ("text",), "a format that was not chosen"


def test_ignoring_a_column_can_decide_the_format_and_leaves_out_what_would_be_used(write, tmp_path, tokenizer):
    path = write({"question": "a", "answer": "b", "text": "c", "context": "d"})
    found, _ = texts(tmp_path, tokenizer, path, ignore=["text", "context"])
    assert found == ["Question: a\nAnswer: b<|eos|>"]
    with pytest.raises(DataError, match=r"column text missing|no known format"):
        tokenised(tmp_path, tokenizer, {"path": str(write({"text": "a"})), "ignore": ["text"]})


def test_an_ignored_name_that_no_row_has_is_refused(write, tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"train\.jsonl: ignore: no row has {hints}; name columns or keys of messages"):
        tokenised(tmp_path, tokenizer, {"path": str(write({"text": "a", "id": 1})), "ignore": ["id", "hints"]})


# Keys of messages


def thinking(value, role="assistant"):
    return {"messages": [SAID[0], {"role": role, "content": "hello", "reasoning_content": value}, SAID[1]]}


@pytest.mark.parametrize("role", ["assistant", "user"])
def test_a_key_of_a_message_that_the_template_does_not_write_is_refused(write, tmp_path, tokenizer, role):
    assert tokenised(tmp_path, tokenizer, write(thinking("", role), thinking(None, role))).train_parts[0].ignored == ()
    path = write(thinking(None, role), thinking("hm", role))
    with pytest.raises(DataError, match=r"train\.jsonl:2: has {reasoning_content}, which would not be in the sample"):
        tokenised(tmp_path, tokenizer, path)
    left = tokenised(tmp_path, tokenizer, {"path": str(path), "ignore": ["reasoning_content"]})
    assert left.train_parts[0].ignored == ("reasoning_content",)


@pytest.mark.parametrize("written", ["message.reasoning_content", "message['reason' ~ 'ing_content']"])
def test_a_key_that_the_template_writes_is_kept(write, tmp_path, written):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{- message['content'] -}}", f"{{{{- ({written} or '') -}}}}{{{{- message['content'] -}}}}", 1
    )
    found, data = texts(tmp_path, tokenizer, write(thinking("hm")))
    assert found == ["<|user|>hi<|assistant|>hmhello<|eos|><|assistant|>hello<|eos|>"]
    assert data.train_parts[0].ignored == ()


def test_ids_and_names_of_tools_are_left_out_and_named(write, tmp_path, tokenizer):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        SAID[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "x", "tool_call_id": "1", "name": "f"},
        SAID[1],
    ]
    found = tokenised(tmp_path, tokenizer, write({"messages": messages}))
    assert found.train_parts[0].ignored == ("tool_call_id", "name")
    with pytest.raises(DataError, match="has {name}"):
        tokenised(tmp_path, tokenizer, write({"messages": [{**SAID[0], "name": "Bo"}, SAID[1]]}))


def test_a_template_that_leaves_out_the_system_turn_is_refused(write, tmp_path):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['role'] in ['system', 'user']", "message['role'] == 'user'"
    )
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "raise_exception(", "('' if message.role == 'system' else "
    )
    path = write({"messages": SAID, "system": "be kind"})
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: has message 1 of 3 \(role 'system'\), which the .* template leaves out"
    ):
        tokenised(tmp_path, tokenizer, path)


CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
THINKING = [*SAID, SAID[0], {"role": "assistant", "content": "<think>so</think>hello"}]
STRICT = {**CALL, "function": {**CALL["function"], "strict": True}}
CALLING = [
    SAID[0],
    {"role": "assistant", "content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "content": "x"},
    SAID[1],
]


@pytest.mark.parametrize(
    "messages, written, instead, refused",
    [
        ([*SAID, *SAID], "elif message['role'] in ['system', 'user']", "elif loop.first", "3 of 4 (role 'user')"),
        (CALLING, "<tool_response>' + message['content'] +", "<tool_response>' +", "3 of 4 (role 'tool')"),
        ([*SAID, *SAID], "{{- message['content'] -}}", "{{- message['content'] if loop.last else '' -}}",
         "2 of 4 (role 'assistant')"),
        (CALLING, "message['tool_calls'] or []", "([] if message['content'] else message['tool_calls'] or [])",
         "2 of 4: tool_calls[0], a call of look"),
        (CALLING, "{{- message['content'] -}}", "{{- '' if message['tool_calls'] else message['content'] -}}",
         "2 of 4: content beside tool_calls"),
        ([CALLING[0], {**CALLING[1], "tool_calls": [CALL, CALL]}, *CALLING[2:]], "message['tool_calls'] or []",
         "(message['tool_calls'] or [])[:1]", "2 of 4: tool_calls[1], a call of look"),
        (CALLING, "call['function'] | tojson", "call['function']['name']",
         "2 of 4: the arguments of tool_calls[0], a call of look"),
        (THINKING, "{{- message['content'] -}}", "{{- message['content'].split('</think>')[-1] -}}",
         "4 of 4: the reasoning of the last answer (<think>)"),
    ],
    ids=["user", "tool", "assistant", "calls", "beside calls", "second call", "arguments", "reasoning"],
)  # fmt: skip
def test_a_template_that_leaves_out_what_was_said_is_refused(write, tmp_path, messages, written, instead, refused):
    tokenizer = bytes_tokenizer()
    path = write({"messages": messages})
    assert tokenised(tmp_path, tokenizer, path).train_parts[0].report.samples == 1
    assert written in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(written, instead, 1)
    if instead == "elif loop.first":
        tokenizer.chat_template = tokenizer.chat_template.replace("raise_exception(", "('' and ")
    with pytest.raises(DataError, match=rf"train\.jsonl:1: has message {re.escape(refused)}, which the .* leaves out"):
        tokenised(tmp_path, tokenizer, path)


def test_a_template_may_leave_out_the_reasoning_of_an_earlier_turn(write, tmp_path):
    """As Qwen's do; and write in other words what it does not leave out."""
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{- message['content'] -}}",
        "{{- (message['content'] if loop.last else message['content'].split('</think>')[-1]) | upper -}}",
        1,
    )
    found, _ = texts(tmp_path, tokenizer, write({"messages": THINKING}))
    assert found == ["<|user|>hi<|assistant|>HELLO<|eos|><|user|>hi<|assistant|><THINK>SO</THINK>HELLO<|eos|>"]


def test_a_template_that_leaves_out_tools_is_refused(write, tmp_path):
    tokenizer = bytes_tokenizer()
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}, {"name": "see"}]
    path = write({"messages": SAID, "tools": tools})
    assert "look" in texts(tmp_path, tokenizer, path)[0][0]
    tokenizer.chat_template = tokenizer.chat_template.replace("tools | tojson", "tools[:1] | tojson")
    with pytest.raises(DataError, match=r"train\.jsonl:1: has tools\[1\], which the .* template leaves out"):
        tokenised(tmp_path, tokenizer, path)


@pytest.mark.parametrize(
    "call, named",
    [
        ({"function": {"name": "look"}, "arguments": {"at": "x"}}, "arguments"),
        ({"function": {"name": "look", "parameters": {"at": "x"}}}, r"function\.parameters"),
    ],
)
def test_arguments_in_another_place_are_refused(write, call, named):
    messages = [SAID[0], {"role": "assistant", "content": "", "tool_calls": [call]}, *CALLING[2:]]
    with pytest.raises(DataError, match=rf":1: messages\[1\]\.tool_calls\[0\]\.{named}: allowed: function\.arguments;"):
        rows_of(write({"messages": messages}))


def test_a_key_that_stands_in_the_template_as_a_word_is_not_written_for_that(write, tmp_path):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("Tools: ", "Tools, to answer a query: ")
    with pytest.raises(DataError, match="has {query}, which would not be in the sample"):
        tokenised(tmp_path, tokenizer, write({"messages": [{**SAID[0], "query": "what is 2+2?"}, SAID[1]]}))


def test_what_is_ignored_stays_in_the_records_of_the_caller(write):
    record = {"messages": [SAID[0], {**CALLING[1], "tool_calls": [STRICT]}, *CALLING[2:]]}
    read_rows("x", [("x:1", record)], unused=Unused("x", ["strict"]))
    assert record["messages"][1]["tool_calls"][0]["function"]["strict"] is True


@pytest.mark.parametrize(
    "row, key",
    [
        ({"messages": [{**SAID[0], "value": "bye"}, SAID[1]]}, "value"),
        ({"conversations": [{**TURNS[0], "content": "bye"}, TURNS[1]]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "tone": "x"}]}, SAID[1]]}, "tone"),
        ({"messages": [SAID[0], {**CALLING[1], "tool_calls": [{**CALL, "why": "x"}]}, *CALLING[2:]]}, "why"),
        ({"messages": [SAID[0], {**CALLING[1], "tool_calls": [STRICT]}, *CALLING[2:]]}, "strict"),
    ],
    ids=["value", "content", "part", "call", "function"],
)
def test_keys_below_those_of_a_row_are_refused_or_ignored_by_name(write, tmp_path, row, key):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "call['function'] | tojson", "call['function']['name'] + (call['function']['arguments'] | tojson)"
    )
    path = write(row)
    with pytest.raises(DataError, match=rf"train\.jsonl:1: has {{{key}}}, which would not be in the sample"):
        tokenised(tmp_path, tokenizer, path)
    _, found = texts(tmp_path, tokenizer, path, ignore=[key])
    assert found.train_parts[0].ignored == (key,)


def test_what_stands_in_a_message_twice_is_left_out_once(write, tmp_path, tokenizer):
    both = [{**said, **turn} for said, turn in zip(SAID, TURNS, strict=True)]
    for column in ("messages", "conversations"):
        found, _ = texts(tmp_path, tokenizer, write({column: both}))
        assert found == ["<|user|>hi<|assistant|>hello<|eos|>"]
    parts = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]
    found, _ = texts(tmp_path, tokenizer, write({"messages": [{"role": "user", "content": parts}, SAID[1]]}))
    assert found == ["<|user|>hi<|assistant|>hello<|eos|>"]
