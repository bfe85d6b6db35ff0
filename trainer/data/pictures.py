"""Make tokens and pixels of rows with images, by the processor of a multimodal model.

Tokens are cached, pixels are not: they are made again when a batch is, from the files of the images, whose checksums
are cached. The same bytes make the same pixels, so that a resumed run continues bit for bit.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from trainer.data.answers import RefusedRow, Span
from trainer.data.batches import IGNORED
from trainer.data.errors import DataError, in_short
from trainer.data.formats.base import Row
from trainer.data.formats.images import Image
from trainer.data.tokenizer import BYTES, add_tokens, tokenizer_name

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from PIL.Image import Image as Picture

    from trainer.config import ModelConfig

# Files in which transformers looks for the settings of a processor, and so for a processor.
SETTINGS = ("processor_config.json", "preprocessor_config.json")
INLINE = "images"  # folder in a source's folder of the cache, for images that are in its rows
# What a processor returns for each token, besides what a batch has already.
_OF_TOKENS = ("input_ids", "attention_mask")
_BLANK = (64, 64)  # pixels


@dataclass(frozen=True)
class PicturedRow(Row):
    """A row with images whose tokens are known: `record` is JSON for `Pictures.add`, `end` the number of tokens up to
    the last one of an image."""

    record: str = ""
    end: int = 0


@dataclass(frozen=True)
class Places:
    """Say where the images of a source are: `folder` is that of its data file, to which paths in rows are relative, and
    `inline` that of images that are in the rows themselves."""

    folder: Path
    inline: Path

    def of(self, path: str | None, digest: str) -> Path:
        return self.inline / digest if path is None else self.folder / Path(path).expanduser()


class Pictures:
    """The processor of the model in a folder, or of a name on the Hub, loaded when the first image needs it."""

    def __init__(self, name: str, *, trust_remote_code: bool = False, tokens: Sequence[str] = ()) -> None:
        """`tokens` are added to the processor's tokenizer, as they are to the run's."""
        self._name = name
        self._trust_remote_code = trust_remote_code
        self._tokens = tokens
        self._places: Places | None = None  # of the rows that are encoded now

    @cached_property
    def processor(self) -> Any:
        """Return the processor. Raises `DataError` if there is none, or a package that it needs is missing."""
        from transformers import AutoProcessor

        try:
            found = AutoProcessor.from_pretrained(self._name, trust_remote_code=self._trust_remote_code)
        except Exception as error:  # OSError, ValueError, ImportError, AttributeError, ...
            raise DataError(
                [
                    f"model.tokenizer: the rows have images, and transformers cannot load the processor in "
                    f"{self._name!r} ({in_short(error)}); some processors need torchvision: pip install "
                    "'strata-trainer[images]'"
                ]
            ) from error
        if getattr(found, "image_processor", None) is None:
            raise DataError(
                [f"model.tokenizer: the rows have images, and {self._name!r} has no processor that reads images"]
            )
        add_tokens(found.tokenizer, self._tokens)
        return found

    @cached_property
    def settings(self) -> dict[str, str] | None:
        """Return checksums of the processor's settings, by file, or None if it has none here. Loads nothing."""
        return _settings(self._name)

    @cached_property
    def chat_template(self) -> Any:
        return getattr(self.processor, "chat_template", None)

    def check(self) -> None:
        """Raise `DataError` if the processor cannot be loaded."""
        self.processor  # noqa: B018 - loaded on first use

    def begin(self, places: Places) -> None:
        """Encode the rows of a source from here on, whose images are in `places`."""
        self._places = places

    def encode(
        self, row: Row, text: str, spans: Sequence[Span]
    ) -> tuple[PicturedRow, tuple[list[int], list[Span], list[Span]]]:
        """Return the row with its record, and its ids, where each is in the text (nowhere, if it belongs to an image)
        and `spans` in that text, in which the processor has written out the places of images.

        `text` is the conversation as the chat template writes it. Raises `RefusedRow` for an image that cannot be
        read, and if the template has not written a place for each.
        """
        contents = [self._content(image) for image in row.images]
        pictures = [_opened(content, str(image)) for content, image in zip(contents, row.images, strict=True)]
        options = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        try:
            made = self.processor(text=[text], images=[pictures], add_special_tokens=False, **options)
        except Exception as error:  # processors raise many kinds
            raise RefusedRow(f"the model's processor refuses the row: {in_short(error)}") from error
        if "offset_mapping" not in made or "text_replacement_offsets" not in made:
            kind = type(self.processor).__name__
            raise DataError([f"model.tokenizer: {kind} does not say where in a text images are; leave images out"])
        replaced = [(place["span"], place["new_span"]) for place in made["text_replacement_offsets"][0]]
        if len(replaced) != len(row.images):
            raise RefusedRow(
                f"has {len(row.images)} images, for which the chat template has written {len(replaced)} places"
            )
        ids, offsets = [int(token) for token in made["input_ids"][0]], made["offset_mapping"][0]
        new = [place for _, place in replaced]
        inside = [any(start < last and end > first for first, last in new) for start, end in offsets]
        gained = [0, *(after[1] - before[1] for before, after in replaced)]
        before_ends = [before[1] for before, _ in replaced]
        moved = [tuple(at + gained[bisect_right(before_ends, at)] for at in span) for span in spans]
        where = [(0, 0) if image else tuple(span) for image, span in zip(inside, offsets, strict=True)]
        digests = [_digest(content) for content in contents]
        files = [[image.path, digest] for image, digest in zip(row.images, digests, strict=True)]
        last = max(index for index, image in enumerate(inside) if image) + 1
        record = json.dumps({"text": text, "files": files})
        return PicturedRow(**vars(row), record=record, end=last), (ids, where, moved)

    def add(
        self,
        samples: Sequence[Mapping[str, Any]],
        places: Sequence[Places],
        collate: Any,
        *,
        dtype: torch.dtype | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the batch that `collate` makes of `samples`, with the pixels of their images as the processor makes
        them of all together, in floating-point `dtype`, if given.

        `places` are those of each sample. A batch without any image gets one of a single colour, behind the shortest
        sample, where nothing that is trained on sees it: under ZeRO every rank must call the same modules. Raises
        `DataError` if an image is not what it was when the tokens were made.
        """
        import torch

        own: list[dict[str, Any]] = [dict(sample) for sample in samples]
        records = [json.loads(_text(sample.pop("images", None)) or "null") for sample in own]
        rows = [index for index, record in enumerate(records) if record]
        starts = [0] * len(rows)
        if rows:
            images = [[self._again(files, places[index]) for files in records[index]["files"]] for index in rows]
            made = self._made([records[index]["text"] for index in rows], images)
        else:
            made = self._blank
            shortest = min(range(len(own)), key=lambda index: len(own[index]["input_ids"]))
            rows, starts = [shortest], [len(own[shortest]["input_ids"])]
            ids = made["input_ids"][0].numpy()
            sample = own[shortest]
            sample["input_ids"] = np.concatenate([sample["input_ids"], ids])
            sample["labels"] = np.concatenate([sample["labels"], np.full(len(ids), IGNORED)])
        batch = collate(own)
        shape = batch["input_ids"].shape
        for name, value in made.items():
            if name in _OF_TOKENS:
                continue
            if value.shape != made["input_ids"].shape:
                batch[name] = value.to(dtype) if dtype is not None and value.is_floating_point() else value
                continue
            batch[name] = torch.zeros(shape, dtype=value.dtype)
            for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
                length = min(len(own[row]["input_ids"]) - start, value.shape[1])
                batch[name][row, start : start + length] = value[number, :length]
        for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
            known = torch.as_tensor(own[row]["input_ids"])[start:]
            if not torch.equal(known.long(), made["input_ids"][number, : len(known)].long()):
                raise DataError(
                    [
                        f"data.cache: the processor in {self._name!r} makes other tokens than those in the cache; "
                        "delete the cache, and start anew"
                    ]
                )
        return batch

    def refuse_spelt(self, path: str, samples: Dataset) -> None:
        """Raise `DataError` if a sample without images has the token of one: in a batch with images it would be taken
        for the place of one."""
        tokens = list(self.processor.image_token_ids)
        number = 0
        for table in samples.with_format("arrow").iter(1000):
            ids = table["input_ids"].combine_chunks()
            records = table["images"].to_pylist() if "images" in table.column_names else [None] * len(ids)
            spelt = np.isin(ids.flatten().to_numpy(), tokens)
            ends = np.cumsum(ids.value_lengths().to_numpy())
            for index in np.unique(np.searchsorted(ends, np.flatnonzero(spelt), side="right")):
                if not records[index]:
                    name = self.processor.tokenizer.convert_ids_to_tokens(tokens[0])
                    raise DataError(
                        [
                            f"{path}: sample {number + index + 1} spells {name}, the place of an image, without one; "
                            "leave it out of the row"
                        ]
                    )
            number += len(ids)

    @cached_property
    def _blank(self) -> dict[str, torch.Tensor]:
        from PIL import Image as PIL

        return self._made([self.processor.image_token], [[PIL.new("RGB", _BLANK)]])

    def _made(self, texts: list[str], images: list[list[Picture]]) -> dict[str, torch.Tensor]:
        options = {"padding": True, "padding_side": "right", "add_special_tokens": False, "return_tensors": "pt"}
        processor = self.processor
        if processor.tokenizer.pad_token is None:  # any will do: what is padded is cut off again
            processor = copy(processor)
            processor.tokenizer = copy(processor.tokenizer)
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return dict(processor(text=texts, images=images, **options))

    def _content(self, image: Image) -> bytes:
        """Return the bytes of an image's file. Those that are in a row are copied to a file of their own."""
        assert self._places is not None
        if image.data is not None:
            target = self._places.of(None, _digest(image.data))
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(image.data)
            return image.data
        try:
            return self._places.of(image.path, "").read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            why = getattr(error, "strerror", None) or error
            raise RefusedRow(f"the image {image} cannot be read: {why} (in {str(self._places.folder)!r})") from error

    def _again(self, file: Sequence[Any], places: Places) -> Picture:
        path = places.of(*file)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError([f"{path}: the image cannot be read any more ({error.strerror}); put it back"]) from error
        if _digest(content) != file[1]:
            raise DataError(
                [
                    f"{path}: is not the image of which the cached tokens were made; put that one back, or delete "
                    f"{str(places.inline.parent)!r} and start anew"
                ]
            )
        return _opened(content, str(path))


def image_files(record: Any, places: Places) -> list[str]:
    """Return where the images of a sample are, from the record of its row."""
    files = json.loads(_text(record) or "{}").get("files", [])
    return [str(places.of(*file)) for file in files]


def run_pictures(model: ModelConfig) -> Pictures | None:
    """Return the processor of a run, or None if its tokenizer is the built-in one, which has none."""
    name = tokenizer_name(model)
    if name == BYTES:
        return None
    return Pictures(name, trust_remote_code=model.trust_remote_code, tokens=model.add_tokens)


def _settings(name: str) -> dict[str, str] | None:
    from transformers.utils import cached_file

    options = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    found = {}
    for setting in SETTINGS:
        try:
            file = cached_file(name, setting, **options)
        except Exception:  # no folder, and no name of the Hub
            file = None
        if file is not None:
            found[setting] = _digest(Path(file).read_bytes())
    return found or None


def _opened(content: bytes, name: str) -> Picture:
    """Return the picture in the bytes of a file, upright, in RGB. Raises `RefusedRow`."""
    from PIL import Image as PIL
    from transformers.image_utils import load_image

    try:
        return load_image(PIL.open(io.BytesIO(content)))
    except Exception as error:  # UnidentifiedImageError, OSError for a truncated file, DecompressionBombError, ...
        raise RefusedRow(f"the image {name} is damaged, or no image ({in_short(error)})") from error


def _text(value: Any) -> str:
    """Return the text in a cell of a table, which is none for a sample of a source without images."""
    return value if isinstance(value, str) else ""


def _digest(content: bytes) -> str:
    return xxhash.xxh3_128(content).hexdigest()
