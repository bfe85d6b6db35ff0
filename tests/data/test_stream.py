"""Streams: their order depends on the seed, the epoch and the place alone, and every row is seen once in an epoch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from tests.data.conftest import tokenised
from tests.data.test_bad_rows import talk
from trainer.config import ConfigError, load
from trainer.data import units
from trainer.data.cache import TokenisedData
from trainer.data.errors import DataError
from trainer.data.order import Order
from trainer.data.show import describe
from trainer.data.stream_order import StreamOrder
from trainer.data.tokenizer import bytes_tokenizer

ROWS = [{"question": f"What is {n}?", "answer": f"{n:03}"} for n in range(200)]


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_BYTES", 300)
    monkeypatch.setattr(units, "_ROWS", 7)


def streamed(tmp_path: Path, *sources: Any, **settings: Any) -> TokenisedData:
    return tokenised(tmp_path, bytes_tokenizer(), *sources, streaming=True, **{"shuffle_rows": 32, **settings})


def order(data: TokenisedData, *, rank: int = 0, ranks: int = 1, batch: int = 8, micro: int = 1) -> StreamOrder:
    assert data.streams is not None
    return StreamOrder(
        data.streams, seed=0, global_batch_size=batch, micro_batch_size=micro, rank=rank, ranks=ranks,
        weights=data.weights, fingerprint=data.fingerprint, made_of=data.made_of,
    )  # fmt: skip


def seen(batches: Order, steps: range) -> list[list[list[int]]]:
    """The ids of the samples of each step."""
    return [[sample["input_ids"].tolist() for part in batches.choose(step) for sample in part] for step in steps]


def answers(batches: Order, steps: range) -> list[str]:
    samples = [sample for step in steps for part in batches.choose(step) for sample in part]
    return [bytes(id for id in sample["labels"].tolist() if 0 <= id < 256).decode() for sample in samples]


def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(json.dumps(row).encode() for row in ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in ROWS))
    table = pa.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=9)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "set").mkdir()
    for number in range(3):
        part = ROWS[number * 70 : number * 70 + 70]
        (tmp_path / "set" / f"train-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "tables").mkdir()
    for number in range(2):
        parquet.write_table(table.slice(number * 100, 100), tmp_path / "tables" / f"train-{number}.parquet")
    (tmp_path / "arrows").mkdir()
    with (
        pa.OSFile(str(tmp_path / "arrows" / "train.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=50)
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    names = ["a.jsonl", "a.json", "lines.json", "a.csv", "a.parquet", "a.arrow", "set", "tables", "arrows", "saved"]
    return {name: tmp_path / name for name in names}


def test_every_row_is_seen_once_in_an_epoch_and_resume_is_exact_whatever_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    for name, path in files(tmp_path).items():
        data = streamed(tmp_path, path)
        batches, states, steps = order(data), [], []
        for step in range(52):
            states.append(json.loads(json.dumps(batches.state(step))))
            steps.append(answers(batches, range(step, step + 1)))
        first, second = sum(steps[:25], []), sum(steps[25:50], [])
        assert sorted(first) == sorted(second) == sorted(row["answer"] for row in ROWS), name
        assert first != second and first != sorted(first), name
        for step in (0, 1, 13, 24, 25, 26, 49, 51):
            again = order(streamed(tmp_path, path))
            assert again.resume(states[step]) == step
            assert [answers(again, range(n, n + 1)) for n in range(step, 52)] == steps[step:], (name, step)


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"max_length": 36}])
def test_a_resume_reads_no_more_than_a_window(
    write: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    path = write(*ROWS)
    batches = order(streamed(tmp_path, path, **settings), batch=4)
    steps = seen(batches, range(20))
    state = batches.state(20)
    expected = seen(batches, range(20, 24))
    again = order(streamed(tmp_path, path, **settings), batch=4)
    read: Counter[str] = Counter()
    for index, (source, unit) in enumerate(again._streams.streams[0]._units):
        again._streams.streams[0]._units[index] = (source, lambda unit=unit: _counted(read, unit()))
    again.resume(state)
    assert 0 < read.total() <= 32 + 7, "the window, and the rows before it in its unit"
    assert seen(again, range(20, 24)) == expected and expected[0] not in steps


def _counted(read: Counter[str], records: Any) -> Any:
    for where, record in records:
        read[str(record)] += 1
        yield where, record


def test_ranks_share_every_step_and_another_number_of_ranks_goes_on(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(*ROWS)
    alone = order(streamed(tmp_path, path), micro=2)
    whole = [answers(alone, range(step, step + 1)) for step in range(6)]
    ranks = [order(streamed(tmp_path, path), rank=rank, ranks=2, micro=2) for rank in range(2)]
    for step in range(3):
        parts = [one.choose(step) for one in ranks]
        dealt = [sample for micro in zip(*parts, strict=True) for part in micro for sample in part]
        assert [bytes(i for i in s["labels"].tolist() if 0 <= i < 256).decode() for s in dealt] == whole[step]
    states = [one.state(3) for one in ranks]
    assert states[0] == states[1]
    four = order(streamed(tmp_path, path), rank=3, ranks=4, micro=2)
    four.resume(states[0])
    assert [answers(four, range(step, step + 1)) for step in (3, 4, 5)] == [step[6:] for step in whole[3:]]


def test_weights_are_kept_and_each_source_passes_over_its_own_rows(write: Callable[..., Path], tmp_path: Path) -> None:
    sources = [
        {"path": str(write(*ROWS[:30], name="few.jsonl")), "weight": 3},
        {"path": str(write(*ROWS[100:], name="many.jsonl")), "weight": 1},
    ]
    batches = order(streamed(tmp_path, *sources))
    found = answers(batches, range(10))
    few = [answer for answer in found if int(answer) < 30]
    assert len(few) == 60 and Counter(few) == Counter({f"{n:03}": 2 for n in range(30)})
    state, after = batches.state(10), answers(batches, range(10, 14))
    again = order(streamed(tmp_path, *sources))
    again.resume(state)
    assert answers(again, range(10, 14)) == after


def test_unweighted_sources_are_one_pool(write: Callable[..., Path], tmp_path: Path) -> None:
    talks = [talk("hi", f"{n:03}") for n in range(100, 200)]
    paths = [write(*ROWS[:100], name="a.jsonl"), write(*talks, name="b.jsonl")]
    found = answers(order(streamed(tmp_path, *paths)), range(25))
    assert sorted(found) == [f"{n:03}" for n in range(200)]
    assert 20 < sum(int(answer) < 100 for answer in found[:100]) < 80


def test_windows_are_packed(write: Callable[..., Path], tmp_path: Path) -> None:
    data = streamed(tmp_path, write(*ROWS), packing=True, max_length=128)
    rows = [sample for part in order(data, batch=4).choose(0) for sample in part]
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 128 and len(row["seq_lengths"]) > 1 for row in rows)
    assert "streamed (1 file, " in describe(data, 128)[0] and "packed into" in describe(data, 128)[0]


# --- rows that cannot be used ---------------------------------------------------------------------------------------


def test_a_bad_row_ends_a_run_by_file_and_line_when_its_window_comes(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(*ROWS[:150], b"{", *ROWS[150:])
    batches = order(streamed(tmp_path, path), batch=8)
    with pytest.raises(DataError, match=r"train\.jsonl:151: not JSON") as error:
        answers(batches, range(26))
    assert len(error.value.problems) == 2 and "data.on_bad_row=drop" in error.value.problems[1]


def test_bad_rows_are_dropped_and_counted(write: Callable[..., Path], tmp_path: Path) -> None:
    refused = {"messages": [{"role": "x", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(*[talk("hi", f"{n:03}") for n in range(100)], b"{", refused, {"question": 7, "answer": "b"})
    data = streamed(tmp_path, path, on_bad_row="drop")
    assert sorted(answers(order(data, batch=10), range(10))) == [f"{n:03}" for n in range(100)]
    assert data.streams is not None
    assert data.streams.num_bad == 3


@pytest.mark.parametrize(
    ("rows", "settings", "match"),
    [
        ([{**row, "hint": "x"} for row in ROWS], {}, r"has \{hint\}, which would not be in the sample"),
        ([b"{"] * 40, {}, "stopped after 10 problems"),
        ([b"{"] * 40, {"on_bad_row": "drop"}, "none of 0 samples is left"),
        (ROWS, {"max_length": 3}, "none of 32 samples is left"),
        (ROWS, {"max_length": 10, "overflow": "error"}, "tokens, data.max_length is 10"),
        ([], {}, "contains no rows"),
    ],
)
def test_what_is_wrong_with_the_first_rows_is_said_at_the_start(
    write: Callable[..., Path], tmp_path: Path, rows: list[Any], settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        streamed(tmp_path, write(*rows), **settings)


def test_a_source_without_rows_is_refused_whatever_the_file(tmp_path: Path) -> None:
    (tmp_path / "head.csv").write_text("question,answer\n")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "blank.jsonl").write_text("\n\n\n")
    (tmp_path / "nothing.jsonl").write_text("")
    parquet.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), tmp_path / "none.parquet")
    for name in ("head.csv", "list.json", "blank.jsonl", "nothing.jsonl", "none.parquet"):
        with pytest.raises(DataError, match=rf"{name}: contains no rows; each must be \{{"):
            streamed(tmp_path, tmp_path / name)


def test_a_run_that_a_bad_row_ended_goes_on_without_it(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(*ROWS[:150], b"{", *ROWS[150:])
    states, batches = [], order(streamed(tmp_path, path))
    with pytest.raises(DataError, match=r"not JSON(.|\n)*resumed, with data\.on_bad_row=drop"):
        for step in range(26):
            states.append(json.loads(json.dumps(batches.state(step))))
            batches.choose(step)
    dropped = order(streamed(tmp_path, path, on_bad_row="drop"))
    expected = answers(dropped, range(50))
    dropping = dropped.state(50)
    assert 1 < len(states) < 26
    for state in states:
        again = order(streamed(tmp_path, path, on_bad_row="drop"))
        step = again.resume(state)
        assert answers(again, range(step, 50)) == expected[8 * step :]
    with pytest.raises(DataError, match=r"data\.on_bad_row: 'drop' in the checkpoint, 'error' now"):
        order(streamed(tmp_path, path)).resume(dropping)
    with pytest.raises(DataError, match=r"data\.max_length: 64 in the checkpoint, 63 now") as error:
        order(streamed(tmp_path, path, on_bad_row="drop", max_length=63)).resume(states[0])
    assert len(error.value.problems) == 1


def test_the_lines_of_rows_that_are_dropped_are_not_counted(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting reads the file from its beginning."""
    refused = {"messages": [{"role": "x", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(*[row for n in range(40) for row in (talk("hi", f"{n:03}"), talk("hi", f"{n:03}"), b"{", refused)])
    data = streamed(tmp_path, path, on_bad_row="drop")
    counted, count = [], units._Line.__str__
    monkeypatch.setattr(units._Line, "__str__", lambda line: counted.append(line) or count(line))
    answers(order(data, batch=8), range(10))
    assert data.streams is not None and data.streams.num_bad == 80 and not counted


def test_an_epoch_without_a_sample_ends_the_run(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(*ROWS)
    batches = order(streamed(tmp_path, path))
    path.write_bytes(b"\n" * path.stat().st_size)
    with pytest.raises(DataError, match="no sample is left"):
        answers(batches, range(1))


def test_a_resume_remembers_which_keys_of_messages_were_written(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template writes the reasoning of a last turn alone, which only the second window has."""
    monkeypatch.setattr(units, "_BYTES", 2**16)  # one unit: rows in the order of the file
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{% if loop.last %}"
        "{{ message.reasoning_content }}{% endif %}{% generation %}{{ message.content }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    )
    talks = [talk("q", "a") for _ in range(4)] + [talk("q", "a", "r", "b") for _ in range(16)]
    for one in talks[2:]:
        one["messages"][1]["reasoning_content"] = "why"
    path = write(*talks)

    def begun() -> StreamOrder:
        settings: dict[str, Any] = {"streaming": True, "shuffle_rows": 2, "max_length": 64}
        return order(tokenised(tmp_path, tokenizer, path, **settings), batch=2)

    batches, states, steps = begun(), [], []
    for step in range(13):
        states.append(json.loads(json.dumps(batches.state(step))))
        steps.append(seen(batches, range(step, step + 1)))
    for step in (0, 1, 2, 3, 10, 12):
        again = begun()
        again.resume(states[step])
        assert seen(again, range(step, step + 1)) == steps[step]
        assert again.state(step + 1) == [*states, batches.state(13)][step + 1]
    del states[0]["written"]
    assert begun().resume(states[0]) == 0, "a checkpoint of an earlier version"


# --- what is refused ------------------------------------------------------------------------------------------------


def test_other_files_or_settings_are_named_at_a_resume(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(*ROWS)
    state = order(streamed(tmp_path, path)).state(0)
    with pytest.raises(DataError, match=r"data\.shuffle_rows: 32 in the checkpoint, 16 now"):
        order(streamed(tmp_path, path, shuffle_rows=16)).resume(state)
    with pytest.raises(DataError, match=r"data\.max_length: 64 in the checkpoint, 63 now"):
        order(streamed(tmp_path, path, max_length=63)).resume(state)
    write(*ROWS, ROWS[0])
    with pytest.raises(DataError, match=r"data\.train\[0\]\.path: its content is not the same"):
        order(streamed(tmp_path, path)).resume(state)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (["train.epochs=2"], "train.epochs: 2, but with data.streaming no length is known; set train.steps"),
        (["train.steps=2", "data.eval_fraction=0.1"], "data.eval_fraction: 0.1, but with data.streaming"),
        (["train.steps=2", "data.streaming=false", "data.shuffle_rows=9"], "data.shuffle_rows: 9, but all samples are"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_in_words(tmp_path: Path, values: list[str], match: str) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    given = ["model.random={model_type: llama}", f"data.train={tmp_path / 'a.jsonl'}", "train.global_batch_size=1"]
    with pytest.raises(ConfigError, match=match):
        load(None, [*given, "data.streaming=true", *values])


def test_a_part_of_a_split_is_refused(tmp_path: Path) -> None:
    files(tmp_path)
    with pytest.raises(DataError, match="a part of a split cannot be streamed"):
        streamed(tmp_path, {"path": str(tmp_path / "set"), "split": "train[:10%]"})
