"""The analytic communication volume of a step under each ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Volume:
    """Bytes of the messages of one optimizer step on one rank, by collective: outputs of all-gathers, inputs of
    reduce-scatters and all-reduces. `within_machine`: outputs of gathers inside one node (hpZ)."""

    all_gather: int
    reduce_scatter: int
    all_reduce: int
    within_machine: int = 0

    def sent(self, ranks: int) -> float:
        """Return the bytes that a rank sends with ring algorithms (Thakur et al. 2005), without `within_machine`:
        (n - 1) / n of what is gathered or scattered, twice that of what is all-reduced."""
        return (self.all_gather + self.reduce_scatter + 2 * self.all_reduce) * (ranks - 1) / ranks


def step_volume(
    *,
    stage: int,
    ranks: int,
    weight_bytes: int,
    gradient_bytes: int,
    trained: int,
    forward: int,
    backward: int,
    micro_batches: int = 1,
    machine_copies: bool = False,
) -> Volume:
    """Return the volume of one optimizer step of `micro_batches` forwards and backwards.

    `trained`: elements that train; under stage 3 `forward` and `backward` are the elements that either pass gathers:
    all partitioned weights, and those down to the lowest trainable parameter.

    Stages 1 and 2 of DeepSpeed 0.19.8 all-reduce each bucket of gradients and gather the updated weights (stage 1 once
    per step, stage 2 for each micro-batch, where ZeRO's paper, arXiv 1910.02054 section 7, has a reduce-scatter);
    stage 3 gathers weights for forward and again for backward, and reduce-scatters gradients. With hpZ's
    `machine_copies` (arXiv 2306.10209, section 3.2) what trains is gathered from all ranks once after each step, and
    everything else inside a node: frozen weights never leave it.
    """
    if ranks == 1:
        return Volume(0, 0, 0)
    gradients = gradient_bytes * trained
    if stage == 0:
        return Volume(0, 0, gradients)
    if stage == 1:
        return Volume(weight_bytes * trained, 0, gradients)
    if stage == 2:
        return Volume(weight_bytes * trained, 0, gradients * micro_batches)
    gathered = weight_bytes * (forward + backward) * micro_batches
    if machine_copies:
        between = weight_bytes * trained
        return Volume(between, gradients * micro_batches, 0, within_machine=gathered - between)
    return Volume(gathered, gradients * micro_batches, 0)
