"""Small sizes of the multimodal families that transformers has: a language model of four blocks of width 32, a tower of
two layers of width 16.

The ids below 60 are text; those from 60 on have a meaning in some of the configurations.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from trainer.config.schema import TrainSource
from trainer.data.cache import TokenisedData, tokenise
from trainer.data.pictures import Pictures
from trainer.data.tokenizer import bytes_tokenizer

# Without names of special tokens: those that `vocab_size` has no place for stay as they are.
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
IMAGE, VIDEO, START, END = 60, 61, 62, 63
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
_QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
_QWEN3_VISION = {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
# Not square: where a file has them the other way round, transformers finds out by their shape.
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LINEAR: dict[str, Any] = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
_CLIP = {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}
_PIXTRAL = {**VISION, "model_type": "pixtral", "head_dim": 8}
_LLAMA = {**TEXT, "model_type": "llama"}
_LLAVA = {"text_config": _LLAMA, "vision_config": _CLIP, "image_token_id": IMAGE, "image_token_index": IMAGE}

# The configuration of each by transformers' model type.
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "head_dim": 8, "sliding_window": 8},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_id": IMAGE,
        "boi_token_id": START,
        "eoi_token_id": END,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "head_dim": 8, "rope_parameters": {**_ROPE, "mrope_interleaved": True}},
        "vision_config": _QWEN3_VISION,
        **_QWEN,
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": _ROPE},
        "vision_config": {**_QWEN_VISION, "fullatt_block_indexes": [1], "window_size": 16},
        **_QWEN,
    },
    "llama4": {
        "text_config": {
            **TEXT,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "attention_chunk_size": 64,
        },
        "vision_config": {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        "image_token_index": IMAGE,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "head_dim": 8},
        "vision_config": _PIXTRAL,
        "image_token_id": IMAGE,
        "spatial_merge_size": 2,
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": _ROPE},
        "vision_config": {**_QWEN_VISION, "hidden_size": 32},
        **_QWEN,
    },
    "qwen3_vl_moe": {
        "text_config": {**TEXT, **_EXPERTS, "head_dim": 8, "rope_parameters": {**_ROPE, "mrope_interleaved": True}},
        "vision_config": _QWEN3_VISION,
        **_QWEN,
    },
    "qwen3_5": {
        "text_config": {**TEXT, **_LINEAR},
        "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16},
        **_QWEN,
    },
    "llava": _LLAVA,
    "llava_next": {**_LLAVA, "image_grid_pinpoints": [[16, 16]]},
    "llava_onevision": {
        **_LLAVA,
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": _SIGLIP,
        "image_grid_pinpoints": [[16, 16]],
    },
    "idefics3": {"text_config": _LLAMA, "vision_config": VISION, "image_token_id": IMAGE, "scale_factor": 2},
    "smolvlm": {"text_config": _LLAMA, "vision_config": VISION, "image_token_id": IMAGE, "scale_factor": 2},
    "internvl": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
    },
    "paligemma": {
        "text_config": {**TEXT, "model_type": "gemma", "head_dim": 8},
        "vision_config": _SIGLIP,
        "image_token_id": IMAGE,
        "projection_dim": 32,
    },
    "gemma4": {
        "text_config": {
            **TEXT,
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
        },
        "vision_config": {**VISION, "head_dim": 8},
        "image_token_id": IMAGE,
    },
    "glm4v": {
        "text_config": {**TEXT, "rope_parameters": _ROPE},
        "vision_config": {**_QWEN_VISION, "image_size": 16},
        **_QWEN,
    },
    "aya_vision": {
        "text_config": {**TEXT, "model_type": "cohere2", "head_dim": 8},
        "vision_config": _SIGLIP,
        "image_token_index": IMAGE,
        "downsample_factor": 2,
    },
    "kimi_k25": {
        "text_config": _LLAMA,
        "vision_config": {**VISION, "merge_kernel_size": [2, 2]},
        "image_token_id": IMAGE,
    },
    "qwen2_audio": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "audio_config": {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
        "audio_token_index": IMAGE,
    },
}


def tiny_multimodal(family: str, *, seed: int = 0, **text: Any) -> PreTrainedModel:
    """A model of the given transformers type, with random weights and eager attention; `text` is for its language
    model's configuration."""
    torch.manual_seed(seed)
    fields = MULTIMODAL[family]
    config = AutoConfig.for_model(family, **{**fields, "text_config": {**fields["text_config"], **text}})
    return AutoModelForMultimodalLM.from_config(config, attn_implementation="eager")


# --- folders as they lie on the Hub -----------------------------------------------------------------------------------

