"""Find what can be switched on and off in a decoder model: its blocks, and the parameters outside them.

A *block* is one transformer layer. Blocks are found by structure, never by a table of class names: the outermost
`torch.nn.ModuleList` that contains most of the model's parameters. Everything outside the blocks is in one of three
*parts*: embeddings, head and norm. The blocks of a multimodal model are those of its language model; what prepares
images, video or sound for it is in two more parts: projector and vision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from trainer.config.errors import did_you_mean
from trainer.errors import StrataError
from trainer.model.towers import Towers, towers_of

PARTS = ("embeddings", "head", "norm")
# Of multimodal models only, each with the setting that trains it.
TOWER_PARTS = {"projector": "always_on.projector: true", "vision": "model.vision: train"}
# The attribute under which a module has the rows of new tokens (`new_rows.py`). The rest of such a module stays frozen.
NEW_ROWS = "new_rows"
# A second module list of at least this share of the largest one's parameters makes the choice ambiguous
# (encoder-decoders, vision-language models).
_RIVAL_SHARE = 0.1
# What PEFT puts before the names of a model's modules when it wraps it: users know them without.
_PEFT_PREFIX = "base_model.model."


class BlockError(StrataError, ValueError):
    """The model's structure does not say which modules are its blocks, or a choice selects nothing."""


def full_numel(parameter: Tensor) -> int:
    """Return the elements of the whole parameter, even if this rank stores only a partition of it (ZeRO-3)."""
    return getattr(parameter, "ds_numel", parameter.numel())


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole parameter, even if this rank stores only a partition of it (ZeRO-3)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether this rank stores only a partition of the parameter (ZeRO-3).

    Outside `trainer.engine.zero`, only this function and the two above read attributes that ZeRO-3 adds to parameters.
    """
    return hasattr(parameter, "ds_id")


def decays(parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to matrices only, never to norms and biases."""
    return len(full_shape(parameter)) >= 2


@dataclass(frozen=True)
class Block:
    """One transformer layer: its position, its module and the parameters that may train in it, by stable name."""

    index: int
    path: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]

    @property
    def numel(self) -> int:
        return sum(full_numel(p) for p in self.parameters.values())


@dataclass(frozen=True)
class Piece:
    """A block, or a module outside the blocks: its path in the model, and its tensors by their names in the model."""

    path: str
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Structure:
    """The blocks of a model and the parameters outside them (`outside`, by part and stable name).

    A tied head is counted once, under embeddings; `tied` says so. Only a multimodal model has `TOWER_PARTS`.
    """

    path: str
    blocks: tuple[Block, ...]
    outside: dict[str, dict[str, nn.Parameter]]
    tied: bool


def find(model: nn.Module, *, path: str | None = None, substrate: Literal["full", "adapter"] = "full") -> Structure:
    """Find the blocks of `model` and sort every other parameter into embeddings, head and norm, and those of a
    multimodal model that are not its language model's into projector and vision.

    `path` names the block list (for instance `model.layers`) if the structure is ambiguous. With substrate
    `full` all weights may train; with `adapter` those that require gradients now, which is what PEFT leaves
    trainable, inside blocks and outside (`modules_to_save`).

    Raises `BlockError` if no list of blocks, or more than one, is found, or if a block has nothing to train.
    """
    towers = towers_of(model)
    path = _resolve_path(model, path, towers)
    names = {id(p): name for name, p in model.named_parameters()}

    def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
        return {names[id(p)]: p for p in module.parameters() if substrate == "full" or p.requires_grad}

    children = model.get_submodule(path)
    blocks = tuple(
        Block(i, f"{path}.{name}", child, trainable(child)) for i, (name, child) in enumerate(children.named_children())
    )
    for block in blocks:
        if not block.parameters:
            raise BlockError(
                f"{block.path} has no parameters to train under substrate '{substrate}'; every block needs some"
                + (": the adapters have to sit in all of them, and to require gradients" * (substrate == "adapter"))
            )
    _refuse_shared_parameters(blocks)

    input_embeddings, head = _call(model, "get_input_embeddings"), _call(model, "get_output_embeddings")
    inside = {id(p) for child in children.children() for p in child.parameters()}
    beside = {} if towers is None else towers.outside
    apart = {id(p) for part in beside.values() for p in part.values()}
    outside = _sort_outside(model, inside, apart, input_embeddings, head) | beside
    if substrate == "adapter":  # PEFT's modules_to_save train, the originals do not
        outside = {part: {n: p for n, p in found.items() if p.requires_grad} for part, found in outside.items()}
    shared: set[int] = set()
    if input_embeddings is not None and head is not None:
        shared = {id(p) for p in head.parameters()} & {id(p) for p in input_embeddings.parameters()}
        if substrate == "adapter":  # a tie of what stays as it is ties nothing that trains
            shared = {id(p) for p in head.parameters() if id(p) in shared and p.requires_grad}
    return Structure(path=path, blocks=blocks, outside=outside, tied=bool(shared))


