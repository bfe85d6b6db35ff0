"""The format `qa`: {question, answer}, with a `context` before the question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.formats.base import SYSTEM, Format, Row, system_prompt
from trainer.data.formats.fields import answer, text


def read(where: str, values: Mapping[str, Any]) -> Row:
    prompt = f"Question: {text(values['question'], 'question')}\nAnswer: "
    if values.get("context") not in (None, ""):
        prompt = f"Context: {text(values['context'], 'context')}\n{prompt}"
    system = system_prompt(values)
    if system is not None:
        prompt = f"{system}\n\n{prompt}"
    return Row(where, prompt=prompt, answer=answer(values["answer"], "answer"))


FORMAT = Format(
    ("question", "answer"),
    read,
    optional=("context", *SYSTEM),
    texts=("question", "answer", "context", *SYSTEM),
)
