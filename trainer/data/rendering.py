"""Render conversations by the tokenizer's chat template, and refuse those of which it leaves out a part."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer.data.answers import RefusedRow, Span, find_answers
from trainer.data.formats.base import Row
from trainer.data.shapes import Shapes
from trainer.data.templates import in_parts, wants_parts
from trainer.data.tokenizer import GENERATION_MARK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rendered = tuple[str, list[Span]]

_ANOTHER = "leave it out of the rows, or give a tokenizer whose chat template writes it"
_REASONING = "<think>"


def render(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    tokens: Collection[str],
    shapes: Shapes | None = None,
) -> Rendered:
    """Return the conversation as text, and the spans of it (in characters) that are trained on. `tokens` are those that
    the template can write; `shapes` are learned from rows, and save time."""
    unknown = [
        name
        for name, used in (("tools", row.tools), ("tool_calls", any("tool_calls" in m for m in row.messages)))
        if used and name not in template
    ]
    if unknown:
        raise RefusedRow(f"has {' and '.join(unknown)}, for which the tokenizer's chat template has no place")
    text, spans = write(row, tokenizer, template)
    if shapes is None or row.images:  # a template writes something else in the place of an image
        shapes = Shapes()
    if not shapes.explain(row, template, text):
        shapes.learn(row, template, text, _refuse_left_out(row, tokenizer, template), _content_mark)
    if not GENERATION_MARK.search(template):
        spans = find_answers(
            row.messages,
            text,
            lambda messages, prompt: write(replace(row, messages=tuple(messages)), tokenizer, template, prompt)[0],
            tokens,
        )
    if all(row.trains):
        return text, spans
    if len(spans) != len(row.trains):
        raise RefusedRow(
            f"train: false (or weight: 0) needs a chat template that marks each assistant message once, but this one "
            f"marks {len(spans)} spans in {len(row.trains)} assistant messages"
        )
    return text, [span for span, trains in zip(spans, row.trains, strict=True) if trains]


def write(
    row: Row, tokenizer: PreTrainedTokenizerBase, template: str, prompt: bool = False, *, spans: bool = True
) -> Rendered:
    """Return the conversation as the template writes it, and the spans that it marks; without `spans`, which is
    faster, none. `prompt`: add a generation prompt."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        # tokenizer.apply_chat_template calls this, but then flattens the spans to a mask, in which neighbours merge.
        rendered = render_jinja_template(
            conversations=[in_parts(row.messages) if row.images or wants_parts(template) else list(row.messages)],
            tools=list(row.tools) or None,
            chat_template=template,
            return_assistant_tokens_mask=spans and GENERATION_MARK.search(template) is not None,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # templates raise jinja2.TemplateError, TypeError, ValueError and others
        raise RefusedRow(f"the tokenizer's chat template refuses the row: {error}") from error
    texts, marked = rendered
    return texts[0], marked[0] if marked else []


def _refuse_left_out(row: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Raise `RefusedRow` if the template leaves out a message, a call or a tool. Returns the text with marks, if the
    template takes them.

    It is not enough to search for the text of each: the same text may also occur elsewhere, and templates write some of
    it differently (as JSON, or without the reasoning of an earlier turn). So a mark is put into each of them, and the
    marks are searched for.
    """
    left_out = None
    for keeps_content in (True, False):  # a template that cuts contents may cut the mark
        try:
            text, _ = write(_with_marks(row, keeps_content), tokenizer, template, spans=False)
        except RefusedRow:  # the template checks the content of messages
            continue
        left_out = next(_left_out(row, text), None)
        if left_out is None:
            return text
    if left_out is not None:
        what, instead = left_out
        raise RefusedRow(f"has {what}, which the tokenizer's chat template leaves out; {instead}")
    return ""


def _with_marks(row: Row, keeps_content: bool) -> Row:
    messages = []
    for index, message in enumerate(row.messages):
        content = message["content"] if keeps_content else ""
        if _reasons(row, index):
            opened = f"{_REASONING}{_mark(index, 'reasoning')}"
            content = content.replace(_REASONING, opened, 1) if keeps_content else f"{opened}</think>"
        calls = []
        for number, call in enumerate(message.get("tool_calls", [])):
            name, key = (_mark(index, f"{part}_{number}") for part in ("name", "argument"))
            function = {**call["function"], "name": name, "arguments": {**call["function"]["arguments"], key: ""}}
            calls.append({**call, "function": function})
        # No mark if there is no content: some templates write no text beside calls, and then leave nothing out.
        content = f"{content}{_content_mark(index)}" if message["content"] else ""
        messages.append({**message, "content": content} | ({"tool_calls": calls} if calls else {}))
    tools = tuple(_tool_with_mark(tool, number) for number, tool in enumerate(row.tools))
    return replace(row, messages=tuple(messages), tools=tools)


def _tool_with_mark(tool: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": {**tool["function"], "name": _mark(number, "tool")}}
    return {**tool, "name": _mark(number, "tool")}


def _reasons(row: Row, index: int) -> bool:
    """Return whether a message of the last turn contains reasoning. Templates may leave out that of earlier turns."""
    message = row.messages[index]
    in_last_turn = all(later["role"] != "user" for later in row.messages[index:])
    return message["role"] == "assistant" and in_last_turn and _REASONING in message["content"]


def _left_out(row: Row, text: str) -> Iterator[tuple[str, str]]:
    """Yield each part of a row whose mark is not in `text`, and what to do about it. Templates may change the case."""
    text = text.lower()
    for number in range(len(row.tools)):
        if _mark(number, "tool") not in text:
            yield f"tools[{number}]", _ANOTHER
    for index, message in enumerate(row.messages):
        role, calls = message["role"], message.get("tool_calls", [])
        where = f"message {index + 1} of {len(row.messages)}"
        if message["content"] and _content_mark(index) not in text:
            if calls:
                yield f"{where}: content beside tool_calls", f"make it a message of its own, or {_ANOTHER}"
            elif role == "system":
                yield f"{where} (role 'system')", f"put it into the first message of the user, or {_ANOTHER}"
            else:
                yield f"{where} (role {role!r})", _ANOTHER
        if _reasons(row, index) and _mark(index, "reasoning") not in text:
            yield f"{where}: the reasoning of the last answer ({_REASONING})", _ANOTHER
        for number, call in enumerate(calls):
            name = call["function"]["name"]
            if _mark(index, f"name_{number}") not in text:
                yield f"{where}: tool_calls[{number}], a call of {name}", _ANOTHER
            elif _mark(index, f"argument_{number}") not in text:
                yield f"{where}: the arguments of tool_calls[{number}], a call of {name}", _ANOTHER


def _content_mark(index: int) -> str:
    return _mark(index, "content")


def _mark(index: int, what: str) -> str:
    return f"marked_{index}_{what}_"
