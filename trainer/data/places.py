"""Tokenise rendered conversations, and find the tokens of spans of their text.

Tokenizers return where in the text each token is, but take twice as long for it. With the byte-level vocabularies of
most models the length of a token says it as well.
"""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.answers import Span
from trainer.data.tokenizer import byte_characters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Ids, and for each span an index of those whose text is in it.
Placed = tuple[np.ndarray, Sequence[slice | np.ndarray]]


class Places:
    """Tokenise texts with one fast tokenizer, and find the tokens of spans."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._lengths, self._composes = None, False
        if calls_its_core(tokenizer):
            core = json.loads(tokenizer.backend_tokenizer.to_str())
            self._composes = core["normalizer"] == {"type": "NFC"}
            if _keeps_bytes(core):
                self._lengths = _lengths(tokenizer)

    def find(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Placed]:
        """Return the ids of each text, int32, and which of them are in its spans. Special tokens are not added."""
        found: list[Placed | None] = [None] * len(texts)
        if self._lengths is not None:
            for index, ids in enumerate(ids_of(self._tokenizer, texts)):
                found[index] = self._by_length(np.asarray(ids, dtype=np.int32), texts[index], spans[index])
        others = [index for index, placed in enumerate(found) if placed is None]
        if others:
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            encoded = self._tokenizer([texts[index] for index in others], **options)
            for index, ids, encoding in zip(others, encoded["input_ids"], encoded.encodings, strict=True):
                found[index] = by_places(ids, encoding.token_to_chars, spans[index])
        return [placed for placed in found if placed is not None]

    def _by_length(self, ids: np.ndarray, text: str, spans: Sequence[Span]) -> Placed | None:
        """Return None if the tokens are not the bytes of the text."""
        assert self._lengths is not None
        if self._composes and not unicodedata.is_normalized("NFC", text):
            return None
        lengths = self._lengths[ids]
        ends = lengths.cumsum()
        ascii = text.isascii()
        if (ends[-1] if len(ends) else 0) != (len(text) if ascii else len(text.encode())):
            return None
        borders = np.array(spans if ascii else [[len(text[:at].encode()) for at in span] for span in spans])
        if not len(borders):
            return ids, []
        first = ends.searchsorted(borders[:, 0], side="right")
        last = (ends - lengths).searchsorted(borders[:, 1], side="left")
        return ids, list(map(slice, first.tolist(), last.tolist()))


def by_places(ids: Sequence[int], place: Callable[[int], Any], spans: Sequence[Span]) -> Placed:
    """Return ids, int32, and which of them are in `spans`. `place(index)` is where in the text a token is; tokens are
    in the order of the text."""
    tokens = range(len(ids))
    slices = [
        slice(
            bisect_right(tokens, start, key=lambda token: place(token)[1]),
            bisect_left(tokens, end, key=lambda token: place(token)[0]),
        )
        for start, end in spans
    ]
    return np.asarray(ids, dtype=np.int32), slices


def by_overlap(ids: Sequence[int], places: Sequence[Span], spans: Sequence[Span]) -> Placed:
    """Return ids, int32, and which of them are in `spans`, by their `places`, which may be in any order: tokens that
    are nowhere in the text, such as those of images, are at (0, 0)."""
    starts, ends = np.asarray(places, dtype=np.int64).reshape(-1, 2).T
    return np.asarray(ids, dtype=np.int32), [(starts < end) & (ends > start) for start, end in spans]


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts, without tokens that the tokenizer adds."""
    if calls_its_core(tokenizer):
        tokenizer("", verbose=False)  # leaves the core without truncation and padding
        core = tokenizer.backend_tokenizer
        return [encoding.ids for encoding in core.encode_batch_fast(list(texts), add_special_tokens=False)]
    found = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = found["input_ids"]
    return ids


def calls_its_core(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer is a fast one, and calling it does no more to a text than its core does. Those of some
    models do more."""
    from transformers import PreTrainedTokenizerFast

    names = ("__call__", "_encode_plus")
    return all(getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name) for name in names)


def _keeps_bytes(core: Mapping[str, Any]) -> bool:
    """Return whether the tokens of a text are its bytes, with places that are not trimmed, as far as a tokenizer's
    configuration says it."""
    splits = _steps(core["pre_tokenizer"], "pretokenizers")
    after = _steps(core["post_processor"], "processors")
    return (
        core["normalizer"] in (None, {"type": "NFC"})
        and core["model"]["type"] == "BPE"
        and not any(core["model"].get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
        and [step["type"] for step in splits[-1:]] == ["ByteLevel"]
        and not splits[-1]["add_prefix_space"]
        and all(step["type"] in ("Split", "Digits", "ByteLevel") for step in splits)
        and all(step["type"] in ("ByteLevel", "TemplateProcessing") for step in after)
        and not any(step.get("trim_offsets") for step in after)
    )


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """Return the bytes of each token, int64, [largest id + 1]; None if a token is not of bytes."""
    characters = set(byte_characters())
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(max(vocabulary.values(), default=-1) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        if index in added:
            lengths[index] = len(added[index].encode())
        elif characters.issuperset(token):
            lengths[index] = len(token)
        else:
            return None
    return lengths