def always_on(structure: Structure, parts: Iterable[str]) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters of the chosen `parts`, by part and name.

    Raises `BlockError` for an unknown part, a part without parameters, or one half of a tie.
    """
    chosen = tuple(dict.fromkeys(parts))
    known = (*PARTS, *TOWER_PARTS)
    for part in chosen:
        if part not in known:
            near = did_you_mean(part, known)
            raise BlockError(f"always_on: unknown part '{part}'{near}; allowed: {', '.join(known)}")
    if structure.tied and ("embeddings" in chosen) != ("head" in chosen):
        raise BlockError(
            f"always_on: embeddings={'embeddings' in chosen} and head={'head' in chosen}, but this model ties them "
            "to one weight: set always_on.embeddings and always_on.head to the same value"
        )
    selected = {part: structure.outside[part] for part in known if part in chosen and structure.outside.get(part)}
    for part in chosen:
        if part in TOWER_PARTS and part not in selected:
            raise BlockError(refused_tower(part, structure))
        if part not in selected and not (part == "head" and structure.tied):
            raise BlockError(
                f"always_on.{part}: true selects nothing, this model has no {part} parameters outside its blocks: "
                f"set always_on.{part} to false"
            )
    return selected


def refused_tower(part: str, structure: Structure) -> str:
    """Return why the setting that trains `part`, one of `TOWER_PARTS`, selects nothing."""
    key, value = TOWER_PARTS[part].split(": ")
    other = "false" if value == "true" else "frozen"
    kind = f"nothing trains in this model's {part}" if part in structure.outside else "this model reads text only"
    return f"{key}: {value}, but {kind}; set {key} to {other}"


def pieces(model: nn.Module) -> list[Piece]:
    """Return all that a model's `state_dict` contains, in pieces small enough for memory, in the model's order.

    Tied tensors appear once, under the name that transformers looks for when it loads them. Unlike `find`, this takes
    every outermost module list apart: which of them contains the blocks does not matter here. What is outside the
    lists is in the largest modules without a list, so that what PEFT wraps as a whole (`modules_to_save`) is together.
    """
    lists = [name for name, _ in _outermost_lists(model)]
    children = [f"{name}.{child}" for name in lists for child, _ in model.get_submodule(name).named_children()]
    tied = getattr(model, "all_tied_weights_keys", {})  # names that transformers fills from others
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    chosen: dict[int, str] = {}
    for name, tensor in tensors.items():
        if chosen.setdefault(id(tensor), name) in tied:
            chosen[id(tensor)] = name
    found: dict[str, dict[str, Tensor]] = {}
    for name in chosen.values():
        around = [name[:end] for end, letter in enumerate(name) if letter == "."]
        whole = (path for path in around if not any(f"{other}.".startswith(f"{path}.") for other in lists))
        path = next((child for child in children if name.startswith(f"{child}.")), next(whole, name.rpartition(".")[0]))
        found.setdefault(path, {})[name] = tensors[name]
    return [Piece(path, parts) for path, parts in found.items()]


def _call(model: nn.Module, method: str) -> nn.Module | None:
    return getattr(model, method)() if hasattr(model, method) else None


def _resolve_path(model: nn.Module, path: str | None, towers: Towers | None) -> str:
    lists = {
        name: modules
        for name, modules in _outermost_lists(model)
        if towers is None or name.startswith(f"{towers.language}.")
    }
    candidates = {name: _numel(modules) for name, modules in lists.items()}
    listing = ", ".join(f"{name} ({len(modules)} children)" for name, modules in lists.items()) or "none"
    if path is not None:
        if f"{_PEFT_PREFIX}{path}" in candidates:
            path = f"{_PEFT_PREFIX}{path}"
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise BlockError(
                f"model.blocks: no module '{path}'{did_you_mean(path, candidates)}; lists in this model: {listing}"
            ) from None
        if not list(module.children()):
            raise BlockError(
                f"model.blocks: '{path}' ({type(module).__name__}) has no children; lists in this model: {listing}"
            )
        if towers is not None and not path.startswith(f"{towers.language}."):
            raise BlockError(
                f"model.blocks: '{path}' is not in the language model ({towers.language}), whose blocks train; lists "
                f"there: {listing}"
            )
        return path
    if not candidates:
        raise BlockError("found no list of blocks in this model: name it with model.blocks (for instance model.layers)")
    ranked = sorted(candidates, key=candidates.__getitem__, reverse=True)
    rivals = [name for name in ranked[1:] if candidates[name] >= _RIVAL_SHARE * candidates[ranked[0]]]
    if rivals:
        raise BlockError(f"more than one list could be the blocks: {listing}. Choose one with model.blocks")
    return ranked[0]


def _outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield module lists with parameters that are not inside another such list (experts inside a block are)."""
    found: list[str] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not nested and _numel(module) > 0:
            found.append(name)
            yield name, module


