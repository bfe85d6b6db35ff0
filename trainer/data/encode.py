"""Rows to samples: rendered, tokenised, and labelled with the loss on what the assistant says (or on all of a text)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from trainer.data.batches import IGNORED
from trainer.data.errors import DataError
from trainer.data.rows import MAX_PROBLEMS, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overflow = Literal["truncate", "drop", "error"]
Sample = dict[str, np.ndarray]
Encoded = Iterator[tuple[Row, np.ndarray, np.ndarray]]

ROWS_PER_CHUNK = 512  # fast tokenizers encode the rows of a chunk in parallel; also the size of an Arrow record batch
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Report:
    """What became of a source: samples kept (`truncated` of them cut to the limit), samples dropped, and token counts.

    `target_tokens` are those that the loss is taken over.
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
) -> Report:
    """Hands each sample to `keep` as it is made, so that a large source need not fit in memory twice.

    Samples are {input_ids, labels}: int32, [length], labels -100 on what is no target; the first label always is, since
    nothing predicts the first token. What a prompt is answered with is a target, and so is the end of text after it;
    plain text is a target as a whole. Messages go through the tokenizer's chat template, and the assistant's tokens are
    the targets, message by message. Of a sample with more than `max_length` tokens, "truncate" cuts the end, "drop"
    leaves it out, "error" raises. A sample without a target is dropped. Raises DataError, also where no sample is left.
    """
    num_samples = num_truncated = num_tokens = num_targets = num_without = 0
    too_long: list[str] = []
    for row, ids, labels in _encode_rows(rows, tokenizer):
        length = len(ids)
        labels[:1] = IGNORED
        if length > max_length and overflow == "error":
            too_long.append(f"{row.where}: {length} tokens, data.max_length is {max_length}")
            if len(too_long) == MAX_PROBLEMS:
                break
        if length > max_length and overflow != "truncate":
            continue
        targets = int(np.count_nonzero(labels[:max_length] != IGNORED))
        if targets == 0:
            num_without += 1
            continue
        num_samples += 1
        num_truncated += length > max_length
        num_tokens += min(length, max_length)
        num_targets += targets
        keep({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    if too_long:
        raise DataError([*too_long, "raise data.max_length, or set data.overflow to truncate or drop"])
    if num_samples == 0:
        raise DataError(
            [
                f"{path}: none of {len(rows)} samples is left: {num_without} have no token to train on among the first "
                f"data.max_length={max_length} (all are masked), {len(rows) - num_without} are longer "
                f"(data.overflow={overflow}); raise data.max_length, or look at the tokenizer's chat template"
            ]
        )
    return Report(num_samples, num_truncated, len(rows) - num_samples, num_tokens, num_targets)


def _encode_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Each row with its ids and labels, of full length."""
    conversations = bool(rows[0].messages)  # one source is of one format
    template = training_template(tokenizer) if conversations else ""
    for start in range(0, len(rows), ROWS_PER_CHUNK):
        chunk = rows[start : start + ROWS_PER_CHUNK]
        yield from _encode_messages(chunk, tokenizer, template) if conversations else _encode_texts(chunk, tokenizer)


def _encode_texts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise DataError(["model.tokenizer: has no end-of-text token (eos_token), so no answer would ever end"])
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    # Apart, because generation starts from the tokens of the prompt alone: tokenised together, a merge across the
    # border would give a prompt never seen in use, and a first target that holds part of it.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    prompts = tokenizer([row.prompt for row in rows], **options)["input_ids"]
    answers = tokenizer([row.answer for row in rows], **options)["input_ids"]
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        # A verbatim text may spell either mark itself.
        prompt = [bos, *prompt] if adds_bos and (prompt or answer)[:1] != [bos] else prompt
        if row.answer:  # else nothing is trained on, and the sample is dropped
            answer = answer if answer[-1:] == [eos] else [*answer, eos]
        yield row, _int32(prompt + answer), _int32([IGNORED] * len(prompt) + answer)


def _encode_messages(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: str) -> Encoded:
    rendered = [_render(row, tokenizer, template) for row in rows]
    encoded = tokenizer(
        [text for text, _ in rendered],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    for index, (row, (_, spans)) in enumerate(zip(rows, rendered, strict=True)):
        ids = _int32(encoded["input_ids"][index])
        starts, ends = np.asarray(encoded["offset_mapping"][index], dtype=np.int64).reshape(-1, 2).T
        labels = np.full_like(ids, IGNORED)
        for start, end in spans:
            inside = (starts < end) & (ends > start)
            labels[inside] = ids[inside]
        yield row, ids, labels


def _render(row: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the spans of it (in characters) that are trained on."""
    from transformers.utils.chat_template_utils import render_jinja_template

    unknown = [
        name
        for name, used in (("tools", row.tools), ("tool_calls", any("tool_calls" in m for m in row.messages)))
        if used and name not in template
    ]
    if unknown:
        raise DataError(
            [f"{row.where}: has {' and '.join(unknown)}, for which the tokenizer's chat template has no place"]
        )
    try:
        # What tokenizer.apply_chat_template calls; it then flattens the spans to a mask, in which neighbours merge.
        texts, spans = render_jinja_template(
            conversations=[list(row.messages)],
            tools=list(row.tools) or None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # templates raise what they like: jinja2.TemplateError, TypeError, ValueError, ...
        raise DataError([f"{row.where}: the tokenizer's chat template refuses the row: {error}"]) from error
    if all(row.trains):
        return texts[0], spans[0]
    if len(spans[0]) != len(row.trains):
        raise DataError(
            [
                f"{row.where}: train: false (or weight: 0) needs a chat template that marks each assistant message "
                f"once, but this one marks {len(spans[0])} spans in {len(row.trains)} assistant messages"
            ]
        )
    return texts[0], [span for span, trains in zip(spans[0], row.trains, strict=True) if trains]


def training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template with marks around what the assistant says; without them nothing can be masked."""
    key, instead = "model.tokenizer", "use rows of {prompt, completion}, or the tokenizer of an instruct model"
    if not tokenizer.is_fast:
        raise DataError([f"{key}: {type(tokenizer).__name__} cannot map text to tokens (not a fast one); {instead}"])
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError([f"{key}: has no chat template, which rows of {{messages}} need; {instead}"]) from error
    if GENERATION_MARK.search(template):
        return template
    try:
        from trl import get_training_chat_template

        return get_training_chat_template(tokenizer) or template
    except ValueError as error:
        raise DataError(
            [
                f"{key}: its chat template has no {{% generation %}} marks, and TRL offers no patch for it ({error}); "
                "put {% generation %} ... {% endgeneration %} around the assistant's content and end mark in "
                f"chat_template.jinja, or {instead}"
            ]
        ) from error


def _int32(values: Sequence[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)
