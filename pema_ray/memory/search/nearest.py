"""Nearest rows of a memory, searched part by part and merged: results do not depend on the distribution of parts.

A part is some consecutive shards of the datastore. Similarities are always computed over the rows of one part
together, so that they are equal bit for bit. Among equal similarities the lower row comes first. Imports no Ray.
Shapes: N queries, M entries of a part, K neighbours, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from pema_ray.errors import UserError
from pema_ray.memory.codec import Keys

Metric = Literal["inner_product", "l2"]
RECALL_QUERIES = 256  # keys of dev tokens that the recall of an index is measured with
_RESCORE_CHUNK = 2**20  # numbers of keys decoded at a time while rescoring: they stay in the cache


def require_faiss() -> Any:
    """faiss, an optional dependency.

    Raises:
        UserError: it is not installed.
    """
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it logs every CPU instruction set
    try:
        import faiss
    except ImportError:
        raise UserError("Searching a memory needs faiss: pip install faiss-cpu.") from None
    return faiss


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Neighbours, the most similar first; if there are fewer than K: similarity -inf, token and row -1.

    Attributes:
        similarity_NK: float32, inner product or negative squared distance; token_NK, row_NK: int64.
    """

    similarity_NK: Tensor
    token_NK: Tensor
    row_NK: Tensor


class Neighbours(Protocol):
    """A search of the nearest entries of a datastore."""

    def __len__(self) -> int: ...

    def search(self, query_NH: np.ndarray, k: int) -> SearchResult:
        """The k nearest entries of each query (float32 `[N, H]`)."""
        ...


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """Options of searching a part.

    Attributes:
        probes: inverted lists searched.
        rescore: recompute exact similarities of an approximate index's candidates.
        oversample: candidates per neighbour that are rescored.
    """

    metric: Metric = "inner_product"
    probes: int = 32
    rescore: bool = True
    oversample: int = 2


