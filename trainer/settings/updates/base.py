"""The base of the settings of all update rules."""

from collections.abc import Mapping
from typing import Any, ClassVar

from trainer.settings import Section


class UpdateSettings(Section):
    """Settings of an update rule. The fields are the keys below `update`; `name` chooses the rule."""

    # The class in `trainer/updates`, as "module:Class".
    implementation: ClassVar[str]
    # Whether the rule trains some weights outside DeepSpeed's optimizer. Then their gradients must not be scaled
    # (fp16), and DeepSpeed cannot offload their state.
    own_state: ClassVar[bool] = False
    # Whether such a rule applies train.gradient_clipping. Otherwise that must be 0.
    clips: ClassVar[bool] = False

    name: str = ""

    @classmethod
    def problems(cls, values: Mapping[str, Any]) -> list[str]:
        """Return what contradicts this rule in a run configuration, given as nested mappings with every section
        present (`trainer.config.methods.expand_method`)."""
        return []
