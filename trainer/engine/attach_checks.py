"""Check an engine before it is taken over."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from deepspeed import DeepSpeedEngine

from trainer.engine.probe import LossFunction
from trainer.engine.zero.registration import Registration
from trainer.selectors import Selector
from trainer.updates import UpdateRule

logger = logging.getLogger(__name__)


def refuse_unfit_engine(engine: DeepSpeedEngine, update: UpdateRule, *, sparse_rule: bool) -> None:
    """Raise `ValueError` or `RegistrationError` if DeepSpeed would do something to gradients that `update` cannot see.

    `sparse_rule`: the rule trains parameters outside DeepSpeed's optimizer.
    """
    name = type(update).__name__
    if sparse_rule and engine.gradient_clipping() != update.gradient_clipping:
        raise ValueError(
            f"gradient_clipping is {engine.gradient_clipping()}, but {name} keeps gradients that DeepSpeed's norm does "
            f"not see: set gradient_clipping to {update.gradient_clipping}, which is the rule's"
        )
    if sparse_rule and engine.fp16_enabled():
        raise ValueError(f"fp16 gradients are scaled, which {name} does not see: use bf16")


def refuse_unfit_probes(
    selector: Selector, probe_batches: Iterator[Any] | None, loss_function: LossFunction | None
) -> None:
    """Raise `ValueError` for only one of `probe_batches` and `loss_function`, or for none if `selector` measures."""
    if (probe_batches is None) != (loss_function is None):
        raise ValueError("attach() got one of probe_batches and loss_function: it takes both or neither")
    if selector.measures and probe_batches is None:
        raise cannot_measure(selector)


def cannot_measure(selector: Selector) -> ValueError:
    """Return the error for a selector that wants a measurement without batches to make it on."""
    return ValueError(f"{type(selector).__name__} measures: give attach() probe_batches and loss_function")


def check_registration(registration: Registration, *, saves: bool, banks: bool, trained: int) -> None:
    """Raise `RegistrationError` if checkpoints (`saves`) or `banks` cannot store the optimizer's state; warn if the
    engine was built with more than the `trained` weights."""
    if saves:
        registration.check_state("checkpoints")
    if banks:
        registration.check_state("banks")
    if registration.rebuilt:
        logger.warning(
            "the engine was built with other trainable parameters than the first active set and has been shrunk. "
            "Call trainer.prepare before deepspeed.initialize to avoid that peak: master weights and gradients of %d "
            "parameters instead of %d",
            registration.numel_before,
            trained,
        )
