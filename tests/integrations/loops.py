"""Settings, models and data that `transformers.Trainer` and our own loop share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from transformers import LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments, get_scheduler

from tests.models import tiny_llama
from trainer import Sparse, prepare
from trainer.data.tokenizer import bytes_tokenizer
from trainer.model.blocks import PARTS
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


class OneCycleTrainer(Trainer):
    """A scheduler of one's own: transformers has no name for this one."""

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = one_cycle(optimizer or self.optimizer, num_training_steps)
        return self.lr_scheduler


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=LR, total_steps=steps, cycle_momentum=False)


def build_scheduler(cell: Cell, optimizer: torch.optim.Optimizer) -> LRScheduler:
    if cell.schedule == "one cycle":
        return one_cycle(optimizer, cell.steps)
    return get_scheduler(cell.schedule, optimizer, 0, cell.steps)


def make_sparse(model: PreTrainedModel, cell: Cell) -> Sparse:
    return prepare(model, selector=Uniform(seed=55, blocks=2, interval=2), bank=cell.bank, always_on=cell.always_on)


def fresh() -> LlamaForCausalLM:
    return tiny_llama(layers=4, vocab=len(bytes_tokenizer()))


def load(folder: Path) -> LlamaForCausalLM:
    """From its folder: under ZeRO-3, once there are `TrainingArguments`, that means partitioned."""
    return LlamaForCausalLM.from_pretrained(folder / "model", attn_implementation="eager", use_cache=False)


def build_trainer(cell: Cell, args: TrainingArguments, model: PreTrainedModel) -> Trainer:
    if cell.sft:
        from trl import SFTTrainer

        data = Dataset.from_list(questions(cell))
        return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=bytes_tokenizer())
    kind = OneCycleTrainer if cell.schedule == "one cycle" else Trainer
    trainer = kind(model=model, args=args, train_dataset=rows(cell), eval_dataset=rows(cell)[:4])
    if cell.interrupted:  # its files are in every checkpoint, and its token ids in the model's configuration
        trainer.processing_class = bytes_tokenizer()
    return trainer


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
