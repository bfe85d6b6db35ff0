"""The training objective: mean cross-entropy over the target tokens of a whole optimizer step."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.data.batches import IGNORED


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over target tokens, fp32.

    `logits` [batch, length, vocabulary] at a position predict `labels` [batch, length] at the next; labels of -100
    are no targets.
    """
    vocabulary = logits.shape[-1]
    return nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, vocabulary).float(),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )
