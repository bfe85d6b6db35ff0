"""Find the attributes that a source reads or writes, and those of DeepSpeed that are not in the lists."""

from __future__ import annotations

import ast
import collections
import gc
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from peft.tuners.lora.layer import ParamWrapper

from trainer.engine.zero.parameters import GroupMaster, PartitionedParameter, ReplicatedParameter
from trainer.engine.zero.private_names import PRIVATE_NAMES

EXTENDED = (PartitionedParameter, ReplicatedParameter, GroupMaster)
OF_PARAMETERS = {
    name
    for declared in EXTENDED
    for name in (*declared.__annotations__, *(name for name in vars(declared) if not name.startswith("_")))
}
LISTED = OF_PARAMETERS | {name for names in PRIVATE_NAMES.values() for name in names}
# What variables and attributes are called that contain an object of DeepSpeed's.
_OBJECTS = {"zero", "coordinator", "engine", "optimizer", "parameter_offload", "bucket", "adam", "loss_scaler"}
# Names that DeepSpeed documents, or that its optimizers have in common with torch's.
_PUBLIC = set(
    """
    basic_optimizer destroy device empty_partition_cache fp16_enabled get_hp_fragment_address global_steps lr_scheduler
    module offload_states optimizer param_groups register_external_parameter reload_states state
    zero_grad zero_optimization_stage
    """.split()
)
# Private names of torch.
_OF_TORCH = {"_optimizer_step_post_hooks", "_optimizer_step_pre_hooks", "_wrapped_by_lr_sched"}
# What plain objects have.
_PLAIN = {
    name
    for kind in (
        *(torch, torch.Tensor, torch.nn, torch.nn.Module, torch.nn.Parameter, torch.optim, torch.optim.Optimizer),
        *(torch.finfo, torch.utils.hooks.RemovableHandle, dict, list, set, str, type, collections.deque, gc, mock),
        *(mock.patch, inspect, inspect.ClosureVars, ParamWrapper, comm, get_accelerator()),
    )
    for name in dir(kind)
    if not name.startswith("_")
}
# Attributes that only instances have: of PEFT's layers, cached functions, enumerations, streams and torch's optimizers.
_PLAIN |= {"lora_A", "lora_B", "cache_clear", "value", "wait_stream", "defaults"}


@dataclass(frozen=True)
class Use:
    """An attribute `name` of the expression `owner`."""

    owner: str
    name: str

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"

    @property
    def of_deepspeed(self) -> bool:
        """Whether the owner is called as DeepSpeed's objects are."""
        return self.owner.rpartition(".")[2].removeprefix("_") in _OBJECTS


def uses(source: str) -> list[Use]:
    """Every attribute of a source, and every text that names one in `getattr` and its kin and in `patch.object`. If
    such a call names it by something that is no text, it is a use of the name `?`."""
    tree = ast.parse(source)
    texts = _loop_texts(tree)
    found = [Use(ast.unparse(node.value), node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func).rpartition(".")[2] in ("getattr", "hasattr", "setattr", "delattr", "object"):
            if len(call.args) < 2:
                continue
            owner, name = ast.unparse(call.args[0]), call.args[1]
            if isinstance(name, ast.Constant):
                names = [name.value]
            else:
                names = texts.get(ast.unparse(name), ["?"])
            found += [Use(owner, name) for name in names]
    return found


def _loop_texts(tree: ast.AST) -> dict[str, list[str]]:
    """The texts that loop variables take, by variable, of loops over a tuple of texts."""
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.comprehension)]
    return {
        ast.unparse(loop.target): [part.value for part in loop.iter.elts if isinstance(part, ast.Constant)]
        for loop in loops
        if isinstance(loop.iter, ast.Tuple)
    }


def definitions(source: str) -> Iterator[str]:
    """The names that a source defines: classes, functions, methods, fields and attributes of `self`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) == "self":
                yield node.attr


def unlisted(source: str, defined: set[str]) -> set[str]:
    """Attributes in a source of `trainer/engine/zero/` that are DeepSpeed's and in no list. `defined`: by the
    folder."""
    imported = _imported_from_deepspeed(source)
    return {str(use) for use in uses(source) if not _known(use, defined, imported)}


def _imported_from_deepspeed(source: str) -> dict[str, Any]:
    """What a source imports from DeepSpeed, by its name there."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "deepspeed":
            module = importlib.import_module(node.module)
            found |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name: importlib.import_module(alias.name) for alias in node.names if alias.name == "deepspeed"
            }
    return found


def _known(use: Use, defined: set[str], imported: dict[str, Any]) -> bool:
    if use.name in LISTED or (use.name.startswith("__") and use.name.endswith("__")):
        return True
    if use.of_deepspeed:
        return use.name in _PUBLIC
    if use.owner in imported:  # a class, an enumeration or a module, whose attributes are looked up here
        return hasattr(imported[use.owner], use.name) and not use.name.startswith("_")
    if use.name.startswith("_"):
        return (use.owner in ("self", "super()") and use.name in defined) or use.name in _OF_TORCH
    return use.name in defined | _PLAIN | _PUBLIC and not use.name.startswith("ds_")


def trespasses(source: str) -> set[str]:
    """Attributes in a source outside `trainer/engine/zero/` that are private to DeepSpeed."""
    # Ordinary words: a section of recipes, a method of texts, and a field of the planner.
    ordinary = {"optimizer", "partition", "offload_param"}
    return {
        str(use)
        for use in uses(source)
        if use.name.startswith("ds_")
        or use.name in LISTED - ordinary
        or (use.of_deepspeed and use.name.startswith("_"))
        or str(use).endswith("engine.optimizer")
    }
