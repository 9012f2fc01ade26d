"""The interface between a model and its memory, and a memory in this process. Knows torch and numpy; imports no Ray.

An entry keeps its id from version to version. A document has a string id; tensors hold its `document_code`.

Shapes: B sequences, Q query size, D hidden size, K retrieved entries, N entries, M entries of any choice, L tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pema_ray.errors import UserError
from pema_ray.pluglm.memory.search import NO_DOCUMENT, KeyTable, RetrievedEntries


class Tokens(NamedTuple):
    """Documents, padded on the right."""

    token_ML: Tensor
    """int64"""
    mask_ML: Tensor
    """int64: 1 at tokens, 0 at padding."""


@runtime_checkable
class Knowledge(Protocol):
    """One version of a memory, as a model reads it (`PlugLMModel.attach`)."""

    @property
    def name(self) -> str:
        """`<memory> version <n>`, for messages and answers."""
        ...

    @property
    def version(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the knowledge encoder that made its keys and values."""
        ...

    @property
    def sizes(self) -> tuple[int, int]:
        """(Q, D)"""
        ...

    def __len__(self) -> int: ...

    def search(self, query_BQ: Tensor, k: int, own_B: Tensor | None = None, cosine: bool = False) -> RetrievedEntries:
        """The `k` entries with the largest q · key (or cosine), exactly; equal ones by entry id.

        Args:
            own_B: document codes; a sequence does not retrieve entries of its own document. None: no exclusion.

        Raises:
            UserError: the memory is empty, or a sequence may retrieve fewer than `k` entries.
        """
        ...

    def vectors(self, entry_M: Tensor) -> tuple[Tensor, Tensor]:
        """Stored (keys `[M, Q]`, values `[M, D]`) as float32 on the CPU; `entry_M` may have any shape."""
        ...

    def tokens(self, entry_M: Tensor) -> Tokens:
        """Tokens of the entries' documents."""
        ...

    def pieces_of(self, document_B: Tensor) -> Tensor:
        """Number of entries of each document, by code `[B]`."""
        ...

    def piece_of(self, document_B: Tensor, number_B: Tensor) -> Tensor:
        """Id of each document's `number`-th entry, from 0, in the order of ids `[B]`; -1 where there is none."""
        ...


def document_code(document_id: str) -> int:
    """A hash of a document's id for tensors: the same in every process and version, never `NO_DOCUMENT`."""
    code = int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "little", signed=True)
    return code or 1


def document_codes(document_ids: Sequence[str]) -> np.ndarray:
    """`document_code` of each id, int64; an empty id is no document."""
    return np.array([document_code(name) if name else NO_DOCUMENT for name in document_ids], np.int64)


@dataclass(frozen=True)
class LocalKnowledge:
    """A version of a memory, loaded into this process. Ids ascend.

    Attributes:
        key_NQ, value_ND: float32, float16 or bfloat16, as stored.
        token: all documents' tokens, one after the other (int32).
        end_N: where each document ends in `token` (int64).
        document_N: `document_code` of each entry's document.
    """

    name: str
    version: int
    fingerprint: str
    entry_N: Tensor
    document_N: Tensor
    key_NQ: Tensor
    value_ND: Tensor
    token: Tensor
    end_N: Tensor

    def __post_init__(self) -> None:
        assert bool((self.entry_N[1:] > self.entry_N[:-1]).all()), "entry ids must ascend"

    @cached_property
    def table(self) -> KeyTable:
        """The searchable keys."""
        return KeyTable(self.key_NQ, self.entry_N, self.document_N)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.key_NQ.shape[1], self.value_ND.shape[1]

    def __len__(self) -> int:
        return len(self.entry_N)

    def search(self, query_BQ: Tensor, k: int, own_B: Tensor | None = None, cosine: bool = False) -> RetrievedEntries:
        require_entries(self.name, len(self), k)
        retrieved = self.table.top(query_BQ, k, own_B, cosine)
        require_k(self.name, retrieved)
        return retrieved

    def vectors(self, entry_M: Tensor) -> tuple[Tensor, Tensor]:
        row = self.rows(entry_M)
        return self.key_NQ[row].float(), self.value_ND[row].float()

    def tokens(self, entry_M: Tensor) -> Tokens:
        row = self.rows(entry_M)
        end = self.end_N[row]
        begin = torch.where(row > 0, self.end_N[(row - 1).clamp_min(0)], 0)
        length = end - begin
        place_L = torch.arange(int(length.max()) if len(length) else 0)
        mask_ML = place_L < length[:, None]
        token_ML = self.token[(begin[:, None] + place_L).clamp_max(max(0, len(self.token) - 1))]
        return Tokens(token_ML.long() * mask_ML, mask_ML.long())

    def pieces_of(self, document_B: Tensor) -> Tensor:
        return self.table.pieces_of(document_B)

    def piece_of(self, document_B: Tensor, number_B: Tensor) -> Tensor:
        return self.table.piece_of(document_B, number_B)

    def rows(self, entry_M: Tensor) -> Tensor:
        """Rows of entries. Raises `UserError` for an unknown id."""
        entry_M = entry_M.cpu()
        row = torch.searchsorted(self.entry_N, entry_M).clamp_max(max(0, len(self) - 1))
        missing = entry_M[self.entry_N[row] != entry_M] if len(self) else entry_M.flatten()
        if missing.numel():
            raise UserError(f"{self.name}: has no entry {int(missing.flatten()[0])}.")
        return row


def require_entries(name: str, entries: int, k: int) -> None:
    """Raises `UserError` when a memory has fewer than `k` entries."""
    if not entries:
        raise UserError(f"{name}: the memory is empty. Add entries (pema-ray pluglm memory add), or attach none.")
    if entries < k:
        raise UserError(
            f"{name}: {entries} entries, but the model retrieves top_k={k}. Add entries, or lower top_k to {entries}."
        )


def require_k(name: str, retrieved: RetrievedEntries) -> None:
    """Raises `UserError` when excluding its own document left a sequence with fewer than k entries."""
    if bool((retrieved.entry_BK < 0).any()):
        available = int((retrieved.entry_BK >= 0).sum(1).min())
        raise UserError(
            f"{name}: a sequence may retrieve only {available} entries when its own document's are left out, but the "
            f"model retrieves top_k={retrieved.entry_BK.shape[1]}. Add entries, or lower top_k."
        )
