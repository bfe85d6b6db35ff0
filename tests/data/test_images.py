"""Rows with images: how they are read, what is trained on, what a batch contains, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trainer.data.build
from tests.multimodal import PROCESSORS, Given, drawn, gemma3_processor, prepared, write_images
from trainer.config.schema import ModelConfig, TrainSource
from trainer.data.batches import collate
from trainer.data.cache import tokenise
from trainer.data.errors import DataError
from trainer.data.pictures import Pictures, run_pictures
from trainer.data.show import describe, shown
from trainer.data.tokenizer import load_run_tokenizer, padding_id

ANSWER = {"role": "assistant", "content": "grey"}
PATH = {"type": "image", "path": "a.png"}


def write(folder: Path, *contents: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": content}, ANSWER]} for content in contents]
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("family", PROCESSORS)
def test_tokens_are_the_processor_s_and_answers_alone_are_targets(tmp_path: Path, family: str) -> None:
    processor = PROCESSORS[family]()
    path = write_images(tmp_path)
    data = prepared(tmp_path, processor)
    decode = processor.tokenizer.decode
    for line, sample in zip(path.read_text().splitlines(), data.train, strict=True):
        user, answer = json.loads(line)["messages"]
        content = user["content"] if isinstance(user["content"], list) else [{"type": "text", "text": user["content"]}]
        number = int(content[-1]["text"].split()[3].strip("?"))
        picture = drawn(number, 12 + number % 9, 16 + number % 5)
        parts = [{"type": "image", "image": picture} if part["type"] != "text" else part for part in content]
        conversation = [
            {"role": "user", "content": parts},
            {**answer, "content": [{"type": "text", "text": answer["content"]}]},
        ]
        options = {"tokenize": True, "return_dict": True}
        (expected,) = processor.apply_chat_template(
            conversation, processor_kwargs={"add_special_tokens": False}, **options
        )["input_ids"]
        assert sample["input_ids"].tolist() == list(expected)
        targets = [token for token in sample["labels"].tolist() if token != -100]
        assert decode(targets) == answer["content"] + "<|eos|>"


@pytest.mark.parametrize("family", PROCESSORS)
def test_a_batch_is_what_the_processor_makes_of_all_its_images(tmp_path: Path, family: str) -> None:
    processor = PROCESSORS[family]()
    write_images(tmp_path)
    data, pictures = prepared(tmp_path, processor), Given(processor)
    place = data.train_parts[0].places
    make = partial(pictures.add, collate=partial(collate, pad_id=padding_id(processor.tokenizer)))
    chosen = [data.train[index] for index in (1, 2, 0)]  # an image, none, two
    batch = make(chosen, [place] * 3)
    texts = [json.loads(chosen[index]["images"])["text"] for index in (0, 2)]
    sizes = {number: (12 + number % 9, 16 + number % 5) for number in (0, 1)}
    images = [[drawn(1, *sizes[1])], [drawn(0, *sizes[0])] * 2]
    whole = processor(text=texts, images=images, add_special_tokens=False, padding=True, return_tensors="pt")
    of_tokens = next(name for name in whole if name.endswith("token_type_ids"))
    for name in whole.keys() - {"input_ids", "attention_mask", of_tokens}:
        assert torch.equal(batch[name], whole[name]), name
    for row, (sample, theirs) in enumerate(zip(chosen, (0, None, 1), strict=True)):
        length = len(sample["input_ids"])
        kinds = torch.zeros(length) if theirs is None else whole[of_tokens][theirs, :length]
        assert torch.equal(batch[of_tokens][row, :length], kinds.to(batch[of_tokens].dtype))
        assert not batch[of_tokens][row, length:].any() and int(batch["attention_mask"][row].sum()) == length
    assert make(chosen, [place] * 3, dtype=torch.bfloat16)["pixel_values"].dtype == torch.bfloat16
    # Without any image: one of a single colour, behind the shortest row.
    alone = make([data.train[index] for index in (2, 5)], [place] * 2)
    shortest = min((2, 5), key=lambda index: len(data.train[index]["input_ids"]))
    row, length = (2, 5).index(shortest), len(data.train[shortest]["input_ids"])
    assert alone["pixel_values"].unique().numel() <= 3  # a channel each
    assert (alone["labels"][row, length:] == -100).all() and alone[of_tokens][row, length:].any()
    assert not alone[of_tokens][1 - row].any()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([PATH], r"the image 'a\.png' cannot be read: No such file or directory"),
        ([{"type": "image", "path": "damaged.png"}], r"the image 'damaged\.png' is damaged, or no image"),
        ([{"type": "image", "path": "cut.png"}], r"the image 'cut\.png' is damaged, or no image"),
        ([{"type": "image", "path": "."}], r"the image '\.' cannot be read: Is a directory"),
        ([{"type": "image", "path": "a\0b"}], r"the image .* cannot be read: embedded null byte"),
        ([{"type": "image", "base64": "aGk="}], r"the image in the row is damaged, or no image"),
        ([{"type": "image", "base64": "?"}], r"messages\[0\]\.content\[0\]\.base64: is not base64"),
        (
            [{"type": "image"}],
            r"messages\[0\]\.content\[0\]: \{type\}, but \{type: image, path \| url \| image \| base64\}",
        ),
        ([{**PATH, "base64": "aGk="}], r"content\[0\]: \{type, path, base64\}, but .* with one of these keys"),
        ([{"type": "image", "path": 7}], r"content\[0\]\.path: number 7, but \{type: image"),
        ([{"type": "image", "url": "https://a.b/c.png"}], r"url: 'https://a\.b/c\.png' is not fetched; download"),
        ([{"type": "image_url", "image_url": {}}], r"content\[0\]: \{url\}, but \{type: image"),
        (
            [{"type": "video", "path": "a.mp4"}],
            r"content\[0\]: \{type, path\} of type 'video', but \{type: text, text\} or",
        ),
        ([{"type": "text", "text": "a\ufdd0b"}], r"content\[0\]\.text: contains the character U\+FDD0"),
        (
            [{"type": "image", "path": "good.png"}, {"type": "text", "text": "<|user|>"}],
            r"spells control tokens, which",
        ),
        (
            [{"type": "image", "path": "good.png"}, {"type": "text", "text": "<|boi|>"}],
            r"the model's processor refuses the row: .*Found total 2 <\|boi\|> tokens and 1 images",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named_or_dropped(tmp_path: Path, content: Any, said: str) -> None:
    drawn(0).save(tmp_path / "good.png")
    (tmp_path / "damaged.png").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    write(tmp_path, [{"type": "image", "path": "good.png"}], content, "hello")
    with pytest.raises(DataError, match=rf"^\S+images\.jsonl:2: .*{said}") as caught:
        prepared(tmp_path, gemma3_processor())
    assert "\n" not in str(caught.value)
    data = prepared(tmp_path, gemma3_processor(), on_bad_row="drop")
    assert len(data.train) == 2 and data.train_parts[0].num_bad == 1


def test_images_are_refused_where_nothing_reads_them(tmp_path: Path) -> None:
    processor = gemma3_processor()
    drawn(0).save(tmp_path / "a.png")
    write(tmp_path, [PATH])
    with pytest.raises(DataError, match=r"images\.jsonl:1: has an image, and the model reads text only"):
        tokenise(
            train=[TrainSource(path=str(tmp_path / "images.jsonl"))],
            eval=(),
            eval_fraction=0.0,
            tokenizer=processor.tokenizer,
            max_length=64,
            overflow="truncate",
            packing=False,
            cache=tmp_path / "cache",
            seed=0,
        )
    processor.tokenizer.save_pretrained(tmp_path / "text")
    with pytest.raises(DataError, match=r"model\.tokenizer: the rows have images, and .*/text' has no processor that"):
        prepared(tmp_path, processor, pictures=Pictures(str(tmp_path / "text")))
    with pytest.raises(
        DataError, match=r"data\.packing: true, but \S+images\.jsonl:1 has an image; set data\.packing=false"
    ):
        prepared(tmp_path, processor, packing=True)


def test_images_of_the_assistant_are_no_targets(tmp_path: Path) -> None:
    processor = gemma3_processor()
    drawn(0).save(tmp_path / "a.png")
    messages = [
        {"role": "user", "content": "draw"},
        {"role": "assistant", "content": [{"type": "text", "text": "see"}, PATH]},
    ]
    (tmp_path / "images.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (sample,) = prepared(tmp_path, processor).train
    targets = [token for token in sample["labels"].tolist() if token != -100]
    assert processor.tokenizer.decode(targets) == "see<|eos|>"
    assert "<|image|>" in processor.tokenizer.decode(sample["input_ids"])


def test_no_image_is_cut(tmp_path: Path) -> None:
    drawn(0).save(tmp_path / "a.png")
    write(
        tmp_path,
        [PATH, {"type": "text", "text": "a long question about it"}],
        [{"type": "text", "text": "a" * 40}, PATH],
    )
    whole = [len(sample["input_ids"]) for sample in prepared(tmp_path, gemma3_processor()).train]
    data = prepared(tmp_path, gemma3_processor(), max_length=whole[0] - 2)
    assert (data.train_report.samples, data.train_report.truncated, data.train_report.dropped) == (1, 1, 1)
    # Also where an answer comes before it.
    turns = [{"role": "user", "content": "hi"}, ANSWER, {"role": "user", "content": [PATH]}, ANSWER]
    with (tmp_path / "images.jsonl").open("a") as file:
        file.write(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match="none of 3 samples is left"):
        prepared(tmp_path, gemma3_processor(), max_length=14)


def test_an_image_that_has_changed_is_refused(tmp_path: Path) -> None:
    processor = gemma3_processor()
    write_images(tmp_path)
    data, pictures = prepared(tmp_path, processor), Given(processor)
    place = data.train_parts[0].places

    def batch() -> Any:
        return pictures.add([data.train[0]], [place], partial(collate, pad_id=0))

    batch()
    drawn(99).save(tmp_path / "drawn" / "0.png")
    with pytest.raises(DataError, match=r"0\.png: is not the image of which the cached tokens were made; put that one"):
        batch()
    (tmp_path / "drawn" / "0.png").unlink()
    with pytest.raises(DataError, match=r"0\.png: the image cannot be read any more \(No such file or directory\)"):
        batch()


def test_other_settings_of_the_processor_are_another_cache(tmp_path: Path) -> None:
    write_images(tmp_path)
    gemma3_processor().save_pretrained(tmp_path / "model")
    first = prepared(tmp_path, gemma3_processor(), pictures=Pictures(str(tmp_path / "model")))
    file = tmp_path / "model" / "processor_config.json"
    file.write_text(file.read_text().replace('"image_seq_length": 4', '"image_seq_length": 9'))
    second = prepared(tmp_path, gemma3_processor(), pictures=Pictures(str(tmp_path / "model")))
    assert first.fingerprint != second.fingerprint
    assert len(second.train[0]["input_ids"]) == len(first.train[0]["input_ids"]) + 10  # two images


def test_new_tokens_are_tokens_beside_images_too(tmp_path: Path) -> None:
    drawn(0).save(tmp_path / "a.png")
    text = {"type": "text", "text": "is it a <door>?"}
    write(tmp_path, [PATH, text], [text])
    gemma3_processor().save_pretrained(tmp_path / "model")
    config = ModelConfig(path=str(tmp_path / "model"), add_tokens=("<door>",))
    processor = gemma3_processor()
    processor.tokenizer = load_run_tokenizer(config)
    data = prepared(tmp_path, processor, pictures=run_pictures(config))
    new = len(gemma3_processor().tokenizer)
    assert [sample["input_ids"].tolist().count(new) for sample in data.train] == [1, 1]


def test_show_says_where_images_are(tmp_path: Path) -> None:
    processor = gemma3_processor()
    write_images(tmp_path)
    data = prepared(tmp_path, processor)
    lines = shown(data, processor.tokenizer, 3, colour=False)
    assert lines.count(f"image 2: {tmp_path}/drawn/0.png") == 1 and sum("image 1: " in line for line in lines) == 2
    assert "⟦" in "".join(lines) and "<|image|>" in "".join(lines)
    assert "; 16 samples have images" in describe(data, 200)[0]


def test_text_that_spells_the_place_of_an_image_is_refused_beside_images(tmp_path: Path) -> None:
    drawn(0).save(tmp_path / "a.png")
    write(tmp_path, "what is <|image|>?")
    assert len(prepared(tmp_path, gemma3_processor()).train) == 1
    write(tmp_path, [PATH], "what is <|image|>?")
    with pytest.raises(
        DataError, match=r"images\.jsonl: sample 2 spells <\|image\|>, the place of an image, without one"
    ):
        prepared(tmp_path, gemma3_processor())


def test_sources_with_and_without_images_are_mixed(tmp_path: Path) -> None:
    processor = gemma3_processor()
    write_images(tmp_path)
    (tmp_path / "text.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}, ANSWER]}) + "\n")
    sources = [TrainSource(path=str(tmp_path / name)) for name in ("text.jsonl", "images.jsonl")]
    data = tokenise(
        train=sources, eval=(), eval_fraction=0.0, tokenizer=processor.tokenizer, max_length=200, overflow="truncate",
        packing=False, cache=tmp_path / "cache", seed=0, pictures=Given(processor),
    )  # fmt: skip
    places = data.train_parts[1].places
    batch = Given(processor).add([data.train[0], data.train[1]], [places] * 2, partial(collate, pad_id=0))
    assert batch["pixel_values"].shape[0] == 2 and not np.any(batch["token_type_ids"][0].numpy())


def test_templates_that_read_parts_alone_write_plain_texts_too(tmp_path: Path) -> None:
    """As those of Idefics 3 and SmolVLM."""
    processor = gemma3_processor()
    parts = "{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}"
    template = "{%- for message in messages -%}<|{{ message['role'] }}|>" + parts + "{{ eos_token }}{%- endfor -%}"
    processor.tokenizer.chat_template = template
    write(tmp_path, "hello")
    (sample,) = prepared(tmp_path, processor).train
    assert processor.tokenizer.decode(sample["input_ids"]) == "<|user|>hello<|eos|><|assistant|>grey<|eos|>"


@pytest.mark.parametrize("spelling", ["messages", "prompt", "preference"])
def test_images_in_a_column_beside_the_messages_are_in_their_places(tmp_path: Path, spelling: str) -> None:
    """As in TRL's data sets."""
    processor = gemma3_processor()
    write_images(tmp_path)
    files = ["drawn/1.png", "drawn/2.png"]
    place, words = {"type": "image"}, {"type": "text", "text": "which is darker?"}
    asked = {"role": "user", "content": [place, words, place]}
    rows = {
        "messages": {"messages": [asked, ANSWER]},
        "prompt": {"prompt": [asked], "completion": [ANSWER]},
        "preference": {"prompt": [asked], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "black"}]},
    }
    filled = [{"type": "image", "path": file} for file in files]
    whole = {"messages": [{"role": "user", "content": [filled[0], words, filled[1]]}, ANSWER]}
    found = []
    for row in ({**rows[spelling], "images": files}, whole):
        (tmp_path / "images.jsonl").write_text(json.dumps(row) + "\n")
        found.append(prepared(tmp_path, processor).train[0])
    assert found[0]["images"] == found[1]["images"]
    for name in ("input_ids", "labels"):
        assert np.array_equal(found[0][name], found[1][name])
    for images, number in ((files[:1], 1), ([*files, "c.png"], 3)):
        (tmp_path / "images.jsonl").write_text(json.dumps({**rows[spelling], "images": images}) + "\n")
        with pytest.raises(DataError, match=rf"images: {number}, but the messages have 2 parts \{{type: image\}} for"):
            prepared(tmp_path, processor)


