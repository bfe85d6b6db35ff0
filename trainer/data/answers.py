"""Find what the assistant says in a rendered conversation, for chat templates that do not mark it.

Most published templates lack `{% generation %}` marks. So a mark is put into the content of each message, and the text
around the mark is compared with the whole: many templates write an earlier turn differently once others follow, for
instance without its reasoning. An answer begins where the template stops when told to add a generation prompt, and ends
with the end mark that is common to the conversation up to this message and the whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Span = tuple[int, int]
# Return the text of messages; the second argument: whether to add a generation prompt. Raises `RefusedRow`.
Render = Callable[[Sequence[Message], bool], str]

_MARK = "marked_answer_"
_END_OF_REASONING = "</think>"


class RefusedRow(ValueError):
    """A row that the chat template cannot render, or not in full."""


def find_answers(messages: Sequence[Message], text: str, render: Render, tokens: Collection[str]) -> list[Span]:
    """Return where each of the assistant's messages is in `text`, in characters, in order: content, calls and end mark.

    `text` is the whole conversation as `render` returns it; `tokens` are those that a template can write as end marks.
    Raises `RefusedRow`, naming the message, if the parts of the conversation do not make up the whole.
    """
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        span = _find(messages, index, text, render, tokens)
        if span is None or (spans and span[0] < spans[-1][1]):
            raise RefusedRow(
                f"message {index + 1} of {len(messages)}: cannot tell which part of the text is the assistant's, since "
                "the chat template has no {% generation %} marks and writes this message differently when others "
                "follow; put {% generation %} ... {% endgeneration %} around the assistant's content and end mark in "
                "chat_template.jinja"
            )
        spans.append(span)
    return spans


def _find(messages: Sequence[Message], index: int, text: str, render: Render, tokens: Collection[str]) -> Span | None:
    before, message, after = messages[:index], messages[index], messages[index + 1 :]
    # Reasoning may be left out, and a mark before it too; so may the space after reasoning.
    opened = (
        _around_mark(render, [*before, _with_mark(message, position), *after])
        for position in (0, *_ends_of_reasoning(message["content"]))
    )
    head = next((found[0] for found in opened if found is not None and text.startswith(found[0])), None)
    closed = _with_mark(message, len(message["content"]))
    whole = _around_mark(render, [*before, closed, *after])
    upto = _around_mark(render, [*before, closed]) if after else whole
    if head is None or whole is None or upto is None or not text.endswith(whole[1]):
        return None
    # What a template writes at the end of every text does not belong to the last message.
    followed = whole if after else _around_mark(render, [*before, closed, {"role": "user", "content": "?"}]) or whole
    length = _rest_of_message(upto[1], followed[1], tokens)
    if length is None and whole[1].startswith(upto[1]):  # its end mark is plain text, or there is none
        length = len(upto[1])
    if length is None:
        return None
    start, end = _begin_of_answer(before, text, len(head), render), len(text) - len(whole[1]) + length
    return (start, end) if start < end else None


def _begin_of_answer(before: Sequence[Message], text: str, content: int, render: Render) -> int:
    """Return where the answer to the messages `before` begins: with its content, or with what the template writes
    between the generation prompt and the content, such as reasoning, unless that is only space."""
    prompted, without = _try(render, before, True), _try(render, before)
    if prompted is None or without is None or prompted == without:
        return content
    if text[:content].startswith(prompted):
        start = len(prompted)
    else:  # an earlier turn is written differently
        prompt = prompted[len(os.path.commonprefix([prompted, without])) :]
        found = text[:content].rfind(prompt)
        start = found + len(prompt) if found >= 0 else content
    return start if text[start:content].strip() else content


def _rest_of_message(alone: str, followed: str, tokens: Collection[str]) -> int | None:
    """Return how many characters after the content of a message belong to it, calls and end mark, but no space after
    that; None if no token ends what is common to the text if the message is the last one, and if another follows."""
    common = os.path.commonprefix([alone, followed])
    return max((common.rindex(token) + len(token) for token in tokens if token in common), default=None)


def _with_mark(message: Message, position: int) -> Message:
    """Return the message with a mark at a position of its content; without content, in the name of its first call."""
    content, calls = message["content"], message.get("tool_calls") or []
    if content or not calls:
        return {**message, "content": f"{content[:position]}{_MARK}{content[position:]}"}
    function = calls[0]["function"]
    named = {**calls[0], "function": {**function, "name": f"{_MARK}{function['name']}"}}
    return {**message, "tool_calls": [named, *calls[1:]]}


def _ends_of_reasoning(content: str) -> list[int]:
    """Return where reasoning ends, and where the text after it begins; nothing if there is none."""
    _, end, visible = content.rpartition(_END_OF_REASONING)
    return [len(content) - len(visible), len(content) - len(visible.lstrip())] if end else []


def _around_mark(render: Render, messages: Sequence[Message]) -> tuple[str, str] | None:
    """Return the text before and after the mark in `messages`; None if the template refuses them or leaves it out."""
    text = _try(render, messages)
    if text is None or _MARK not in text:
        return None
    return text[: text.index(_MARK)], text[text.rindex(_MARK) + len(_MARK) :]


def _try(render: Render, messages: Sequence[Message], prompt: bool = False) -> str | None:
    try:
        return render(messages, prompt)
    except RefusedRow:  # some templates want a user's message at the end, or at least one message
        return None
