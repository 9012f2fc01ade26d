"""Brings the memories of all training processes together, gradients included. Knows torch.distributed alone.

Shapes: N rows of this process, M those of all, H hidden, C columns of what is said of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Gathered(NamedTuple):
    """Rows of all processes, in their order, none of them padding."""

    key_MH: Tensor
    whole_MC: Tensor
    first: int
    """Where this process's own rows begin."""


def gather_rows(key_NH: Tensor, told_NC: Tensor, across: bool = True) -> Gathered:
    """Keys (with gradient) and what is said of them (int64) of all processes, however many rows each has.

    The gradient of a key is the sum of what all processes find for it: remote keys learn too. A process that is
    alone, or keeps to itself, gets its own rows back.
    """
    if not across or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Gathered(key_NH, told_NC, 0)
    world, rank = dist.get_world_size(), dist.get_rank()
    mine = torch.tensor([len(key_NH)], device=key_NH.device)
    sizes = [torch.zeros_like(mine) for _ in range(world)]
    dist.all_gather(sizes, mine)
    counts = [int(size) for size in sizes]
    key_MH = _Gather.apply(key_NH, counts, rank)
    whole_MC = _exchange(told_NC, counts)
    return Gathered(key_MH, whole_MC, sum(counts[:rank]))  # type: ignore[arg-type]


def _exchange(rows: Tensor, counts: list[int]) -> Tensor:
    """All processes' rows, padded for the way only."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key_NH: Tensor, counts: list[int], rank: int) -> Tensor:  # type: ignore[override]
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return _exchange(key_NH, counts)

    @staticmethod
    def backward(ctx: Any, gradient_MH: Tensor):  # type: ignore[override]
        total_MH = gradient_MH.contiguous().clone()
        dist.all_reduce(total_MH)
        return total_MH[ctx.own], None, None
