"""`data.on_bad_row: drop` leaves out rows that cannot be read or rendered, counts and names them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import tokenised
from trainer.data.cache import TokenisedData
from trainer.data.errors import DataError
from trainer.data.show import describe
from trainer.data.tokenizer import bytes_tokenizer

GOOD = [{"question": f"{i} plus one?", "answer": str(i + 1)} for i in range(20)]
BAD: list[Any] = [
    {"question": "", "answer": "b"},
    {"question": "a", "answer": 7},
    b'{"question": "cut',
    b"[1, 2]",
    {"prompt": "a", "completion": "b"},
]


WITHOUT_TOOLS = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


def samples_of(workspace: Path, path: Path, **settings: Any) -> TokenisedData:
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = WITHOUT_TOOLS
    return tokenised(workspace, tokenizer, path, **settings)


def talk(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


# --- rows that cannot be read --------------------------------------------------------------------------------------


def test_by_default_a_bad_row_is_an_error(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(*GOOD[:3], BAD[0], *GOOD[3:])
    with pytest.raises(DataError, match=r"train\.jsonl:4: question: empty string"):
        samples_of(tmp_path, path)


def test_bad_rows_are_left_out_counted_and_named(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(*BAD, *GOOD)
    data = samples_of(tmp_path, path, on_bad_row="drop")
    alone = samples_of(tmp_path, write(*GOOD, name="good.jsonl"))
    assert [row["input_ids"].tolist() for row in data.train] == [row["input_ids"].tolist() for row in alone.train]
    (part,) = data.train_parts
    assert part.num_bad == len(BAD) == len(part.first_bad) and part.report == alone.train_parts[0].report
    again = samples_of(tmp_path, path, on_bad_row="drop")  # from the cache
    assert again.train_parts[0].first_bad == part.first_bad
    said = describe(again, 64)
    assert said[1] == f"  5 rows of {path} left out (data.on_bad_row: drop), among them"
    assert said[2].strip().startswith(f"{path}:1: question: empty string") and len(said) == 5


def test_more_than_ten_are_left_out_and_ten_remembered(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(*GOOD * 2, *[{"question": "", "answer": "b"}] * 30)
    (part,) = samples_of(tmp_path, path, on_bad_row="drop").train_parts
    assert part.num_bad == 30 and len(part.first_bad) == 10


def test_the_format_is_that_of_the_first_row_that_can_be_read(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write({"unknown": 1}, *GOOD)
    (part,) = samples_of(tmp_path, path, on_bad_row="drop").train_parts
    assert part.num_bad == 1 and part.report.samples == len(GOOD)


def test_if_none_is_left_the_first_are_named(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":1: question: empty string(.|\n)*none of 2 rows can be used"):
        samples_of(tmp_path, write(*[BAD[0]] * 2), on_bad_row="drop")


def test_more_than_half_are_not_left_out(write: Callable[..., Path], tmp_path: Path) -> None:
    """As when the first row alone has another format."""
    path = write({"text": "stray"}, *GOOD)
    with pytest.raises(DataError, match=r"20 rows cannot be used, more than the 1 that can; data.on_bad_row=drop is"):
        samples_of(tmp_path, path, on_bad_row="drop")


def test_columns_that_a_sample_would_lack_are_still_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(*[{**row, "explanation": "of the answer"} for row in GOOD], BAD[0])
    with pytest.raises(DataError, match=r"has \{explanation\}, which would not be in the sample"):
        samples_of(tmp_path, path, on_bad_row="drop")


def test_held_out_rows_are_drawn_from_those_that_can_be_read(write: Callable[..., Path], tmp_path: Path) -> None:
    data = samples_of(tmp_path, write(*BAD, *GOOD), eval_fraction=0.25, on_bad_row="drop")
    assert (len(data.train), len(data.eval or ())) == (15, 5)
    assert sum("left out" in line for line in describe(data, 64)) == 1


# --- conversations that cannot be read or rendered -----------------------------------------------------------------


def test_conversations_that_the_template_refuses_are_left_out(write: Callable[..., Path], tmp_path: Path) -> None:
    good = [talk("hello", "hi"), talk("a", "b", "c", "d")]
    refused = {"messages": [*good[0]["messages"], {"role": "tool", "content": "42"}]}
    empty = talk("hello", "", "more", "yes")
    odd = {"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": "b"}]}
    good.append(talk("e", "f"))
    path = write(good[0], refused, empty, odd, *good[1:])
    data = samples_of(tmp_path, path, on_bad_row="drop", max_length=200)
    alone = samples_of(tmp_path, write(*good, name="good.jsonl"), max_length=200)
    assert [row["labels"].tolist() for row in data.train] == [row["labels"].tolist() for row in alone.train]
    assert data.train_parts[0].num_bad == 3
    assert "refuses the row: no tools" in data.train_parts[0].first_bad[-1]  # rows are rendered once all are read
    with pytest.raises(DataError, match="no tools"):
        samples_of(tmp_path, write(*good, refused), max_length=200)


def test_the_setting_is_a_part_of_what_the_samples_are_made_of(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(*GOOD)
    dropped, strict = (samples_of(tmp_path, path, on_bad_row=how) for how in ("drop", "error"))
    assert dropped.fingerprint != strict.fingerprint
    assert dropped.earlier_fingerprint is None and strict.earlier_fingerprint is not None
