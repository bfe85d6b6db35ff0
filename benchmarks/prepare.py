"""What tokenising costs: CPU seconds beside plain `datasets.map`, wall time on one core and on several, and memory.

    python benchmarks/prepare.py --rows 300000 --more 3000000
    python benchmarks/prepare.py --rows 30000 --kinds messages --tokenizer trained
    python benchmarks/prepare.py --rows 300000 --streaming

Both sides make the same samples of the same file, in the same Arrow columns, which is checked: `prepare` reads, checks,
renders, tokenises and labels rows; `datasets.map` loads JSON, and maps a function of a few lines over batches. Each
measurement is a process of its own, and imports are not counted. `--more` adds the resident memory of all processes
together, for as many rows beside `--rows`. `--streaming` measures instead how fast a stream (`data.streaming`) makes
samples, and how long a resume takes near the end of an epoch, from lines and from one row group of Parquet.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.provenance import command  # noqa: E402

KINDS = ("qa", "messages")
MAX_LENGTH = 1024
WORDS = 5000


def rows(kind: str, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of words of two to nine letters: a question and an answer, or one or two turns."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(WORDS)]

    def text(most: int, end: str) -> str:
        return " ".join(draw.choices(words, k=draw.randint(5, most))) + end

    for _ in range(count):
        if kind == "qa":
            yield {"question": text(25, "?"), "answer": text(60, ".")}
            continue
        turns = [(text(25, "?"), text(30, ".")) for _ in range(draw.randint(1, 2))]
        pairs = [(("user", asked), ("assistant", answered)) for asked, answered in turns]
        yield {"messages": [{"role": role, "content": said} for pair in pairs for role, said in pair]}


def tokenizer_of(name: str) -> Any:
    """`bytes`, or `trained`: a byte-level vocabulary of 8192 entries, trained on other rows, with the same template."""
    from trainer.data.tokenizer import bytes_tokenizer

    if name == "bytes":
        return bytes_tokenizer()
    texts = (row["question"] + " " + row["answer"] for row in rows("qa", 5000, seed=1))
    return bytes_tokenizer().train_new_from_iterator(texts, 8192)


# --- measurements, each in a process of its own -------------------------------------------------------------------


def prepare(file: Path, tokenizer: Any, workspace: Path) -> Callable[[], Path]:
    from trainer.config.schema import TrainSource
    from trainer.data.cache import tokenise

    def run() -> Path:
        found = tokenise(
            train=[TrainSource(path=str(file))], eval=(), eval_fraction=0.0, tokenizer=tokenizer, overflow="truncate",
            max_length=MAX_LENGTH, packing=False, seed=0, cache=workspace / "cache",
        )  # fmt: skip
        return Path(found.train.cache_files[0]["filename"])

    return run


def plain_map(file: Path, tokenizer: Any, workspace: Path, *, fingerprints: bool) -> Callable[[], Path]:
    import datasets

    datasets.disable_progress_bars()
    kind = "qa" if "question" in json.loads(file.open().readline()) else "messages"
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    eos = tokenizer.eos_token_id

    def qa(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        prompts = tokenizer([f"Question: {text}\nAnswer: " for text in batch["question"]], **options)["input_ids"]
        answers = tokenizer(batch["answer"], **options)["input_ids"]
        pairs = [(prompt, [*answer, eos]) for prompt, answer in zip(prompts, answers, strict=True)]
        return {
            "input_ids": [(prompt + answer)[:MAX_LENGTH] for prompt, answer in pairs],
            "labels": [([-100] * len(prompt) + answer)[:MAX_LENGTH] for prompt, answer in pairs],
        }

    def messages(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        found = tokenizer.apply_chat_template(
            batch["messages"], return_dict=True, return_assistant_tokens_mask=True, truncation=True,
            max_length=MAX_LENGTH,
        )  # fmt: skip
        labels = [
            [token if target else -100 for token, target in zip(ids, mask, strict=True)]
            for ids, mask in zip(found["input_ids"], found["assistant_masks"], strict=True)
        ]
        return {"input_ids": found["input_ids"], "labels": labels}

    column = datasets.List(datasets.Value("int32"))
    features = datasets.Features({"input_ids": column, "labels": column})

    def run() -> Path:
        loaded = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(workspace / "hf"))
        made = loaded.map(
            {"qa": qa, "messages": messages}[kind], batched=True, features=features,
            remove_columns=loaded.column_names, cache_file_name=str(workspace / "mapped.arrow"),
            **({} if fingerprints else {"new_fingerprint": "mapped"}),
        )  # fmt: skip
        return Path(made.cache_files[0]["filename"])

    return run


SUBJECTS: dict[str, Callable[..., Callable[[], Path]]] = {
    "prepare": prepare,
    "map": lambda *given: plain_map(*given, fingerprints=False),
    "map, fingerprints": lambda *given: plain_map(*given, fingerprints=True),
}


def measure(subject: str, file: Path, tokenizer: str, cores: int) -> dict[str, Any]:
    """Seconds of one subject on so many cores, and a digest of its samples. Runs in a process of its own."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import datasets  # noqa: F401
    import trl  # noqa: F401

    with tempfile.TemporaryDirectory(dir=file.parent) as workspace:
        run = SUBJECTS[subject](file, tokenizer_of(tokenizer), Path(workspace))
        cpu, wall = _cpu_seconds(), time.perf_counter()
        written = run()
        return {
            "cpu": _cpu_seconds() - cpu,
            "wall": time.perf_counter() - wall,
            "samples": _digest(written),
        }


