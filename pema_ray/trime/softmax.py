"""The two sums of TRIME's equation 2, in log space, chunked: neither logits matrix is ever whole. Knows torch alone.

Shapes: N queries (positions whose next token is predicted), M memories, H hidden, V words, S blocks that do not see
each other (segments of a local memory; one block otherwise), C the queries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Logits that are in memory at a time (times a handful of working copies): 16 MiB in float32."""


class Visibility(NamedTuple):
    """Which memories a query sees, asked for chunk by chunk."""

    mask: Callable[[slice, int], Tensor | None]
    """(queries, columns) -> bool [1 or S, C, columns] over the first so many memories; None: all of them."""
    columns: Callable[[slice], int]
    """(queries) -> how many memories from the first on any of them may see; those after need not be looked at."""


class MemoryScore(NamedTuple):
    """The memory's part of equation 2. Shapes as the queries'."""

    log_positive: Tensor
    """log Σ_{j visible, x_j = x} exp(g · g_j · scale); -inf where there is none."""
    log_normaliser: Tensor
    """log Σ_{j visible} exp(g · g_j · scale); -inf where the memory is empty."""


def memory_score(
    query_SNH: Tensor,
    key_SMH: Tensor,
    label_SN: Tensor,
    label_SM: Tensor,
    visibility: Visibility,
    scale: float | None = None,
    chunk: int = CHUNK,
) -> MemoryScore:
    """Both sums over the memory (equation 2), differentiable in queries and keys.

    Args:
        label_SN, label_SM: the tokens that follow the queries' and the memories' contexts.
        scale: of the inner products; 1/√H by default.
        chunk: logits at a time.
    """
    scale = 1 / math.sqrt(query_SNH.shape[-1]) if scale is None else scale
    sums = _MemorySums.apply(query_SNH, key_SMH, label_SN, label_SM, visibility, scale, chunk)
    return MemoryScore(*sums)  # type: ignore[misc]


def log_normaliser(state_NH: Tensor, weight_VH: Tensor, chunk: int = CHUNK) -> Tensor:
    """log Σ_w exp(E_w · f) `[N]`, differentiable in states and embeddings."""
    return _LogSumExp.apply(state_NH, weight_VH, chunk)  # type: ignore[return-value]


