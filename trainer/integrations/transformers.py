"""Layer-wise training inside `transformers.Trainer` and its subclasses, such as TRL's `SFTTrainer`.

    trainer = SFTTrainer(model=model, args=args, train_dataset=rows)  # args.deepspeed names the configuration
    layerwise(trainer, prepare(trainer.model, selector=Uniform(seed=0, blocks=2, interval=20)))
    trainer.train()

Read in transformers 5.23, accelerate 1.15 and TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.engine.attach import Sparse

# Settings by which an optimizer of `args.optim` chooses its parameters itself (GaLore, LOMO).
_OWN_PARAMETERS = {"params", "model", "optimizer_dict"}


def layerwise(trainer: Trainer, sparse: Sparse, **attach: Any) -> None:
    """Let `trainer` train its model a few blocks at a time; `sparse` is what `prepare` made of that model.

    Call it once, after the trainer is built and before `train()`. Optimizer, schedule, clipping and accumulation stay
    those of `trainer.args`; DeepSpeed sees the first active set only. `attach` are keyword arguments of `Sparse.attach`
    (`guard_every`, and `probe_batches` and `loss_function` for selectors that measure).

    Raises `ValueError`, and leaves the trainer as it was, for arguments that layer-wise training cannot honour.
    `train()` itself raises `RuntimeError` when it is called again.

    Checkpoints are Strata's, by way of `engine.save_checkpoint`, inside `args.output_dir/checkpoint-N`:
    `resume_from_checkpoint` (on any number of ranks, under any ZeRO stage) and `load_best_model_at_end` work as ever.
    """
    _check(trainer, sparse)
    # transformers ignores `optimizers=` under DeepSpeed; what stands here it does use, parameters included.
    args = trainer.args
    optimizer, settings = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    if own := _OWN_PARAMETERS & settings.keys():
        raise ValueError(
            f"args.optim ('{args.optim}') or optimizer_cls_and_kwargs sets {', '.join(sorted(own))}, but which "
            "parameters train is chosen here: use an optimizer that takes any, for instance args.optim='adamw_torch'"
        )
    groups = sparse.param_groups(weight_decay=args.weight_decay)
    trainer.optimizer_cls_and_kwargs = (optimizer, {**settings, "params": groups})
    # Activation checkpointing comes with a hook by which embeddings require gradients, and backward would always run
    # down to the first block. PEFT and TRL install it early, `train()` again, and then the first is out of reach.
    trainer.model.disable_input_require_grads()
    trainer.add_callback(LayerwiseCallback(trainer, sparse, attach))


class LayerwiseCallback(TrainerCallback):
    """Attaches `sparse` to the DeepSpeed engine that `trainer` builds when training begins; see `layerwise`."""

    def __init__(self, trainer: Trainer, sparse: Sparse, attach: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self.sparse = sparse
        self._attach = attach
        self._attached = False
        # Called when the engine is there, and before a checkpoint is loaded into it.
        self._create_scheduler = trainer.create_scheduler
        trainer.create_scheduler = self.create_scheduler  # type: ignore[method-assign]

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """`trainer.create_scheduler`, and attaches."""
        scheduler = self._create_scheduler(*args, **kwargs)
        wrapper = self.trainer.accelerator.deepspeed_engine_wrapped
        if wrapper is not None and not self._attached:
            self._attached = True
            self.sparse.attach(wrapper.engine, **self._attach)
        return scheduler

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.accelerator.deepspeed_engine_wrapped is None:
            raise RuntimeError(
                "this Trainer has no DeepSpeed engine any more: transformers destroys it when train() follows an "
                "earlier train() or evaluate(). Build a new Trainer and prepare its model; to evaluate first, set "
                "args.eval_on_start"
            )
        self.trainer.model.disable_input_require_grads()


def _check(trainer: Trainer, sparse: Sparse) -> None:
    args = trainer.args
    if not trainer.is_deepspeed_enabled:
        raise ValueError(
            f"args.deepspeed: {args.deepspeed!r}, but blocks are switched in a DeepSpeed engine: name a DeepSpeed "
            "configuration with zero_optimization.stage 1, 2 or 3"
        )
    held = {id(parameter) for parameter in trainer.model.parameters()}
    if trainer.model_init is not None or not held.issuperset(map(id, sparse.trainable_parameters())):
        raise ValueError(
            "the model that was prepared is not the one that the Trainer trains: give the Trainer a model (model_init "
            "builds another) and call layerwise(trainer, prepare(trainer.model, ...))"
        )
    if "optimizer" in trainer.accelerator.state.deepspeed_plugin.deepspeed_config:
        raise ValueError(
            "args.deepspeed: its 'optimizer' section puts everything into one group, but switching needs groups for "
            "each block: remove the section; args.optim, learning_rate, adam_* and weight_decay then say the same"
        )
    if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "args.activation_checkpointing_kwargs: use_reentrant=True gives no gradients to a block whose input needs "
            "none: set it to False"
        )
