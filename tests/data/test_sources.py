"""trainer/data/sources.py: every kind of file gives the same rows, and bad ones are named by workspace."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from tests.data.conftest import rows_of
from trainer.data.errors import DataError

ROWS = [{"question": f"why {n}?", "answer": 'so, "é"\nindeed' if n else "007"} for n in range(3)]


def write_all(folder):
    """Write the same rows to every kind of file."""
    table = pa.Table.from_pylist(ROWS)
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (folder / "lines.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    (folder / "list.json").write_text(json.dumps(ROWS, indent=1))
    Dataset.from_list(ROWS).to_csv(folder / "a.csv")
    parquet.write_table(table, folder / "a.parquet")
    with pa.OSFile(str(folder / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pa.OSFile(str(folder / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sorted(path for path in folder.iterdir() if path.is_file())


def test_every_kind_of_file_gives_the_same_rows_and_knows_where_they_stand(tmp_path):
    files = write_all(tmp_path)
    assert len(files) == 7
    for file in files:
        rows = rows_of(file)
        assert [(row.prompt, row.answer) for row in rows] == [
            (f"Question: {row['question']}\nAnswer: ", row["answer"]) for row in ROWS
        ], file.name
        by_line = file.name in ("a.jsonl", "lines.json")
        assert rows[2].where == (f"{file}:3" if by_line else f"{file}, row 3")


def test_a_folder_is_read_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        parquet.write_table(
            pa.Table.from_pylist([{"text": f"{split} {n}"} for n in range(4)]), folder / f"{split}.parquet"
        )
    assert [row.answer for row in rows_of(folder)] == [f"train {n}" for n in range(4)]
    assert [row.answer for row in rows_of(folder, split="test[:2]")] == ["test 0", "test 1"]
    assert rows_of(folder)[1].where == f"{folder}, row 2"
    with pytest.raises(DataError, match=r"split='dev' and subset=None: .*Unknown split"):
        rows_of(folder, split="dev")


def test_a_file_in_a_folder_that_datasets_would_not_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    folder = tmp_path / "set"
    (folder / ".old").mkdir(parents=True)
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (folder / ".old" / "b.csv").write_text("question,answer\n1,2\n")  # hidden files are nobody's data
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "b.jsonl").symlink_to(folder / "a.jsonl")  # as the hub's cache keeps them
    for path in (folder, tmp_path / "link", tmp_path / "files"):
        assert len(rows_of(path)) == 3
    Dataset.from_list(ROWS).to_csv(folder / "more.csv")
    with pytest.raises(DataError, match=r"more\.csv would not be read.*Name the files one by one"):
        rows_of(folder)


def test_parts_of_a_saved_data_set(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "all")
    assert len(rows_of(tmp_path / "one")) == len(rows_of(tmp_path / "one", split="train")) == 3
    assert len(rows_of(tmp_path / "all")) == 3
    assert len(rows_of(tmp_path / "all", split="train[1:]+test")) == 3
    assert len(rows_of(tmp_path / "all", split="train[:1]")) == 1
    for folder, split in (("one", "test"), ("all", "dev"), ("all", "train[1:")):
        with pytest.raises(DataError, match="allowed: train"):
            rows_of(tmp_path / folder, split=split)
    with pytest.raises(DataError, match=r"subset='main', but a saved data set has none"):
        rows_of(tmp_path / "all", subset="main")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_given_twice_is_refused(tmp_path, name):
    line = '{"question": "a", "answer": "b", "answer": "c"}'
    (tmp_path / name).write_text(line if name == "a.jsonl" else f"[{line}]")
    with pytest.raises(DataError, match="key 'answer' is given twice"):
        rows_of(tmp_path / name)


def test_a_hub_name_goes_to_datasets_with_its_subset_and_split(monkeypatch):
    def load_dataset(name, subset, *, split, **_):
        assert (name, subset, split) == ("openai/gsm8k", "main", "train")
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(rows_of("openai/gsm8k", subset="main")) == 3


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match=r"nobody/nothing: no data set here or on the Hub .*no route to the hub"):
        rows_of("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b'[\n{"text": "a"},\n{"text": nope}\n]', r"a\.json:3: not JSON: Expecting value at column 10"),
        ("a.json", b'\n[{"text": "a"},\n{"text": "\xff"}]', r"a\.json:3: not UTF-8 text: byte 0xff"),
        ("a.json", b'[{"text": "a"}, 3]', r"a\.json, row 2: number 3, but an object is needed"),
        ("a.json", b'{"text": "a"}\n{"text"', r"a\.json:2: not JSON"),
        ("a.csv", b"text\nfine\n\xe9\n", r"a\.csv:3: not UTF-8 text: byte 0xe9"),
        ("a.csv", b"text,id\nfine,1\nx,2,3\n", r"a\.csv, row 2: more values than the 2 columns"),
        ("a.csv", b"id,text\n1,fine\n2\n", r"a\.csv, row 2: column text missing: the row has {id}"),
        ("a.csv", b'text\nfine\n"x"y\n', r"a\.csv, row 2: not CSV"),
        ("a.csv", b"text\n", r"a\.csv: contains no rows"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a readable Parquet file"),
        ("a.arrow", b"no", r"a\.arrow: not a readable Arrow file"),
        ("a.txt", b"no", r"a\.txt: not the name of a data file; allowed: \.jsonl \| \.json"),
    ],
)
def test_a_bad_file_is_named_by_place(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        rows_of(tmp_path / name)


def test_a_row_of_a_table_without_a_value_or_with_broken_text_is_named(tmp_path):
    parquet.write_table(pa.Table.from_pylist([*ROWS, {"answer": "so"}]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 4: question: null, but a non-empty string is needed"):
        rows_of(tmp_path / "a.parquet")
    parquet.write_table(pa.Table.from_pylist([{"question": "why?"}]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 1: no known format .*: the row has {question}"):
        rows_of(tmp_path / "a.parquet")
    broken = pa.array([b"a", b"b\xff", b"c"]).view(pa.string())
    parquet.write_table(pa.table({"text": broken}), tmp_path / "b.parquet")
    with pytest.raises(DataError) as error:
        rows_of(tmp_path / "b.parquet")
    assert error.value.problems == [f"{tmp_path / 'b.parquet'}, row 2: not UTF-8 text: byte 0xff at column 2"]


def test_a_long_csv_field_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.csv").write_text("\ufefftext\n" + "x" * 200_000 + "\n", encoding="utf-8")
    assert len(rows_of(tmp_path / "a.csv")[0].answer) == 200_000


def test_keys_that_tables_fill_in_are_left_out(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}],
        [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c", "train": True}],
    ]
    parquet.write_table(pa.Table.from_pylist([{"messages": chat} for chat in chats]), tmp_path / "a.parquet")
    first, second = rows_of(tmp_path / "a.parquet")
    assert first.messages == (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    )
    assert second.messages == ({"role": "user", "content": "b"}, {"role": "assistant", "content": "c"})