def _numel(module: nn.Module) -> int:
    return sum(full_numel(p) for p in module.parameters())


def _refuse_shared_parameters(blocks: tuple[Block, ...]) -> None:
    owner: dict[int, Block] = {}
    for block in blocks:
        for name, parameter in block.parameters.items():
            other = owner.setdefault(id(parameter), block)
            if other is not block:
                raise BlockError(
                    f"{other.path} and {block.path} share the parameter {name}, so they cannot be switched one by one: "
                    "choose a model whose blocks have weights of their own"
                )


def _sort_outside(
    model: nn.Module,
    inside: set[int],
    apart: set[int],
    input_embeddings: nn.Module | None,
    head: nn.Module | None,
) -> dict[str, dict[str, nn.Parameter]]:
    """Sort the parameters outside the blocks into parts, without those `apart`. Norm: vectors. Embeddings: lookup
    tables, and matrices registered before the blocks. Head: the other matrices. Of a module with rows of new tokens,
    these alone."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    if input_embeddings is not None:
        tables |= {id(p) for p in input_embeddings.parameters()}
    head_parameters = {id(p) for p in head.parameters()} - tables if head is not None else set()
    split = [module for module in model.modules() if hasattr(module, NEW_ROWS)]
    frozen = {id(p) for module in split for name, p in module.named_parameters(recurse=False) if name != NEW_ROWS}
    parts: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    before_blocks = True
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            before_blocks = False
        elif id(parameter) in apart | frozen:
            continue
        elif id(parameter) in tables:
            parts["embeddings"][name] = parameter
        elif id(parameter) in head_parameters:
            parts["head"][name] = parameter
        elif not decays(parameter):
            parts["norm"][name] = parameter
        else:
            parts["embeddings" if before_blocks else "head"][name] = parameter
    return parts
