"""Numbers that follow from the configuration and the size of the run: batch, steps, warm-up."""

import math
from dataclasses import dataclass
from fractions import Fraction

from trainer.config.errors import ConfigError
from trainer.config.schema import RunConfig
from trainer.settings import MOST


@dataclass(frozen=True)
class Batch:
    """Sequences: global_batch_size = ranks x micro_batch_size x accumulation_steps."""

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    ranks: int


def resolve_batch(config: RunConfig, ranks: int) -> Batch:
    """Return how `ranks` data-parallel ranks share the global batch. Raises `ConfigError` if it does not divide."""
    assert ranks >= 1, ranks
    wanted, micro = config.train.global_batch_size, config.train.micro_batch_size
    if wanted % (ranks * micro):
        raise ConfigError([_uneven_batch(wanted, micro, ranks)])
    return Batch(wanted, micro, wanted // (ranks * micro), ranks)


def _uneven_batch(wanted: int, micro: int, ranks: int) -> str:
    unit = ranks * micro
    sizes = [size for size in (wanted // unit * unit, (wanted // unit + 1) * unit) if size]
    advice = f"nearest valid: train.global_batch_size={' or '.join(map(str, sizes))}"
    if wanted % ranks == 0:
        share = wanted // ranks
        fitting = min((size for size in range(1, share + 1) if share % size == 0), key=lambda size: abs(size - micro))
        advice += f", or train.micro_batch_size={fitting}"
    return (
        f"train.global_batch_size: {wanted} is not a multiple of "
        f"{ranks} ranks x train.micro_batch_size {micro} = {unit}; {advice}"
    )


def total_steps(config: RunConfig, num_samples: int) -> int:
    """Return the optimizer steps of the run; epochs are rounded up to whole steps, so that every sample is seen."""
    if config.train.steps is not None:
        return config.train.steps
    if num_samples < 1:
        raise ConfigError([f"data.train: {num_samples} samples left; train.epochs needs at least one"])
    # repr, because 0.14 * 400 as floats is a little more than 56 and would be rounded up to a step too many.
    epochs = Fraction(repr(config.train.epochs))
    steps = math.ceil(epochs * num_samples / config.train.global_batch_size)
    if steps > MOST:
        raise ConfigError(
            [
                f"train.epochs: {config.train.epochs} of {num_samples} samples are {steps:.3g} steps; allowed: up to "
                f"{MOST:,} steps; lower train.epochs"
            ]
        )
    return steps


def warmup_steps(config: RunConfig, num_steps: int) -> int:
    """Return the warm-up steps of a run of `num_steps` steps; a share is rounded up, as transformers does."""
    if config.schedule.warmup_steps is not None:
        if config.schedule.warmup_steps > num_steps:
            raise ConfigError(
                [
                    f"schedule.warmup_steps: {config.schedule.warmup_steps}, but the run has {num_steps} steps; lower "
                    "it, or set schedule.warmup_ratio"
                ]
            )
        return config.schedule.warmup_steps
    return math.ceil(Fraction(repr(config.schedule.warmup_ratio or 0.0)) * num_steps)
