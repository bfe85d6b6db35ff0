"""trainer/data/sources.py: however a source is read, its samples are those of the file by its own name."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value, load_dataset
from pyarrow import parquet

from tests.data.conftest import rows_of, tokenised
from trainer.data.errors import DataError
from trainer.data.formats import FORMATS
from trainer.data.tokenizer import bytes_tokenizer


def said(*contents, tools=None):
    messages = [{"role": role, "content": content} for role, content in contents]
    return {"messages": messages} if tools is None else {"messages": messages, "tools": tools}


def asked(prompt, completion, **more):
    return {"prompt": prompt, "completion": completion, **more}


def turn(role, content):
    return [{"role": role, "content": content}]


def called(arguments, **more):
    call = {"type": "function", "function": {"name": "wait", "arguments": arguments}}
    return {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}


def told(*contents, **more):
    return {"conversations": [{"from": role, "value": value} for role, value in contents], **more}


def tool(**properties):
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}


ANY = {
    "types": [called({"until": "noon"}), called({"until": 7})],
    "keys": [called({"until": "noon"}), called({"hours": 7, "why": "so"}), called({})],
    "depth": [
        called({"plan": [{"at": {"hour": 7}}, {"at": {"hour": "noon"}}]}),
        called({"plan": [{"at": {"workspace": ["a", {"b": True}]}}]}),
    ],
    "lists": [called({"at": [1, 2]}), called({"at": "x"}), called({"at": []})],
    "nulls": [called({"until": None, "hours": 3}), called({"until": "noon", "hours": None}), called({"until": None})],
    "deep-nulls": [called({"a": {"b": None, "c": [{"d": None, "e": 1}]}}), called({"a": {"b": 1, "c": []}})],
    "no-arguments": [called({"until": 1}), called(None), called({})],
    "texts": [called('{"until": "7", "why": null}'), called('{"until": 7}')],
    "text-or-object": [called({"until": "x"}), called('{"until": 7}')],
    "tools": [
        said(("user", "a"), ("assistant", "b"), tools=[tool(x={"type": "integer", "enum": [1, 2]})]),
        said(("user", "a"), ("assistant", "b"), tools=[tool(y={"type": "string", "default": "1"}), tool()]),
        said(("user", "a"), ("assistant", "b"), tools=[]),
    ],
    "parts": [
        said(("user", [{"type": "text", "text": "4"}]), ("assistant", "4")),
        said(("user", "true"), ("assistant", "null")),
        said(("user", '{"a": 1}'), ("assistant", "[1]")),
    ],
    "turns": [
        said(("user", "a"), ("assistant", "b")),
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "train": True}]},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}]},
    ],
    "prompts": [
        asked(turn("user", "a"), turn("assistant", "b")),
        asked("c", "d"),
        asked("true", "4"),
        asked("7", "null"),
        asked(turn("user", "4"), turn("assistant", '{"a": 1}'), system="s", tools=[tool()]),
    ],
    "prompts-of-parts": [
        asked(turn("user", [{"type": "text", "text": "a"}]), turn("assistant", "4")),
        asked(turn("user", "true"), turn("assistant", [{"type": "text", "text": "[1]"}])),
    ],
    "completions": [asked("a", "b"), asked("c", "4"), asked("d", None)],
    "tools-or-text": [
        said(("user", "a"), ("assistant", "b"), tools=[tool(x={"type": "integer"})]),
        said(("user", "a"), ("assistant", "b"), tools=json.dumps([tool(y={"type": "string"})])),
        said(("user", "a"), ("assistant", "b"), tools=None),
    ],
    "sharegpt": [
        told(("human", "a"), ("gpt", "4"), system="s", tools=[tool()]),
        told(("human", "b"), ("function_call", {"name": "f", "arguments": {"x": 1}}), tools=json.dumps([tool()])),
        told(("human", [{"type": "text", "text": "c"}]), ("function_call", '{"name": "f", "arguments": {}}')),
        told(("human", "null"), ("gpt", '[{"a": 1}]')),
    ],
    "columns": [
        {"question": "a", "answer": "b", "context": None},
        {"question": "a", "answer": None, "context": "c"},
        {"question": "a", "answer": "b", "id": 4},
    ],
    "history": [
        {"instruction": "a", "output": "b", "history": [["q", "r"]], "system": "s"},
        {"instruction": "a", "output": "b", "input": "i", "history": []},
    ],
}  # fmt: skip
# What tables cannot hold, and files can: how numbers and times are spelled, the order of keys.
FILES = {
    "numbers": [called({"x": 1}), called({"x": 1.5}), called({"x": 1e30})],
    "order": [called({"a": 1, "b": 2}), called({"b": 1, "a": 2})],
    "times": [called({"day": "2024-01-01"}), called({"day": "2024-01-02 10:00:00"})],
    "time-texts": [{"text": "2024-01-01"}, {"text": "2024-01-02"}],
    "digits": [{"question": "007", "answer": "1e3"}, {"question": "NA", "answer": "null"}],
}


def jsonl(rows, file):
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def json_list(rows, made, folder, monkeypatch):
    (folder / "list.json").write_text(json.dumps(rows))
    return folder / "list.json"


def folder_of_lines(rows, made, folder, monkeypatch):
    return jsonl(rows, folder / "set" / "train.jsonl").parent


def folder_of_a_list(rows, made, folder, monkeypatch):
    (folder / "set").mkdir()
    (folder / "set" / "train.json").write_text(json.dumps(rows))
    return folder / "set"


def saved_set(rows, made, folder, monkeypatch):
    made.save_to_disk(folder / "saved")
    return folder / "saved"


def arrow_file(rows, made, folder, monkeypatch):
    return next(saved_set(rows, made, folder, monkeypatch).glob("*.arrow"))


def parquet_file(rows, made, folder, monkeypatch):
    made.to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def folder_of_parquet(rows, made, folder, monkeypatch):
    file = parquet_file(rows, made, folder, monkeypatch)
    (folder / "set").mkdir()
    file.rename(folder / "set" / "train.parquet")
    return folder / "set"


def without_extensions(rows, made, folder, monkeypatch):
    """Write Parquet as a library without Arrow's JSON type does: text, and the metadata of `datasets`."""
    table = parquet.read_table(parquet_file(rows, made, folder, monkeypatch))
    plain = [_plain(field.type) for field in table.schema]
    schema = pa.schema(list(zip(table.schema.names, plain, strict=True)), metadata=table.schema.metadata)
    parquet.write_table(_stored(table, schema), folder / "plain.parquet")
    return folder / "plain.parquet"


