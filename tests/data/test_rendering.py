"""trainer/data/encode.py: rows as text, their targets, and samples that are too long."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.data.files import tokenize
from trainer.data.encode import Report
from trainer.data.errors import DataError
from trainer.data.tokenizer import bytes_tokenizer

CHAT = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hé"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "yes"},
    ]
}


def texts(sample, tokenizer):
    """Return the whole text of a sample, and its targets."""
    ids, labels = sample["input_ids"], sample["labels"]
    assert ids.dtype == labels.dtype == np.int32
    assert set(labels[labels != ids].tolist()) <= {-100}
    return tokenizer.decode(ids), tokenizer.decode(labels[labels != -100])


def merging_tokenizer(**special):
    """Build a tokenizer of four letters with one merge, across the border ("b" and "c"), and <s> before each text."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "d": 5, "bc": 6}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


# Rendering and masks


@pytest.mark.parametrize(
    ("row", "whole", "target"),
    [
        ({"question": "Why?", "answer": "So."}, "Question: Why?\nAnswer: So.<|eos|>", "So.<|eos|>"),
        ({"prompt": "a b ", "completion": " é\n", "id": 3}, "a b  é\n<|eos|>", " é\n<|eos|>"),
        ({"prompt": "a", "completion": "b<|eos|>"}, "ab<|eos|>", "b<|eos|>"),
        (
            CHAT,
            "<|user|>hi<|assistant|>hé<|eos|><|user|>and?<|assistant|>yes<|eos|>",
            "hé<|eos|>yes<|eos|>",
        ),
    ],
    ids=["question", "prompt", "own-end", "messages"],
)
def test_a_row_is_rendered_with_the_loss_on_the_answer_only(write, tokenizer, row, whole, target):
    samples, report = tokenize(write(row), tokenizer)
    assert [texts(sample, tokenizer) for sample in samples] == [(whole, target)]
    targets = len(tokenizer(target)["input_ids"])
    assert report == Report(1, 0, 0, tokens=len(tokenizer(whole)["input_ids"]), target_tokens=targets)


def test_prompt_and_answer_are_tokenised_apart_and_bos_is_the_tokenizers_own(write):
    tokenizer = merging_tokenizer(bos_token="<s>", eos_token="</s>")
    assert tokenizer("abcd")["input_ids"] == [0, 2, 6, 5]
    path = write({"prompt": "ab", "completion": "cd"}, {"prompt": "<s>ab", "completion": "cd</s>"})
    samples, _ = tokenize(path, tokenizer)
    for sample in samples:
        assert sample["input_ids"].tolist() == [0, 2, 3, 4, 5, 1]
        assert sample["labels"].tolist() == [-100, -100, -100, 4, 5, 1]


def test_a_tokenizer_without_an_end_of_text_is_refused(write):
    with pytest.raises(DataError, match=r"model\.tokenizer: has no end-of-text token"):
        tokenize(write({"prompt": "ab", "completion": "cd"}), merging_tokenizer(bos_token="<s>"))


def test_a_template_without_marks_is_patched_by_trl_or_understood(write):
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = qwen2_5_chat_template
    samples, _ = tokenize(write(CHAT), tokenizer)
    target = texts(samples[0], tokenizer)[1]
    assert target.replace("\n", "") == "hé<|im_end|>yes<|im_end|>"  # TRL counts the line breaks around as targets too

    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    samples, _ = tokenize(write(CHAT), tokenizer)
    assert texts(samples[0], tokenizer)[1] == "hé<|eos|>yes<|eos|>"

    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + messages | length | string }}{% endfor %}"
    with pytest.raises(DataError, match=r"message 2 of 4: cannot tell.*{% generation %}.*chat_template\.jinja"):
        tokenize(write(CHAT), tokenizer)

    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"model\.tokenizer: has no chat template.*{prompt, completion}"):
        tokenize(write(CHAT), tokenizer)


def test_a_row_that_the_template_refuses_is_named(write, tokenizer):
    with pytest.raises(DataError, match=r"train\.jsonl:2: .*unknown role 'critic'"):
        tokenize(write(CHAT, {"messages": [*CHAT["messages"], {"role": "critic", "content": "x"}]}), tokenizer)


def test_the_first_token_is_no_target_even_where_it_has_a_label(write):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    path = write(*[{"messages": [{"role": "assistant", "content": content}]} for content in ("abc", "d")])
    samples, report = tokenize(path, tokenizer)
    assert [sample["labels"].tolist() for sample in samples] == [[-100, *b"bc"]]
    assert report == Report(samples=1, truncated=0, dropped=1, tokens=3, target_tokens=2)


# Over-long samples. "ab" + "c" * n + end: 3 + n tokens


def long_rows(write):
    return write(*[{"prompt": prompt, "completion": "c" * 4} for prompt in ("ab", "abab", "abababab")])


def test_truncation_cuts_the_end_and_drops_what_keeps_no_target(write, tokenizer):
    samples, report = tokenize(long_rows(write), tokenizer, max_length=7)
    assert [texts(sample, tokenizer) for sample in samples] == [("abcccc<|eos|>", "cccc<|eos|>"), ("ababccc", "ccc")]
    assert report == Report(samples=2, truncated=1, dropped=1, tokens=14, target_tokens=8)


def test_drop_leaves_long_samples_out(write, tokenizer):
    samples, report = tokenize(long_rows(write), tokenizer, max_length=8, overflow="drop")
    assert [texts(sample, tokenizer)[0] for sample in samples] == ["abcccc<|eos|>"]
    assert report == Report(samples=1, truncated=0, dropped=2, tokens=7, target_tokens=5)


def test_error_lists_the_long_samples(write, tokenizer):
    path = long_rows(write)
    with pytest.raises(DataError) as error:
        tokenize(path, tokenizer, max_length=8, overflow="error")
    assert error.value.problems[:2] == [
        f"{path}:2: 9 tokens, data.max_length is 8",
        f"{path}:3: 13 tokens, data.max_length is 8",
    ]
    assert "data.overflow" in error.value.problems[2]
    assert tokenize(path, tokenizer, max_length=13, overflow="error")[1].samples == 3


@pytest.mark.parametrize("overflow", ["truncate", "drop"])
def test_no_sample_left_is_an_error(write, tokenizer, overflow):
    with pytest.raises(DataError, match=r"none of 3 samples is left.*data\.max_length=2.*raise data\.max_length"):
        tokenize(long_rows(write), tokenizer, max_length=2, overflow=overflow)
