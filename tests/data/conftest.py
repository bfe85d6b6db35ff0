"""Data files and a tokenizer for the tests of trainer/data/."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.schema import DataSource, TrainSource
from trainer.data.cache import TokenisedData, tokenise
from trainer.data.formats.base import Row
from trainer.data.plain_files import Position
from trainer.data.rows import read_rows
from trainer.data.sources import open_source
from trainer.data.tokenizer import bytes_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return bytes_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (objects, or bytes as they are) to a JSONL file."""

    def write(*rows: Any, name: str = "train.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
        return tmp_path / name

    return write


def rows_of(path: str | Path, **keys: Any) -> list[Row]:
    source = DataSource(path=str(path), **keys)
    opened = open_source(source)
    return read_rows(opened.path, opened.records(Position()), source.format)


def tokenised(tmp_path: Path, tokenizer: Any, *train: dict[str, Any] | str | Path, **changes: Any) -> TokenisedData:
    settings = {"eval": (), "eval_fraction": 0.0, "max_length": 64, "overflow": "truncate", "packing": False, "seed": 0}
    sources = [TrainSource(**(source if isinstance(source, dict) else {"path": str(source)})) for source in train]
    return tokenise(train=sources, cache=tmp_path / "cache", tokenizer=tokenizer, **{**settings, **changes})
