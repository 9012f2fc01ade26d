"""Brings the memories of all training processes together, gradients included. Knows torch.distributed alone.

Shapes: N rows of this process, M those of all, H hidden, C tags of a row (its token and segment).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Gathered(NamedTuple):
    """Rows of all processes, in their order, none of them padding."""

    key_MH: Tensor
    tag_MC: Tensor
    first: int
    """Where this process's own rows begin."""


def gather_rows(key_NH: Tensor, tag_NC: Tensor, across: bool = True) -> Gathered:
    """Keys (with gradient) and their tags (int64) of all processes; each may have another number of rows.

    A key's gradient is summed over all processes: remote keys learn too. A single process gets its own rows, and so
    does each one without `across`.
    """
    if not across or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Gathered(key_NH, tag_NC, 0)
    world, rank = dist.get_world_size(), dist.get_rank()
    count = torch.tensor([len(key_NH)], device=key_NH.device)
    sizes = [torch.zeros_like(count) for _ in range(world)]
    dist.all_gather(sizes, count)
    counts = [int(size) for size in sizes]
    key_MH = _Gather.apply(key_NH, counts, rank)
    return Gathered(key_MH, _exchange(tag_NC, counts), sum(counts[:rank]))  # type: ignore[arg-type]


def _exchange(rows: Tensor, counts: list[int]) -> Tensor:
    """All processes' rows; they are padded for the exchange alone."""
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
