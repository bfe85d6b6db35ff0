"""Keep control tokens that a message spells out as text, so that no model learns to write them in mid-answer.

A tokenizer makes one token of `<|im_end|>` wherever it stands, also in a message that is about chat templates, and of
`<s>` in a message with HTML. So a mark is put into each before the conversation is rendered. Then only the template's
own control tokens are whole, and the text between them is tokenised as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from trainer.data.answers import RefusedRow, Span
from trainer.data.formats.base import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokensInText = Literal["text", "allow"]
# Of those that Unicode leaves to private use.
_MARK = "\uf8ff"


class ControlTokens:
    """The control tokens of a tokenizer, which rows may spell.

    These are the special tokens that begin and end turns and texts. Others, such as those of reasoning, calls and
    images, belong into messages. With "allow" nothing is kept as text, and nothing found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, wanted: TokensInText = "text") -> None:
        self._tokenizer = tokenizer
        longest_first = sorted(_structural(tokenizer), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._keeps = wanted == "text" and self._pattern is not None

    def found(self, row: Row) -> bool:
        """Return whether a row spells control tokens that are to be text."""
        if not self._keeps or row.verbatim:
            return False
        assert self._pattern is not None
        return any(map(self._pattern.search, _texts([row.prompt, row.answer, row.messages, row.tools])))

    def spelt(self, row: Row) -> tuple[str, ...]:
        """Return the control tokens that a row spells, each once."""
        return tuple(dict.fromkeys(self._spelt([row.prompt, row.answer, row.messages, row.tools])))

    def hidden(self, row: Row) -> Row:
        """Return a conversation with a mark in each control token that it spells."""
        if any(_MARK in text for text in _texts([row.messages, row.tools])):
            raise RefusedRow(f"contains the character U+{ord(_MARK):04X} beside a control token; remove it")
        return replace(row, messages=self._with_marks(row.messages), tools=self._with_marks(row.tools))

    def check(self, row: Row, text: str, plain: str) -> None:
        """Raise `RefusedRow` unless the conversation `text`, which has marks, is else `plain`: some templates look for
        a token in a message, or write it in another way."""
        if text.replace(_MARK, "") != plain:
            raise self._refused(row, "which this chat template treats in a way of its own")

    def tokenise(self, row: Row, text: str, spans: list[Span]) -> tuple[list[int], list[Span], list[Span]]:
        """Return the ids of the rendered conversation `text`, which has marks, where each is in the text without them,
        and `spans` in it. Raises `RefusedRow` if the tokenizer cannot be taken piece by piece."""
        plain = text.replace(_MARK, "")
        whole = self._tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"]
        if self._by_pieces(plain)[0] != whole:
            raise self._refused(row, "which this tokenizer cannot keep as text")
        without = [(start - text.count(_MARK, 0, start), end - text.count(_MARK, 0, end)) for start, end in spans]
        return *self._by_pieces(text), without

    def _refused(self, row: Row, why: str) -> RefusedRow:
        spelt = ", ".join(dict.fromkeys(self._spelt([row.messages, row.tools])))
        return RefusedRow(f"spells {spelt}, {why}; leave it out of the row, or set data.special_tokens_in_text=allow")

    def _by_pieces(self, text: str) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        places: list[Span] = []
        start = 0
        assert self._pattern is not None
        for piece in re.split(f"({self._pattern.pattern})", text):
            if self._pattern.fullmatch(piece):
                ids.append(self._tokenizer.convert_tokens_to_ids(piece))
                places.append((start, start + len(piece)))
            elif piece := piece.replace(_MARK, ""):
                found = self._as_text(piece, return_offsets_mapping=True)
                ids += found["input_ids"]
                places += [(start + first, start + last) for first, last in found["offset_mapping"]]
            start += len(piece)
        return ids, places

    def as_text(self, text: str) -> list[int]:
        """Return the ids of a text in which nothing is a control token."""
        ids: list[int] = self._as_text(text)["input_ids"]
        return ids

    def _as_text(self, text: str, **options: Any) -> Any:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False, **options)

    def _spelt(self, values: Any) -> Iterator[str]:
        assert self._pattern is not None
        for text in _texts(values):
            yield from self._pattern.findall(text)

    def _with_marks(self, values: Any) -> Any:
        if isinstance(values, str):
            assert self._pattern is not None
            return self._pattern.sub(lambda token: f"{token[0][0]}{_MARK}{token[0][1:]}", values)
        if isinstance(values, Mapping):
            return {self._with_marks(key): self._with_marks(value) for key, value in values.items()}
        return type(values)(map(self._with_marks, values)) if isinstance(values, list | tuple) else values


def _texts(values: Any) -> list[str]:
    texts: list[str] = []
    _collect(values, texts)
    return texts


def _collect(values: Any, texts: list[str]) -> None:
    """Add the texts in `values`, keys included, at every depth."""
    if isinstance(values, str):
        texts.append(values)
    elif isinstance(values, dict):
        for key, value in values.items():
            _collect(key, texts)
            _collect(value, texts)
    elif isinstance(values, list | tuple):
        for value in values:
            _collect(value, texts)


def _structural(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the special tokens that begin and end texts, and those that the chat template writes around messages."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    written = ""
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    for messages in ([{"role": "system", "content": "x"}, *talk], talk):
        try:
            written += str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception:  # of many types: no template, or none that takes a system message
            continue
    # Templates write an empty thought where a message has none.
    inside = {token for token in special if "think" in token.lower() or "reason" in token.lower()}
    return ({token for token in special if token in written} | (ends & special)) - inside
