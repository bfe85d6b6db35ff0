import json

import pytest
from transformers import AutoTokenizer

from trainer.config.schema import ModelConfig
from trainer.data.errors import DataError
from trainer.data.tokenizer import (
    add_tokens,
    bytes_tokenizer,
    describe_new_tokens,
    load_run_tokenizer,
    load_tokenizer,
    new_ids,
    padding_id,
    tokenizer_identity,
)

TEXTS = [
    "plain",
    " leading, trailing \r\n\t ",
    "naïve café, 東京, 🎉👩‍👩‍👧, e\u0301, \ufeff\x00\x7f\u2028",
    "marks <|eos|><|user|> spelled out",
    "".join(map(chr, range(0x250))),
]
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "héllo"},
    {"role": "assistant", "content": "first 🎉"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "sécond é"},
]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(text):
    tokenizer = bytes_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_id_of_a_byte_is_its_value_and_nothing_is_added():
    tokenizer = bytes_tokenizer()
    every_character_of_one_or_two_bytes = "".join(map(chr, range(0x800)))
    assert tokenizer(every_character_of_one_or_two_bytes)["input_ids"] == list(
        every_character_of_one_or_two_bytes.encode()
    )
    assert len(tokenizer) == 261
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (256, 257, None)


def test_saved_and_opened_again_it_is_the_same(tmp_path):
    tokenizer = bytes_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for reopened in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert [reopened(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
        assert [reopened.decode(reopened(text)["input_ids"]) for text in TEXTS] == TEXTS
        assert reopened.chat_template == tokenizer.chat_template
        assert (reopened.pad_token_id, reopened.eos_token_id, len(reopened)) == (256, 257, 261)


def test_the_chat_template_marks_what_the_assistant_says_and_its_end():
    tokenizer = bytes_tokenizer()
    encoded = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(encoded["input_ids"]) == (
        "<|system|>be brief<|user|>héllo<|assistant|>first 🎉<|eos|><|user|>and?<|assistant|>sécond é<|eos|>"
    )
    marked = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "first 🎉<|eos|>sécond é<|eos|>"


def test_the_generation_prompt_is_how_an_answer_begins():
    tokenizer = bytes_tokenizer()
    prompt = tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>be brief<|user|>héllo<|assistant|>"
    assert tokenizer.apply_chat_template(MESSAGES[:3], tokenize=False).startswith(prompt)


def test_bytes_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("bytes").get_vocab() == bytes_tokenizer().get_vocab()


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "a/b/c"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(DataError, match=r"model\.tokenizer: no such folder: '.*(missing|a/b/c).*'bytes'"):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match=r"model\.tokenizer: no readable tokenizer in '.*give a folder with"):
        load_tokenizer(str(tmp_path))


def test_a_hub_name_that_cannot_be_had_is_named_without_long_retries(monkeypatch):
    from huggingface_hub import HfApi

    def refuse(self, name, *, timeout):
        raise OSError(f"no route to the hub for {name} within {timeout} s")

    monkeypatch.setattr(HfApi, "model_info", refuse)  # the suite must not depend on a network being there or not
    with pytest.raises(DataError, match=r"'nobody/nothing' is not a local folder.*no route to the hub"):
        load_tokenizer("nobody/nothing")


def test_the_padding_id_falls_back_to_the_end_of_text():
    tokenizer = bytes_tokenizer()
    assert padding_id(tokenizer) == 256
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == 257
    tokenizer.eos_token = None
    assert padding_id(tokenizer) == 0
    assert tokenizer.pad_token is None


def merging(merges=(("a", "b"),), **options):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "<s>": 5}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges))), bos_token="<s>", **options
    )


def test_the_identity_of_a_tokenizer_is_that_of_what_it_does(tmp_path):
    identity = tokenizer_identity(bytes_tokenizer())
    assert json.loads(json.dumps(identity)) == identity
    bytes_tokenizer().save_pretrained(tmp_path)
    assert tokenizer_identity(load_tokenizer(str(tmp_path))) == identity
    used = bytes_tokenizer()
    used("a", truncation=True, max_length=4, padding="max_length")
    assert tokenizer_identity(used) == identity

    different = [bytes_tokenizer() for _ in range(3)]
    different[0].chat_template += " "
    different[1].eos_token = "<|pad|>"
    different[2].split_special_tokens = True  # Python's own; the backend does not save it
    others = [merging(), merging(merges=[("b", "c")]), *different]
    assert len({json.dumps(tokenizer_identity(other)) for other in [bytes_tokenizer(), *others]}) == 6


