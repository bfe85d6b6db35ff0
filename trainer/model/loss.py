"""The training objective: mean cross-entropy over the target tokens of a whole optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from trainer.data.batches import IGNORED
from trainer.errors import StrataError
from trainer.model.blocks import full_shape
from trainer.model.fused_rows import fuse_new_rows
from trainer.model.new_rows import WithNewRows

# The widest tile of logits of TRL's fused head is [4096 tokens, 32768 entries]: narrower vocabularies gain nothing.
FUSED_FROM_VOCABULARY = 32768
# Relative difference between two losses that are the same; bf16 logits have eight bits of mantissa.
AGREEMENT = 0.02


class LossError(StrataError, ValueError):
    """The objective that was asked for cannot be computed for this model."""


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy summed over target tokens, fp32.

    `logits` [batch, length, vocabulary] at a position predict `labels` [batch, length] at the next; labels of -100
    are no targets.
    """
    # Labels are shifted rather than logits, the largest tensor of a step.
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def add_fused_head(model: PreTrainedModel) -> None:
    """Add TRL's `add_fused_lm_head` to `model`, whatever it calls its backbone (Llama 4) and its number of experts
    (Phi-3.5-MoE, Granite)."""
    from trl.trainer.utils import add_fused_lm_head  # seconds to import

    if model.base_model is model:  # its class names an attribute that it does not have
        embeddings = model.get_input_embeddings()
        model.base_model_prefix = next(
            name for name, child in model.named_children() if any(module is embeddings for module in child.modules())
        )
    config = model.config.get_text_config()
    if not hasattr(config, "num_experts") and hasattr(config, "num_local_experts"):
        # An alias, as the configurations of Mixtral and others have it; aliases are not saved.
        type(config).attribute_map = {**type(config).attribute_map, "num_experts": "num_local_experts"}
    add_fused_lm_head(model)
    fuse_new_rows(model)


class Objective:
    """The loss that a causal language model is trained on.

    With `fused` the output head and the cross-entropy run tile by tile over the vocabulary (TRL's
    `add_fused_lm_head`), forward and backward, so that the logits of a micro-batch never exist as a whole. With
    `router_loss` a mixture of experts is also trained on its load-balancing loss (Switch Transformer,
    https://arxiv.org/abs/2101.03961, eq. 4), at the coefficient in its configuration (`router_aux_loss_coef`).
    In packed rows the router's loss counts the padding at a row's end as well. `deepspeed` is the resolved DeepSpeed
    dictionary; with `fused` and ZeRO-3 it must be given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        fused: bool = False,
        router_loss: bool = True,
        deepspeed: dict[str, Any] | None = None,
    ) -> None:
        config = model.config.get_text_config()
        self.fused = fused
        self._zero3 = None
        # Configurations have the coefficient even if the model has no experts.
        wanted = router_loss and _has_experts(model)
        self.router_coefficient = float(getattr(config, "router_aux_loss_coef", None) or 0.0) if wanted else 0.0
        if fused:
            add_fused_head(model)
            # It asks transformers whether the head must be gathered, and transformers asks for this object.
            stage = deepspeed["zero_optimization"]["stage"] if deepspeed else 0
            self._zero3 = HfDeepSpeedConfig(deepspeed) if stage == 3 else None

    def use_plain(self) -> None:
        """Compute the loss from whole logits from now on."""
        self.fused, self._zero3 = False, None

    def __call__(self, engine: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return (cross-entropy summed over `batch`'s targets, weighted load-balancing loss or None), fp32 scalars.

        `batch` contains `labels` [batch, length] and the model's inputs.
        """
        inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
        balancing = self.router_coefficient > 0 and engine.module.training
        if balancing:
            inputs["output_router_logits"] = True
        if self.fused:
            output = engine(**inputs, labels=batch["labels"], fused_lm_head=True)
            loss = -output.log_probs.sum()
        else:
            output = engine(**inputs)
            loss = summed_loss(output.logits, batch["labels"])
        router_loss = getattr(output, "aux_loss", None) if balancing else None
        return loss, None if router_loss is None else self.router_coefficient * router_loss.float()


