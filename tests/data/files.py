"""Turn rows and files into samples, for the tests of trainer/data/."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.config.schema import DataSource, TrainSource
from trainer.data.batches import IGNORED
from trainer.data.cache import tokenise
from trainer.data.encode import ROWS_PER_CHUNK, Encoder, Outcomes, Report
from trainer.data.errors import BadRows
from trainer.data.plain_files import Position
from trainer.data.rows import read_rows
from trainer.data.sources import open_source

ROOT = Path(__file__).resolve().parents[2]

QUESTIONS = [{"question": f"What is {n}?", "answer": str(n) * (n + 1)} for n in range(9)]


def encode(path, rows, tokenizer, *, max_length, overflow, keep):
    """Encode rows and pass each sample to `keep`. Returns the report."""
    encoder, outcomes = Encoder(tokenizer, max_length=max_length, overflow=overflow), Outcomes()
    tokens = targets = 0
    for start in range(0, len(rows), ROWS_PER_CHUNK):
        encoded = encoder.encode(rows[start : start + ROWS_PER_CHUNK])
        outcomes.add(encoded)
        for sample in encoded.samples:
            keep(sample)
        tokens, targets = tokens + len(encoded.ids), targets + int(np.count_nonzero(encoded.labels != IGNORED))
    every = np.full(len(rows), True)
    counts = outcomes.check(path, BadRows(path), every, max_length=max_length, overflow=overflow)
    return Report(*counts, tokens, targets)


def tokenize(path, tokenizer, max_length=1000, overflow="truncate"):
    opened = open_source(DataSource(path=str(path)))
    rows = read_rows(opened.path, opened.records(Position()))
    samples = []
    report = encode(opened.path, rows, tokenizer, max_length=max_length, overflow=overflow, keep=samples.append)
    return samples, report


def tokenise_file(train, cache, tokenizer, **changes):
    settings = {"eval": (), "eval_fraction": 0.0, "max_length": 64, "overflow": "truncate", "packing": False, "seed": 0}
    given = {**settings, **changes}
    given["eval"] = [DataSource(path=str(path)) for path in given["eval"]]
    return tokenise(train=[TrainSource(path=str(train))], cache=cache, tokenizer=tokenizer, **given)


def folder_of(prepared):
    return Path(prepared.train.cache_files[0]["filename"]).parent
