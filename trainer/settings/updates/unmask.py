"""Settings of `trainer/updates/unmask.py`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from trainer.settings import Count, PositiveOrZero
from trainer.settings.banks import REGISTRY as BANKS
from trainer.settings.nested import get, number
from trainer.settings.updates.base import UpdateSettings


class UnmaskSettings(UpdateSettings):
    """Train a growing set of single weights with Adam (ID3, arXiv 2408.14470)."""

    implementation: ClassVar[str] = "trainer.updates.unmask:Unmask"
    own_state: ClassVar[bool] = True
    clips: ClassVar[bool] = True

    name: Literal["unmask"] = Field(
        "unmask",
        description="Train single weights, unmasked step by step up to a budget (ID3), in active blocks and always-on "
        "parts. All other weights stay unchanged.",
    )
    budget: Count = Field(100_000, description="Total number of weights to unmask, over all tensors.")
    exp: PositiveOrZero = Field(
        0.0, description="Exponent in the score |gradient| / (eps + |weight|)^exp; a higher one prefers small weights."
    )
    eps: PositiveOrZero = Field(1e-3, description="Added to |weight| in the score, so that the score is finite.")
    growth_steps: Count | None = Field(
        None, description="Optimizer steps over which the mask grows, in equal increments; null: all steps of the run."
    )
    bias_correction: Literal["global", "local"] = Field(
        "global",
        description="From when Adam's bias correction counts the steps of a weight. global: the start of the run, as "
        "in the paper; local: when the weight is unmasked.",
    )

    @classmethod
    def problems(cls, values: Mapping[str, Any]) -> list[str]:
        problems = []
        on_device = [name for name, bank in BANKS.items() if bank.place != "host"]
        for path, allowed in (("optimizer.name", ["adamw", "adam"]), ("bank.name", on_device)):
            value = get(values, path)
            if value is not None and value not in allowed:
                problems.append(
                    f"{path}: {value}, but the state of update.name=unmask is small and stays on the device; "
                    f"allowed: {', '.join(allowed)}"
                )
        rate = get(values, "optimizer.lr_always_on")
        if rate is not None:
            problems.append(
                f"optimizer.lr_always_on: {rate}, but update.name=unmask trains all weights as one set; set it to null"
            )
        if "new_rows" in (get(values, "always_on.embeddings"), get(values, "always_on.head")):
            problems.append(
                "always_on: new_rows, but update.name=unmask itself chooses the weights that train, in all parts; set "
                "always_on.embeddings and always_on.head to true or false"
            )
        steps, total = number(values, "update.growth_steps"), number(values, "train.steps")
        if steps and total and steps > total:
            problems.append(
                f"update.growth_steps: {steps} is more than train.steps {total}, so the budget would not be reached; "
                "set null, or a smaller number"
            )
        return problems
