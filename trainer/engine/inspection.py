"""Run the model of an engine outside training, and leave no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed.accelerator import get_accelerator

from trainer.engine.zero.registration import Registration


@contextmanager
def unobserved(registration: Registration) -> Iterator[None]:
    """Restore afterwards what forwards change: random number generators, the modules' training modes, and the order
    in which ZeRO-3 prefetches."""
    modes = [(child, child.training) for child in registration.engine.module.modules()]
    order = registration.fetch_order()
    accelerator = get_accelerator()
    devices = [] if accelerator.device_name() == "cpu" else [accelerator.current_device()]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for child, training in modes:
                child.training = training
            if registration.fetch_order() != order:  # for instance, a blend fetches some modules twice
                registration.expect_fetch_order(order)


@contextmanager
def inspecting(registration: Registration) -> Iterator[None]:
    """Restore what `unobserved` does, and let a backward reduce no gradients and leave nothing in DeepSpeed's records.

    All ranks draw the same random numbers inside: a model that skips layers at random must skip the same ones.
    """
    with unobserved(registration), registration.inspection():
        torch.manual_seed(0)
        yield
