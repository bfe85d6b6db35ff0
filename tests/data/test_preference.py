"""Rows with a chosen and a rejected answer."""

from __future__ import annotations

import pytest

from tests.data.conftest import rows_of, tokenised
from tests.data.test_rows import TOOL
from trainer.data.errors import DataError
from trainer.data.pairs import collate_pairs, preference_pairs

ASKED = [{"role": "user", "content": "1 + 1?"}]
GOOD, BAD = [{"role": "assistant", "content": "2"}], [{"role": "assistant", "content": "3"}]
EARLIER = [*ASKED, *GOOD, {"role": "user", "content": "sure?"}]
TEXTS = {"prompt": "1 + 1 is ", "chosen": "2", "rejected": "3"}


def contents(row):
    return [message["content"] for message in row.messages]


def test_texts_are_verbatim(write):
    (row,) = rows_of(write(TEXTS))
    assert (row.prompt, row.answer, row.verbatim) == ("1 + 1 is ", "2", True)
    assert (row.rejected.prompt, row.rejected.answer, row.rejected.verbatim) == ("1 + 1 is ", "3", True)


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
    assert contents(found.rejected) == ["1 + 1?", "2", "sure?", "3"] and found.rejected.trains == (False, True)


def test_a_text_before_messages_is_what_the_user_says(write):
    (row,) = rows_of(write({"prompt": "1 + 1?", "chosen": GOOD, "rejected": BAD}))
    assert contents(row) == ["1 + 1?", "2"] and contents(row.rejected) == ["1 + 1?", "3"]


def test_system_and_tools_belong_to_both(write):
    row = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "system": "be short", "tools": [TOOL]}
    (chosen,) = rows_of(write(row))
    for found in (chosen, chosen.rejected):
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
        ({"chosen": "a", "rejected": "b"}, "prompt: null, but texts need it: write there what both answers continue"),
        ({**TEXTS, "rejected": None}, "rejected: null, so that the row states no preference"),
        ({"prompt": ASKED, "chosen": None, "rejected": BAD}, "chosen: null, so that the row states no preference"),
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


# Both answers, for loops of one's own.


def half(pair, name, tokenizer):
    """The text of a half of a pair, and what of it is trained on."""
    ids, labels = pair[f"{name}_input_ids"].tolist(), pair[f"{name}_labels"].tolist()
    targets = [label for label in labels if label != -100]
    assert [token for token, label in zip(ids, labels, strict=True) if label != -100] == targets
    return tokenizer.decode(ids), tokenizer.decode(targets)


def test_pairs_have_the_samples_of_a_run_and_those_of_the_other_answer(write, tmp_path, tokenizer):
    talk = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
    path = write(TEXTS, talk, {**TEXTS, "chosen": "7", "rejected": "88"})
    pairs = preference_pairs(str(path), tokenizer, max_length=100)
    run = tokenised(tmp_path, tokenizer, path).train
    assert len(pairs) == len(run) == 3
    for pair, sample in zip(pairs, run, strict=True):
        assert pair["chosen_input_ids"].tolist() == sample["input_ids"].tolist()
        assert pair["chosen_labels"].tolist() == sample["labels"].tolist()
    assert half(pairs[0], "rejected", tokenizer) == ("1 + 1 is 3<|eos|>", "3<|eos|>")
    assert half(pairs[1], "rejected", tokenizer) == ("<|user|>1 + 1?<|assistant|>3<|eos|>", "3<|eos|>")
    batch = collate_pairs([pairs[0], pairs[2]], pad_id=tokenizer.pad_token_id or 0)
    assert batch["input_ids"].shape == (4, len("1 + 1 is 88") + 1)
    decoded = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert decoded == [f"1 + 1 is {answer}<|eos|>" for answer in ("2", "7", "3", "88")]
    assert [int((labels != -100).sum()) for labels in batch["labels"]] == [2, 2, 2, 3]


def test_a_pair_is_left_out_as_a_whole(write, tokenizer):
    rows = [{**TEXTS, "rejected": "3" * 40}, TEXTS, {**TEXTS, "chosen": ""}]
    (pair,) = preference_pairs(str(write(*rows)), tokenizer, max_length=20, overflow="drop")
    assert half(pair, "chosen", tokenizer)[1] == "2<|eos|>" and half(pair, "rejected", tokenizer)[1] == "3<|eos|>"
    (pair, other) = preference_pairs(str(write(*rows)), tokenizer, max_length=20)
    assert len(pair["rejected_input_ids"]) == 20, "cut, as in a run"


@pytest.mark.parametrize(
    ("rows", "settings", "problem"),
    [
        ([{"question": "a", "answer": "b"}], {}, r"column chosen, rejected missing"),
        ([{**TEXTS, "rejected": "2"}], {}, r"train\.jsonl:1: chosen, rejected: they are the same"),
        ([{**TEXTS, "hint": 1}], {}, r"train\.jsonl:1: has \{hint\}, which would not be in the sample"),
        ([TEXTS], {"max_length": 5, "overflow": "error"}, r"train\.jsonl:1: 11 tokens, data\.max_length is 5"),
        (
            [{**TEXTS, "chosen": ""}, {**TEXTS, "rejected": ""}],
            {},
            r"no row has two answers within data\.max_length=99",
        ),
    ],
)
def test_pairs_that_cannot_be_made_are_refused(rows, settings, problem, write, tokenizer):
    with pytest.raises(DataError, match=problem):
        preference_pairs(str(write(*rows)), tokenizer, **{"max_length": 99, **settings})
