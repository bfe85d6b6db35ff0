"""trainer/data/cached.py: a damaged cache is built anew and never used."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import trainer.data.cache as data
from tests.data.conftest import tokenised
from trainer.data.cached import check_samples
from trainer.data.errors import DataError
from trainer.data.tokenizer import vocabulary_size

ROWS = [{"question": f"What is {n}?", "answer": str(n) * (n + 1)} for n in range(9)]


def samples(found):
    parts = [*found.train_parts, *found.eval_parts]
    return [
        (part.report, part.ignored, [{name: sample[name].tolist() for name in sample} for sample in part.samples])
        for part in parts
    ]


def folder_of(cache):
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << (position % 8)
    file.write_bytes(content)


def edit(file, change):
    info = json.loads(file.read_text())
    change(info)
    file.write_text(json.dumps(info))


def swap(first, second):
    aside = first.with_name("aside")
    first.rename(aside), second.rename(first), aside.rename(second)


def damages():
    for seed in range(40):  # wherever a bit flips
        name = ("train.arrow", "held_out.arrow", "reports.json")[seed % 3]
        yield (
            f"flip-{name}-{seed}",
            lambda folder, name=name, seed=seed: flip(
                folder / name, random.Random(seed).randrange((folder / name).stat().st_size)
            ),
        )
    for name in ("train.arrow", "held_out.arrow", "reports.json"):
        yield f"empty-{name}", lambda folder, name=name: (folder / name).write_bytes(b"")
        yield f"cut-{name}", lambda folder, name=name: os.truncate(folder / name, (folder / name).stat().st_size - 1)
        yield f"longer-{name}", lambda folder, name=name: (folder / name).open("ab").write(b"{}")
        yield f"gone-{name}", lambda folder, name=name: (folder / name).unlink()
        yield f"folder-{name}", lambda folder, name=name: ((folder / name).unlink(), (folder / name).mkdir())
    yield "swapped", lambda folder: swap(folder / "train.arrow", folder / "held_out.arrow")
    yield (
        "report",
        lambda folder: edit(folder / "reports.json", lambda info: info["reports"]["train"].update(samples=1)),
    )
    yield "unlisted", lambda folder: edit(folder / "reports.json", lambda info: info["files"].pop("train.arrow"))
    yield "without-checksum", lambda folder: edit(folder / "reports.json", lambda info: info.pop("checksum"))
    yield "nested", lambda folder: (folder / "reports.json").write_text("[" * 100_000)
    yield "a-file", lambda folder: (shutil.rmtree(folder), folder.write_text("no folder"))
    yield "a-dangling-link", lambda folder: (shutil.rmtree(folder), folder.symlink_to("nowhere"))


@pytest.fixture(scope="module")
def built(tmp_path_factory, tokenizer):
    """Return a folder with train.jsonl and its cache, and the samples in the cache."""
    workspace = tmp_path_factory.mktemp("built")
    (workspace / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return workspace, samples(tokenised(workspace, tokenizer, workspace / "train.jsonl", eval_fraction=0.3))


@pytest.mark.parametrize("damage", [pytest.param(damage, id=name) for name, damage in damages()])
def test_a_damaged_cache_is_built_anew_with_a_notice(built, tmp_path, tokenizer, caplog, damage):
    workspace, sound = built
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "train.jsonl"
    folder = folder_of(tmp_path / "cache")
    damage(folder)
    with caplog.at_level(logging.WARNING, logger="trainer.data"):
        assert samples(tokenised(tmp_path, tokenizer, path, eval_fraction=0.3)) == sound
    (notice,) = caplog.messages
    assert notice.startswith(f"{folder} is damaged (") and notice.endswith("): it is built anew")
    caplog.clear()
    assert samples(tokenised(tmp_path, tokenizer, path, eval_fraction=0.3)) == sound
    assert not caplog.messages
    assert {file.name for file in (tmp_path / "cache").iterdir()} == {folder.name, f"{folder.name}.lock"}


@pytest.mark.parametrize("whole", [True, False])
def test_folders_and_files_that_changed_places_are_noticed(write, tmp_path, tokenizer, caplog, whole):
    paths = [write(*ROWS), write(*ROWS[:5], name="other.jsonl")]
    sound = [samples(tokenised(tmp_path, tokenizer, path)) for path in paths]
    first, second = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    swap(first, second) if whole else swap(first / "train.arrow", second / "train.arrow")
    assert [samples(tokenised(tmp_path, tokenizer, path)) for path in paths] == sound
    assert len(caplog.messages) == 2


def test_a_cache_of_an_earlier_version_is_not_used(write, tmp_path, tokenizer):
    path = write(*ROWS)
    found = tokenised(tmp_path, tokenizer, path)
    opened = data.open_source(data.TrainSource(path=str(path)))
    maker = data._Maker(tokenizer, 64, "truncate", False, tmp_path / "cache", 0, "error", "text")
    earlier = tmp_path / "cache" / maker._earlier_key(data.TrainSource(path=str(path)), opened.content(), 0.0)
    shutil.copytree(folder_of(tmp_path / "cache"), earlier)
    flip(earlier / "train.arrow", 300)
    assert samples(tokenised(tmp_path, tokenizer, path)) == samples(found)


def test_storage_that_does_not_keep_what_it_is_given_is_named(write, tmp_path, tokenizer, monkeypatch):
    def rename_and_lose(source, target, rename=os.rename):
        rename(source, target)
        flip(target / "train.arrow", 300)

    monkeypatch.setattr(os, "rename", rename_and_lose)
    with pytest.raises(DataError, match=r"data\.cache: .* is damaged right after it was written \(train\.arrow is not"):
        tokenised(tmp_path, tokenizer, write(*ROWS))


# What samples must be


def write_samples(file, *rows):
    columns = ("input_ids", "labels", *(["seq_lengths"] if len(rows[0]) == 3 else []))
    table = pa.table({name: pa.array([row[i] for row in rows], pa.list_(pa.int32())) for i, name in enumerate(columns)})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([([1, 2], [1, 2]), ([3], [-100])], None),
        ([([1, 2, 3], [1, 2, -100], [2, 1]), ([4], [4], [1])], None),
        ([([1, 2], [1, 2]), ([1, 10], [-100, 10])], "token ids from 1 to 10 in a vocabulary of 10"),
        ([([1, -1], [-100, -100])], "token ids from -1 to 1 in a vocabulary of 10"),
        ([([1, 2], [1])], "samples whose token ids and labels differ in number"),
        ([([1, 2], [1]), ([1], [1, 2])], "samples whose token ids and labels differ in number"),
        ([([1, 2], [-100, 3])], "labels that differ from the token at their position"),
        ([([1, 2], [-100, 2]), ([], [])], "samples of 0 to 2 tokens, but 1 to 4"),
        ([([1] * 5, [1] * 5)], "samples of 5 to 5 tokens, but 1 to 4"),
        ([([1, 2, 3], [1, 2, 3], [2, 2])], "packed rows whose length is not that of their samples"),
        ([([1, 2, 3], [1, 2, 3], [2]), ([1], [1], [2])], "packed rows whose length is not that of their samples"),
        ([([1, 2, 3], [1, 2, 3], [3, 0])], "packed rows whose length is not that of their samples"),
    ],
)
def test_samples_that_training_could_not_use_are_not_kept(tmp_path, rows, problem):
    write_samples(tmp_path / "a.arrow", *rows)
    if problem is None:
        check_samples(tmp_path / "a.arrow", vocabulary=10, max_length=4)
        return
    with pytest.raises(DataError, match=f"model.tokenizer: made {problem}"):
        check_samples(tmp_path / "a.arrow", vocabulary=10, max_length=4)


def test_a_vocabulary_with_gaps_needs_as_many_ids_as_its_largest():
    backend = Tokenizer(models.WordLevel(vocab={"a": 0, "b": 900, "<s>": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    gaps = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")
    assert gaps("a b")["input_ids"] == [0, 900]
    assert (len(gaps), vocabulary_size(gaps)) == (3, 901)
