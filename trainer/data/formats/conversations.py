"""Read conversations, in OpenAI's spelling of messages or in ShareGPT's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trainer.data.formats.base import SYSTEM, Format, Ignore, Row, system_prompt
from trainer.data.formats.fields import braces, is_empty, kind, parsed, plain, text
from trainer.data.formats.images import COLUMN, MARK, Image, in_their_places, is_image, read_image
from trainer.data.formats.images import KEYS as IMAGE_KEYS

# The keys for the role and the content of a message, in each spelling, and the keys that both spellings have.
_SPELLINGS = {"messages": ("role", "content"), "conversations": ("from", "value")}
CONTENT_KEYS = tuple(content for _, content in _SPELLINGS.values())
_MESSAGE_KEYS = ("train", "weight", "tool_calls")
_PART_KEYS = ("type", "text")
# The keys of a call that services require, and those of its function that every template writes.
CALL_KEYS = ("function", "id", "type", "index")
FUNCTION_KEYS = ("name", "arguments")
# Tells a service how long to cache a part of a prompt.
_PART_SETTINGS = ("cache_control",)
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
    # As in LLaMA-Factory: the value of the first is a call, of the second a tool's answer.
    "function_call": "assistant", "observation": "tool",
}  # fmt: skip


def read(where: str, row: Mapping[str, Any], column: str) -> Row:
    row = in_their_places(row, column)
    images: list[Image] = []
    messages, trains = _read_messages(row[column], column, _SPELLINGS[column], images)
    return _row(where, row, column, messages, trains, images)


def read_answer_to(where: str, row: Mapping[str, Any], prompt: str, answer: str) -> Row:
    """Read the messages in the columns `prompt` and `answer`; only those of the second are trained on."""
    row = in_their_places(row, prompt, answer)
    images: list[Image] = []
    given, not_trained = _read_messages(row[prompt], prompt, _SPELLINGS["messages"], images)
    messages, trains = _read_messages(row[answer], answer, _SPELLINGS["messages"], images)
    return _row(where, row, answer, [*given, *messages], [*(False for _ in not_trained), *trains], images, first=prompt)


def _read_messages(
    values: Any, column: str, spelling: tuple[str, str], images: list[Image]
) -> tuple[list[Mapping[str, Any]], list[bool]]:
    """Return the messages, and for each of the assistant whether it is a target. Adds their images to `images`."""
    role_key, content_key = spelling
    if not isinstance(values, list) or not values:
        raise ValueError(f"{column}: {kind(values)}, but a non-empty list of {{{role_key}, {content_key}}} is needed")
    messages: list[Mapping[str, Any]] = []
    trains = []
    for index, value in enumerate(values):
        key = f"{column}[{index}]"
        known = isinstance(value, Mapping) and role_key in value
        if not known or (content_key not in value and not value.get("tool_calls")):
            what = braces(value) if isinstance(value, Mapping) else kind(value)
            raise ValueError(f"{key}: {what}, but {{{role_key}, {content_key}}} is needed")
        role = text(value[role_key], f"{key}.{role_key}")
        if role_key == "from":
            if role not in SHAREGPT_ROLES:
                raise ValueError(f"{key}.from: got {role!r}; allowed: {' | '.join(SHAREGPT_ROLES)}")
            if role == "function_call":
                value = _call_in_value(value, f"{key}.value")
            role = SHAREGPT_ROLES[role]
        target = _is_target(value, role, key)
        if role == "assistant":
            trains.append(target)
        messages.append(_message(value, role, key, content_key, images))
    return messages, trains


def _call_in_value(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a message of ShareGPT's role `function_call` with its calls, one or a list, in `tool_calls`."""
    if value.get("tool_calls"):
        raise ValueError(f"{key}: a call, and others in tool_calls; keep one of them")
    calls = parsed(value.get("value"), key, (Mapping, list), "a call {name, arguments}, or a list of them")
    functions = calls if isinstance(calls, list) else [calls]
    return {**value, "value": "", "tool_calls": [{"type": "function", "function": function} for function in functions]}


