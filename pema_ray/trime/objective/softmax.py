"""The two sums of TRIME's equation 2, in log space, in chunks: no whole logits matrix is in memory. Knows torch alone.

Shapes: N queries (positions whose next token is predicted), M memories, H hidden, V words, S blocks that do not see
each other (segments of a local memory; one block otherwise), C the queries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Logits in memory at a time on a CPU (with a handful of working copies), 4 MiB in float32: they fit its cache, and a
causal memory computes few hidden ones. A GPU gets 16 times as many."""


class Visibility(NamedTuple):
    """Which memories a query sees, chunk by chunk."""

    mask: Callable[[slice, int], Tensor | None]
    """(queries, columns) -> bool [1 or S, C, columns] over the first `columns` memories; None: all are visible."""
    columns: Callable[[slice], int]
    """(queries) -> how many of the first memories any of them may see; later ones are skipped."""


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
    chunk: int | None = None,
) -> MemoryScore:
    """Both sums over the memory (equation 2), differentiable in queries and keys.

    Args:
        label_SN, label_SM: the tokens that follow the queries' and the memories' contexts.
        scale: of the inner products; 1/√H by default.
        chunk: logits at a time; by default `CHUNK`.
    """
    scale = 1 / math.sqrt(query_SNH.shape[-1]) if scale is None else scale
    sums = _MemorySums.apply(query_SNH, key_SMH, label_SN, label_SM, visibility, scale, chunk or _chunk(query_SNH))
    return MemoryScore(*sums)  # type: ignore[misc]


def log_normaliser(state_NH: Tensor, weight_VH: Tensor, chunk: int | None = None) -> Tensor:
    """log Σ_w exp(E_w · f) `[N]`, differentiable in states and embeddings."""
    return _LogSumExp.apply(state_NH, weight_VH, chunk or _chunk(state_NH))  # type: ignore[return-value]


class _MemorySums(torch.autograd.Function):
    """Forward keeps two numbers per query; backward computes the logits once more.

    Positives are few: they are indexed, not masked into a second chunk.
    """

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
        positive_SN = torch.full(label_SN.shape, -math.inf, dtype=sum_dtype(query_SNH), device=query_SNH.device)
        normaliser_SN = torch.full_like(positive_SN, -math.inf)
        for blocks, rows, columns in _chunks(label_SN, visibility, chunk):
            logits_SCM, mask = _logits(query_SNH, key_SMH, visibility, scale, blocks, rows, columns)
            normaliser_SN[blocks, rows] = logits_SCM.logsumexp(-1)
            index = _positives(label_SN[blocks, rows], label_SM[blocks, :columns], mask)
            positive_SN[blocks, rows] = _sum_by_query(logits_SCM[index], index, positive_SN[blocks, rows])
        ctx.save_for_backward(query_SNH, key_SMH, label_SN, label_SM, positive_SN, normaliser_SN)
        ctx.options = (visibility, scale, chunk)
        return positive_SN, normaliser_SN

    @staticmethod
    def backward(ctx: Any, gradient_positive_SN: Tensor, gradient_normaliser_SN: Tensor):  # type: ignore[override]
        query_SNH, key_SMH, label_SN, label_SM, positive_SN, normaliser_SN = ctx.saved_tensors
        visibility, scale, chunk = ctx.options
        # A query without a memory passes no gradient: exp(x - inf) is 0.
        normaliser_SN = torch.where(normaliser_SN == -math.inf, math.inf, normaliser_SN)
        gradient_query, gradient_key = torch.zeros_like(query_SNH), torch.zeros_like(key_SMH)
        for blocks, rows, columns in _chunks(label_SN, visibility, chunk):
            logits_SCM, mask = _logits(query_SNH, key_SMH, visibility, scale, blocks, rows, columns)
            index = _positives(label_SN[blocks, rows], label_SM[blocks, :columns], mask)
            query = index[:2]
            share = (logits_SCM[index] - positive_SN[blocks, rows][query]).exp_()
            weight_SCM = logits_SCM.sub_(normaliser_SN[blocks, rows, None]).exp_()
            weight_SCM.mul_(gradient_normaliser_SN[blocks, rows, None])
            weight_SCM[index] += share.mul_(gradient_positive_SN[blocks, rows][query])
            weight_SCM = weight_SCM.mul_(scale).to(query_SNH.dtype)
            gradient_query[blocks, rows] = weight_SCM @ key_SMH[blocks, :columns]
            gradient_key[blocks, :columns] += weight_SCM.mT @ query_SNH[blocks, rows]
        return gradient_query, gradient_key, None, None, None, None, None


def _chunks(label_SN: Tensor, visibility: Visibility, chunk: int) -> Iterator[tuple[slice, slice, int]]:
    """(blocks, queries, columns) with at most `chunk` logits each, but at least one query's."""
    S, N = label_SN.shape
    if not S or not N:
        return
    widest = max(1, visibility.columns(slice(0, N)))
    rows = max(1, min(N, chunk // widest))
    blocks = max(1, min(S, chunk // (widest * rows)))
    for first_block in range(0, S, blocks):
        for first in range(0, N, rows):
            queries = slice(first, min(N, first + rows))
            if columns := visibility.columns(queries):
                yield slice(first_block, first_block + blocks), queries, columns


def _logits(
    query_SNH: Tensor, key_SMH: Tensor, visibility: Visibility, scale: float, blocks: slice, rows: slice, columns: int
) -> tuple[Tensor, Tensor | None]:
    """A chunk's logits, -inf where hidden, and the visibility mask (None: all are visible)."""
    logits_SCM = (query_SNH[blocks, rows] @ key_SMH[blocks, :columns].mT).to(sum_dtype(query_SNH)).mul_(scale)
    mask = visibility.mask(rows, columns)
    if mask is not None:
        mask = mask if len(mask) == 1 else mask[blocks]
        logits_SCM.masked_fill_(~mask, -math.inf)
    return logits_SCM, mask


def _positives(label_SC: Tensor, label_SM: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Where query and memory are followed by the same token: (blocks, queries, memories), `[P]` each."""
    same_SCM = label_SC[:, :, None] == label_SM[:, None, :]
    if mask is not None:
        same_SCM &= mask
    return same_SCM.nonzero(as_tuple=True)  # type: ignore[return-value]


def _sum_by_query(logit_P: Tensor, index: tuple[Tensor, ...], like_SC: Tensor) -> Tensor:
    """logsumexp of each query's positives; -inf of one that has none."""
    query_P = index[0] * like_SC.shape[1] + index[1]
    top = torch.full_like(like_SC, -math.inf).flatten().scatter_reduce_(0, query_P, logit_P, "amax")
    total = torch.zeros_like(top).index_add_(0, query_P, (logit_P - top[query_P]).exp_())
    return (top + total.log()).view(like_SC.shape)


class _LogSumExp(torch.autograd.Function):
    """Keeps one number per state; backward computes the logits once more."""

    @staticmethod
    def forward(ctx: Any, state_NH: Tensor, weight_VH: Tensor, chunk: int) -> Tensor:  # type: ignore[override]
        total_N = torch.empty(len(state_NH), dtype=sum_dtype(state_NH), device=state_NH.device)
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


def _chunk(tensor: Tensor) -> int:
    return CHUNK if tensor.device.type == "cpu" else 16 * CHUNK


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of sums of exponentials: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)
