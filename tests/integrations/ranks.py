"""Train with `transformers.Trainer` and with our own loop; this runs in each rank."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.engine.parity import full_weights, largest_difference
from tests.engine.switching import TopGradientEntries
from tests.integrations.loops import (
    ACCUMULATION,
    BETAS,
    CELLS,
    CLIPPING,
    EPS,
    LR,
    MICRO_BATCH,
    RANKS,
    SAVE_EVERY,
    WEIGHT_DECAY,
    Cell,
    arguments,
    build_scheduler,
    build_trainer,
    deepspeed_config,
    fresh,
    load,
    make_sparse,
    rows,
)
from trainer import Sparse, prepare
from trainer.integrations.transformers import layerwise
from trainer.model.blocks import Block
from trainer.selectors import Uniform


def run_everything(rank: int, folder: str) -> dict[str, Any]:
    answers: dict[str, Any] = {name: compare(cell, Path(folder) / name) for name, cell in CELLS.items()}
    answers["refusals"] = refusals(Path(folder) / "refusals")
    answers["adapters"] = saved_adapters(Path(folder) / "adapters")
    return answers


@dataclass
class Resumed:
    """What a new Trainer that went on from the first checkpoint came to. Differences are the largest of any weight."""

    draws: list[tuple[int, ...]]
    difference: float  # at the last step, to the run that was never interrupted
    best_difference: float  # after `load_best_model_at_end`, to that checkpoint's model


@dataclass
class Answer:
    """What a cell found. Differences are the largest of any weight."""

    draws: list[tuple[int, ...]]
    rates: list[float]
    inputs_require_grad: set[bool]
    warnings: list[str]
    moved: float  # between the start and the end
    own_draws: list[tuple[int, ...]]
    own_rates: list[float]
    difference: float
    saved_difference: float
    train_again: str
    resumed: Resumed | None


def compare(cell: Cell, folder: Path) -> Answer:
    args = arguments(folder, cell)
    model = load(folder.parent)
    if cell.checkpointing:
        model.enable_input_require_grads()  # as TRL does for PEFT models; train() then installs this hook once more
    sparse = make_sparse(model, cell)
    look = Look(sparse, model)
    with Listening() as warnings:
        trainer = build_trainer(cell, args, model)
        layerwise(trainer, sparse, guard_every=1)
        trainer.add_callback(look)
        trainer.train()
    weights = full_weights(trainer.model_wrapped)
    trainer.save_model(str(folder / "saved"))
    batches = list(trainer.get_train_dataloader())
    train_again = message_of(trainer.train)
    del trainer, args
    leave_deepspeed()
    resumed = resume(cell, folder, weights) if cell.interrupted else None

    own_weights, own_draws, own_rates = own_loop(cell, batches)
    saved = LlamaForCausalLM.from_pretrained(folder / "saved").requires_grad_(False)
    return Answer(
        draws=look.draws,
        rates=look.rates,
        inputs_require_grad=look.inputs_require_grad,
        warnings=warnings,
        moved=largest_difference(weights, dict(fresh().requires_grad_(False).named_parameters())),
        own_draws=own_draws,
        own_rates=own_rates,
        difference=largest_difference(weights, own_weights),
        saved_difference=largest_difference(weights, dict(saved.named_parameters())),
        train_again=train_again,
        resumed=resumed,
    )


def saved_adapters(folder: Path) -> tuple[set[str], float]:
    """The adapters that `save_model` did not write, and the largest difference of one to the live weights."""
    cell = Cell(steps=4)
    args = arguments(folder, cell)
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(load(folder.parent), settings)
    trainer = build_trainer(cell, args, model)
    layerwise(trainer, prepare(model, selector=Uniform(seed=55, blocks=2, interval=2), substrate="adapter"))
    trainer.train()
    weights = {n.replace(".default", ""): w for n, w in full_weights(trainer.model_wrapped).items() if "lora_" in n}
    trainer.save_model(str(folder / "saved"))
    torch.distributed.barrier()  # rank 0 writes
    trains = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert 0 < sum(parameter.requires_grad for parameter in trains) < len(trains), "as it was before"
    del trainer, args
    leave_deepspeed()
    saved = load_file(folder / "saved" / "adapter_model.safetensors")
    assert saved.keys() <= weights.keys()
    return weights.keys() - saved.keys(), largest_difference(saved, {name: weights[name] for name in saved})


def resume(cell: Cell, folder: Path, expected: dict[str, Tensor]) -> Resumed:
    """In the middle of an interval, and with the best model in the end, which is the one resumed from."""
    model = load(folder.parent)
    sparse = make_sparse(model, cell)
    look = Look(sparse, model)
    trainer = build_trainer(cell, arguments(folder, cell, load_best_model_at_end=True), model)
    layerwise(trainer, sparse, guard_every=1)
    trainer.add_callback(look)
    at_the_end = AtTheEnd(trainer)
    trainer.add_callback(at_the_end)
    first = folder / f"checkpoint-{SAVE_EVERY}"
    trainer.train(resume_from_checkpoint=str(first))
    assert trainer.state.best_model_checkpoint == str(first)
    answer = Resumed(
        draws=look.draws,
        difference=largest_difference(at_the_end.weights, expected),
        best_difference=largest_difference(full_weights(trainer.model_wrapped), load_file(first / "model.safetensors")),
    )
    del trainer
    leave_deepspeed()
    return answer


def leave_deepspeed() -> None:
    """Forget the global state of transformers and accelerate: what is created from here on is whole and plain."""
    gc.collect()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def own_loop(cell: Cell, batches: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], list[Any], list[float]]:
    """The same through `prepare`, `attach` and `trainer.train.train_step`."""
    import deepspeed

    from trainer.model.loss import Objective
    from trainer.run.step import train_step

    model = fresh().train()
    sparse = make_sparse(model, cell)
    optimizer = torch.optim.AdamW(sparse.param_groups(weight_decay=WEIGHT_DECAY), lr=LR, betas=BETAS, eps=EPS)
    config = deepspeed_config(cell) | {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "train_batch_size": MICRO_BATCH * ACCUMULATION * RANKS,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIPPING,
        "bf16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
    }
    scheduler = build_scheduler(cell, optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    sparse.attach(engine, guard_every=1)
    objective = Objective(model)
    draws, rates = [], []
    for step in range(cell.steps):
        rates.append(engine.get_lr()[0])
        train_step(engine, objective, batches[step * ACCUMULATION : (step + 1) * ACCUMULATION])
        draws.append(sparse.active)
    weights = full_weights(engine)
    engine.destroy()
    return weights, draws, rates


def refusals(folder: Path) -> dict[str, str]:
    """What `layerwise` says to each thing that it cannot honour."""
    cell, messages = Cell(), {}

    def ask(
        name: str,
        *,
        prepared: Callable[[PreTrainedModel], Sparse] = lambda model: make_sparse(model, cell),
        model: dict[str, Any] | None = None,
        optimizer: Any = None,
        **changes: Any,
    ) -> None:
        args = arguments(folder, cell, **changes)
        model = model or {"model": load(folder.parent)}
        trainer = Trainer(args=args, eval_dataset=rows(cell), optimizer_cls_and_kwargs=optimizer, **model)
        trainer.model.enable_input_require_grads()  # a hook that `layerwise` removes
        sparse = prepared(trainer.model)
        before = everything_in(trainer)
        messages[name] = message_of(lambda: layerwise(trainer, sparse))
        assert everything_in(trainer) == before, name
        leave_deepspeed()

    ask("no DeepSpeed", deepspeed=None)
    ask("another model", prepared=lambda model: make_sparse(fresh(), cell))
    ask("model_init", model={"model_init": fresh})
    ask("optimizer section", deepspeed=deepspeed_config(cell, optimizer={"type": "AdamW", "params": {"lr": "auto"}}))
    ask("optimizer with parameters", optimizer=(torch.optim.SGD, {"params": []}))
    ask("reentrant", activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})
    ask("nothing for the optimizer", prepared=nothing_for_the_optimizer)
    return messages


def everything_in(trainer: Trainer) -> dict[str, Any]:
    """The attributes of a trainer, and what `layerwise` may change inside them."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return {
        "attributes": {name: id(value) for name, value in vars(trainer).items()},
        "optimizer": trainer.optimizer_cls_and_kwargs,
        "callbacks": list(trainer.callback_handler.callbacks),
        "deepspeed": None if plugin is None else deepcopy(plugin.deepspeed_config),
        "hooks": list(trainer.model.get_input_embeddings()._forward_hooks),
        "parameters": [name for name, _ in trainer.model.named_parameters()],
    }


class EverythingByRule(TopGradientEntries):
    """A rule that gives DeepSpeed's optimizer nothing."""

    def in_optimizer(self, block: Block) -> set[str]:
        return set()


def nothing_for_the_optimizer(model: PreTrainedModel) -> Sparse:
    selector = Uniform(seed=55, blocks=2, interval=2)
    return prepare(model, selector=selector, update=EverythingByRule(k=3), always_on=())


def message_of(action: Any) -> str:
    """The message with which `action` is refused; empty if it is not."""
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


class Look(TrainerCallback):
    """Notes what trained at each step, and whether the first block's input asked for gradients."""

    def __init__(self, sparse: Sparse, model: PreTrainedModel) -> None:
        self.sparse = sparse
        self.draws: list[tuple[int, ...]] = []
        self.rates: list[float] = []
        self.inputs_require_grad: set[bool] = set()
        model.model.layers[0].register_forward_pre_hook(self._before_first_block)

    def _before_first_block(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training:
            self.inputs_require_grad.add(inputs[0].requires_grad)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.draws.append(self.sparse.active)
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


class AtTheEnd(TrainerCallback):
    """Notes the weights after the last step, before the best ones take their workspace."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.weights: dict[str, Tensor] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            self.weights = full_weights(self.trainer.model_wrapped)


class Listening(logging.Handler):
    """Collects this project's warnings."""

    def __enter__(self) -> list[str]:
        self.messages: list[str] = []
        logging.getLogger("trainer").addHandler(self)
        return self.messages

    def __exit__(self, *error: object) -> None:
        logging.getLogger("trainer").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