class _MemorySums(torch.autograd.Function):
    """Forward keeps two numbers per query; backward computes the logits once more."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query_SNH: Tensor,
        key_SMH: Tensor,
        label_SN: Tensor,
        label_SM: Tensor,
        visibility: Visibility,
        scale: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        wide = _wide(query_SNH)
        positive_SN = torch.full(label_SN.shape, -math.inf, dtype=wide, device=query_SNH.device)
        normaliser_SN = torch.full_like(positive_SN, -math.inf)
        for blocks, rows, columns in _chunks(label_SN, visibility, chunk):
            logits_SCM = _logits(query_SNH, key_SMH, visibility, scale, blocks, rows, columns)
            normaliser_SN[blocks, rows] = logits_SCM.logsumexp(-1)
            same_SCM = _same(label_SN, label_SM, blocks, rows, columns)
            positive_SN[blocks, rows] = logits_SCM.masked_fill_(~same_SCM, -math.inf).logsumexp(-1)
        ctx.save_for_backward(query_SNH, key_SMH, label_SN, label_SM, positive_SN, normaliser_SN)
        ctx.asked = (visibility, scale, chunk)
        return positive_SN, normaliser_SN

    @staticmethod
    def backward(ctx: Any, gradient_positive_SN: Tensor, gradient_normaliser_SN: Tensor):  # type: ignore[override]
        query_SNH, key_SMH, label_SN, label_SM, positive_SN, normaliser_SN = ctx.saved_tensors
        visibility, scale, chunk = ctx.asked
        # A query without a positive, or without a memory, hands no gradient on: exp(x - inf) is 0.
        positive_SN, normaliser_SN = (
            torch.where(t == -math.inf, math.inf, t).unsqueeze(-1) for t in (positive_SN, normaliser_SN)
        )
        gradient_query, gradient_key = torch.zeros_like(query_SNH), torch.zeros_like(key_SMH)
        for blocks, rows, columns in _chunks(label_SN, visibility, chunk):
            logits_SCM = _logits(query_SNH, key_SMH, visibility, scale, blocks, rows, columns)
            weight_SCM = (logits_SCM - normaliser_SN[blocks, rows]).exp_()
            weight_SCM.mul_(gradient_normaliser_SN[blocks, rows, None])
            same_SCM = _same(label_SN, label_SM, blocks, rows, columns)
            share_SCM = (logits_SCM.masked_fill_(~same_SCM, -math.inf) - positive_SN[blocks, rows]).exp_()
            weight_SCM.add_(share_SCM.mul_(gradient_positive_SN[blocks, rows, None])).mul_(scale)
            weight_SCM = weight_SCM.to(query_SNH.dtype)
            gradient_query[blocks, rows] = weight_SCM @ key_SMH[blocks, :columns]
            gradient_key[blocks, :columns] += weight_SCM.mT @ query_SNH[blocks, rows]
        return gradient_query, gradient_key, None, None, None, None, None


def _chunks(label_SN: Tensor, visibility: Visibility, chunk: int) -> Iterator[tuple[slice, slice, int]]:
    """(blocks, queries, columns) with at most `chunk` logits each, but at least one query's."""
    S, N = label_SN.shape
    if not S or not N:
        return
    most = max(1, visibility.columns(slice(0, N)))
    rows = max(1, min(N, chunk // most))
    blocks = max(1, min(S, chunk // (most * rows)))
    for first_block in range(0, S, blocks):
        for first in range(0, N, rows):
            queries = slice(first, min(N, first + rows))
            if columns := visibility.columns(queries):
                yield slice(first_block, first_block + blocks), queries, columns


def _logits(
    query_SNH: Tensor, key_SMH: Tensor, visibility: Visibility, scale: float, blocks: slice, rows: slice, columns: int
) -> Tensor:
    logits_SCM = (query_SNH[blocks, rows] @ key_SMH[blocks, :columns].mT).to(_wide(query_SNH)).mul_(scale)
    mask = visibility.mask(rows, columns)
    return (
        logits_SCM if mask is None else logits_SCM.masked_fill_(~mask if len(mask) == 1 else ~mask[blocks], -math.inf)
    )


def _same(label_SN: Tensor, label_SM: Tensor, blocks: slice, rows: slice, columns: int) -> Tensor:
    return label_SN[blocks, rows, None] == label_SM[blocks, None, :columns]


class _LogSumExp(torch.autograd.Function):
    """As `_MemorySums`: one number per state is kept."""

    @staticmethod
    def forward(ctx: Any, state_NH: Tensor, weight_VH: Tensor, chunk: int) -> Tensor:  # type: ignore[override]
        total_N = torch.empty(len(state_NH), dtype=_wide(state_NH), device=state_NH.device)
        for rows in _rows(len(state_NH), len(weight_VH), chunk):
            total_N[rows] = (state_NH[rows] @ weight_VH.mT).to(total_N.dtype).logsumexp(-1)
        ctx.save_for_backward(state_NH, weight_VH, total_N)
        ctx.chunk = chunk
        return total_N

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor):  # type: ignore[override]
        state_NH, weight_VH, total_N = ctx.saved_tensors
        gradient_state, gradient_weight = torch.empty_like(state_NH), torch.zeros_like(weight_VH)
        for rows in _rows(len(state_NH), len(weight_VH), ctx.chunk):
            share_CV = (state_NH[rows] @ weight_VH.mT).to(total_N.dtype).sub_(total_N[rows, None]).exp_()
            share_CV = share_CV.mul_(gradient_N[rows, None]).to(state_NH.dtype)
            gradient_state[rows] = share_CV @ weight_VH
            gradient_weight += share_CV.mT @ state_NH[rows]
        return gradient_state, gradient_weight, None


def _rows(rows: int, columns: int, chunk: int) -> Iterator[slice]:
    step = max(1, chunk // max(1, columns))
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))


def _wide(tensor: Tensor) -> torch.dtype:
    """Sums of exponentials are taken in float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)