def test_images_that_come_late_are_recorded_by_every_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of samples has been begun without a column for them; some are in the rows themselves."""
    processor = gemma3_processor()
    path = write_images(tmp_path)
    pictured = path.read_text().splitlines()
    texts = [json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, ANSWER]}) for n in range(60)]
    path.write_text("\n".join([*texts, *pictured, *texts]) + "\n")
    monkeypatch.setattr(trainer.data.build, "ROWS_PER_CHUNK", 4)
    monkeypatch.setattr("trainer.data.workers._MOST_IN_PROCESS", 1)
    monkeypatch.setattr("trainer.data.sample_files._TOKENS_PER_BATCH", 100)
    found = []
    for number in (1, 2):
        monkeypatch.setattr(trainer.data.build, "cores_of_process", lambda _, number=number: number)
        (folder := tmp_path / str(number)).mkdir()
        data = prepared(tmp_path, processor, cache=folder)
        found.append([{name: value for name, value in sample.items()} for sample in data.train])
        assert len(list(data.train_parts[0].places.inline.iterdir())) == 8
    assert len(found[0]) == len(found[1]) == 120 + len(pictured)
    for one, other in zip(*found, strict=True):
        assert one["images"] == other["images"] and np.array_equal(one["input_ids"], other["input_ids"])
    with_images = [bool(sample["images"]) for sample in found[0]]
    assert not any(with_images[:60]) and not any(with_images[-60:])
    assert with_images[60 : 60 + len(pictured)] == ["image" in line for line in pictured]


def test_images_are_not_streamed(tmp_path: Path) -> None:
    write_images(tmp_path)
    with pytest.raises(DataError, match=r"data\.streaming: true, but .*images\.jsonl:\d+ has an image; set data"):
        prepared(tmp_path, gemma3_processor(), streaming=True)