def stream(file: Path, tokenizer: str) -> dict[str, float]:
    """Samples per second of a stream on all cores, and seconds of a resume after 95 of 100 samples."""
    from trainer.config.schema import TrainSource
    from trainer.data.cache import tokenise

    def streams() -> Any:
        return tokenise(
            train=[TrainSource(path=str(file))], eval=(), eval_fraction=0.0, overflow="truncate", packing=False, seed=0,
            tokenizer=tokenizer_of(tokenizer), max_length=MAX_LENGTH, cache=file.parent, streaming=True,
        ).streams  # fmt: skip

    count = sum(1 for _ in file.open("rb")) if file.suffix == ".jsonl" else _num_rows(file)
    late = count * 95 // 100
    (one,) = streams().streams
    started = time.perf_counter()
    for _ in range(late):
        one.take()
    seconds, state = time.perf_counter() - started, one.state
    expected = one.take()["input_ids"].tolist()
    (other,) = streams().streams
    started = time.perf_counter()
    other.go_to(state)
    resume = time.perf_counter() - started
    assert other.take()["input_ids"].tolist() == expected
    return {"samples per second": late / seconds, "seconds of a resume": resume}


def _num_rows(file: Path) -> int:
    from pyarrow import parquet

    return int(parquet.read_metadata(file).num_rows)


def both_streams(kind: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import pyarrow as pa
    from pyarrow import parquet

    file = folder / f"{kind}.jsonl"
    _write(file, kind, arguments.rows)
    table = folder / f"{kind}.parquet"
    parquet.write_table(pa.Table.from_pylist(list(rows(kind, arguments.rows))), table, row_group_size=arguments.rows)
    return {"lines": stream(file, arguments.tokenizer), "one row group": stream(table, arguments.tokenizer)}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _digest(file: Path) -> str:
    import numpy as np
    import pyarrow as pa
    import xxhash

    digest = xxhash.xxh3_128()
    with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as batches:
        for batch in batches:
            for sample in zip(*(batch.column(name).to_numpy(False) for name in ("input_ids", "labels")), strict=True):
                for values in sample:
                    digest.update(np.asarray(values, dtype=np.int32).tobytes() + b"end")
    return digest.hexdigest()


# --- the process that starts them ---------------------------------------------------------------------------------


def in_a_process(subject: str, file: Path, tokenizer: str, cores: int) -> dict[str, Any]:
    """What `measure` returns, and the largest memory of all its processes together (PSS: shared pages count once)."""
    arguments = [sys.executable, __file__, "--measure", subject, str(file), tokenizer, str(cores)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    resident = 0
    while process.poll() is None:
        resident = max(resident, _resident(process.pid))
        time.sleep(0.1)
    assert process.stdout is not None
    said = process.stdout.read()
    assert process.returncode == 0, said
    return {**json.loads(said.splitlines()[-1]), "resident": resident}


def _resident(pid: int) -> int:
    import psutil

    total = 0
    try:
        first = psutil.Process(pid)
        for process in [first, *first.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:  # one has just ended
        return 0
    return total


def compare(kind: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    file = folder / f"{kind}.jsonl"
    _write(file, kind, arguments.rows)
    runs = {
        "prepare": ("prepare", arguments.cores),
        "prepare, one core": ("prepare", 1),
        "map": ("map", arguments.cores),
        "map, fingerprints": ("map, fingerprints", arguments.cores),
    }
    found: dict[str, Any] = {
        name: in_a_process(subject, file, arguments.tokenizer, cores) for name, (subject, cores) in runs.items()
    }
    assert len({one.pop("samples") for one in found.values()}) == 1, "not the same samples"
    ours = found["prepare"]
    ratios = {
        "CPU over map": ours["cpu"] / found["map"]["cpu"],
        "CPU over map with fingerprints": ours["cpu"] / found["map, fingerprints"]["cpu"],
        f"wall on {arguments.cores} cores over one": ours["wall"] / found["prepare, one core"]["wall"],
    }
    if arguments.more:
        _write(file, kind, arguments.more)
        found["prepare, more"] = in_a_process("prepare", file, arguments.tokenizer, arguments.cores)
        ratios[f"memory of {arguments.more:,} rows over {arguments.rows:,}"] = (
            found["prepare, more"]["resident"] / ours["resident"]
        )
    file.unlink()
    return {"rows": arguments.rows, "runs": found, "ratios": ratios}


def _write(file: Path, kind: str, count: int) -> None:
    with file.open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows(kind, count))


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        subject, file, tokenizer, cores = sys.argv[2:]
        print(json.dumps(measure(subject, Path(file), tokenizer, int(cores))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--more", type=int, help="so many rows, for the growth of memory")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--tokenizer", choices=("bytes", "trained"), default="bytes")
    parser.add_argument("--streaming", action="store_true")
    parser.add_argument("--cores", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for rows and samples")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        measured = both_streams if arguments.streaming else compare
        figures: dict[str, Any] = {kind: measured(kind, arguments, folder) for kind in arguments.kinds}
    finally:
        shutil.rmtree(folder)
    figures["environment"] = {"command": command("python"), "date": date.today().isoformat(), "cores": arguments.cores}
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
