"""Several processes make the same of a source as one, and none of them outlives the others."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

import trainer.data.build
from tests import forked
from tests.data.conftest import tokenised
from tests.data.test_bad_rows import talk
from trainer.data import strict_json
from trainer.data.cache import TokenisedData
from trainer.data.errors import DataError
from trainer.data.tokenizer import bytes_tokenizer
from trainer.data.workers import in_order

ROWS = [{"question": f"What is {n}?" + "?" * (n % 7), "answer": str(n) * (1 + n % 5), "id": n} for n in range(60)]
TALKS: list[dict[str, Any]] = [talk(*[f"{n} {k}" for k in range(2 + 2 * (n % 2))]) for n in range(60)]
for n in (7, 30):  # control tokens, further keys that the template writes in no row, tools
    TALKS[n]["messages"][0]["content"] += " <|eos|>"
for n in (20, 41):
    TALKS[n]["messages"][0]["id"] = "x"
ANSWER = TALKS[0]["messages"][1]
REFUSED = {"messages": [{"role": "x", "content": "a"}, ANSWER]}
SOURCES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "questions": (ROWS, {}),
    "held out": (ROWS, {"eval_fraction": 0.3, "seed": 5}),
    "packed": (ROWS, {"packing": True, "eval_fraction": 0.3}),
    "cut": (ROWS, {"max_length": 40, "overflow": "drop"}),
    "conversations": (TALKS, {"eval_fraction": 0.5}),
    "bad": (
        [b"{", {"x": 1}, *ROWS[:20], b"[1]", *ROWS[20:], {"question": 7, "answer": "a"}],
        {"on_bad_row": "drop", "eval_fraction": 0.2},
    ),
    "refused": ([*TALKS[:9], REFUSED, *TALKS[9:]],
                {"on_bad_row": "drop"}),
}  # fmt: skip
WRONG: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "one bad": ([*ROWS, b"{", *ROWS], {}),
    "many bad": ([*ROWS, *[b"{"] * 30], {}),
    "mostly bad": ([*ROWS[:9], *[b"{"] * 30], {"on_bad_row": "drop"}),
    "none": ([b"{"] * 30, {"on_bad_row": "drop"}),
    "unused column": ([*ROWS, *[{**row, "hint": "a"} for row in ROWS]], {}),
    "unused key": ([*TALKS, {"messages": [{"role": "user", "content": "a", "mood": "b"}, ANSWER]}], {}),
    "refused": ([*TALKS, REFUSED], {}),
    "read before refused": ([REFUSED, *TALKS, b"{"], {}),
    "too long": (ROWS, {"max_length": 25, "overflow": "error"}),
    "too short": (ROWS, {"max_length": 3}),
}  # fmt: skip


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    monkeypatch.setattr(trainer.data.build, "ROWS_PER_CHUNK", 4)
    monkeypatch.setattr("trainer.data.workers._MOST_IN_PROCESS", 1)
    monkeypatch.setattr("trainer.data.sample_files._TOKENS_PER_BATCH", 500)

    def use(number: int) -> None:
        monkeypatch.setattr(trainer.data.build, "cores_of_process", lambda _: number)

    return use


def content(data: TokenisedData) -> list[Any]:
    return [
        (
            asdict(part.report), part.ignored, part.num_bad, part.first_bad, part.num_spelling, part.control_tokens,
            [{name: values.tolist() for name, values in sample.items()} for sample in part.samples],
        )
        for part in (*data.train_parts, *data.eval_parts)
    ]  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_three_processes_make_what_one_makes(
    write: Callable[..., Path], tmp_path: Path, cores: Callable[[int], None], name: str
) -> None:
    rows, settings = SOURCES[name]
    path, found = write(*rows), []
    for number in (1, 3):
        cores(number)
        found.append(tokenised(tmp_path / str(number), bytes_tokenizer(), path, **settings))
    assert content(found[0]) == content(found[1])
    assert found[0].fingerprint == found[1].fingerprint
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("name", WRONG)
def test_they_refuse_in_the_same_words(
    write: Callable[..., Path], tmp_path: Path, cores: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rows, settings = WRONG[name]
    path, said = write(*rows), []
    for number in (1, 3):
        cores(number)
        with pytest.raises(DataError) as error:
            tokenised(tmp_path, bytes_tokenizer(), path, **settings)
        said.append(error.value.problems)
    cores(1)
    monkeypatch.setattr(trainer.data.build, "ROWS_PER_CHUNK", 10_000)  # as if all were read at once
    with pytest.raises(DataError) as error:
        tokenised(tmp_path, bytes_tokenizer(), path, **settings)
    assert said[0] == said[1] == error.value.problems
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("number", [1, 3])
def test_they_say_what_the_tokenizer_lacks(
    write: Callable[..., Path], tmp_path: Path, cores: Callable[[int], None], number: int
) -> None:
    """Other processes than the first find it: only late rows are conversations."""
    cores(number)
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = None
    texts = [{"prompt": "a", "completion": "b"} for _ in range(30)]
    late = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError) as error:
        tokenised(tmp_path, tokenizer, write(*texts, late))
    (problem,) = error.value.problems
    assert problem.startswith("model.tokenizer: has no chat template")


def test_every_kind_of_file_makes_the_same(tmp_path: Path, cores: Callable[[int], None]) -> None:
    rows = [{name: row[name] for name in ("question", "answer")} for row in ROWS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows))
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    cores(2)
    found = [
        content(tokenised(tmp_path, bytes_tokenizer(), tmp_path / f"a.{kind}"))
        for kind in ("jsonl", "json", "csv", "parquet", "arrow")
    ]
    assert all(one == found[0] for one in found) and len(found[0][0][-1]) == len(rows)


def test_pieces_of_long_rows_are_short_and_make_the_same(
    tmp_path: Path, cores: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(1)
    rows = [talk("q", "a" * (1 + n % 20)) for n in range(59)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    make, sizes = trainer.data.build._Work.__call__, []

    def noted(work: Any, piece: Any) -> Any:
        sizes.append(len(piece.records))
        return make(work, piece)

    monkeypatch.setattr(trainer.data.build._Work, "__call__", noted)
    for name, most in (("a.jsonl", 600), ("a.parquet", 60)):
        monkeypatch.setattr(trainer.data.build, "ROWS_PER_CHUNK", 30)
        monkeypatch.setattr(trainer.data.build, "_MOST_CHARACTERS", 2**22)
        whole = content(tokenised(tmp_path / "whole", bytes_tokenizer(), tmp_path / name))
        assert sizes == [30, 29], name
        sizes.clear()
        monkeypatch.setattr(trainer.data.build, "_MOST_CHARACTERS", most)
        assert content(tokenised(tmp_path / "pieces", bytes_tokenizer(), tmp_path / name)) == whole
        assert sum(sizes) == 59 and all(1 < size < 10 for size in sizes[:-1]), (name, sizes)
        sizes.clear()


def test_pieces_are_taken_as_they_are_needed() -> None:
    """Memory does not grow with the input."""
    taken = 0

    def pieces() -> Iterator[int]:
        nonlocal taken
        for number in range(100):
            taken = number + 1
            yield number

    for done, made in enumerate(in_order(lambda piece: piece * 2, pieces(), processes=2), start=1):
        assert made == 2 * (done - 1) and taken <= max(9, done + 6)


def test_a_process_that_is_killed_ends_the_work() -> None:
    def work(piece: int) -> int:
        if piece == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return piece

    with pytest.raises(DataError, match="a process that tokenises was killed"):
        list(in_order(work, range(40), processes=2))


def _build_slowly(workspace: Path, seconds: float) -> None:
    """Tokenise with two processes, each of which leaves a file and takes some time for a piece."""
    import trainer.data.workers

    make, parent = trainer.data.build._Work.__call__, os.getpid()

    def slowly(work: Any, piece: Any) -> Any:
        if os.getpid() != parent:
            (workspace / str(os.getpid())).touch()
            time.sleep(seconds)
        return make(work, piece)

    trainer.data.build._Work.__call__ = slowly  # type: ignore[method-assign]
    trainer.data.build.ROWS_PER_CHUNK, trainer.data.workers._MOST_IN_PROCESS = 4, 1  # type: ignore[attr-defined]
    trainer.data.build.cores_of_process = lambda _: 2  # type: ignore[attr-defined]
    tokenised(workspace, bytes_tokenizer(), workspace / "train.jsonl")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_a_builder_and_the_next_one_builds(
    write: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    """The processes have inherited the lock of the cache. The terminal sends an interrupt to all of them."""
    path = write(*ROWS)
    seconds = 60 if number == signal.SIGKILL else 1
    builder = forked.context().Process(target=_build_slowly, args=(tmp_path, seconds))
    builder.start()
    end = time.monotonic() + 60
    while len(workers := [int(file.name) for file in tmp_path.glob("[0-9]*")]) < 2:
        assert time.monotonic() < end and builder.is_alive()
        time.sleep(0.01)
    for pid in [*(workers if number == signal.SIGINT else []), builder.pid or 0]:
        os.kill(pid, number)
    builder.join(30)
    assert builder.exitcode not in (None, 0)
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(tokenised(tmp_path, bytes_tokenizer(), path).train) == len(ROWS)
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} <= {"", ".lock"}


def test_progress_is_shown_now_and_then(
    write: Callable[..., Path], tmp_path: Path, cores: Callable[[int], None], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cores(1)
    path = write(*ROWS)
    tokenised(tmp_path / "quick", bytes_tokenizer(), path)
    assert "tokenising" not in capsys.readouterr().err
    monkeypatch.setattr("trainer.data.progress._LINE_SECONDS", 0.0)
    tokenised(tmp_path / "slow", bytes_tokenizer(), path)
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 15 and lines[-1].startswith(f"tokenising {path}: 60 rows, ") and lines[-1].endswith(", 0 s left")
    )
    assert all("rows/s" in line for line in lines)


def test_a_list_of_json_is_read_as_a_whole_would_be() -> None:
    """Its text comes in blocks, which end anywhere."""
    draw = random.Random(0)
    values = [[], [1], [12.5, -3, 1e300], ["a]", '\\"', "é", "x" * 50], [{"a": [1, {"b": None}]}] * 3, [[[]], {}, True]]
    for _ in range(300):
        text = json.dumps(draw.choice(values), indent=draw.choice([None, 1]))
        for _ in range(draw.choice([0, 0, 1, 2])):
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice(["", ",", "]", "[", " ", "1", '"', "x"]) + text[at + draw.choice([0, 1]) :]
        if not text.lstrip().startswith("["):
            continue
        try:
            expected: Any = strict_json.loads(text)
        except ValueError:
            expected = ValueError
        assert _items(text, draw.choice([1, 2, 7])) == expected, text


def _items(text: str, size: int) -> Any:
    position = 0

    def read(wanted: int) -> str:
        nonlocal position
        position += wanted
        return text[position - wanted : position]

    characters, strict_json._CHARACTERS = strict_json._CHARACTERS, size
    try:
        return list(strict_json.items(read))
    except ValueError:
        return ValueError
    finally:
        strict_json._CHARACTERS = characters
