"""The published methods, as points in substrate x selector x update x bank x always-on parts."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from trainer.selectors.all import All
from trainer.selectors.cyclic import Cyclic
from trainer.selectors.uniform import Uniform
from trainer.settings.nested import get
from trainer.settings.updates.unmask import UnmaskSettings

PARTS = ("substrate", "selector", "update", "bank", "always_on")

# The value of always_on.embeddings and always_on.head that trains the rows of model.add_tokens alone.
NEW_ROWS = "new_rows"
ALL_ON = {"embeddings": True, "head": True, "norm": True}
_ALL_OFF = dict.fromkeys(ALL_ON, False)
_COMMON: dict[str, Any] = {"substrate": {"name": "full"}, "update": {"name": "dense"}, "bank": {"name": "discard"}}

_LORA = {
    "peft_type": "LORA",
    "r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
}
# Adapters are small: their state is kept on the device.
_KEPT = {"name": "device"}
_ADAPTERS: dict[str, Any] = {
    **_COMMON,
    "substrate": {"name": "adapter", "peft": _LORA},
    "bank": _KEPT,
    "always_on": _ALL_OFF,
}


def _published(settings: BaseModel, *keys: str) -> dict[str, Any]:
    """Return the name of a member and those of its defaults that a paper publishes."""
    return {key: getattr(settings, key) for key in ("name", *keys)}


_ALL = _published(All(), "interval")

# Each method's published point.
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    # LISA, arXiv 2403.17919, Algorithm 1. gamma = 2 and K = 20: defaults and fine-tuning script of the authors' LMFlow.
    # Embeddings, head and final norm are never frozen there; state of re-frozen layers "is treated as being discarded".
    "lisa": {**_COMMON, "selector": _published(Uniform(), "blocks", "interval"), "always_on": ALL_ON},
    # BAdam, arXiv 2404.02827. K = 100 and random reshuffling: the paper's scripts (the code's own defaults, 50 and
    # descending, differ). One layer at a time, embeddings and head frozen, state and master dropped with the block.
    "badam": {
        **_COMMON,
        "selector": _published(Cyclic(), "blocks", "interval", "order"),
        "always_on": _ALL_OFF,
    },
    # IST, arXiv 2410.11772: constants of the authors' ist.py, adapters of their llama_7B_LoRA_IST.sh. The state of
    # inactive adapters is kept.
    "ist": {**_ADAPTERS, "selector": {"name": "importance"}},
    # ID3, arXiv 2408.14470: every weight of the model is scored; constants of the authors' README. The state of
    # unmasked weights is kept on the device.
    "id3": {
        **_COMMON,
        "selector": _ALL,
        "update": _published(UnmaskSettings(), "budget", "exp", "eps", "bias_correction"),
        "bank": _KEPT,
        "always_on": ALL_ON,
    },
    # LoRA, arXiv 2106.09685, with the same adapters; all of them always train.
    "lora": {**_ADAPTERS, "selector": _ALL},
    "full": {**_COMMON, "selector": _ALL, "always_on": ALL_ON},
}
# Used for parts that neither a method nor the user sets.
DEFAULT_PARTS = METHODS["lisa"]

SECTIONS = ("model", "optimizer", "schedule", "train", "eval", "data", "checkpoint", "monitor")


def expand_method(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with every section present and every part laid over the method's point (or over the defaults).

    A part whose `name` differs from the point's starts from that member's own defaults. Null counts as absent.
    """
    method = values.get("method")
    point = METHODS.get(method, DEFAULT_PARTS) if isinstance(method, str) else DEFAULT_PARTS
    expanded = dict(values)
    for section in SECTIONS:
        expanded[section] = {} if values.get(section) is None else values[section]
    for part in PARTS:
        expanded[part] = _lay_over(point[part], values.get(part))
    if get(expanded, "substrate.name") == "adapter" and point["substrate"]["name"] != "adapter":
        expanded["always_on"] = _lay_over(_ALL_OFF, values.get("always_on"))
        expanded["bank"] = _lay_over(_KEPT, values.get("bank"))
    _pair_new_rows(expanded["always_on"], values.get("always_on"))
    return expanded


def _pair_new_rows(always_on: Any, given: Any) -> None:
    """Let the rows of new tokens train in embeddings and head if the user asks for either and says nothing of the
    other: a token that is read but never written, or the reverse, is rarely meant."""
    if isinstance(always_on, dict) and isinstance(given, Mapping):
        for part, other in (("embeddings", "head"), ("head", "embeddings")):
            if given.get(part) == NEW_ROWS and given.get(other) is None:
                always_on[other] = NEW_ROWS


def _lay_over(point: Mapping[str, Any], given: Any) -> Any:
    if given is None:
        return dict(point)
    if not isinstance(given, Mapping) or given.get("name", point.get("name")) != point.get("name"):
        return given
    laid = {**point, **given}
    if "peft" in point:
        laid["peft"] = _lay_over_peft(point["peft"], given)
    return laid


def _lay_over_peft(point: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """Return the point's adapter fields with those of `given` laid over them; other adapter types replace them."""
    peft = given.get("peft")
    if peft is None:
        return None if given.get("adapter") is not None else dict(point)
    same = isinstance(peft, Mapping) and str(peft.get("peft_type", point["peft_type"])).upper() == point["peft_type"]
    return {**point, **peft} if same else peft
