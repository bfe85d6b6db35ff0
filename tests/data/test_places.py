"""The tokens of what is trained on are the same however they are found, and so is what a template leaves out."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.templates import MARKED, TOKENS
from trainer.data import rendering
from trainer.data.answers import RefusedRow
from trainer.data.formats.base import Row
from trainer.data.places import Places
from trainer.data.shapes import Shapes
from trainer.data.tokenizer import bytes_tokenizer

TEXTS = [
    "<s>It's  A\u00c4a\u00e4 1234,56\t\n \u6771\u4eac \U0001f389<|im_end|>\n", "e\u0301 \ufb01 \u212b x", "", " ",
    "plain",
    "<|im_start|>\u6771<|im_end|>\u4eac\n\n  two  spaces ", "\U0001f389" * 3,
]  # fmt: skip


def trained(normalizer: Any = None, after: Any = None, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges, some of which end inside a character."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    core.post_processor = after
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS * 20, trainers.BpeTrainer(vocab_size=330, special_tokens=TOKENS, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def word_pieces() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram([("a", -1.0), ("\u2581", -2.0), ("?", -9.0)], unk_id=2))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="?")


TOKENIZERS: dict[str, tuple[PreTrainedTokenizerFast, bool]] = {
    "bytes": (bytes_tokenizer(), True),
    "merges": (trained(), True),
    "merges across words": (trained(use_regex=False), True),
    "composed": (trained(normalizers.NFC()), True),
    "not trimmed": (trained(after=processors.ByteLevel(trim_offsets=False)), True),
    "trimmed": (trained(after=processors.ByteLevel(trim_offsets=True)), False),
    "lower case": (trained(normalizers.Lowercase()), False),
    "pieces": (word_pieces(), False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_lengths_and_places_find_the_same_tokens(name: str) -> None:
    tokenizer, by_length = TOKENIZERS[name]
    places = Places(tokenizer)
    assert (places._lengths is not None) == by_length
    for text in TEXTS:
        spans = [(start, end) for start in range(len(text) + 1) for end in range(start, len(text) + 1)]
        ((ids, slices),) = places.find([text], [spans])
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ids.tolist() == whole["input_ids"]
        for (start, end), part in zip(spans, slices, strict=True):
            overlap = [index for index, (s, e) in enumerate(whole["offset_mapping"]) if s < end and e > start]
            assert list(range(len(ids)))[part] == overlap, (text, start, end)


TALKS = [
    ("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant", "user", "assistant"),
    ("user", "user"), ("assistant", "user", "assistant"), ("critic",),
]  # fmt: skip
CONTENTS = ["a", " b ", "", "user", "<think>x</think>y", "assistant\n", "a</think>", "A\n", "[INST]"]
CUT = (
    "{% for m in messages %}{{ m.role + ':' + m.content[:5] }}{% endfor %}",
    "{% for m in messages if m.role != 'system' or m.content != 'a' %}{{ m.role + m.content | trim }}{% endfor %}",
    "{% for m in messages %}{{ m.role + m.content.split('</think>')[-1] | upper }}{% endfor %}",
)


@pytest.mark.parametrize("template", [*MARKED.values(), *CUT], ids=[*MARKED, "cut", "without", "thoughtless"])
def test_known_shapes_change_nothing(template: str) -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": TOKENS})
    shapes, known = Shapes(), 0
    for first in CONTENTS:
        for second in CONTENTS:
            for roles in TALKS:
                messages = [{"role": role, "content": (first, second)[index % 2]} for index, role in enumerate(roles)]
                row = Row("here", messages=tuple(messages), trains=(True,) * roles.count("assistant"))
                said = []
                for given in (Shapes(), shapes):
                    try:
                        said.append(str(rendering.render(row, tokenizer, template, TOKENS, given)))
                    except RefusedRow as refused:
                        said.append(str(refused))
                assert said[0] == said[1]
                known += (
                    shapes.explain(row, template, rendering.write(row, tokenizer, template)[0])
                    if (not said[0].startswith("the tokenizer"))
                    else 0
                )
    assert known > 20 or template in CUT
