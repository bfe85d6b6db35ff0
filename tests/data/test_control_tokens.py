"""Control tokens that rows spell stay text, unless they are allowed; the template's own stay tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.data.conftest import tokenised
from tests.data.templates import MARKED, without_marks
from trainer.data.cache import TokenisedData
from trainer.data.errors import DataError
from trainer.data.show import describe
from trainer.data.tokenizer import bytes_tokenizer

SPELT = "it ends with <|im_end|> and <|eos|>, not <|im_start|>user"


def chatml(*, marked: bool = True, **of_end: bool) -> Any:
    """The byte tokenizer with the tokens and the template of ChatML."""
    tokenizer = bytes_tokenizer()
    end = AddedToken("<|im_end|>", special=True, **of_end)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", end]}, replace_extra_special_tokens=False
    )
    tokenizer.add_tokens(["<think>"])  # no control token
    tokenizer.chat_template = MARKED["chatml"] if marked else without_marks(MARKED["chatml"])
    return tokenizer


def talk(*contents: str) -> dict[str, Any]:
    return {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    }


def sample(data: TokenisedData, tokenizer: Any, number: int = 0) -> tuple[list[int], str]:
    """The ids, and what is trained on as text."""
    row = data.train[number]
    return row["input_ids"].tolist(), tokenizer.decode([i for i in row["labels"].tolist() if i != -100])


@pytest.mark.parametrize("marked", [True, False])
def test_control_tokens_in_messages_stay_text(marked: bool, write: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = chatml(marked=marked)
    start, end, eos = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", tokenizer.eos_token])
    path = write(talk(f"what is {SPELT}?", f"<think>hm {SPELT}"), talk("plain", "words"))
    data = tokenised(tmp_path, tokenizer, path, max_length=400)
    ids, trained = sample(data, tokenizer)
    assert (ids.count(start), ids.count(end), ids.count(eos)) == (2, 2, 0)
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    assert tokenizer.decode(ids).count(SPELT) == 2 and trained == f"<think>hm {SPELT}<|im_end|>"
    (part,) = data.train_parts
    assert (part.num_spelling, part.control_tokens) == (1, ("<|im_end|>", "<|eos|>", "<|im_start|>"))
    assert "; 1 rows spell <|im_end|>, <|eos|>, <|im_start|>, kept as text" in describe(data, 400)[0]
    assert data.earlier_fingerprint is None  # it stood for other samples


def test_allowed_they_are_tokens(write: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = chatml()
    path = write(talk("a", f"b {SPELT}"))
    allowed = tokenised(tmp_path, tokenizer, path, max_length=400, special_tokens_in_text="allow")
    ids, _ = sample(allowed, tokenizer)
    assert (ids.count(tokenizer.eos_token_id), ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>"))) == (1, 3)
    assert allowed.train_parts[0].num_spelling == 0 and "spell" not in describe(allowed, 400)[0]
    assert allowed.earlier_fingerprint is not None
    assert allowed.fingerprint != tokenised(tmp_path, tokenizer, path, max_length=400).fingerprint


def test_other_rows_have_the_tokens_of_the_whole_text(write: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = chatml()
    row = talk("what?", "<think> that")
    found = [tokenised(tmp_path, tokenizer, write(row), special_tokens_in_text=how) for how in ("text", "allow")]
    assert sample(found[0], tokenizer) == sample(found[1], tokenizer)


def test_arguments_of_calls_stay_text(write: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    call = {"type": "function", "function": {"name": "echo", "arguments": {"text": ["<|eos|>"]}}}
    row = talk("echo")
    row["messages"].append({"role": "assistant", "content": "", "tool_calls": [call]})
    data = tokenised(tmp_path, tokenizer, write(row), max_length=400)
    ids, trained = sample(data, tokenizer)
    assert "<|eos|>" in trained.removesuffix("<|eos|>") and ids.count(tokenizer.eos_token_id) == 1


def test_questions_and_answers_stay_text_and_verbatim_ones_do_not(write: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    eos = tokenizer.eos_token_id
    for row, number in (
        ({"question": "what is <|eos|>?", "answer": "an <|eos|> mark"}, 1),
        ({"instruction": "say <|eos|>", "output": "<|eos|>"}, 1),
        ({"prompt": "<|user|>hi<|eos|>", "completion": "yes"}, 2),
        ({"text": "one<|eos|>two"}, 2),
    ):
        ids, _ = sample(tokenised(tmp_path, tokenizer, write(row), max_length=400), tokenizer)
        assert ids.count(eos) == number and ids[-1] == eos, row


def test_a_tokenizer_that_cannot_be_taken_piece_by_piece_refuses_such_rows(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    """One that swallows the space before a control token."""
    tokenizer = chatml(lstrip=True)
    with pytest.raises(
        DataError, match=r"train.jsonl:1: spells <\|im_end\|>, which this .*special_tokens_in_text=allow"
    ):
        tokenised(tmp_path, tokenizer, write(talk("a", "the mark <|im_end|> ends")), max_length=400)
    tokenised(tmp_path, tokenizer, write(talk("a", "no mark")), max_length=400)


def test_a_text_with_the_mark_itself_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"contains the character U\+F8FF beside a control token"):
        tokenised(tmp_path, chatml(), write(talk("a \uf8ff", "b <|im_end|>")), max_length=400)
    tokenised(tmp_path, chatml(), write(talk("a \uf8ff", "b")), max_length=400)
