import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import trainer.data as data
from tests.data.conftest import prepared
from trainer.config.schema import DataSource, TrainSource
from trainer.data import Batches, DataError, Report, collate, count_targets, count_tokens, eval_batches, prepare
from trainer.data.encode import encode
from trainer.data.rows import read_rows
from trainer.data.sources import open_source
from trainer.data.tokenizer import bytes_tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTIONS = ROOT / "launch" / "data" / "instructions.jsonl"

QUESTIONS = [{"question": f"What is {n}?", "answer": str(n) * (n + 1)} for n in range(9)]
CHAT = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hé"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "yes"},
    ]
}


def tokenize(path, tokenizer, max_length=1000, overflow="truncate"):
    opened = open_source(DataSource(path=str(path)))
    rows = read_rows(opened.path, opened.records())
    samples = []
    report = encode(opened.path, rows, tokenizer, max_length=max_length, overflow=overflow, keep=samples.append)
    return samples, report


def texts(sample, tokenizer):
    """The whole text of a sample, and the part of it that the loss is taken over."""
    ids, labels = sample["input_ids"], sample["labels"]
    assert ids.dtype == labels.dtype == np.int32
    assert set(labels[labels != ids].tolist()) <= {-100}
    return tokenizer.decode(ids), tokenizer.decode(labels[labels != -100])


