"""The format `preference`: two answers to a prompt, {prompt, chosen, rejected}, as texts or as lists of messages.

A run trains on the chosen answer. `trainer.data.pairs` has both for a loop of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile
from typing import Any

from trainer.data.formats.base import Row
from trainer.data.formats.conversations import conversation_format, read_answer_to
from trainer.data.formats.fields import answer, is_empty, kind, text


def read(where: str, values: Mapping[str, Any]) -> Row:
    """Read the prompt with the chosen answer; `rejected` of that row is the prompt with the rejected one.

    Lists of messages without a prompt, or with one that is the text of their last common message, begin with the
    conversation that both have in common. Raises `ValueError` if there is none, if the answers are equal, or if one is
    a text and the other is not.
    """
    chosen, rejected = values["chosen"], values["rejected"]
    prompt = None if is_empty(values.get("prompt")) else values["prompt"]
    missing = [name for name in ("chosen", "rejected") if values[name] is None]
    if missing:
        raise ValueError(f"{missing[0]}: null, so that the row states no preference")
    if chosen == rejected:
        raise ValueError("chosen, rejected: they are the same, so that the row states no preference")
    if isinstance(chosen, list) and isinstance(rejected, list):
        if not isinstance(prompt, list):
            prompt, chosen, rejected = _apart(prompt, chosen, rejected)
        apart = {**values, "prompt": prompt, "chosen": chosen, "rejected": rejected}
        preferred, other = (read_answer_to(where, apart, "prompt", name) for name in ("chosen", "rejected"))
        return replace(preferred, rejected=other)
    if any(isinstance(value, list) for value in (prompt, chosen, rejected)):
        raise ValueError(
            f"prompt: {kind(prompt)}, chosen: {kind(chosen)}, and rejected: {kind(rejected)}; all must be texts, or "
            "all lists of messages"
        )
    beside = [name for name in _OF_CONVERSATIONS if not is_empty(values.get(name))]
    if beside:
        raise ValueError(
            f"{beside[0]}: {kind(values[beside[0]])}, for which a row of texts has no place; write prompt, chosen and "
            f"rejected as lists of messages, or leave it out by ignore: [{beside[0]}]"
        )
    if prompt is None:
        raise ValueError("prompt: null, but texts need it: write there what both answers continue")
    other = Row(where, prompt=text(prompt, "prompt"), answer=answer(rejected, "rejected"), verbatim=True)
    return replace(other, answer=answer(chosen, "chosen"), rejected=other)


def _apart(prompt: Any, chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the messages that both conversations begin with, and what each has after them. Without any, a text is what
    the user says."""
    common = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))]
    if not common and isinstance(prompt, str):
        return [{"role": "user", "content": prompt}], chosen, rejected
    if not common:
        raise ValueError("chosen, rejected: conversations without a prompt must begin with the same messages")
    last = common[-1].get("content") if isinstance(common[-1], Mapping) else None
    if prompt is not None and prompt != last:
        raise ValueError(f"prompt: {kind(prompt)}, but the last message that chosen and rejected share is {kind(last)}")
    return common, chosen[len(common) :], rejected[len(common) :]


_CONVERSATIONS = conversation_format("prompt", "chosen", "rejected", read=read)
_OF_CONVERSATIONS = _CONVERSATIONS.optional
FORMAT = replace(_CONVERSATIONS, columns=("chosen", "rejected"), optional=("prompt", *_OF_CONVERSATIONS))