def _plain(kind):
    if isinstance(kind, pa.JsonType):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _plain(field.type)) for field in kind])
    return kind


def _stored(table, schema):
    columns = {name: table[name].to_pylist() for name in table.schema.names}
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def hub(rows, made, folder, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: made)
    return "owner/name"


def hub_in_memory(rows, made, folder, monkeypatch):
    table = made.data.table
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset(datasets.table.InMemoryTable(table)))
    return "owner/name"


def csv_folder(rows, made, folder, monkeypatch):
    (folder / "set").mkdir()
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (folder / "set" / "train.csv").write_text("\n".join(lines))
    return folder / "set"


def tsv_folder(rows, made, folder, monkeypatch):
    file = csv_folder(rows, made, folder, monkeypatch) / "train.csv"
    file.rename(file.with_suffix(".tsv")).write_text(file.with_suffix(".tsv").read_text().replace(",", "\t"))
    return file.parent


OWN = (json_list, folder_of_lines, folder_of_a_list)
WAYS = (
    *OWN, saved_set, arrow_file, parquet_file, folder_of_parquet, without_extensions, hub, hub_in_memory,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache-of-datasets")
    datasets.disable_progress_bars()


def samples(tmp_path, source):
    tokenizer = bytes_tokenizer()
    found = tokenised(tmp_path, tokenizer, str(source), max_length=2000)
    return [tokenizer.decode(sample["input_ids"]) for sample in found.train], found.train_report


@pytest.mark.parametrize("name", ANY)
def test_every_way_of_reading_gives_the_same_samples(tmp_path, monkeypatch, name):
    rows = ANY[name]
    wanted = samples(tmp_path, jsonl(rows, tmp_path / "own.jsonl"))
    made = load_dataset(str(jsonl(rows, tmp_path / "made" / "train.jsonl").parent), split="train")
    for way in WAYS:
        (tmp_path / way.__name__).mkdir()
        assert samples(tmp_path, way(rows, made, tmp_path / way.__name__, monkeypatch)) == wanted, way.__name__


def use_json(rows, workspace):
    """Write rows as `datasets` writes them by default when a column's types differ."""
    Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(workspace / "a.parquet")
    return workspace / "a.parquet"


def test_conversations_beside_texts_are_read_as_conversations(tmp_path):
    rows = [asked(turn("user", "a"), turn("assistant", "b")), asked("c", "d")]
    conversation, text = rows_of(use_json(rows, tmp_path))
    assert conversation.messages == (*turn("user", "a"), *turn("assistant", "b"))
    assert conversation.trains == (True,) and conversation.prompt == conversation.answer == ""
    assert (text.prompt, text.answer, text.messages) == ("c", "d", ())


@pytest.mark.parametrize(
    "row",
    [
        asked("a", turn("assistant", "b")),
        asked(turn("user", "a"), "b"),
        asked({"role": "user", "content": "a"}, "b"),
        asked("a", {"role": "assistant", "content": "b"}),
        asked([1, 2], [3]),
        asked(turn("user", "a"), {"b": 1}),
    ],
    ids=str,
)
def test_lists_and_objects_are_never_trained_on_as_text(tmp_path, row):
    rows = [asked("a", "b"), asked(turn("user", "a"), turn("assistant", "b")), row]
    said = {}
    for file in (jsonl(rows, tmp_path / "a.jsonl"), use_json(rows, tmp_path)):
        with pytest.raises(DataError) as refused:
            rows_of(file)
        (said[file.suffix],) = (problem.split(": ", 1)[1] for problem in refused.value.problems)
    assert said[".jsonl"] == said[".parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_declares_what_its_columns_contain(name):
    format = FORMATS[name]
    others = {"alpaca": {"history"}, "qa": set(), "text": set()}.get(name, {"tools", "images"})
    assert not set(format.texts) & set(format.messages)
    assert {*format.columns, *format.optional} == {*format.texts, *format.messages} | others


@pytest.mark.parametrize("name", FILES)
def test_a_folder_of_files_is_read_as_the_files_are(tmp_path, monkeypatch, name):
    rows = FILES[name]
    wanted = samples(tmp_path, jsonl(rows, tmp_path / "own.jsonl"))
    for way in (*OWN, *(() if "messages" in rows[0] else (csv_folder, tsv_folder))):
        (tmp_path / way.__name__).mkdir()
        assert samples(tmp_path, way(rows, None, tmp_path / way.__name__, monkeypatch)) == wanted, way.__name__


# Other types of tables


def written(folder, **columns):
    parquet.write_table(pa.table(columns), folder / "a.parquet")
    return rows_of(folder / "a.parquet")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_texts_of_every_type_are_texts(tmp_path, kind):
    (row,) = written(tmp_path, question=pa.array(["a"], kind), answer=pa.array(["b"], kind))
    assert (row.prompt, row.answer) == ("Question: a\nAnswer: ", "b")


MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


@pytest.mark.parametrize(
    "kind", [pa.list_, pa.large_list, lambda item: pa.list_(item, 2)], ids=["list", "large", "two"]
)
def test_lists_of_every_type_are_lists(tmp_path, kind):
    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    (row,) = written(tmp_path, messages=pa.array(messages, kind(MESSAGE)))
    assert row.messages == tuple(messages[0])


def test_maps_are_objects_and_names_of_classes_are_read_as_written(tmp_path):
    call = {"function": {"name": "f", "arguments": [("a", "x"), ("b", None)]}}
    kind = pa.struct(
        [("function", pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))]))]
    )
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(kind))])
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    (row,) = written(tmp_path, messages=pa.array([[turn]], pa.list_(message)))
    assert row.messages[0]["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": "x"}}}]

    features = Features(
        {"question": Value("string"), "answer": ClassLabel(names=["no", "yes"]), "tags": List(Value("string"))}
    )
    found = Dataset.from_dict({"question": ["a", "b"], "answer": [1, 0], "tags": [[], None]}, features=features)
    found.save_to_disk(tmp_path / "saved")
    assert [row.answer for row in rows_of(tmp_path / "saved")] == ["yes", "no"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [(1, pa.timestamp("s")), (1, pa.timestamp("ns")), ("1.50", pa.decimal128(5, 2)), (b"x", pa.binary())],
)
def test_what_json_has_no_type_for_is_refused_where_it_would_be_trained_on(tmp_path, value, kind):
    value = pa.array([value]).cast(kind).to_pylist()[0]
    turn = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"day": value}}}],
    }
    call = pa.struct([("function", pa.struct([("name", pa.string()), ("arguments", pa.struct([("day", kind)]))]))])
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])
    with pytest.raises(
        DataError, match=r"tool_calls\[0\]\.function\.arguments\.day: .*, a type that tables have and JSON does not"
    ):
        written(tmp_path, messages=pa.array([[turn]], pa.list_(message)))
    (row,) = written(
        tmp_path, text=pa.array(["a"]), created_at=pa.array([value], kind)
    )  # which says nothing of the text
    assert row.answer == "a"


