"""`transformers.Trainer` and TRL's `SFTTrainer`, on real ranks, against our own loop on the same batches."""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests import distributed
from tests.engine.parity import full_weights, largest_difference
from tests.models import tiny_llama
from trainer import Sparse, prepare
from trainer.blocks import PARTS
from trainer.data.tokenizer import bytes_tokenizer
from trainer.integrations.transformers import layerwise
from trainer.selectors import Uniform

RANKS, ACCUMULATION, MICRO_BATCH, LENGTH = 2, 2, 2, 16
SAVE_EVERY = 5
LR, BETAS, EPS, WEIGHT_DECAY, CLIPPING = 3e-3, (0.9, 0.95), 1e-3, 0.1, 0.5


@dataclass(frozen=True)
class Cell:
    """One run under test."""

    stage: int = 3
    steps: int = 6
    schedule: str = "cosine"
    always_on: tuple[str, ...] = PARTS
    bank: str = "discard"
    checkpointing: bool = False
    sft: bool = False
    interrupted: bool = False  # evaluates and writes checkpoints on the way


CELLS = {
    "Trainer": Cell(steps=8, interrupted=True),
    "Trainer, ZeRO-2": Cell(stage=2, bank="cpu"),
    "OneCycleLR": Cell(schedule="one cycle", always_on=("head",), checkpointing=True),
    "SFTTrainer": Cell(sft=True),
}


# --- what runs in each rank ------------------------------------------------------------------------------------


def run_everything(rank: int, folder: str) -> dict[str, Any]:
    answers: dict[str, Any] = {name: compare(cell, Path(folder) / name) for name, cell in CELLS.items()}
    answers["refusals"] = refusals(Path(folder) / "refusals")
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
    sparse = prepare_model(model, cell)
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


def resume(cell: Cell, folder: Path, expected: dict[str, Tensor]) -> Resumed:
    """In the middle of an interval, and with the best model in the end, which is the one resumed from."""
    model = load(folder.parent)
    sparse = prepare_model(model, cell)
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

    from trainer.loss import Objective
    from trainer.step import train_step

    model = fresh().train()
    sparse = prepare_model(model, cell)
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
        prepared: PreTrainedModel | None = None,
        model: dict[str, Any] | None = None,
        optimizer: Any = None,
        **changes: Any,
    ) -> None:
        args = arguments(folder, cell, **changes)
        model = model or {"model": load(folder.parent)}
        trainer = Trainer(args=args, eval_dataset=rows(cell), optimizer_cls_and_kwargs=optimizer, **model)
        callbacks = list(trainer.callback_handler.callbacks)
        messages[name] = message_of(lambda: layerwise(trainer, prepare_model(prepared or trainer.model, cell)))
        assert trainer.callback_handler.callbacks == callbacks
        assert trainer.optimizer_cls_and_kwargs == optimizer
        leave_deepspeed()

    ask("no DeepSpeed", deepspeed=None)
    ask("another model", prepared=fresh())
    ask("model_init", model={"model_init": fresh})
    ask("optimizer section", deepspeed=deepspeed_config(cell, optimizer={"type": "AdamW", "params": {"lr": "auto"}}))
    ask("optimizer with parameters", optimizer=(torch.optim.SGD, {"params": []}))
    ask("reentrant", activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})
    return messages


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
    """Notes the weights after the last step, before the best ones take their place."""

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


class OneCycleTrainer(Trainer):
    """A scheduler of one's own: transformers has no name for this one."""

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = one_cycle(optimizer or self.optimizer, num_training_steps)
        return self.lr_scheduler


# --- what both loops share -------------------------------------------------------------------------------------


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=LR, total_steps=steps, cycle_momentum=False)


def build_scheduler(cell: Cell, optimizer: torch.optim.Optimizer) -> LRScheduler:
    if cell.schedule == "one cycle":
        return one_cycle(optimizer, cell.steps)
    return get_scheduler(cell.schedule, optimizer, 0, cell.steps)


def prepare_model(model: PreTrainedModel, cell: Cell) -> Sparse:
    return prepare(model, selector=Uniform(seed=7, blocks=2, interval=2), bank=cell.bank, always_on=cell.always_on)


def fresh() -> LlamaForCausalLM:
    return tiny_llama(vocab=len(bytes_tokenizer()))


def load(folder: Path) -> LlamaForCausalLM:
    """From its folder: under ZeRO-3, once there are `TrainingArguments`, that means partitioned."""
    return LlamaForCausalLM.from_pretrained(folder / "model", attn_implementation="eager", use_cache=False)


