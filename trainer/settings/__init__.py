"""The base of all settings: `Section`, and the numbers and texts that its keys accept. Imports no torch."""

from importlib import import_module
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# The largest count of anything.
MOST = 10**12


def _within_reason(value: float) -> float:
    """Refuse numbers so large or so small that products of them would overflow."""
    most, least = (MOST, 0.0) if isinstance(value, int) else (1e30, 1e-30)
    if value > most or 0 < value < least:
        allowed = f"{least:g} to {most:g}" if least else f"up to {most:,}"
        raise ValueError(f"got {value!r:.200}; allowed: {allowed}")
    return value


Count = Annotated[int, Field(ge=1), AfterValidator(_within_reason)]
CountOrZero = Annotated[int, Field(ge=0), AfterValidator(_within_reason)]
Positive = Annotated[float, Field(gt=0), AfterValidator(_within_reason)]
PositiveOrZero = Annotated[float, Field(ge=0), AfterValidator(_within_reason)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A group of keys. Values keep their YAML type (no `"5"` for 5), unknown keys are errors, fields are immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


def implementation(named: str) -> Any:
    """Import and return the class that `named` gives as "module:Class".

    Settings name their implementation in this way, so that reading a configuration imports neither torch nor DeepSpeed.
    """
    module, _, name = named.partition(":")
    return getattr(import_module(module), name)
