"""The format `prompt`: {prompt, completion}, verbatim, or as lists of messages, of which the completion's train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainer.data.formats.base import Row
from trainer.data.formats.conversations import conversation_format, read_answer_to
from trainer.data.formats.fields import answer, kind, text


def read(where: str, values: Mapping[str, Any]) -> Row:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return read_answer_to(where, values, "prompt", "completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        raise ValueError(
            f"prompt: {kind(prompt)}, and completion: {kind(completion)}; both must be texts, or both lists of messages"
        )
    return Row(where, prompt=text(prompt, "prompt"), answer=answer(completion, "completion"), verbatim=True)


FORMAT = replace(
    conversation_format("prompt", "completion", read=read),
    takes_optional=lambda values: isinstance(values["prompt"], list),
)