class DatastorePart:
    """Consecutive rows of a datastore, and their index if it has one.

    Args:
        keys: `[M, H]` as stored; token_M: int; first_row: the first row's number in the datastore.
        index: a faiss index over these rows, in their order; None: every row is compared.
    """

    def __init__(
        self, keys: Keys, token_M: np.ndarray, first_row: int, options: SearchOptions, index: Any = None
    ) -> None:
        self.faiss = require_faiss()
        self.first_row, self.options, self.index = first_row, options, index
        self.keys = keys if index is not None else Keys("float32", np.ascontiguousarray(keys[:]))
        self._token_M = np.asarray(token_M, np.int64)
        if index is not None:
            if index.ntotal != len(keys) or index.d != keys.shape[1]:
                raise UserError(
                    f"The index holds {index.ntotal:,} keys of {index.d}, the datastore's rows {first_row:,} … hold "
                    f"{len(keys):,} of {keys.shape[1]}: they do not belong together. Build the index again."
                )
            if hasattr(index, "nprobe"):
                index.nprobe = min(options.probes, index.nlist)

    def __len__(self) -> int:
        return len(self._token_M)

    def search(self, query_NH: np.ndarray, k: int) -> SearchResult:
        """At most k neighbours among these rows."""
        query_NH = np.ascontiguousarray(query_NH, np.float32)
        if query_NH.ndim != 2 or query_NH.shape[1] != self.keys.shape[1]:
            raise UserError(
                f"Queries of {query_NH.shape[-1]} numbers for a datastore whose keys have {self.keys.shape[1]}: "
                "it was built by a model of another size."
            )
        similarity, row = self._exact(query_NH, k) if self.index is None else self._approximate(query_NH, k)
        token = np.where(row >= 0, self._token_M[row], -1)
        row = np.where(row >= 0, row + self.first_row, -1)
        return SearchResult(torch.from_numpy(similarity), torch.from_numpy(token), torch.from_numpy(row))

    def _exact(self, query_NH: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        kept, requested = min(k, len(self)), min(k + 1, len(self))
        code = self.faiss.METRIC_INNER_PRODUCT if self.options.metric == "inner_product" else self.faiss.METRIC_L2
        distance, row = self.faiss.knn(query_NH, self.keys.data, requested, metric=code)
        similarity = distance if self.options.metric == "inner_product" else -distance
        if requested > kept:  # if the k-th and the next are equal, faiss keeps any of the equal rows
            for query in np.flatnonzero(similarity[:, kept - 1] == similarity[:, kept]):
                self._break_ties(query_NH[query], similarity[query], row[query], kept)
        return _ordered(similarity[:, :kept], row[:, :kept].astype(np.int64))

    def _break_ties(self, query_H: np.ndarray, similarity_K: np.ndarray, row_K: np.ndarray, kept: int) -> None:
        """Replace the rows as similar as the last kept one by the lowest of all such rows, in place."""
        last = similarity_K[kept - 1]
        similarity_M = exact_similarity(query_H[None], self.keys.data[None], self.options.metric)[0]
        above = row_K[:kept][similarity_K[:kept] > last]
        equal_M = np.flatnonzero(np.isclose(similarity_M, last, rtol=1e-6, atol=1e-6))  # another order of summation
        lowest = np.setdiff1d(equal_M, above)[: kept - len(above)]
        if len(above) + len(lowest) == kept:
            row_K[:kept] = np.concatenate([above, lowest])
            similarity_K[:kept] = np.concatenate([similarity_K[: len(above)], np.full(len(lowest), last)])

    def _approximate(self, query_NH: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        options = self.options
        rescore = options.rescore and hasattr(self.index, "pq")  # lists without codes hold the keys themselves
        requested = min(k * (options.oversample if rescore else 1), len(self))
        distance, row = self.index.search(query_NH, requested)
        similarity = distance if options.metric == "inner_product" else -distance
        if rescore:
            similarity = self._rescored(query_NH, row)
        similarity = np.where(row >= 0, similarity, -np.inf).astype(np.float32)
        similarity, row = _ordered(similarity, row)
        kept = min(k, requested)
        return similarity[:, :kept].copy(), row[:, :kept].copy()

    def _rescored(self, query_NH: np.ndarray, row_NK: np.ndarray) -> np.ndarray:
        """Exact similarities of candidates; approximate distances cost up to 1.3 perplexity in the paper."""
        exact_NK = np.empty(row_NK.shape, np.float32)
        step = max(1, _RESCORE_CHUNK // max(1, row_NK.shape[1] * query_NH.shape[1]))
        for begin in range(0, len(query_NH), step):
            rows = row_NK[begin : begin + step]
            key_nKH = self.keys[np.maximum(rows, 0).ravel()].reshape(*rows.shape, -1)
            exact_NK[begin : begin + step] = exact_similarity(
                query_NH[begin : begin + step], key_nKH, self.options.metric
            )
        return exact_NK


def exact_similarity(query_NH: np.ndarray, key_NKH: np.ndarray, metric: Metric) -> np.ndarray:
    """Similarity of each query to keys of its own: float32 `[N, K]`."""
    if metric == "inner_product":
        return np.matmul(key_NKH, query_NH[:, :, None])[:, :, 0]
    return -np.square(key_NKH - query_NH[:, None]).sum(-1)


def _ordered(similarity_NK: np.ndarray, row_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most similar first, of equals the lower row."""
    order = np.lexsort((row_NK, -similarity_NK), axis=1)
    return np.take_along_axis(similarity_NK, order, 1), np.take_along_axis(row_NK, order, 1)


def merge(answers: Sequence[SearchResult], k: int) -> SearchResult:
    """The k nearest of several parts' neighbours: equal to one search over all parts."""
    similarity, token, row = (
        torch.cat([getattr(answer, name) for answer in answers], 1) for name in ("similarity_NK", "token_NK", "row_NK")
    )
    order = torch.from_numpy(np.lexsort((row.numpy(), -similarity.numpy()), axis=1)[:, :k])
    return SearchResult(similarity.gather(1, order), token.gather(1, order), row.gather(1, order))


class OnePieceSearch:
    """All parts of a datastore in this process."""

    def __init__(self, parts: Sequence[DatastorePart]) -> None:
        self._parts = list(parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def search(self, query_NH: np.ndarray, k: int) -> SearchResult:
        """The k nearest entries.

        Raises:
            UserError: k exceeds the number of entries, or the queries have another width than the keys.
        """
        check_k(k, len(self))
        return merge([part.search(query_NH, k) for part in self._parts], k)


def check_k(k: int, entries: int) -> None:
    if k > entries:
        raise UserError(
            f"{k:,} neighbours requested of a datastore of {entries:,} entries. Lower 'neighbours' to at most that."
        )


def recall(approximate: SearchResult, exact: SearchResult) -> float:
    """The share of the exact neighbours in an approximate result."""
    pairs = zip(approximate.row_NK.numpy(), exact.row_NK.numpy(), strict=True)
    return float(np.mean([len(np.intersect1d(rows, exact_rows)) / len(exact_rows) for rows, exact_rows in pairs]))
