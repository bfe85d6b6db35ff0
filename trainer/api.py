"""Prepare the model of your own training loop and attach it to its DeepSpeed engine.

sparse = trainer.prepare(model, selector=Uniform(blocks=2, interval=20))
engine, *_ = deepspeed.initialize(model=model, optimizer=AdamW(sparse.param_groups(...)), config=...)
sparse.attach(engine)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from trainer.checkpoint import engine_calls
from trainer.engine import banks
from trainer.engine.banks import Bank
from trainer.engine.sparse import Sparse
from trainer.model.blocks import PARTS
from trainer.selectors import Selector
from trainer.updates import Dense, UpdateRule


def prepare(
    model: nn.Module,
    *,
    selector: Selector,
    update: UpdateRule | None = None,
    bank: Bank | str = "discard",
    always_on: Iterable[str] | None = None,
    substrate: Literal["full", "adapter"] = "full",
    blocks: str | None = None,
) -> Sparse:
    """Freeze `model` to the first active set, so that DeepSpeed allocates optimizer state for it only.

    Call it before `deepspeed.initialize`. `always_on` names the parts outside the blocks that train in every interval
    (`embeddings`, `head`, `norm`). The default is all of them; with adapters, what requires gradients there, such as
    PEFT's `modules_to_save`. `blocks` is the module path of the block list if it is ambiguous.

    Raises `trainer.model.blocks.BlockError` if the model's structure does not allow the choice, and `ValueError` from
    the selector, for instance for more blocks than there are, or for adapters that `substrate` does not expect.
    """
    return Sparse(
        model,
        selector=selector,
        update=update or Dense(),
        bank=banks.build(bank) if isinstance(bank, str) else bank,
        always_on=PARTS if always_on is None and substrate == "full" else always_on,
        substrate=substrate,
        blocks=blocks,
        on_attach=engine_calls.install,
    )