def test_python_tokenizers_that_share_a_vocabulary_are_told_apart(tmp_path):
    from transformers import BertJapaneseTokenizer, ByT5Tokenizer

    assert tokenizer_identity(ByT5Tokenizer()) == tokenizer_identity(ByT5Tokenizer())
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "A"]))
    found = [
        tokenizer_identity(
            BertJapaneseTokenizer(
                str(tmp_path / "vocab.txt"), word_tokenizer_type="basic", subword_tokenizer_type="character",
                do_lower_case=lower,
            )
        )
        for lower in (False, True, True)
    ]  # fmt: skip
    assert found[0]["core"] == found[1]["core"] and found[0] != found[1] == found[2]


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (
            {"path": "nobody/nothing"},
            "model.path: 'nobody/nothing' .*; set model.tokenizer to .*; or give another model.path",
        ),
        (
            {"path": "x/y", "tokenizer": "nobody/nothing"},
            "model.tokenizer: 'nobody/nothing' .*; give a folder, a Hub name",
        ),
        ({"path": "./missing"}, "model.path: no such folder: 'missing'; set model.tokenizer to a folder"),
    ],
)
def test_the_key_that_the_user_set_is_named(monkeypatch, model, problem):
    from huggingface_hub import HfApi

    def refuse(self, name, *, timeout):
        raise OSError("no route")

    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(DataError, match=f"^{problem}"):
        load_run_tokenizer(ModelConfig(**model))


def test_added_tokens_are_one_id_wherever_they_stand_and_part_of_the_identity(tmp_path):
    tokenizer = bytes_tokenizer()
    assert add_tokens(tokenizer, ["<call>", "a", "</call>"]) == new_ids(tokenizer) == range(261, 263)
    assert tokenizer("a<call>b</call>")["input_ids"] == [97, 261, 98, 262]
    assert tokenizer.decode([261, 97], skip_special_tokens=True) == "<call>a", "they are no control tokens"
    assert describe_new_tokens(tokenizer, ["<call>", "a", "</call>"]) == [
        "model.add_tokens: 2 new tokens, ids 261 to 262; the tokenizer has 'a' already"
    ]
    assert tokenizer_identity(tokenizer) != tokenizer_identity(bytes_tokenizer())
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert tokenizer_identity(again) == tokenizer_identity(tokenizer) and new_ids(again) == range(0)
    assert add_tokens(again, ["<call>"]) == range(263, 263) and not new_ids(again)
    loaded = load_run_tokenizer(ModelConfig(path=str(tmp_path), add_tokens=("<call>", "<end>")))
    assert new_ids(loaded) == range(263, 264)


def test_added_tokens_are_found_without_a_space_before_them():
    """Tokenizers as Llama 2's put a space before a text, and would put one before the token."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"\u2581": 0, "a": 1, "<unk>": 2}, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    add_tokens(tokenizer, ["<call>"])
    assert tokenizer("a<call>")["input_ids"][-1] == 3 and tokenizer("a <call>a")["input_ids"].count(3) == 1


def test_tokens_are_added_to_tokenizers_in_python():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    size = len(tokenizer)
    assert add_tokens(tokenizer, ["<call>"]) == range(size, size + 1)
    assert tokenizer("a<call>", add_special_tokens=False)["input_ids"][-1] == size


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        (["<a>", "<a>"], "got '<a>' twice"),
        (["a\n"], "got 'a\\\\n' with a character that cannot be printed"),
        (["  "], "got '  ' of nothing but spaces"),
        ([""], "at least 1"),
    ],
)
def test_odd_tokens_are_refused(tokens, problem):
    with pytest.raises(ValueError, match=problem):
        ModelConfig(path="x", add_tokens=tokens)
