"""Exact search for the entries with the largest q · key, or cosine. Mathematics: knows torch alone.

A float32 matrix product proposes candidates; these are scored again in float64, summed in a fixed order, and ranked by
(score, entry id). A score does not depend on an entry's row, so shards and their borders never change a result.

Shapes: B queries, Q their size, K retrieved, N keys, C keys of a chunk, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NO_DOCUMENT = 0
"""The code of "no document", which excludes nothing."""
_CHUNK = 1 << 13  # keys scored at a time: they and their scores fit in a cache
_SPARE = 8  # candidates beyond k, so that rounding seldom needs a second pass
_TINY = 1e-30


class RetrievedEntries(NamedTuple):
    """The best entries of every query, best first; equal scores by entry id."""

    entry_BK: Tensor
    """Entry ids, int64 on the CPU; -1 beyond the last entry."""
    score_BK: Tensor
    """float64 on the CPU; -inf where there is no entry."""


class KeyTable:
    """Keys to be searched, of a whole memory or of one shard.

    Args:
        key_NQ: in any number format; scores use the numbers as stored.
        entry_N: their ids, ascending.
        document_N: their documents' codes, for self-exclusion.
    """

    def __init__(self, key_NQ: Tensor, entry_N: Tensor, document_N: Tensor) -> None:
        self._key_NQ, self._entry_N = key_NQ, entry_N
        self._by_document = torch.argsort(document_N, stable=True)
        self._document_N = document_N[self._by_document]
        self._norm_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self._entry_N)

    @torch.no_grad()
    def top(self, query_BQ: Tensor, k: int, own_B: Tensor | None = None, cosine: bool = False) -> RetrievedEntries:
        """The `k` best entries of each query, without those of its own document (`own_B`, codes)."""
        query_BQ = query_BQ.detach().float().cpu()
        best = no_entries(len(query_BQ), k)
        hidden = self._rows_of(own_B) if own_B is not None else None
        for start in range(0, len(self), _CHUNK):
            best = merge([best, self._chunk(query_BQ, k, start, hidden, cosine, best.score_BK[:, -1])], k)
        return best

    def _chunk(
        self, query_BQ: Tensor, k: int, start: int, hidden: tuple[Tensor, Tensor] | None, cosine: bool, least_B: Tensor
    ) -> RetrievedEntries:
        """The best entries of one chunk. `least_B`: each query's k-th best score so far."""
        key_CQ = self._key_NQ[start : start + _CHUNK].float()
        norm_C = self._norms()[start : start + _CHUNK]
        length_B = query_BQ.double().norm(dim=1)
        if cosine:
            unit_BQ = query_BQ / length_B.float().clamp_min(_TINY)[:, None]
            rough_BC = unit_BQ @ key_CQ.T / norm_C.float().clamp_min(_TINY)
        else:
            rough_BC = query_BQ @ key_CQ.T
        if hidden is not None:
            query, row = hidden
            in_chunk = (row >= start) & (row < start + len(key_CQ))
            rough_BC[query[in_chunk], row[in_chunk] - start] = -torch.inf
        # |rough - exact| ≤ 2 (Q + 2) u |q| |key| with u = 2⁻²⁴: by so much a better candidate may have been missed.
        scale_B = torch.ones_like(length_B) if cosine else length_B * norm_C.max()
        slack_B = 2 * (query_BQ.shape[1] + 2) * 2.0**-24 * scale_B
        rough_BM, row_BM = rough_BC.topk(min(k + _SPARE, len(key_CQ)), dim=1)
        best = self._ranked(query_BQ, key_CQ, row_BM, rough_BM, start, k, cosine)
        if rough_BM.shape[1] < len(key_CQ):
            least_B = torch.maximum(least_B, best.score_BK[:, -1])
            last_B = rough_BM[:, -1].double()
            for b in torch.nonzero((last_B + slack_B >= least_B) & last_B.isfinite()).flatten().tolist():
                row_1M = torch.nonzero(rough_BC[b].double() + slack_B[b] >= least_B[b]).T
                exact = self._ranked(query_BQ[b : b + 1], key_CQ, row_1M, rough_BC[b][row_1M], start, k, cosine)
                best.entry_BK[b], best.score_BK[b] = exact.entry_BK[0], exact.score_BK[0]
        return best

    def _ranked(
        self, query_BQ: Tensor, key_CQ: Tensor, row_BM: Tensor, rough_BM: Tensor, start: int, k: int, cosine: bool
    ) -> RetrievedEntries:
        """Candidates, scored exactly and ranked; hidden ones (-inf) become -1."""
        score_BM = exact_scores(query_BQ, key_CQ[row_BM], cosine)
        hidden_BM = rough_BM == -torch.inf
        entry_BM = self._entry_N[row_BM + start].masked_fill(hidden_BM, -1)
        return merge([RetrievedEntries(entry_BM, score_BM.masked_fill(hidden_BM, -torch.inf))], k)

    def _norms(self) -> Tensor:
        if self._norm_N is None:
            parts = [part.double().norm(dim=1) for part in self._key_NQ.split(_CHUNK)]
            self._norm_N = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        return self._norm_N

    def _rows_of(self, document_B: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (query, row) of entries that belong to a query's document."""
        first, count = self._span_of(document_B)
        query = torch.arange(len(document_B)).repeat_interleave(count)
        within = torch.arange(len(query)) - (count.cumsum(0) - count).repeat_interleave(count)
        return query, self._by_document[first.repeat_interleave(count) + within]

    def pieces_of(self, document_B: Tensor) -> Tensor:
        """Number of entries of each document `[B]`."""
        return self._span_of(document_B)[1]

    def piece_of(self, document_B: Tensor, number_B: Tensor) -> Tensor:
        """Id of each document's `number`-th entry, from 0, in the order of ids `[B]`; -1 where there is none."""
        first, count = self._span_of(document_B)
        exists = (number_B >= 0) & (number_B < count)
        if not len(self):
            return torch.full_like(first, -1)
        row = self._by_document[(first + number_B).clamp(0, len(self) - 1)]
        return torch.where(exists, self._entry_N[row], -1)

    def _span_of(self, document_B: Tensor) -> tuple[Tensor, Tensor]:
        """(start of each document's rows in `_by_document`, number of rows)."""
        document_B = document_B.cpu()
        first = torch.searchsorted(self._document_N, document_B)
        count = torch.searchsorted(self._document_N, document_B, right=True) - first
        count[document_B == NO_DOCUMENT] = 0
        return first, count


def no_entries(queries: int, k: int) -> RetrievedEntries:
    """The result of a search without entries."""
    return RetrievedEntries(torch.full((queries, k), -1), torch.full((queries, k), -torch.inf, dtype=torch.float64))


def exact_scores(query_BQ: Tensor, key_BMQ: Tensor, cosine: bool) -> Tensor:
    """q · key, or their cosine, `[B, M]` float64, summed in a fixed order: equal keys have equal scores."""
    query_B1Q, key_BMQ = query_BQ.double().unsqueeze(1), key_BMQ.double()
    score_BM = _sum(query_B1Q * key_BMQ)
    if not cosine:
        return score_BM
    return score_BM / (_sum(query_B1Q**2).sqrt() * _sum(key_BMQ**2).sqrt()).clamp_min(_TINY)


def _sum(x_BMQ: Tensor) -> Tensor:
    """Sum over the last dimension in a fixed order: `sum` may choose one by the shapes, `cumsum` does not."""
    return x_BMQ.cumsum(-1)[..., -1]


def merge(parts: Sequence[RetrievedEntries], k: int) -> RetrievedEntries:
    """The best `k` of several results, padded with -1."""
    entry, score = (torch.cat(columns, 1) for columns in zip(*parts))
    if (missing := k - entry.shape[1]) > 0:
        entry = torch.nn.functional.pad(entry, (0, missing), value=-1)
        score = torch.nn.functional.pad(score, (0, missing), value=-torch.inf)
    by_entry = entry.argsort(1)
    entry, score = entry.gather(1, by_entry), score.gather(1, by_entry)
    order = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return RetrievedEntries(entry.gather(1, order), score.gather(1, order))
