"""Make samples on disk from data sources (render, tokenise, pack), once for all ranks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.config.schema import DataSource, RunConfig, TrainSource
from trainer.data.build import HELD_OUT, TRAIN, Builder
from trainer.data.cached import lock, read_cached, remove_damaged, remove_leftovers, seal, unfinished
from trainer.data.control_tokens import TokensInText
from trainer.data.encode import Encoder, Overflow, Report
from trainer.data.errors import DataError, in_short
from trainer.data.pictures import INLINE, Pictures, Places, run_pictures
from trainer.data.sources import Opened, open_source
from trainer.data.stream import SHUFFLE_ROWS, Making, OpenSource, Streams, preview
from trainer.data.tokenised import Part, TokenisedData
from trainer.data.tokenizer import tokenizer_identity

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT_VERSION = 4  # raise it whenever the same file and settings give other samples: it is part of a folder's name
EARLIER_VERSION = 2  # of caches, and so of fingerprints, before there was `made_of`
OnBadRow = Literal["error", "drop"]


def tokenise_run(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> TokenisedData:
    """Call `tokenise` with the settings of a run. By default runs in the same folder share a cache."""
    data = config.data
    beside = Path(config.output).expanduser().parent / "cache"
    return tokenise(
        train=data.train,
        eval=data.eval or (),
        eval_fraction=data.eval_fraction,
        tokenizer=tokenizer,
        max_length=data.max_length,
        overflow=data.overflow,
        packing=data.packing,
        on_bad_row=data.on_bad_row,
        special_tokens_in_text=data.special_tokens_in_text,
        cache=Path(data.cache).expanduser() if data.cache else beside,
        seed=config.seed,
        pictures=run_pictures(config.model),
        streaming=data.streaming,
        shuffle_rows=data.shuffle_rows or SHUFFLE_ROWS,
    )


def tokenise(
    *,
    train: Sequence[TrainSource],
    eval: Sequence[DataSource],
    eval_fraction: float,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overflow: Overflow,
    packing: bool,
    cache: str | Path,
    seed: int,
    on_bad_row: OnBadRow = "error",
    special_tokens_in_text: TokensInText = "text",
    pictures: Pictures | None = None,
    streaming: bool = False,
    shuffle_rows: int = SHUFFLE_ROWS,
) -> TokenisedData:
    """Tokenise the training and evaluation sources once for all processes, and open the result.

    The samples of a source are stored in a folder of `cache`. Its name is a hash of what they are made of (the bytes of
    the source's files, tokenizer, chat template, settings), so that a second run finds them, and an edited file is
    tokenised again. One process builds the folder under a file lock; all others wait and read it. If building fails,
    the next process tries as well, so that every process raises the same `DataError`. No process group is required:
    call this before there is one, because a collective could time out meanwhile.

    If `eval_fraction` is above 0 (which requires an empty `eval`), rows of each training source are set aside for
    evaluation. They are drawn by `seed` alone, so that neither max_length nor the tokenizer changes which ones.
    `on_bad_row="drop"` leaves out rows that cannot be read or rendered instead of raising.
    `special_tokens_in_text="allow"` makes tokens of control tokens that rows spell, instead of text. `pictures` reads
    images; without it, rows that have some cannot be used. With `streaming` the training sources are only opened, and
    their first `shuffle_rows` rows are tokenised.
    """
    if eval and eval_fraction:
        raise DataError([f"data.eval_fraction: {eval_fraction}, but data.eval is given, too; give one of them"])
    maker = _Maker(
        tokenizer, max_length, overflow, packing, Path(cache), seed, on_bad_row, special_tokens_in_text, pictures
    )
    making = partial(maker.make, eval_fraction=eval_fraction)
    opened, made, apart = _all_of(
        (OpenSource, train if streaming else ()), (making, () if streaming else train), (making, eval)
    )
    train_parts = [one.parts[TRAIN] for one in made]
    eval_parts = [one.parts[TRAIN] for one in apart] + [one.parts[HELD_OUT] for one in made if HELD_OUT in one.parts]
    if eval_fraction and not eval_parts:
        num_rows = sum(part.report.samples + part.report.dropped for part in train_parts)
        raise DataError([f"data.eval_fraction: {eval_fraction} of {num_rows} rows leaves none to evaluate on"])
    weights = tuple(source.weight for source in train if source.weight is not None) or None
    made_of = {key: value for i, one in enumerate(made) for key, value in one.made_of(i).items()}
    earlier = [one.earlier_key for one in made]
    streams = None
    if streaming:
        rows = maker.making(shuffle_rows)
        train_parts = _all_of((lambda source: preview(source, rows, seed), opened))[0]
        streams = Streams(opened, rows, weights=weights, seed=seed)
        made_of, earlier = maker.streamed_from(train, opened, shuffle_rows), [None]
    parts = [*train_parts, *eval_parts]
    if pictures is not None and any(part.has_images for part in parts):
        for part in parts:
            pictures.refuse_spelt(part.path, part.samples)
    return TokenisedData(
        _joined(train_parts),
        tuple(train_parts),
        _joined(eval_parts) if eval_parts else None,
        tuple(eval_parts),
        weights,
        _digest(made_of),
        made_of,
        None if None in earlier else _digest(earlier),
        streams,
    )


def _all_of(*calls: tuple[Callable[[Any], Any], Sequence[Any]]) -> list[list[Any]]:
    """Return what each function makes of its sources. Raises `DataError` with the problems of all."""
    made: list[list[Any]] = []
    problems: list[str] = []
    for make, sources in calls:
        made.append([])
        for source in sources:
            try:
                made[-1].append(make(source))
            except DataError as error:
                problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise DataError(problems)
    return made


def _joined(parts: Sequence[Part]) -> Dataset:
    from datasets import concatenate_datasets

    return concatenate_datasets([part.samples for part in parts]).with_format("numpy")


@dataclass(frozen=True)
class _Made:
    """The samples of a source and what they were made of: its own values in `of_source`, those of all in `settings`."""

    parts: dict[str, Part]
    of_source: Mapping[str, Any]
    settings: Mapping[str, Any]
    earlier_key: str | None

    def made_of(self, index: int) -> dict[str, Any]:
        """Return what the samples were made of, by the configuration key that decides it."""
        return _by_key(index, self.of_source) | dict(self.settings)


def _values(source: DataSource, content: list[Any]) -> dict[str, Any]:
    """Return what of a source decides its samples."""
    return {
        "path": {"sha256": _digest(content)},
        "format": source.format,
        "subset": source.subset,
        "split": source.split,
        "ignore": sorted(source.ignore),
    }


def _by_key(index: int, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"data.train[{index}].{name}": value for name, value in values.items()}


@dataclass(frozen=True)
class _Maker:
    """Make the folders of sources with one tokenizer and the same settings."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    overflow: Overflow
    packing: bool
    cache: Path
    seed: int
    on_bad_row: OnBadRow
    special_tokens_in_text: TokensInText
    pictures: Pictures | None = None

    def make(self, source: DataSource, eval_fraction: float) -> _Made:
        """Return the samples of a source from its folder. The folder is built if it is missing or damaged."""
        opened = open_source(source)
        content = opened.content()
        of_source = _values(source, content)
        settings = self._settings(eval_fraction)
        if self.pictures is not None and self.pictures.settings is not None:
            settings["the model's processor"] = {"sha256": _digest(self.pictures.settings)}
        folder = self.cache / _digest([of_source, settings])
        try:
            parts = self._open_or_build(folder, source, opened, eval_fraction)
        except OSError as error:
            raise DataError(
                [f"data.cache: cannot write to {str(self.cache)!r}: {error}; name another folder"]
            ) from error
        earlier = None
        as_before = opened.as_before and not source.ignore and self.on_bad_row == "error"
        if as_before and not any(part.num_spelling for part in parts.values()):
            earlier = self._earlier_key(source, content, eval_fraction)
        return _Made(parts, of_source, settings, earlier)

    def making(self, shuffle_rows: int) -> Making:
        """Return how samples of streams are made."""
        builder = self.builder
        return Making(builder.encoder, self.max_length, self.overflow, shuffle_rows, self.packing, builder.drop_bad)

    def streamed_from(
        self, sources: Sequence[DataSource], opened: Sequence[OpenSource], shuffle_rows: int
    ) -> dict[str, Any]:
        """Return what decides the samples of streams and their order, by the configuration key."""
        made_of: dict[str, Any] = {}
        for index, (source, one) in enumerate(zip(sources, opened, strict=True)):
            made_of |= _by_key(index, _values(source, one.content))
        return made_of | self._settings(0.0) | {"data.streaming": True, "data.shuffle_rows": shuffle_rows}

    def _settings(self, eval_fraction: float) -> dict[str, Any]:
        """Return what else decides samples, by key. Values too long to be shown are digests."""
        identity = tokenizer_identity(self.tokenizer)
        template = identity.pop("template")
        return {
            "data.eval_fraction": eval_fraction,
            "seed": self.seed if eval_fraction else None,
            "data.max_length": self.max_length,
            "data.overflow": self.overflow,
            "data.packing": self.packing,
            "data.on_bad_row": self.on_bad_row,
            "data.special_tokens_in_text": self.special_tokens_in_text,
            "model.tokenizer": {"sha256": _digest(identity)},
            "the tokenizer's chat template": {"sha256": _digest(template)},
            "the installed version of trl": version("trl") if self.packing or identity["patched_by"] else None,
            "the version of Strata's samples": FORMAT_VERSION,
        }

    def _earlier_key(self, source: DataSource, content: list[Any], eval_fraction: float) -> str:
        """Return the name that the source's folder had, as a part of fingerprints, before there was `made_of`."""
        identity = tokenizer_identity(self.tokenizer)
        known = ("core", "special", "template", "patched_by")
        return _digest(
            {
                "version": EARLIER_VERSION,
                "files": content,
                "source": [source.format, source.subset, source.split],
                "split": [eval_fraction, self.seed] if eval_fraction else None,
                "tokenizer": {name: identity[name] for name in known},
                "max_length": self.max_length,
                "overflow": self.overflow,
                "packed_by": version("trl") if self.packing else None,
            }
        )

    def _open_or_build(self, folder: Path, source: DataSource, opened: Opened, eval_fraction: float) -> dict[str, Part]:
        if folder.is_dir():
            try:
                return _parts(source.path, folder)
            except ValueError:
                pass  # another process may be replacing it: check again under the lock
        with lock(folder.with_name(f"{folder.name}.lock")):
            if os.path.lexists(folder):
                try:
                    return _parts(source.path, folder)
                except ValueError as damage:
                    logger.warning("%s is damaged (%s): it is built anew", folder, damage)
                    remove_damaged(folder, damage)
            self._build(folder, source, opened, eval_fraction)
        try:
            return _parts(source.path, folder)
        except ValueError as damage:
            raise DataError(
                [
                    f"data.cache: {str(folder)!r} is damaged right after it was written ({damage}): the storage "
                    "changes what is written to it; name another folder"
                ]
            ) from damage

    def _build(self, folder: Path, source: DataSource, opened: Opened, eval_fraction: float) -> None:
        """Write every split to a temporary folder and rename it, so that a folder with the final name is complete."""
        remove_leftovers(folder)
        temporary = unfinished(folder)
        temporary.mkdir()
        try:
            if self.pictures is not None:
                self.pictures.begin(_places(source.path, temporary))
            info = self.builder.build(temporary, source, opened, eval_fraction)
            seal(temporary, {"key": folder.name, **info})
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else a host on which the lock has no effect was faster, with the same content
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @property
    def builder(self) -> Builder:
        encoder = Encoder(
            self.tokenizer,
            max_length=self.max_length,
            overflow=self.overflow,
            special_tokens_in_text=self.special_tokens_in_text,
            pictures=self.pictures,
        )
        return Builder(
            encoder, self.max_length, self.overflow, self.packing, drop_bad=self.on_bad_row == "drop", seed=self.seed
        )


def _parts(path: str, folder: Path) -> dict[str, Part]:
    """Open a folder after checking every byte of it. Raises `ValueError` if it is not what was written."""
    from datasets import Dataset

    try:
        info = read_cached(folder)
        if info["key"] != folder.name:
            raise ValueError(f"it was written as {info['key']}")
        return {
            name: Part(
                path,
                Dataset.from_file(str(folder / f"{name}.arrow")).with_format("numpy"),
                Report(**report),
                _places(path, folder),
                tuple(info["ignored"]),
                info["num_bad"],
                tuple(info["first_bad"]),
                info["num_spelling"],
                tuple(info["control_tokens"]),
            )
            for name, report in info["reports"].items()
        }
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(in_short(error)) from error


def _places(path: str, folder: Path) -> Places:
    """Return where the images are of a source at `path` whose samples are in `folder`."""
    source = Path(path).expanduser()
    return Places(source if source.is_dir() else source.parent, folder / INLINE)


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