def build_trainer(cell: Cell, args: TrainingArguments, model: PreTrainedModel) -> Trainer:
    if cell.sft:
        from trl import SFTTrainer

        data = Dataset.from_list(questions(cell))
        return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=bytes_tokenizer())
    kind = OneCycleTrainer if cell.schedule == "one cycle" else Trainer
    return kind(model=model, args=args, train_dataset=rows(cell), eval_dataset=rows(cell)[:4])


def arguments(folder: Path, cell: Cell, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "deepspeed": deepspeed_config(cell),
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": cell.steps,
        "learning_rate": LR,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": CLIPPING,
        "lr_scheduler_type": "cosine",
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "steps" if cell.interrupted else "no",
        "save_steps": SAVE_EVERY,
        "eval_strategy": "steps" if cell.interrupted else "no",
        "eval_steps": SAVE_EVERY,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # that the best is not the last
        "disable_tqdm": True,
        "log_level": "error",
        "bf16": False,
    }
    if cell.sft:
        from trl import SFTConfig

        return SFTConfig(**settings | {"max_length": 64} | more)
    return TrainingArguments(**settings | {"activation_checkpointing": cell.checkpointing} | more)


def deepspeed_config(cell: Cell, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": cell.stage,
            "overlap_comm": False,
            "reduce_bucket_size": 20_000,
            "allgather_bucket_size": 20_000,
            "stage3_max_live_parameters": 10_000,
            "stage3_max_reuse_distance": 10_000,
            "stage3_prefetch_bucket_size": 10_000,
            "stage3_param_persistence_threshold": 100,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "steps_per_print": 10**9,
    } | more


def rows(cell: Cell) -> list[dict[str, list[int]]]:
    """Tokens with prompts of different lengths masked, so that micro-batches differ in target tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(256, (cell.steps * ACCUMULATION * MICRO_BATCH * RANKS, LENGTH), generator=generator).tolist()
    return [
        {"input_ids": row, "attention_mask": [1] * LENGTH, "labels": [-100] * (3 * i % 11) + row[3 * i % 11 :]}
        for i, row in enumerate(ids)
    ]


def questions(cell: Cell) -> list[dict[str, str]]:
    return [
        {"prompt": f"{i} plus {7 * i}?", "completion": " " + "x" * (i % 5) + str(8 * i)}
        for i in range(cell.steps * ACCUMULATION * MICRO_BATCH * RANKS)
    ]


# --- tests -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("transformers")
    fresh().save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        return distributed.run(run_everything, str(folder), ranks=RANKS, deadline=400)[0]


@pytest.mark.parametrize("name", CELLS)
def test_draws_and_weights_are_those_of_our_loop(answers: dict[str, Any], name: str) -> None:
    answer = answers[name]
    assert answer.draws == answer.own_draws
    assert len(set(answer.draws)) > 2
    assert answer.rates == pytest.approx(answer.own_rates)
    assert answer.moved > 1e-3
    assert answer.difference <= 1e-6


@pytest.mark.parametrize("name", CELLS)
def test_deepspeed_sees_only_the_first_active_set(answers: dict[str, Any], name: str) -> None:
    assert not [warning for warning in answers[name].warnings if "shrunk" in warning]


@pytest.mark.parametrize("name", CELLS)
def test_save_model_writes_every_weight(answers: dict[str, Any], name: str) -> None:
    assert answers[name].saved_difference == 0


def test_a_checkpoint_is_gone_on_from_bit_for_bit(answers: dict[str, Any]) -> None:
    answer = answers["Trainer"]
    assert answer.resumed.draws == answer.draws[SAVE_EVERY:]
    assert answer.resumed.difference == 0
    assert answer.resumed.best_difference == 0


def test_activation_checkpointing_stops_at_the_lowest_active_block(answers: dict[str, Any]) -> None:
    assert answers["OneCycleLR"].inputs_require_grad == {False}  # its embeddings are frozen
    assert answers["Trainer"].inputs_require_grad == {True}


@pytest.mark.parametrize("name", CELLS)
def test_training_again_is_refused(answers: dict[str, Any], name: str) -> None:
    assert "Build a new Trainer" in answers[name].train_again


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no DeepSpeed", "args.deepspeed: None"),
        ("another model", "not the one that the Trainer trains"),
        ("model_init", "model_init builds another"),
        ("optimizer section", "remove the section"),
        ("optimizer with parameters", "sets params"),
        ("reentrant", "use_reentrant=True"),
    ],
)
def test_what_cannot_be_honoured_is_refused(answers: dict[str, Any], name: str, words: str) -> None:
    assert words in answers["refusals"][name]
