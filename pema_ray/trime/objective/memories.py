"""The three training memories of TRIME (section 4): local, long, external-style. Knows torch alone.

A memory is the pairs (key, next token) of the positions in one batch; the three differ in which positions see which.
Padding (label -1) is dropped before any inner product, not masked.

Shapes: B segments, L positions of a segment, N positions of this process, M those of all processes, H hidden.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pema_ray.trime.objective.gather import gather_rows
from pema_ray.trime.objective.softmax import MemoryScore, Visibility, memory_score

Kind = Literal["none", "local", "long", "ext"]
PADDING = -1


class Places(NamedTuple):
    """Where the positions of a batch stand; int64, `[B, L]`."""

    segment_BL: Tensor
    """The segment's number in the batch: of all processes, in the text's order where the batch keeps it."""
    document_BL: Tensor
    """The document that a position belongs to."""


def local_memory(key_BLH: Tensor, label_BL: Tensor) -> MemoryScore:
    """Strictly earlier positions of the same segment: B small triangles, never one large square. `[B, L]`.

    Padding stands at the end of a segment, after every position that counts.
    """

    def mask(rows: slice, columns: int) -> Tensor:
        return _earlier(rows, columns, key_BLH.device)[None]

    return memory_score(key_BLH, key_BLH, label_BL, label_BL, Visibility(mask, lambda rows: rows.stop - 1))


def long_memory(key_BLH: Tensor, label_BL: Tensor, places: Places, across_documents: bool, gather: bool) -> MemoryScore:
    """All earlier positions: those of earlier segments, and earlier ones of the same. `[N]`, padding left out.

    Args:
        across_documents: or only those of the query's own document.
        gather: segments of all processes, in their order; else those of this one.
    """
    counts_BL = label_BL != PADDING
    key_NH, label_N, document_N = key_BLH[counts_BL], label_BL[counts_BL], places.document_BL[counts_BL]
    memory = gather_rows(key_NH, torch.stack([label_N, document_N], 1), gather)
    label_M, document_M = memory.tag_MC.unbind(1)

    def columns(rows: slice) -> int:
        return memory.first + rows.stop - 1  # batches lie in the text's order, and so do their processes

    def mask(rows: slice, columns: int) -> Tensor:
        seen_CM = _earlier(rows, columns, key_BLH.device, memory.first)
        if not across_documents:
            seen_CM &= document_M[:columns] == document_N[rows, None]
        return seen_CM[None]

    return _one_block(key_NH, memory.key_MH, label_N, label_M, Visibility(mask, columns))


def external_memory(key_BLH: Tensor, label_BL: Tensor, places: Places, hide_local: bool, gather: bool) -> MemoryScore:
    """All positions of other segments, later ones too, and the local memory unless it is hidden. `[N]`.

    Args:
        hide_local: the coin of `cross-sent-ratio`, the same for all processes: only other segments are seen.
    """
    counts_BL = label_BL != PADDING
    key_NH, label_N, segment_N = key_BLH[counts_BL], label_BL[counts_BL], places.segment_BL[counts_BL]
    memory = gather_rows(key_NH, torch.stack([label_N, segment_N], 1), gather)
    label_M, segment_M = memory.tag_MC.unbind(1)

    def mask(rows: slice, columns: int) -> Tensor:
        seen_CM = segment_M[:columns] != segment_N[rows, None]
        if not hide_local:
            seen_CM |= _earlier(rows, columns, key_BLH.device, memory.first)
        return seen_CM[None]

    return _one_block(key_NH, memory.key_MH, label_N, label_M, Visibility(mask, lambda rows: len(label_M)))


def _one_block(key_NH: Tensor, key_MH: Tensor, label_N: Tensor, label_M: Tensor, visibility: Visibility) -> MemoryScore:
    """One block: every query of this process against the whole memory."""
    score = memory_score(key_NH[None], key_MH[None], label_N[None], label_M[None], visibility)
    return MemoryScore(score.log_positive[0], score.log_normaliser[0])


def _earlier(rows: slice, columns: int, device: torch.device, first: int = 0) -> Tensor:
    """`[C, columns]`: which memories precede each query; row 0 of this process is memory `first`."""
    position_C = torch.arange(first + rows.start, first + rows.stop, device=device)
    return torch.arange(columns, device=device) < position_C[:, None]
