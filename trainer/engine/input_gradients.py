"""Let backward end at the lowest block that trains."""

from __future__ import annotations

from transformers import PreTrainedModel


def let_backward_end(model: PreTrainedModel) -> None:
    """Remove the hook that makes embeddings require gradients: with it, backward would run down to the first block.

    transformers and PEFT install it with activation checkpointing, because reentrant checkpoints need it; those must
    keep it.
    """
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    settings = [getattr(function, "keywords", {}) for function in functions if function is not None]
    if settings and not any(keywords.get("use_reentrant", True) for keywords in settings):
        model.disable_input_require_grads()
