"""Rows with a chosen and a rejected answer."""

from __future__ import annotations

import pytest

from tests.data.conftest import rows_of, tokenised
from tests.data.test_rows import TOOL
from trainer.data.errors import DataError
from trainer.data.formats.preference import read_pair

ASKED = [{"role": "user", "content": "1 + 1?"}]
GOOD, BAD = [{"role": "assistant", "content": "2"}], [{"role": "assistant", "content": "3"}]
EARLIER = [*ASKED, *GOOD, {"role": "user", "content": "sure?"}]
TEXTS = {"prompt": "1 + 1 is ", "chosen": "2", "rejected": "3"}


def contents(row):
    return [message["content"] for message in row.messages]


def test_texts_are_verbatim(write):
    (row,) = rows_of(write(TEXTS))
    assert (row.prompt, row.answer, row.verbatim) == ("1 + 1 is ", "2", True)
    chosen, rejected = read_pair("here", TEXTS)
    assert chosen.answer == "2" and (rejected.prompt, rejected.answer) == ("1 + 1 is ", "3")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": EARLIER, "chosen": GOOD, "rejected": BAD},
        {"chosen": [*EARLIER, *GOOD], "rejected": [*EARLIER, *BAD]},
        {"prompt": "sure?", "chosen": [*EARLIER, *GOOD], "rejected": [*EARLIER, *BAD]},
        {"prompt": None, "chosen": [*EARLIER, *GOOD], "rejected": [*EARLIER, *BAD], "score": None},
    ],
    ids=["prompt", "in both", "text of the last message", "null"],
)
def test_conversations_in_every_spelling_of_the_prompt(row, write):
    """Only the answer trains: neither prompt nor what the assistant said in it."""
    (found,) = rows_of(write(row))
    assert contents(found) == ["1 + 1?", "2", "sure?", "2"] and found.trains == (False, True)
    chosen, rejected = read_pair("here", row)
    assert chosen.messages == found.messages
    assert contents(rejected) == ["1 + 1?", "2", "sure?", "3"] and rejected.trains == (False, True)


def test_system_and_tools_belong_to_both(write):
    row = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "system": "be short", "tools": [TOOL]}
    for found in (*rows_of(write(row)), *read_pair("here", row)):
        assert found.messages[0] == {"role": "system", "content": "be short"} and found.tools == (TOOL,)


def test_a_run_trains_on_what_was_chosen(write, tmp_path, tokenizer):
    found = tokenised(tmp_path, tokenizer, write({"prompt": ASKED, "chosen": GOOD, "rejected": BAD}))
    (sample,) = found.train
    targets = [token for token, label in zip(sample["input_ids"], sample["labels"], strict=True) if label != -100]
    assert tokenizer.decode(targets).startswith("2") and "3" not in tokenizer.decode(sample["input_ids"])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({**TEXTS, "rejected": "2"}, "chosen, rejected: they are the same, so that the row states no preference"),
        ({**TEXTS, "chosen": GOOD}, "all must be texts, or all lists of messages"),
        ({**TEXTS, "prompt": ASKED}, "all must be texts, or all lists of messages"),
        ({"chosen": "a", "rejected": "b"}, "prompt: null, but a non-empty string is needed"),
        ({**TEXTS, "system": "s"}, 'system: string "s", for which a row of texts has no place'),
        ({"chosen": GOOD, "rejected": BAD}, "conversations without a prompt must begin with the same messages"),
        (
            {"prompt": "another", "chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]},
            'prompt: string "another", but the last message that chosen and rejected share is string "1 + 1?"',
        ),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": ASKED}, "rejected: no message with role 'assistant'"),
        ({"prompt": ASKED, "chosen": [1], "rejected": BAD}, r"chosen[0]: number 1, but {role, content} is needed"),
        ({**TEXTS, "score_chosen": 9}, "score_chosen"),
    ],
)
def test_what_states_no_preference_is_refused(row, problem, write, tmp_path, tokenizer):
    with pytest.raises(DataError) as refused:
        tokenised(tmp_path, tokenizer, write(row))
    assert "train.jsonl" in str(refused.value) and problem in str(refused.value)
