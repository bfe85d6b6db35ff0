"""trainer/data/cache.py: samples are prepared once for all processes, in a folder named by what they are made of."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from filelock import FileLock

import trainer.data.cache as data
from tests import forked
from tests.data.conftest import tokenised
from tests.data.files import QUESTIONS, folder_of, tokenise_file, tokenize
from trainer.data.errors import DataError
from trainer.data.tokenizer import bytes_tokenizer, load_tokenizer


def listed(dataset):
    return [{name: sample[name].tolist() for name in ("input_ids", "labels")} for sample in dataset]


def test_prepared_samples_equal_the_tokenised_file_and_are_mapped(write, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("trainer.data.build.ROWS_PER_CHUNK", 4)
    monkeypatch.setattr("trainer.data.sample_files._TOKENS_PER_BATCH", 300)  # several record batches
    path, other = write(*QUESTIONS), write(*QUESTIONS[:2], name="eval.jsonl")
    prepared = tokenise_file(path, tmp_path / "cache", tokenizer, eval=[other])
    samples, report = tokenize(path, tokenizer)
    assert listed(prepared.train) == [{name: array.tolist() for name, array in sample.items()} for sample in samples]
    assert prepared.train_report == report
    assert listed(prepared.eval) == listed(prepared.train)[:2] and prepared.eval_parts[0].report.samples == 2
    (file,) = prepared.train.cache_files
    assert Path(file["filename"]).parents[1] == tmp_path / "cache"


def test_a_second_call_reads_what_the_first_one_wrote(write, tmp_path, tokenizer, monkeypatch):
    path = write(*QUESTIONS)
    first = tokenise_file(path, tmp_path / "cache", tokenizer)
    monkeypatch.setattr(data, "Builder", None)
    again = tokenise_file(
        path, tmp_path / "cache", load_tokenizer("bytes"), seed=1
    )  # no split, so the seed plays no part
    assert folder_of(again) == folder_of(first) and listed(again.train) == listed(first.train)


def test_how_the_tokenizer_was_last_called_plays_no_part(write, tmp_path):
    tokenizer, path = bytes_tokenizer(), write(*QUESTIONS)
    folder = folder_of(tokenise_file(path, tmp_path / "cache", tokenizer))
    tokenizer("a", truncation=True, max_length=4, padding="max_length")  # the backend remembers both
    assert folder_of(tokenise_file(path, tmp_path / "cache", tokenizer)) == folder


def test_whatever_changes_the_samples_changes_the_folder(write, tmp_path, tokenizer):
    def folder(path=None, tokenizer=tokenizer, **changes):
        return folder_of(tokenise_file(path or write(*QUESTIONS), tmp_path / "cache", tokenizer, **changes))

    other_template, other_eos = bytes_tokenizer(), bytes_tokenizer()
    other_template.chat_template += " "
    other_eos.eos_token = "<|pad|>"
    folders = [
        folder(),
        folder(write(*QUESTIONS[:-1])),
        folder(eval_fraction=0.2),
        folder(eval_fraction=0.3),
        folder(eval_fraction=0.3, seed=1),
        folder(max_length=63),
        folder(overflow="drop"),
        folder(packing=True),
        folder(tokenizer=other_template),
        folder(tokenizer=other_eos),
    ]
    assert len(set(folders)) == len(folders)


def test_every_call_gets_the_same_error_and_nothing_is_left(write, tmp_path, tokenizer):
    path = write(QUESTIONS[0], b"{")
    messages = []
    for _ in range(2):
        with pytest.raises(DataError, match=r"train\.jsonl:2: not JSON") as error:
            tokenise_file(path, tmp_path / "cache", tokenizer)
        messages.append(str(error.value))
    with pytest.raises(DataError, match="none of 1 samples"):  # fails later, in the midst of writing
        tokenise_file(write(QUESTIONS[0]), tmp_path / "cache", tokenizer, max_length=3)
    assert messages[0] == messages[1]
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] in ([], [".lock"], [".lock", ".lock"])


def test_what_a_killed_process_left_is_cleared(write, tmp_path, tokenizer):
    path = write(*QUESTIONS)
    folder = folder_of(tokenise_file(path, tmp_path / "cache", tokenizer))
    leftover = folder.with_name(f"{folder.name}.{socket.gethostname()}.killed")
    folder.rename(leftover)
    assert folder_of(tokenise_file(path, tmp_path / "cache", tokenizer)).is_dir() and not leftover.exists()


def test_what_killed_processes_left_of_other_samples_is_cleared_unless_they_still_build(write, tmp_path, tokenizer):
    cache, host = tmp_path / "cache", socket.gethostname()
    left = [f"{'a' * 32}.{host}.1f", f"{'a' * 32}.{host}.damaged.2f"]
    kept = [f"{'b' * 32}.{host}.1f", f"{'a' * 32}.{host}.elsewhere.1f", f"{'a' * 32}.other.1f", "a" * 32, "mine"]
    for name in (*left, *kept):
        (cache / name).mkdir(parents=True)
        (cache / name / "train.arrow").write_bytes(b"x")
    with FileLock(cache / f"{'b' * 32}.lock"):
        tokenise_file(write(*QUESTIONS), cache, tokenizer)
    assert not any((cache / name).exists() for name in left)
    assert all((cache / name / "train.arrow").exists() for name in kept)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_leaves_nothing(write, tmp_path, number, code):
    write(*QUESTIONS * 20_000)
    (tmp_path / "a.yaml").write_text(
        "output: runs/a\nmodel: {random: {model_type: llama}, tokenizer: bytes}\n"
        "train: {steps: 1, global_batch_size: 1}\ndata: {train: train.jsonl, cache: cache}\n"
    )
    command = subprocess.Popen(
        [sys.executable, "-m", "trainer", "prepare", "a.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not list((tmp_path / "cache").glob("*/train.arrow")):
        assert command.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    command.send_signal(number)
    _, said = command.communicate(timeout=60)
    assert command.returncode == code and "Stopped; the source" in said and "Traceback" not in said
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_faster_host_that_the_lock_did_not_reach_wins(write, tmp_path, tokenizer, monkeypatch):
    path = write(*QUESTIONS)
    done = folder_of(tokenise_file(path, tmp_path / "elsewhere", tokenizer))

    def rename_too_late(source, target, rename=os.rename):
        shutil.copytree(done, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_too_late)
    prepared = tokenise_file(path, tmp_path / "cache", tokenizer)
    assert len(prepared.train) == len(QUESTIONS)
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} <= {"", ".lock"}


def test_a_cache_that_cannot_be_written_is_named(write, tmp_path, tokenizer):
    path = write(*QUESTIONS)
    with pytest.raises(DataError, match=r"data\.cache: cannot write to '.*train\.jsonl"):
        tokenise_file(path, path, tokenizer)


def _prepare_together(workspace, answers):
    """Prepare data in `workspace`. The process that builds waits until the other one has reached the lock."""
    lock, build = data.lock, data._Maker._build

    @contextmanager
    def announced_lock(path):
        (workspace / f"locks-{os.getpid()}").touch()
        with lock(path):
            yield

    def late_build(*arguments):
        (workspace / f"built-by-{os.getpid()}").touch()
        while len(list(workspace.glob("locks-*"))) < 2:
            time.sleep(0.01)
        build(*arguments)

    data.lock, data._Maker._build = announced_lock, late_build
    prepared = tokenise_file(
        workspace / "train.jsonl", workspace / "cache", bytes_tokenizer(), eval_fraction=0.25, seed=3
    )
    answers.put((prepared.fingerprint, [len(sample["input_ids"]) for sample in prepared.train]))


def test_processes_that_come_together_tokenise_once(write, tmp_path):
    write(*QUESTIONS)
    context = forked.context()
    answers = context.SimpleQueue()
    processes = [context.Process(target=_prepare_together, args=(tmp_path, answers), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert answers.get() == answers.get()
    assert len(list(tmp_path.glob("built-by-*"))) == 1


def test_the_split_depends_on_the_seed_alone_and_covers_every_row(write, tmp_path, tokenizer):
    path = write(*QUESTIONS)

    def sides(**changes):
        prepared = tokenise_file(path, tmp_path / "cache", tokenizer, eval_fraction=1 / 3, **changes)
        # Question n's number is the byte that follows "Question: What is ".
        return [[int(chr(sample["input_ids"][18])) for sample in side] for side in (prepared.train, prepared.eval)]

    train, evaluation = sides()
    assert (len(train), len(evaluation)) == (6, 3)
    assert sorted(train + evaluation) == list(range(9))
    assert sides(max_length=40) == [train, evaluation]
    assert len({tuple(sides(seed=seed)[1]) for seed in range(5)}) > 1


@pytest.mark.parametrize(("fraction", "side"), [(0.01, "evaluate"), (0.99, "train")])
def test_a_split_with_an_empty_side_is_refused(write, tmp_path, tokenizer, fraction, side):
    with pytest.raises(
        DataError, match=rf"data\.eval_fraction: {fraction} of (the )?9 rows .*leaves none to {side} on"
    ):
        tokenise_file(write(*QUESTIONS), tmp_path / "cache", tokenizer, eval_fraction=fraction)


def test_a_fraction_beside_an_evaluation_file_is_refused(write, tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"data\.eval_fraction: 0\.5, but data\.eval is given"):
        tokenise_file(write(*QUESTIONS), tmp_path / "cache", tokenizer, eval=[write(QUESTIONS[0])], eval_fraction=0.5)


def test_how_a_source_is_read_is_part_of_its_name(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    row = json.dumps({"instruction": "a", "output": "b", "text": "c"})
    for name in ("a.jsonl", "a.json", "set/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{row}\n{row}\n")
    sources = [
        {"path": "a.jsonl", "format": "text"},
        {"path": "a.jsonl", "format": "alpaca"},
        {"path": "a.json", "format": "text"},
        {"path": "set", "format": "text"},
        {"path": "set", "format": "text", "split": "train[:1]"},
    ]
    named = [{**source, "path": str(tmp_path / source["path"])} for source in sources]
    folders = [folder_of(tokenised(tmp_path, tokenizer, source, max_length=300)) for source in named]
    assert len(set(folders)) == len(folders)


def test_rows_without_an_answer_are_dropped_and_counted(write, tmp_path, tokenizer) -> None:
    texts = write({"text": "one"}, {"text": ""}, {"text": None}, {"text": "two"}, name="texts.jsonl")
    pairs = write({"question": "a", "answer": "b"}, {"question": "c", "answer": ""}, name="pairs.jsonl")
    found = tokenised(tmp_path, tokenizer, texts, pairs)
    assert [(part.report.samples, part.report.dropped) for part in found.train_parts] == [(2, 2), (1, 1)]


@pytest.mark.parametrize("several", [False, True])
def test_a_data_set_that_was_saved_to_disk(tmp_path, tokenizer, several: bool) -> None:
    saved = Dataset.from_list([{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}])
    (DatasetDict(train=saved, other=saved.select([0])) if several else saved).save_to_disk(tmp_path / "saved")
    assert len(tokenised(tmp_path, tokenizer, tmp_path / "saved").train) == 2
    if several:
        other = {"path": str(tmp_path / "saved"), "split": "other"}
        assert len(tokenised(tmp_path, tokenizer, other).train) == 1
        with pytest.raises(DataError, match="split='none'"):
            tokenised(tmp_path, tokenizer, other | {"split": "none"})
