"""The format `alpaca`: {instruction, input, output}, with earlier turns in `history`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.formats.base import SYSTEM, Format, Row, system_prompt
from trainer.data.formats.fields import answer, kind, text

# The prompts that the format was published with (github.com/tatsu-lab/stanford_alpaca).
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


def read(where: str, values: Mapping[str, Any]) -> Row:
    instruction = text(values["instruction"], "instruction")
    given = None if values.get("input") in (None, "") else text(values["input"], "input")
    system = system_prompt(values)
    # A system prompt replaces the published introduction, as in Axolotl's `alpaca_w_system`.
    published = ALPACA if given is None else ALPACA_WITH_INPUT
    parts = [published if system is None else f"### System:\n{system}\n\n"]
    for question, reply in _history(values.get("history") or []):
        parts.append(f"{_turn(question)}{reply}\n\n")
    parts.append(_turn(instruction, given))
    return Row(where, prompt="".join(parts), answer=answer(values["output"], "output"))


def _turn(instruction: str, given: str | None = None) -> str:
    given = "" if given is None else f"### Input:\n{given}\n\n"
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"


def _history(pairs: Any) -> list[tuple[str, str]]:
    """Return the earlier turns: pairs of an instruction and its answer, as in LLaMA-Factory."""
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"history: {kind(pairs)}, but a list of [instruction, answer] is needed")
    return [
        (text(pair[0], f"history[{index}][0]"), text(pair[1], f"history[{index}][1]"))
        for index, pair in enumerate(pairs)
    ]


FORMAT = Format(
    ("instruction", "output"),
    read,
    optional=("input", "history", *SYSTEM),
    texts=("instruction", "output", "input", *SYSTEM),
)
