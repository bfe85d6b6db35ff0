"""Find the chat template with which rows are rendered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from trainer.data.errors import DataError
from trainer.data.formats.base import Row
from trainer.data.formats.images import MARK
from trainer.data.tokenizer import GENERATION_MARK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.data.pictures import Pictures


class Templates:
    """Find the chat template for each row. Some tokenizers have a separate one for rows with tools, and a processor may
    have one for rows with images."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pictures: Pictures | None = None) -> None:
        self.tokens = tokenizer.get_added_vocab().keys()
        self._tokenizer = tokenizer
        self._pictures = pictures
        self._known: dict[tuple[bool, bool], str] = {}

    def for_row(self, row: Row) -> str:
        tools, images = bool(row.tools), bool(row.images)
        if (tools, images) not in self._known:
            tokenizer = self._tokenizer
            if images and self._pictures is not None and self._pictures.chat_template is not None:
                tokenizer = copy(tokenizer)
                tokenizer.chat_template = self._pictures.chat_template
            self._known[tools, images] = training_template(tokenizer, tools=tools)
        return self._known[tools, images]


def training_template(tokenizer: PreTrainedTokenizerBase, *, tools: bool = False) -> str:
    """Return the tokenizer's chat template, with marks around the assistant's tokens if it or TRL has them.

    If there are several templates, it is the one that transformers would use for rows with or without `tools`. Raises
    `DataError` if there is none, or the tokenizer is not a fast one.
    """
    key, instead = "model.tokenizer", "use rows of {prompt, completion}, or the tokenizer of an instruct model"
    if not tokenizer.is_fast:
        raise DataError([f"{key}: {type(tokenizer).__name__} cannot map text to tokens (not a fast one); {instead}"])
    try:
        template = tokenizer.get_chat_template(tools=[] if tools else None)
    except ValueError as error:
        if isinstance(tokenizer.chat_template, dict):
            raise DataError(
                [
                    f"{key}: has chat templates called {', '.join(sorted(tokenizer.chat_template))}, but none called "
                    "default, which rows of {messages} need; save the one to train with as chat_template.jinja"
                ]
            ) from error
        raise DataError([f"{key}: has no chat template, which rows of {{messages}} need; {instead}"]) from error
    if GENERATION_MARK.search(template):
        return template
    single = copy(tokenizer)
    single.chat_template = template
    try:
        from trl import get_training_chat_template

        return get_training_chat_template(single) or template
    except ValueError:  # it knows this template as little; `find_answers` looks for what the assistant says
        return template


def in_parts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return messages whose contents are lists of parts, as the templates of multimodal models read them."""
    return [{**message, "content": list(_parts(message["content"]))} for message in messages]


def _parts(content: str) -> Iterator[dict[str, str]]:
    for number, text in enumerate(content.split(MARK)):
        if number:
            yield {"type": "image"}
        if text:
            yield {"type": "text", "text": text}


@lru_cache
def wants_parts(template: str) -> bool:
    """Return whether a template writes contents that are lists of parts, and leaves out those that are texts."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def written(content: Any) -> bool:
        conversation = [{"role": "user", "content": content}]
        try:
            return mark in render_jinja_template(conversations=[conversation], chat_template=template)[0][0]
        except Exception:  # templates raise many kinds
            return False

    mark = "marked_content"
    return not written(mark) and written([{"type": "text", "text": mark}])