def test_times_that_python_cannot_hold_may_be_left_out(tmp_path):
    (row,) = written(tmp_path, text=["a"], created_at=pa.array([2**62], pa.timestamp("ms")))
    assert row.answer == "a"
    with pytest.raises(DataError, match=r"row 1: answer: .*, but a non-empty string is needed"):
        written(tmp_path, question=["a"], answer=pa.array([2**62], pa.timestamp("ms")))


def test_json_that_is_none_is_named_by_row(tmp_path):
    broken = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['["a"]', "["]))
    with pytest.raises(DataError, match=r"a\.parquet, row 2: meta: not JSON that can be read"):
        written(tmp_path, text=["a", "b"], meta=broken)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_columns_of_one_name_are_refused(tmp_path, name):
    if name == "a.csv":
        (tmp_path / name).write_text("text,text\na,b\n")
    else:
        parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: several columns are called text"):
        rows_of(tmp_path / name)


@pytest.mark.parametrize(
    ("split", "texts"),
    [
        ("train[:2]", "ab"),
        ("train[-1:]", "d"),
        ("train[50%:]", "cd"),
        ("train+test", "abcdef"),
        ("test[1:]+train[:1]", "fa"),
    ],
)
def test_slices_of_folders_are_those_of_datasets(tmp_path, split, texts):
    jsonl([{"text": text} for text in "abcd"], tmp_path / "set" / "train.jsonl")
    jsonl([{"text": text} for text in "ef"], tmp_path / "set" / "test.jsonl")
    assert "".join(row.answer for row in rows_of(tmp_path / "set", split=split)) == texts
    assert "".join(load_dataset(str(tmp_path / "set"), split=split)["text"]) == texts
    for wrong, problem in (
        ("dev", "Unknown split"),
        ("train[:200%]", "split='train\\[:200%\\]'"),
        ("train[", "split="),
    ):
        with pytest.raises(DataError, match=problem):
            rows_of(tmp_path / "set", split=wrong)


def test_a_folder_that_says_itself_how_it_is_read_is_left_to_datasets(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.json").write_text(json.dumps({"rows": [{"text": "a"}, {"text": "b"}]}))
    card = "---\nconfigs:\n- config_name: default\n  data_files: a.json\n  field: rows\n---\n"
    (tmp_path / "set" / "README.md").write_text(card)
    assert [row.answer for row in rows_of(tmp_path / "set")] == ["a", "b"]


def test_sets_in_memory_are_told_apart(tmp_path, monkeypatch):
    for text in ("one", "two"):
        monkeypatch.setattr("datasets.load_dataset", lambda *_, text=text, **__: Dataset.from_dict({"text": [text]}))
        assert samples(tmp_path, "owner/name")[0] == [f"{text}<|eos|>"]
