"""Make samples from rows: render and tokenise them, and label the targets (answers, or all of a plain text)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from enum import IntEnum
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from trainer.data.answers import RefusedRow, Span
from trainer.data.batches import IGNORED
from trainer.data.control_tokens import ControlTokens, TokensInText
from trainer.data.errors import MAX_PROBLEMS, BadRows, DataError
from trainer.data.formats.base import Row
from trainer.data.pictures import PicturedRow, Pictures
from trainer.data.places import Places, by_overlap, ids_of
from trainer.data.rendering import render, write
from trainer.data.shapes import Shapes
from trainer.data.templates import Templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overflow = Literal["truncate", "truncate_at_turn", "drop", "error"]
Sample = dict[str, Any]
# The text of a conversation, or its ids and where in the text each of them is; and the spans that are trained on.
Rendered = tuple[str | tuple[Sequence[int], Sequence[Span]], Sequence[Span]]
# A row, its index, its ids and its labels, not yet cut to the limit.
Found = Iterator[tuple[Row, int, np.ndarray, np.ndarray]]

ROWS_PER_CHUNK = 512  # rows that are read and tokenised at a time


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


class Outcome(IntEnum):
    """Say what became of a row: a sample, whole or cut to the limit, or why there is none."""

    WHOLE = 0
    CUT = 1
    TOO_LONG = 2
    NO_TARGET = 3
    REFUSED = 4


class Problem(NamedTuple):
    """Why a row ends a run, by its index. A place of a stream is costly to write out."""

    row: int
    outcome: Outcome
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Encoded:
    """The samples of some rows, end to end, and what became of the others.

    `ids` are int32, [tokens of all samples], and `targets` says which of them are trained on, bool; `lengths` has the
    tokens of each sample, and `outcomes` the `Outcome` of each row, uint8. `spelling` has the indices of rows that
    spell control tokens, and these tokens. `images` has the record of each sample with images, by its index (see
    `Pictures.add`).
    """

    ids: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    outcomes: np.ndarray
    problems: list[Problem]
    spelling: list[tuple[int, tuple[str, ...]]]
    images: dict[int, str] = field(default_factory=dict)

    @property
    def labels(self) -> np.ndarray:
        return np.where(self.targets, self.ids, np.int32(IGNORED))

    @property
    def samples(self) -> Iterator[Sample]:
        ends = np.cumsum(self.lengths)[:-1]
        for ids, labels in zip(np.split(self.ids, ends), np.split(self.labels, ends), strict=True):
            if len(ids):
                yield {"input_ids": ids, "labels": labels}


class Encoder:
    """Encode rows with one tokenizer.

    A sample has ids and labels, which are -100 for tokens that are not targets, and always for the first token, which
    nothing predicts. The answer to a prompt is a target, and so is the end of text after it. All of a plain text is a
    target. Messages are rendered by the tokenizer's chat template, and the assistant's tokens are the targets, message
    by message. If a sample has more than `max_length` tokens, "truncate" cuts its end, "truncate_at_turn" cuts a
    conversation after the last answer that is whole, "drop" leaves it out, and "error" makes it a problem. A row
    without a target makes no sample. Control tokens that rows spell stay text, unless they are allowed. Rows with
    images need `pictures`, which records what it makes pixels of; the places of images are no targets, and a row in
    which one would be cut is too long.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        overflow: Overflow,
        special_tokens_in_text: TokensInText = "text",
        pictures: Pictures | None = None,
    ) -> None:
        self.templates, self._shapes = Templates(tokenizer, pictures), Shapes()
        self.pictures = pictures
        self.tokenizer = tokenizer
        self._control = ControlTokens(tokenizer, special_tokens_in_text)
        self._max_length, self._overflow = max_length, overflow

    @cached_property
    def _places(self) -> Places:
        return Places(self.tokenizer)

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Encode rows. Raises `DataError` if no row of their kind could be encoded with this tokenizer."""
        outcomes = np.full(len(rows), Outcome.REFUSED, dtype=np.uint8)
        problems: list[Problem] = []
        spelling: list[tuple[int, tuple[str, ...]]] = []
        samples: list[tuple[np.ndarray, np.ndarray]] = []
        images: dict[int, str] = {}
        for row, index, ids, labels in self._found(rows, problems, spelling):
            labels[:1] = IGNORED
            outcome, kept = self._limited(row, labels)
            outcomes[index] = outcome
            if kept:
                if isinstance(row, PicturedRow):
                    images[len(samples)] = row.record
                samples.append((ids[:kept], labels[:kept]))
            elif outcome == Outcome.TOO_LONG and self._overflow == "error":
                what = f"{len(ids)} tokens, data.max_length is {self._max_length}"
                problems.append(Problem(index, Outcome.TOO_LONG, row.where, what))
        return Encoded(
            _joined([ids for ids, _ in samples]),
            _joined([labels for _, labels in samples]) != IGNORED,
            _int32([len(ids) for ids, _ in samples]),
            outcomes,
            sorted(problems, key=lambda problem: problem.row),
            spelling,
            images,
        )

    def _limited(self, row: Row, labels: np.ndarray) -> tuple[Outcome, int]:
        """Return what becomes of a row with these labels, and how many of its tokens its sample has; 0 if none."""
        length, kept = len(labels), min(len(labels), self._max_length)
        if length > kept:
            if self._overflow not in ("truncate", "truncate_at_turn"):
                return Outcome.TOO_LONG, 0
            if self._overflow == "truncate_at_turn" and row.messages:
                kept = _whole_turns(labels, self._max_length)
            if isinstance(row, PicturedRow) and kept < row.end:
                return Outcome.TOO_LONG, 0
        if not (labels[:kept] != IGNORED).any():
            return Outcome.NO_TARGET, 0
        return Outcome.CUT if length > self._max_length else Outcome.WHOLE, kept

    def _found(
        self, rows: Sequence[Row], problems: list[Problem], spelling: list[tuple[int, tuple[str, ...]]]
    ) -> Found:
        # A source of {prompt, completion} may contain texts and conversations.
        for conversations, group in groupby(enumerate(rows), lambda pair: bool(pair[1].messages)):
            chosen = list(group)
            if not conversations:
                yield from self._encode_texts(chosen, spelling)
                continue
            rendered: list[tuple[Row, int, Rendered]] = []
            for index, row in chosen:
                try:
                    made, found = self._render(row)
                except RefusedRow as refused:
                    problems.append(Problem(index, Outcome.REFUSED, row.where, str(refused)))
                    continue
                rendered.append((made, index, found))
                if not (isinstance(found[0], str) or row.images):
                    spelling.append((index, self._control.spelt(row)))
            if rendered:
                yield from self._encode_messages(rendered)

    def _render(self, row: Row) -> tuple[Row, Rendered]:
        """Return the row and the text of its conversation, or its ids if it spells control tokens or has images. Raises
        `RefusedRow`."""
        spells = self._control.found(row)
        if row.images:
            _refuse_images(spells, self.pictures)
        template = self.templates.for_row(row)
        shown = self._control.hidden(row) if spells else row
        text, spans = render(shown, self.tokenizer, template, self.templates.tokens, self._shapes)
        if row.images and self.pictures is not None:
            pictured, (ids, places, spans) = self.pictures.encode(row, text, spans)
            return pictured, ((ids, places), spans)
        if not spells:
            return row, (text, spans)
        self._control.check(row, text, write(row, self.tokenizer, template, spans=False)[0])
        ids, places, spans = self._control.tokenise(row, text, spans)
        return row, ((ids, places), spans)

    def _encode_texts(self, rows: Sequence[tuple[int, Row]], spelling: list[tuple[int, tuple[str, ...]]]) -> Found:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if eos is None:
            raise DataError(["model.tokenizer: has no end-of-text token (eos_token), so no answer would ever end"])
        adds_bos = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
        # Prompt and answer are tokenised separately, because generation starts from the tokens of the prompt alone. If
        # they were tokenised together, a token across the border would change the prompt, and the first target would
        # contain a part of it.
        prompts = ids_of(self.tokenizer, [row.prompt for _, row in rows])
        answers = ids_of(self.tokenizer, [row.answer for _, row in rows])
        for (index, row), prompt, answer in zip(rows, prompts, answers, strict=True):
            if self._control.found(row):
                prompt, answer = self._control.as_text(row.prompt), self._control.as_text(row.answer)
                spelling.append((index, self._control.spelt(row)))
            # A verbatim text may itself begin or end with these tokens.
            prompt = [bos, *prompt] if adds_bos and (prompt or answer)[:1] != [bos] else prompt
            if row.answer:  # else nothing is trained on, and there is no sample
                answer = answer if answer[-1:] == [eos] else [*answer, eos]
            ids = _int32(prompt + answer)
            labels = ids.copy()
            labels[: len(prompt)] = IGNORED
            yield row, index, ids, labels

    def _encode_messages(self, rendered: Sequence[tuple[Row, int, Rendered]]) -> Found:
        texts = [text if isinstance(text, str) else "" for *_, (text, _) in rendered]
        placed = self._places.find(texts, [spans for *_, (_, spans) in rendered])
        for (row, index, (text, spans)), found in zip(rendered, placed, strict=True):
            ids, parts = found if isinstance(text, str) else by_overlap(*text, spans)
            labels = np.full_like(ids, IGNORED)
            for part in parts:
                labels[part] = ids[part]
            yield row, index, ids, labels


class Outcomes:
    """Collect what became of the rows of a source: one byte for each, and the problems of some."""

    def __init__(self) -> None:
        self._outcomes = bytearray()
        self._problems: list[Problem] = []
        self._spelling: dict[tuple[str, ...], array[int]] = {}  # the rows that spell these tokens

    def add(self, encoded: Encoded) -> None:
        """Add the rows after those so far."""
        start = len(self._outcomes)
        self._problems += [problem._replace(row=start + problem.row) for problem in encoded.problems]
        for row, tokens in encoded.spelling:
            self._spelling.setdefault(tokens, array("q")).append(start + row)
        self._outcomes += encoded.outcomes.tobytes()

    @property
    def num_rows(self) -> int:
        return len(self._outcomes)

    @property
    def of_samples(self) -> np.ndarray:
        """Return the index of the row of each sample, int64."""
        return np.flatnonzero(np.frombuffer(self._outcomes, dtype=np.uint8) <= Outcome.CUT)

    def spelling(self, chosen: np.ndarray) -> tuple[int, list[str]]:
        """Count the rows that spell control tokens among those `chosen` (bool, [rows]); return these tokens, too."""
        rows = {tokens: np.asarray(found)[chosen[found]] for tokens, found in self._spelling.items()}
        first = sorted((found[0], tokens) for tokens, found in rows.items() if len(found))
        names = dict.fromkeys(token for _, tokens in first for token in tokens)
        return sum(map(len, rows.values())), list(names)

    def check(
        self, path: str, bad: BadRows, chosen: np.ndarray, *, max_length: int, overflow: Overflow
    ) -> tuple[int, int, int]:
        """Count the samples of the rows `chosen` (bool, [rows]), those that were cut, and the rows that made none.

        Raises `DataError` for rows that cannot be rendered, unless `bad` drops them, for rows that are too long if
        `overflow` says so, and if no sample is left.
        """
        found = np.frombuffer(self._outcomes, dtype=np.uint8)[chosen]
        counts = [int(np.count_nonzero(found == outcome)) for outcome in Outcome]  # bincount would copy to int64
        num_rows = len(found) - counts[Outcome.REFUSED]
        too_long: list[str] = []
        for problem in self._problems:
            if not chosen[problem.row]:
                continue
            if problem.outcome == Outcome.REFUSED:
                bad.add(problem.where, problem.what)
                continue
            too_long.append(str(problem))
            if len(too_long) == MAX_PROBLEMS:
                break
        else:
            bad.check(num_rows)
        if too_long:
            raise DataError([*too_long, "raise data.max_length, or set data.overflow to truncate or drop"])
        num_samples = counts[Outcome.WHOLE] + counts[Outcome.CUT]
        if num_samples == 0:
            raise DataError(
                [
                    *bad.first,
                    f"{path}: none of {num_rows} samples is left: {counts[Outcome.NO_TARGET]} have no token to train "
                    f"on among the first data.max_length={max_length} (all are masked), {counts[Outcome.TOO_LONG]} are "
                    f"longer (data.overflow={overflow}); raise data.max_length, or look at the tokenizer's chat "
                    "template",
                ]
            )
        return num_samples, counts[Outcome.CUT], num_rows - num_samples


def _refuse_images(spells: bool, pictures: Pictures | None) -> None:
    if pictures is None:
        raise RefusedRow("has an image, and the model reads text only (model.tokenizer names no folder of a processor)")
    pictures.check()
    if spells:
        raise RefusedRow(
            "has an image and spells control tokens, which cannot be kept as text there; leave them out of the row, or "
            "set data.special_tokens_in_text=allow"
        )


def _whole_turns(labels: np.ndarray, max_length: int) -> int:
    """Return the number of tokens up to the end of the last answer that is whole within `max_length`; `max_length` if
    not even the first one is."""
    target = labels != IGNORED
    ends = np.flatnonzero(target[:max_length] & ~target[1 : max_length + 1]) + 1
    return int(ends[-1]) if len(ends) else max_length


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else _int32([])


def _int32(values: Sequence[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)
