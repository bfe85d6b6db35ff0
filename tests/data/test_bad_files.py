"""trainer/data/plain_files.py and rows.py: lines and messages that cannot be read are named."""

import json

import pytest

from tests.data.files import QUESTIONS, tokenize
from trainer.data.errors import DataError


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"question": nope}', r"not JSON: Expecting value at column 14"),
        (b'{"question": ', r"not JSON: Expecting value at column 1[34]"),
        (b'{"question": "wh', r"not JSON: Unterminated string starting at column 14"),
        (b'{"question": "\xff", "answer": "b"}', r"not UTF-8 text: byte 0xff at column 15"),
        (b'["question"]', r"list \[\"question\"\], but an object is needed"),
        ({"question": "b", "id": 1}, r"column answer missing: the row has {question, id}, but the format is qa "),
        (
            {"prompt": "a", "completion": "b"},
            r"column question, answer missing: the row has {prompt, completion}, but the format is qa "
            r"{question, answer} by .*train\.jsonl:1; do not mix formats",
        ),
        ({"question": "a", "answer": 7}, r"answer: number 7, but a non-empty string is needed"),
        ({"question": "", "answer": "b"}, r"question: empty string"),
        ({"question": "a", "answer": 4}, r"answer: number 4, but a non-empty string is needed"),
        ({"question": "a", "answer": "\ud83c"}, r"answer: lone surrogate '\\ud83c' at character 1"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(write, tokenizer, line, problem):
    path = write(QUESTIONS[0], b"", line, QUESTIONS[1])
    with pytest.raises(DataError, match=rf"train\.jsonl:3: {problem}"):
        tokenize(path, tokenizer)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], r"messages: empty list, but a non-empty list of {role, content}"),
        ("hi", r"messages: string \"hi\", but a non-empty list"),
        ([{"role": "user"}], r"messages\[0\]: {role}, but {role, content} is needed"),
        ([{"role": "user", "content": "a"}], r"messages: no message with role 'assistant'"),
        ([{"role": "assistant", "content": ""}], r"messages\[0\]\.content: empty string"),
    ],
)
def test_bad_messages_are_named(write, tokenizer, messages, problem):
    with pytest.raises(DataError, match=rf"train\.jsonl:1: {problem}"):
        tokenize(write({"messages": messages}), tokenizer)


def test_problems_are_collected_up_to_ten(write, tokenizer):
    with pytest.raises(DataError) as few:
        tokenize(write(b"{", QUESTIONS[0], b"["), tokenizer)
    assert [problem.split(": ")[0].rsplit(":")[-1] for problem in few.value.problems] == ["1", "3"]
    with pytest.raises(DataError) as many:
        tokenize(write(*[b"{"] * 50), tokenizer)
    assert len(many.value.problems) == 11 and many.value.problems[-1].endswith("stopped after 10 problems")


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_an_empty_file_is_refused(write, tokenizer, content):
    with pytest.raises(DataError, match=r"train\.jsonl: contains no rows"):
        tokenize(write(content), tokenizer)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, tokenizer, name):
    with pytest.raises(DataError, match=r"cannot be read: No such file|no data set here"):
        tokenize(tmp_path / name, tokenizer)


def test_a_byte_order_mark_and_blank_lines_are_skipped(write, tokenizer):
    path = write(b"\xef\xbb\xbf" + json.dumps(QUESTIONS[0]).encode(), b" \r", QUESTIONS[1])
    assert tokenize(path, tokenizer)[1].samples == 2