def _row(
    where: str,
    row: Mapping[str, Any],
    column: str,
    messages: list[Mapping[str, Any]],
    trains: list[bool],
    images: list[Image],
    *,
    first: str | None = None,
) -> Row:
    """Return the row of `messages`, with the system prompt that another column has. `column` contains the answers, and
    `first` the first message, if that is another column."""
    if not any(trains):
        what = "no message of the assistant is a target" if trains else "no message with role 'assistant'"
        raise ValueError(f"{column}: {what}, so there is nothing to train on")
    system = system_prompt(row)
    if system is not None:
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        elif messages[0]["content"] != system:
            raise ValueError(
                f"{first or column}[0]: a system message, and another one in the column system; keep one of them"
            )
    tools = _tools(row.get("tools"))
    return Row(where, messages=tuple(messages), trains=tuple(trains), tools=tools, images=tuple(images))


def _is_target(value: Mapping[str, Any], role: str, key: str) -> bool:
    """Return whether a message may be trained on. It may not if it has `train: false`, or OpenAI's `weight: 0`."""
    target = True
    for name, allowed in (("train", "true | false"), ("weight", "0 | 1")):
        given = value.get(name)
        if given is None:
            continue
        if given not in (0, 1) or isinstance(given, bool) != (name == "train"):
            raise ValueError(f"{key}.{name}: {kind(given)}; allowed: {allowed}")
        if given and role != "assistant":
            raise ValueError(f"{key}.{name}: {kind(given)} on a message of role {role!r}; only the assistant's train")
        target = target and bool(given)
    return target


def _message(value: Mapping[str, Any], role: str, key: str, content_key: str, images: list[Image]) -> Mapping[str, Any]:
    """Return the message as chat templates expect it; keys that only a template can know (`name`, ...) are kept."""
    calls = value.get("tool_calls") or []
    read = (*itertools.chain.from_iterable(_SPELLINGS.values()), *_MESSAGE_KEYS)
    message = {
        name: plain(inner, f"{key}.{name}") for name, inner in value.items() if name not in read and inner is not None
    }
    # Templates expect an empty text instead of OpenAI's null, and the answer of a tool may be empty.
    empty_allowed = bool(calls) or role == "tool"
    content = _content(value.get(content_key), f"{key}.{content_key}", images, empty_allowed=empty_allowed)
    message |= {"role": role, "content": content}
    if calls:
        if role != "assistant":
            raise ValueError(f"{key}.tool_calls: in a message of role {role!r}; only the assistant calls tools")
        message["tool_calls"] = _tool_calls(calls, f"{key}.tool_calls")
    return message


def _content(content: Any, key: str, images: list[Image], *, empty_allowed: bool) -> str:
    """Return a content as one text, with `MARK` in the place of each image, which is added to `images`."""
    if not isinstance(content, list) or not content:
        return "" if empty_allowed and content in (None, "") else _unmarked(content, key)
    parts = []  # OpenAI's, and transformers'
    for index, part in enumerate(content):
        where = f"{key}[{index}]"
        if is_image(part):
            images.append(read_image(part, where))
            parts.append(MARK)
            continue
        if not isinstance(part, Mapping) or part.get("type") != "text":
            what = kind(part)
            if isinstance(part, Mapping):
                what = f"{braces(part)} of type {part.get('type')!r}" if "type" in part else braces(part)
            raise ValueError(f"{where}: {what}, but {{type: text, text}} or {{type: image, path}} is needed")
        parts.append(_unmarked(part.get("text"), f"{where}.text"))
    whole = "".join(parts)
    return "" if empty_allowed and not whole else text(whole, key)


def _unmarked(content: Any, key: str) -> str:
    checked = text(content, key)
    if MARK in checked:
        raise ValueError(f"{key}: contains the character U+{ord(MARK):04X}, which is none of Unicode's; remove it")
    return checked


def _tool_calls(calls: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ValueError(f"{key}: {kind(calls)}, but a list is needed")
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            what = braces(call) if isinstance(call, Mapping) else kind(call)
            raise ValueError(f"{key}[{index}]: {what}, but {{type, function: {{name, arguments}}}} is needed")
        call = plain(call, f"{key}[{index}]")
        function = call["function"]
        elsewhere = "arguments" if "arguments" in call else "function.parameters" if "parameters" in function else None
        if elsewhere and "arguments" not in function:
            raise ValueError(f"{key}[{index}].{elsewhere}: allowed: function.arguments; rename it")
        # OpenAI spells arguments as a string; templates write the object, and would put a string in quotes.
        arguments = parsed(function.get("arguments", {}), f"{key}[{index}].function.arguments", Mapping, "an object")
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """Return the functions of a row from a list of JSON schemas, or from that list as a string, as in many tables."""
    if tools in (None, "", []):
        return ()
    schemas = parsed(tools, "tools", list, "a list of JSON schemas")
    tools = schemas if isinstance(tools, str) else plain(schemas, "tools")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ValueError(f"tools[{index}]: {kind(tool)}, but a JSON schema is needed")
    return tuple(tools)


def _without_ignored(message: Any, spelling: tuple[str, str], ignore: Ignore) -> Any:
    """Remove the keys that the user ignores from a message, from the parts of its content, and from its calls."""
    kept = ignore(message, (*spelling, *_MESSAGE_KEYS))
    if not isinstance(kept, Mapping):
        return kept
    parts, calls = kept.get(spelling[1]), kept.get("tool_calls")
    if isinstance(parts, list):
        kept = {**kept, spelling[1]: [ignore(part, _keys_of(part)) for part in parts]}
    if isinstance(calls, list):
        kept = {**kept, "tool_calls": [_call_without_ignored(call, ignore) for call in calls]}
    return kept


def _call_without_ignored(call: Any, ignore: Ignore) -> Any:
    kept = ignore(call, CALL_KEYS)
    if not isinstance(kept, Mapping) or "function" not in kept:
        return kept
    return {**kept, "function": ignore(kept["function"], FUNCTION_KEYS)}


def _unread(messages: Sequence[Mapping[str, Any]], spelling: tuple[str, str]) -> Iterator[tuple[str, bool]]:
    """Yield the keys of messages that no template receives, and whether leaving them out is harmless: those of the
    other spelling, and those in the parts of a content other than its text."""
    others = {name: pair.index(name) for pair in _SPELLINGS.values() for name in pair if pair != spelling}
    for message in messages:
        for name in (name for name in others if not is_empty(message.get(name))):
            normalized = _as_role if others[name] == 0 else _as_text
            yield name, normalized(message[name]) == normalized(message.get(spelling[others[name]]))
        content = message.get(spelling[1])
        for part in content if isinstance(content, list) else ():
            for name in (name for name, value in part.items() if name not in _keys_of(part) and not is_empty(value)):
                yield name, name in _PART_SETTINGS


def _keys_of(part: Any) -> Sequence[str]:
    return (*_PART_KEYS, *IMAGE_KEYS) if is_image(part) else _PART_KEYS


def _as_role(value: Any) -> Any:
    return SHAREGPT_ROLES.get(value, value) if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    try:
        return _content(value, "", [], empty_allowed=True)
    except ValueError:
        return value


def conversation_format(
    *columns: str, read: Callable[[str, Mapping[str, Any]], Row], spelling: str = "messages"
) -> Format:
    """Return a format whose `columns` may contain lists of messages, spelt as in the column `spelling`."""
    keys = _SPELLINGS[spelling]

    def without_ignored(values: Mapping[str, Any], ignore: Ignore) -> Mapping[str, Any]:
        lists = {
            column: [_without_ignored(message, keys, ignore) for message in values[column]]
            for column in columns
            if isinstance(values.get(column), list)
        }
        return {**values, **lists}

    def unread(values: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
        for column in columns:
            if isinstance(values.get(column), list):
                yield from _unread(values[column], keys)

    return Format(
        columns,
        read,
        optional=("tools", *SYSTEM, COLUMN),
        texts=SYSTEM,
        messages=columns,
        without_ignored=without_ignored,
        unread=unread,
    )
