"""Tokenizers: the byte-level one that Strata ships, and those that a model folder or the hub brings along."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.errors import DataError, in_short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from trainer.config import ModelConfig

BYTES = "bytes"
PAD, EOS = "<|pad|>", "<|eos|>"
ROLE_MARKS = ("<|system|>", "<|user|>", "<|assistant|>")
HUB_TIMEOUT_SECONDS = 10

# The end of text stands inside the generation marks: a model that never trains on it never stops. Tools, calls and what
# tools answer are written as Qwen's templates write them, in text: the vocabulary has no marks for them.
CHAT_TEMPLATE = """\
{%- if tools -%}
    {{- '<|system|>Tools: ' + tools | tojson -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}
        {%- generation -%}
            {{- message['content'] -}}
            {%- for call in message['tool_calls'] or [] -%}
                {{- '<tool_call>' + call['function'] | tojson + '</tool_call>' -}}
            {%- endfor -%}
            {{- eos_token -}}
        {%- endgeneration -%}
    {%- elif message['role'] == 'tool' -%}
        {{- '<|user|><tool_response>' + message['content'] + '</tool_response>' -}}
    {%- elif message['role'] in ['system', 'user'] -%}
        {{- '<|' + message['role'] + '|>' + message['content'] -}}
    {%- else -%}
        {{- raise_exception("unknown role '" + message['role'] + "'; allowed: system, user, assistant, tool") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}"""


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the byte-level tokenizer: no merges, no training, no files, no network.

    Ids 0 to 255 are the bytes themselves; then come <|pad|> (256), <|eos|> (257) and the three chat marks, 261 entries
    in all. Decoding the encoding of a text gives that text back, whatever it holds. Neither a beginning nor an end of
    text is added when encoding.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, EOS, *ROLE_MARKS])  # in the order of their ids
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=list(ROLE_MARKS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def tokenizer_name(model: ModelConfig) -> str:
    """The tokenizer that a run takes, for `load_tokenizer`."""
    return model.tokenizer or model.path or BYTES


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads "bytes", the tokenizer in a local folder, or the one that a hub name stands for.

    A name that reads like a path (it exists, starts with ".", "/" or "~", or has more than one slash) is never looked
    up on the hub. Raises DataError where there is no such tokenizer, or it cannot be read.
    """
    if name_or_path == BYTES:
        return bytes_tokenizer()
    if _reads_like_a_path(name_or_path):
        return _load_folder(Path(name_or_path).expanduser(), trust_remote_code=trust_remote_code)
    return _load_hub_name(name_or_path, trust_remote_code=trust_remote_code)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id to fill batches with: the tokenizer's own, else its end of text, else 0.

    Any id will do, since padding is masked in the attention and in the labels; so a tokenizer without one is left as it
    is, rather than given one that the saved model would then carry.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def _reads_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def _load_folder(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise DataError([f"model.tokenizer: no such folder: {str(folder)!r}; give a folder, a hub name, or {BYTES!r}"])
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, ImportError, KeyError, plain Exception, ...
        raise DataError(
            [
                f"model.tokenizer: no readable tokenizer in {str(folder)!r} ({in_short(error)}); give a folder with "
                f"a tokenizer.json, a hub name, or {BYTES!r}"
            ]
        ) from error


def _load_hub_name(name: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Asks the hub once whether it has the name: transformers retries for most of a minute before it says so."""
    from huggingface_hub import HfApi
    from transformers import AutoTokenizer

    unreachable = None
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # unknown name, gated, offline, no network: what was downloaded before may still serve
        unreachable = error
    try:
        return AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=unreachable is not None
        )
    except Exception as error:
        raise DataError(
            [
                f"model.tokenizer: {name!r} is no folder here, and the hub has no readable tokenizer of that name "
                f"({in_short(unreachable or error)}); give a folder, a hub name, or {BYTES!r}"
            ]
        ) from error


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (the mapping of GPT-2).

    Printable bytes of Latin-1 stand for themselves, the others take the code points from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
