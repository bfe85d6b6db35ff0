"""launch/data: the instructions that are shipped."""

import json
import runpy

from tests.data.files import ROOT, tokenize

INSTRUCTIONS = ROOT / "launch" / "data" / "instructions.jsonl"


def test_the_shipped_instructions_are_what_the_script_writes():
    script = runpy.run_path(str(INSTRUCTIONS.with_name("make_instructions.py")))
    assert INSTRUCTIONS.read_text(encoding="utf-8") == script["text"]()


def test_the_shipped_instructions_are_short_and_unique(tokenizer):
    samples, report = tokenize(INSTRUCTIONS, tokenizer, max_length=128, overflow="error")
    assert 1000 <= report.samples <= 1400 and report.dropped == 0
    rows = [json.loads(line) for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines()]
    assert len({row["question"] for row in rows}) == len(rows) == report.samples
    assert max(len(row["question"] + row["answer"]) for row in rows) < 120
