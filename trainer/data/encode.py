"""Make samples from rows: render and tokenise them, and label the targets (answers, or all of a plain text)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trainer.data.answers import RefusedRow, Span, find_answers
from trainer.data.batches import IGNORED
from trainer.data.control_tokens import ControlTokens
from trainer.data.errors import MAX_PROBLEMS, BadRows, DataError
from trainer.data.formats.base import Row
from trainer.data.formats.conversations import CALL_KEYS, FUNCTION_KEYS
from trainer.data.formats.fields import is_empty
from trainer.data.pictures import PicturedRow, Pictures
from trainer.data.rows import Unused
from trainer.data.templates import Templates, in_parts, wants_parts
from trainer.data.tokenizer import GENERATION_MARK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overflow = Literal["truncate", "truncate_at_turn", "drop", "error"]
Sample = dict[str, Any]
Rendered = tuple[str, list[Span]]
# Ids, where in the text each of them is, and the spans of the text that are trained on.
Tokens = tuple[Sequence[int], Sequence[Span], Sequence[Span]]
Encoded = Iterator[tuple[Row, np.ndarray, np.ndarray]]

_ANOTHER = "leave it out of the rows, or give a tokenizer whose chat template writes it"
_REASONING = "<think>"
# The most rows that are rendered to find out whether the template writes a key.
_MOST_TRIES = 1000
ROWS_PER_CHUNK = 512  # fast tokenizers encode the rows of a chunk in parallel; also the size of an Arrow record batch


@dataclass(frozen=True)
class Report:
    """Count the samples of a source: kept (`truncated` of them were cut to the limit) and dropped, and their tokens.

    `target_tokens` are those on which the loss is computed.
    """

    samples: int
    truncated: int
    dropped: int
    tokens: int
    target_tokens: int

    def __add__(self, other: Report) -> Report:
        return Report(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


def encode(
    path: str,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overflow: Overflow,
    keep: Callable[[Sample], object],
    bad: BadRows | None = None,
    control: ControlTokens | None = None,
    pictures: Pictures | None = None,
) -> Report:
    """Encode rows and pass each sample to `keep` as it is made: a large source does not have to fit in memory twice.

    Samples are {input_ids, labels}: int32, [length]. Labels are -100 for tokens that are not targets, and always for
    the first token, which nothing predicts. The answer to a prompt is a target, and so is the end of text after it. All
    of a plain text is a target. Messages are rendered by the tokenizer's chat template, and the assistant's tokens are
    the targets, message by message. If a sample has more than `max_length` tokens, "truncate" cuts its end,
    "truncate_at_turn" cuts a conversation after the last answer that is whole, "drop" leaves it out, and "error"
    raises. A sample without a target is dropped. Rows with images need `pictures`: their samples also have `images`, of
    which it makes pixels; the places of images are no targets, and where one would be cut the sample is dropped. Raises
    `DataError` for rows that cannot be rendered, unless `bad` drops them, and if no sample is left. By default
    `control` keeps control tokens in rows as text.
    """
    control = ControlTokens(tokenizer) if control is None else control
    bad = BadRows(path) if bad is None else bad
    bad_before = bad.count
    num_samples = num_truncated = num_tokens = num_targets = num_without = 0
    too_long: list[str] = []
    for row, ids, labels in _encode_rows(rows, tokenizer, bad, control, pictures):
        length = len(ids)
        labels[:1] = IGNORED
        if length > max_length and overflow == "error":
            too_long.append(f"{row.where}: {length} tokens, data.max_length is {max_length}")
            if len(too_long) == MAX_PROBLEMS:
                break
        if length > max_length and overflow not in ("truncate", "truncate_at_turn"):
            continue
        kept = min(length, max_length)
        if length > max_length and overflow == "truncate_at_turn" and row.messages:
            kept = _whole_turns(labels, max_length)
        if isinstance(row, PicturedRow) and kept < row.end:
            continue
        targets = int(np.count_nonzero(labels[:kept] != IGNORED))
        if targets == 0:
            num_without += 1
            continue
        num_samples += 1
        num_truncated += length > max_length
        num_tokens += kept
        num_targets += targets
        more = {"images": row.record} if isinstance(row, PicturedRow) else {}
        keep({"input_ids": ids[:kept], "labels": labels[:kept], **more})
    if too_long:
        raise DataError([*too_long, "raise data.max_length, or set data.overflow to truncate or drop"])
    num_rows = len(rows) - (bad.count - bad_before)
    if num_samples == 0:
        raise DataError(
            [
                *bad.first,
                f"{path}: none of {num_rows} samples is left: {num_without} have no token to train on among the first "
                f"data.max_length={max_length} (all are masked), {num_rows - num_without} are longer "
                f"(data.overflow={overflow}); raise data.max_length, or look at the tokenizer's chat template",
            ]
        )
    return Report(num_samples, num_truncated, num_rows - num_samples, num_tokens, num_targets)


def _whole_turns(labels: np.ndarray, max_length: int) -> int:
    """Return the number of tokens up to the end of the last answer that is whole within `max_length`; `max_length` if
    not even the first one is."""
    target = labels != IGNORED
    ends = np.flatnonzero(target[:max_length] & ~target[1 : max_length + 1]) + 1
    return int(ends[-1]) if len(ends) else max_length


def _encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows,
    control: ControlTokens,
    pictures: Pictures | None,
) -> Encoded:
    """Yield each row with its ids and labels, not yet cut to the limit."""
    templates = Templates(tokenizer, pictures)
    num_rendered = 0
    for start in range(0, len(rows), ROWS_PER_CHUNK):
        # A source of {prompt, completion} may contain texts and conversations.
        for conversations, group in groupby(rows[start : start + ROWS_PER_CHUNK], lambda row: bool(row.messages)):
            chunk = list(group)
            if not conversations:
                num_rendered += len(chunk)
                yield from _encode_texts(chunk, tokenizer, control)
                continue
            rendered: list[tuple[Row, Rendered | Tokens]] = []
            for row in chunk:
                try:
                    spells = control.found(row)
                    if row.images:
                        _refuse_images(spells, pictures)
                    template = templates.for_row(row)
                    found = _render(control.hidden(row) if spells else row, tokenizer, template, templates.tokens)
                    if row.images and pictures is not None:
                        rendered.append(pictures.encode(row, *found))
                        continue
                    if not spells:
                        rendered.append((row, found))
                        continue
                    control.check(row, found[0], _write(row, tokenizer, template)[0])
                    rendered.append((row, control.tokenise(row, *found)))
                    control.count(row)
                except RefusedRow as refused:
                    bad.add(f"{row.where}: {refused}")
            num_rendered += len(rendered)
            if rendered:
                yield from _encode_messages(rendered, tokenizer)
    bad.check(num_rendered)


def _refuse_images(spells: bool, pictures: Pictures | None) -> None:
    if pictures is None:
        raise RefusedRow("has an image, and the model reads text only (model.tokenizer names no folder of a processor)")
    pictures.check()
    if spells:
        raise RefusedRow(
            "has an image and spells control tokens, which cannot be kept as text there; leave them out of the row, or "
            "set data.special_tokens_in_text=allow"
        )


def _encode_texts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, control: ControlTokens) -> Encoded:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise DataError(["model.tokenizer: has no end-of-text token (eos_token), so no answer would ever end"])
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    # Prompt and answer are tokenised separately, because generation starts from the tokens of the prompt alone. If they
    # were tokenised together, a token across the border would change the prompt, and the first target would contain a
    # part of it.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    prompts = tokenizer([row.prompt for row in rows], **options)["input_ids"]
    answers = tokenizer([row.answer for row in rows], **options)["input_ids"]
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        if control.found(row):
            prompt, answer = control.as_text(row.prompt), control.as_text(row.answer)
            control.count(row)
        # A verbatim text may itself begin or end with these tokens.
        prompt = [bos, *prompt] if adds_bos and (prompt or answer)[:1] != [bos] else prompt
        if row.answer:  # else nothing is trained on, and the sample is dropped
            answer = answer if answer[-1:] == [eos] else [*answer, eos]
        yield row, _int32(prompt + answer), _int32([IGNORED] * len(prompt) + answer)


def _encode_messages(rendered: Sequence[tuple[Row, Rendered | Tokens]], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    encoded = tokenizer(
        [found[0] if len(found) == 2 else "" for _, found in rendered],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    for index, (row, found) in enumerate(rendered):
        if len(found) == 2:
            found = (encoded["input_ids"][index], encoded["offset_mapping"][index], found[1])
        ids, spans = _int32(found[0]), found[2]
        starts, ends = np.asarray(found[1], dtype=np.int64).reshape(-1, 2).T
        labels = np.full_like(ids, IGNORED)
        for start, end in spans:
            inside = (starts < end) & (ends > start)
            labels[inside] = ids[inside]
        yield row, ids, labels


def _render(row: Row, tokenizer: PreTrainedTokenizerBase, template: str, tokens: Collection[str]) -> Rendered:
    """Return the conversation as text, and the spans of it (in characters) that are trained on. `tokens` are those that
    the template can write."""
    unknown = [
        name
        for name, used in (("tools", row.tools), ("tool_calls", any("tool_calls" in m for m in row.messages)))
        if used and name not in template
    ]
    if unknown:
        raise RefusedRow(f"has {' and '.join(unknown)}, for which the tokenizer's chat template has no place")
    text, spans = _write(row, tokenizer, template)
    _refuse_left_out(row, tokenizer, template)
    if not GENERATION_MARK.search(template):
        spans = find_answers(
            row.messages,
            text,
            lambda messages, prompt: _write(replace(row, messages=tuple(messages)), tokenizer, template, prompt)[0],
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


def _write(row: Row, tokenizer: PreTrainedTokenizerBase, template: str, prompt: bool = False) -> Rendered:
    """Return the conversation as the template writes it, and the spans that it marks. `prompt`: add a generation
    prompt."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        # tokenizer.apply_chat_template calls this, but then flattens the spans to a mask, in which neighbours merge.
        texts, spans = render_jinja_template(
            conversations=[in_parts(row.messages) if row.images or wants_parts(template) else list(row.messages)],
            tools=list(row.tools) or None,
            chat_template=template,
            return_assistant_tokens_mask=GENERATION_MARK.search(template) is not None,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # templates raise jinja2.TemplateError, TypeError, ValueError and others
        raise RefusedRow(f"the tokenizer's chat template refuses the row: {error}") from error
    return texts[0], spans[0] if spans else []


def _refuse_left_out(row: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Raise `RefusedRow` if the template leaves out a message, a call or a tool.

    It is not enough to search for the text of each: the same text may also occur elsewhere, and templates write some of
    it differently (as JSON, or without the reasoning of an earlier turn). So a mark is put into each of them, and the
    marks are searched for.
    """
    left_out = None
    for keeps_content in (True, False):  # a template that cuts contents may cut the mark
        try:
            text, _ = _write(_with_marks(row, keeps_content), tokenizer, template)
        except RefusedRow:  # the template checks the content of messages
            continue
        left_out = next(_left_out(row, text), None)
        if left_out is None:
            return
    if left_out is not None:
        what, instead = left_out
        raise RefusedRow(f"has {what}, which the tokenizer's chat template leaves out; {instead}")


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
        content = f"{content}{_mark(index, 'content')}" if message["content"] else ""
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
        if message["content"] and _mark(index, "content") not in text:
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


def _mark(index: int, what: str) -> str:
    return f"marked_{index}_{what}_"


def find_unused_keys(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, unused: Unused, pictures: Pictures | None = None
) -> None:
    """Report to `unused` the keys of messages and of their calls that the chat template writes in no row. Keys that
    every template reads are not checked."""
    templates = Templates(tokenizer, pictures)
    written: set[tuple[str, str]] = set()  # key and role
    first: dict[tuple[str, str], str] = {}  # key and role: the first row that has them
    tries: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for index, message in enumerate(row.messages):
            for key, without in _further_keys(message):
                kind = (key, message["role"])
                first.setdefault(kind, row.where)
                # Some keys are written only in some places, such as the reasoning of a last turn.
                if kind not in written and tries[kind] < _MOST_TRIES:
                    tries[kind] += 1
                    if _writes(row, index, without, tokenizer, templates.for_row(row)):
                        written.add(kind)
    for (key, role), where in first.items():
        if (key, role) not in written:
            # The call that the message answers contains the name of the function, too.
            unused.leave_out(where, key, harmless=key == "name" and role == "tool")


def _further_keys(message: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the keys of a message, its calls and their functions that only some templates know, each with the message
    without that key."""
    for key, value in message.items():
        if key not in ("role", "content", "tool_calls") and not is_empty(value):
            yield key, _without(message, key)
    calls = message.get("tool_calls", [])
    for number, call in enumerate(calls):
        function = call["function"]
        smaller = [(key, _without(call, key)) for key in call if key not in CALL_KEYS and not is_empty(call[key])]
        smaller += [
            (key, {**call, "function": _without(function, key)})
            for key in function
            if key not in FUNCTION_KEYS and not is_empty(function[key])
        ]
        for key, other in smaller:
            yield key, {**message, "tool_calls": [*calls[:number], other, *calls[number + 1 :]]}


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _writes(
    row: Row, index: int, without: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: str
) -> bool:
    """Return whether a template renders a row differently if message `index` is `without`, which lacks a key."""
    messages = list(row.messages)
    messages[index] = without
    try:
        return _write(row, tokenizer, template) != _write(replace(row, messages=tuple(messages)), tokenizer, template)
    except RefusedRow:  # encoding the row reports it
        return True


def _int32(values: Sequence[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)
