"""Find the exact k largest of scores on several ranks; each rank sends k of its own.

Equal scores are ordered by position, so that exactly k are chosen and every rank chooses the same ones.
"""

from __future__ import annotations

import torch
from deepspeed import comm as dist
from torch import Tensor

# Below every score: scores are not negative.
NOT_A_CANDIDATE = -1.0


def best(scores: Tensor, k: int) -> Tensor:
    """Return the indices (int64, ascending) of the `k` largest of `scores` [n], all if there are fewer than k. Of equal
    scores at the limit, those with the lowest indices are chosen."""
    if k >= scores.numel():
        return torch.arange(scores.numel(), device=scores.device)
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    limit = scores.topk(k, sorted=False).values.min()
    above = (scores > limit).nonzero().view(-1)
    equal = (scores == limit).nonzero().view(-1)[: k - above.numel()]
    return torch.cat([above, equal]).sort().values


def best_of_all(scores: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (scores, positions) of the `k` best on all ranks, by ascending position, equal on all ranks. Collective.

    `scores` (fp32) and `positions` (int64), both [at most k], are this rank's best; a position is on one rank only.
    Each rank sends 12 k bytes and receives 12 k from every other; less if no rank has k.
    """
    ranks = dist.get_world_size()
    most = torch.tensor(scores.numel(), device=scores.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    k_sent = min(k, int(most))
    mine_scores = scores.new_full((k_sent,), NOT_A_CANDIDATE)
    mine_positions = positions.new_zeros(k_sent)
    mine_scores[: scores.numel()] = scores
    mine_positions[: positions.numel()] = positions
    all_scores, all_positions = mine_scores.new_empty(k_sent * ranks), mine_positions.new_empty(k_sent * ranks)
    dist.all_gather_into_tensor(all_scores, mine_scores)
    dist.all_gather_into_tensor(all_positions, mine_positions)
    real = all_scores >= 0
    all_scores, all_positions = all_scores[real], all_positions[real]
    by_position = all_positions.argsort()
    all_scores, all_positions = all_scores[by_position], all_positions[by_position]
    chosen = best(all_scores, k)
    return all_scores[chosen], all_positions[chosen]