def _has_experts(model: PreTrainedModel) -> bool:
    """Return whether `model` has experts: stacked in a parameter of three dimensions, or in a list of modules."""
    return any(len(full_shape(p)) == 3 for p in model.parameters()) or any(
        name.endswith("experts") and isinstance(module, nn.ModuleList) for name, module in model.named_modules()
    )


@dataclass(frozen=True)
class LossChoice:
    """The choice whether head and loss are fused, and its reason."""

    fused: bool
    why: str

    def __str__(self) -> str:
        return f"loss: {'fused with the output head' if self.fused else 'plain'} ({self.why})"


def choose_fused(
    wanted: bool | str, model: PreTrainedModel, find_obstacle: Callable[[], str | None] = lambda: None
) -> LossChoice:
    """Choose whether to fuse head and loss: as `wanted`, or with `auto` for large vocabularies.

    `find_obstacle` returns any other reason against it; it is called only if the loss would be fused. Raises
    `LossError` if it is wanted and impossible, for instance with adapters on the head: the fused one multiplies with
    its weights alone.
    """
    setting = f"train.fused_loss: {str(wanted).lower()}"
    head = model.get_output_embeddings()
    vocabulary = full_shape(head.weight)[0]
    if wanted is False:
        return LossChoice(False, setting)
    if wanted == "auto" and vocabulary < FUSED_FROM_VOCABULARY:
        return LossChoice(
            False, f"{setting}, and the vocabulary of {vocabulary} is smaller than {FUSED_FROM_VOCABULARY}"
        )
    if isinstance(head, BaseTunerLayer | TrainableTokensWrapper):  # `modules_to_save` is a whole head, which is fine
        problem: str | None = (
            f"adapters sit on the output head ({type(head).__module__}), which the fused one would miss"
        )
    elif isinstance(head, WithNewRows) and head.bias is not None:
        problem = "the fused output head cannot train the rows of new tokens alone if it has a bias"
    else:
        problem = find_obstacle()
    if problem is None:
        return LossChoice(True, setting)
    if wanted is True:
        raise LossError(f"{setting}, but {problem}; set train.fused_loss=false")
    return LossChoice(False, f"{setting}, but {problem}")


@torch.no_grad()
def check_fused(engine: Any, objective: Objective) -> None:
    """Compare the fused loss with the plain one on a few tokens. Collective.

    Architectures scale, cap or rescale their logits in ways that a fused head must know of. Raises `LossError`.
    """
    ids = _some_tokens(engine).view(2, 16)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    try:
        _, router_loss = objective(engine, batch)  # in training mode
        if router_loss is not None:
            own = engine(input_ids=ids, output_router_logits=True)
            if getattr(own, "aux_loss", None) is None:  # the fused head has one, even where the model has none
                objective.router_coefficient = 0.0
        with _evaluating(engine):
            fused, _ = objective(engine, batch)
            plain = summed_loss(engine(input_ids=ids).logits, ids)
    except (AttributeError, TypeError) as error:
        raise LossError(
            f"train.fused_loss: the fused head does not fit {type(engine.module).__name__} ({error}); set "
            "train.fused_loss=false"
        ) from error
    differs = (~torch.isclose(fused, plain, rtol=AGREEMENT)).float()
    if torch.distributed.is_initialized():  # one verdict: ranks must compute the same loss
        torch.distributed.all_reduce(differs, op=torch.distributed.ReduceOp.MAX)
    if differs:
        raise LossError(
            f"train.fused_loss: the fused loss is {fused:.4f}, but this model's logits give {plain:.4f}: "
            f"{type(engine.module).__name__} changes its logits in a way that the fused head does not know; "
            "set train.fused_loss=false"
        )


def _some_tokens(engine: Any) -> Tensor:
    """Return 32 token ids, all different in vocabularies that have as many."""
    return torch.arange(32, device=engine.device) * 7919 % engine.module.config.get_text_config().vocab_size


@contextmanager
def _evaluating(engine: Any) -> Iterator[None]:
    was_training = engine.module.training
    engine.eval()
    try:
        yield
    finally:
        engine.train(was_training)
