"""The training objective: mean cross-entropy over the target tokens of a whole optimizer step."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.data.batches import IGNORED


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over target tokens, fp32.

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
