"""Records as checked rows: the formats that can be trained on, told apart by their columns."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.schema import Format
from trainer.data.errors import DataError

MAX_PROBLEMS = 10  # one broken line is often one of thousands

# The columns that a row of each format must have; `input` (alpaca) and `tools` (messages, sharegpt) may be missing.
COLUMNS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "qa": ("question", "answer"),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "text": ("text",),
}

# The prompts that the format was published with (github.com/tatsu-lab/stanford_alpaca).
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row: messages, or else a prompt (empty for plain text) and its answer.

    `where` is how messages name the row. `trains` says of each assistant message whether its tokens are targets.
    """

    where: str
    prompt: str = ""
    answer: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    trains: tuple[bool, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


def read_rows(path: str, records: Iterable[tuple[str, Any]], format: Format = "auto") -> list[Row]:
    """Checks records, as `sources.Opened` gives them; columns that the format does not know are ignored.

    "auto" takes the format from the first row's columns. Raises DataError with up to ten problems.
    """
    rows: list[Row] = []
    problems: list[str] = []
    first = None  # the row that the format was taken from
    for where, values in records:
        try:
            if isinstance(values, ValueError):
                raise values
            if not isinstance(values, Mapping):
                raise ValueError(f"{_kind(values)} where an object is needed, {_known()}")
            if format == "auto":
                format, first = detect(values), where
            rows.append(_row(where, values, format, first))
        except ValueError as problem:
            problems.append(f"{where}: {problem}")
            if len(problems) == MAX_PROBLEMS:
                raise DataError([*problems, f"{path}: stopped after {MAX_PROBLEMS} problems"]) from None
    if problems:
        raise DataError(problems)
    if not rows:
        raise DataError([f"{path}: holds no rows; each must be {_known()}"])
    return rows


def detect(values: Mapping[str, Any]) -> Format:
    """The format that a row's columns name; ValueError where they name none or several."""
    found = [name for name, columns in COLUMNS.items() if all(column in values for column in columns)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"the row's columns {_braces(values)} are those of several formats; state which: "
            f"data.train={{path: ..., format: {' | '.join(found)}}}"
        )
    raise ValueError(f"no known format (data.train[].format=auto): the row has {_braces(values)}; known are {_known()}")


def _row(where: str, values: Mapping[str, Any], format: Format, first: str | None) -> Row:
    missing = [column for column in COLUMNS[format] if column not in values]
    if missing:
        given = f"by {first}" if first else "as stated"
        raise ValueError(
            f"column {', '.join(missing)} missing: the row has {_braces(values)}, but the format is {format} "
            f"{_braces(COLUMNS[format])} {given}; do not mix formats in one file"
        )
    return _BUILDERS[format](where, values)


def _alpaca(where: str, values: Mapping[str, Any]) -> Row:
    fields = {"instruction": _text(values["instruction"], "instruction")}
    if values.get("input") not in (None, ""):
        fields["input"] = _text(values["input"], "input")
    prompt = ALPACA_WITH_INPUT if "input" in fields else ALPACA
    return Row(where, prompt=prompt.format(**fields), answer=_answer(values["output"], "output"))


def _question(where: str, values: Mapping[str, Any]) -> Row:
    question = _text(values["question"], "question")
    return Row(where, prompt=f"Question: {question}\nAnswer: ", answer=_answer(values["answer"], "answer"))


def _prompt(where: str, values: Mapping[str, Any]) -> Row:
    return Row(where, prompt=_text(values["prompt"], "prompt"), answer=_answer(values["completion"], "completion"))


def _plain_text(where: str, values: Mapping[str, Any]) -> Row:
    return Row(where, answer=_answer(values["text"], "text"))


def _messages(where: str, values: Mapping[str, Any]) -> Row:
    return _conversation(where, values["messages"], values.get("tools"), "messages")


def _sharegpt(where: str, values: Mapping[str, Any]) -> Row:
    return _conversation(where, values["conversations"], values.get("tools"), "conversations")


_BUILDERS: dict[str, Callable[[str, Mapping[str, Any]], Row]] = {
    "alpaca": _alpaca,
    "qa": _question,
    "prompt": _prompt,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "text": _plain_text,
}


def _conversation(where: str, values: Any, tools: Any, column: str) -> Row:
    role_key, content_key = ("from", "value") if column == "conversations" else ("role", "content")
    if not isinstance(values, list) or not values:
        raise ValueError(
            f"{column}: {_kind(values)} where a list of {{{role_key}, {content_key}}} is needed, not empty"
        )
    messages = []
    trains = []
    for index, value in enumerate(values):
        key = f"{column}[{index}]"
        known = isinstance(value, Mapping) and role_key in value
        if not known or (content_key not in value and not value.get("tool_calls")):
            what = _braces(value) if isinstance(value, Mapping) else _kind(value)
            raise ValueError(f"{key}: {what} where {{{role_key}, {content_key}}} is needed")
        role = _text(value[role_key], f"{key}.{role_key}")
        if column == "conversations":
            if role not in SHAREGPT_ROLES:
                raise ValueError(f"{key}.from: got {role!r}; allowed: {' | '.join(SHAREGPT_ROLES)}")
            role = SHAREGPT_ROLES[role]
        target = _is_target(value, role, key)
        if role == "assistant":
            trains.append(target)
        messages.append(_message(value, role, value.get(content_key), key, content_key))
    if not any(trains):
        what = "no message of the assistant is a target" if trains else "no message with role 'assistant'"
        raise ValueError(f"{column}: {what}, so nothing to train on")
    return Row(where, messages=tuple(messages), trains=tuple(trains), tools=_tools(tools))


def _is_target(value: Mapping[str, Any], role: str, key: str) -> bool:
    """Whether a message may be trained on: unless it says `train: false`, or `weight: 0` as OpenAI has it."""
    target = True
    for name, allowed in (("train", "true | false"), ("weight", "0 | 1")):
        given = value.get(name)
        if given is None:
            continue
        if given not in (0, 1) or isinstance(given, bool) != (name == "train"):
            raise ValueError(f"{key}.{name}: {_kind(given)}; allowed: {allowed}")
        if given and role != "assistant":
            raise ValueError(f"{key}.{name}: {_kind(given)} on a message of role {role!r}; only the assistant's train")
        target = target and bool(given)
    return target


def _message(value: Mapping[str, Any], role: str, content: Any, key: str, content_key: str) -> Mapping[str, Any]:
    """The message as chat templates expect it; keys that only a template can know (`name`, ...) are handed on."""
    calls = value.get("tool_calls") or []
    ours = ("role", "content", "from", "value", "train", "weight", "tool_calls")
    message = {name: inner for name, inner in value.items() if name not in ours and inner is not None}
    # Templates take an empty text where OpenAI has null, and a tool may well have nothing to say.
    empty_allowed = bool(calls) or role == "tool"
    message |= {"role": role, "content": _content(content, f"{key}.{content_key}", empty_allowed=empty_allowed)}
    if calls:
        if role != "assistant":
            raise ValueError(f"{key}.tool_calls: in a message of role {role!r}; only the assistant calls tools")
        message["tool_calls"] = _tool_calls(calls, f"{key}.tool_calls")
    return message


def _content(content: Any, key: str, *, empty_allowed: bool) -> str:
    if isinstance(content, list) and content:  # OpenAI's parts
        for index, part in enumerate(content):
            if not isinstance(part, Mapping) or part.get("type") != "text":
                what = _braces(part) if isinstance(part, Mapping) else _kind(part)
                raise ValueError(
                    f"{key}[{index}]: {what} where {{type: text, text}} is needed; only text is trained on"
                )
        content = "".join(_text(part.get("text"), f"{key}[{index}].text") for index, part in enumerate(content))
    return "" if empty_allowed and content in (None, "") else _text(content, key)


def _tool_calls(calls: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ValueError(f"{key}: {_kind(calls)} where a list is needed")
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            what = _braces(call) if isinstance(call, Mapping) else _kind(call)
            raise ValueError(f"{key}[{index}]: {what} where {{type, function: {{name, arguments}}}} is needed")
        # OpenAI spells arguments as a string; templates write the object, and would put a string in quotes.
        arguments = _parsed(function.get("arguments", {}), f"{key}[{index}].function.arguments", Mapping, "an object")
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """The functions that a row offers: a list of JSON schemas, or that list as a string, as tables often hold it."""
    if tools in (None, "", []):
        return ()
    tools = _parsed(tools, "tools", list, "a list of JSON schemas")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ValueError(f"tools[{index}]: {_kind(tool)} where a JSON schema is needed")
    return tuple(tools)


def _parsed(value: Any, key: str, kind: type, needed: str) -> Any:
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = None
    if not isinstance(parsed, kind):
        raise ValueError(f"{key}: {_kind(value)} where {needed} is needed, or its JSON as a string")
    return parsed


def _answer(value: Any, key: str) -> str:
    """Published data sets have rows without an answer; they are dropped, and counted."""
    return "" if value in (None, "") else _text(value, key)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key}: {_kind(value)} where a string is needed, not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, tokenizers cannot encode it
        raise ValueError(f"{key}: lone surrogate {value[error.start]!a} at character {error.start + 1}") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    if value is None:
        return "null"
    kind = names.get(type(value), type(value).__name__)  # tables have more types than JSON
    return (
        f"empty {kind}" if value in ("", [], {}) else f"{kind} {textwrap.shorten(json.dumps(value, default=str), 40)}"
    )


def _known() -> str:
    return ", ".join(f"{_braces(columns)}" for columns in COLUMNS.values())


def _braces(keys: Mapping[str, Any] | Sequence[str]) -> str:
    return "{" + ", ".join(map(str, keys)) + "}"
