"""Train layer-wise inside `transformers.Trainer` and its subclasses, such as TRL's `SFTTrainer`.

    trainer = SFTTrainer(model=model, args=args, train_dataset=rows)  # args.deepspeed names the configuration
    layerwise(trainer, prepare(trainer.model, selector=Uniform(seed=0, blocks=2, interval=20)))
    trainer.train()

This relies on the source of transformers 5.23, accelerate 1.15 and TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.checkpoint.contents import parameters_by_unit
from trainer.engine.sparse import Sparse

# Settings by which an optimizer of `args.optim` chooses its parameters itself (GaLore, LOMO).
_OWN_PARAMETERS = {"params", "model", "optimizer_dict"}


def layerwise(trainer: Trainer, sparse: Sparse, **attach: Any) -> None:
    """Let `trainer` train its model a few blocks at a time; `sparse` is what `prepare` returned for that model.

    Call it once, after the trainer is built and before `train()`. Optimizer, schedule, clipping and accumulation stay
    those of `trainer.args`; DeepSpeed sees the first active set only. `attach` are keyword arguments of `Sparse.attach`
    (`guard_every`, and `probe_batches` and `loss_function` for selectors that measure). An optimizer whose state cannot
    be saved, such as `adamw_8bit`, requires `args.save_strategy="no"`.

    Raises `ValueError`, and leaves the trainer as it was, for arguments that layer-wise training does not support.
    `train()` itself raises `RuntimeError` when it is called again.

    `engine.save_checkpoint` writes Strata's checkpoints into `args.output_dir/checkpoint-N`. `resume_from_checkpoint`
    (on any number of ranks, under any ZeRO stage) and `load_best_model_at_end` work as usual. `save_model()` writes all
    weights, which ZeRO-3 gathers on rank 0, and the adapters of all blocks; `python -m trainer export checkpoint-N OUT
    --base PATH` writes a model without loading all of it into memory.
    """
    _check(trainer, sparse)
    # transformers ignores `optimizers=` under DeepSpeed, but uses `optimizer_cls_and_kwargs`, parameters included.
    args = trainer.args
    optimizer, settings = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    if own := _OWN_PARAMETERS & settings.keys():
        raise ValueError(
            f"args.optim ('{args.optim}') or optimizer_cls_and_kwargs sets {', '.join(sorted(own))}, but "
            "layer-wise training chooses the parameters: use an optimizer that accepts any, such as "
            "args.optim='adamw_torch'"
        )
    groups = sparse.param_groups(weight_decay=args.weight_decay)
    # Nothing below is refused, and nothing above changes the trainer.
    zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if zero.get("stage") == 3:
        # Without it transformers writes no weights, and advises a script for DeepSpeed's own checkpoints.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    trainer.optimizer_cls_and_kwargs = (optimizer, {**settings, "params": groups})
    # Activation checkpointing adds a hook that makes embeddings require gradients, so that backward always runs down to
    # the first block. PEFT and TRL install it early; once `train()` installs it again, the first can't be removed.
    trainer.model.disable_input_require_grads()
    attach = {"saves": args.save_strategy != "no" and not args.save_only_model, **attach}
    trainer.add_callback(LayerwiseCallback(trainer, sparse, attach))


class LayerwiseCallback(TrainerCallback):
    """Attach `sparse` to the DeepSpeed engine that `trainer` builds when training begins; see `layerwise`."""

    def __init__(self, trainer: Trainer, sparse: Sparse, attach: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self.sparse = sparse
        self._attach = attach
        self._attached = False
        # Called after the engine is built, and before a checkpoint is loaded into it.
        self._create_scheduler = trainer.create_scheduler
        trainer.create_scheduler = self.create_scheduler
        self._save_model = trainer.save_model
        trainer.save_model = self.save_model

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Call `trainer.create_scheduler`, and attach to the engine."""
        scheduler = self._create_scheduler(*args, **kwargs)
        wrapper = self.trainer.accelerator.deepspeed_engine_wrapped
        if wrapper is not None and not self._attached:
            self._attached = True
            self.sparse.attach(wrapper.engine, **self._attach)
        return scheduler

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Call `trainer.save_model` for everything that may train: under ZeRO-3, transformers would leave out adapters
        that are currently frozen."""
        frozen = [p for unit in parameters_by_unit(self.sparse).values() for p in unit.values() if not p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            self._save_model(*args, **kwargs)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.accelerator.deepspeed_engine_wrapped is None:
            raise RuntimeError(
                "this Trainer no longer has a DeepSpeed engine: transformers destroys it when train() follows an "
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
    own = {id(parameter) for parameter in trainer.model.parameters()}
    if trainer.model_init is not None or not own.issuperset(map(id, sparse.trainable_parameters())):
        raise ValueError(
            "the model that was prepared is not the one that the Trainer trains: give the Trainer a model (model_init "
            "builds another) and call layerwise(trainer, prepare(trainer.model, ...))"
        )
    if "optimizer" in trainer.accelerator.state.deepspeed_plugin.deepspeed_config:
        raise ValueError(
            "args.deepspeed: its 'optimizer' section puts everything into one group, but switching needs groups for "
            "each block: remove the section; args.optim, learning_rate, adam_* and weight_decay set the same"
        )
    if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "args.activation_checkpointing_kwargs: use_reentrant=True gives no gradients to a block whose input needs "
            "none: set it to False"
        )