def merging_tokenizer(**special):
    """Four letters, one merge across what would be the border ("b" and "c"), and <s> put in front of every text."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "d": 5, "bc": 6}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


# Rendering and masks


@pytest.mark.parametrize(
    ("row", "whole", "target"),
    [
        ({"question": "Why?", "answer": "So."}, "Question: Why?\nAnswer: So.<|eos|>", "So.<|eos|>"),
        ({"prompt": "a b ", "completion": " é\n", "id": 3}, "a b  é\n<|eos|>", " é\n<|eos|>"),
        ({"prompt": "a", "completion": "b<|eos|>"}, "ab<|eos|>", "b<|eos|>"),
        (
            CHAT,
            "<|user|>hi<|assistant|>hé<|eos|><|user|>and?<|assistant|>yes<|eos|>",
            "hé<|eos|>yes<|eos|>",
        ),
    ],
    ids=["question", "prompt", "own-end", "messages"],
)
def test_a_row_is_rendered_with_the_loss_on_the_answer_only(write, tokenizer, row, whole, target):
    samples, report = tokenize(write(row), tokenizer)
    assert [texts(sample, tokenizer) for sample in samples] == [(whole, target)]
    targets = len(tokenizer(target)["input_ids"])
    assert report == Report(1, 0, 0, tokens=len(tokenizer(whole)["input_ids"]), target_tokens=targets)


def test_prompt_and_answer_are_tokenised_apart_and_bos_is_the_tokenizers_own(write):
    tokenizer = merging_tokenizer(bos_token="<s>", eos_token="</s>")
    assert tokenizer("abcd")["input_ids"] == [0, 2, 6, 5]
    path = write({"prompt": "ab", "completion": "cd"}, {"prompt": "<s>ab", "completion": "cd</s>"})
    samples, _ = tokenize(path, tokenizer)
    for sample in samples:
        assert sample["input_ids"].tolist() == [0, 2, 3, 4, 5, 1]
        assert sample["labels"].tolist() == [-100, -100, -100, 4, 5, 1]


def test_a_tokenizer_without_an_end_of_text_is_refused(write):
    with pytest.raises(DataError, match=r"model\.tokenizer: has no end-of-text token"):
        tokenize(write({"prompt": "ab", "completion": "cd"}), merging_tokenizer(bos_token="<s>"))


def test_a_template_without_marks_is_patched_by_trl_or_refused(write):
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = qwen2_5_chat_template
    samples, _ = tokenize(write(CHAT), tokenizer)
    target = texts(samples[0], tokenizer)[1]
    assert target.replace("\n", "") == "hé<|im_end|>yes<|im_end|>"  # TRL counts the line breaks around as targets too

    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"no {% generation %} marks.*TRL offers no patch.*chat_template\.jinja"):
        tokenize(write(CHAT), tokenizer)

    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"model\.tokenizer: has no chat template.*{prompt, completion}"):
        tokenize(write(CHAT), tokenizer)


def test_a_row_that_the_template_refuses_is_named(write, tokenizer):
    with pytest.raises(DataError, match=r"train\.jsonl:2: .*unknown role 'critic'"):
        tokenize(write(CHAT, {"messages": [*CHAT["messages"], {"role": "critic", "content": "x"}]}), tokenizer)


def test_the_first_token_is_no_target_even_where_it_has_a_label(write):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    path = write(*[{"messages": [{"role": "assistant", "content": content}]} for content in ("abc", "d")])
    samples, report = tokenize(path, tokenizer)
    assert [sample["labels"].tolist() for sample in samples] == [[-100, *b"bc"]]
    assert report == Report(samples=1, truncated=0, dropped=1, tokens=3, target_tokens=2)


# Bad files


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"question": nope}', r"not JSON: Expecting value at column 14"),
        (b'{"question": ', r"not JSON: Expecting value at column 1[34]"),
        (b'{"question": "\xff", "answer": "b"}', r"not UTF-8 text: byte 0xff at column 15"),
        (b'["question"]', r"list \[\"question\"\] where an object is needed"),
        ({"question": "b", "id": 1}, r"column answer missing: the row has {question, id}, but the format is qa "),
        (
            {"prompt": "a", "completion": "b"},
            r"column question, answer missing: the row has {prompt, completion}, but the format is qa "
            r"{question, answer} by .*train\.jsonl:1; do not mix formats",
        ),
        ({"question": "a", "answer": 7}, r"answer: number 7 where a string is needed"),
        ({"question": "", "answer": "b"}, r"question: empty string"),
        ({"question": "a", "answer": 4}, r"answer: number 4 where a string is needed"),
        ({"question": "a", "answer": "\ud83c"}, r"answer: lone surrogate '\\ud83c' at character 1"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(write, tokenizer, line, problem):
    path = write(QUESTIONS[0], b"", line, QUESTIONS[1])
    with pytest.raises(DataError, match=rf"train\.jsonl:3: {problem}"):
        tokenize(path, tokenizer)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], r"messages: empty list where a list of {role, content}"),
        ("hi", r"messages: string \"hi\" where a list"),
        ([{"role": "user"}], r"messages\[0\]: {role} where {role, content} is needed"),
        ([{"role": "user", "content": "a"}], r"messages: no message with role 'assistant'"),
        ([{"role": "assistant", "content": ""}], r"messages\[0\]\.content: empty string"),
    ],
)
def test_bad_messages_are_named(write, tokenizer, messages, problem):
    with pytest.raises(DataError, match=rf"train\.jsonl:1: {problem}"):
        tokenize(write({"messages": messages}), tokenizer)


def test_problems_are_collected_up_to_ten(write, tokenizer):
    with pytest.raises(DataError) as few:
        tokenize(write(b"{", QUESTIONS[0], b"["), tokenizer)
    assert [problem.split(": ")[0].rsplit(":")[-1] for problem in few.value.problems] == ["1", "3"]
    with pytest.raises(DataError) as many:
        tokenize(write(*[b"{"] * 50), tokenizer)
    assert len(many.value.problems) == 11 and many.value.problems[-1].endswith("stopped after 10 problems")


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_an_empty_file_is_refused(write, tokenizer, content):
    with pytest.raises(DataError, match=r"train\.jsonl: holds no rows"):
        tokenize(write(content), tokenizer)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, tokenizer, name):
    with pytest.raises(DataError, match=r"cannot be read: No such file|no data set here"):
        tokenize(tmp_path / name, tokenizer)


def test_a_byte_order_mark_and_blank_lines_are_skipped(write, tokenizer):
    path = write(b"\xef\xbb\xbf" + json.dumps(QUESTIONS[0]).encode(), b" \r", QUESTIONS[1])
    assert tokenize(path, tokenizer)[1].samples == 2


# Over-long samples. "ab" + "c" * n + end: 3 + n tokens


def long_rows(write):
    return write(*[{"prompt": prompt, "completion": "c" * 4} for prompt in ("ab", "abab", "abababab")])


def test_truncation_cuts_the_end_and_drops_what_keeps_no_target(write, tokenizer):
    samples, report = tokenize(long_rows(write), tokenizer, max_length=7)
    assert [texts(sample, tokenizer) for sample in samples] == [("abcccc<|eos|>", "cccc<|eos|>"), ("ababccc", "ccc")]
    assert report == Report(samples=2, truncated=1, dropped=1, tokens=14, target_tokens=8)


def test_drop_leaves_long_samples_out(write, tokenizer):
    samples, report = tokenize(long_rows(write), tokenizer, max_length=8, overflow="drop")
    assert [texts(sample, tokenizer)[0] for sample in samples] == ["abcccc<|eos|>"]
    assert report == Report(samples=1, truncated=0, dropped=2, tokens=7, target_tokens=5)


def test_error_lists_the_long_samples(write, tokenizer):
    path = long_rows(write)
    with pytest.raises(DataError) as error:
        tokenize(path, tokenizer, max_length=8, overflow="error")
    assert error.value.problems[:2] == [
        f"{path}:2: 9 tokens, data.max_length is 8",
        f"{path}:3: 13 tokens, data.max_length is 8",
    ]
    assert "data.overflow" in error.value.problems[2]
    assert tokenize(path, tokenizer, max_length=13, overflow="error")[1].samples == 3


@pytest.mark.parametrize("overflow", ["truncate", "drop"])
def test_no_sample_left_is_an_error(write, tokenizer, overflow):
    with pytest.raises(DataError, match=r"none of 3 samples is left.*data\.max_length=2.*raise data\.max_length"):
        tokenize(long_rows(write), tokenizer, max_length=2, overflow=overflow)


# Prepared once, on disk


def call(train, cache, tokenizer, **changes):
    settings = {"eval": (), "eval_fraction": 0.0, "max_length": 64, "overflow": "truncate", "packing": False, "seed": 0}
    given = {**settings, **changes}
    given["eval"] = [DataSource(path=str(path)) for path in given["eval"]]
    return prepare(train=[TrainSource(path=str(train))], cache=cache, tokenizer=tokenizer, **given)


def folder_of(prepared):
    return Path(prepared.train.cache_files[0]["filename"]).parent


def listed(dataset):
    return [{name: sample[name].tolist() for name in ("input_ids", "labels")} for sample in dataset]


def test_prepared_samples_equal_the_tokenised_file_and_are_mapped(write, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "ROWS_PER_CHUNK", 4)  # several record batches, the last one not full
    path, other = write(*QUESTIONS), write(*QUESTIONS[:2], name="eval.jsonl")
    prepared = call(path, tmp_path / "cache", tokenizer, eval=[other])
    samples, report = tokenize(path, tokenizer)
    assert listed(prepared.train) == [{name: array.tolist() for name, array in sample.items()} for sample in samples]
    assert prepared.train_report == report
    assert listed(prepared.eval) == listed(prepared.train)[:2] and prepared.eval_parts[0].report.samples == 2
    (file,) = prepared.train.cache_files
    assert Path(file["filename"]).parents[1] == tmp_path / "cache"


def test_a_second_call_reads_what_the_first_one_wrote(write, tmp_path, tokenizer, monkeypatch):
    path = write(*QUESTIONS)
    first = call(path, tmp_path / "cache", tokenizer)
    monkeypatch.setattr(data, "encode", None)
    again = call(path, tmp_path / "cache", load_tokenizer("bytes"), seed=1)  # no split, so the seed plays no part
    assert folder_of(again) == folder_of(first) and listed(again.train) == listed(first.train)


def test_how_the_tokenizer_was_last_called_plays_no_part(write, tmp_path):
    tokenizer, path = bytes_tokenizer(), write(*QUESTIONS)
    folder = folder_of(call(path, tmp_path / "cache", tokenizer))
    tokenizer("a", truncation=True, max_length=4, padding="max_length")  # the backend remembers both
    assert folder_of(call(path, tmp_path / "cache", tokenizer)) == folder


def test_whatever_changes_the_samples_changes_the_folder(write, tmp_path, tokenizer):
    def folder(path=None, tokenizer=tokenizer, **changes):
        return folder_of(call(path or write(*QUESTIONS), tmp_path / "cache", tokenizer, **changes))

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
            call(path, tmp_path / "cache", tokenizer)
        messages.append(str(error.value))
    with pytest.raises(DataError, match="none of 1 samples"):  # fails later, in the midst of writing
        call(write(QUESTIONS[0]), tmp_path / "cache", tokenizer, max_length=3)
    assert messages[0] == messages[1]
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] in ([], [".lock"], [".lock", ".lock"])


def test_what_a_killed_process_left_is_cleared(write, tmp_path, tokenizer):
    path = write(*QUESTIONS)
    folder = folder_of(call(path, tmp_path / "cache", tokenizer))
    leftover = folder.with_name(f"{folder.name}.{socket.gethostname()}.killed")
    folder.rename(leftover)
    assert folder_of(call(path, tmp_path / "cache", tokenizer)).is_dir() and not leftover.exists()


def test_a_faster_host_that_the_lock_did_not_reach_wins(write, tmp_path, tokenizer, monkeypatch):
    path = write(*QUESTIONS)
    done = folder_of(call(path, tmp_path / "elsewhere", tokenizer))

    def rename_too_late(source, target, rename=os.rename):
        shutil.copytree(done, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_too_late)
    prepared = call(path, tmp_path / "cache", tokenizer)
    assert len(prepared.train) == len(QUESTIONS)
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} <= {"", ".lock"}


def test_a_cache_that_cannot_be_written_or_is_damaged_is_named(write, tmp_path, tokenizer):
    path = write(*QUESTIONS)
    with pytest.raises(DataError, match=r"data\.cache: cannot write to '.*train\.jsonl"):
        call(path, path, tokenizer)
    folder = folder_of(call(path, tmp_path / "cache", tokenizer))
    (folder / "train.arrow").write_bytes(b"x")
    with pytest.raises(DataError, match=rf"data\.cache: '.*{folder.name}' is damaged .*delete that folder"):
        call(path, tmp_path / "cache", tokenizer)


def test_processes_that_come_together_tokenise_once(write, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, time\n"
        "import trainer.data as data\n"
        "from trainer.data.tokenizer import bytes_tokenizer\n"
        "from trainer.config.schema import TrainSource\n"
        "def slow(*arguments, build=data._Maker._build, **options):\n"
        "    open(f'built-by-{os.getpid()}', 'w').close()\n"
        "    time.sleep(0.5)\n"
        "    build(*arguments, **options)\n"
        "data._Maker._build = slow\n"
        "tokenizer = bytes_tokenizer()\n"
        "open(f'ready-{os.getpid()}', 'w').close()\n"
        "while len([name for name in os.listdir() if name.startswith('ready')]) < 2: time.sleep(0.01)\n"
        "prepared = data.prepare(train=[TrainSource(path='train.jsonl')], eval=[], eval_fraction=0.25,\n"
        "    tokenizer=tokenizer, max_length=64, overflow='error', packing=False, cache='cache', seed=3)\n"
        "print(prepared.fingerprint, [len(sample['input_ids']) for sample in prepared.train])\n"
    )
    write(*QUESTIONS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    assert len(list(tmp_path.glob("built-by-*"))) == 1


def test_the_split_depends_on_the_seed_alone_and_covers_every_row(write, tmp_path, tokenizer):
    path = write(*QUESTIONS)

    def sides(**changes):
        prepared = call(path, tmp_path / "cache", tokenizer, eval_fraction=1 / 3, **changes)
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
        call(write(*QUESTIONS), tmp_path / "cache", tokenizer, eval_fraction=fraction)


def test_a_fraction_beside_an_evaluation_file_is_refused(write, tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"data\.eval_fraction: 0\.5 beside data\.eval;"):
        call(write(*QUESTIONS), tmp_path / "cache", tokenizer, eval=[write(QUESTIONS[0])], eval_fraction=0.5)


# The shipped data set


def test_the_shipped_instructions_are_what_the_script_writes():
    script = runpy.run_path(str(INSTRUCTIONS.with_name("make_instructions.py")))
    assert INSTRUCTIONS.read_text(encoding="utf-8") == script["text"]()


def test_the_shipped_instructions_are_short_and_unique(tokenizer):
    samples, report = tokenize(INSTRUCTIONS, tokenizer, max_length=128, overflow="error")
    assert 1000 <= report.samples <= 1400 and report.dropped == 0
    rows = [json.loads(line) for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines()]
    assert len({row["question"] for row in rows}) == len(rows) == report.samples
    assert max(len(row["question"] + row["answer"]) for row in rows) < 120


# Batches


def batches(ranks, rank, *, num_samples=10, size=8, micro=2, seed=0):
    return Batches([num_samples], seed=seed, global_batch_size=size, micro_batch_size=micro, rank=rank, ranks=ranks)


def step_of_all(ranks, step, **settings):
    """The micro-batches of a step in the order in which the ranks are dealt them."""
    per_rank = [batches(ranks, rank, **settings).indices(step) for rank in range(ranks)]
    return [per_rank[rank][micro] for micro in range(len(per_rank[0])) for rank in range(ranks)]


def test_the_global_batch_does_not_depend_on_the_number_of_ranks():
    for step in range(7):
        alone = step_of_all(1, step)
        assert [len(micro) for micro in alone] == [2] * 4
        assert step_of_all(2, step) == step_of_all(4, step) == alone
        assert sum(step_of_all(2, step, micro=4), []) == sum(alone, [])


def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own():
    stream = [index for step in range(10) for micro in batches(1, 0).indices(step) for index in micro]
    epochs = [stream[start : start + 10] for start in range(0, 80, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs)
    assert batches(1, 0, seed=1).indices(0) != batches(1, 0).indices(0)


def test_a_step_larger_than_the_data_spans_epochs():
    (step,) = batches(1, 0, num_samples=3, size=8, micro=8).indices(1)
    first = [batches(1, 0, num_samples=3, size=1, micro=1).indices(position)[0][0] for position in range(8, 16)]
    assert step == first


def test_a_step_is_a_pure_function_of_its_number():
    forward = [batches(2, 1).indices(step) for step in range(12)]
    used = batches(2, 1)
    assert [used.indices(step) for step in reversed(range(12))] == forward[::-1]


def test_the_order_stays_what_it_was():
    """Resuming relies on it: a change here breaks the checkpoints of others."""
    assert batches(1, 0).indices(0) == [[4, 6], [2, 7], [3, 5], [9, 0]]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"size": 6}, r"train\.global_batch_size: 6 is no multiple of .* 2 x 2"),
        ({"num_samples": 0}, r"sizes are \[0\]; at least one sample"),
        ({"rank": 2}, "rank is 2; allowed: 0 to 1"),
    ],
)
def test_impossible_batches_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        batches(2, **{"rank": 0, **settings})


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_samples", "max_samples"), [(1, None), (7, None), (8, 5), (9, 100), (24, 4)])
def test_evaluation_takes_every_sample_once_in_equally_many_batches(ranks, num_samples, max_samples):
    shares = [
        eval_batches(num_samples, micro_batch_size=2, rank=rank, ranks=ranks, max_samples=max_samples)
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    taken = sorted(index for share in shares for batch in share for index in batch)
    count = min(num_samples, max_samples or num_samples)
    assert len(set(taken)) == len(taken) == count
    assert set(taken) <= set(range(num_samples))
    assert max(len(batch) for share in shares for batch in share) <= 2
    assert len(shares[0]) == -(-count // (2 * ranks))


def test_a_limited_evaluation_is_spread_over_the_file():
    assert eval_batches(12, micro_batch_size=4, rank=0, ranks=1, max_samples=4) == [[0, 3, 6, 9]]


# Collating


@pytest.mark.parametrize(("pad_to", "length"), [(None, 3), (4, 4), (3, 3)])
def test_collate_pads_on_the_right(pad_to, length):
    samples = [{"input_ids": [7], "labels": [7]}, {"input_ids": np.array([5, 6, 7]), "labels": np.array([-100, 6, 7])}]
    batch = collate(samples, pad_id=9, pad_to=pad_to)
    fill = [9] * (length - 3)
    off = [-100] * (length - 3)
    expected = {
        "input_ids": [[7, 9, 9, *fill], [5, 6, 7, *fill]],
        "attention_mask": [[1, 0, 0, *[0] * (length - 3)], [1, 1, 1, *[0] * (length - 3)]],
        "labels": [[7, -100, -100, *off], [-100, 6, 7, *off]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_the_first_label_is_no_target():
    assert count_targets(torch.tensor([[5, -100, 6], [5, 6, 7], [5, -100, -100]])) == 3


def test_prepared_samples_collate_and_count_as_reported(write, tmp_path, tokenizer):
    prepared = call(write(*QUESTIONS), tmp_path / "cache", tokenizer)
    batch = collate([prepared.train[index] for index in range(len(QUESTIONS))], pad_id=256)
    assert count_targets(batch["labels"]) == prepared.train_report.target_tokens
    assert count_tokens(batch) == prepared.train_report.tokens


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
    folders = [folder_of(prepared(tmp_path, tokenizer, source, max_length=300)) for source in named]
    assert len(set(folders)) == len(folders)


def test_rows_without_an_answer_are_dropped_and_counted(write, tmp_path, tokenizer) -> None:
    texts = write({"text": "one"}, {"text": ""}, {"text": None}, {"text": "two"}, name="texts.jsonl")
    pairs = write({"question": "a", "answer": "b"}, {"question": "c", "answer": ""}, name="pairs.jsonl")
    found = prepared(tmp_path, tokenizer, texts, pairs)
    assert [(part.report.samples, part.report.dropped) for part in found.train_parts] == [(2, 2), (1, 1)]


@pytest.mark.parametrize("several", [False, True])
def test_a_data_set_that_was_saved_to_disk(tmp_path, tokenizer, several: bool) -> None:
    saved = Dataset.from_list([{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}])
    (DatasetDict(train=saved, other=saved.select([0])) if several else saved).save_to_disk(tmp_path / "saved")
    assert len(prepared(tmp_path, tokenizer, tmp_path / "saved").train) == 2
    if several:
        other = {"path": str(tmp_path / "saved"), "split": "other"}
        assert len(prepared(tmp_path, tokenizer, other).train) == 1
        with pytest.raises(DataError, match="split='none'"):
            prepared(tmp_path, tokenizer, other | {"split": "none"})