# Writes contents that are texts or lists of parts, as the templates of multimodal models do.
TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}{{- 'PLACE' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""


def image_tokenizer(place: str, **special: str) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with the tokens of `special`, and a template that writes `place` for an image."""
    plain = bytes_tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        pad_token=plain.pad_token,
        eos_token=plain.eos_token,
        extra_special_tokens=special,
        chat_template=TEMPLATE.replace("PLACE", place),
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def gemma3_processor() -> ProcessorMixin:
    """Four tokens for each image of 16 x 16 pixels."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

    tokenizer = image_tokenizer("<|boi|>", image_token="<|image|>", boi_token="<|boi|>", eoi_token="<|eoi|>")
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template)


def write_folder(folder: Path, family: str, *, seed: int = 0) -> ProcessorMixin:
    """Write a random model of a family with the processor of Gemma 3, and terms. Returns the processor."""
    processor = gemma3_processor()
    size = len(processor.tokenizer)
    at = {
        f"{name}_token_id": processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image", "boi", "eoi")
    }
    fields = MULTIMODAL[family]
    marks = {name: 256 + (name == "eos_token_id") for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = {**fields["text_config"], "vocab_size": size, **marks}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**fields, **(at if family == "gemma3" else {}), "text_config": text})
    AutoModelForMultimodalLM.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "LICENSE").write_text("terms")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "made_by": "a lab"}, indent=4))
    return processor


def qwen_processor() -> ProcessorMixin:
    """The processor of Qwen2.5-VL without videos, whose part of it needs torchvision."""
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Qwen(Qwen2_5_VLProcessor):
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            self.image_token, self.video_token = tokenizer.image_token, tokenizer.video_token
            self.image_token_id, self.video_token_id = tokenizer.image_token_id, tokenizer.video_token_id
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    special = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "start": "<|vis|>", "end": "<|/vis|>"}
    tokenizer = image_tokenizer("<|vis|><|image_pad|><|/vis|>", **special)
    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    return Qwen(images, tokenizer, chat_template=tokenizer.chat_template)


class Given(Pictures):
    """A processor that is there already."""

    def __init__(self, processor: ProcessorMixin) -> None:
        super().__init__("given")
        self.processor = processor  # type: ignore[misc]
        self.settings = {"given": type(processor).__name__}  # type: ignore[misc]


def with_ids_of(processor: ProcessorMixin, family: str, **text: Any) -> PreTrainedModel:
    """A model of a family whose image tokens are those of the processor."""
    ids = processor.tokenizer.convert_tokens_to_ids
    fields = dict(MULTIMODAL[family])
    if "video_token_id" in fields:
        names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
        fields |= {name: ids(token) for name, token in names.items()}
        fields |= {"vision_start_token_id": ids("<|vis|>"), "vision_end_token_id": ids("<|/vis|>")}
    else:
        fields["image_token_id"] = ids("<|image|>")
    text = {**fields["text_config"], "vocab_size": len(processor.tokenizer), **text}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**fields, "text_config": text})
    return AutoModelForMultimodalLM.from_config(config, attn_implementation="eager")


def drawn(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    """An image of noise around a colour."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(256, size=3) / 2 + generator.integers(128, size=(height, width, 3))
    return Image.fromarray(pixels.astype("uint8"))


def write_images(folder: Path, count: int = 24) -> Path:
    """Write rows about drawn images into `folder`, two of three with images, in all spellings; every sixth has two."""
    (folder / "drawn").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        picture, question = (
            drawn(number, 12 + number % 9, 16 + number % 5),
            f"how bright is {number}?" + "?" * (number % 4),
        )
        picture.save(folder / "drawn" / f"{number}.png")
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        inline = base64.b64encode(stream.getvalue()).decode()
        spelt: list[dict[str, Any]] = [
            {"type": "image", "path": f"drawn/{number}.png"},
            {"type": "image", "base64": inline},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{inline}"}},
            {"type": "image", "url": str(folder / "drawn" / f"{number}.png")},
        ]
        part = spelt[number % 4]
        parts = [part, part] if number % 6 == 0 else [part]
        content: Any = question if number % 3 == 2 else [*parts, {"type": "text", "text": question}]
        answer = {"role": "assistant", "content": str(int(np.asarray(picture).mean()))}
        rows.append({"messages": [{"role": "user", "content": content}, answer]})
    path = folder / "images.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PROCESSORS: dict[str, Callable[[], ProcessorMixin]] = {"gemma3": gemma3_processor, "qwen2_5_vl": qwen_processor}


def prepared(
    folder: Path, processor: ProcessorMixin, *, pictures: Pictures | None = None, **more: Any
) -> TokenisedData:
    settings: dict[str, Any] = {"max_length": 200, "overflow": "truncate", "packing": False, "eval_fraction": 0.0}
    return tokenise(
        train=[TrainSource(path=str(folder / "images.jsonl"))],
        eval=(),
        tokenizer=processor.tokenizer,
        cache=folder / "cache",
        seed=0,
        pictures=Given(processor) if pictures is None else pictures,
        **{**settings, **more},
    )
